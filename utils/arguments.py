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

HIDDEN: Any = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # another name of a flag
OFFSET_NOISE = 0.1  # of diffusers' --offset_noise, which has no value
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
    parser.add_argument("--config", type=Path, metavar="FILE", help="flags from a YAML file, or from a run's run.json")
    _add_files(parser.add_argument_group("files"))
    _add_prior_preservation(parser.add_argument_group("prior preservation"))
    _add_run(parser.add_argument_group("run"))
    _add_optimization(parser.add_argument_group("optimization"))
    output = parser.add_argument_group("output and logs")
    _add_output(output)
    _add_monitoring(output)
    add_not_needed(parser)
    return parser


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        type=Path,
        metavar="PATH",
        help="the base: a pipeline's folder, one .safetensors or .ckpt file, or a Hub name that is in the local cache",
    )
    add(
        "--pretrained_vae_name_or_path",
        type=Path,
        metavar="PATH",
        help="another VAE than the base's: its folder, or one file; the result has it too",
    )
    add("--tokenizer_name", type=Path, metavar="DIR", help="folder of another CLIPTokenizer (default: the base's own)")
    add(
        "--instance_data_dir",
        type=Path,
        metavar="DIR",
        help="folder with the photos of the subject; NAME.txt beside NAME.jpg replaces --instance_prompt for it",
    )
    add(
        "--output_dir", type=Path, default=Path("output"), metavar="DIR", help="the new pipeline (default: output) (!)"
    )
    add("--instance_prompt", metavar="TEXT", help='what the photos show, as in "a photo of my cat."')
    add(
        "--concepts_list",
        type=Path,
        metavar="FILE",
        help="several subjects at once: a JSON list of objects with instance_prompt, instance_data_dir, class_prompt, "
        "class_data_dir; replaces those four flags",
    )


def _add_prior_preservation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--with_prior_preservation", action="store_true", help="train on images of the class too, so that it stays")
    add("--class_data_dir", type=Path, metavar="DIR", help="the class images; missing ones are made there first")
    add("--class_prompt", metavar="TEXT", help='what the class images show, as in "a photo of a cat."')
    add("--prior_loss_weight", type=non_negative_float, default=1.0, help="of the class images' loss (default: 1.0)")
    add(
        "--num_class_images",
        type=positive_int,
        default=100,
        help="class images to use (default: 100); own and made images are not mixed (!)",
    )
    add("--sample_batch_size", type=positive_int, default=4, help="class images made at once per rank (default: 4)")
    add(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="dtype in which class images are made; no is fp32 (default: fp16 on a GPU, else fp32) (!)",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--seed", type=seed_int, default=0, help="fixes every random draw (default: 0) (!)")
    add("--resolution", type=positive_int, default=512, help="side of the training crops in pixels (default: 512)")
    add("--center_crop", action="store_true", help="crop the middle of a photo that is not square, not a random place")
    add(
        "--alpha_mask",
        action="store_true",
        help="what is transparent in a photo does not count in the loss",
    )
    add("--train_batch_size", type=positive_int, default=4, help="photos per rank and forward pass (default: 4)")
    add(
        "--num_train_epochs",
        type=positive_int,
        default=1,
        help="passes over the photos, not the class images (default: 1) (!)",
    )
    add("--max_train_steps", type=positive_int, help="optimisation steps; overrides --num_train_epochs")
    add(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="forward passes per optimisation step (default: 1)",
    )
    _add_memory(add)
    add(
        "--mixed_precision",
        choices=["fp16", "bf16", "no"],
        help="dtype of VAE, text encoder and UNet; masters are fp32 always (default: fp16 on a GPU, else no) (!)",
    )
    add("--dry_run", action="store_true", help="check everything that can be checked without training, then stop")
    add(
        "--max_nonfinite_steps",
        type=positive_int,
        default=20,
        help="stop after so many steps in a row without a finite gradient (default: 20)",
    )
    add("--no_cuda_graph", action="store_true", help="launch every kernel by itself: slower, for debugging")
    add("--deterministic", action="store_true", help="same bits in every run of the same command on a GPU: slower")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_memory(add: Callable[..., object]) -> None:
    add("--gradient_checkpointing", action="store_true", help="less memory at larger batches, more time")
    add(
        "--offload_optimizer",
        choices=["none", "moments", "all"],
        help="keep AdamW's moments, or the masters' 16 bits too, in the host's memory: the same result, more time "
        "(default: none)",
    )
    add("--use_8bit_adam", action="store_true", help="AdamW's moments in 8 bits: less memory, nearly the same result")
    add("--low_memory", action="store_true", help="--gradient_checkpointing and --offload_optimizer all")


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--learning_rate", type=positive_float, default=5e-6, help="AdamW's (default: 5e-6)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by ranks x accumulation x batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="default: constant")
    add("--lr_warmup_steps", type=non_negative_int, default=500, help="steps (default: 500; constant has none)")
    add("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts (default: 1)")
    add("--lr_power", type=positive_float, default=1.0, help="exponent of polynomial (default: 1.0)")
    add("--adam_beta1", type=unit_float, default=0.9, help="default: 0.9")
    add("--adam_beta2", type=unit_float, default=0.999, help="default: 0.999")
    add("--adam_weight_decay", type=non_negative_float, default=1e-2, help="default: 1e-2")
    add("--adam_epsilon", type=positive_float, default=1e-8, help="default: 1e-8")
    add(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="clip gradients to this norm; 0: off (default: 1) (!)",
    )
    add(
        "--snr_gamma",
        type=positive_float,
        help="min-SNR loss weights with this gamma, of photos and class images apart; 5 is usual (default: off) (!)",
    )
    add(
        "--noise_offset",
        type=non_negative_float,
        default=0.0,
        help="noise common to a channel; 0.1 at most (default: 0)",
    )
    add("--offset_noise", dest="noise_offset", action="store_const", const=OFFSET_NOISE, **HIDDEN)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save_dtype",
        choices=["fp32", "fp16"],
        help="dtype of the saved UNet (default: that of the base's UNet file: fp16 rounds most small changes away)",
    )
    add(
        "--save_format",
        choices=["safetensors", "bin"],
        default="safetensors",
        help="file format of the saved UNet; bin is the recipe's (default: safetensors)",
    )
    add(
        "--export_single_file",
        type=Path,
        metavar="FILE",
        help="write the result as one checkpoint file too, for ComfyUI and A1111: a name ending in .safetensors",
    )
    add(
        "--logging_dir", type=Path, default=Path("logs"), help="TensorBoard's, inside --output_dir (default: logs) (!)"
    )
    add(
        "--checkpointing_steps",
        type=positive_int,
        default=500,
        metavar="N",
        help="a checkpoint every N steps (default: 500)",
    )
    add("--save_steps", dest="checkpointing_steps", type=positive_int, **HIDDEN)  # ColossalAI's name of it
    add("--checkpoints_total_limit", type=positive_int, metavar="K", help="keep the newest K of them (default: all)")
    add(
        "--resume_from_checkpoint",
        type=str,
        metavar="NAME",
        help="resume from a checkpoint's folder, from 'checkpoint-N' in --output_dir, or from the 'latest' there",
    )
    add("--allow_changes", action="store_true", help="resume also with other photos, base model or arguments")
    add("--overwrite_output_dir", action="store_true", help="start over where an unfinished run's checkpoints are")


