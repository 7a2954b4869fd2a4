"""What the report shows, as plain values. report.html.jinja says how they are shown, and escapes them all."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.errors import UserError
from utils.evaluation import verdict
from utils.evaluation.choice import choose
from utils.evaluation.comparison import square
from utils.evaluation.findings import AIM, FOUND, NOT_FOUND, Check
from utils.evaluation.photos import load_photos
from utils.evaluation.report.charts import Chart, Series, line_chart, smooth
from utils.evaluation.report.images import Picture, picture, thumbnail_side
from utils.evaluation.samples import BASELINE, FINETUNED, METRICS_CSV, REPORT_FILE, SamplingSettings
from utils.evaluation.subject import subject_line
from utils.evaluation.wording import MINUS, number, signed
from utils.files.atomic import replace_file

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ROLES = {
    "subject": ("The subject", "The same seed in both rows: what differs is the fine-tuning."),
    "class": ("The class alone", "Without the subject's own name. Ideally as varied as the baseline's."),
    "other": ("Other things", "Nothing of the subject should be seen here: what is, has drifted."),
}
CURVES = (
    ("dino", "DINO", "subject fidelity"),
    ("clip_i", "CLIP-I", "subject fidelity"),
    ("clip_t", "CLIP-T", "prompt fidelity"),
    ("clip_t_other", "CLIP-T, other things", "drift"),
    ("div_clip", "DIV", "variety between seeds"),
    ("copy_clip", "COPY", "likeness to the nearest photo"),
)
REPORTED_METRICS = (
    ("dino", "DINO", "subject fidelity: mean cosine to your photos, DINO features"),
    ("clip_i", "CLIP-I", "subject fidelity: mean cosine to your photos, CLIP features"),
    ("clip_t", "CLIP-T", "prompt fidelity: cosine of image and prompt, the subject's name left out"),
    ("clip_t_with_token", "CLIP-T, with name", "prompt fidelity with the prompt as it stands"),
    ("copy_dino", "COPY (DINO)", "cosine to the nearest photo; as near as photos are: memorised"),
    ("copy_clip", "COPY (CLIP)", "cosine to the nearest photo; as near as photos are: memorised"),
    ("copy_dino_max", "COPY max (DINO)", "the image that is most like a photo"),
    ("copy_clip_max", "COPY max (CLIP)", "the image that is most like a photo"),
    ("div_dino", "DIV (DINO)", "variety: mean distance of two seeds of a prompt"),
    ("div_clip", "DIV (CLIP)", "variety: mean distance of two seeds of a prompt"),
    ("div_lpips", "DIV (LPIPS)", "variety: mean LPIPS distance of two seeds of a prompt"),
    ("pres_dino", "PRES (DINO)", "likeness of the bare class to your photos; lower is better"),
    ("pres_clip", "PRES (CLIP)", "likeness of the bare class to your photos; lower is better"),
    ("clip_t_class", "CLIP-T, class", "prompt fidelity on the bare class"),
    ("clip_t_other", "CLIP-T, other things", "prompt fidelity without the subject"),
)
# The same value of the photos themselves, if there is one.
OF_PHOTOS = {
    "dino": "real_dino",
    "clip_i": "real_clip",
    "copy_dino": "nearest_dino",
    "copy_clip": "nearest_clip",
    "clip_t_class": "clip_t_class",
}
# DreamBooth, arXiv 2208.12242, table 1: real images, DreamBooth on Stable Diffusion, Textual Inversion on the same.
PAPER = {"dino": (0.774, 0.668, 0.569), "clip_i": (0.885, 0.803, 0.780), "clip_t": (None, 0.305, 0.255)}


class Grid(NamedTuple):
    """The images of one prompt: a row a model, a column a seed."""

    role: tuple[str, str]  # title and explanation
    prompt: str
    seeds: list[int]
    rows: list[tuple[str, list[tuple[Picture, str]]]]  # (model, [(image, what stands below it)])


class Cell(NamedTuple):
    """A number, its interval, and the reason if there is no number."""

    text: str
    interval: str = ""
    reason: str | None = None


class MetricRow(NamedTuple):
    name: str
    meaning: str
    cells: list[Cell]


def write_report(output_dir: Path, samples: dict, metrics: dict | None) -> None:
    """Writes report.html from what the other stages and the training left on disk."""
    folder = Path(samples["models"][FINETUNED]["path"])
    run = read_json_or_empty(folder / "run.json")
    page = TEMPLATES.get_template("report.html.jinja").render(
        prompts=samples["prompts"],
        subject_line=subject_line(samples),
        baseline=Path(samples["models"][BASELINE]["path"]).name,
        finetuned=folder.name,
        models=[label(name) for name in ordered(samples["models"])],
        is_scored=metrics is not None,
        **(verdict_values(metrics) if metrics is not None else {}),
        **image_values(output_dir, samples, metrics),
        charts=[*loss_curves(folder), *metric_curves(samples, metrics, run)],
        **(metric_table(samples, metrics) if metrics is not None else {}),
        settings=settings(samples, metrics, run),
        commands={"Training": run.get("command"), "Evaluation": samples.get("command")},
    )
    content = page.encode("utf-8", "backslashreplace")  # a file's name may hold what UTF-8 cannot
    try:
        replace_file(output_dir / REPORT_FILE, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror or error}: make room there") from error


def label(model: str) -> str:
    return model.replace("finetuned", "fine-tuned").replace("@", " at strength ")


def ordered(models: dict) -> list[str]:
    """Baseline first, checkpoints by step, the fine-tuned model last."""
    return [name for name in models if name != FINETUNED] + [FINETUNED]


# Verdict


def verdict_values(metrics: dict) -> dict:
    """The headline, the numbers that matter, the choice, and the checks."""
    judged = verdict.judge(metrics, FINETUNED)
    flags = [(flag(check), check.title, f"{check.text} {check.advice}".strip()) for check in judged.checks]
    flags.sort(key=lambda each: ("warning", "good", "note").index(each[0]))
    choice = choose(metrics)
    best = (choice.sentence.removesuffix("."), choice.why) if choice is not None else None
    headline = f"{judged.headline} {judged.gaps}".strip()
    return dict(headline=headline, tiles=tiles(metrics), best=best, flags=flags)


def flag(check: Check) -> str:
    """The class of a check's box in style.css."""
    if check.state == FOUND:
        return {AIM: "good"}.get(check.level, check.level)
    return "good" if check.state == NOT_FOUND and check.level != AIM else "note"


