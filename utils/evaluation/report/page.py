"""What the report shows, as plain values. report.html.jinja says how they are shown, and escapes them all."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.errors import UserError, of_file
from utils.evaluation.photos import load_photos
from utils.evaluation.prompts import SUBJECT
from utils.evaluation.report.gallery import Album, choice_images, first_row, pairs, rest, second_row, strip
from utils.evaluation.report.numbers import metric_table
from utils.evaluation.samples import BASELINE, FINETUNED, PIXELS, REPORT_FILE, model_folder, photos_named
from utils.files.atomic import replace_path
from utils.files.ownership import run_of

FOLDER = Path(__file__).resolve().parent
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
TEMPLATES.trim_blocks = TEMPLATES.lstrip_blocks = True
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
    compared = (metrics or {}).get("photos", {}).get("folder")  # else those that were named when the images were drawn
    photos = load_photos(photos_named(samples) if compared is None else Path(compared), folder)
    album = Album(output_dir, samples, metrics, photos)
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


def commands(samples: dict, metrics: dict | None, run: dict) -> dict[str, str | None]:
    """Those that made the model, the images, and the scores if that was another."""
    drawing, scoring = samples.get("command"), (metrics or {}).get("command")
    return {"Training": run.get("command"), "Evaluation": drawing, "Scores": scoring if scoring != drawing else None}


def settings(samples: dict, metrics: dict | None) -> dict:
    """How the images were drawn, and by what they were scored; how the model was trained is in its card."""
    names = ("num_images", "num_drift_images", "seed", *PIXELS, "identifier", "class_name", "batch_size", "device")
    encoders = {kind.upper(): each["name"] for kind, each in (metrics or {}).get("encoders", {}).items() if each}
    versions = {f"{name} version": version for name, version in samples["versions"].items()}
    return {name: samples[name] for name in names} | versions | encoders
