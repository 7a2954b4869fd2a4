"""What a result says of itself: README.md beside a pipeline, and the header of a file of weights (modelspec.*).

Both say what run.json and evaluate.py know, without local paths, names of photos and the command line.
"""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from utils import PROGRAM
from utils.files.atomic import replace_path
from utils.files.ownership import EXPORT_METADATA, prompts_of, run_of
from utils.models.folder import MODEL_INDEX, BaseModel

CARD_FILE = "README.md"
PICTURE_FILE = "comparison.png"
MARK = "<!-- Written by train_dreambooth_colossalai. Take this line away, and your changes to this file stay. -->"
TAGS = ["text-to-image", "dreambooth", "diffusers", "diffusers-training", "stable-diffusion"]
TAGS += ["stable-diffusion-diffusers"]
HUB_NAMES = {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
V1_LICENSE = "creativeml-openrail-m"
SCORES = {  # key of metrics.json: name, and what it says
    "dino": ("DINO", "likeness to the photos"),
    "clip_i": ("CLIP-I", "likeness to the photos"),
    "clip_t": ("CLIP-T", "fidelity to the prompt"),
    "clip_t_other": ("CLIP-T, other things", "fidelity to prompts without the subject"),
    "div_clip": ("DIV", "variety between seeds"),
}
# Of run.json: of this machine alone.
LOCAL_ARGUMENTS = ["config", "instance_data_dir", "class_data_dir", "concepts_list", "output_dir", "logging_dir"]
LOCAL_ARGUMENTS += ["export_single_file", "resume_from_checkpoint"]
# A path that is a text of its own: absolute, of a home, relative by dots or of several folders, or with a scheme.
PATH = re.compile(r"~|(\$[\w{}]+|\.\.?|[A-Za-z]:)?[/\\]|(?!https?:)\w+://|\w[\w.-]*\\\w|[\w.-]+/[\w.-]+/[^\s]+$")
FOLDERS_IN_A_SENTENCE = re.compile(r"(file://|(?<![\w:/.\\<]))(~|\$[\w{}]+|\.\.?|[A-Za-z]:)?[/\\]([^\s/\\\"']+[/\\])+")
MOST_BYTES = 1 << 20  # of a base's card
V1_PARAMETERS = 859_520_964  # of its UNet
CHECKPOINT_STEP, STRENGTH = "checkpoint_step", "strength"  # in the run.json of an export


def step_and_strength(run: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """Of which checkpoint and how strong the weights are that a run.json stands beside; None: as the run made them."""
    strength = run.get(STRENGTH, 1)
    return run.get(CHECKPOINT_STEP), None if strength == 1 else strength


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of what was done: steps, ranks, optimizer, and flags of training that had no default value."""
    arguments, defaults, used = (run.get(name, {}) for name in ("arguments", "defaults", "used"))
    effective = {**arguments, **{name: value for name, value in used.items() if name in defaults}}
    given = {name: effective.get(name) for name, default in defaults.items() if effective.get(name) != default}
    spread = {name: run[name] for name in ("num_ranks", "samples_per_step", "optimizer") if name in run}
    return dict(max_train_steps=arguments.get("max_train_steps")) | spread | given


def changes_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run.json's "changes", what --allow_changes let change after which step, without names of photos and files."""
    found = [each for each in run.get("changes") or [] if isinstance(each, Mapping)]
    phrases = [[str(phrase) for phrase in each.get("changed") or []] for each in found]
    kept = [[words if words.startswith("--") else words.split(":")[0] for words in each] for each in phrases]
    return [
        dict(step=each.get("step"), changed=list(dict.fromkeys(words)))
        for each, words in zip(found, kept, strict=True)
    ]


def file_metadata(model: BaseModel, run: Mapping[str, Any], *, title: str, is_lora: bool = False) -> dict[str, str]:
    """The header's metadata for a file of weights by Stability AI's ModelSpec 1.0.1, every value a string, and the
    run's settings.

    Args:
        run: a run.json, whole or of a run that has not ended; empty: the file is of a base.
        title: what UIs show as the model's name.
    """
    height, width = model.image_size
    layout = "kohya-ss/sd-scripts" if is_lora else "Stability-AI/generative-models"
    step, strength = step_and_strength(run)
    said = f", {step} steps" if step is not None else ""
    said += f", at strength {strength:g}" if strength is not None else ""
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora" if is_lora else "stable-diffusion-v1",
        "implementation": f"https://github.com/{layout}",
        "title": title,
        "resolution": f"{width}x{height}",
        "prediction_type": "v" if model.prediction_type == "v_prediction" else "epsilon",
        "date": run.get("started_at"),
        "trigger_phrase": ", ".join(prompts_of(run)),
        "description": f"DreamBooth fine-tuning of Stable Diffusion v1 with {PROGRAM}{said}" if run else None,
    }
    modelspec = {f"modelspec.{key}": str(value) for key, value in found.items() if value}
    settings = dict(settings=json.dumps(settings_of(run), ensure_ascii=False)) if run else {}
    if changes := changes_of(run):
        settings["changes"] = json.dumps(changes, ensure_ascii=False)
    return {**EXPORT_METADATA, **modelspec, **settings}


def write_card(model: BaseModel, *, metrics: Mapping[str, Any] | None = None, picture: Path | None = None) -> bool:
    """Writes the card of a pipeline that training wrote, unless there is a README.md of someone else's.

    Args:
        metrics: evaluate.py's metrics.json; None: there are no scores yet.
        picture: evaluate.py's comparison.png, which is copied into the folder; None: an earlier one is removed.

    Returns whether it was written.
    """
    folder, run = model.folder, run_of(model.folder)
    card, shown = folder / CARD_FILE, folder / PICTURE_FILE
    try:
        earlier = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        earlier = MARK
    except (OSError, UnicodeDecodeError):  # nothing that we wrote
        return False
    if run.get("program") != PROGRAM or not (folder / MODEL_INDEX).is_file() or MARK not in earlier:
        return False
    text = card_text(model, run, metrics, has_picture=picture is not None).encode("utf-8", errors="backslashreplace")
    if picture is not None:
        replace_path(shown, lambda part: shutil.copyfile(picture, part), is_shared=True)
    elif f"({PICTURE_FILE})" in earlier:
        shown.unlink(missing_ok=True)
    replace_path(card, lambda part: part.write_bytes(text), is_shared=True)
    return True


def card_text(
    model: BaseModel, run: Mapping[str, Any], metrics: Mapping[str, Any] | None, *, has_picture: bool
) -> str:
    """The card of a pipeline folder as Markdown."""
    photos = Counter(prompts_of(run))
    prompts = [prompt for prompt, _ in photos.most_common()] or ["a photo"]  # captions come last
    spoken = ", ".join(f'"{_escaped(prompt)}"' for prompt in prompts[:4])
    base, license_name = _base_of(run), _license(model, run)
    front = ModelCardData(
        base_model=base if base and "/" in base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        inference=True,
        instance_prompt=prompts[0],
        license=license_name,
        tags=TAGS,
    )
    said_license = f": {license_name}" if license_name else ""
    sections = [
        f"---\n{front.to_yaml()}\n---",
        MARK,
        f"# DreamBooth: {_escaped(prompts[0])}",
        f"Stable Diffusion v1 ({_escaped(base) if base else 'a local base'}), fine-tuned with DreamBooth on "
        f"{photos.total()} photo{'' if photos.total() == 1 else 's'}. Name the subject as in {spoken}.",
        f"![Photos, the base's and this model's pictures, one seed a column]({PICTURE_FILE})" if has_picture else "",
        "## Load it\n```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("PATH_OR_NAME", torch_dtype=torch.float16).to("cuda")\n'
        f"pipeline({prompts[0]!r}).images[0].save('picture.png')\n```",
        _scores(metrics) if metrics else "",
        _settings(model, run),
        f"## Licence\nThe base's licence goes for what is made from it{said_license}. A person or a brand that the "
        f"photos show has rights of their own.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _base_of(run: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub if it is known, else its folder's or file's own name."""
    named = run.get("arguments", {}).get("pretrained_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    cached = re.search(r"models--([^/]+?)--([^/]+)", named)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if named.count("/") == 1 and not named.startswith((".", "/", "~")) and not named.startswith("model/"):
        return named
    name = PurePath(named).name
    return HUB_NAMES.get(name, name)


def _license(model: BaseModel, run: Mapping[str, Any]) -> str | None:
    """What the base's own card says, a plain word, else Stable Diffusion v1's if the UNet has its size."""
    card = Path(str(run.get("base_model", {}).get("folder")), CARD_FILE)
    if card.is_file() and card.stat().st_size < MOST_BYTES:
        with contextlib.suppress(Exception):  # somebody's own file, damaged in whatever way
            found = (metadata_load(card) or {}).get("license")
            if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found):
                return found
    return V1_LICENSE if model.num_parameters == V1_PARAMETERS else None


def _escaped(text: str) -> str:
    """A user's words in Markdown: none of them is markup, and all are in one line."""
    return re.sub(r"([\\`*_\[\]<>#|&~$])", r"\\\1", " ".join(text.split()))


def _scores(metrics: Mapping[str, Any]) -> str:
    both = [metrics.get("models", {}).get(name) or {} for name in ("baseline", "finetuned")]
    rows = []
    for key, (name, meaning) in SCORES.items():
        values = [(model.get(key) or {}).get("value") for model in both]
        if any(isinstance(value, float) for value in values):
            cells = [f"{value:.3f}" if isinstance(value, float) else "-" for value in values]
            rows.append(f"| {name} | {' | '.join(cells)} | {meaning} |")
    head = "## Scores\n| | base | this model | |\n|---|---|---|---|\n"
    encoders = [_escaped(each["name"]) for each in metrics.get("encoders", {}).values() if each]
    scorer = (metrics.get("scorer") or {}).get("line", "")
    by = f"\n\nBy {' and '.join(encoders)}. {scorer}".rstrip() if encoders else ""
    return head + "\n".join(rows) + by if rows else ""


def _settings(model: BaseModel, run: Mapping[str, Any]) -> str:
    settings, (step, strength) = settings_of(run), step_and_strength(run)
    defaults = {k: value for k, value in run.get("defaults", {}).items() if k not in settings and value is not None}
    if step is not None:
        settings["max_train_steps"] = f"{step} of {settings['max_train_steps']}"
    if strength is not None:
        settings["strength"] = f"{strength:g} times the way from the base to the trained weights"
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    settings |= {"prediction type": model.prediction_type, "device": run.get("device"), "versions": versions}
    said = [(name, value) for name, value in settings.items() if re.fullmatch(r"[\w ]+", name)]
    lines = [f"| {name} | {_escaped(str(value))} |" for name, value in said if value not in (None, "")]
    others = ", ".join(f"{name} {value}" for name, value in defaults.items()).replace("`", "'")
    head = "## Training\nWith ColossalAI's TorchDDP plugin and fp32 master weights.\n\n| | |\n|---|---|\n"
    changed = ((each["step"], _escaped("; ".join(each["changed"]))) for each in changes_of(run))
    changes = "".join(f"\n\nChanged after step {step}: {words}." for step, words in changed)
    return head + "\n".join(lines) + changes + (f"\n\nAt their defaults: `{others}`" if others else "")


def clean_record(run: Mapping[str, Any]) -> dict[str, Any]:
    """run.json without what is of this machine: command, names and hashes of photos, paths but for their last part."""
    dropped = ("command", "determines", "launch", "skipped_files", "resumed_from", "exported_from")
    found = {key: without_paths(value) for key, value in run.items() if key not in dropped}
    if "arguments" in run:
        kept = {k: v for k, v in run["arguments"].items() if k not in LOCAL_ARGUMENTS}
        named = {k: PurePath(v).name for k, v in kept.items() if k.endswith("_name_or_path") and isinstance(v, str)}
        found["arguments"] = without_paths(kept) | named
        if base := _base_of(run):
            found["arguments"]["pretrained_model_name_or_path"] = base
    if changes := changes_of(run):
        found["changes"] = changes
    if "photos" in run:
        private = ("file", "folder", "sha256")
        found["photos"] = [{k: v for k, v in photo.items() if k not in private} for photo in run["photos"]]
    return found


def without_paths(value: Any) -> Any:
    """The last part of every local path in a JSON value, alone or in a sentence."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or value
    return FOLDERS_IN_A_SENTENCE.sub("", value)
