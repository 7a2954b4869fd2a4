"""The loss of the recipe's command by three ways of training, with the same draws: do they lie on each other?

python -m bench.loss_curves OUTPUT_DIR --model DIR [--steps 400] [--only graph|eager|reference|plot]

graph: the training script; eager: the same with --no_cuda_graph; reference: bench/reference_loop.py (fp32 weights,
autocast, GradScaler). Each leaves OUTPUT_DIR/NAME.json; plot reads them, prints how far apart they are and writes
loss_curves.svg. Random weights will do: the loss falls from 1 as the UNet learns to predict the noise.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from bench.command_line import make_parser
from bench.reference_loop import ReferenceLoop
from bench.train_step import run_script
from utils.data.randomness import draw_sample
from utils.dataset import InstanceDataset
from utils.evaluation.report.charts import Series, line_chart, smooth
from utils.evaluation.report.page import TEMPLATES

ROOT = Path(__file__).resolve().parent.parent

NAMES = ("graph", "eager", "reference")
COLOURS = dict(graph="#0a7", eager="#c60", reference="#36c")
SMOOTHING = 0.9


def script_losses(args: argparse.Namespace, name: str) -> list[float]:
    """Losses of the training script; the recipe's values."""
    flags = ["--no_cuda_graph"] if name == "eager" else []
    folder = args.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    found = run_script(args.model, args.photos, folder / "output", args.resolution, 1, args.steps, flags)
    times = f"first step after {found['first_step_seconds']:.1f} s, whole run {found['whole_run_seconds']:.1f} s"
    marks = f"{found['ms_a_step']:.1f} ms a step; {found['seconds_after_start']}"
    print(f"{name}: {times}, {marks}", *found["said"], flush=True)
    return found["losses"]


def reference_losses(args: argparse.Namespace) -> list[float]:
    """Losses of the reference loop, on the draws that the script makes at seed 0."""
    loop = ReferenceLoop(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    dataset = InstanceDataset(args.photos, args.resolution)
    side = args.resolution // 2 ** (len(loop.vae.config.block_out_channels) - 1)
    options = dict(num_photos=len(dataset), latent_shape=(loop.unet.config.in_channels, side, side))
    options |= dict(num_train_timesteps=loop.scheduler.config.num_train_timesteps)
    losses = []
    for step in range(args.steps):
        sample = draw_sample(0, step, **options)
        pixel_values = dataset.pixel_values(sample.photo, *dataset.crop_origin(sample.photo, sample.crop))
        noises = (torch.from_numpy(noise)[None] for noise in (sample.latent_noise, sample.noise))
        losses.append(loop.step(pixel_values[None], *noises, torch.tensor([sample.timestep])))
    return losses


def plot(folder: Path) -> None:
    """Writes loss_curves.svg; prints the distances from the reference."""
    losses = {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}
    for name in NAMES[:2]:
        apart = [abs(ours / theirs - 1) for ours, theirs in zip(losses[name], losses["reference"], strict=True)]
        print(f"{name}: differs from the reference's loss by {statistics.median(apart):.1e} of it in the median step, "
              f"by {max(apart):.1e} in the worst (step {apart.index(max(apart)) + 1})")  # fmt: skip
    curves = [Series(smooth(list(enumerate(losses[name], 1)), SMOOTHING), name) for name in NAMES]
    svg = TEMPLATES.get_template("chart.svg.jinja").render(chart=line_chart("Training loss", curves))
    svg = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"').removesuffix("</svg>")
    style = "text{font:11px sans-serif;fill:#666}.y-label{text-anchor:end}.rule{stroke:#ccc}.line{fill:none}"
    widths = dict(graph=5, eager=3, reference=1)
    style += "".join(f".{name}{{stroke:{COLOURS[name]};stroke-width:{widths[name]}}}" for name in NAMES)
    names = "".join(
        f'<text x="{190 + 55 * n}" y="24" style="fill:{COLOURS[name]}">{name}</text>' for n, name in enumerate(NAMES)
    )
    start = svg.index(">") + 1
    (folder / "loss_curves.svg").write_text(f"{svg[:start]}<style>{style}</style>{svg[start:]}{names}</svg>\n")


def main(argv: list[str] | None = None) -> None:
    """Runs what is asked for, then plots."""
    parser = make_parser(__doc__, __spec__.name)
    parser.add_argument("output_dir", type=Path, help="where losses and the curves go")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "model" / "tiny-stable-diffusion",
        help="a pipeline folder (the embedded model)",
    )
    parser.add_argument("--photos", type=Path, default=ROOT / "instance", help="folder of photos (instance)")
    parser.add_argument("--resolution", type=int, default=512, help="side of the crops in pixels (512)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    parser.add_argument(
        "--only",
        choices=(*NAMES, "plot"),
        nargs="+",
        default=[*NAMES, "plot"],
        help="which runs to make, and whether to plot (all)",
    )
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if name in args.only:
            losses = reference_losses(args) if name == "reference" else script_losses(args, name)
            (args.output_dir / f"{name}.json").write_text(json.dumps(losses))
    if "plot" in args.only:
        plot(args.output_dir)


if __name__ == "__main__":
    main()
