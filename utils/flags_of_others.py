"""Flags of diffusers' and ColossalAI's DreamBooth scripts that this one does not have: not needed, or refused."""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from utils.errors import UserError


class NotNeeded(NamedTuple):
    """A flag that is accepted and does nothing.

    `values` are those that mean what is done anyway: none for a flag without value, "*" for any. `instead` says what
    to do about another value.
    """

    note: str
    values: tuple[str, ...] = ()
    instead: str = ""


NOT_NEEDED = {
    "enable_xformers_memory_efficient_attention": NotNeeded("torch's own attention and fused kernels are as good"),
    "set_grads_to_none": NotNeeded("gradients are overwritten in place"),
    "pre_compute_text_embeddings": NotNeeded("prompts are always encoded once, before training"),
    "allow_tf32": NotNeeded("the arithmetic follows --mixed_precision"),
    "dataloader_num_workers": NotNeeded("photos are decoded once, before training", ("*",)),
    "local_rank": NotNeeded("torchrun says it to every process", ("*",)),
    "validation_scheduler": NotNeeded("validation draws with the base's own scheduler", ("*",)),
    "variant": NotNeeded(
        "weights of the variant fp16 are found if there are no others",
        ("fp16",),
        "of the variants only fp16 is read, by itself: leave --variant out",
    ),
    "revision": NotNeeded(
        "a folder has no revisions", ("main",), "a folder has no revisions: name the folder of the one that you mean"
    ),
    "tokenizer_max_length": NotNeeded(
        "Stable Diffusion v1 reads 77 tokens", ("77",), "Stable Diffusion v1 reads 77 tokens: leave it out"
    ),
    "plugin": NotNeeded(
        "TorchDDP is the plugin, --mixed_precision the precision",
        ("torch_ddp", "torch_ddp_fp16"),
        "TorchDDP is the only plugin here; --low_memory or --offload_optimizer take less memory",
    ),
    "placement": NotNeeded(
        "weights are on the GPU", ("cuda",), "--offload_optimizer all keeps the optimizer's state in the host's memory"
    ),
}
_HUB = "nothing is uploaded from here; when the run is over: hf upload NAME OUTPUT_DIR"
_LORA = "the UNet itself is trained; leave it out"
_IF = "it is for DeepFloyd IF; leave it out"
REFUSED = {
    "train_text_encoder": "the text encoder stays as it is; leave it out (a base with another text_encoder/ is used)",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_model_id": _HUB,
    "validation_images": _IF,
    "class_labels_conditioning": _IF,
    "text_encoder_use_attention_mask": _IF,
    "skip_save_text_encoder": "the result is always a complete pipeline; leave it out",
    "test_run": "--dry_run only checks; --max_train_steps=10 is a short run",
    "externel_unet_path": "put that UNet's folder into a copy of the base, in the place of unet/",
    "offload_optim_frac": "--offload_optimizer moments or all keeps the optimizer's state in the host's memory",
    "rank": _LORA,
    "lora_dropout": _LORA,
    "lora_alpha": _LORA,
    "use_lora": _LORA,
    "lora_r": _LORA,
    "image_interpolation_mode": "photos are resized bilinearly, as the recipe does; leave it out",
    "validation_epochs": "--validation_steps N says how many steps lie between validations",
    "gradient_accumulation": "--gradient_accumulation_steps N",
    "use_ema": "there is no running average of the weights; leave it out",
}
SHORT = {"plugin": "-p"}
REPORTS = {"none": "none", "tensorboard": "tensorboard", "all": "tensorboard"}


def add_not_needed(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of NOT_NEEDED: not shown by --help, and in the namespace only if they were given."""
    for name, flag in NOT_NEEDED.items():
        names = [f"--{name}", *([SHORT[name]] if name in SHORT else [])]
        if flag.values:
            parser.add_argument(*names, type=_one_of(flag), default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        else:
            parser.add_argument(*names, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _one_of(flag: NotNeeded) -> Callable[[str], str]:
    def check(text: str) -> str:
        if flag.values != ("*",) and text.lower() not in flag.values:
            raise argparse.ArgumentTypeError(f"{text} is not here: {flag.instead}")
        return text

    return check


def report_to(text: str) -> str:
    """--report_to's value: all is TensorBoard, the only one there is beside metrics.jsonl."""
    if text not in REPORTS:
        advice = (
            "; its logs can be sent there: wandb sync --sync-tensorboard OUTPUT_DIR/logs" if text == "wandb" else ""
        )
        raise argparse.ArgumentTypeError(f"{text} is not here: none, or tensorboard{advice}")
    return text


def take_out_not_needed(args: argparse.Namespace) -> list[str]:
    """Removes the flags of NOT_NEEDED from the parsed arguments; a note for each that was given."""
    notes = []
    for name, flag in NOT_NEEDED.items():
        if hasattr(args, name):
            delattr(args, name)
            notes.append(f"--{name} is not needed: {flag.note}")
    if args.report_to == "all":
        notes.append("--report_to all is tensorboard here, beside metrics.jsonl")
    args.report_to = REPORTS[args.report_to]
    return notes


def refuse(words: Sequence[str]) -> None:
    """Raises UserError if one of the command line's words is a flag of REFUSED: what to do instead, for each."""
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    refused = [name for name in dict.fromkeys(names) if name in REFUSED]
    if refused:
        advice = dict.fromkeys(REFUSED[name] for name in refused)
        flags = {text: ", ".join(f"--{name}" for name in refused if REFUSED[name] == text) for text in advice}
        raise UserError("; ".join(f"{flags[text]} is not here: {text}" for text in advice))
