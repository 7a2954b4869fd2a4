"""What the benchmarks share: their --help, the flags that several have, and how they write what they found."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "model" / "tiny-stable-diffusion"
PROMPT = "a photo of my cat."


def make_parser(
    doc: str | None, module: str, *, model: bool = False, photos: bool = False, results: bool = True
) -> argparse.ArgumentParser:
    """A parser for `python -m MODULE`, described by the module's docstring, with the flags that are asked for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=raw)
    if model:
        default = "GPU: random weights of Stable Diffusion v1.4's shape; CPU: the embedded model"
        parser.add_argument("--model", type=Path, help=f"a pipeline folder, written if it is not there ({default})")
    if photos:
        parser.add_argument("--photos", type=Path, default=ROOT / "instance", help="folder of photos (instance)")
    if results:
        parser.add_argument("--json", type=Path, help="write what was found to this file too")
    return parser


def write_results(results: Any, path: Path | None) -> None:
    """To `path`, if there is one."""
    if path:
        path.write_text(json.dumps(results, indent=1))


def device_name() -> str:
    """The GPU's, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
