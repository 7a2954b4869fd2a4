"""Command line of train_dreambooth_colossalai.py. No torch import here, so that --help is instant."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.command_line import (
    Parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed_int,
    unit_float,
    with_config,
)
from utils.errors import UserError
from utils.flags_of_others import add_not_needed, refuse, report_to, take_out_not_needed
from utils.models.folder import is_reserved
from utils.values import as_prompt

Add = Callable[..., None]  # Parser.add_group's: the flag, its line of help, its type (bool: a switch), its default
OFFSET_NOISE = 0.1  # of diffusers' --offset_noise, which has no value
LOSS = ("snr_gamma",)  # flags that are keywords of diffusion.Loss
LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def training_parser() -> Parser:
    """The parser; flag names and meanings are those of diffusers' DreamBooth script wherever it has them."""
    parser = Parser(
        prog="train_dreambooth_colossalai.py",
        usage="torchrun --nproc_per_node 1 %(prog)s \\\n"
        "         --pretrained_model_name_or_path PATH --instance_data_dir DIR \\\n"
        "         --instance_prompt TEXT [any of the flags below]",
        description="DreamBooth fine-tuning of Stable Diffusion v1.4 on ColossalAI: photos of one subject in, "
        "a complete pipeline that draws it out.",
        epilog="(!): not the default, or not the meaning, of the flag of that name in diffusers' script.",
        refuse=refuse,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="flags from a JSON file, or from a run's run.json")
    _add_files(parser.add_group("files"))
    _add_prior_preservation(parser.add_group("prior preservation"))
    _add_run(parser.add_group("run"))
    _add_optimization(parser.add_group("optimization"))
    output = parser.add_group("output and logs")
    _add_output(output)
    _add_monitoring(output)
    hidden: Any = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # others' names of two flags
    parser.add_argument("--save_steps", dest="checkpointing_steps", type=positive_int, **hidden)
    parser.add_argument("--offset_noise", dest="noise_offset", action="store_const", const=OFFSET_NOISE, **hidden)
    add_not_needed(parser)
    return parser


def _add_files(add: Add) -> None:
    add("--pretrained_model_name_or_path", "the base: a folder, a file, a cached Hub name", Path, required=True)
    add("--pretrained_vae_name_or_path", "another VAE than the base's: a folder, or one file", Path)
    add("--tokenizer_name", "folder of another CLIPTokenizer than the base's own", Path)
    add("--instance_data_dir", "the photos of the subject; NAME.txt beside NAME.jpg says what that one shows", Path)
    add("--output_dir", "the new pipeline (!)", Path, Path("output"))
    add("--instance_prompt", 'what the photos show, as in "a photo of my cat."', as_prompt)
    add("--concepts_list", "several subjects at once: a JSON list, in the place of the flags that name one", Path)


def _add_prior_preservation(add: Add) -> None:
    add("--with_prior_preservation", "train on images of the class too, so that it stays", bool)
    add("--class_data_dir", "the class images; missing ones are made there first", Path)
    add("--class_prompt", 'what the class images show, as in "a photo of a cat."', as_prompt)
    add("--prior_loss_weight", "of the class images' loss", non_negative_float, 1.0)
    add("--num_class_images", "class images to use; own and made ones are not mixed (!)", positive_int, 100)
    add("--sample_batch_size", "class images made at once per rank", positive_int, 4)
    precisions = dict(choices=["no", "fp32", "fp16", "bf16"])
    add("--prior_generation_precision", "dtype to make them in (default: fp16 on a GPU, else fp32) (!)", **precisions)


def _add_run(add: Add) -> None:
    add("--seed", "fixes every random draw (!)", seed_int, 0)
    add("--resolution", "side of the training crops in pixels", positive_int, 512)
    add("--center_crop", "crop the middle of a photo that is not square, not a random place", bool)
    add("--crop_bars", "cut off bars of one colour along a photo's edges, as a screenshot has", bool)
    add("--train_batch_size", "photos per rank and forward pass", positive_int, 4)
    add("--num_train_epochs", "passes over the photos, not the class images (!)", positive_int, 1)
    add("--max_train_steps", "optimisation steps; overrides --num_train_epochs", positive_int)
    add("--gradient_accumulation_steps", "forward passes per optimisation step", positive_int, 1)
    add("--gradient_checkpointing", "less memory at larger batches, more time", bool)
    places = dict(choices=["none", "moments", "all"])
    add("--offload_optimizer", "what of AdamW is in the host's memory: less of the GPU's (default: none)", **places)
    add("--use_8bit_adam", "AdamW's moments in 8 bits: less memory, nearly the same result", bool)
    add("--low_memory", "--gradient_checkpointing and --offload_optimizer all", bool)
    precisions = dict(choices=["fp16", "bf16", "no"])
    add("--mixed_precision", "dtype of all but the masters (default: fp16 on a GPU, else no) (!)", **precisions)
    add("--dry_run", "check everything that can be checked without training, then stop", bool)
    add("--json", "with --dry_run: one JSON object for a program (docs/serving.md), no table", bool)
    add("--max_nonfinite_steps", "stop after so many in a row without a finite gradient", positive_int, 20)
    add("--no_cuda_graph", "launch every kernel by itself: slower, for debugging", bool)
    add("--deterministic", "same bits in every run of the same command on a GPU: slower", bool)
    add("--debug", "show the traceback of an error", bool)


