"""Flags of diffusers' and ColossalAI's DreamBooth scripts that this one does not have: not needed, or refused."""

import argparse
from collections.abc import Callable, Sequence

from utils.errors import UserError

# Accepted, and of no effect: switches, flags with any value, and flags of which some values mean what is done anyway.
SWITCHES = [
    "enable_xformers_memory_efficient_attention",
    "set_grads_to_none",
    "pre_compute_text_embeddings",
    "allow_tf32",
]
ANY_VALUE = ["dataloader_num_workers", "local_rank", "validation_scheduler"]
SOME_VALUES = {  # name: (these, what to do about another)
    "variant": (["fp16"], "of the variants only fp16 is read, by itself: leave --variant out"),
    "revision": (["main"], "a folder has no revisions: name the folder of the one that you mean"),
    "tokenizer_max_length": (["77"], "Stable Diffusion v1 reads 77 tokens: leave it out"),
    "plugin": (
        ["torch_ddp", "torch_ddp_fp16"],
        "TorchDDP is the only plugin here; --low_memory or --offload_optimizer take less memory",
    ),
    "placement": (["cuda"], "--offload_optimizer all keeps the optimizer's state in the host's memory"),
}
NOT_NEEDED = (*SWITCHES, *ANY_VALUE, *SOME_VALUES)
_REFUSED = {  # what to do: the flags
    "the text encoder stays as it is; leave it out (a base with another text_encoder/ is used)": "train_text_encoder",
    "nothing is uploaded from here; when the run is over: hf upload NAME OUTPUT_DIR": (
        "push_to_hub hub_token hub_model_id"
    ),
    "it is for DeepFloyd IF; leave it out": (
        "validation_images class_labels_conditioning text_encoder_use_attention_mask"
    ),
    "the result is always a complete pipeline; leave it out": "skip_save_text_encoder",
    "--dry_run only checks; --max_train_steps=10 is a short run": "test_run",
    "put that UNet's folder into a copy of the base, in the place of unet/": "externel_unet_path",
    "--offload_optimizer moments or all keeps the optimizer's state in the host's memory": "offload_optim_frac",
    "the UNet itself is trained; leave it out": "rank lora_dropout lora_alpha use_lora lora_r",
    "what is transparent in a photo lies on white; leave it out": "alpha_mask",
    "photos are resized by Lanczos' filter; leave it out": "image_interpolation_mode",
    "--validation_steps N says how many steps lie between validations": "validation_epochs",
    "--gradient_accumulation_steps N": "gradient_accumulation",
    "there is no running average of the weights; leave it out": "use_ema",
}
REFUSED = {name: advice for advice, names in _REFUSED.items() for name in names.split()}
REPORTS = {"none": "none", "tensorboard": "tensorboard", "all": "tensorboard"}


def add_not_needed(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of NOT_NEEDED: not shown by --help, and in the namespace only if they were given."""
    for name in NOT_NEEDED:
        short = ["-p"] if name == "plugin" else []
        takes = dict(action="store_true") if name in SWITCHES else dict(type=_one_of(*SOME_VALUES.get(name, ([], ""))))
        parser.add_argument(f"--{name}", *short, **takes, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _one_of(values: list[str], instead: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if values and text.lower() not in values:
            raise argparse.ArgumentTypeError(f"{text} is not here: {instead}")
        return text

    return check


def report_to(text: str) -> str:
    """--report_to's value: all is TensorBoard, the only one there is beside metrics.jsonl."""
    if text not in REPORTS:
        advice = "; its logs can be sent there: wandb sync --sync-tensorboard OUTPUT_DIR/logs"
        known = f"none, or tensorboard{advice if text == 'wandb' else ''}"
        raise argparse.ArgumentTypeError(f"{text} is not here: {known}")
    return text


def take_out_not_needed(args: argparse.Namespace) -> list[str]:
    """Removes the flags of NOT_NEEDED from the parsed arguments; a note that names those that were given."""
    given = [name for name in NOT_NEEDED if hasattr(args, name)]
    for name in given:
        delattr(args, name)
    notes = [f"not needed here, without effect: {', '.join(f'--{name}' for name in given)}"] if given else []
    if args.report_to == "all":
        notes.append("--report_to all is tensorboard here, beside metrics.jsonl")
    args.report_to = REPORTS[args.report_to]
    return notes


def refuse(words: Sequence[str]) -> None:
    """Raises UserError if one of the command line's words is a flag of REFUSED: what to do instead, for each."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(word[2:].partition("=")[0] for word in words if word.startswith("--")):
        if name in REFUSED:
            found.setdefault(REFUSED[name], []).append(f"--{name}")
    if found:
        raise UserError("; ".join(f"{', '.join(flags)} is not here: {advice}" for advice, flags in found.items()))
