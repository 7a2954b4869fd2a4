"""The first stage of an evaluation: images of every model, prompt and seed, and the comparison sheet."""

import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from utils.dataset import decode
from utils.errors import UserError, of_file
from utils.evaluation import comparison
from utils.evaluation.candidates import FOLDER as CANDIDATES
from utils.evaluation.candidates import label
from utils.evaluation.photos import load_photos
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prompts import OTHER, PLACE, SUBJECT
from utils.evaluation.samples import (
    BASELINE,
    COMPARISON_FILE,
    FINETUNED,
    PIXELS,
    SAMPLES_FILE,
    SETTINGS_KEY,
    WRITTEN_BY,
    Sample,
    own_files,
    plan_samples,
    samples_id,
    settings_sha256,
)
from utils.evaluation.turns import WeightsInTurn
from utils.files import png
from utils.files.json_files import write_json
from utils.models import drawing, loading
from utils.models.captured_unet import CapturedUNet
from utils.models.drawing import is_blank
from utils.models.folder import read_base
from utils.models.loading import WEIGHT_DTYPES
from utils.runtime import gpu, process
from utils.runtime.process import mark, progress_bar

NUM_WRITERS = 4  # threads that write images
MOST_AT_ONCE = 8  # images, if --batch_size does not say; more are drawn in equal parts


class Session(NamedTuple):
    """What draws: to which plan, by which pipelines in turn, and what samples.json says of them."""

    plan: EvaluationPlan
    turns: WeightsInTurn
    models: dict[str, dict]
    device: torch.device


def generate(plan: EvaluationPlan, hashing: Future) -> None:
    """Makes the images that are not there yet, model by model; writes samples.json and comparison.png.

    `hashing` will be what hash_models returns.
    """
    mark("imported")
    gpu.say_problems_of_gpu()
    device = gpu.pick_device()
    for each in (plan, plan.candidates or plan):
        each.mixed_precision = pick_precision(plan.mixed_precision, device)
    photos = load_photos(plan.instance_data_dir, plan.finetuned_model_name_or_path)
    if plan.instance_data_dir is not None and not photos:
        warn(f"--instance_data_dir {plan.instance_data_dir} holds no photo: {COMPARISON_FILE} shows none")
    turns = WeightsInTurn(plan, load_pipelines(plan, device))
    mark("models loaded")
    for text in [*(prompt.text for prompt in plan.prompts), plan.negative_prompt or ""]:
        if unseen := drawing.truncated_text(turns.pipelines[BASELINE], text):
            warn(f'the prompt is too long for the text encoder, which does not see its end: "{unseen}"')
    session = Session(plan, turns, turns.describe(hashing.result()), device)
    mark("models hashed")
    samples, quick = plan_samples(plan), plan.candidates
    quick_samples = plan_samples(quick, CANDIDATES) if quick else []
    try:
        claim(plan, [sample.file for sample in samples + quick_samples])
        record = describe(session, draw_all(session, samples))
        write_comparison(plan, samples, photos)
        mark("final images drawn")
        if quick:
            record["candidates"] = drawn = draw_candidates(session._replace(plan=quick), quick_samples)
            record["files"] = sorted({*record["files"], *drawn["files"]})
            record["samples_id"] = samples_id(record["images"] + drawn["images"])
        mark("sampled")
        finish(plan.output_dir, record | dict(seconds_after_start=process.marks))
    except OSError as error:
        raise UserError(of_file(error, plan.output_dir, "make room there, or name another --output_dir")) from error


def draw_candidates(session: Session, samples: list[Sample]) -> dict:
    """The candidates' images, in fewer steps of a solver that needs fewer; returns their samples.json."""
    for pipeline in session.turns.pipelines.values():  # these are the last images
        pipeline.scheduler = loading.quick_scheduler(pipeline.scheduler)
    solver = type(session.turns.pipelines[BASELINE].scheduler).__name__
    models = {
        name: model | dict(scheduler=solver, sha256=model["sha256"] | dict(solver=solver))
        for name, model in session.models.items()
    }
    session = session._replace(models=models)
    return describe(session, draw_all(session, samples))


def pick_precision(asked: str | None, device: torch.device) -> str:
    """The precision that was asked for, or the device's usual one; what the device is bad at is warned of."""
    mixed_precision = asked or ("fp16" if device.type == "cuda" else "no")
    if mixed_precision == "bf16" and (old_gpu := gpu.gpu_without_bf16()):
        warn(f"{old_gpu} has no bf16 arithmetic: fp16 in its place")
        mixed_precision = "fp16"
    if device.type == "cpu" and mixed_precision == "fp16":
        warn("--mixed_precision fp16 on a CPU is many times slower than `no`")
    return mixed_precision


