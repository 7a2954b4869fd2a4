"""The paper's table: subjects and classes, what is run and what is done already, means over subjects, two for real."""

import csv
import json
from pathlib import Path

import pytest

from bench import dreambench
from bench.dreambench import Subject, evaluation_command, find_subjects, parse_args, run_all, table, training_command
from tests.helpers.pipelines import write_photos
from tests.helpers.script import EMBEDDED, ROOT
from utils.command_line import run_main
from utils.errors import RunFailed, UserError

CLASSES = (
    "Classes\n\nsubject_name,class\nbear_plushie,stuffed animal\ncat,cat\nvase,vase\n\nPrompts\n\nprompt_list = [\n"
)


@pytest.fixture
def data(tmp_path) -> Path:
    """The data set's layout, of which the bear's photos are not there."""
    folder = tmp_path / "dreambench"
    for number, name in enumerate(("cat", "vase")):
        write_photos(folder / name, 3 + number)
    (folder / "prompts_and_classes.txt").write_text(CLASSES)
    return folder


def test_subjects_are_the_folders_that_are_there_with_their_classes(data):
    subjects = find_subjects(data, None)
    assert [(subject.name, subject.class_name, subject.kind) for subject in subjects] == [
        ("cat", "cat", "live"),
        ("vase", "vase", "object"),
    ]
    assert [subject.name for subject in find_subjects(data, ["vase"])] == ["vase"]
    with pytest.raises(UserError, match="has no subject bear_plushie: it has cat, vase"):
        find_subjects(data, ["bear_plushie"])
    with pytest.raises(UserError, match=r"prompts_and_classes\.txt cannot be read"):
        find_subjects(data / "cat", None)


def test_each_subject_gets_its_own_words(data, tmp_path):
    args = parse_args([str(data), str(tmp_path / "out"), "--pretrained_model_name_or_path", "base"])
    bear = Subject("bear_plushie", "stuffed animal", data / "bear_plushie")
    command = training_command(bear, args, ["--max_train_steps=7"])
    assert "--instance_prompt=a photo of a sks stuffed animal" in command and command[-1] == "--max_train_steps=7"
    command = evaluation_command(bear, args)
    assert {"--dreambench=object", "--class_name=stuffed animal", "--identifier=sks"} <= set(command)


def test_a_failure_stops_nobody_else_and_gpus_are_shared_out():
    subjects, seen = [Subject(name, name, Path(name)) for name in "abcde"], []

    def run(subject, gpu):
        seen.append(gpu)
        if subject.name == "b":
            raise RunFailed("it broke")

    assert run_all(subjects, run, 2) == ["b: it broke"]
    assert len(seen) == 5 and set(seen) <= {0, 1}
    seen.clear()
    run_all(subjects, run, 0)
    assert seen == [None] * 5


def metrics(**values) -> dict:
    of = {name: dict(value=value) for name, value in values.items()}
    base = {name: dict(value=value / 2) for name, value in values.items()}
    return dict(models=dict(baseline=base, finetuned=of), encoders=dict(clip=dict(name="CLIP"), dino=None))


def test_every_subject_counts_once(tmp_path):
    measured = {name: metrics(clip_i=value, clip_t=0.3) for name, value in (("a", 0.5), ("b", 0.6), ("c", 0.9))}
    header, rows = table(measured)
    assert header == ["", "DINO", "CLIP-I", "CLIP-T"]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["b"] == ["", "0.600", "0.300"]
    mean = by_name["mean of 3 subjects"][1]
    assert mean == "0.667" and by_name["the base, 3 subjects"][1].startswith("0.333")
    assert by_name["DreamBooth, Stable Diffusion (paper)"] == ["0.668", "0.803", "0.305"]
    dreambench.write_tables(tmp_path, measured)
    with (tmp_path / "table.csv").open() as file:
        assert list(csv.reader(file))[2] == ["b", "", "0.600", "0.300"]
    assert "| b | | 0.600 | 0.300 |" in (tmp_path / "table.md").read_text()
    assert "<td>0.600</td>" in (tmp_path / "table.html").read_text()


def test_a_mean_has_an_interval_from_25_subjects_on():
    for number, has_interval in ((24, False), (25, True)):
        _, rows = table({str(place): metrics(clip_i=0.5 + 0.01 * place) for place in range(number)})
        mean = {row[0]: row[2] for row in rows}[f"mean of {number} subjects"]
        assert mean.startswith(f"{0.5 + 0.005 * (number - 1):.3f}") and ("(" in mean) == has_interval


def test_a_folder_holds_one_table(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dreambench, "run_subject", lambda *_: None)
    argv = [str(data), str(tmp_path / "out"), "--pretrained_model_name_or_path", "base"]
    assert run_main(dreambench.main, argv) == 0
    assert run_main(dreambench.main, [*argv, "--", "--seed=1"]) == 2
    assert "made with another training" in capsys.readouterr().err


@pytest.mark.slow
def test_two_subjects_and_a_second_start_that_does_only_what_is_left(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out"
    argv = [str(data), str(out), "--pretrained_model_name_or_path", str(EMBEDDED), "--num_images=1"]
    argv += ["--num_inference_steps=1", "--discard_models"]
    training = ["--", "--resolution=64", "--max_train_steps=2", "--train_batch_size=1", "--lr_warmup_steps=0"]
    assert run_main(dreambench.main, [*argv, "--subjects", "cat", *training]) == 0
    assert not (out / "cat/model").exists() and (out / "cat/result/report.html").is_file()
    capsys.readouterr()
    assert run_main(dreambench.main, [*argv, *training]) == 0
    said = capsys.readouterr().out
    assert (
        "cat: done already" in said and "vase: train_dreambooth_colossalai.py" in said and "mean of 2 subjects" in said
    )
    samples = json.loads((out / "vase/result/samples.json").read_text())
    assert len(samples["prompts"]) >= 25 and sum(p["role"] == "subject" for p in samples["prompts"]) == 25
    assert (ROOT / "model/tiny-clip").name in json.loads((out / "vase/result/metrics.json").read_text())["encoders"][
        "clip"
    ]["name"]


def test_a_mean_over_subjects_needs_all_of_them():
    found = dreambench.means(dict(one=metrics(clip_i=0.8, clip_t=0.3), two=metrics(clip_i=0.6)), "finetuned")
    assert found.keys() == {"clip_i"} and found["clip_i"].value == pytest.approx(0.7)
    assert found["clip_i"].num_subjects == 2
    assert dreambench.means(dict(one=metrics(clip_i=0.8)), "finetuned")["clip_i"].interval is None
