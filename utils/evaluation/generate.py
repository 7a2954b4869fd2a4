"""The first stage of an evaluation: images of every model, prompt and seed, and the comparison sheet."""

import functools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image

from utils.errors import UserError, of_file
from utils.evaluation import comparison
from utils.evaluation.candidates import FOLDER as CANDIDATES
from utils.evaluation.hashes import model_folders
from utils.evaluation.photos import load_photos
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prompts import CLASS, SUBJECT
from utils.evaluation.samples import (
    BASELINE,
    COMPARISON_FILE,
    FINETUNED,
    SAMPLES_FILE,
    SETTINGS_KEY,
    WRITTEN_BY,
    Sample,
    SamplingSettings,
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
BATCH_SIZE = 9  # of several prompts at once: for the embedded model a sixth faster than 3, and one graph on a GPU


def generate(plan: EvaluationPlan, hashing: Future) -> None:
    """Makes the images that are not there yet, model by model; writes samples.json and comparison.png.

    `hashing` will be what hash_models returns.
    """
    mark("imported")
    gpu.say_problems_of_gpu()
    device = gpu.pick_device()
    mixed_precision = pick_precision(plan.mixed_precision, device)
    settings = SamplingSettings.read({**plan._asdict(), "mixed_precision": mixed_precision})
    photos = load_photos(plan.instance_data_dir)
    if plan.instance_data_dir is not None and not photos:
        warn(f"--instance_data_dir {plan.instance_data_dir} holds no photo: {COMPARISON_FILE} shows none")
    pipelines = load_pipelines(plan, settings, device)
    mark("models loaded")
    prompts = plan.prompts
    for text in [*(prompt.text for prompt in prompts), plan.negative_prompt or ""]:
        if unseen := drawing.truncated_text(pipelines[BASELINE], text):
            warn(f'the prompt is too long for the text encoder, which does not see its end: "{unseen}"')

    quick = plan.candidates
    samples = plan_samples(prompts, plan.models, *plan.counts)
    quick_samples = plan_samples(quick.prompts, quick.models, *quick.counts, root=CANDIDATES) if quick else []
    turns = WeightsInTurn(plan, pipelines)
    models = describe_models(plan, pipelines, hashing.result())
    mark("models hashed")
    try:
        claim(plan.output_dir, [sample.file for sample in samples + quick_samples])
        entries = sample_all(plan, settings, samples, turns, models)
        write_comparison(plan, settings, samples, photos)
        mark("final images drawn")
        record = describe(plan, settings, entries, models, device)
        if quick:
            add_candidates(record, draw_candidates(quick, settings, quick_samples, turns, models))
        mark("sampled")
        finish(plan.output_dir, record | dict(seconds_after_start=process.marks))
    except OSError as error:
        raise UserError(of_file(error, plan.output_dir, "make room there, or name another --output_dir")) from error


def draw_candidates(
    plan: EvaluationPlan, settings: SamplingSettings, samples: list[Sample], turns: WeightsInTurn, models: dict
) -> dict:
    """The candidates' images, in fewer steps of a solver that needs fewer; returns their samples.json."""
    settings = settings._replace(num_inference_steps=plan.num_inference_steps)
    for pipeline in turns.pipelines.values():  # these are the last images
        pipeline.scheduler = loading.quick_scheduler(pipeline.scheduler)
    solver = type(turns.pipelines[BASELINE].scheduler).__name__
    quick = {
        name: model | dict(scheduler=solver, sha256=model["sha256"] | dict(solver=solver))
        for name, model in models.items()
    }
    entries = sample_all(plan, settings, samples, turns, quick, mixes_prompts=True)
    return describe(plan, settings, entries, quick, turns.pipelines[BASELINE].device)


def pick_precision(asked: str | None, device: torch.device) -> str:
    """The precision that was asked for, or the device's usual one; what the device is bad at is warned of."""
    mixed_precision = asked or ("fp16" if device.type == "cuda" else "no")
    if mixed_precision == "bf16" and (old_gpu := gpu.gpu_without_bf16()):
        warn(f"{old_gpu} has no bf16 arithmetic: fp16 in its place")
        mixed_precision = "fp16"
    if device.type == "cpu" and mixed_precision == "fp16":
        warn("--mixed_precision fp16 on a CPU is many times slower than `no`")
    return mixed_precision


def load_pipelines(plan: EvaluationPlan, settings: SamplingSettings, device: torch.device) -> dict:
    """Baseline and fine-tuned; what is the same in both is loaded once. All others are the fine-tuned with other
    weights in its UNet (WeightsInTurn)."""
    weight_dtype = WEIGHT_DTYPES[settings.mixed_precision]
    load = functools.partial(
        loading.load_pipeline, weight_dtype=weight_dtype, device=device, safety_checker=settings.safety_checker
    )
    baseline = load(read_base(plan.baseline_folder))
    tuned = read_base(plan.finetuned_model_name_or_path)
    finetuned = load(tuned, shared=loading.common_components(baseline, tuned.folder))
    if {"unet", "text_encoder", "vae"} <= set(loading.shared_components(finetuned, baseline)):
        warn("the fine-tuned weights equal the baseline's: both rows will be the same")
    return {BASELINE: baseline, FINETUNED: finetuned}


def describe_models(plan: EvaluationPlan, pipelines: dict, hashes: dict) -> dict[str, dict]:
    """Path, scheduler and SHA-256 of the files of every model."""
    models = {}
    for model, (folder, unet) in model_folders(plan).items():
        scheduler = pipelines[BASELINE if model.name == BASELINE else FINETUNED].scheduler
        path = str(unet / "unet" if model.checkpoint else folder)
        models[model.name] = dict(path=path, scheduler=type(scheduler).__name__, sha256=hashes[model.name])
        if model.strength != 1:
            models[model.name] |= dict(strength=model.strength)
    models[FINETUNED]["shared_with_baseline"] = loading.shared_components(pipelines[FINETUNED], pipelines[BASELINE])
    return models


def image_settings(settings: SamplingSettings, sample: Sample, model: dict, device_type: str) -> dict:
    """All that decides an image's pixels: an image with equal settings need not be made again."""
    made_with = dict(prompt=sample.prompt, seed=sample.seed, model=model["sha256"], device=device_type)
    return settings.of_pixels() | made_with | dict(versions=drawing.versions())


def sample_all(
    plan: EvaluationPlan,
    settings: SamplingSettings,
    samples: list[Sample],
    turns: WeightsInTurn,
    models: dict,
    mixes_prompts: bool = False,
) -> list[dict]:
    """Makes and writes the images whose settings differ from what lies there; returns samples.json's entries.

    Args:
        mixes_prompts: whether a batch may hold images of several prompts.
    """
    device_type = turns.pipelines[BASELINE].device.type
    digests = {s.file: settings_sha256(image_settings(settings, s, models[s.model], device_type)) for s in samples}
    wanted = [s for s in samples if recorded_settings(plan.output_dir / s.file) != digests[s.file]]
    if len(wanted) < len(samples):
        print(f"{len(samples) - len(wanted)} of {len(samples)} images are there already, with the same settings")
    start, writing = time.monotonic(), []
    with ThreadPoolExecutor(NUM_WRITERS) as writers:  # compressing PNGs takes long, and the GPU need not wait for it
        for group, images in sample_groups(settings, wanted, turns, mixes_prompts):
            for sample, image in zip(group, images, strict=True):
                text = settings.png_text(sample.prompt, seed=sample.seed, model=models[sample.model]["path"])
                text[SETTINGS_KEY] = digests[sample.file]
                writing.append((sample.file, writers.submit(save_sample, plan.output_dir / sample.file, image, text)))
            for _, future in writing:
                if future.done():
                    future.result()  # raises: if the disk is full, the rest need not be sampled
    blank = [file for file, future in writing if future.result()]
    warn_of_blank_images(blank, settings.safety_checker)
    if wanted:
        seconds = time.monotonic() - start
        rate = f"{len(wanted) / seconds:.2f} images per second ({device_type})"
        print(f"{len(wanted)} images in {seconds:.1f} s: {rate}")
    return [sample._asdict() | {SETTINGS_KEY: digests[sample.file]} for sample in samples]


def sample_groups(
    settings: SamplingSettings, wanted: list[Sample], turns: WeightsInTurn, mixes_prompts: bool
) -> Iterator[tuple[list[Sample], list[Image.Image]]]:
    """Yields (samples, images) for every model, and every prompt with several seeds or the role of those with one,
    behind one progress bar."""
    groups = [list(group) for _, group in groupby(wanted, lambda sample: _group(sample, mixes_prompts))]
    batches = [settings.batch_size or (BATCH_SIZE if len({s.prompt for s in group}) > 1 else None) for group in groups]
    pipelines = turns.pipelines
    num_steps = sum(
        drawing.num_denoising_steps(
            pipelines[BASELINE if group[0].model == BASELINE else FINETUNED],
            len(group),
            settings.num_inference_steps,
            batch_size,
        )
        for group, batch_size in zip(groups, batches, strict=True)
    )
    options = settings.of_sampling()
    options["embeddings"] = drawing.PromptEmbeddings(settings.negative_prompt, settings.guidance_scale)
    options["captured"] = CapturedUNet(warn) if pipelines[BASELINE].device.type == "cuda" else None
    with progress_bar("drawing", num_steps, "step", shown=bool(groups)) as bar:
        for number, group in enumerate(groups):
            name, seeds, prompts = group[0].model, [s.seed for s in group], [s.prompt for s in group]
            bar.set_description(name.replace(FINETUNED, "fine-tuned"))
            pipeline = turns.pipeline(name, [later[0].model for later in groups[number + 1 :]])
            options |= dict(batch_size=batches[number])
            try:
                images = drawing.sample(pipeline, prompts, seeds, on_step=bar.update, **options)
            except drawing.NotANumber as error:
                raise UserError(f"{name}: {error}") from error
            yield group, images


def _group(sample: Sample, mixes_prompts: bool) -> tuple[str, ...]:
    """Images with the same are drawn together."""
    if mixes_prompts:
        return (sample.model,)
    return sample.model, sample.prompt if sample.role in (SUBJECT, CLASS) else sample.role


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


def claim(output_dir: Path, files: list[str]) -> None:
    """Says first which files are going to be ours, so that a run cut off while writing can be repeated."""
    output_dir.mkdir(parents=True, exist_ok=True)
    before = own_files(output_dir)
    names = sorted({*before, *files, COMPARISON_FILE})
    write_json(output_dir / SAMPLES_FILE, dict(written_by=WRITTEN_BY, complete=False, files=names))


def finish(output_dir: Path, record: dict) -> None:
    """Removes an earlier run's images that this one does not have, then writes the whole samples.json."""
    for name in own_files(output_dir).difference(record["files"]):
        path = output_dir / name
        path.unlink(missing_ok=True)
        for folder in list(path.relative_to(output_dir).parents)[:-1]:
            if (output_dir / folder).is_dir() and not any((output_dir / folder).iterdir()):
                os.rmdir(output_dir / folder)
    write_json(output_dir / SAMPLES_FILE, record)


def describe(
    plan: EvaluationPlan,
    settings: SamplingSettings,
    entries: list[dict],
    models: dict,
    device: torch.device,
) -> dict:
    """samples.json: all that it takes to make the images again, and all that scoring and report need to know."""
    photos = plan.instance_data_dir
    return dict(
        written_by=WRITTEN_BY,
        complete=True,
        samples_id=samples_id(entries),
        command=plan.command,
        working_directory=str(Path.cwd()),  # of the paths here, which are as they were typed
        files=[*(entry["file"] for entry in entries), COMPARISON_FILE],
        prompts=[dict(text=prompt.text, role=prompt.role) for prompt in plan.prompts],
        num_images=plan.num_images,
        num_drift_images=plan.num_drift_images,
        seed=plan.seed,
        **settings._asdict(),
        identifier=plan.identifier,
        class_name=plan.class_name,
        dreambench=plan.dreambench,
        guessed=plan.guessed,
        instance_data_dir=str(photos) if photos is not None else None,
        device=str(device),
        versions=drawing.versions(),
        models={model.name: models[model.name] for model in plan.models},
        images=entries,
    )


def add_candidates(record: dict, candidates: dict) -> None:
    """Puts the candidates' samples into samples.json's record."""
    kept = ("prompts", "num_inference_steps", "identifier", "class_name", "models", "images")
    record["candidates"] = {name: candidates[name] for name in kept}
    record["files"] += [entry["file"] for entry in candidates["images"]]
    record["samples_id"] = samples_id(record["images"] + candidates["images"])


def write_comparison(
    plan: EvaluationPlan, settings: SamplingSettings, samples: list[Sample], photos: dict[Path, Image.Image]
) -> None:
    """comparison.png: the photos, then the baseline's and the fine-tuned images of the first prompt."""
    first = plan.prompts[0].text
    num_subject = sum(prompt.role == SUBJECT for prompt in plan.prompts)
    rows = []
    for model, label, folder in (
        (BASELINE, "baseline", plan.baseline_folder),
        (FINETUNED, "fine-tuned", plan.finetuned_model_name_or_path),
    ):
        files = [
            plan.output_dir / sample.file for sample in samples if (sample.model, sample.prompt) == (model, first)
        ]
        rows.append(comparison.Row(label, folder.resolve().name, [open_image(file) for file in files]))
    seeds = [plan.seed + number for number in range(plan.num_images)]
    subtitle = f"the first of {num_subject} prompts, " if num_subject > 1 else ""
    subtitle += settings.in_words()
    squares = [(path.name, comparison.square(photo)) for path, photo in photos.items()]
    sheet = comparison.make_comparison(first, subtitle, seeds, rows, squares or None)
    png.save_png(plan.output_dir / COMPARISON_FILE, sheet, settings.png_text(first))


def open_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of_blank_images(names: list[str], safety_checker: bool) -> None:
    cause = "the safety checker blacked it out, or " if safety_checker else ""
    cause += "training has spoilt the model: try an earlier checkpoint"
    if names:
        warn(f"one colour only: {', '.join(names)} ({cause})")
