"""The DreamBooth paper's table: trains on every subject of a data set, draws its 25 prompts, scores them, averages.

python -m bench.dreambench DATA OUT --pretrained_model_name_or_path BASE [--clip_model C --dino_model D] [-- FLAGS]

DATA has google/dreambooth's layout: a folder of photos a subject, and prompts_and_classes.txt, which names classes.
FLAGS go to the training script as they are. Every subject gets OUT/SUBJECT/model and OUT/SUBJECT/result (with a
report.html); OUT gets table.md, table.csv and table.html. Started again, it goes on where it was stopped: trained
subjects, images and scores that are there are kept. With several GPUs each trains and draws a subject of its own.
"""

import argparse
import csv
import io
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from utils.command_line import Parser, positive_int, run_main
from utils.errors import RunFailed, UserError
from utils.evaluation import intervals
from utils.evaluation.metrics import PAPER
from utils.evaluation.prompts import article
from utils.evaluation.samples import BASELINE, FINETUNED, SAMPLES_FILE, read_metrics, read_samples
from utils.files.atomic import replace_path
from utils.files.json_files import read_json_or_none, write_json
from utils.files.ownership import run_of

ROOT = Path(__file__).resolve().parents[1]
CLASSES_FILE = "prompts_and_classes.txt"
SETTINGS_FILE = "settings.json"
LIVE_CLASSES = ("cat", "dog")  # get the paper's prompts for living subjects; the others those for objects
COLUMNS = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #8885 } img { max-width: 100% }
</style>
<h1>{{ title }}</h1>
<p>{{ note }}</p>
<table><tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for name in subjects %}<h2>{{ name }}</h2>
<p><a href="{{ name }}/result/report.html">report</a></p>
<img src="{{ name }}/result/comparison.png" alt="{{ name }}: photos, the base, the result" loading="lazy">
{% endfor %}</html>
"""
)


class Subject(NamedTuple):
    """A folder of photos and what they show."""

    name: str
    class_name: str
    photos: Path

    @property
    def kind(self) -> str:
        """Which of the paper's prompt lists it gets."""
        return "live" if self.class_name in LIVE_CLASSES else "object"


class Mean(NamedTuple):
    """Of a metric over subjects, each subject's own mean counted once."""

    value: float
    interval: list[float] | None
    num_subjects: int


