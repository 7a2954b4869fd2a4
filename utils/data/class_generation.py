"""Making the class images that are missing: spread over the ranks, each written whole, black ones made again."""

import contextlib
import functools
import gc
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from utils.concepts import Concept
from utils.data import class_images
from utils.data.class_images import ClassPlan
from utils.data.randomness import CLASS_SEED, generator
from utils.dataset import ClassDataset
from utils.errors import UserError
from utils.files.atomic import sync
from utils.models import drawing
from utils.models.captured_unet import CapturedUNet
from utils.models.drawing import is_blank, to_pil
from utils.models.folder import BaseModel
from utils.models.loading import load_pipeline, tokenize
from utils.runtime.process import progress_bar
from utils.runtime.ranks import on_all_ranks

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALLER = ("--sample_batch_size", "--prior_generation_precision fp16")
MAX_ATTEMPTS = 4  # with a seed of its own each, before a blank image counts as the model's fault


def prepare_class_images(
    concepts: list[Concept],
    base: BaseModel,
    base_hashes: Future | None,
    device: torch.device,
    settings: Mapping[str, Any] | None,
) -> ClassDataset | None:
    """Says which class images there are and which are missing, makes those, and returns the images to use.

    Every rank has to call it, rank 0 with the base's hashes (see resume.Sources). UserErrors are raised on all.
    `settings` are run.plan's; None: there are no class images.
    """
    if settings is None:
        return None

    def plan_all() -> list[ClassPlan]:
        assert base_hashes is not None
        model = class_images.model_hash(base_hashes.result()["sha256"])
        settings_of = functools.partial(class_images.generation_settings, base, model)
        plans = class_images.plan_classes(concepts, settings["num_class_images"], settings_of)
        for plan in plans:
            print(plan.summary(dist.get_world_size(), settings["sample_batch_size"]), flush=True)
        return plans

    plans = on_all_ranks(plan_all, main_only=True)
    if any(plan.missing for plan in plans):
        on_all_ranks(lambda: make_missing(plans, base, device, settings))
    on_all_ranks(lambda: class_images.check_used(plans))
    images = [(path, plan.prompt) for plan in plans for path in plan.used]
    return ClassDataset(images, settings["resolution"], settings["center_crop"])


def make_missing(plans: list[ClassPlan], base: BaseModel, device: torch.device, settings: Mapping[str, Any]) -> None:
    """Makes this rank's share of every plan's missing images, every num_ranks-th of them."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    shares = [(plan, plan.missing[rank::num_ranks]) for plan in plans]
    dtype = DTYPES[settings["precision"] or ("fp16" if device.type == "cuda" else "fp32")]
    # Without the safety checker: a black image would be trained on.
    pipeline = load_pipeline(base, dtype, device)
    for plan in plans:
        tokenize(plan.prompt, pipeline.tokenizer, pipeline.text_encoder)
    total = sum(len(numbers) for _, numbers in shares)
    bar = progress_bar("class images", total, "image", shown=rank == 0)
    say = functools.partial(print, "warning:", file=sys.stderr, flush=True)
    captures = device.type == "cuda" and settings["uses_cuda_graph"]
    captured = CapturedUNet(say).serving(pipeline) if captures else contextlib.nullcontext()
    with bar, captured:
        for plan, numbers in shares:
            plan.folder.mkdir(parents=True, exist_ok=True)
            for start in range(0, len(numbers), settings["sample_batch_size"]):
                batch = numbers[start : start + settings["sample_batch_size"]]
                make_batch(pipeline, plan, batch, settings["seed"])
                bar.update(len(batch))
            sync(plan.folder)
    del pipeline, captured
    gc.collect()
    torch.cuda.empty_cache()


def image_seed(seed: int, number: int, attempt: int) -> int:
    """The seed of class image `number` at its n-th attempt, a function of the run's seed."""
    return int(generator(seed, number + (attempt << 32), CLASS_SEED).integers(2**32))


@torch.inference_mode()
def make_batch(pipeline: Any, plan: ClassPlan, numbers: list[int], seed: int) -> None:
    """Makes and writes these images of a plan, blank ones with another seed; UserError if one stays blank."""
    names = ("prompt", "num_inference_steps", "guidance_scale", "height", "width")
    settings = {name: plan.settings[name] for name in names}
    for attempt in range(MAX_ATTEMPTS):
        seeds = [image_seed(seed, number, attempt) for number in numbers]
        batch = drawing.draw(pipeline, seeds, smaller=SMALLER, **settings)
        is_finite = batch.isfinite().flatten(1).all(1).tolist()
        blank = []
        for number, image_seed_, image, is_whole in zip(numbers, seeds, to_pil(batch), is_finite, strict=True):
            if not is_whole or is_blank(image):
                blank.append(number)
            else:
                metadata = dict(number=number, seed=image_seed_, settings=plan.settings)
                class_images.write_class_image(plan.folder / class_images.file_name(number), image, metadata)
        numbers = blank
        if not numbers:
            return
    raise UserError(
        f"{plan.prompt!r} came out blank {MAX_ATTEMPTS} times in a row; try --prior_generation_precision fp32"
    )
