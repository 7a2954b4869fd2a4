"""The second stage of an evaluation: from the images on disk to metrics.json and a table with a line an image."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError
from utils.evaluation import candidates, encoders, metrics
from utils.evaluation.checks import ONE_PHOTO
from utils.evaluation.encoders import Encoder
from utils.evaluation.image_table import COLUMNS, NO_PHOTOS, ImageTable, as_csv, present
from utils.evaluation.photos import load_photos
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prompts import CLASS, OTHER, SUBJECT
from utils.evaluation.samples import (
    BASELINE,
    FINETUNED,
    METRICS_CSV,
    METRICS_FORMAT,
    METRICS_JSON,
    SAMPLES_FILE,
    WRITTEN_BY,
    model_folder,
    photos_named,
)
from utils.evaluation.verdict import judge
from utils.evaluation.visible import DRAWN_SHARE
from utils.files.atomic import replace_path
from utils.files.hashing import sha256_of
from utils.files.json_files import write_json
from utils.runtime.gpu import pick_device

NO_CLASS_TEXT = "needs a CLIP model with a text tower, and --class_name"
SAYS_MORE = "needs prompts that say nothing but the class: photos show nothing else"
ONE_IMAGE = "needs two images or more of a prompt: --num_images"
NO_CLASS_IMAGES = "needs images of the bare class: --class_name, and --num_drift_images above 0"
NO_OTHER_IMAGES = "needs images without the subject: --drift_prompt, and --num_drift_images above 0"
INTERVALS = "Student's t over prompts and seeds, crossed"
EMBEDDED_MODEL, EMBEDDED_CLIP = "tiny-stable-diffusion", "tiny-clip"


def score(plan: EvaluationPlan, samples: dict) -> dict:
    """Computes every metric that there is a model for; writes metrics.json and metrics.csv, and returns the former."""
    device = pick_device()
    clip, dino = load_encoders(plan, samples, device)
    folder = photos_folder(plan, samples)
    photos = load_photos(folder)
    make_table = partial(ImageTable, folder=plan.output_dir, photos=list(photos.values()), clip=clip, dino=dino)
    table = make_table(samples)
    record = dict(
        written_by=WRITTEN_BY,
        format=METRICS_FORMAT,
        samples_id=samples["samples_id"],
        command=plan.command,
        subject=dict(identifier=samples["identifier"], class_name=samples["class_name"]),
        encoders=dict(clip=clip and clip.description(), dino=dino and dino.description()),
        intervals=dict(confidence=metrics.CONFIDENCE, method=INTERVALS),
        photos=dict(
            folder=str(folder.absolute()) if folder is not None else None,
            files=[dict(file=p.name, sha256=sha256_of(p)) for p in photos],
            **photo_metrics(table),
        ),
    )
    record |= measure(table, samples)
    record["verdicts"] = {model: asdict(judge(record, model)) for model in record["changes"]}
    if quick := samples.get("candidates"):
        folders = [model_folder(samples, model) for model in (BASELINE, FINETUNED)]
        record["candidates"] = candidates.describe(record | measure(make_table(quick), quick), quick, *folders)
    try:
        csv = as_csv(table).encode()
        replace_path(plan.output_dir / METRICS_CSV, lambda part: part.write_bytes(csv), is_shared=True)
        write_json(plan.output_dir / METRICS_JSON, record)
    except OSError as error:
        raise UserError(f"--output_dir {plan.output_dir}: {error.strerror or error}: make room there") from error
    return record


def measure(table: ImageTable, samples: dict) -> dict:
    """metrics.json's part on the models: their metrics, changes against the baseline, and likeness by image."""
    models = {}
    for model in samples["models"]:
        models[model] = model_metrics(table, model)
        models[model]["blank_images"] = [entry["file"] for entry in table.blank if entry["model"] == model]
    count_like_subject(table, models, photo_metrics(table))
    names = [model for model in models if model != BASELINE]
    likeness = table.values["dino"] if table.values["dino"] is not None else table.values["clip_i"]
    others = table.values["clip_t"] if table.values["clip_t"] is not None else likeness
    image_values = {
        model: dict(
            likeness=_by_prompt(likeness, table.rows(model, SUBJECT)),
            others=_by_prompt(others, table.rows(model, OTHER)),
        )
        for model in names
    }
    return dict(models=models, changes={model: changes(table, model) for model in names}, image_values=image_values)


def _by_prompt(values: np.ndarray | None, rows: np.ndarray) -> list[list[float]] | None:
    """[P,K] of images' own values; None without any."""
    return values[rows].tolist() if values is not None and rows.size else None