def main(argv: list[str] | None = None) -> None:
    """Trains, draws and scores every subject that is not done; writes the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args, training = parse_args(argv[:split]), argv[split + 1 :]
    subjects = find_subjects(args.data, args.subjects)
    check_settings(args, training)
    failed = run_all(subjects, lambda subject, gpu: run_subject(subject, args, training, gpu), num_gpus())
    measured = {s.name: found for s in subjects if (found := read_result(args.out / s.name / "result"))}
    if measured:
        write_tables(args.out, measured)
        print(markdown(*table(measured)))
        print(f"Look at {args.out / 'table.html'}")
    if failed:
        raise RunFailed(f"{len(failed)} of {len(subjects)} subjects failed, {failed[0]}; start it again to go on")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m bench.dreambench", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="google/dreambooth's dataset folder, or a part of it")
    add("out", type=Path, metavar="OUT", help="where models, images and the table go")
    add("--pretrained_model_name_or_path", type=Path, required=True, metavar="FOLDER", help="the base")
    add("--subjects", nargs="+", metavar="NAME", help="these only (all that have a folder)")
    add("--identifier", default="sks", help="the subject's name in prompts (sks)")
    add("--num_images", type=positive_int, default=4, help="a prompt (4, as in the paper)")
    add("--num_inference_steps", type=positive_int, default=50, help="denoising steps (50)")
    add(
        "--clip_model",
        type=Path,
        metavar="FOLDER",
        help="for evaluate.py; the paper's is openai/clip-vit-base-patch32",
    )
    add("--dino_model", type=Path, metavar="FOLDER", help="for evaluate.py; the paper's is facebook/dino-vits16")
    add("--discard_models", action="store_true", help="delete a subject's model when it is scored (3.4 GB each)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def find_subjects(data: Path, wanted: list[str] | None) -> list[Subject]:
    """The subjects whose photos and classes are there, by name. Raises UserError."""
    try:
        text = (data / CLASSES_FILE).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{data / CLASSES_FILE} cannot be read ({error.strerror}): give google/dreambooth's dataset"
        ) from None
    classes = dict(re.findall(r"^(\w+),([^,\n]+?)\s*$", text, re.MULTILINE))
    there = [name for name in sorted(classes) if (data / name).is_dir()]
    unknown = [name for name in wanted or [] if name not in there]
    if unknown or not there:
        raise UserError(f"{data} has no subject {', '.join(unknown)}: it has {', '.join(there) or 'none'}")
    return [Subject(name, classes[name], data / name) for name in there if not wanted or name in wanted]


def check_settings(args: argparse.Namespace, training: list[str]) -> None:
    """One folder holds one table: raises UserError if it was begun with other settings."""
    kept = ("pretrained_model_name_or_path", "identifier", "num_images", "num_inference_steps")
    settings = {name: str(getattr(args, name)) for name in kept} | dict(training=training)
    known = read_json_or_none(args.out / SETTINGS_FILE)
    if known is not None and known != settings:
        changed = sorted(name for name in settings if known.get(name) != settings[name])
        raise UserError(f"{args.out} holds a table made with another {', '.join(changed)}: name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / SETTINGS_FILE, settings)


def num_gpus() -> int:
    """How many subjects are worked on at once."""
    return torch.cuda.device_count()


def run_all(subjects: list[Subject], run: Callable[[Subject, int | None], None], num_gpus: int) -> list[str]:
    """`run(subject, GPU's number)` for all, as many at once as there are GPUs; what failed, in a phrase each."""
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for number in range(num_gpus) if num_gpus else [None]:
        free.put(number)

    def work(subject: Subject) -> str | None:
        gpu = free.get()
        try:
            run(subject, gpu)
            return None
        except RunFailed as error:
            print(f"{subject.name}: {error}", file=sys.stderr, flush=True)
            return f"{subject.name}: {error}"
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(max(1, num_gpus)) as workers:
        return [phrase for phrase in workers.map(work, subjects) if phrase]


def run_subject(subject: Subject, args: argparse.Namespace, training: list[str], gpu: int | None) -> None:
    """Trains and evaluates a subject, as far as that is not done. Raises RunFailed."""
    folder = args.out / subject.name
    if read_result(folder / "result") is not None:
        print(f"{subject.name}: done already", flush=True)
        return
    folder.mkdir(exist_ok=True)
    record = run_of(folder / "model")
    if record.get("status") != "complete":
        call(subject, [*training_command(subject, args, training), "--resume_from_checkpoint=latest"], folder, gpu)
    call(subject, evaluation_command(subject, args), folder, gpu)
    if args.discard_models:
        shutil.rmtree(folder / "model")


def training_command(subject: Subject, args: argparse.Namespace, training: list[str]) -> list[str]:
    """Of one subject, without resuming."""
    named = f"{args.identifier} {subject.class_name}"
    return [
        "train_dreambooth_colossalai.py",
        f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path.resolve()}",
        f"--instance_data_dir={subject.photos.resolve()}",
        f"--instance_prompt=a photo of {article(named)} {named}",
        f"--output_dir={(args.out / subject.name / 'model').resolve()}",
        *training,
    ]


def evaluation_command(subject: Subject, args: argparse.Namespace) -> list[str]:
    """The paper's 25 prompts, and nothing else."""
    folder = (args.out / subject.name).resolve()
    command = ["evaluate.py", f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path.resolve()}"]
    command += [f"--finetuned_model_name_or_path={folder / 'model'}", f"--output_dir={folder / 'result'}"]
    command += [f"--instance_data_dir={subject.photos.resolve()}", f"--dreambench={subject.kind}"]
    command += [f"--identifier={args.identifier}", f"--class_name={subject.class_name}", "--num_drift_images=0"]
    command += [f"--num_images={args.num_images}", f"--num_inference_steps={args.num_inference_steps}"]
    models = {"clip_model": args.clip_model, "dino_model": args.dino_model}
    return command + [f"--{flag}={path.resolve()}" for flag, path in models.items() if path]


