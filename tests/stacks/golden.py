"""The golden trajectory: what twenty steps on the embedded model do to it, in a form that can be compared anywhere.

Losses and gradient norms of every step, and for every block of the UNet the norm of its change and the change's
projections on fixed random directions. Directions and training draws come from utils.data.randomness, so they depend
neither on the device nor on the version of torch.

    python -m tests.stacks.golden OUTPUT_DIR               runs it and compares it with golden_trajectory.json
    python -m tests.stacks.golden OUTPUT_DIR --write FILE  writes what it finds to FILE too
"""

import argparse
import json
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from utils.data.randomness import INSTANCE, generator

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_FILE = Path(__file__).with_name("golden_trajectory.json")
BASE = ROOT / "model" / "tiny-stable-diffusion"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
NUM_STEPS = 20
NUM_PROJECTIONS = 8

# Relative. docs/compatibility.md has what the stacks really differ by; these are some ten times that.
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4
CHANGE_TOLERANCE = 1e-2  # of |change - golden change| / |golden change| in every block, estimated by the projections


def golden_argv(output_dir: Path) -> list[str]:
    """The run: seed 0, batch 2, fp32, the photos of instance/."""
    return [
        f"--pretrained_model_name_or_path={BASE}",
        f"--instance_data_dir={ROOT / 'instance'}",
        f"--output_dir={output_dir}",
        "--instance_prompt=a photo of my cat.",
        "--resolution=64",
        "--train_batch_size=2",
        "--mixed_precision=no",
        "--learning_rate=1e-4",
        "--lr_warmup_steps=0",
        f"--max_train_steps={NUM_STEPS}",
        "--seed=0",
        "--no_cuda_graph",
    ]


def trajectory(output_dir: Path) -> dict:
    """What the run in `output_dir` did: `loss` and `grad_norm` of each step, `blocks` as block_changes gives them."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    before, after = load_file(BASE / UNET_FILE), load_file(output_dir / UNET_FILE)
    changes = {name: after[name].astype(np.float64) - before[name] for name in before}
    return dict(
        loss=[row["loss"] for row in rows],
        grad_norm=[row["grad_norm"] for row in rows],
        blocks=block_changes(changes),
    )


def block_changes(changes: dict[str, np.ndarray]) -> dict[str, dict]:
    """For each block: `norm` of its change, and `projections` of it on NUM_PROJECTIONS standard normal directions.

    The projections of a change with norm n have mean 0 and standard deviation n; likewise for the difference of two
    changes, so that they tell how far apart two changes are without either being stored.
    """
    squares, projections = defaultdict(float), defaultdict(lambda: np.zeros(NUM_PROJECTIONS))
    for name, change in changes.items():
        block = block_of(name)
        squares[block] += float((change**2).sum())
        for number in range(NUM_PROJECTIONS):
            direction = generator(zlib.crc32(name.encode()), number, INSTANCE.noise).standard_normal(change.size)
            projections[block][number] += float(change.ravel() @ direction)
    return {
        block: dict(norm=squares[block] ** 0.5, projections=projections[block].tolist()) for block in sorted(squares)
    }


def block_of(name: str) -> str:
    """down_blocks.0 of down_blocks.0.resnets.1.conv1.weight; conv_in of conv_in.weight."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[1].isdigit() else parts[0]


def differences(found: dict, golden: dict) -> dict[str, float]:
    """The largest relative difference of `loss` and `grad_norm`, and the largest of any block's `change`."""
    assert found["blocks"].keys() == golden["blocks"].keys() and len(found["loss"]) == len(golden["loss"])
    apart = {name: float(np.max(np.abs(np.divide(found[name], golden[name]) - 1))) for name in ("loss", "grad_norm")}
    apart["change"] = max(
        float(np.sqrt(np.mean(np.square(np.subtract(block["projections"], golden["blocks"][name]["projections"])))))
        / golden["blocks"][name]["norm"]
        for name, block in found["blocks"].items()
    )
    return apart


def complaints(apart: dict[str, float]) -> list[str]:
    """A line for every difference above its tolerance."""
    tolerances = dict(loss=LOSS_TOLERANCE, grad_norm=GRAD_NORM_TOLERANCE, change=CHANGE_TOLERANCE)
    return [
        f"{name} differs by {apart[name]:.1e} from {GOLDEN_FILE.name}, more than {tolerance:.0e}"
        for name, tolerance in tolerances.items()
        if not apart[name] <= tolerance
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the trajectory with this Python and compares it; 1 where it is not the golden one."""
    from train_dreambooth_colossalai import main as train

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--write", type=Path, help="write what was found to this file")
    args = parser.parse_args(argv)
    train(golden_argv(args.output_dir))
    found = trajectory(args.output_dir)
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    if not GOLDEN_FILE.exists():
        return 0
    apart = differences(found, json.loads(GOLDEN_FILE.read_text()))
    print("golden trajectory: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    said = complaints(apart)
    for line in said:
        print(line, file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
