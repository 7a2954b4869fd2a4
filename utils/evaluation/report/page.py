"""What the report shows, as plain values. report.html.jinja says how they are shown, and escapes them all."""

import base64
import contextlib
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from utils.errors import UserError, of_file
from utils.evaluation.photos import load_photos
from utils.evaluation.prompts import SUBJECT
from utils.evaluation.report.charts import Chart, line_chart, smooth
from utils.evaluation.report.gallery import Album, choice_images, first_row, pairs, rest, second_row, strip
from utils.evaluation.report.numbers import metric_table
from utils.evaluation.samples import BASELINE, FINETUNED, PIXELS, REPORT_FILE, model_folder, photos_named
from utils.files.atomic import replace_path
from utils.files.json_files import read_rows
from utils.files.ownership import METRICS_FILE, VALIDATION_FILE, run_of

FOLDER = Path(__file__).resolve().parent
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
TEMPLATES.trim_blocks = TEMPLATES.lstrip_blocks = True
FLAG = re.compile(r"--\w+")


def with_flags_whole(text: str) -> Markup:
    """The text, in which no line breaks within a flag such as --num_images."""
    return Markup(FLAG.sub(r'<span class="flag">\g<0></span>', str(escape(text))))


TEMPLATES.filters["with_flags_whole"] = with_flags_whole
SCRIPT = (FOLDER / "page.js").read_text(encoding="utf-8")
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Nothing from elsewhere, no script but ours; images from the page itself and from the folder that it lies in.
POLICY = (
    f"default-src 'none'; img-src data: 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{SCRIPT_DIGEST}'"
)


def write_report(output_dir: Path, samples: dict, metrics: dict | None) -> None:
    """Writes report.html from what the other stages and the training left on disk."""
    folder = model_folder(samples, FINETUNED)
    run = run_of(folder)
    album = Album(output_dir, samples, metrics, load_photos(photos_folder(samples, metrics)))
    choice = metrics["choice"] if metrics is not None else None
    page = TEMPLATES.get_template("report.html.jinja").render(
        prompt=next((prompt["text"] for prompt in samples["prompts"] if prompt["role"] == SUBJECT), ""),
        baseline=Path(samples["models"][BASELINE]["path"]).name,
        finetuned=folder.name,
        said=metrics["says"][FINETUNED] if metrics is not None else None,
        first_row=first_row(album),  # from here in the order of the page
        second_row=second_row(album),
        choice=choice,
        strip=strip(album, choice),
        choice_images=choice_images(album, choice),
        copies=pairs(album, [copy for copies in (metrics or {}).get("copies", {}).values() for copy in copies]),
        rest=rest(album),
        last=len(album.shown),
        table=metric_table(samples, metrics) if metrics is not None else None,
        charts=loss_curves(folder),
        settings=settings(samples, metrics),
        commands=commands(samples, metrics, run),
        script=Markup(SCRIPT),
        policy=POLICY,
    )
    content = page.encode("utf-8", "backslashreplace")  # a file's name may hold what UTF-8 cannot
    try:
        replace_path(output_dir / REPORT_FILE, lambda part: part.write_bytes(content), is_shared=True)
    except OSError as error:
        raise UserError(of_file(error, output_dir, "make room there")) from error


def photos_folder(samples: dict, metrics: dict | None) -> Path | None:
    """Of the photos that the images were compared with, else of those that were named when they were drawn."""
    compared = (metrics or {}).get("photos", {}).get("folder")
    return photos_named(samples) if compared is None else Path(compared)


def commands(samples: dict, metrics: dict | None, run: dict) -> dict[str, str | None]:
    """Those that made the model, the images, and the scores if that was another."""
    drawing, scoring = samples.get("command"), (metrics or {}).get("command")
    return {"Training": run.get("command"), "Evaluation": drawing, "Scores": scoring if scoring != drawing else None}


# Curves


def loss_curves(folder: Path) -> list[Chart]:
    """Training loss and validation loss."""
    loss, validation = (
        read_points(folder / METRICS_FILE, "loss"),
        read_points(folder / VALIDATION_FILE, "validation_loss"),
    )
    charts = [
        line_chart("Training loss", dict(raw=loss, smooth=smooth(loss)), "as measured, and its moving average"),
        line_chart("Validation loss", dict(smooth=validation), "your photos with fixed noise"),
    ]
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


def settings(samples: dict, metrics: dict | None) -> dict:
    """How the images were drawn, and by what they were scored; how the model was trained is in its card."""
    names = ("num_images", "num_drift_images", "seed", *PIXELS, "identifier", "class_name", "batch_size", "device")
    encoders = {kind.upper(): each["name"] for kind, each in (metrics or {}).get("encoders", {}).items() if each}
    versions = {f"{name} version": version for name, version in samples["versions"].items()}
    return {name: samples[name] for name in names} | versions | encoders
