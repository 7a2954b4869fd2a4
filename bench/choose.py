"""Times what --choose adds to evaluate.py: whole commands, with it and without.

python -m bench.choose [--model DIR] [--checkpoints 2] [--steps 20] [--json FILE]

Without --model: random weights of Stable Diffusion v1.4's shape on a GPU (512 px, fp16), the embedded model on a CPU.
The fine-tuned model and its checkpoints are the base with scaled weights: what is drawn and chosen means nothing. CLIP
is random too, ViT-B/32's shape. Three commands, each a process of its own: with --choose in one step, so that kernels
are compiled and files in the page cache; without --choose; with it. The choice costs the difference of the last two;
drawing it, from the final images to the last candidate's, stands beside.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.command_line import make_parser
from bench.random_sd14 import EMBEDDED, write_pipeline
from utils import PROGRAM
from utils.models import drawing
from utils.runtime import gpu

ROOT = Path(__file__).resolve().parent.parent
UNET_FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
DEVICE = gpu.pick_device()
IS_GPU = DEVICE.type == "cuda"


def write_clip(folder: Path) -> Path:
    """CLIP ViT-B/32's shape with random weights, and the embedded model's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    CLIPModel(CLIPConfig()).save_pretrained(folder)
    return shutil.copytree(EMBEDDED / "tokenizer", folder, dirs_exist_ok=True)


def write_tuned(base: Path, folder: Path, num_checkpoints: int) -> Path:
    """What a run leaves: the base with its UNet scaled, and checkpoints with other factors."""
    from utils.run.lineage import FORMAT, STATE_FILE

    shutil.copytree(base, folder, copy_function=os.link)
    weights = load_file(base / UNET_FILE)
    for number in range(num_checkpoints + 1):
        place = folder / f"checkpoint-{number}" if number else folder
        if number:
            shutil.copytree(base / "unet", place / "unet", copy_function=os.link)
            state = dict(program=PROGRAM, format=FORMAT, step=number, run_id="bench", ancestors=[])
            (place / STATE_FILE).write_text(json.dumps(state))
        (place / UNET_FILE).unlink()
        factor = 1.02 + 0.01 * number
        save_file({name: factor * value for name, value in weights.items()}, place / UNET_FILE, {"format": "pt"})
    arguments = dict(pretrained_model_name_or_path=str(base), instance_data_dir=str(ROOT / "instance"))
    arguments |= dict(instance_prompt="a photo of my cat.")
    result = dict(num_steps=num_checkpoints + 1)
    run = dict(program=PROGRAM, run_id="bench", ancestors=[], arguments=arguments, result=result)
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def evaluate(tuned: Path, clip: Path, result: Path, *flags: str) -> dict:
    """One evaluate.py, all stages: seconds from the command typed to its end, and what it says of its parts."""
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--finetuned_model_name_or_path={tuned}"]
    command += [f"--clip_model={clip}", f"--output_dir={result}", *flags]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    drawn = [(int(count), float(took)) for count, took in re.findall(r"(\d+) images in ([\d.]+) s", process.stdout)]
    samples = json.loads((result / "samples.json").read_text())
    return dict(seconds=seconds, drawn=drawn, seconds_after_start=samples["seconds_after_start"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__ or "", "bench.choose")
    parser.add_argument("--model", type=Path, help="a pipeline folder, the base")
    parser.add_argument("--checkpoints", type=int, default=2, help="of the run, beside its result (2)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the final images (20)")
    parser.add_argument("--num_images", type=int, default=4, help="final images a model and prompt (4)")
    parser.add_argument("--json", type=Path, help="write what was found to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Runs the three commands and prints what they took; returns it."""
    args = parse_args(argv)
    results: dict = dict(device=torch.cuda.get_device_name() if IS_GPU else "cpu", versions=drawing.versions())
    print(results["device"], results["versions"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = args.model or (scratch / "sd14" if IS_GPU else EMBEDDED)
        if not model.exists():
            write_pipeline(model, DEVICE.type)
        tuned = write_tuned(model.resolve(), scratch / "tuned", args.checkpoints)
        clip = write_clip(scratch / "clip")
        few = [f"--num_images={args.num_images}", f"--num_drift_images={args.num_images}"]
        flags = [*few, f"--num_inference_steps={args.steps}"]
        evaluate(tuned, clip, scratch / "warm", *few, "--num_inference_steps=1", "--choose")
        results["without"] = evaluate(tuned, clip, scratch / "without", *flags)
        results["with"] = evaluate(tuned, clip, scratch / "with", *flags, "--choose")
    marks = results["with"]["seconds_after_start"]
    results["choice"] = results["with"]["seconds"] - results["without"]["seconds"]
    results["drawing"] = marks["sampled"] - marks["final images drawn"]
    for name in ("without", "with"):
        print(f"{name} --choose: {results[name]['seconds']:.1f} s", results[name]["seconds_after_start"])
    count = results["with"]["drawn"][-1][0]
    print(f"the choice: {results['choice']:.1f} s more, {count} images drawn in {results['drawing']:.1f} s of it")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
