"""What training reads and never changes: prompts and images after the frozen text encoder and VAE."""

from argparse import Namespace
from collections.abc import Collection
from typing import NamedTuple

import torch

from utils.data.randomness import CLASS, photo_index
from utils.diffusion import encode_images, encode_prompt, min_snr_weights
from utils.models import loading
from utils.models.drawing import Sampler
from utils.runtime.timing import mark

MAX_CACHED_BYTES = 1 << 30


class InstanceLatents:
    """Mean and standard deviation of the VAE's latent distribution for a photo's crop.

    A photo with a fixed crop (square, or --center_crop) is encoded before training starts; crops of the others when
    they are first drawn, and kept, up to MAX_CACHED_BYTES in all. Sampling anew from the kept distribution each step
    is exactly what encoding anew each step would give.

    Args:
        dataset: an InstanceDataset or a ClassDataset.
        vae: frozen; let go of where it is not needed again.
        photos: the only ones that will be drawn; None: all.
    """

    def __init__(self, dataset, vae: torch.nn.Module, photos: Collection[int] | None = None):
        self.dataset = dataset
        self.vae = vae
        self._moments: dict[tuple[int, int, int], torch.Tensor] = {}
        self._cached_bytes = 0
        self.shape = tuple(self.moments(0, (0.0, 0.0)).shape[1:])
        if dataset.has_fixed_crops:
            photos = range(len(dataset)) if photos is None else sorted(photos)
            for photo in photos:
                self.moments(photo, (0.0, 0.0))
            if len(self._moments) >= len({0, *photos}):
                self.vae = None
        mark("photos encoded")

    def moments(self, photo: int, position: tuple[float, float]) -> torch.Tensor:
        """float32 [2,4,h,w]: mean and standard deviation for the crop at `position`, two numbers in [0,1)."""
        key = (photo, *self.dataset.crop_origin(photo, position))
        if key in self._moments:
            return self._moments[key]
        weight = next(self.vae.parameters())
        pixel_values = self.dataset.pixel_values(*key).unsqueeze(0).to(weight.device, dtype=weight.dtype)
        moments = torch.cat(encode_images(self.vae, pixel_values))
        if self._cached_bytes + moments.nbytes <= MAX_CACHED_BYTES:
            self._moments[key] = moments
            self._cached_bytes += moments.nbytes
        return moments


class TrainingInputs(NamedTuple):
    """The frozen side of a run.

    `encoder_hidden_states` [P,77,C] in weight_dtype is the table of prompts, `prompt_numbers` each prompt's row in it;
    `class_latents` is None without prior preservation; `timestep_weights` [num_train_timesteps] None where all are 1;
    `sampler` draws the validation prompt, None without one.
    """

    encoder_hidden_states: torch.Tensor
    prompt_numbers: dict[str, int]
    latents: InstanceLatents
    class_latents: InstanceLatents | None
    noise_scheduler: object
    scaling_factor: float
    timestep_weights: torch.Tensor | None = None
    sampler: object | None = None

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the noise schedule."""
        return self.noise_scheduler.config.num_train_timesteps


def encode_inputs(args: Namespace, folder, dataset, class_dataset, plan, device) -> TrainingInputs:
    """Each prompt goes through the text encoder once, which is then freed; images through the VAE as they are needed.

    Args:
        folder: the base pipeline's.
        dataset, class_dataset: an InstanceDataset, and a ClassDataset or None.
        plan: the run's steps and dtype.
    """
    datasets = [dataset] if class_dataset is None else [dataset, class_dataset]
    prompts = list(dict.fromkeys(each.prompt(number) for each in datasets for number in range(len(each))))
    vae = loading.load_vae(folder, plan.weight_dtype, device)
    noise_scheduler = loading.load_noise_scheduler(folder)
    class_latents = None
    if class_dataset is not None:
        class_latents = InstanceLatents(class_dataset, vae, drawn_class_images(args.seed, plan, len(class_dataset)))
    latents = InstanceLatents(dataset, vae)
    shown = [args.validation_prompt, ""] if args.validation_prompt else []
    encoder_hidden_states = encode_prompts(args, folder, prompts + shown, plan.weight_dtype, device)
    return TrainingInputs(
        encoder_hidden_states[: len(prompts)].clone(),
        {prompt: number for number, prompt in enumerate(prompts)},
        latents,
        class_latents,
        noise_scheduler,
        vae.config.scaling_factor,
        min_snr_weights(noise_scheduler, args.snr_gamma).to(device) if args.snr_gamma else None,
        Sampler(folder, vae, *encoder_hidden_states[len(prompts) :].split(1)) if shown else None,
    )


def encode_prompts(args: Namespace, folder, prompts: list[str], weight_dtype: torch.dtype, device) -> torch.Tensor:
    """[P,77,C]; one by one, so that a prompt's encoding does not depend on the others."""
    tokenizer = loading.load_tokenizer(folder, args.tokenizer_name)
    text_encoder = loading.load_text_encoder(folder, weight_dtype, device)
    return torch.cat([encode_prompt(text_encoder, loading.tokenize(tokenizer, text).to(device)) for text in prompts])


def drawn_class_images(seed: int, plan, num_class_images: int) -> set[int]:
    """The class images that a run of this plan draws: others are never decoded."""
    num_samples = plan.num_steps * plan.samples_per_step
    if num_samples >= num_class_images:
        return set(range(num_class_images))
    return {photo_index(seed, index, num_class_images, CLASS.photo) for index in range(num_samples)}
