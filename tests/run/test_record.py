"""run.json and what stands beside it: what was done, said after it is in place."""

import errno
import json
import shutil

import pytest

from tests.helpers.script import LATEST, run, run_json
from utils import PROGRAM
from utils.errors import RunFailed
from utils.export import main as export_main
from utils.files.ownership import HOLDER_FILE, RUN_TYPES
from utils.models.card import changes_of, clean_record, settings_of
from utils.run import loop
from utils.run.record import start_output

PLANTED = [HOLDER_FILE, ".run.json.part", ".metrics.jsonl.part", "run.json.previous", "metrics.jsonl.previous"]


@pytest.mark.parametrize("target", ["a file", "a folder"])
def test_no_link_that_somebody_planted_is_followed(flags, output, tmp_path, target):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "step-000001-seed-0.png").write_text("theirs")
    (theirs / "file").write_text("theirs")
    run(flags)
    for name in (*PLANTED, ".assembling-x", "validation", "validation.previous"):
        (output / name).symlink_to(theirs if target == "a folder" else theirs / "file")
    run(flags)
    assert {path.name: path.read_text() for path in theirs.iterdir()} == dict.fromkeys(
        ["step-000001-seed-0.png", "file"], "theirs"
    )
    assert not [path for path in output.iterdir() if path.is_symlink()]


def test_what_a_kill_left_half_written_goes_at_the_next_start(tmp_path):
    for name in (".run.json.part", ".README.md.7.part"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".assembling-checkpoint-2-7/unet").mkdir(parents=True)
    start_output(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_was_changed_on_a_resume_and_when_is_said_everywhere(flags, output, tmp_path, photos_dir):
    run(flags, checkpointing_steps=2)
    first = run_json(output)
    (tmp_path / "fewer").mkdir()
    shutil.copy(photos_dir / "photo-1.jpg", tmp_path / "fewer")
    others = dict(instance_data_dir=tmp_path / "fewer", learning_rate=2e-3, max_train_steps=4, checkpointing_steps=4)
    run(flags, **LATEST, allow_changes=True, **others)
    (change,) = run_json(output)["changes"]
    assert change["step"] == 2 and change["changed"][0] == "--learning_rate: 0.001 -> 0.002"
    assert "photos: 'photo-0.jpg' has gone" in change["changed"] and len(change["changed"]) == 4
    assert run_json(output)["ancestors"] == [[first["run_id"], 2]]
    run(flags, **LATEST, **others | dict(max_train_steps=5))  # the same from now on: it stays said
    assert run_json(output)["changes"] == [change]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "Changed after step 2: --learning\\_rate: 0.001 -\\> 0.002; photos." in card and "photo-0" not in card
    assert clean_record(run_json(output))["changes"] == changes_of(run_json(output))
    assert "photo-0" not in json.dumps(clean_record(run_json(output)))


def test_settings_are_those_that_were_used(flags, output):
    changes = dict(scale_lr=True, use_8bit_adam=True, train_batch_size=2, gradient_accumulation_steps=2)
    found = run(flags, learning_rate=1e-5, lr_warmup_steps=None, max_train_steps=1, **changes)
    said = settings_of(run_json(output))
    assert said["learning_rate"] == found[0]["lr"] == 4e-5 and "scale_lr" not in said
    assert (said["optimizer"], said["samples_per_step"], said["num_ranks"]) == ("AdamW8bit", 4, 1)
    assert said["lr_warmup_steps"] == 0  # a constant schedule has none
    assert run_json(output)["arguments"]["learning_rate"] == 1e-5  # --config run.json repeats the run
    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "| learning_rate | 4e-05 |" in card and "| optimizer | AdamW8bit |" in card and "warmup_steps 500" not in card
    )


def no_space(monkeypatch, name: str) -> None:
    """For one function of the end of a run."""

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, name, fail)


def test_a_single_file_that_fails_is_named_and_the_result_is_whole(flags, output, tmp_path, monkeypatch):
    no_space(monkeypatch, "export_single_file")
    file = tmp_path / "x.safetensors"
    with pytest.raises(RunFailed, match=rf"{file} could not be written: No space.*whole, in {output}; to write it"):
        run(flags, export_single_file=file)
    assert run_json(output)["status"] == "complete" and (output / "README.md").is_file()


def test_a_card_that_cannot_be_written_does_not_end_the_run(flags, output, monkeypatch, capsys):
    monkeypatch.setattr(loop, "write_card", lambda result: {}["what a base's card holds"])
    run(flags)
    assert 'README.md could not be written: "what a base\'s card holds"' in capsys.readouterr().err
    assert run_json(output)["status"] == "complete"


def test_a_run_that_ends_early_says_so(flags, output, monkeypatch):
    no_space(monkeypatch, "commit_pipeline")
    with pytest.raises(RunFailed, match=f"the pipeline could not be written to {output}: No space"):
        run(flags)
    assert run_json(output)["status"] == "stopped"


@pytest.mark.parametrize("name", RUN_TYPES)
@pytest.mark.parametrize("value", ["x", 3, [3], {"a": []}, None])
def test_a_record_of_other_types_is_read_without_a_fault(tiny_pipeline_dir, tmp_path, name, value):
    """Of a later version, or edited by hand."""
    folder = shutil.copytree(tiny_pipeline_dir, tmp_path / "output")
    record = dict(program=PROGRAM, status="complete", arguments=dict(instance_prompt="x"), new=1)
    (folder / "run.json").write_text(json.dumps(record | {name: value}))
    weaker = ["--strength=0.5", f"--pretrained_model_name_or_path={tiny_pipeline_dir}"]
    for argv in (["cat.safetensors"], ["cat", *weaker]):
        assert export_main([str(folder), str(tmp_path / argv[0]), *argv[1:]]) is None
    assert (tmp_path / "cat/README.md").is_file()
