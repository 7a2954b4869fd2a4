"""Builds model/tiny-stable-diffusion and model/tiny-clip from drawings, a few hundred photos and fixed seeds.

    python -m tools.build_tiny_pipeline --vocabulary bpe_simple_vocab_16e6.txt.gz --photos PHOTOS

The vocabulary is CLIP's published list of merges; requirements-tools.txt says where to find it, and the teacher's
weights. PHOTOS holds the photos that tools/photo_boxes.txt names (cats by Max Ogden, BSD; objects of
google/dreambooth, CC BY 4.0), which are not committed. Each stage leaves its state in --state and goes on from there,
so that a build may take several commands: `--stages vae --vae_seconds 300 --limit 100` does the first third of it.
The default budgets are about half an hour on one H200, with the decoder beside the UNet; with small ones
(`--clip_seconds 5 ...`) it runs on a CPU.
"""

import argparse
import functools
import math
import os
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from tools import previews, tiny_clip, tiny_models, tiny_training, tiny_unet, tiny_vae
from tools.drawings import COLOURS, with_articles
from tools.teacher import Teacher
from tools.tiny_pictures import make_pictures, to_tensor, tokenize

START = time.monotonic()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--photos", type=Path, required=True, help="the folder of photos")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--state", type=Path, default=Path("state"), help="what stages leave for each other")
    parser.add_argument("--begin_with", type=Path, help="both folders of an earlier build, which go on learning")
    parser.add_argument("--rate", type=float, default=1.0, help="times the learning rates: less when they go on")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of a stage in this command")
    parser.add_argument("--model_dir", type=Path, default=Path("model"), help="both folders are made in here")
    parser.add_argument("--previews", type=Path, default=Path("previews"), help="sheets go here")
    parser.add_argument("--num_drawings", type=int, default=64000)
    parser.add_argument("--num_photos", type=int, default=64000, help="captioned crops of photos")
    parser.add_argument("--num_details", type=int, default=30000, help="recoloured crops of any size, for the VAE")
    for stage, seconds in dict(clip=120, eyes=150, vae=535, unet=800, decoder=300).items():
        parser.add_argument(f"--{stage}_seconds", type=float, default=seconds)
    for stage, size in dict(clip=1024, eyes=256, vae=64, unet=512).items():
        parser.add_argument(f"--{stage}_batch_size", type=int, default=size)
    parser.add_argument("--num_inference_steps", type=int, default=25, help="of the previews")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def log(text):
    print(f"{time.monotonic() - START:6.1f} s  {text}", flush=True)


def load_pictures(args, device):
    pictures = torch.load(args.state / "pictures.pt", weights_only=False)  # our own, written a stage ago
    for name in ("pixels", "caption_index", "input_ids", "details"):
        setattr(pictures, name, getattr(pictures, name).to(device))
    return pictures


def begun(args, part, module):
    """The new module, or (--begin_with) an earlier build's."""
    return type(module).from_pretrained(args.begin_with / part).float() if args.begin_with else module


def trained(args, name, module, device):
    """What a stage has left, rounded to float16 as it will be saved, computing in float32."""
    module.load_state_dict(torch.load(args.state / f"{name}-trained.pt", weights_only=True, map_location=device))
    return tiny_models.round_to_fp16(module.to(device)).eval().requires_grad_(False)


def leave(args, name, module):
    torch.save(module.state_dict(), args.state / f"{name}-trained.pt")


def budget(args, name, device):
    path, seconds = args.state / f"{name}.pt", getattr(args, f"{name}_seconds")
    return tiny_training.Budget(path, seconds, device, log, args.limit, rate=args.rate)


def clip_stage(args, device):
    pictures, teacher = load_pictures(args, device), Teacher(device)
    with torch.no_grad(), tiny_training.autocast(device):
        parts = [teacher.features(part.float() / 127.5 - 1) for part in pictures.pixels.split(256)]
    pictures.features = torch.cat(parts).bfloat16()
    clip = begun(args, "tiny-clip", tiny_models.new_clip()).to(device)
    tiny_clip.train_clip(clip, pictures, budget(args, "clip", device), args.clip_batch_size)
    leave(args, "clip", clip)


def eyes_stage(args, device):
    """The CLIP's image tower alone, after what it learned with its text tower."""
    pictures = load_pictures(args, device)
    clip = trained(args, "clip", tiny_models.new_clip(), device)
    for part in (clip.vision_model, clip.visual_projection, clip.text_projection):
        part.requires_grad_(True)
    clip.logit_scale.requires_grad_(True)
    tokenizer = CLIPTokenizer.from_pretrained(args.state / "tokenizer")
    prompts = tokenize(tokenizer, [with_articles(f"a photo of a {kind}") for kind in tiny_clip.KINDS])
    kinds = tiny_clip.kinds_of(tokenizer.batch_decode(pictures.input_ids, skip_special_tokens=True))
    spent = budget(args, "eyes", device)
    tiny_clip.train_eyes(clip, Teacher(device), pictures, prompts, kinds, spent, args.eyes_batch_size)
    leave(args, "eyes", clip)