def load_pipelines(plan: EvaluationPlan, device: torch.device) -> dict:
    """Baseline and fine-tuned; what is the same in both is loaded once. All others are the fine-tuned with other
    weights in its UNet (WeightsInTurn)."""
    dtype = WEIGHT_DTYPES[plan.mixed_precision]
    options: dict[str, Any] = dict(weight_dtype=dtype, device=device, safety_checker=plan.safety_checker)
    baseline = loading.load_pipeline(read_base(plan.pretrained_model_name_or_path), **options)
    tuned = read_base(plan.finetuned_model_name_or_path)
    finetuned = loading.load_pipeline(tuned, shared=loading.common_components(baseline, tuned.folder), **options)
    if {"unet", "text_encoder", "vae"} <= set(loading.shared_components(finetuned, baseline)):
        warn("the fine-tuned weights equal the baseline's: both rows will be the same")
    return {BASELINE: baseline, FINETUNED: finetuned}


def draw_all(session: Session, samples: list[Sample]) -> list[dict]:
    """Makes and writes the images whose settings differ from what lies there; returns samples.json's entries."""
    plan, folder, device_type = session.plan, session.plan.output_dir, session.device.type
    digests = {sample.file: settings_sha256(pixels_of(session, sample)) for sample in samples}
    wanted = [s for s in samples if recorded_settings(folder / s.file) != digests[s.file]]
    if len(wanted) < len(samples):
        print(f"{len(samples) - len(wanted)} of {len(samples)} images are there already, with the same settings")
    start, writing = time.monotonic(), {}
    with ThreadPoolExecutor(NUM_WRITERS) as writers:  # compressing PNGs takes long, and the GPU need not wait for it
        for sample, image in draw(session, wanted):
            text = png_text(plan, sample.prompt, seed=sample.seed, model=session.models[sample.model]["path"])
            text |= {SETTINGS_KEY: digests[sample.file]}
            writing[sample.file] = writers.submit(save_sample, folder / sample.file, image, text)
            for future in writing.values():
                if future.done():
                    future.result()  # raises: if the disk is full, the rest need not be drawn
    if blank := [file for file, future in writing.items() if future.result()]:
        cause = "the safety checker blacked it out, or " if plan.safety_checker else ""
        cause += "training has spoilt the model: try an earlier checkpoint"
        warn(f"one colour only: {', '.join(blank)} ({cause})")
    if wanted:
        seconds = time.monotonic() - start
        rate = f"{len(wanted) / seconds:.2f} images per second ({device_type})"
        print(f"{len(wanted)} image{'s' * (len(wanted) > 1)} in {seconds:.1f} s: {rate}")
    return [sample._asdict() | {SETTINGS_KEY: digests[sample.file]} for sample in samples]


def pixels_of(session: Session, sample: Sample) -> dict:
    """All that decides an image's pixels: an image of which all is equal need not be made again."""
    made_with = dict(prompt=sample.prompt, seed=sample.seed, model=session.models[sample.model]["sha256"])
    made_with |= dict(device=session.device.type, versions=drawing.versions())
    return {name: getattr(session.plan, name) for name in PIXELS} | made_with


def draw(session: Session, wanted: list[Sample]) -> Iterator[tuple[Sample, Image.Image]]:
    """Yields the images of every model, in batches of a prompt's, or of prompts with one seed each."""
    plan, turns = session.plan, session.turns
    groups = [
        list(group)
        for _, group in groupby(wanted, lambda s: (s.model, s.role if s.role in (PLACE, OTHER) else s.prompt))
    ]
    sizes = [plan.batch_size or math.ceil(len(g) / math.ceil(len(g) / MOST_AT_ONCE)) for g in groups]
    num_steps = sum(
        drawing.num_denoising_steps(turns.of(group[0].model), len(group), plan.num_inference_steps, size)
        for group, size in zip(groups, sizes, strict=True)
    )
    names = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width")
    options = {name: getattr(plan, name) for name in names}
    options["embeddings"] = drawing.PromptEmbeddings(plan.negative_prompt, plan.guidance_scale)
    options["captured"] = CapturedUNet(warn) if session.device.type == "cuda" else None
    with progress_bar("drawing", num_steps, "step", shown=bool(groups)) as bar:
        for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
            name, seeds, prompts = group[0].model, [s.seed for s in group], [s.prompt for s in group]
            bar.set_description(label(name))
            pipeline = turns.pipeline(name, [later[0].model for later in groups[number + 1 :]])
            try:
                images = drawing.sample(
                    pipeline, prompts, seeds, on_step=bar.update, **options | dict(batch_size=size)
                )
            except drawing.NotANumber as error:
                raise UserError(f"{name}: {error}") from error
            yield from zip(group, images, strict=True)


