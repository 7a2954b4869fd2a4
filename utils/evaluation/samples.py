"""samples.json: which images an evaluation consists of, where they lie, and what they were made with."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.evaluation.prompts import CLASS, OTHER, PLACE, SUBJECT
from utils.files.json_files import read_json_or_none

SAMPLES_FILE = "samples.json"
COMPARISON_FILE = "comparison.png"
METRICS_JSON, REPORT_FILE = "metrics.json", "report.html"
EMBEDDINGS_FILE = "embeddings.npz"
METRICS_FORMAT = 4  # of metrics.json
WRITTEN_BY = "evaluate.py"
BASELINE, FINETUNED = "baseline", "finetuned"
FLAT_STEMS = {BASELINE: "baseline", FINETUNED: "output"}
OWN_FILE_NAME = re.compile(
    r"(output|baseline)-[1-9]\d*\.png"
    r"|(images|candidates)/(baseline|(finetuned|checkpoint-\d+)(@[0-9.e+-]+)?)/[a-z0-9-]{1,49}/seed-\d+\.png|"
    + re.escape(COMPARISON_FILE)
)
OWN_MARKS = {  # what the first kilobyte of our other files holds
    METRICS_JSON: b'"written_by": "evaluate.py"',
    REPORT_FILE: b'<meta name="generator" content="evaluate.py">',
    EMBEDDINGS_FILE: b"written_by_evaluate",
}
SETTINGS_KEY = "settings_sha256"
PIXELS = (  # how an image is drawn, beside its model, prompt and seed
    *("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width"),
    *("mixed_precision", "safety_checker"),
)
SEEDS_APART = 1000  # of two prompts of a role


class Model(NamedTuple):
    """A model that draws: what it is called, whose UNet it has, and how far that is from the baseline's."""

    name: str
    checkpoint: str | None = None  # None: the result's own
    strength: float = 1.0


def plan_models(checkpoints: Sequence[str], strengths: Sequence[float]) -> list[Model]:
    """The baseline, the result, and both the result and the checkpoints at every strength, each once."""
    models = [Model(BASELINE), Model(FINETUNED)]
    for checkpoint in (None, *checkpoints):
        for strength in strengths:
            name = checkpoint or FINETUNED
            models.append(
                Model(name if strength == 1 else f"{name}@{repr(strength).removesuffix('.0')}", checkpoint, strength)
            )
    return list(dict.fromkeys(models))


def step_of(checkpoint: str) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.rpartition("-")[2])


class Sample(NamedTuple):
    """One image to be made, or made."""

    file: str
    model: str
    role: str
    prompt: str
    seed: int


def plan_samples(plan: Any, root: str = "images") -> list[Sample]:
    """All images of a plan, in the order in which they are made: model by model, prompt by prompt, seed by seed.

    The first prompt's images are the recipe's baseline-1.png, output-1.png and so on; all others are
    images/<model>/<prompt>/seed-<seed>.png. With another root than images, all are there. Other places have one image
    each, and the class as many as the subject; neither is drawn if there are to be none of other things. Prompts of a
    role have seeds of their own: what a seed adds to all of them would be in no interval.
    """
    flat, some = plan.prompts[0] if root == "images" else None, min(1, plan.num_drift_images)
    counts = {SUBJECT: plan.num_images, PLACE: some, CLASS: some * plan.num_images, OTHER: plan.num_drift_images}
    samples = []
    for model in (model.name for model in plan.models):
        seeds = dict.fromkeys(counts, plan.seed)
        for prompt in plan.prompts:
            for number in range(counts[prompt.role]):
                seed = seeds[prompt.role] + number
                file = f"{root}/{model}/{prompt.folder}/seed-{seed}.png"
                if prompt == flat and model in FLAT_STEMS:
                    file = f"{FLAT_STEMS[model]}-{number + 1}.png"
                samples.append(Sample(file, model, prompt.role, prompt.text, seed))
            seeds[prompt.role] += SEEDS_APART
    return samples


