"""The second stage of an evaluation: from the images on disk to metrics.json."""

from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, of_file
from utils.evaluation import choice, encoders, intervals, metrics, scorer
from utils.evaluation.encoders import Encoder
from utils.evaluation.image_table import ImageTable
from utils.evaluation.metrics import METRICS, PAPER
from utils.evaluation.photos import load_photos
from utils.evaluation.plan import EvaluationPlan
from utils.evaluation.prompts import is_embedded
from utils.evaluation.samples import (
    BASELINE,
    FINETUNED,
    METRICS_FORMAT,
    METRICS_JSON,
    SAMPLES_FILE,
    WRITTEN_BY,
    model_folder,
    photos_named,
)
from utils.evaluation.sentences import say
from utils.files.json_files import write_json
from utils.models.folder import read_base
from utils.runtime.gpu import pick_device

ONE_IMAGE = "needs two images or more of a prompt: --num_images"
NO_IMAGES = "needs images of such prompts: --class_name, --drift_prompt, and --num_drift_images above 0"
EMBEDDED_CLIP = "tiny-clip"
LACKING = dict(clip=scorer.NO_CLIP, dino=scorer.NO_DINO)
PAPER_ENCODERS = dict(dino=("dino", "dino-vits16"), clip_i=("clip", "clip-vit-base-patch32"))
PAPER_ENCODERS["clip_t"] = PAPER_ENCODERS["clip_i"]


def score(plan: EvaluationPlan, samples: dict) -> dict:
    """Computes every metric that there is a model for; writes metrics.json, and returns it."""
    loaded, folder = load_encoders(plan, samples, pick_device()), photos_folder(plan, samples)
    table = ImageTable(samples, plan.output_dir, load_photos(folder, model_folder(samples, FINETUNED)), loaded)
    record = dict(
        written_by=WRITTEN_BY,
        format=METRICS_FORMAT,
        samples_id=samples["samples_id"],
        command=plan.command,
        encoders={name: encoder and encoder.description() for name, encoder in loaded.items()},
        photos=dict(folder=str(folder.absolute()) if folder is not None else None, **photo_metrics(table)),
        **measure(table),
    )
    record["paper"] = paper_columns(record, samples)
    try:
        table.kept.save()
        write_json(plan.output_dir / METRICS_JSON, record)
    except OSError as error:
        raise UserError(of_file(error, plan.output_dir, "make room there")) from error
    return record


def measure(table: ImageTable) -> dict:
    """metrics.json's part on the models: their numbers, and what is said of them."""
    samples, tested = table.samples, scorer.test(table)
    models, tuned = list(samples["models"]), [model for model in samples["models"] if model != BASELINE]
    found = {model: model_metrics(table, model) for model in models}
    folders = [model_folder(samples, model) for model in (BASELINE, FINETUNED)]
    return dict(
        scorer=dict(knows=tested.knows, encoder=tested.encoder or None, line=tested.line),
        says={model: say(table, tested, model) for model in tuned},
        models=found,
        changes={model: changes(table, model) for model in tuned},
        others={model: table.others[model] for model in models},
        places={model: table.places[model] for model in models},
        copies={model: table.copies[model][0] for model in tuned},
        choice=choice.describe(table, tested, *folders) if samples.get("candidates") else None,
    )


def photos_folder(plan: EvaluationPlan, samples: dict) -> Path | None:
    """The photos that are compared with; None if there never were any. Raises UserError if they are gone."""
    if plan.instance_data_dir is not None:
        return plan.instance_data_dir
    folder = photos_named(samples)
    if folder is not None and not folder.is_dir():
        where = "say where they are by --instance_data_dir, or draw again (--only generate)"
        raise UserError(f"the photos that {plan.output_dir / SAMPLES_FILE} names are not at {folder}: {where}")
    return folder


