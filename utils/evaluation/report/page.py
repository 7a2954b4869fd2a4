"""What the report shows, as plain values. report.html.jinja says how they are shown, and escapes them all."""

import base64
import contextlib
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from utils.errors import UserError
from utils.evaluation.choice import choose
from utils.evaluation.findings import (
    AIM,
    FOUND,
    GOOD,
    MISSED,
    NOT_FOUND,
    NOT_LOOKED_FOR,
    NOTE,
    SPOILT,
    UNCERTAIN,
    UNKNOWN,
    WARNING,
    Check,
)
from utils.evaluation.photos import load_photos
from utils.evaluation.prompts import subject_line
from utils.evaluation.report.candidates import make_selection
from utils.evaluation.report.charts import Chart, Series, line_chart, smooth
from utils.evaluation.report.gallery import label, make_gallery, ordered
from utils.evaluation.report.numbers import REPORTED_METRICS, metric_table
from utils.evaluation.samples import (
    BASELINE,
    FINETUNED,
    REPORT_FILE,
    SamplingSettings,
    model_folder,
    photos_named,
    step_of,
)
from utils.evaluation.verdict import judge
from utils.evaluation.visible import fidelity_metric, main_encoder
from utils.evaluation.wording import number
from utils.files.atomic import replace_path
from utils.files.json_files import read_rows
from utils.files.ownership import METRICS_FILE, VALIDATION_FILE, run_of

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
FLAG = re.compile(r"--\w+")


def with_flags_whole(text: str) -> Markup:
    """The text, in which no line breaks within a flag such as --num_images."""
    return Markup(FLAG.sub(r'<span class="flag">\g<0></span>', str(escape(text))))


TEMPLATES.filters["with_flags_whole"] = with_flags_whole
SCRIPT = (Path(__file__).resolve().parent / "page.js").read_text(encoding="utf-8")
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Nothing from elsewhere, no script but ours; images from the page itself and from the folder that it lies in.
POLICY = (
    f"default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_DIGEST}'"
)
CURVES = (
    ("dino", "DINO", "subject fidelity"),
    ("clip_i", "CLIP-I", "subject fidelity"),
    ("clip_t", "CLIP-T", "prompt fidelity"),
    ("clip_t_other", "CLIP-T, other things", "drift"),
    ("div_clip", "DIV", "variety between seeds"),
    ("copy_clip", "COPY", "likeness to the nearest photo"),
)


def write_report(output_dir: Path, samples: dict, metrics: dict | None) -> None:
    """Writes report.html from what the other stages and the training left on disk."""
    folder = model_folder(samples, FINETUNED)
    run = run_of(folder)
    gallery = make_gallery(output_dir, samples, load_photos(photos_folder(samples, metrics)), metrics is not None)
    page = TEMPLATES.get_template("report.html.jinja").render(
        prompts=samples["prompts"],
        subject_line=subject_line(samples),
        baseline=Path(samples["models"][BASELINE]["path"]).name,
        finetuned=folder.name,
        models=[label(name) for name in ordered(samples["models"])],
        is_scored=metrics is not None,
        **(verdict_values(metrics) if metrics is not None else {}),
        gallery=gallery,
        candidates=make_selection(output_dir, samples, metrics, gallery.places()) if metrics is not None else None,
        charts=[*loss_curves(folder), *metric_curves(samples, metrics, run)],
        **(metric_table(samples, metrics) if metrics is not None else {}),
        settings=settings(samples, metrics, run),
        script=Markup(SCRIPT),
        policy=POLICY,
        commands=commands(samples, metrics, run),
    )
    content = page.encode("utf-8", "backslashreplace")  # a file's name may hold what UTF-8 cannot
    try:
        replace_path(output_dir / REPORT_FILE, lambda part: part.write_bytes(content), is_shared=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror or error}: make room there") from error


def photos_folder(samples: dict, metrics: dict | None) -> Path | None:
    """Of the photos that the images were compared with, else of those that were named when they were drawn."""
    compared = (metrics or {}).get("photos", {}).get("folder")
    return photos_named(samples) if compared is None else Path(compared)


def commands(samples: dict, metrics: dict | None, run: dict) -> dict[str, str | None]:
    """Those that made the model, the images, and the scores if that was another."""
    drawing, scoring = samples.get("command"), (metrics or {}).get("command")
    return {"Training": run.get("command"), "Evaluation": drawing, "Scores": scoring if scoring != drawing else None}


# Verdict


class Finding(NamedTuple):
    """A check as it is shown: its state as a shape (an icon's name) and a word."""

    icon: str
    word: str
    title: str
    text: str
    advice: str


class Tile(NamedTuple):
    """A number that matters."""

    name: str
    value: str
    baseline: str
    direction: str


VERDICT_STATES = {
    GOOD: ("good", "Good"),
    SPOILT: ("warning", "At a price"),
    MISSED: ("missed", "Not there yet"),
    UNKNOWN: ("unknown", "Not known"),
}
FOUND_STATES = {WARNING: ("warning", "found"), NOTE: ("note", "found"), AIM: ("good", "yes")}
OTHER_STATES = {
    NOT_FOUND: ("good", "not found"),
    UNCERTAIN: ("unknown", "too few images"),
    NOT_LOOKED_FOR: ("unknown", "not looked for"),
}
ICONS = ("warning", "missed", "unknown", "note", "good")  # in the order in which checks are shown


