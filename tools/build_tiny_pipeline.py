"""Builds model/tiny-stable-diffusion and model/tiny-clip from nothing but drawings, a few CC0 photos and fixed seeds.

    python -m tools.build_tiny_pipeline --vocabulary bpe_simple_vocab_16e6.txt.gz

The vocabulary is CLIP's published list of merges; requirements-tools.txt says where to find it. With the default
budgets the build takes about eight minutes on one H200; with small ones (`--clip_seconds 5 ...`) it runs on a CPU.
"""

import argparse
import functools
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from tools import previews, tiny_models, tiny_training
from tools.drawings import COLOURS, draw, with_articles
from tools.photos import captioned_crop, detail_crop
from tools.shapes import THINGS

HELD_OUT = 10_000_000  # seeds from here on are never trained on
PHOTO_SHARE = 8  # one captioned crop for each so many drawings


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--model_dir", type=Path, default=Path("model"), help="both folders are made in here")
    parser.add_argument("--previews", type=Path, default=Path("previews"), help="sheets and the log go here")
    parser.add_argument("--instance_dir", type=Path, default=Path("instance"), help="only looked at, never trained on")
    parser.add_argument("--num_drawings", type=int, default=64000)
    parser.add_argument("--num_details", type=int, default=40000, help="photo crops for the VAE")
    parser.add_argument("--clip_seconds", type=float, default=40)
    parser.add_argument("--vae_seconds", type=float, default=140)
    parser.add_argument("--unet_seconds", type=float, default=210)
    parser.add_argument("--clip_batch_size", type=int, default=1024)
    parser.add_argument("--vae_batch_size", type=int, default=128)
    parser.add_argument("--unet_batch_size", type=int, default=512)
    parser.add_argument("--adversarial_weight", type=float, default=0.3, help="0: no discriminator")
    parser.add_argument(
        "--no_cuda_graph", action="store_true", help="run the UNet's steps one kernel launch at a time"
    )
    parser.add_argument("--dreambooth_steps", type=int, default=300)
    parser.add_argument("--num_inference_steps", type=int, default=30, help="of the previews")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Log:
    """Prints each line with the seconds since the start, and keeps it in a file."""

    def __init__(self, path):
        self.path, self.start = path, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def __call__(self, text):
        line = f"{time.monotonic() - self.start:6.1f} s  {text}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def to_tensor(arrays, device):
    """Pictures uint8 [64, 64, 3] -> one tensor [N, 3, 64, 64]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)


def make_pictures(args):
    """Draws and crops in parallel: captioned pictures for CLIP and the UNet, crops for the VAE, and a test set."""
    first = args.seed * HELD_OUT * 2
    drawn = range(first, first + args.num_drawings)
    test = range(first + HELD_OUT, first + HELD_OUT + min(2000, args.num_drawings))
    with multiprocessing.get_context("fork").Pool(args.num_workers) as pool:
        drawings = pool.map(draw, drawn, chunksize=100)
        crops = pool.map(captioned_crop, drawn[::PHOTO_SHARE], chunksize=100)
        details = pool.map(detail_crop, range(first, first + args.num_details), chunksize=100)
        held_out = pool.map(draw, test, chunksize=50)
    captioned = [(pixels, caption) for pixels, caption, _ in drawings] + crops
    return captioned, details, held_out


def tokenize(tokenizer, captions, device):
    options = dict(padding="max_length", max_length=tiny_training.CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    return tokenizer(captions, **options).input_ids.to(device)


@torch.no_grad()
def zero_shot_score(clip, tokenizer, held_out, device):
    """How often the right thing, and the right colour of it, is nearest among all: text on unseen drawings."""
    pixel_values = to_tensor([pixels for pixels, _, _ in held_out], device).float() / 127.5 - 1
    images = tiny_training.image_embeddings(clip, pixel_values)
    things, colours = list(THINGS), list(COLOURS)
    captions = [with_articles(f"a photo of a {colour} {thing}") for thing in things for colour in colours]
    texts = tiny_training.text_embeddings(clip, tokenize(tokenizer, captions, device))
    best = (images @ texts.T).argmax(1).tolist()
    pairs = [(things[index // len(colours)], colours[index % len(colours)]) for index in best]
    truth = [labels for _, _, labels in held_out]
    thing = np.mean([guess[0] == label[0] for guess, label in zip(pairs, truth, strict=True)])
    both = np.mean([guess == label[:2] for guess, label in zip(pairs, truth, strict=True)])
    return f"thing {thing:.1%}, thing and colour {both:.1%} of {len(truth)}"


def train_all(args, device, log):
    """Draws the pictures and trains the three models; returns them rounded to float16, computing in float32."""
    captioned, details, held_out = make_pictures(args)
    log(f"{len(captioned)} captioned pictures, {len(details)} photo crops")
    log(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}")
    tiny_models.write_tokenizer(args.model_dir / "tiny-stable-diffusion" / "tokenizer", args.vocabulary)
    tokenizer = CLIPTokenizer.from_pretrained(args.model_dir / "tiny-stable-diffusion" / "tokenizer")
    captions = ["", *sorted({caption for _, caption in captioned})]
    position = {caption: index for index, caption in enumerate(captions)}
    input_ids = tokenize(tokenizer, captions, device)
    caption_index = torch.tensor([position[caption] for _, caption in captioned], device=device)
    pixels = to_tensor([pixels for pixels, _ in captioned], device)
    details = to_tensor(details, device)
    log(f"{len(captions)} distinct captions")

    clip = tiny_models.new_clip().to(device)
    budget = tiny_training.Budget("clip", args.clip_seconds, device, log)
    tiny_training.train_clip(clip, pixels, input_ids, caption_index, budget, args.clip_batch_size)
    clip = tiny_models.round_to_fp16(clip).eval().requires_grad_(False)
    log(f"clip, zero-shot: {zero_shot_score(clip, tokenizer, held_out, device)}")

    vae = train_vae(args, pixels, details, held_out, device, log)
    unet = train_unet(args, clip, vae, pixels, input_ids, caption_index, device, log)
    return clip, vae, unet


def train_vae(args, pixels, details, held_out, device, log):
    """Trains the autoencoder and shows how well unseen pictures come back, before and after the second phase."""
    vae = tiny_models.new_vae().to(device)
    instance = previews.load_instance(args.instance_dir, device)
    drawn = to_tensor([array for array, _, _ in held_out[:12]], device).float() / 127.5 - 1
    rows = []

    def look(label):
        for name, pictures in (("instance", instance), ("drawings", drawn)):
            decoded = previews.reconstruct(vae, pictures)
            fidelity = previews.fidelity(decoded, pictures)
            log(f"vae, {label}, held-out {name}: {fidelity}")
            rows.append((f"{name}, {label}: {fidelity}", previews.to_pictures(decoded)))

    budget = tiny_training.Budget("vae", args.vae_seconds, device, log)
    before = functools.partial(look, "before the discriminator")
    tiny_training.train_vae(vae, pixels, details, budget, args.vae_batch_size, args.adversarial_weight, before)
    vae = tiny_models.round_to_fp16(vae).eval().requires_grad_(False)
    look("final")
    originals = [("instance", previews.to_pictures(instance)), ("drawings", previews.to_pictures(drawn))]
    previews.save_sheet(args.previews / "vae.png", originals + rows)
    return vae


def train_unet(args, clip, vae, pixels, input_ids, caption_index, device, log):
    """Caches what the frozen models give, sets the VAE's scaling factor, and trains the UNet."""
    mean, std = tiny_training.encode_pictures(vae, pixels)
    scaling_factor = 1 / (mean.var() + std.square().mean()).sqrt().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    hidden_states = tiny_training.encode_captions(clip, input_ids)
    spread = (mean * scaling_factor).std((0, 2, 3)).tolist()
    log(f"vae: scaling factor {scaling_factor:.4f}, channel deviations {[round(value, 2) for value in spread]}")
    unet = tiny_models.new_unet().to(device)
    budget = tiny_training.Budget("unet", args.unet_seconds, device, log)
    use_graph = device.type == "cuda" and not args.no_cuda_graph
    cache = (mean * scaling_factor, std * scaling_factor, hidden_states, caption_index)
    tiny_training.train_unet(unet, cache, budget, args.unet_batch_size, use_graph)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def rounding_error(pipeline, unet, device):
    """How far the saved UNet's noise predictions lie from the trained one's, relative to their size."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 4, 16, 16, generator=generator).to(device)
    hidden_states = torch.randn(16, 77, 64, generator=generator).to(device)
    timesteps = torch.arange(16, device=device) * 60
    trained, saved = (model(latents, timesteps, hidden_states).sample for model in (unet, pipeline.unet))
    return ((saved - trained).norm() / trained.norm()).item()


def report_sizes(model_dir, log):
    """Logs the size of both folders and refuses files that are too large for the repository."""
    for name, limit in (("tiny-stable-diffusion", 40e6), ("tiny-clip", 10e6)):
        sizes = {path: path.stat().st_size for path in (model_dir / name).rglob("*") if path.is_file()}
        log(f"{name}: {sum(sizes.values()) / 1e6:.1f} MB, largest file {max(sizes.values()) / 1e6:.1f} MB")
        if sum(sizes.values()) > limit or max(sizes.values()) > 16e6:
            raise ValueError(f"{model_dir / name} is larger than {limit / 1e6:.0f} MB, or a file than 16 MB")


def show(args, pipeline, device, log):
    """Samples the saved pipeline and runs DreamBooth on it."""
    pipeline.set_progress_bar_config(disable=True)
    steps = args.num_inference_steps
    rows = previews.sample_rows(pipeline, previews.sheet_prompts(list(COLOURS)), 8, steps)
    previews.save_sheet(args.previews / "tiny_model.jpg", rows)
    guided = []
    for scale in (2.0, 5.0, 7.5):
        for prompt, pictures in previews.sample_rows(pipeline, previews.SUBJECT_PROMPTS[2:], 8, steps, scale):
            guided.append((f"guidance {scale}: {prompt}", pictures))
    previews.save_sheet(args.previews / "guidance.png", guided)
    log("samples drawn")
    instance = previews.load_instance(args.instance_dir, device)
    rates = (1e-4, 5e-4)
    previews.dreambooth_previews(pipeline, instance, args.previews, rates, args.dreambooth_steps, steps, log)


def main(argv=None):
    args = parse_args(argv)
    log = Log(args.previews / "build.log")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    clip, vae, unet = train_all(args, device, log)
    tiny_models.write_clip(args.model_dir / "tiny-clip", clip, args.vocabulary)
    folder = args.model_dir / "tiny-stable-diffusion"
    tiny_models.write_pipeline(folder, clip, vae, unet, args.vocabulary)
    report_sizes(args.model_dir, log)
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device)
    log(f"saved in float16: noise predictions differ by {rounding_error(pipeline, unet, device):.1e} of their norm")
    show(args, pipeline, device, log)
    log("done")


if __name__ == "__main__":
    main()