def load_encoders(plan: EvaluationPlan, samples: dict, device: torch.device) -> dict[str, Encoder | None]:
    """CLIP and DINO as given, else CLIP as the pipeline provides it; None for what is not there."""
    baseline = model_folder(samples, BASELINE)
    if plan.clip_model is None and not baseline.is_dir():
        where = "give --clip_model, or draw again (--only generate)"
        raise UserError(f"the baseline that {plan.output_dir / SAMPLES_FILE} names is not at {baseline}: {where}")
    clip_folder, clip = plan.clip_model or embedded_clip(baseline), None
    if clip_folder is not None:
        clip = encoders.load_clip(clip_folder, device)
    elif "safety_checker" in read_base(baseline).weights:
        clip = encoders.load_safety_checker(baseline, device)
    return dict(clip=clip, dino=encoders.load_dino(plan.dino_model, device) if plan.dino_model else None)


def embedded_clip(baseline: Path) -> Path | None:
    """The small CLIP model that lies beside the embedded pipeline, if `baseline` is that one."""
    clips = [path.parent / EMBEDDED_CLIP for path in (baseline, baseline.resolve()) if is_embedded(baseline)]
    return next((clip for clip in clips if (clip / "config.json").is_file()), None)


def model_metrics(table: ImageTable, model: str) -> dict:
    """Every metric of one model: its value, or null and the reason; and its images of one colour."""
    blank = [entry["file"] for entry in table.entries if entry["model"] == model and entry["file"] in table.blank]
    found: dict = dict(blank_images=blank)
    for key in METRICS:
        values = _values(table, model, key)
        found[key] = dict(value=None, reason=values) if isinstance(values, str) else dict(value=float(values.mean()))
    return found


def changes(table: ImageTable, model: str) -> dict:
    """Each mean's difference to the baseline's, image by image: the prompts and seeds are the same."""
    found = {}
    for key in METRICS:
        ours, theirs = _values(table, model, key), _values(table, BASELINE, key)
        if not isinstance(ours, str) and not isinstance(theirs, str) and ours.shape == theirs.shape:
            found[key] = intervals.describe_change(ours - theirs)
    return found


def _values(table: ImageTable, model: str, key: str) -> np.ndarray | str:
    """A metric's values [P,K] of a model's images, DIV's [P,1]; or why there are none."""
    metric, encoder = METRICS[key], "dino" if "dino" in key else "clip"
    if encoder not in table.images:
        return LACKING[encoder]
    rows = table.rows(model, metric.role)
    if not rows.size:
        return NO_IMAGES
    if metric.column == f"div_{encoder}":
        values = metrics.diversity(table.images[encoder][rows])
        return ONE_IMAGE if values is None else values[:, None]
    column = table.values.get(metric.column)
    if column is None:
        return scorer.NO_TEXT if metric.column == "clip_t" else scorer.NO_PHOTOS
    return column[rows]


def photo_metrics(table: ImageTable) -> dict:
    """The photos' files, and REAL by each encoder."""
    found: dict = dict(files=[dict(file=name, sha256=digest) for name, digest in table.photo_digests.items()])
    for encoder in ("clip", "dino"):
        lacking = scorer.NO_PHOTOS if encoder in table.images else LACKING[encoder]
        reason = scorer.TWO_PHOTOS if encoder in table.photos else lacking
        found[f"real_{encoder}"] = dict(value=None, reason=reason)
        if len(table.photos.get(encoder, "")) > 1:
            found[f"real_{encoder}"] = dict(value=float(metrics.real_similarity(table.photos[encoder]).mean()))
    return found


def paper_columns(record: dict, samples: dict) -> dict[str, dict[str, float]]:
    """The paper's numbers that may stand beside these: of the same encoders, by their folders, and its prompts."""
    if not samples.get("dreambench"):
        return {}
    same = {
        key
        for key, (kind, folder) in PAPER_ENCODERS.items()
        if record["encoders"][kind] and Path(record["encoders"][kind]["folder"]).name == folder
    }
    return {name: {key: value for key, value in row.items() if key in same} for name, row in PAPER.items() if same}
