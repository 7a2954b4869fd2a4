"""The third stage of an evaluation: report.html, one file that needs no network, for everything there is to see."""

import csv
import json
from pathlib import Path

from utils import verdict
from utils.comparison import load_photos
from utils.errors import UserError
from utils.evaluation.report.charts import Series, line_chart, smooth
from utils.evaluation.report.html import Markup, escape, scroller, tag, void
from utils.evaluation.report.images import picture, thumbnail_side
from utils.evaluation.report.style import style_sheet
from utils.evaluation.report.tables import metrics_section, repeat_section, settings_section
from utils.samples import BASELINE, FINETUNED, METRICS_CSV, REPORT_FILE
from utils.sampling import replace_file

ROLES = {
    "subject": ("The subject", "The same seed in both rows: what differs is the fine-tuning."),
    "class": ("The class alone", "Without the subject's own name. Ideally as varied as the baseline's."),
    "other": ("Other things", "Nothing of the subject should be seen here: what is, has drifted."),
}
CURVES = (("dino", "DINO", "subject fidelity"), ("clip_i", "CLIP-I", "subject fidelity"))
CURVES += (("clip_t", "CLIP-T", "prompt fidelity"), ("clip_t_other", "CLIP-T, other things", "drift"))
CURVES += (("div_clip", "DIV", "variety between seeds"), ("copy_clip", "COPY", "likeness to the nearest photo"))


def write_report(output_dir: Path, samples: dict, metrics: dict | None) -> None:
    """Writes report.html from what the other stages and the training left on disk."""
    folder = Path(samples["models"][FINETUNED]["path"])
    run = read_json_or_empty(folder / "run.json")
    parts = [
        heading(samples, metrics),
        images_section(output_dir, samples, metrics),
        curves_section(folder, samples, metrics, run),
        metrics_section(samples, metrics),
        settings_section(samples, metrics, run),
        repeat_section(samples, run),
    ]
    page = whole_page(f"{samples['prompts'][0]['text']} \u2013 evaluation", parts)
    try:
        replace_file(output_dir / REPORT_FILE, lambda file: file.write(page.encode()))
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror or error}: make room there") from error


