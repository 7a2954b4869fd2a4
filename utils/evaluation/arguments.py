"""The command line of evaluate.py, and every check that needs no model, so that mistakes are said at once."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from utils.command_line import Parser, non_negative_float, non_negative_int, positive_int, seed_int
from utils.errors import UserError
from utils.evaluation.prompts import DREAMBENCH
from utils.values import as_prompt

BASELINE_FLAG = "--pretrained_model_name_or_path"
FINETUNED_FLAG = "--finetuned_model_name_or_path"
VAE_FLAG = "--pretrained_vae_name_or_path"
STAGES = ("generate", "score", "report")
READ_BY = {  # flag: the stages that read it; all others are for generate alone
    **dict.fromkeys(("output_dir", "concepts_list", "only", "debug"), STAGES),
    **dict.fromkeys(("clip_model", "dino_model"), ("score",)),
    "instance_data_dir": ("generate", "score"),
}


def build_parser() -> Parser:
    """The flags of evaluate.py, with their defaults."""
    parser = Parser(
        prog="evaluate.py",
        usage="python %(prog)s [any of the flags below]",
        description="Samples a fine-tuned Stable Diffusion v1 pipeline beside its baseline with the same seeds, "
        "scores the images with the DreamBooth paper's metrics, and writes report.html (docs/evaluation.md). "
        "In brackets: what holds without the flag.",
    )
    _add_subject_flags(parser.add_argument)
    _add_model_flags(parser.add_argument)
    _add_sampling_flags(parser.add_argument)
    add = parser.add_argument
    add("--only", action="append", choices=STAGES, help="this stage alone, from what lies there (repeatable)")
    add("--clip_model", type=Path, metavar="FOLDER", help="CLIP model for CLIP-I and CLIP-T (what the baseline has)")
    add("--dino_model", type=Path, metavar="FOLDER", help="DINO model, such as facebook/dino-vits16 (none)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_subject_flags(add: Callable[..., object]) -> None:
    """Which folders and prompts."""
    add(BASELINE_FLAG, type=Path, metavar="PATH", help="the baseline (default: what the fine-tuned run.json names)")
    add(VAE_FLAG, type=Path, metavar="PATH", help="another VAE for the baseline (default: what run.json names)")
    add(FINETUNED_FLAG, type=Path, metavar="FOLDER", default=Path("output"), help="what training wrote (./output)")
    add("--output_dir", type=Path, metavar="FOLDER", default=Path("result"), help="where the images go (./result)")
    add("--overwrite_output_dir", action="store_true", help="replace another model's pictures and page there")
    add("--instance_data_dir", type=Path, metavar="FOLDER", help="your photos (those that run.json names)")
    add("--concepts_list", type=Path, metavar="FILE", help="several subjects, each with its own photos")
    add("--prompt", action="append", type=as_prompt, help="what to draw; repeatable (the prompt in run.json)")
    add("--prompts_file", type=Path, metavar="FILE", help="prompts, one a line")
    add("--dreambench", choices=list(DREAMBENCH), help="the DreamBooth paper's 25 prompts for animals or for objects")
    add("--identifier", help="the subject's name in prompts, such as sks (read from the prompts it was trained with)")
    add("--class_name", help="what the subject is one of, such as dog (read from the prompts it was trained with)")
    more = "a prompt without the subject; repeatable (eight other things)"
    add("--drift_prompt", action="append", type=as_prompt, help=more)


def _add_model_flags(add: Callable[..., object]) -> None:
    """What is drawn beside the baseline and the fine-tuned model."""
    add("--checkpoint", action="append", metavar="NAME", help="also a checkpoint-N of the fine-tuned folder, or all")
    blend = "also the weights baseline + S x (fine-tuned - baseline), of the checkpoints too (1: as they are)"
    add("--strength", action="extend", nargs="+", type=non_negative_float, metavar="S", help=blend)
    add("--choose", action="store_true", help="say which to use: the checkpoints, or the result at lower strengths")


def _add_sampling_flags(add: Callable[..., object]) -> None:
    """How each image is drawn."""
    add("--negative_prompt", help="what to steer away from")
    add("--num_images", type=positive_int, default=4, help="images per model and prompt (4)")
    other = "the same for prompts without the subject; 0: no other places either (1)"
    add("--num_drift_images", type=non_negative_int, default=1, help=other)
    seeds = "seed of image 1; image k has seed + k - 1, the next prompt's 1000 more (0)"
    add("--seed", type=seed_int, default=0, help=seeds)
    add("--num_inference_steps", type=positive_int, default=50, help="denoising steps (50)")
    add("--guidance_scale", type=non_negative_float, default=7.5, help="of the prompt; 1 switches it off (7.5)")
    add("--batch_size", type=positive_int, help="images sampled at once; smaller takes less memory (all of them)")
    add("--height", type=positive_int, help="pixels (the model's own)")
    add("--width", type=positive_int, help="pixels (the model's own)")
    add("--mixed_precision", choices=["fp16", "bf16", "no"], help="weights and arithmetic (GPU: fp16, CPU: no)")
    add("--safety_checker", action="store_true", help="black out what the model folder's safety checker objects to")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses `argv` and checks every value that can be judged by itself. Raises UserError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    stages = tuple(stage for stage in STAGES if stage in (args.only or STAGES))
    check_stages([flag for flag, value in vars(args).items() if value != parser.get_default(flag)], stages)
    args.stages = stages
    args.command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    if args.dreambench and not (args.identifier and args.class_name):
        raise UserError("--dreambench needs --identifier (such as sks) and --class_name (such as dog)")
    args.concept = None  # the entry of --concepts_list that this evaluation is of
    return args


def check_stages(given: list[str], stages: tuple[str, ...]) -> None:
    """Checks that every flag given is read by one of the stages that run. Raises UserError."""
    readers = {flag: READ_BY.get(flag, ("generate",)) for flag in given}
    unread = [f"--{flag} ({' and '.join(by)})" for flag, by in readers.items() if not set(by) & set(stages)]
    if unread:
        said, asked = ", ".join(unread), " and ".join(stages)
        raise UserError(f"--only {asked} does not read {said}: leave that out, or name its stage too (--only)")