def tiles(metrics: dict) -> list[tuple[str, str, str]] | None:
    """(value, what it is, the baseline's) of the four numbers that matter; None if no encoder was there."""
    encoder = verdict.main_encoder(metrics)
    if metrics["encoders"][encoder] is None:
        return None
    shown = {
        verdict.fidelity_metric(metrics): "subject fidelity",
        "clip_t": "prompt fidelity",
        f"div_{encoder}": "variety between seeds",
        "clip_t_other": "other prompts, fidelity",
    }
    pairs = [
        (name, *(metrics["models"][m][key]["value"] for m in (FINETUNED, BASELINE))) for key, name in shown.items()
    ]
    return [
        (number(ours), name, number(baseline))
        for name, ours, baseline in pairs
        if ours is not None and baseline is not None
    ]


# Images


def image_values(output_dir: Path, samples: dict, metrics: dict | None) -> dict:
    """The photos, and a grid for every prompt."""
    folder = samples["instance_data_dir"]
    photos = load_photos(Path(folder) if folder is not None else None)
    side = thumbnail_side(len(samples["images"]) + len(photos))
    captions = per_image_values(output_dir) if metrics is not None else {}
    return dict(
        photos=[
            (path.name, picture(square(photo), f"Your photo {path.name}", side)) for path, photo in photos.items()
        ],
        grids=[
            grid(output_dir, samples, prompt, side, captions)
            for prompt in samples["prompts"]
            if prompt["role"] in ROLES
        ],
        has_captions=bool(captions),
    )


def grid(output_dir: Path, samples: dict, prompt: dict, side: int, captions: dict[str, str]) -> Grid:
    """The images of one prompt."""
    entries = [entry for entry in samples["images"] if entry["prompt"] == prompt["text"]]
    rows = []
    for model in ordered(samples["models"]):
        cells = []
        for entry in (entry for entry in entries if entry["model"] == model):
            alt = f"{label(model)}, seed {entry['seed']}: {prompt['text']}"
            cells.append((picture(output_dir / entry["file"], alt, side), captions.get(entry["file"], "")))
        rows.append((label(model), cells))
    seeds = list(dict.fromkeys(entry["seed"] for entry in entries))
    return Grid(ROLES[prompt["role"]], prompt["text"], seeds, rows)


def per_image_values(output_dir: Path) -> dict[str, str]:
    """What stands below each image, by file: DINO if it was computed, else CLIP-I."""
    try:
        with (output_dir / METRICS_CSV).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        named = {row["file"]: ("DINO", row["dino"]) if row["dino"] else ("CLIP-I", row["clip_i"]) for row in rows}
        return {file: caption(name, value) for file, (name, value) in named.items() if value}
    except (OSError, KeyError, ValueError):
        return {}


def caption(name: str, value: str) -> str:
    return f"{name}\u00a0" + f"{float(value):.2f}".replace("-", MINUS)


# Curves


def loss_curves(folder: Path) -> list[Chart]:
    """Training loss and validation loss."""
    loss = read_points(folder / "metrics.jsonl", "loss")
    curves = [Series(loss, "raw"), Series(smooth(loss), "smooth")]
    validation = read_points(folder / "validation.jsonl", "validation_loss")
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
    steps = {BASELINE: 0} | {name: int(name.rpartition("-")[2]) for name in plain}
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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            row = json.loads(line)
            points.append((float(row["step"]), float(row[key])))
        except (ValueError, KeyError, TypeError):
            continue
    return points


def read_json_or_empty(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# Metrics


def metric_table(samples: dict, metrics: dict) -> dict:
    """Every metric of every model beside the photos' own value and the paper's; and those that were not computed."""
    models = ordered(samples["models"])
    rows = []
    absent: dict[str, list[str]] = {}
    for key, name, meaning in REPORTED_METRICS:
        entries = [metrics["models"][model][key] for model in models]
        if all(entry["value"] is None for entry in entries):
            absent.setdefault(entries[-1]["reason"], []).append(name)
            continue
        change = metrics["changes"][FINETUNED].get(key)
        cells = [metric_cell(entry) for entry in entries] + [change_cell(change) if change else Cell("")]
        photo = metrics["photos"].get(OF_PHOTOS.get(key, ""), {}).get("value")
        cells += [Cell(number(value)) for value in (photo, *PAPER.get(key, (None,) * 3))]
        rows.append(MetricRow(name, meaning, cells))
    return dict(metric_rows=rows, absent_metrics=absent)


def metric_cell(entry: dict) -> Cell:
    if entry["value"] is None:
        return Cell("\u2013", reason=entry["reason"])
    interval = entry.get("interval")
    return Cell(number(entry["value"]), f"{number(interval[0])} to {number(interval[1])}" if interval else "")


def change_cell(change: dict) -> Cell:
    value, *interval = map(signed, (change["value"], *(change["interval"] or ())))
    return Cell(value, " to ".join(interval))


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
