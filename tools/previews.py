"""Pictures for a person to judge a build by: labelled sheets."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from tools.drawings import with_articles

SIZE = 64
LABEL_HEIGHT = 18
SHEET_PROMPTS = (
    *("a photo of a {colour} cat on a {background} background", "a photo of a dog", "a photo of a {colour} fish"),
    *("a photo of a {colour} bird on a {background} background", "a photo of a house", "a photo of a {colour} tree"),
    *("a {colour} car on a {background} background", "a photo of a {colour} ball", "a photo of a cup"),
    *("a {colour} star on a {background} background", "a photo of a flower", "a photo of a {colour} boat"),
    *("a {colour} chair on a {background} background", "a photo of a mushroom", "a photo of a {colour} apple"),
    *("a photo of a {colour} clock on a {background} background", "a photo of a {colour} cup", "a {colour} flower"),
)
PHOTO_PROMPTS = ("a photo of an astronaut", "a photo of a rocket", "a photo of a coffee", "a photo of my cat.")


def sheet_prompts(colours):
    """The prompts of the big sheet, each colour and background coming up in turn."""
    prompts = []
    for index, template in enumerate(SHEET_PROMPTS):
        colour, background = colours[index % len(colours)], colours[(index * 3 + 4) % len(colours)]
        if colour == background:
            background = colours[(index * 3 + 5) % len(colours)]
        prompts.append(with_articles(template.format(colour=colour, background=background)))
    return [*prompts, *PHOTO_PROMPTS]


def save_sheet(path, rows, scale=2):
    """rows: [(label, [picture, ...])] -> one picture file, pictures enlarged, each row under its label."""
    side = SIZE * scale
    width = side * max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (width, (side + LABEL_HEIGHT) * len(rows)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (label, pictures) in enumerate(rows):
        top = row * (side + LABEL_HEIGHT)
        canvas.text((4, top + 2), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (column * side, top + LABEL_HEIGHT))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True, quality=85)


def to_pictures(pixel_values):
    """[-1, 1] float [B, 3, 64, 64] -> list of PIL pictures."""
    arrays = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def sample_rows(pipeline, prompts, num_seeds, num_inference_steps, guidance_scale=5.0, batch_size=64):
    """[(prompt, pictures)], where picture k of every prompt starts from seed k."""
    wanted = [(prompt, seed) for prompt in prompts for seed in range(num_seeds)]
    pictures = []
    for first in range(0, len(wanted), batch_size):
        part = wanted[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in part]
        options = dict(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generators)
        pictures += pipeline([prompt for prompt, _ in part], **options).images
    return [(prompt, pictures[row * num_seeds : (row + 1) * num_seeds]) for row, prompt in enumerate(prompts)]