def _add_monitoring(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--validation_prompt",
        action="append",
        metavar="TEXT",
        help="draw this with fixed seeds while training, before the first step too, into OUTPUT/validation/; "
        "repeatable (!)",
    )
    add("--validation_negative_prompt", metavar="TEXT", help="what these images steer away from")
    add("--validation_inference_steps", type=positive_int, default=50, help="their denoising steps (default: 50)")
    add(
        "--validation_guidance_scale",
        type=non_negative_float,
        default=7.5,
        help="their strength of the prompt; 1 switches guidance off (default: 7.5)",
    )
    add(
        "--validation_steps",
        type=positive_int,
        help="steps between validations: the loss on the photos with fixed noise, and --validation_prompt's images "
        "(default: 100 with --validation_prompt, else none)",
    )
    add("--num_validation_images", type=positive_int, default=4, help="images a validation and prompt (default: 4)")
    add(
        "--report_to",
        type=report_to,
        metavar="{none,tensorboard,all}",
        default="none",
        help="besides metrics.jsonl; all is tensorboard (default: none) (!)",
    )


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
        raise UserError(
            f"--logging_dir {args.logging_dir} is not inside --output_dir; give it a relative name like 'logs'"
        )
    if args.logging_dir.parts and is_reserved(args.logging_dir.parts[0]):
        raise UserError(f"--logging_dir {args.logging_dir} is a part of the result; give it a name like 'logs'")
    if args.resume_from_checkpoint is not None and args.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint continues a run, --overwrite_output_dir starts over: give one")
    return args, argv, notes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of parse_command_line alone."""
    return parse_command_line(argv)[0]


def _check_concept_flags(args: argparse.Namespace) -> None:
    """The flags that name subjects and classes are complete and do not contradict each other."""
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
    if not args.instance_prompt.strip():
        raise UserError("--instance_prompt is empty; say what the photos show, as in 'a photo of my cat.'")
    if args.class_prompt is not None and not args.class_prompt.strip():
        raise UserError("--class_prompt is empty; say what the class images show, as in 'a photo of a cat.'")


def as_plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
