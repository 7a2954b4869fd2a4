"""Validation during training: the loss on the photos with fixed noise, and samples with fixed seeds.

With few photos the training loss is mostly noise: it depends on the timestep drawn. Here every photo is taken at the
same timesteps with the same noise each time, so that the curve shows the model's change alone.
"""

from typing import Any

import torch
from PIL import Image

from utils.data.inputs import TrainingInputs
from utils.data.randomness import VALIDATION, draw_sample
from utils.diffusion import Loss, sample_latents
from utils.training.train_step import predict

NUM_TIMESTEPS = 8  # spread evenly over the noise schedule
MAX_PHOTOS = 8


class Validation:
    """Measures and draws with the modules that are loaded, not copies; writes nothing.

    Args:
        unet: the bare UNet2DConditionModel that is being trained.
        loss: the training's, of which every timestep counts alike here.
        every: steps between validations; 0: there are none.
        num_images: samples a validation, with the seeds seed, seed + 1, ...; none without `inputs.sampler`.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        inputs: TrainingInputs,
        loss: Loss,
        *,
        is_main: bool,
        every: int,
        num_images: int,
        seed: int,
    ):
        self.unet, self.inputs, self.mean_loss = unet, inputs, loss.mean
        self.every, self.num_images, self.seed = every if is_main else 0, num_images, seed
        num_photos = min(len(inputs.latents), MAX_PHOTOS) if self.every else 0
        self._batches = [self._fixed_batch(photo) for photo in range(num_photos)]

    def is_due(self, num_steps: int) -> bool:
        """Whether to validate after `num_steps` steps."""
        return self.every > 0 and num_steps % self.every == 0

    def __call__(self) -> tuple[float, list[Image.Image]]:
        """The loss, and the samples, with the weights as they are."""
        loss = self.loss()
        return loss, [] if self.inputs.sampler is None else self.inputs.sampler(self.unet, self.num_images, self.seed)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean over photos and timesteps of the denoising loss."""
        losses = []
        for batch in self._batches:
            for part in zip(*(part.split(2) for part in batch), strict=True):
                losses.append(self.mean_loss(*predict(self.unet, self.inputs, *part)))
        return torch.stack(losses).mean().item()

    def _fixed_batch(self, photo: int) -> tuple[torch.Tensor, ...]:
        """`predict`'s inputs of a photo at every validation timestep."""
        latents, num_timesteps = self.inputs.latents, self.inputs.noise_scheduler.config.num_train_timesteps
        device = self.inputs.encoder_hidden_states.device
        sizes: Any = dict(num_photos=1, latent_shape=latents.shape, num_train_timesteps=num_timesteps)
        first = photo * NUM_TIMESTEPS
        indices = range(first, first + NUM_TIMESTEPS)
        samples = [draw_sample(self.seed, index, **sizes, stream=VALIDATION) for index in indices]
        latent_noise = torch.stack([torch.from_numpy(sample.latent_noise) for sample in samples]).to(device)
        timesteps = [int((k + 0.5) * num_timesteps / NUM_TIMESTEPS) for k in range(NUM_TIMESTEPS)]
        mean, std = latents.moments(photo, (0.5, 0.5))
        return (
            sample_latents(mean, std, latent_noise, self.inputs.scaling_factor),
            torch.stack([torch.from_numpy(sample.noise) for sample in samples]).to(device),
            torch.tensor(timesteps, device=device),
            torch.full((NUM_TIMESTEPS,), latents.prompt_rows[photo], device=device),
        )
