"""What tests/stacks/matrix.sh does on each leg, with that leg's Python, and the table it makes of it.

python -m tests.stacks.matrix run LEGS_DIR LEG              the golden trajectory, into LEGS_DIR/LEG
python -m tests.stacks.matrix sample LEGS_DIR LEG MAKER...  samples the pipelines that the legs MAKER made
python -m tests.stacks.matrix table LEGS_DIR LEG...         compares all that, prints docs/compatibility.md's table
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from tests.stacks import golden

VERSIONED = ("python", "torch", "transformers", "diffusers", "accelerate", "peft", "numpy", "safetensors", "Pillow")
SAMPLE_TOLERANCE = 2  # of 255: the largest difference of any pixel of one pipeline's samples in two legs
SEEDS = [0, 1]


def run(legs_dir: Path, leg: str) -> int:
    """The golden trajectory; 1 where it is not the golden one."""
    from utils.runtime.process import versions

    folder = legs_dir / leg
    start = time.perf_counter()
    code = golden.main([str(folder / "golden"), "--write", str(folder / "trajectory.json")])
    facts = dict(versions=versions(VERSIONED[1:]), seconds=round(time.perf_counter() - start, 1))
    (folder / "leg.json").write_text(json.dumps(facts, indent=1))
    return code


def sample(legs_dir: Path, leg: str, *makers: str) -> int:
    """This leg's samples of every maker's pipeline, uint8 [N,H,W,3]."""
    import torch

    from utils.models.drawing import sample as sample_pipeline
    from utils.models.folder import read_base
    from utils.models.loading import load_pipeline

    for maker in makers:
        pipeline = load_pipeline(read_base(legs_dir / maker / "golden"), torch.float32, torch.device("cpu"))
        images = sample_pipeline(pipeline, "a photo of my cat.", SEEDS, num_inference_steps=10)
        np.save(legs_dir / leg / f"samples-of-{maker}.npy", np.stack([np.asarray(image) for image in images]))
    return 0


def table(legs_dir: Path, *legs: str) -> int:
    """Prints a Markdown table; 1 where two legs sample a pipeline differently."""
    columns = ["leg", *VERSIONED, "loss", "norm", "change", "samples"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    expected, code = json.loads(golden.GOLDEN_FILE.read_text()), 0
    for leg in legs:
        facts = json.loads((legs_dir / leg / "leg.json").read_text())
        found = json.loads((legs_dir / leg / "trajectory.json").read_text())
        apart = [f"{value:.1e}" for value in golden.differences(found, expected).values()]
        pixels = sample_difference(legs_dir, leg, legs)
        code |= pixels > SAMPLE_TOLERANCE
        print(f"| {' | '.join([leg, *(facts['versions'][name] for name in VERSIONED), *apart, str(pixels)])} |")
    return int(code)


def sample_difference(legs_dir: Path, loader: str, legs: tuple[str, ...]) -> int:
    """The largest difference, of 255, between `loader`'s samples of any leg's pipeline and that leg's own."""

    def samples(leg: str, maker: str) -> np.ndarray:
        return np.load(legs_dir / leg / f"samples-of-{maker}.npy").astype(int)

    return max(int(np.abs(samples(loader, maker) - samples(maker, maker)).max()) for maker in legs)


if __name__ == "__main__":
    command, folder, *names = sys.argv[1:]
    sys.exit(dict(run=run, sample=sample, table=table)[command](Path(folder), *names))
