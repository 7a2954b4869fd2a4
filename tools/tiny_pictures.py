"""The captioned pictures that the miniature learns from: drawings, crops of photos, cut-outs, and what is held out."""

import functools
import multiprocessing
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPTokenizer

from tools import tiny_models
from tools.cut_outs import draw_cut_out, write_cut_outs
from tools.drawings import draw
from tools.photos import captioned_crop, detail_crop
from tools.rendered import render
from tools.tiny_photos import PhotoWorld

CONTEXT_LENGTH = 77  # tokens
HELD_OUT = 10_000_000  # seeds from here on are never trained on


@dataclass
class Pictures:
    """Captioned pictures, drawings first; all on one device."""

    pixels: torch.Tensor  # uint8 [N, 3, 64, 64]
    num_drawings: int
    caption_index: torch.Tensor  # [N], a row of input_ids each
    input_ids: torch.Tensor  # [M, 77] of the distinct captions; row 0: no prompt
    details: torch.Tensor  # uint8 [D, 3, 64, 64] without captions
    held_out: list  # drawings that nothing is trained on
    features: torch.Tensor | None = None  # the teacher's [N, 1280]

    def choose(self, count, photo_share=0.6):
        """Rows [count], a part of which are photos; no value is read back, so that a graph can hold it."""
        device, drawn = self.pixels.device, self.num_drawings
        drawings = torch.randint(drawn, (count,), device=device)
        photos = torch.randint(drawn, len(self.pixels), (count,), device=device)
        return torch.where(torch.rand(count, device=device) < photo_share, photos, drawings)


def to_tensor(arrays):
    """Pictures uint8 [64, 64, 3] -> one tensor [N, 3, 64, 64]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def make_pictures(args, device, log):
    """Draws and crops: captioned pictures for CLIP and the UNet, crops for the VAE, and a test set of drawings."""
    first = args.seed * HELD_OUT * 2
    drawn = range(first, first + args.num_drawings)
    test = range(first + HELD_OUT, first + HELD_OUT + 12)
    few = range(first, first + args.num_photos // 12)
    cut = range(first, first + args.num_photos // 2)
    folder = args.state / "cut_outs"
    if not folder.exists():
        write_cut_outs(args.photos, folder)
    with multiprocessing.get_context("fork").Pool(args.num_workers) as pool:
        drawings = pool.map(draw, drawn, chunksize=100)
        crops = pool.map(captioned_crop, few, chunksize=100)
        details = pool.map(detail_crop, range(first, first + args.num_details // 3), chunksize=100)
        composed = pool.map(functools.partial(draw_cut_out, folder=folder), cut, chunksize=100)
        rendered = pool.map(render, range(first, first + args.num_photos // 8), chunksize=50)
        held_out = pool.map(draw, test)
    log(f"{len(drawings)} drawings")
    world, rng = PhotoWorld(args.photos, device), np.random.default_rng(args.seed)
    counts = [min(512, args.num_photos - done) for done in range(0, args.num_photos, 512)]
    parts = [world.batch(rng, count) for count in counts]
    free = [world.details(rng, min(512, args.num_details)).cpu() for _ in range(0, args.num_details, 512)]
    made = [*drawings, *crops, *composed, *rendered]
    captions = [caption for _, caption, *_ in made] + [caption for _, part in parts for caption in part]
    pixels = to_tensor([pixels for pixels, *_ in made])
    pixels = torch.cat([pixels, *[part.cpu().permute(0, 3, 1, 2) for part, _ in parts]])
    details = torch.cat([to_tensor(details), *[part.permute(0, 3, 1, 2) for part in free]])
    distinct = ["", *sorted(set(captions))]
    position = {caption: index for index, caption in enumerate(distinct)}
    index = torch.tensor([position[caption] for caption in captions])
    log(f"{len(pixels)} captioned pictures, {len(distinct)} distinct captions")
    tiny_models.write_tokenizer(args.state / "tokenizer", args.vocabulary)
    input_ids = tokenize(CLIPTokenizer.from_pretrained(args.state / "tokenizer"), distinct)
    return Pictures(pixels, len(drawings), index, input_ids, details, held_out)


def tokenize(tokenizer, captions):
    options = dict(padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    return tokenizer(captions, **options).input_ids
