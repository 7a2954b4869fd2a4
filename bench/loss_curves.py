"""The loss of the recipe's command by three ways of training, with the same draws: how far are they apart?

python -m bench.loss_curves [--model DIR] [--steps 400] [--json FILE]

graph: the training script; eager: the same with --no_cuda_graph; reference: bench/reference_loop.py (fp32 weights,
autocast, GradScaler). Random weights will do: the loss falls from 1 as the UNet learns to predict the noise.
"""

import statistics
import tempfile
from pathlib import Path

import torch

from bench import script
from bench.command_line import make_parser, write_results
from bench.random_sd14 import base_folder
from bench.reference_loop import ReferenceLoop
from utils.data.randomness import draw_sample
from utils.dataset import InstanceDataset

WAYS = dict(graph=[], eager=["--no_cuda_graph"])


def reference_losses(model: Path, photos: Path, steps: int) -> list[float]:
    """Losses of the reference loop, on the draws that the script makes at seed 0."""
    on_gpu = torch.cuda.is_available()
    loop, resolution = ReferenceLoop(model, "cuda" if on_gpu else "cpu"), 512 if on_gpu else 64
    dataset = InstanceDataset(photos, resolution)
    side = resolution // 2 ** (len(loop.vae.config.block_out_channels) - 1)
    options = dict(num_photos=len(dataset), latent_shape=(loop.unet.config.in_channels, side, side))
    options |= dict(num_train_timesteps=loop.scheduler.config.num_train_timesteps)
    losses = []
    for step in range(steps):
        sample = draw_sample(0, step, **options)
        pixel_values = dataset.pixel_values(sample.photo, *dataset.crop_origin(sample.photo, sample.crop))
        noises = (torch.from_numpy(noise)[None] for noise in (sample.latent_noise, sample.noise))
        losses.append(loop.step(pixel_values[None], *noises, torch.tensor([sample.timestep])))
    return losses


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Trains in all ways and prints the distances from the reference; returns the losses."""
    parser = make_parser(__doc__, __spec__.name, model=True, photos=True)
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model, output = base_folder(args.model, Path(scratch)), Path(scratch) / "output"
        losses = {
            name: script.train(model, args.photos, output, 1, args.steps, flags)["losses"]
            for name, flags in WAYS.items()
        }
        losses["reference"] = reference_losses(model, args.photos, args.steps)
    for name in WAYS:
        apart = [abs(ours / theirs - 1) for ours, theirs in zip(losses[name], losses["reference"], strict=True)]
        print(f"{name}: differs from the reference's loss by {statistics.median(apart):.1e} of it in the median step, "
              f"by {max(apart):.1e} in the worst (step {apart.index(max(apart)) + 1})")  # fmt: skip
    write_results(losses, args.json)
    return losses


if __name__ == "__main__":
    main()
