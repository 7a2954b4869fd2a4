"""The command line of evaluate.py, and every check that needs no model, so that mistakes are said at once."""

import argparse
import json
import math
import os
import re
from pathlib import Path

from utils.arguments import Parser, non_negative_float, positive_int, seed_int
from utils.errors import UserError
from utils.preflight import LFS_POINTER, MODEL_INDEX, RUN_FILE, WEIGHT_STEMS, read_json

BASELINE_FLAG = "--pretrained_model_name_or_path"
FINETUNED_FLAG = "--finetuned_model_name_or_path"
SAMPLES_FILE = "samples.json"
COMPARISON_FILE = "comparison.png"
WRITTEN_BY = "evaluate.py"
OWN_FILE_NAME = re.compile(r"(output|baseline)-[1-9]\d*\.png|" + re.escape(COMPARISON_FILE))


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: is a shell variable unset?")
    return Path(text).expanduser()


def build_parser() -> argparse.ArgumentParser:
    """The flags of evaluate.py, with their defaults."""
    parser = Parser(
        prog="evaluate.py",
        description="Samples a fine-tuned Stable Diffusion v1 pipeline beside its baseline, with the same seeds.",
    )
    add = parser.add_argument
    add(BASELINE_FLAG, type=_path, metavar="FOLDER", help="the baseline (default: what the fine-tuned run.json names)")
    add(FINETUNED_FLAG, type=_path, metavar="FOLDER", default=Path("output"), help="what training wrote (./output)")
    add("--output_dir", type=_path, metavar="FOLDER", default=Path("result"), help="where the images go (./result)")
    add("--instance_data_dir", type=_path, metavar="FOLDER", help="your photos, for the top row of comparison.png")
    add("--prompt", help="what to draw (default: the instance prompt of the fine-tuned run.json)")
    add("--negative_prompt", help="what to steer away from")
    add("--num_images", type=positive_int, default=4, help="images per model (4)")
    add("--seed", type=seed_int, default=0, help="seed of image 1; image k has seed + k - 1 (0)")
    add("--num_inference_steps", type=positive_int, default=50, help="denoising steps (50)")
    add(
        "--guidance_scale",
        type=non_negative_float,
        default=7.5,
        help="strength of the prompt; 1 switches guidance off (7.5)",
    )
    add("--batch_size", type=positive_int, help="images sampled at once; smaller takes less memory (all of them)")
    add("--height", type=positive_int, help="pixels (the model's own)")
    add("--width", type=positive_int, help="pixels (the model's own)")
    add("--mixed_precision", choices=["fp16", "bf16", "no"], help="weights and arithmetic (GPU: fp16, CPU: no)")
    add("--safety_checker", action="store_true", help="black out what the model folder's safety checker objects to")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses `argv` and checks every value that can be judged by itself. Raises UserError."""
    args = build_parser().parse_args(argv)
    for flag in ("prompt", "negative_prompt"):
        _check_text(f"--{flag}", getattr(args, flag) or "")
    return args


def check(args: argparse.Namespace) -> list[str]:
    """Fills `args` from run.json, checks folders and sizes, and returns notes for the user. Raises UserError."""
    _check_is_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG, "train first (run.sh), or name another folder")
    check_pipeline_folder(args.finetuned_model_name_or_path, FINETUNED_FLAG, args.safety_checker)
    notes = fill_from_run_json(args)
    check_pipeline_folder(args.pretrained_model_name_or_path, BASELINE_FLAG, args.safety_checker)
    if args.pretrained_model_name_or_path.samefile(args.finetuned_model_name_or_path):
        notes.append(f"warning: {BASELINE_FLAG} and {FINETUNED_FLAG} are the same folder: both rows will be the same")
    set_image_size(args)
    check_steps(args)
    if args.instance_data_dir is not None:
        _check_is_folder(
            args.instance_data_dir, "--instance_data_dir", "name the folder of your photos, or leave it out"
        )
    check_output_dir(args)
    return notes


def fill_from_run_json(args: argparse.Namespace) -> list[str]:
    """Takes what was not given from the fine-tuned folder's run.json; returns one note a value taken."""
    path = args.finetuned_model_name_or_path / RUN_FILE
    run = read_json(path) if path.is_file() else {}
    recorded = run.get("arguments")
    recorded = recorded if isinstance(recorded, dict) else {}
    notes = []
    if run.get("status") == "running" and (path.parent / MODEL_INDEX).is_file():
        notes.append(f"warning: {path} says that training has not finished: {path.parent} holds an earlier result")
    for flag, key, kind in (
        ("pretrained_model_name_or_path", "pretrained_model_name_or_path", Path),
        ("prompt", "instance_prompt", str),
        ("instance_data_dir", "instance_data_dir", Path),
    ):
        value = recorded.get(key)
        if getattr(args, flag) is not None or not isinstance(value, str) or not value:
            continue
        if flag == "instance_data_dir" and not Path(value).is_dir():
            notes.append(f"warning: the photos that {path} names are not at {value}: comparison.png shows none")
            continue
        if flag == "pretrained_model_name_or_path" and not Path(value).is_dir():
            raise UserError(f"the baseline that {path} names is not at {value} (seen from here): give {BASELINE_FLAG}")
        _check_text(f"instance_prompt in {path}", value)
        setattr(args, flag, kind(value))
        notes.append(f'from {path}: --{flag} "{value}"')
    for flag in ("pretrained_model_name_or_path", "prompt"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag} is missing, and {path} does not record one: give it")
    return notes


