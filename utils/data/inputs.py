"""What training reads: prompts and images after the frozen text encoder and VAE, and a step's micro-batches."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.data.randomness import CLASS, INSTANCE, draw_sample, photo_index, sample_indices
from utils.dataset import ClassDataset, InstanceDataset
from utils.diffusion import encode_images, encode_prompt
from utils.errors import UserError
from utils.models import loading
from utils.models.drawing import Sampler
from utils.models.folder import BaseModel
from utils.runtime.process import mark

OTHER_DTYPE = "--mixed_precision no (fp16 overflows at 65,504; on a GPU bf16 does not)"
MAX_CACHED_BYTES = 1 << 30


class InstanceLatents:
    """Mean and standard deviation of the VAE's latent distribution for a photo's crop, and each photo's prompt.

    A photo with a fixed crop (square, or --center_crop) is encoded before training starts; crops of the others when
    they are first drawn, and kept, up to MAX_CACHED_BYTES in all. Sampling anew from the kept distribution each step
    is exactly what encoding anew each step would give.

    Args:
        dataset: photos or class images.
        vae: frozen; let go of if it is not needed again.
        rows: of each prompt in the table of prompts.
        photos: the only ones that will be drawn; None: all.

    Attributes:
        prompt_rows: of each photo, the row of its prompt in TrainingInputs.encoder_hidden_states.
        shape: (4, R/8, R/8), a latent's.
    """

    def __init__(
        self,
        dataset: InstanceDataset | ClassDataset,
        vae: torch.nn.Module,
        rows: dict[str, int],
        photos: Collection[int] | None = None,
    ):
        self.dataset = dataset
        self.vae: torch.nn.Module | None = vae
        self.prompt_rows = [rows[dataset.prompt(photo)] for photo in range(len(dataset))]
        self._moments: dict[tuple[int, int, int], torch.Tensor] = {}
        self._cached_bytes = 0
        _, channels, height, width = self.moments(0, (0.0, 0.0)).shape
        self.shape = (channels, height, width)
        if dataset.has_fixed_crops:
            photos = range(len(dataset)) if photos is None else sorted(photos)
            for photo in photos:
                self.moments(photo, (0.0, 0.0))
            if len(self._moments) >= len({0, *photos}):
                self.vae = None
        mark("photos encoded")

    def __len__(self) -> int:
        return len(self.prompt_rows)

    def moments(self, photo: int, position: tuple[float, float]) -> torch.Tensor:
        """float32 [2,4,h,w]: mean and standard deviation for the crop at `position`, two numbers in [0,1)."""
        top, left = self.dataset.crop_origin(photo, position)
        key = (photo, top, left)
        if key in self._moments:
            return self._moments[key]
        assert self.vae is not None, "every crop that can be drawn was encoded before the VAE was let go"
        weight = next(self.vae.parameters())
        pixel_values = self.dataset.pixel_values(*key).unsqueeze(0).to(weight.device, dtype=weight.dtype)
        moments = torch.cat(encode_images(self.vae, pixel_values))
        if not moments.isfinite().all():
            dataset = self.dataset
            path = dataset.photos[photo].path if isinstance(dataset, InstanceDataset) else dataset.images[photo][0]
            raise UserError(f"the VAE's latents of {path} are NaN or infinite: use {OTHER_DTYPE}, or another VAE")
        if self._cached_bytes + moments.nbytes <= MAX_CACHED_BYTES:
            self._moments[key] = moments
            self._cached_bytes += moments.nbytes
        return moments


class TrainingInputs(NamedTuple):
    """The frozen side of a run.

    `encoder_hidden_states` [P,77,C] in weight_dtype is the table of prompts; `class_latents` is None without prior
    preservation; `sampler` draws the validation prompt, None without one.
    """

    encoder_hidden_states: torch.Tensor
    latents: InstanceLatents
    class_latents: InstanceLatents | None
    noise_scheduler: Any  # diffusers' DDPMScheduler
    scaling_factor: float
    sampler: Sampler | None = None


def encode_inputs(
    base: BaseModel,
    dataset: InstanceDataset,
    class_dataset: ClassDataset | None,
    weight_dtype: torch.dtype,
    device: torch.device,
    *,
    tokenizer_name: Path | None,
    shown: list[str],
    drawing: Mapping[str, Any],
    seed: int,
    num_samples: int,
) -> TrainingInputs:
    """Each prompt goes through the text encoder once, which is then freed; images through the VAE as they are needed.

    Args:
        tokenizer_name: the folder of another tokenizer than the base's.
        shown, drawing: the prompts that validation draws, the negative one last, and how; none: it draws nothing.
        seed, num_samples: the run's, and the samples of all its steps: class images that it never draws stay unread.
    """
    datasets = [each for each in (dataset, class_dataset) if each is not None]
    prompts = list(dict.fromkeys(each.prompt(photo) for each in datasets for photo in range(len(each))))
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    vae: Any = loading.load_frozen(base, "vae", weight_dtype, device)
    loading.load_sampling_scheduler(base)  # settings with which it cannot be made end the run here
    noise_scheduler = loading.load_noise_scheduler(base)
    class_latents = None
    if class_dataset is not None:
        drawn = drawn_class_images(seed, num_samples, len(class_dataset))
        class_latents = InstanceLatents(class_dataset, vae, rows, drawn)
    latents = InstanceLatents(dataset, vae, rows)
    table = encode_prompts(base, tokenizer_name, prompts + shown, weight_dtype, device)
    return TrainingInputs(
        encoder_hidden_states=table[: len(prompts)].clone(),
        latents=latents,
        class_latents=class_latents,
        noise_scheduler=noise_scheduler,
        scaling_factor=vae.config.scaling_factor,
        sampler=Sampler(base, vae, table[len(prompts) : -1], table[-1:], **drawing) if shown else None,
    )


def encode_prompts(
    base: BaseModel, tokenizer_name: Path | None, prompts: list[str], weight_dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[P,77,C]; one by one, so that a prompt's encoding does not depend on the others."""
    tokenizer = loading.load_tokenizer(tokenizer_name or base.folder / "tokenizer")
    text_encoder = loading.load_frozen(base, "text_encoder", weight_dtype, device)
    rows = []
    for text in prompts:
        input_ids = loading.tokenize(text, tokenizer, text_encoder)
        rows.append(encode_prompt(text_encoder, input_ids.to(device)))
        if not rows[-1].isfinite().all():
            raise UserError(f"the text encoder gives NaN or infinity for {text!r}: use {OTHER_DTYPE}, or another one")
    return torch.cat(rows)


