"""Ten steps against a loop that shares nothing with the program but its draws: diffusers, torch's AdamW, Pillow.

The update's relative L2 error is docs/precision.md's table. AdamW's epsilon is 1e-6: at 1e-8 the rounding of gradients
that are zero but for it, as this random model has, becomes whole steps (up to 7e-5).
"""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tests.helpers.pipelines import edit_json, write_photos
from tests.helpers.processes import finish, start_ranks
from tests.helpers.script import as_argv, run, weight_change
from utils.data.randomness import CLASS, INSTANCE, draw_sample, generator

NUM_STEPS, NUM_TIMESTEPS, RESOLUTION, FACTOR = 10, 1000, 32, 4
OURS, CLASSES = "a photo of my cat.", "a photo of a cat."
PRIOR = dict(with_prior_preservation=True, class_prompt=CLASSES, num_class_images=5, prior_loss_weight=0.7)
COSINE = dict(lr_scheduler="cosine", lr_warmup_steps=3, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1)
SETTINGS = {  # the flags, and how many samples a step has
    "plain": (dict(train_batch_size=2), 2),
    "prior preservation": (PRIOR, 1),
    "accumulation": (dict(train_batch_size=2, gradient_accumulation_steps=2), 4),
    "min-SNR": (dict(snr_gamma=5.0, train_batch_size=2), 2),
    "min-SNR, velocity": (dict(snr_gamma=5.0, train_batch_size=2), 2),
    "noise offset": (dict(noise_offset=0.1), 1),
    "two ranks": (dict(snr_gamma=5.0, scale_lr=True) | PRIOR, 2),
    "cosine, warm-up, other betas": (COSINE, 1),
}


class Loop:
    """Eager modules of a pipeline folder, in fp32."""

    def __init__(self, base, flags):
        self.flags, parts = flags, dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
        self.unet, self.vae, text_encoder = (cls.from_pretrained(base / part) for part, cls in parts.items())
        self.scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        tokens = tokenizer([OURS, CLASSES], padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            self.states = text_encoder(tokens.input_ids)[0]
        self.files = [sorted(flags[name].glob("*.jpg")) for name in ("instance_data_dir", "class_data_dir")]

    @torch.no_grad()
    def latents(self, file, crop, latent_noise):
        image = Image.open(file).convert("RGB")
        scale = RESOLUTION / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        left, top = (int(at * (side - RESOLUTION + 1)) for at, side in zip(crop[::-1], image.size, strict=True))
        pixels = np.asarray(image.crop((left, top, left + RESOLUTION, top + RESOLUTION)), np.float32) / 255
        distribution = self.vae.encode(torch.from_numpy(pixels * 2 - 1).permute(2, 0, 1)[None]).latent_dist
        return (distribution.mean + distribution.std * latent_noise) * self.vae.config.scaling_factor

    def loss(self, stream, is_class, indices):
        """Mean over the samples of one kind."""
        files, losses = self.files[is_class], []
        side = RESOLUTION // FACTOR
        sizes = dict(num_photos=len(files), latent_shape=(4, side, side), num_train_timesteps=NUM_TIMESTEPS)
        for index in indices:
            sample = draw_sample(0, index, **sizes, stream=stream)
            shift = generator(0, index, stream.noise_offset).standard_normal((4, 1, 1), dtype=np.float32)
            noise = torch.from_numpy(sample.noise + np.float32(self.flags.get("noise_offset", 0)) * shift)[None]
            latents = self.latents(files[sample.photo], sample.crop, torch.from_numpy(sample.latent_noise))
            t = torch.tensor([sample.timestep])
            a = self.scheduler.alphas_cumprod[t]
            predicted = self.unet(
                a.sqrt() * latents + (1 - a).sqrt() * noise, t, self.states[None, int(is_class)]
            ).sample
            is_velocity = self.scheduler.config.prediction_type == "v_prediction"
            target = a.sqrt() * noise - (1 - a).sqrt() * latents if is_velocity else noise
            snr, gamma = a / (1 - a), self.flags.get("snr_gamma")
            weight = snr.clamp(max=gamma) / (snr + is_velocity) if gamma else 1
            losses.append(weight * (predicted - target).square().mean())
        return torch.stack(losses).mean()

    def train(self, num_samples):
        get = self.flags.get
        lr = self.flags["learning_rate"] * (num_samples if get("scale_lr") else 1)
        betas = get("adam_beta1", 0.9), get("adam_beta2", 0.999)
        options = dict(betas=betas, eps=get("adam_epsilon"), weight_decay=get("adam_weight_decay", 1e-2))
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=lr, **options)
        name, steps = get("lr_scheduler", "constant"), dict(num_training_steps=NUM_STEPS)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=self.flags["lr_warmup_steps"], **steps)
        for step in range(NUM_STEPS):
            indices = range(step * num_samples, (step + 1) * num_samples)
            loss = self.loss(INSTANCE, False, indices)
            if get("with_prior_preservation"):
                loss = loss + get("prior_loss_weight") * self.loss(CLASS, True, indices)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_are_those_of_an_independent_loop(name, flags, base, tmp_path):
    changes, num_samples = SETTINGS[name]
    if "velocity" in name:
        edit_json(base / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    flags |= dict(instance_data_dir=write_photos(tmp_path / "photos", 3, size=(56, 40)), max_train_steps=NUM_STEPS)
    flags |= dict(pretrained_model_name_or_path=base, learning_rate=1e-4, adam_epsilon=1e-6) | changes
    classes = write_photos(tmp_path / "classes", 5, size=(40, 48))
    given = flags | (dict(class_data_dir=classes) if changes.get("with_prior_preservation") else {})
    if name == "two ranks":
        assert finish(start_ranks(2, as_argv(given), tmp_path / "said")) == [0, 0]
    else:
        run(given)
    loop = Loop(base, flags | dict(class_data_dir=classes))
    loop.train(num_samples)
    loop.unet.save_pretrained(tmp_path / "theirs" / "unet")
    ours, theirs = (weight_change(base, folder) for folder in (flags["output_dir"], tmp_path / "theirs"))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{name}: {error:.1e}")
    assert error < 5e-5