def check_pipeline_folder(folder: Path, flag: str, safety_checker: bool = False) -> None:
    """Checks that `folder` holds every file of a Stable Diffusion v1 pipeline, whole. Raises UserError."""
    _check_is_folder(folder, flag, "name a pipeline folder")
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {folder} has no model_index.json: {_what_it_looks_like(folder)}")
    model_index = read_json(folder / MODEL_INDEX)
    class_name = model_index.get("_class_name", "StableDiffusionPipeline")
    if class_name != "StableDiffusionPipeline":
        raise UserError(
            f"{flag} {folder} is a {class_name}: only StableDiffusionPipeline (Stable Diffusion v1) is sampled"
        )
    weight_stems = dict(WEIGHT_STEMS)
    if safety_checker:
        for name in ("safety_checker", "feature_extractor"):
            if not (folder / name).is_dir() or not (model_index.get(name) or [None])[0]:
                raise UserError(
                    f"--safety_checker: {folder} has no {name}: leave the flag out, or use a folder with one"
                )
        weight_stems["safety_checker"] = "model"
        _check_json(folder / "feature_extractor" / "preprocessor_config.json", flag)
    for name, stem in weight_stems.items():
        _check_json(folder / name / "config.json", flag)
        _check_weights(folder / name, stem, flag)
    _check_json(folder / "scheduler" / "scheduler_config.json", flag)
    tokenizer = folder / "tokenizer"
    vocabulary = ["tokenizer.json"] if (tokenizer / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in vocabulary:
        _check_file(tokenizer / name, flag)


def set_image_size(args: argparse.Namespace) -> None:
    """Sets --height and --width to the baseline's own where not given, and checks that the VAEs can make them."""
    for folder in (args.pretrained_model_name_or_path, args.finetuned_model_name_or_path):
        factor = vae_scale_factor(folder)
        sample_size = read_json(folder / "unet" / "config.json").get("sample_size") or 64
        height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
        args.height = args.height or height * factor
        args.width = args.width or width * factor
        multiple = math.lcm(8, factor)  # diffusers wants a multiple of 8 whatever the VAE
        for flag in ("height", "width"):
            value = getattr(args, flag)
            if value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise UserError(f"--{flag} is {value}: give a multiple of {multiple}, such as {near}")


def vae_scale_factor(folder: Path) -> int:
    """Pixels a latent cell is wide and high."""
    blocks = read_json(folder / "vae" / "config.json").get("block_out_channels") or [0]
    return 2 ** (len(blocks) - 1)


def check_steps(args: argparse.Namespace) -> None:
    """Checks that the schedulers have as many timesteps as --num_inference_steps asks for."""
    for folder in (args.pretrained_model_name_or_path, args.finetuned_model_name_or_path):
        most = read_json(folder / "scheduler" / "scheduler_config.json").get("num_train_timesteps", 1000)
        if args.num_inference_steps > most:
            raise UserError(
                f"--num_inference_steps is {args.num_inference_steps}: {folder} has {most} timesteps at most"
            )


def check_output_dir(args: argparse.Namespace) -> None:
    """Checks that writing the results touches no file that evaluate.py did not write. Raises UserError."""
    output_dir = args.output_dir
    resolved = output_dir.resolve()
    for flag in ("pretrained_model_name_or_path", "finetuned_model_name_or_path", "instance_data_dir"):
        folder = getattr(args, flag)
        if folder is not None and (resolved == folder.resolve() or folder.resolve() in resolved.parents):
            raise UserError(f"--output_dir {output_dir} is --{flag} or inside it: name a folder of its own")
    existing = next(path for path in (resolved, *resolved.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--output_dir {output_dir}: {existing} is a file: name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: no permission to write in {existing}: name another folder")
    own = own_files(output_dir)
    for name in [*image_names("baseline", args), *image_names("output", args), COMPARISON_FILE]:
        if name not in own and os.path.lexists(output_dir / name):
            raise UserError(
                f"{output_dir / name} exists and evaluate.py did not write it: move it, or give --output_dir"
            )


def image_names(stem: str, args: argparse.Namespace) -> list[str]:
    """stem-1.png, stem-2.png, ..."""
    return [f"{stem}-{number}.png" for number in range(1, args.num_images + 1)]


def own_files(output_dir: Path) -> set[str]:
    """Names of the pictures that an earlier evaluate.py wrote, by its samples.json. Raises UserError."""
    path = output_dir / SAMPLES_FILE
    if not os.path.lexists(path):
        return set()
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        files = samples["files"] if samples["written_by"] == WRITTEN_BY else None
    except (OSError, ValueError, KeyError, TypeError):
        files = None
    if not isinstance(files, list):
        raise UserError(f"{path} exists and evaluate.py did not write it: move it, or give another --output_dir")
    return {name for name in files if isinstance(name, str) and OWN_FILE_NAME.fullmatch(name)}


def _check_text(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds characters that are not valid UTF-8: type it again") from error


def _check_is_folder(folder: Path, flag: str, mend: str) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{flag} {folder} is a file, not a folder: {mend}")
    if flag != "--instance_data_dir" and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(folder)):
        raise UserError(
            f"{flag} {folder} is not a folder here. If it is a name on the Hugging Face hub, nothing is downloaded: "
            f"'git lfs install && git clone https://huggingface.co/{folder} model/{folder.name}', "
            f"then {flag} model/{folder.name}"
        )
    raise UserError(f"{flag} {folder} does not exist: {mend}")


def _what_it_looks_like(folder: Path) -> str:
    names = {path.name for path in folder.iterdir()}
    if not names:
        return "it is empty: let training finish, or name another folder"
    if {RUN_FILE, "metrics.jsonl"} & names or any(name.startswith((".assembling-", "checkpoint-")) for name in names):
        return "it looks like an unfinished training output: let train_dreambooth_colossalai.py finish first"
    if "config.json" in names:
        return "it looks like one model (a UNet, say), not a pipeline: name the folder above it"
    if "unet" in names:
        return "it looks like a pipeline copied in part: copy model_index.json and the rest too"
    return "it is no pipeline folder: name one that holds model_index.json, unet/, vae/, text_encoder/ and so on"


def _check_json(path: Path, flag: str) -> None:
    _check_file(path, flag)
    read_json(path)


def _check_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UserError(f"{flag} is incomplete: {path} is missing: copy the folder again")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag}: no permission to read {path}: change its mode")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} is incomplete: {path} is empty: copy the folder again")
    if _is_lfs_pointer(path):
        raise UserError(_lfs_message(path))


def _check_weights(folder: Path, stem: str, flag: str) -> None:
    """Checks the weights that will be loaded: one .safetensors, its shards, one .bin, or the fp16 variant of these."""
    bin_stem = "pytorch_model" if stem == "model" else stem
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    others = [folder / name for name in (f"{bin_stem}.bin", f"{stem}.fp16.safetensors", f"{bin_stem}.fp16.bin")]
    if index.is_file() and not single.is_file():
        _check_file(index, flag)
        weights = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        weights = [path for path in (single, *others) if path.is_file()][:1]
    if not weights:
        raise UserError(f"{flag} is incomplete: {folder} holds no {single.name} (or .bin): copy the folder again")
    for path in weights:
        _check_file(path, flag)
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            raise UserError(f"{path} is cut off or damaged: copy or download it again")


def _is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 2 <= header_size <= size - 8:
            return False
        try:
            header = json.loads(file.read(header_size))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + header_size + max(ends, default=0)


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _lfs_message(path: Path) -> str:
    return f"{path} is a git-lfs pointer, not the file: run 'git lfs install && git lfs pull' in that repository"
