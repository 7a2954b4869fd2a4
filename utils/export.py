"""Writes what training made as a pipeline folder, as one checkpoint file, or as a LoRA, at any strength.

python -m utils.export PIPELINE_DIR my-cat.safetensors [--dtype fp16]
python -m utils.export PIPELINE_DIR NEW_FOLDER --strength 0.75
python -m utils.export PIPELINE_DIR my-cat-lora.safetensors --lora_rank 32
"""

import argparse
import sys
from pathlib import Path

from utils.command_line import Parser, non_negative_float, positive_int, run_main
from utils.errors import UserError
from utils.files.hashing import sha256_of_all
from utils.files.ownership import RUN_FILE, check_export_file, run_of
from utils.models.base import base_folder
from utils.models.check import check_base_model, check_same_unet, replaced_file
from utils.models.exporting import blended_weights, check_export_folder, export_folder, export_lora, exported_record
from utils.models.folder import find_weights
from utils.models.saving import SAVE_DTYPES
from utils.models.single_file import export_single_file
from utils.run.lineage import read_checkpoint

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # what ends so is meant as a file
BASE_FLAG = "--pretrained_model_name_or_path"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m utils.export", description="Writes a pipeline folder anew, as you need it.")
    add = parser.add_argument
    add("folder", type=Path, metavar="PIPELINE_DIR", help="a folder that training wrote, or a base")
    add("target", type=Path, metavar="TARGET", help="a file that ends in .safetensors, or a folder")
    said = "of all tensors; in a folder the UNet's (as in PIPELINE_DIR; LoRA fp16)"
    add("--dtype", choices=list(SAVE_DTYPES), help=said)
    add("--checkpoint", metavar="NAME", help="the UNet of this checkpoint-N in PIPELINE_DIR, not the final one")
    add("--strength", type=non_negative_float, default=1.0, metavar="S", help="base + S x (tuned - base) (1: tuned)")
    add("--lora_rank", type=positive_int, metavar="N", help="write the change as a LoRA of N singular values a layer")
    add(BASE_FLAG, type=Path, metavar="FOLDER", help="the base (what PIPELINE_DIR's run.json names)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Checks folders and the target, then writes it."""
    args = build_parser().parse_args(argv)
    model = check_base_model(args.folder, "PIPELINE_DIR")
    name, tuned = args.checkpoint, args.folder
    if name:
        tuned /= f"checkpoint-{name}" if name.isdecimal() else name
        if read_checkpoint(tuned) is None:
            raise UserError(f"--checkpoint {name}: {args.folder} holds no whole {tuned.name}")
    is_file = args.lora_rank or args.target.suffix.lower() in SINGLE_FILES
    if is_file:
        check_export_file(args.target)
    else:
        check_export_folder(args.target, args.folder)
    if args.lora_rank and not args.strength:
        raise UserError("--strength 0 is the base itself, without a change to write as a LoRA: give a larger one")
    base = find_base(args, tuned) if args.strength != 1 or args.lora_rank else tuned
    if args.lora_rank:
        share = export_lora(model, tuned, base, args.target, args.lora_rank, args.strength, args.dtype)
        said = f"{share:.1%} of the squared change; read by diffusers' load_lora_weights, ComfyUI and A1111"
    elif is_file:
        run, named = exported_record(args.folder, tuned, args.strength), blended_weights(base, tuned, args.strength)
        export_single_file(model, args.target, args.dtype, named, run)
        said = "read by ComfyUI, A1111 and from_single_file"
    else:
        export_folder(model, tuned, base, args.target, args.strength, args.dtype)
        said = "read by DiffusionPipeline.from_pretrained and evaluate.py"
    what = f"{args.target.stat().st_size / 1e6:.1f} MB" if is_file else "a pipeline folder"
    print(f"{args.target}: {what}, {said}")


def find_base(args: argparse.Namespace, tuned: Path) -> Path:
    """The folder that training began from, by flag or by run.json. Raises UserError."""
    run, given = run_of(args.folder), args.pretrained_model_name_or_path
    named = given or run.get("arguments", {}).get("pretrained_model_name_or_path")
    if not named:
        raise UserError(f"{BASE_FLAG} is missing, and {args.folder / RUN_FILE} names no base: give it")
    base = base_folder(Path(named), BASE_FLAG)
    if not base.is_dir() and not given:
        raise UserError(f"{args.folder / RUN_FILE} names {base} as the base, which is not there: give {BASE_FLAG}")
    check_base_model(base, BASE_FLAG)
    check_same_unet(base, tuned)
    if replaced := replaced_file(base, sha256_of_all(find_weights(base, "unet").files), run):
        line = f"{replaced} is not what was trained from, by {args.folder / RUN_FILE}"
        if not given:
            raise UserError(f"{line}: it has changed since; give the base as it was by {BASE_FLAG}")
        print(f"warning: {line}", file=sys.stderr)
    return base


if __name__ == "__main__":
    sys.exit(run_main(main))