def photos_folder(plan: EvaluationPlan, samples: dict) -> Path | None:
    """The photos that are compared with; None if there never were any. Raises UserError if they are gone."""
    if plan.instance_data_dir is not None:
        return plan.instance_data_dir
    folder = photos_named(samples)
    if folder is not None and not folder.is_dir():
        where = "say where they are by --instance_data_dir, or draw again (--only generate)"
        raise UserError(f"the photos that {plan.output_dir / SAMPLES_FILE} names are not at {folder}: {where}")
    return folder


def load_encoders(plan: EvaluationPlan, samples: dict, device: torch.device) -> tuple[Encoder | None, Encoder | None]:
    """(CLIP, DINO) as given, else CLIP as the pipeline provides it; None for what is not there."""
    baseline = model_folder(samples, BASELINE)
    if plan.clip_model is None and not baseline.is_dir():
        where = "give --clip_model, or draw again (--only generate)"
        raise UserError(f"the baseline that {plan.output_dir / SAMPLES_FILE} names is not at {baseline}: {where}")
    clip_folder, clip = plan.clip_model or embedded_clip(baseline), None
    if clip_folder is not None:
        clip = encoders.load_clip(clip_folder, device)
    elif (baseline / "safety_checker" / "config.json").is_file():
        clip = encoders.load_safety_checker(baseline, device)
    return clip, encoders.load_dino(plan.dino_model, device) if plan.dino_model else None


def embedded_clip(baseline: Path) -> Path | None:
    """The small CLIP model that lies beside the embedded pipeline, if `baseline` is that one."""
    for path in (baseline, baseline.resolve()):
        clip = path.parent / EMBEDDED_CLIP
        if path.name == EMBEDDED_MODEL and (clip / "config.json").is_file():
            return clip
    return None


def model_metrics(table: ImageTable, model: str) -> dict:
    """Every metric of one model: value and interval, or null and the reason."""
    subject, of_class, other = (table.rows(model, role) for role in (SUBJECT, CLASS, OTHER))
    result = {name: _mean(table, name, subject) for name in COLUMNS}
    for encoder in ("clip", "dino"):
        result[f"copy_{encoder}_max"] = _largest(table, f"copy_{encoder}", subject)
        _count_copies(table, result[f"copy_{encoder}"], encoder, subject)
        result[f"div_{encoder}"] = _diversity(table, encoder, subject)
    result["pres_clip"] = _mean(table, "clip_i", of_class, NO_CLASS_IMAGES)
    result["pres_dino"] = _mean(table, "dino", of_class, NO_CLASS_IMAGES)
    result["clip_t_class"] = _mean(table, "clip_t", of_class, NO_CLASS_IMAGES)
    result["clip_t_other"] = _mean(table, "clip_t", other, NO_OTHER_IMAGES, OTHER)
    result["clip_i_other"] = _mean(table, "clip_i", other, NO_OTHER_IMAGES, OTHER)
    result["dino_other"] = _mean(table, "dino", other, NO_OTHER_IMAGES, OTHER)
    return result


def changes(table: ImageTable, model: str) -> dict:
    """Each mean's difference to the baseline's, image by image: the prompts and seeds are the same."""
    result = {}
    pairs = [(name, name, SUBJECT) for name in COLUMNS]
    pairs += [("pres_clip", "clip_i", CLASS), ("pres_dino", "dino", CLASS)]
    pairs += [("clip_t_class", "clip_t", CLASS), ("clip_t_other", "clip_t", OTHER)]
    pairs += [("clip_i_other", "clip_i", OTHER), ("dino_other", "dino", OTHER)]
    for name, column, role in pairs:
        ours, theirs, values = table.rows(model, role), table.rows(BASELINE, role), table.values[column]
        if values is not None and ours.size and ours.shape == theirs.shape:
            result[name] = _mean_value(values[ours] - values[theirs], role)
            if role == OTHER:
                result[name]["prompts"] = _prompt_changes(table, ours, values[ours] - values[theirs])
    for encoder in ("clip", "dino"):
        of_model, of_baseline = (_distances(table, encoder, table.rows(name, SUBJECT)) for name in (model, BASELINE))
        if of_model is not None and of_baseline is not None and of_model.shape == of_baseline.shape:
            result[f"div_{encoder}"] = _diversity_change(of_model, of_baseline)
    return result