def verdict_values(metrics: dict) -> dict:
    """State and sentence of the first screen, the choice among several models, the checks, the numbers that matter."""
    verdict = judge(metrics, FINETUNED)
    icon, word = VERDICT_STATES[verdict.state]
    word += ", as far as is known" if verdict.state == GOOD and verdict.gaps else ""
    aim, *others = [finding(check) for check in verdict.checks]
    if verdict.state == MISSED:
        aim = aim._replace(icon="missed", word="not yet")
    checks = [aim, *sorted(others, key=lambda each: ICONS.index(each.icon))]
    shown = dict(icon=icon, word=word, headline=verdict.headline, gaps=verdict.gaps, checks=checks)
    return dict(verdict=shown, choice=choose(metrics), tiles=tiles(metrics))


def finding(check: Check) -> Finding:
    icon, word = FOUND_STATES[check.level] if check.state == FOUND else OTHER_STATES[check.state]
    return Finding(icon, word, check.title, check.text, check.advice)


def tiles(metrics: dict) -> list[Tile]:
    """Of the four numbers that matter, those that both models have."""
    encoder = main_encoder(metrics)
    shown = {
        fidelity_metric(metrics): "likeness to your photos",
        "clip_t": "fidelity to the prompt",
        f"div_{encoder}": "variety between seeds",
        "clip_t_other": "fidelity to other prompts",
    }
    directions = {key: direction for key, _, _, direction in REPORTED_METRICS}
    found = []
    for key, name in shown.items():
        ours, baseline = (metrics["models"][model].get(key, {}).get("value") for model in (FINETUNED, BASELINE))
        if ours is not None and baseline is not None:
            found.append(Tile(name, number(ours), number(baseline), directions[key]))
    return found


# Curves


def loss_curves(folder: Path) -> list[Chart]:
    """Training loss and validation loss."""
    loss = read_points(folder / METRICS_FILE, "loss")
    curves = [Series(loss, "raw"), Series(smooth(loss), "smooth")]
    validation = read_points(folder / VALIDATION_FILE, "validation_loss")
    charts = [
        line_chart("Training loss", curves, "as measured, and its moving average"),
        line_chart("Validation loss", [Series(validation, "smooth")], "your photos with fixed noise"),
    ]
    return [chart for chart in charts if chart is not None]


def metric_curves(samples: dict, metrics: dict | None, run: dict) -> list[Chart]:
    """A chart a metric over the steps: 0 is the baseline, the last is the fine-tuned model."""
    plain = [name for name in samples["models"] if "-" in name and "@" not in name]  # not at another strength
    if metrics is None or not plain:
        return []
    last = (run.get("result") or {}).get("num_steps") or (run.get("arguments") or {}).get("max_train_steps")
    steps = {BASELINE: 0} | {name: step_of(name) for name in plain}
    if isinstance(last, int):
        steps[FINETUNED] = last
    charts = []
    for key, title, note in CURVES:
        found = [(step, metrics["models"][model][key]) for model, step in sorted(steps.items(), key=lambda i: i[1])]
        found = [(step, entry) for step, entry in found if entry["value"] is not None]
        intervals = [(step, *entry["interval"]) for step, entry in found if entry.get("interval")]
        points = [(step, entry["value"]) for step, entry in found]
        charts.append(line_chart(title, [Series(points, "smooth", intervals)], note))
    return [chart for chart in charts if chart is not None]


def read_points(path: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of each line of a JSON-lines file; what is not a number, or not whole, is passed over."""
    points = []
    with contextlib.suppress(OSError):
        for row in read_rows(path):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                points.append((float(row["step"]), float(row[key])))
    return points


# Settings


def settings(samples: dict, metrics: dict | None, run: dict) -> list[tuple[str, dict]]:
    """Everything that decides the images and the numbers, in groups."""
    sampling = {name: samples[name] for name in ("num_images", "num_drift_images", "seed")}
    sampling |= SamplingSettings.read(samples).of_pixels()
    sampling |= {name: samples[name] for name in ("identifier", "class_name", "batch_size", "device")}
    sampling |= {f"{name} version": version for name, version in samples["versions"].items()}
    groups = [("Sampling", sampling)]
    groups += [(f"Model: {label(name)}", flat(model)) for name, model in samples["models"].items()]
    if metrics is not None:
        encoders = {name: encoder for name, encoder in metrics["encoders"].items() if encoder is not None}
        groups += [(f"Encoder: {name.upper()}", flat(encoder)) for name, encoder in encoders.items()]
        groups.append(("Intervals", metrics["intervals"]))
        photos = {photo["file"]: f"SHA-256 {photo['sha256']}" for photo in metrics["photos"]["files"]}
        groups.append(("Photos", photos))
    if arguments := run.get("arguments"):
        result = {key: value for key, value in (run.get("result") or {}).items() if value is not None}
        groups.append(("Training", flat(arguments) | result | {"device": run.get("device")}))
    return groups


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, their keys joined by spaces."""
    result: dict = {}
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ") if prefix else str(key)
        result |= flat(value, f"{name} ") if isinstance(value, dict) else {name: value}
    return result