def drawn_class_images(seed: int, num_samples: int, num_class_images: int) -> set[int]:
    """The class images that a run of `num_samples` samples draws: others are never decoded."""
    if num_samples >= num_class_images:
        return set(range(num_class_images))
    return {photo_index(seed, index, num_class_images, CLASS.photo) for index in range(num_samples)}


class MicroBatch(NamedTuple):
    """What one forward pass needs: float32 [B,4,h,w] each, but `timesteps` and `prompt_rows` int64 [B].

    With prior preservation the first half are photos, the second class images. `prompt_rows` are rows of
    TrainingInputs.encoder_hidden_states.
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    latent_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    prompt_rows: torch.Tensor


class BatchSource:
    """The micro-batches of any step of a run, for one rank; holds no state that a step changes.

    Args:
        inputs: the photos' and class images' latents and prompts.
        rank, spread: how a step's samples are spread, by randomness.sample_indices; their order does not change.
        noise_offset: see randomness.draw_sample.
        device: where the micro-batches go.
    """

    def __init__(
        self, inputs: TrainingInputs, *, seed: int, rank: int, noise_offset: float, device: torch.device, **spread: int
    ):
        self.kinds = [(inputs.latents, INSTANCE)]
        if inputs.class_latents is not None:
            self.kinds.append((inputs.class_latents, CLASS))
        self.rank, self.spread, self.device = rank, spread, device
        num_timesteps = inputs.noise_scheduler.config.num_train_timesteps
        self.draw = functools.partial(draw_sample, seed, num_train_timesteps=num_timesteps, noise_offset=noise_offset)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of global step `step` (from 0) of this rank."""
        return [self._micro_batch(step, number) for number in range(self.spread["num_micro_batches"])]

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        indices = sample_indices(step, number, self.rank, **self.spread)
        drawn = [
            (latents, self.draw(index, num_photos=len(latents), latent_shape=latents.shape, stream=stream))
            for latents, stream in self.kinds
            for index in indices
        ]
        mean, std = torch.stack([latents.moments(sample.photo, sample.crop) for latents, sample in drawn], dim=1)
        noise = torch.from_numpy(np.stack([(sample.latent_noise, sample.noise) for _, sample in drawn], axis=1))
        prompt_rows = [latents.prompt_rows[sample.photo] for latents, sample in drawn]
        integers = torch.tensor([[sample.timestep for _, sample in drawn], prompt_rows])
        if self.device.type == "cuda":
            noise, integers = noise.pin_memory(), integers.pin_memory()
        latent_noise, noise = noise.to(self.device, non_blocking=True)
        timesteps, rows = integers.to(self.device, non_blocking=True)
        return MicroBatch(mean, std, latent_noise, noise, timesteps, rows)