def whole_page(title: str, parts: list[Markup]) -> str:
    """The document around the sections. Its policy forbids every request and script."""
    head = [
        void("meta", charset="utf-8"),
        void("meta", name="generator", content="evaluate.py"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", http_equiv="Content-Security-Policy",
             content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    ]  # fmt: skip
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', tag('main', parts)), lang='en')}\n"


def heading(samples: dict, metrics: dict | None) -> Markup:
    """Title, verdict, warnings, and where to find what."""
    subject = [prompt["text"] for prompt in samples["prompts"] if prompt["role"] == "subject"]
    more = f" and {len(subject) - 1} more prompts" if len(subject) > 1 else ""
    names = [Path(samples["models"][name]["path"]).name for name in (BASELINE, FINETUNED)]
    links = [("#images", "Images"), ("#curves", "Curves"), ("#metrics", "Metrics"), ("#settings", "Settings")]
    return tag(
        "header",
        tag("p", f"{names[1]} beside {names[0]}", class_="kicker"),
        tag("h1", f"\u201c{subject[0]}\u201d{more}"),
        verdict_part(metrics),
        tag("nav", [tag("a", text, href=href) for href, text in links], aria_label="Sections"),
    )


def verdict_part(metrics: dict | None) -> Markup:
    if metrics is None:
        return tag("p", "These images have not been scored: run evaluate.py --only score --only report.", class_="say")
    sentences = verdict.headline(metrics, FINETUNED)
    if not sentences:
        reason = metrics["models"][FINETUNED]["clip_i"].get("reason", "")
        sentences = [f"No verdict in numbers: CLIP-I {reason}."]
    flags = [(w["level"], w["title"], w["text"]) for w in metrics["warnings"][FINETUNED]]
    if verdict.main_encoder(metrics) and not any(level == "warning" for level, *_ in flags):
        text = "Neither memorised photos, nor lost variety, nor drift of other things beyond the thresholds."
        flags.insert(0, ("good", "No warning", text))
    flags.sort(key=lambda flag: ("warning", "good", "note").index(flag[0]))
    best = verdict.best_model(metrics)
    lines = [tag("p", tag("strong", f"Best: {best[0]}. "), f"Why: {best[1]}.")] if best else []
    items = [tag("li", tag("b", title), text, class_=level) for level, title, text in flags]
    return escape([tag("p", " ".join(sentences), class_="say"), tiles(metrics), lines,
                   tag("ul", items, class_="flags", aria_label="Warnings") if items else ""])  # fmt: skip


def tiles(metrics: dict) -> Markup:
    """The four numbers that matter, each with what it was."""
    encoder = verdict.main_encoder(metrics)
    if encoder is None:
        return Markup()
    fidelity = verdict.fidelity_metric(metrics)
    shown = [
        (fidelity, "subject fidelity"),
        ("clip_t", "prompt fidelity"),
        (f"div_{encoder}", "variety between seeds"),
    ]
    shown.append(("clip_t_other", "other prompts, fidelity"))
    cells = []
    for key, label in shown:
        ours, baseline = (metrics["models"][model][key]["value"] for model in (FINETUNED, BASELINE))
        if ours is not None and baseline is not None:
            label = [tag("span", label), tag("span", f"baseline {baseline:.3f}")]
            cells.append(tag("div", tag("b", f"{ours:.3f}"), label, class_="tile"))
    return tag("div", cells, class_="tiles")


def images_section(output_dir: Path, samples: dict, metrics: dict | None) -> Markup:
    """The photos, then a grid for every prompt: a row a model, a column a seed."""
    photos = load_photos(Path(samples["instance_data_dir"])) if photo_folder(samples) else []
    side = thumbnail_side(len(samples["images"]) + len(photos))
    parts = [tag("h2", "Images", id="images")]
    if photos:
        items = [tag("li", picture(photo, f"Your photo {name}", side), name) for name, photo in photos]
        parts += [tag("h3", "Your photos"), scroller(tag("ul", items, class_="photos"), "Your photos")]
    values = per_image_values(output_dir) if metrics is not None else {}
    role = None
    for prompt in samples["prompts"]:
        grid = prompt_grid(output_dir, samples, prompt, side, values)
        if grid:
            if prompt["role"] != role:
                role = prompt["role"]
                parts.append(tag("p", tag("strong", ROLES[role][0]), ". ", ROLES[role][1], class_="role"))
            parts += [tag("h3", f"\u201c{prompt['text']}\u201d"), grid]
    if values:
        parts.append(tag("p", "Below each image: its mean likeness to your photos.", class_="meta"))
    return tag("section", parts)


def photo_folder(samples: dict) -> bool:
    return samples["instance_data_dir"] is not None and Path(samples["instance_data_dir"]).is_dir()


def prompt_grid(output_dir: Path, samples: dict, prompt: dict, side: int, values: dict) -> Markup:
    """The images of one prompt."""
    entries = [entry for entry in samples["images"] if entry["prompt"] == prompt["text"]]
    seeds = list(dict.fromkeys(entry["seed"] for entry in entries))
    if not entries:
        return Markup()
    rows = []
    for model in ordered(samples["models"]):
        name = {FINETUNED: "fine-tuned"}.get(model, model)
        cells = []
        for entry in (entry for entry in entries if entry["model"] == model):
            alt = f"{name}, seed {entry['seed']}: {prompt['text']}"
            cells.append(tag("td", picture(output_dir / entry["file"], alt, side), values.get(entry["file"], "")))
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    head = tag("tr", tag("td", ""), [tag("th", f"seed {seed}", scope="col") for seed in seeds])
    grid = tag("table", tag("thead", head), tag("tbody", rows), class_="grid")
    return scroller(grid, f"Images of: {prompt['text']}")


def ordered(models: dict) -> list[str]:
    """Baseline first, checkpoints by step, the fine-tuned model last."""
    return [name for name in models if name != FINETUNED] + [FINETUNED]


def per_image_values(output_dir: Path) -> dict[str, Markup]:
    """What stands below each image, by file: DINO where it was computed, else CLIP-I."""
    try:
        with (output_dir / METRICS_CSV).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        named = {row["file"]: ("DINO", row["dino"]) if row["dino"] else ("CLIP-I", row["clip_i"]) for row in rows}
        return {file: caption(name, value) for file, (name, value) in named.items() if value}
    except (OSError, KeyError, ValueError):
        return {}


def caption(name: str, value: str) -> Markup:
    return escape([name, "\u00a0", f"{float(value):.2f}".replace("-", verdict.MINUS)])


def curves_section(folder: Path, samples: dict, metrics: dict | None, run: dict) -> Markup:
    """Training loss, validation loss, and every metric over the checkpoints."""
    charts = []
    loss = read_points(folder / "metrics.jsonl", "loss")
    if loss:
        curves = [Series(loss, "raw"), Series(smooth(loss), "smooth")]
        charts.append(line_chart("Training loss", curves, "as measured, and its moving average"))
    if validation := read_points(folder / "validation.jsonl", "validation_loss"):
        charts.append(line_chart("Validation loss", [Series(validation, "smooth")], "your photos with fixed noise"))
    charts += metric_curves(samples, metrics, run)
    if not any(charts):
        return tag("section", tag("h2", "Curves", id="curves"), tag("p", "No curve: training left no metrics.jsonl."))
    parts = [tag("h2", "Curves", id="curves"), tag("div", charts, class_="charts")]
    if len(samples["models"]) > 2:
        parts.append(tag("p", "Step 0 is the baseline. Upright bars are 95% intervals.", class_="meta"))
    else:
        parts.append(
            tag("p", "--checkpoint all adds each metric over the checkpoints that training kept.", class_="meta")
        )
    return tag("section", parts)


def metric_curves(samples: dict, metrics: dict | None, run: dict) -> list[Markup]:
    """A chart a metric over the steps: 0 is the baseline, the last is the fine-tuned model."""
    if metrics is None or len(samples["models"]) < 3:
        return []
    last = (run.get("result") or {}).get("num_steps") or (run.get("arguments") or {}).get("max_train_steps")
    steps = {BASELINE: 0} | {name: int(name.rpartition("-")[2]) for name in samples["models"] if "-" in name}
    if isinstance(last, int):
        steps[FINETUNED] = last
    charts = []
    for key, title, note in CURVES:
        found = [(step, metrics["models"][model][key]) for model, step in sorted(steps.items(), key=lambda i: i[1])]
        found = [(step, entry) for step, entry in found if entry["value"] is not None]
        intervals = [(step, *entry["interval"]) for step, entry in found if entry.get("interval")]
        points = [(step, entry["value"]) for step, entry in found]
        charts.append(line_chart(title, [Series(points, "smooth", intervals)], note))
    return charts


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
