"""README.md beside a trained pipeline: a model card, so that the folder is a good page wherever it is uploaded.

It says what run.json and evaluate.py know, without local paths, names of photos and the command line.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from utils.files.atomic import replace_file
from utils.files.json_files import read_json
from utils.files.ownership import is_own_output, run_of
from utils.models.folder import MODEL_INDEX, prediction_type
from utils.models.layout import unet_shapes
from utils.models.metadata import prompts_of, step_and_strength

CARD_FILE = "README.md"
PICTURE_FILE = "comparison.png"
MARK = "<!-- Written by train_dreambooth_colossalai. Take this line away, and your changes to this file stay. -->"
TAGS = ["text-to-image", "dreambooth", "diffusers", "diffusers-training", "stable-diffusion"]
TAGS += ["stable-diffusion-diffusers"]
HUB_NAMES = {
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
V1_PARAMETERS = 859_520_964
V1_LICENSE = "creativeml-openrail-m"
SCORES = {  # key of metrics.json: name, and what it says
    "dino": ("DINO", "likeness to the photos"),
    "clip_i": ("CLIP-I", "likeness to the photos"),
    "clip_t": ("CLIP-T", "fidelity to the prompt"),
    "clip_t_other": ("CLIP-T, other things", "fidelity to prompts without the subject"),
    "div_clip": ("DIV", "variety between seeds"),
    "copy_clip": ("COPY", "likeness to the nearest photo"),
}
SETTINGS = {  # argument of run.json: how the card calls it
    "max_train_steps": "steps",
    "learning_rate": "learning rate",
    "lr_scheduler": "schedule",
    "train_batch_size": "batch size",
    "gradient_accumulation_steps": "gradient accumulation",
    "resolution": "resolution",
    "mixed_precision": "mixed precision",
    "prior_loss_weight": "prior loss weight",
    "snr_gamma": "min-SNR gamma",
    "noise_offset": "noise offset",
    "seed": "seed",
}
LOCAL_ARGUMENTS = (  # of run.json: of this machine alone
    "config",
    "instance_data_dir",
    "class_data_dir",
    "concepts_list",
    "output_dir",
    "logging_dir",
    "export_single_file",
    "resume_from_checkpoint",
)


def write_card(folder: Path, *, metrics: Mapping[str, Any] | None = None, picture: Path | None = None) -> bool:
    """Writes the card of a pipeline that training wrote, unless there is a README.md of someone else's.

    Args:
        metrics: evaluate.py's metrics.json; None: there are no scores yet.
        picture: evaluate.py's comparison.png, which is copied into the folder; None: an earlier one is removed.

    Returns whether it was written.
    """
    card = folder / CARD_FILE
    if not (is_own_output(folder) and (folder / MODEL_INDEX).is_file()) or (card.exists() and not is_own_card(card)):
        return False
    had_picture = card.exists() and f"({PICTURE_FILE})" in card.read_text(encoding="utf-8")
    if picture is not None:
        with picture.open("rb") as source:
            replace_file(folder / PICTURE_FILE, lambda file: shutil.copyfileobj(source, file))
    elif had_picture:
        (folder / PICTURE_FILE).unlink(missing_ok=True)
    text = card_text(folder, run_of(folder), metrics, has_picture=picture is not None)
    replace_file(card, lambda file: file.write(text.encode("utf-8", errors="backslashreplace")))
    return True


def is_own_card(path: Path) -> bool:
    """Whether this program wrote the card and nobody has claimed it since."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def card_text(folder: Path, run: Mapping[str, Any], metrics: Mapping[str, Any] | None, *, has_picture: bool) -> str:
    """The card of a pipeline folder as Markdown."""
    prompts = [prompt for prompt, _ in Counter(prompts_of(run)).most_common()] or ["a photo"]  # captions come last
    base, license_name = _base_of(run), _license(folder, run)
    front: dict[str, Any] = dict(base_model=base) if base and "/" in base else {}
    front |= dict(library_name="diffusers", pipeline_tag="text-to-image", inference=True, instance_prompt=prompts[0])
    front |= dict(license=license_name) if license_name else {}
    said_license = f": {license_name}" if license_name else ""
    sections = [
        f"---\n{yaml.safe_dump(front | dict(tags=TAGS), sort_keys=False, allow_unicode=True)}---",
        MARK,
        f"# DreamBooth: {_escaped(prompts[0])}",
        f"Stable Diffusion v1 ({_escaped(base) if base else 'a local base'}), fine-tuned with DreamBooth on "
        f"{_count(run)}. Name the subject as in {_spoken(prompts)}.",
        f"![Photos, the base's and this model's pictures, one seed a column]({PICTURE_FILE})" if has_picture else "",
        "## Load it\n```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("PATH_OR_NAME", torch_dtype=torch.float16).to("cuda")\n'
        f"pipeline({prompts[0]!r}).images[0].save('picture.png')\n```",
        _scores(metrics) if metrics else "",
        _settings(folder, run),
        f"## Licence\nThe base's licence goes for what is made from it{said_license}. A person or a brand that the "
        f"photos show has rights of their own.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _base_of(run: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub if it is known, else its folder's or file's own name."""
    arguments = run.get("arguments")
    named = arguments.get("pretrained_model_name_or_path") if isinstance(arguments, Mapping) else None
    if not isinstance(named, str) or not named:
        return None
    cached = re.search(r"models--([^/]+?)--([^/]+)", named)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if named.count("/") == 1 and not named.startswith((".", "/", "~")) and not named.startswith("model/"):
        return named
    name = PurePath(named).name
    return HUB_NAMES.get(name, name)


def _license(folder: Path, run: Mapping[str, Any]) -> str | None:
    """What the base's own card says, else Stable Diffusion v1's if the UNet has its size."""
    base = run.get("base_model")
    where = base.get("folder") if isinstance(base, Mapping) else None
    if isinstance(where, str) and (Path(where) / CARD_FILE).is_file():
        front = (Path(where) / CARD_FILE).read_text(encoding="utf-8", errors="replace").split("---")
        try:
            found = yaml.safe_load(front[1]) if len(front) > 2 else {}
        except yaml.YAMLError:
            found = {}
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            return found["license"]
    shapes = unet_shapes(read_json(folder / "unet" / "config.json"))
    return V1_LICENSE if sum(math.prod(shape) for shape in shapes.values()) == V1_PARAMETERS else None


def _count(run: Mapping[str, Any]) -> str:
    number = sum(prompts_of(run).values())
    return f"{number} photo{'' if number == 1 else 's'}"


def _spoken(prompts: list[str]) -> str:
    return ", ".join(f'"{_escaped(prompt)}"' for prompt in prompts[:4])


def _escaped(text: str) -> str:
    """A user's words in Markdown: none of them is markup, and all are in one line."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _scores(metrics: Mapping[str, Any]) -> str:
    models = metrics.get("models")
    both = [models.get(name) or {} for name in ("baseline", "finetuned")] if isinstance(models, Mapping) else []
    rows = []
    for key, (name, meaning) in SCORES.items():
        values = [(model.get(key) or {}).get("value") for model in both]
        if any(isinstance(value, float) for value in values):
            cells = [f"{value:.3f}" if isinstance(value, float) else "-" for value in values]
            rows.append(f"| {name} | {' | '.join(cells)} | {meaning} |")
    subjects = f", means over {num} subjects" if (num := metrics.get("num_subjects")) else ""
    head = f"## Scores{subjects}\n| | base | this model | |\n|---|---|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def _settings(folder: Path, run: Mapping[str, Any]) -> str:
    arguments, versions = run.get("arguments"), run.get("versions")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    versions = versions if isinstance(versions, Mapping) else {}
    step, strength = step_and_strength(run)
    if step is not None:
        arguments = {**arguments, "max_train_steps": f"{step} of {arguments.get('max_train_steps')}"}
    used = dict(SETTINGS)
    if not arguments.get("with_prior_preservation"):
        del used["prior_loss_weight"]
    rows = [(said, arguments[name]) for name, said in used.items() if arguments.get(name) not in (None, 0.0)]
    if strength is not None:
        rows.append(("strength", f"{strength:g} times the way from the base to the trained weights"))
    rows += [("prediction type", prediction_type(folder)), ("device", run.get("device"))]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    lines = [f"| {name} | {_escaped(str(value))} |" for name, value in rows if value]
    return "## Training\nWith ColossalAI's TorchDDP plugin and fp32 master weights.\n\n| | |\n|---|---|\n" + "\n".join(
        lines
    )


def clean_record(run: Mapping[str, Any]) -> dict[str, Any]:
    """run.json without what is of this machine and nobody's business: paths, names and hashes of photos, the command.

    Of paths that say something, as the base's, the last part stays.
    """
    dropped = ("command", "skipped_files", "resumed_from", "exported_from")
    found = {key: _without_paths(value) for key, value in run.items() if key not in dropped}
    if isinstance(run.get("arguments"), Mapping):
        kept = {k: v for k, v in run["arguments"].items() if k not in LOCAL_ARGUMENTS}
        named = {k: PurePath(v).name for k, v in kept.items() if k.endswith("_name_or_path") and isinstance(v, str)}
        found["arguments"] = _without_paths(kept) | named
        if base := _base_of(run):
            found["arguments"]["pretrained_model_name_or_path"] = base
    photos = run.get("photos")
    private = ("file", "folder", "sha256")
    if isinstance(photos, list):
        found["photos"] = [
            {key: value for key, value in photo.items() if key not in private}
            for photo in photos
            if isinstance(photo, Mapping)
        ]
    return found


def _without_paths(value: Any) -> Any:
    """The last part of every absolute path in a JSON value."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name
    return value
