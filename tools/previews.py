"""Pictures for a person to judge a build by: labelled sheets, reconstructions, and a quick DreamBooth run."""

import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tools.drawings import with_articles
from tools.tiny_training import alphas_cumprod, noise_prediction_loss

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
SUBJECT_PROMPT = "a photo of my cat."
SUBJECT_PROMPTS = (
    *(SUBJECT_PROMPT, "a photo of my cat on a red background", "a photo of a cat"),
    *("a photo of a dog", "a photo of a green car on a white background"),
)


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


def load_instance(folder, device):
    """The subject's photos as pixel_values [4, 3, 64, 64] in [-1, 1]."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("*.jpg"))]
    pictures = [picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS) for picture in pictures]
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1


@torch.no_grad()
def reconstruct(vae, pixel_values):
    return vae.decode(vae.encode(pixel_values).latent_dist.mean).sample.clamp(-1, 1)


def fidelity(decoded, pixel_values):
    """L1 in 0..255 levels, and PSNR in decibels, as text."""
    error = (decoded - pixel_values) * 127.5
    psnr = 20 * torch.log10(255 / error.square().mean().sqrt())
    return f"L1 {error.abs().mean():.2f} levels, PSNR {psnr:.2f} dB"


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


def dreambooth(pipeline, pixel_values, learning_rate, num_steps, batch_size=4):
    """A copy of the pipeline's UNet after a plain DreamBooth run on the subject's photos."""
    device = pixel_values.device
    unet = copy.deepcopy(pipeline.unet).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), learning_rate)
    alphas, losses = alphas_cumprod(device), []
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixel_values).latent_dist
        options = dict(padding="max_length", truncation=True, return_tensors="pt")
        input_ids = pipeline.tokenizer([SUBJECT_PROMPT], **options).input_ids.to(device)
        hidden_states = pipeline.text_encoder(input_ids)[0].expand(batch_size, -1, -1)
    for _ in range(num_steps):
        chosen = torch.randint(len(pixel_values), (batch_size,), device=device)
        latents = posterior.sample()[chosen] * pipeline.vae.config.scaling_factor
        loss = noise_prediction_loss(unet, latents, hidden_states, alphas)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return unet.eval(), torch.stack(losses)[-50:].mean().item()


def dreambooth_previews(pipeline, pixel_values, folder, learning_rates, num_steps, num_inference_steps, report):
    """Tunes a copy at each learning rate and saves one sheet for each."""
    base = pipeline.unet
    for learning_rate in learning_rates:
        torch.manual_seed(0)
        pipeline.unet, loss = dreambooth(pipeline, pixel_values, learning_rate, num_steps)
        report(f"DreamBooth lr {learning_rate:g}, {num_steps} steps: last losses {loss:.4f}")
        rows = [("instance photos", to_pictures(pixel_values))]
        rows += sample_rows(pipeline, SUBJECT_PROMPTS, 6, num_inference_steps)
        save_sheet(Path(folder) / f"dreambooth_lr{learning_rate:g}_{num_steps}steps.png", rows)
        pipeline.unet = base