def settings_sha256(settings: dict) -> str:
    """Hex digest of an image's settings, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def samples_id(entries: list[dict]) -> str:
    """What metrics.json and the report name their images by: it changes when any image does."""
    return settings_sha256({entry["file"]: entry[SETTINGS_KEY] for entry in entries})[:16]


def own_files(output_dir: Path) -> set[str]:
    """Names of the pictures that an earlier evaluate.py wrote, by its samples.json. Raises UserError."""
    path = output_dir / SAMPLES_FILE
    if not os.path.lexists(path):
        return set()
    samples = read_json_or_none(path) or {}
    files = samples.get("files") if samples.get("written_by") == WRITTEN_BY else None
    if not isinstance(files, list):
        raise UserError(f"{path} exists and evaluate.py did not write it: move it, or give another --output_dir")
    return {name for name in files if isinstance(name, str) and OWN_FILE_NAME.fullmatch(name)}


def check_writable(output_dir: Path, names: list[str]) -> None:
    """Checks that none of the files `names` exists without being ours. Raises UserError."""
    own = own_files(output_dir)
    for name in names:
        path = output_dir / name
        if name not in own and os.path.lexists(path) and not (name in OWN_MARKS and _bears_mark(path)):
            raise UserError(f"{path} exists and evaluate.py did not write it: move it, or give --output_dir")


def trained_on(run: dict) -> dict[str, str]:
    """{SHA-256: prompt} of the photos of a run.json."""
    said = run.get("arguments", {}).get("instance_prompt")
    return {str(photo.get("sha256")): str(photo.get("prompt", said)) for photo in run.get("photos", [])}


def drawn_from(folder: Path, photos: Mapping[str, str]) -> dict[str, str]:
    """What samples.json knows a model by, whatever its weights: its folder, and the photos as trained_on has them."""
    return dict(folder=str(folder.resolve()), photos=settings_sha256(dict(photos)))


def check_same_model(output_dir: Path, ours: dict[str, str]) -> None:
    """Checks that what lies in `output_dir` was drawn from the same model, which may have moved. Raises UserError."""
    theirs = (read_json_or_none(output_dir / SAMPLES_FILE) or {}).get("drawn_from", ours)
    is_elsewhere = theirs["folder"] != ours["folder"]
    if theirs["photos"] != ours["photos"] or (is_elsewhere and os.path.lexists(theirs["folder"])):
        which = theirs["folder"] if is_elsewhere else "of other photos or prompts"
        raise UserError(
            f"--output_dir {output_dir} holds the page of another model ({which}): give this one a folder of its own, "
            f"such as {Path(ours['folder']).name}-result (RESULT_DIR under run.sh), or --overwrite_output_dir"
        )


def read_samples(output_dir: Path) -> dict:
    """samples.json of a complete `generate`. Raises UserError."""
    path = output_dir / SAMPLES_FILE
    own_files(output_dir)
    if not path.is_file():
        raise UserError(f"{path} is not there: run evaluate.py without --only first, or name its --output_dir")
    samples = json.loads(path.read_text(encoding="utf-8"))
    if not samples.get("complete") or "prompts" not in samples:
        raise UserError(f"{path} tells of an unfinished or older evaluation: run evaluate.py --only generate again")
    missing = [entry["file"] for entry in all_images(samples) if not (output_dir / entry["file"]).is_file()]
    if missing:
        raise UserError(f"{output_dir / missing[0]} is missing: run evaluate.py --only generate again")
    return samples


def recorded_path(samples: dict, path: str) -> Path:
    """Where a path of samples.json lies, from whichever folder this is called; as it was typed if from the same."""
    called_from = Path(samples.get("working_directory", ""))
    return Path(path) if called_from == Path.cwd() else called_from / path


def model_folder(samples: dict, model: str) -> Path:
    """Where a model lies that samples.json names."""
    return recorded_path(samples, samples["models"][model]["path"])


def photos_named(samples: dict) -> Path | None:
    """Where the photos lay when the images were drawn; None if none were named."""
    named = samples["instance_data_dir"]
    return None if named is None else recorded_path(samples, named)


def all_images(samples: dict) -> list[dict]:
    """The entries of samples.json, the candidates' among them."""
    return samples["images"] + (samples.get("candidates") or {}).get("images", [])


def read_metrics(output_dir: Path, samples: dict) -> dict | None:
    """metrics.json, or None if there is none for these images, or one of an earlier version."""
    metrics = read_json_or_none(output_dir / METRICS_JSON) or {}
    wanted = (METRICS_FORMAT, samples["samples_id"])
    return metrics if (metrics.get("format"), metrics.get("samples_id")) == wanted else None


def _bears_mark(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return OWN_MARKS[path.name] in file.read(1024)