def _mean_value(values: np.ndarray, role: str) -> dict:
    """Mean and interval of values [P,K]; of other things, which are a few examples only, for other seeds of these."""
    interval = metrics.seeds_interval(values) if role == OTHER else metrics.mean_interval(values)
    return dict(value=float(values.mean()), interval=interval)


def _prompt_changes(table: ImageTable, rows: np.ndarray, differences: np.ndarray) -> list[dict]:
    """Of each prompt by itself; the intervals hold all together."""
    return [
        dict(
            prompt=table.entries[row[0]]["prompt"],
            value=float(values.mean()),
            interval=metrics.student_interval(values, len(rows)),
        )
        for row, values in zip(rows, differences, strict=True)
    ]


def count_like_subject(table: ImageTable, models: dict, photos: dict) -> None:
    """Adds to each model which images of other things are as like the photos as a drawn subject is."""
    for encoder, column in (("clip", "clip_i"), ("dino", "dino")):
        real, before = photos[f"real_{encoder}"]["value"], models[BASELINE][column]["value"]
        if real is None or before is None:
            continue
        for model in models:
            rows = table.rows(model, OTHER).ravel()
            like = rows[present(table.values[column])[rows] >= before + DRAWN_SHARE * (real - before)]
            files = [table.entries[row]["file"] for row in like]
            models[model][f"{column}_other"].update(like_subject=files, num_images=rows.size)


def _distances(table: ImageTable, encoder: str, rows: np.ndarray) -> np.ndarray | None:
    """[P,K,K] between the images of each prompt; None if there is nothing to compare."""
    images = table.images[encoder]
    return None if images is None or rows.shape[1] < 2 else metrics.pair_distances(images[rows])


def _diversity_change(ours: np.ndarray, theirs: np.ndarray) -> dict:
    added, removed = metrics.pseudo_values(ours), metrics.pseudo_values(theirs)
    interval = None if added is None or removed is None else metrics.mean_interval(added - removed)
    return dict(value=present(metrics.diversity(ours)) - present(metrics.diversity(theirs)), interval=interval)


def photo_metrics(table: ImageTable) -> dict:
    """REAL, and COPY among the photos themselves, by each encoder."""
    result = {}
    for encoder, rows in table.photos.items():
        for name, function in (("real", metrics.real_similarity), ("nearest", metrics.real_nearest_similarity)):
            value = function(rows) if rows is not None else None
            missing = table.reason(encoder) if rows is None else ONE_PHOTO
            result[f"{name}_{encoder}"] = dict(value=value) if value is not None else _null(missing)
        if rows is not None and result[f"real_{encoder}"]["value"] is not None:
            result[f"real_{encoder}"]["interval"] = metrics.real_interval(rows)
    values, reason = table.photos["clip"], NO_PHOTOS if table.class_row is not None else NO_CLASS_TEXT
    if table.class_row is None or values is None:
        result["clip_t_class"] = _null(reason)
    else:
        result["clip_t_class"] = dict(value=float((values @ table.class_row).mean()))
    result["clip_t"] = result["clip_t_class"] if table.names_only_class else _null(SAYS_MORE)
    return result


def _mean(table: ImageTable, column: str, rows: np.ndarray, no_images: str = "", role: str = "") -> dict:
    if reason := table.missing(column, rows, no_images):
        return _null(reason)
    return _mean_value(present(table.values[column])[rows], role)


def _count_copies(table: ImageTable, copy: dict, encoder: str, rows: np.ndarray) -> None:
    """Adds how many of the images are nearer to a photo than that photo's nearest other photo is."""
    photos = table.photos[encoder]
    if copy["value"] is None or photos is None:
        return
    above = metrics.nearer_than_photos(present(table.images[encoder])[rows.ravel()], photos)
    if above is not None:
        copy.update(num_above_photos=int(above.sum()), num_images=above.size)


def _largest(table: ImageTable, column: str, rows: np.ndarray) -> dict:
    if reason := table.missing(column, rows, ""):
        return _null(reason)
    largest = rows.flat[int(present(table.values[column])[rows].argmax())]
    return dict(value=float(present(table.values[column])[largest]), file=table.entries[largest]["file"])


def _diversity(table: ImageTable, encoder: str, rows: np.ndarray) -> dict:
    if table.images[encoder] is None:
        return _null(table.reasons[encoder])
    if rows.shape[1] < 2:
        return _null(ONE_IMAGE)
    distances = present(_distances(table, encoder, rows))
    interval = metrics.diversity_interval(distances)
    return dict(value=metrics.diversity(distances), interval=interval)


def _null(reason: str) -> dict:
    return dict(value=None, reason=reason)
