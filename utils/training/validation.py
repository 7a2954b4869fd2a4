"""Validation during training: the loss on the photos with fixed noise, and samples with fixed seeds.

With few photos the training loss is mostly noise: it depends on the timestep drawn. Here every photo is taken at the
same timesteps with the same noise each time, so that the curve shows the model's change alone.
"""

import json
from argparse import Namespace

import torch

from utils.data.inputs import TrainingInputs
from utils.data.randomness import VALIDATION, draw_sample
from utils.diffusion import denoising_loss, sample_latents, training_target
from utils.files.json_files import keep_rows

VALIDATION_FILE = "validation.jsonl"
IMAGES_FOLDER = "validation"
NUM_TIMESTEPS = 8  # spread evenly over the noise schedule
MAX_PHOTOS = 8
DEFAULT_STEPS = 100


class Validation:
    """Measures and draws every args.validation_steps steps, on rank 0; the loaded modules are used, not copies.

    Args:
        inputs: the photos' latents and prompts; `inputs.sampler` draws the samples, None without --validation_prompt.
        unet: the bare UNet2DConditionModel that is being trained.
        log: the TrainingLog, told every result.
    """

    def __init__(self, args: Namespace, inputs: TrainingInputs, unet: torch.nn.Module, log, *, first_step: int):
        self.args, self.inputs, self.unet, self.log = args, inputs, unet, log
        self.every = args.validation_steps or (DEFAULT_STEPS if args.validation_prompt else 0)
        self._batches = self._fixed_batches() if self.every else []
        if self.every:
            self.path = args.output_dir / VALIDATION_FILE
            keep_rows(self.path, first_step, frozenset({"validation_loss"}))
            if not first_step:
                self._validate(0)

    def after_step(self, step: int) -> None:
        """To be called after step `step`, counted from 1."""
        if self.every and step % self.every == 0:
            self._validate(step)

    def _fixed_batches(self) -> list[tuple[torch.Tensor, ...]]:
        """(latents, noise, timesteps, prompts) of every photo at every validation timestep."""
        latents, batches = self.inputs.latents, []
        num_timesteps, device = self.inputs.num_train_timesteps, self.inputs.encoder_hidden_states.device
        timesteps = [int((k + 0.5) * num_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)]
        draw = dict(num_photos=1, latent_shape=latents.shape, num_train_timesteps=num_timesteps, stream=VALIDATION)
        for photo in range(min(len(latents.dataset), MAX_PHOTOS)):
            samples = [draw_sample(self.args.seed, photo * NUM_TIMESTEPS + k, **draw) for k in range(NUM_TIMESTEPS)]
            mean, std = latents.moments(photo, (0.5, 0.5))
            latent_noise = torch.stack([torch.from_numpy(sample.latent_noise) for sample in samples]).to(device)
            noise = torch.stack([torch.from_numpy(sample.noise) for sample in samples]).to(device)
            prompt = self.inputs.prompt_numbers[latents.dataset.prompt(photo)]
            batches.append(
                (
                    sample_latents(mean, std, latent_noise, self.inputs.scaling_factor),
                    noise,
                    torch.tensor(timesteps, device=device),
                    torch.full((NUM_TIMESTEPS,), prompt, device=device),
                )
            )
        return batches

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over photos and timesteps of the denoising loss with the weights as they are."""
        prompts, noise_scheduler, losses = self.inputs.encoder_hidden_states, self.inputs.noise_scheduler, []
        for rows in self._batches:
            for latents, noise, timesteps, numbers in zip(*(part.split(2) for part in rows), strict=True):
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps).to(prompts.dtype)
                hidden = prompts.index_select(0, numbers)
                model_pred = self.unet(noisy_latents, timesteps, hidden, return_dict=False)[0]
                losses.append(denoising_loss(model_pred, training_target(noise_scheduler, latents, noise, timesteps)))
        return torch.stack(losses).mean().item()

    def _validate(self, step: int) -> None:
        loss = self.loss()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
        images = []
        if self.inputs.sampler is not None:
            images = self.inputs.sampler(self.unet, self.args.num_validation_images, self.args.seed)
            folder = self.args.output_dir / IMAGES_FOLDER
            folder.mkdir(exist_ok=True)
            for number, image in enumerate(images):
                image.save(folder / f"step-{step:06d}-seed-{self.args.seed + number}.png")
        self.log.validation(step, loss, images)