def save_sample(path: Path, image: Image.Image, text: dict) -> bool:
    """Writes an image; returns whether it is blank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png.save_png(path, image, text)
    return is_blank(image)


def recorded_settings(path: Path) -> str | None:
    """The settings digest in a PNG's text, None if there is no such file or it is not whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return getattr(image, "text", {}).get(SETTINGS_KEY)
    except (OSError, SyntaxError, ValueError):
        return None


def claim(plan: EvaluationPlan, files: list[str]) -> None:
    """Says first which files are going to be ours, so that a run cut off while writing can be repeated."""
    plan.output_dir.mkdir(parents=True, exist_ok=True)
    names = sorted({*own_files(plan.output_dir), *files, COMPARISON_FILE})
    record = dict(written_by=WRITTEN_BY, complete=False, drawn_from=plan.drawn_from, files=names)
    write_json(plan.output_dir / SAMPLES_FILE, record)


def finish(output_dir: Path, record: dict) -> None:
    """Removes an earlier run's images that this one does not have, then writes the whole samples.json."""
    for name in own_files(output_dir).difference(record["files"]):
        path = output_dir / name
        path.unlink(missing_ok=True)
        for folder in list(path.relative_to(output_dir).parents)[:-1]:
            if (output_dir / folder).is_dir() and not any((output_dir / folder).iterdir()):
                os.rmdir(output_dir / folder)
    write_json(output_dir / SAMPLES_FILE, record)


def describe(session: Session, entries: list[dict]) -> dict:
    """samples.json: all that it takes to make the images again, and all that scoring and report need to know."""
    plan = session.plan
    names = ("num_images", "num_drift_images", "seed", "identifier", "class_name", "dreambench", "command")
    return dict(
        written_by=WRITTEN_BY,
        complete=True,
        drawn_from=plan.drawn_from,
        samples_id=samples_id(entries),
        working_directory=str(Path.cwd()),  # of the paths here, which are as they were typed
        files=[*(entry["file"] for entry in entries), COMPARISON_FILE],
        prompts=[prompt._asdict() for prompt in plan.prompts],
        **{name: getattr(plan, name) for name in (*names, "batch_size", *PIXELS)},
        instance_data_dir=None if plan.instance_data_dir is None else str(plan.instance_data_dir),
        device=str(session.device),
        versions=drawing.versions(),
        models={model.name: session.models[model.name] for model in plan.models},
        images=entries,
    )


def write_comparison(plan: EvaluationPlan, samples: list[Sample], photos: dict[Path, Image.Image]) -> None:
    """comparison.png: the photos, then both models' images of the first prompt, and of the subject in other places."""
    first = plan.prompts[0].text
    shown = list(photos.values())[: plan.num_images]
    note = f"{len(shown)} of {len(photos)}" if len(shown) < len(photos) else ""
    cells, names = [comparison.square(photo) for photo in shown], [f"photo {n}" for n in range(1, len(shown) + 1)]
    rows = [comparison.Row("your photos", note, cells, names)] if shown else []
    folders = {BASELINE: plan.pretrained_model_name_or_path, FINETUNED: plan.finetuned_model_name_or_path}
    seeds = {sample.file: f"seed {sample.seed}" for sample in samples if sample.prompt == first}
    places = {sample.file: beyond(first, sample.prompt) for sample in samples if sample.role == PLACE}
    for captions in filter(None, (seeds, places)):
        for model, folder in folders.items():
            own = [sample.file for sample in samples if sample.model == model and sample.file in captions]
            images, above = [decode(plan.output_dir / file) for file in own], [captions[file] for file in own]
            rows.append(comparison.Row(label(model), folder.resolve().name, images, above * (model == BASELINE)))
    num_subject = sum(prompt.role == SUBJECT for prompt in plan.prompts)
    said = f"the first of {num_subject} prompts, " if num_subject > 1 else ""
    said += f"{plan.num_inference_steps} steps, guidance {plan.guidance_scale:g}, {plan.width} x {plan.height} pixels"
    said += f", steered away from: {plan.negative_prompt}" if plan.negative_prompt else ""
    png.save_png(
        plan.output_dir / COMPARISON_FILE, comparison.make_comparison(first, said, rows), png_text(plan, first)
    )


def beyond(first: str, prompt: str) -> str:
    """What a prompt says beyond the first one: 'on grass' of 'a photo of my cat on grass'."""
    return prompt.removeprefix(os.path.commonprefix([first, prompt])).strip() or prompt


def png_text(plan: EvaluationPlan, prompt: str, **image: object) -> dict:
    """What a PNG says about itself; `image` is what only one image has, such as its seed."""
    names = ("negative_prompt", "num_inference_steps", "guidance_scale")
    return dict(prompt=prompt, **image) | {name: getattr(plan, name) for name in names}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