def vae_stage(args, device, name="vae"):
    """The autoencoder, or (name: decoder) its decoder alone, going on from it."""
    pictures = load_pictures(args, device)
    decoder_only, vae = name == "decoder", begun(args, "tiny-stable-diffusion/vae", tiny_models.new_vae()).to(device)
    if decoder_only:
        vae = trained(args, "vae", vae, device).requires_grad_(True)
    drawings, photos = pictures.pixels.tensor_split([pictures.num_drawings])
    details, spent = torch.cat([pictures.details, photos]), budget(args, name, device)
    tiny_vae.train_vae(vae, Teacher(device), drawings, details, spent, args.vae_batch_size, decoder_only)
    leave(args, name, vae)
    vae = trained(args, name, tiny_models.new_vae(), device)
    shown = to_tensor([array for array, _, _ in pictures.held_out[:12]]).to(device).float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(shown).latent_dist.mean).sample
    rows = [("drawings", previews.to_pictures(shown)), ("decoded", previews.to_pictures(decoded))]
    previews.save_sheet(args.previews / f"{name}.png", rows)


def unet_stage(args, device):
    """Caches what the frozen models give, sets the VAE's scaling factor, and trains the UNet."""
    pictures = load_pictures(args, device)
    vae = trained(args, "vae", tiny_models.new_vae(), device)
    clip = trained(args, "clip", tiny_models.new_clip(), device)
    mean, std = tiny_vae.encode_pictures(vae, pictures.pixels)
    scaling_factor = 1 / (mean.var() + std.square().mean()).sqrt().item()
    torch.save(scaling_factor, args.state / "scaling_factor.pt")
    hidden_states = tiny_clip.encode_captions(clip, pictures.input_ids)
    spread = (mean * scaling_factor).std((0, 2, 3)).tolist()
    log(f"vae: scaling factor {scaling_factor:.4f}, channel deviations {[round(value, 2) for value in spread]}")
    unet = begun(args, "tiny-stable-diffusion/unet", tiny_models.new_unet()).to(device)
    cache = (mean * scaling_factor, std * scaling_factor, hidden_states, pictures)
    tiny_unet.train_unet(unet, cache, budget(args, "unet", device), args.unet_batch_size)
    leave(args, "unet", unet)


def write_stage(args, device):
    """Both folders, from what the stages have left."""
    clip = trained(args, "eyes", tiny_models.new_clip(), device)
    vae = trained(args, "decoder", tiny_models.new_vae(), device)
    vae.register_to_config(scaling_factor=torch.load(args.state / "scaling_factor.pt"))
    unet = trained(args, "unet", tiny_models.new_unet(), device)
    folder = args.model_dir / "tiny-stable-diffusion"
    tiny_models.write_pipeline(folder, clip, vae, unet, args.vocabulary)
    tiny_models.write_clip(args.model_dir / "tiny-clip", clip, args.vocabulary)
    report_sizes(args.model_dir)


def report_sizes(model_dir):
    """Logs the size of both folders and refuses files that are too large for the repository."""
    for name, limit in (("tiny-stable-diffusion", 42e6), ("tiny-clip", 4e6)):
        sizes = {path: path.stat().st_size for path in (model_dir / name).rglob("*") if path.is_file()}
        log(f"{name}: {sum(sizes.values()) / 1e6:.1f} MB, largest file {max(sizes.values()) / 1e6:.1f} MB")
        if sum(sizes.values()) > limit:
            raise ValueError(f"{model_dir / name} is larger than {limit / 1e6:.0f} MB")


def show_stage(args, device):
    """Samples the saved pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(args.model_dir / "tiny-stable-diffusion").to(device)
    pipeline.set_progress_bar_config(disable=True)
    rows = previews.sample_rows(pipeline, previews.sheet_prompts(list(COLOURS)), 8, args.num_inference_steps)
    previews.save_sheet(args.previews / "tiny_model.jpg", rows)


def pictures_stage(args, device):
    torch.save(make_pictures(args, device, log), args.state / "pictures.pt")


STAGES = dict(
    pictures=pictures_stage,
    clip=clip_stage,
    eyes=eyes_stage,
    vae=vae_stage,
    unet=unet_stage,
    decoder=functools.partial(vae_stage, name="decoder"),
    write=write_stage,
    show=show_stage,
)


def main(argv=None):
    args = parse_args(argv)
    args.state.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    log(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}")
    for stage in args.stages:
        torch.manual_seed(args.seed)
        STAGES[stage](args, device)


if __name__ == "__main__":
    main()