def call(subject: Subject, command: list[str], folder: Path, gpu: int | None) -> None:
    """Runs a script of this project on one GPU; its words go to log.txt. Raises RunFailed with its last line."""
    print(f"{subject.name}: {command[0]}", flush=True)
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible(gpu)})
    with (folder / "log.txt").open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        end = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if end.returncode:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        raise RunFailed(
            f"{command[0]} ended with {end.returncode} ({last.strip()}; all of it in {folder / 'log.txt'})"
        )


def visible(gpu: int) -> str:
    """CUDA_VISIBLE_DEVICES for the GPU of this number among those that are visible now."""
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return shown[gpu] if shown else str(gpu)


def read_result(folder: Path) -> dict | None:
    """metrics.json of a whole evaluation; None if there is none."""
    if not (folder / SAMPLES_FILE).is_file():
        return None
    try:
        return read_metrics(folder, read_samples(folder))
    except UserError:
        return None


def table(measured: Mapping[str, dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): every subject's means over prompts and images, their means over subjects, and the paper's."""
    rows = []
    for name, metrics in measured.items():
        found = means({name: metrics}, FINETUNED)
        rows.append([name, *(cell(found.get(key)) for key in COLUMNS)])
    for model, title in ((FINETUNED, "mean of {} subjects"), (BASELINE, "the base, {} subjects")):
        found = means(measured, model)
        rows.append([title.format(len(measured)), *(cell(found.get(key)) for key in COLUMNS)])
    for title, values in PAPER.items():
        rows.append([f"{title} (paper)", *(f"{values[key]:.3f}" if key in values else "" for key in COLUMNS)])
    return ["", *COLUMNS.values()], rows


def means(measured: Mapping[str, dict], model: str) -> dict[str, Mean]:
    """By metric: the mean of {subject: metrics.json} for a model, with its 95% interval for other subjects like these
    if they are enough for one; a metric that a subject lacks is left out."""
    result = {}
    for metric in COLUMNS:
        entries = [metrics["models"][model].get(metric, {}) for metrics in measured.values()]
        values = [entry.get("value") for entry in entries]
        if values and None not in values:
            found = intervals.mean_change(np.array(values)[:, None], are_means=True)
            result[metric] = Mean(float(np.mean(values)), [found.low, found.high] if found else None, len(values))
    return result


def cell(mean: Mean | None) -> str:
    """0.668 (0.640 to 0.695): the mean and its 95% interval over subjects, if there are several."""
    if mean is None:
        return ""
    if mean.interval is None:
        return f"{mean.value:.3f}"
    low, high = max(mean.interval[0], -1), min(mean.interval[1], 1)  # a mean of cosines is not beyond
    return f"{mean.value:.3f} ({low:.3f} to {high:.3f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def write_tables(out: Path, measured: Mapping[str, dict]) -> None:
    """table.md, table.csv and table.html."""
    header, rows = table(measured)
    encoders = {name: (next(iter(measured.values()))["encoders"][name] or {}).get("name") for name in ("dino", "clip")}
    note = (
        "Means over images and prompts within a subject, then over subjects; in brackets 95% intervals over subjects. "
        f"Encoders: {', '.join(name for name in encoders.values() if name) or 'none'}. The paper's rows are by DINO "
        "ViT-S/16 and CLIP ViT-B/32: compare them with numbers by the same encoders only."
    )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["subject", *header[1:]], *rows])
    page = PAGE.render(title="DreamBench", note=note, header=header, rows=rows, subjects=list(measured))
    pages = {"table.md": f"{markdown(header, rows)}\n\n{note}\n", "table.csv": text.getvalue(), "table.html": page}
    for name, content in pages.items():
        replace_path(out / name, lambda part, content=content: part.write_bytes(content.encode()))


if __name__ == "__main__":
    sys.exit(run_main(main))
