"""The table of the checks: every problem at once, and a verdict."""

import json
from unittest.mock import ANY

import pytest

from tests.helpers.script import ROOT, as_argv, dry_run, rows, rows_of, run
from train_dreambooth_colossalai import main
from utils.arguments import parse_args
from utils.models.folder import FROZEN_PARTS, read_base
from utils.preflight.table import as_text
from utils.run.plan import memory_needs
from utils.training.memory import memory_needed


def test_a_dry_run_lists_every_problem(tmp_path, tiny_pipeline_dir, capsys):
    (tmp_path / "output").mkdir()
    (tmp_path / "output/mine.txt").write_text("mine")
    options = ("--resolution=33", "--tokenizer_name=nowhere")
    code, out, err = dry_run(tiny_pipeline_dir, tmp_path / "nowhere", tmp_path, capsys, *options)
    assert code == 2 and err == "" and out.splitlines()[-1].startswith("NOT READY: 4 to fix")
    problems = [finding for finding, verdict in rows_of(out).items() if verdict == "STOP"]
    for part in ("--resolution 33", "holds files that", "--instance_data_dir", "--tokenizer_name nowhere"):
        assert sum(part in problem for problem in problems) == 1


def test_a_run_shows_first_what_is_odd(flags, capsys):
    run(flags, max_train_steps=1, checkpoints_total_limit=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note  flag  --checkpoints_total_limit: no effect")
    assert lines[1].startswith("ready to train (") and lines[1].endswith("checks, 1 note; --dry_run lists them)")
    assert lines[2].startswith("4 photos at 32 px")


def test_a_dry_run_for_a_program(flags, output, tmp_path, capsys):
    """One object and nothing else; what a resumed run has still to do is known by the steps that it made."""
    run(flags, max_train_steps=4, checkpointing_steps=2)
    metrics = output / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row | dict(step_time=2.0)) + "\n" for row in rows(output)))
    capsys.readouterr()
    more = dict(json=True, dry_run=True, resume_from_checkpoint="latest", save_dtype="fp32", num_train_epochs=5)
    assert main(as_argv(flags | dict(max_train_steps=10, checkpointing_steps=3) | more)) == 0
    found = json.loads(capsys.readouterr().out)
    base = read_base(flags["pretrained_model_name_or_path"])
    copied = sum(path.stat().st_size for part in FROZEN_PARTS for path in base.files(part).values())
    assert found["disk"]["needed"] == copied + base.num_parameters * (4 + 2 * 12) and found["disk"]["free"] > 1e6
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert [name for name in found if f"`{name}`" not in page] == []
    assert found["training_seconds"] == 12.0 and found["exit_code"] == 0 and found["problems"] == []
    assert dict(check="flag", finding=ANY) in found["notes"] and found["settings"]["max_train_steps"] == 10
    assert found["host_memory"]["needed"] == 12 * base.num_parameters and found["gpu_memory"]["free"] is None
    needs = memory_needs(parse_args(as_argv(flags)), num_parameters=base.num_parameters, num_ranks=1)
    assert found["gpu_memory"]["needed"] == pytest.approx(memory_needed(needs), abs=1)
    assert main(as_argv(flags | dict(json=True, dry_run=True, output_dir=tmp_path / "new", resolution=33))) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2 and [each["check"] for each in found["problems"]] == ["resolution"]


def test_a_table_cannot_be_written_into_by_a_name():
    text = as_text([("photo", "a\nSTOP\x1b[31m 🐈", "ok")])
    assert text.count("\n") == 2 and "\x1b" not in text and "🐈" in text


def test_a_terminal_gets_no_line_that_is_too_long():
    rows = [("base model", "words " * 40 + "x" * 120, "ok"), ("disk", "short", "ok")]
    lines = as_text(rows, 100).splitlines()
    assert all(len(line) <= 100 for line in lines) and len(lines) > 5
    assert lines[2].startswith(" " * 18 + "words") and lines[-2] == "ok    disk        short"
    assert "".join("".join(lines[1:-2]).split()) == "ok" + "basemodel" + "words" * 40 + "x" * 120
    assert len(as_text(rows).splitlines()) == 4


def test_the_folders_are_said_in_full(tmp_path, tiny_pipeline_dir, photos_dir, capsys, monkeypatch):
    monkeypatch.chdir(photos_dir.parent)
    dry_run(tiny_pipeline_dir, photos_dir.relative_to(photos_dir.parent), tmp_path, capsys)
    out = dry_run(tiny_pipeline_dir, photos_dir.name, tmp_path, capsys)[1]
    for path in (f"4 in {photos_dir.resolve()}", tiny_pipeline_dir.resolve(), (tmp_path / "output").resolve()):
        assert rows_of(out)[str(path)] == "ok"


def test_the_examples_rows_fit_as_they_are_and_have_one_note(tmp_path, capsys):
    options = ("--resolution=64", "--checkpointing_steps=100", "--max_train_steps=300")
    base, photos = ROOT / "model/tiny-stable-diffusion", ROOT / "instance"
    code, out, _ = dry_run(base, photos, tmp_path, capsys, *options)
    lines = [line for line in out.splitlines() if str(ROOT) not in line and str(tmp_path) not in line]
    assert code == 0 and [line for line in lines if len(line) > 100] == [] and len(lines) > 10
    assert [line.split()[1] for line in lines if line.startswith("note")] == ["photo"]
    assert out.endswith(", 1 note)\n")