def _add_optimization(add: Add) -> None:
    add("--learning_rate", "AdamW's", positive_float, 5e-6)
    add("--scale_lr", "multiply the learning rate by ranks x accumulation x batch size", bool)
    add("--lr_scheduler", "of the learning rate", choices=LR_SCHEDULERS, default="constant")
    add("--lr_warmup_steps", "steps; constant has none", non_negative_int, 500)
    add("--lr_num_cycles", "restarts of cosine_with_restarts", positive_int, 1)
    add("--lr_power", "exponent of polynomial", positive_float, 1.0)
    add("--adam_beta1", "AdamW's", unit_float, 0.9)
    add("--adam_beta2", "AdamW's", unit_float, 0.999)
    add("--adam_weight_decay", "AdamW's", non_negative_float, 1e-2)
    add("--adam_epsilon", "AdamW's", positive_float, 1e-8)
    add("--max_grad_norm", "clip gradients to this norm; 0: off (!)", non_negative_float, 1.0)
    add("--snr_gamma", "min-SNR loss weights with this gamma; 5 is usual (default: off) (!)", positive_float)
    add("--noise_offset", "noise common to a channel; 0.1 at most", non_negative_float, 0.0)


def _add_output(add: Add) -> None:
    add("--save_dtype", "of the saved UNet (default: as in the base's file; fp16 rounds)", choices=["fp32", "fp16"])
    formats = dict(choices=["safetensors", "bin"], default="safetensors")
    add("--save_format", "file format of the saved UNet; bin is the recipe's", **formats)
    add("--export_single_file", "the result as one .safetensors file too, for ComfyUI and A1111", Path)
    add("--logging_dir", "TensorBoard's, inside --output_dir (!)", Path, Path("logs"))
    add("--checkpointing_steps", "a checkpoint every N steps", positive_int, 500)
    add("--checkpoints_total_limit", "keep the newest N of them (default: all)", positive_int)
    add("--resume_from_checkpoint", "its folder, 'checkpoint-N' in --output_dir, or the 'latest' there", str)
    add("--allow_changes", "resume also with other photos, base model or arguments", bool)
    add("--overwrite_output_dir", "start over where an unfinished run's checkpoints, or another's result, are", bool)


def _add_monitoring(add: Add) -> None:
    many = dict(action="append")
    add("--validation_prompt", "drawn with fixed seeds while training, into OUTPUT/validation/ (!)", as_prompt, **many)
    add("--validation_negative_prompt", "what these images steer away from")
    add("--validation_inference_steps", "their denoising steps", positive_int, 50)
    add("--validation_guidance_scale", "their strength of the prompt; 1: no guidance", non_negative_float, 7.5)
    add("--validation_steps", "steps between validations (default: 100 with --validation_prompt)", positive_int)
    add("--num_validation_images", "images a validation and prompt", positive_int, 4)
    places = dict(metavar="{none,tensorboard,all}")
    add("--report_to", "besides metrics.jsonl; all is tensorboard (!)", report_to, "none", **places)


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Parsed and checked arguments, the command line with the flags of its --config FILE in the file's place, and
    notes on flags that are not needed.

    Raises UserError with one line naming the flag.
    """
    parser = training_parser()
    argv = with_config(sys.argv[1:] if argv is None else argv, parser)
    parser.refuse(argv)
    args = parser.parse_args(argv)
    notes = take_out_not_needed(args)
    _check_concept_flags(args)
    args.gradient_checkpointing |= args.low_memory
    args.offload_optimizer = args.offload_optimizer or ("all" if args.low_memory else "none")
    if args.logging_dir.is_absolute() or ".." in args.logging_dir.parts:
        raise UserError(f"--logging_dir {args.logging_dir} is not inside --output_dir; give it a name like 'logs'")
    if args.logging_dir.parts and is_reserved(args.logging_dir.parts[0]):
        raise UserError(f"--logging_dir {args.logging_dir} is a part of the result; give it a name like 'logs'")
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint continues a run, --overwrite_output_dir starts over: give one")
    return args, argv, notes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of parse_command_line alone."""
    return parse_command_line(argv)[0]


def _check_concept_flags(args: argparse.Namespace) -> None:
    subject = ["instance_data_dir", "instance_prompt"]
    class_ = ["class_data_dir", "class_prompt"]
    given = [name for name in subject + class_ if getattr(args, name) is not None]
    if args.concepts_list:
        if given:
            raise UserError(f"--concepts_list and --{given[0]} say the same twice; leave --{given[0]} out")
        return
    missing = [name for name in subject if name not in given]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(f'--{name}' for name in missing)}")
    missing = [f"--{name}" for name in class_ if name not in given]
    if args.with_prior_preservation and missing:
        raise UserError(f"--with_prior_preservation needs {' and '.join(missing)}")
    if not args.with_prior_preservation and len(missing) < 2:
        flag = next(f"--{name}" for name in class_ if name in given)
        raise UserError(f"{flag} has no effect without --with_prior_preservation; add that flag, or leave {flag} out")


def as_plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
