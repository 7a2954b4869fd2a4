"""What goes wrong around a run: each fault ends with a clear line, the right exit code, and nothing half-written."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.pipelines import edit_json, write_photos
from tests.helpers.processes import Process, finish, pause_after, start_ranks, wait_for
from tests.helpers.script import LATEST, RANK_PROGRAM, TRAIN, UNET_FILE, as_argv, bits, rows, run, run_json, start
from train_dreambooth_colossalai import main
from utils.diffusion import Loss
from utils.errors import RunFailed, UserError
from utils.files.hashing import sha256_of
from utils.run.lineage import HASHES, list_checkpoints
from utils.run.loop import TrainingRun
from utils.runtime.ranks import EXIT_LOST_RANK


def limit_files_to(num_bytes: int):
    """The kernel itself refuses to write more into any file."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def no_debris(output: Path) -> bool:
    return not list(output.glob(".*"))


def test_no_space_for_a_checkpoint_does_not_end_the_training(flags, output, tmp_path):
    argv = as_argv(flags | dict(max_train_steps=5, checkpointing_steps=2))
    process = Process(argv, tmp_path / "text", limit_files_to(1_000_000))  # enough for the UNet, not for the moments
    assert process.wait() == 0
    assert f"checkpoint-2 could not be written to {output}: File too large" in process.text()
    assert not list(output.glob("checkpoint-*")) and no_debris(output)
    assert len(rows(output)) == 5 and run_json(output)["status"] == "complete"


def test_no_space_for_the_result_keeps_the_last_checkpoint(flags, output, tmp_path):
    run(flags, max_train_steps=4, output_dir=tmp_path / "whole")

    def full_at_last() -> None:
        commit = TrainingRun._write_pipeline

        def limited(self) -> None:
            limit_files_to(100_000)()
            commit(self)

        TrainingRun._write_pipeline = limited

    argv = as_argv(flags | dict(max_train_steps=4, checkpointing_steps=3))
    process = Process(argv, tmp_path / "text", full_at_last)
    assert process.wait() == 1
    text = process.text()
    assert f"error: the pipeline could not be written to {output}: " in text and "Traceback" not in text
    assert "The state after step 3 is in" in text and "--resume_from_checkpoint latest" in text
    assert not (output / "model_index.json").exists() and no_debris(output)
    assert Process([*argv, "--resume_from_checkpoint=latest"], tmp_path / "again").wait() == 0
    assert bits(output) == bits(tmp_path / "whole")


def test_no_space_for_the_checkpoint_of_a_signal(flags, output, tmp_path):
    argv = as_argv(flags | dict(max_train_steps=5000))
    process = Process(argv, tmp_path / "text", limit_files_to(1_000_000))
    wait_for(lambda: len(rows(output)) > 2)
    process.kill(signal.SIGTERM)
    assert process.wait() == 1
    assert "error: checkpoint-" in process.text() and "File too large" in process.text()
    assert not list(output.glob("checkpoint-*")) and no_debris(output)


@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_the_log_is_on_a_full_disk(flags, output, tmp_path, number):
    def log_to_a_full_disk() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1), os.dup2(full, 2)

    argv = as_argv(flags | dict(max_train_steps=5000 if number else 5, checkpointing_steps=2))
    process = Process(argv, tmp_path / "text", log_to_a_full_disk)
    if number:
        wait_for(lambda: len(rows(output)) > 2)
        process.kill(number)
    assert process.wait() == (128 + number if number else 0)
    assert run_json(output)["status"] == ("stopped" if number else "complete") and list_checkpoints(output)
    assert (output / "model_index.json").exists() == (number is None)


def act_after_3_steps(argv: list[str], tmp_path: Path, action: Callable[[], object]) -> tuple[int, str]:
    """A run's exit code and what it printed, if something happens in its middle."""
    done = tmp_path / "done"
    process = Process(argv, tmp_path / "text", pause_after(3, done.exists))
    wait_for(lambda: len(rows(tmp_path / "output")) > 2)
    action()
    done.touch()
    return process.wait(), process.text()


def test_the_output_folder_vanishes(flags, output, tmp_path):
    argv = as_argv(flags | dict(max_train_steps=12))
    code, text = act_after_3_steps(argv, tmp_path, lambda: output.rename(tmp_path / "moved"))
    assert code == 0, text
    assert (output / "model_index.json").is_file() and run_json(output)["status"] == "complete"


def test_the_output_folder_becomes_unwritable(flags, output, tmp_path):
    argv = as_argv(flags | dict(max_train_steps=12, checkpointing_steps=10))

    def put_something_in_the_way() -> None:
        output.rename(tmp_path / "moved")
        output.write_text("in the way")

    code, text = act_after_3_steps(argv, tmp_path, put_something_in_the_way)
    assert code == 1 and "error: the pipeline could not be written" in text
    assert "checkpoint-10 could not be written" in text
    assert "Traceback" not in text and output.read_text() == "in the way"


def test_a_photo_deleted_after_the_start_is_not_missed(flags, tmp_path):
    photos = write_photos(tmp_path / "photos", 3)
    argv = as_argv(flags | dict(max_train_steps=12, instance_data_dir=photos, checkpointing_steps=6))
    assert act_after_3_steps(argv, tmp_path, (photos / "photo-1.jpg").unlink)[0] == 0
    again = Process([*argv, "--resume_from_checkpoint=checkpoint-6"], tmp_path / "again")
    assert again.wait() == 2 and "photos: 'photo-1.jpg' has gone" in again.text()


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_the_base_changes_underneath(flags, output, tmp_path, base, change):
    config = base / "vae/config.json"
    content = config.read_text()
    argv = as_argv(flags | dict(max_train_steps=12, pretrained_model_name_or_path=base))
    spoil = config.unlink if change == "gone" else lambda: config.write_text(content + " ")
    code, text = act_after_3_steps(argv, tmp_path, spoil)
    assert code == 1 and "vae/config.json has changed since the start" in text and "Traceback" not in text
    assert not (output / "model_index.json").exists() and no_debris(output)
    config.write_text(content)
    assert list_checkpoints(output)[-1].step == 12
    assert Process([*argv, "--resume_from_checkpoint=latest"], tmp_path / "again").wait() == 0
    assert (output / "model_index.json").exists()


def test_a_base_that_was_touched_is_the_same(flags, output, tmp_path, base):
    argv = as_argv(flags | dict(max_train_steps=6, pretrained_model_name_or_path=base))
    code, _ = act_after_3_steps(argv, tmp_path, lambda: [path.touch() for path in base.rglob("*")])
    assert code == 0 and (output / "model_index.json").exists()


def test_a_rank_that_dies_ends_the_others(flags, output, tmp_path):
    ranks = start_ranks(2, as_argv(flags | dict(max_train_steps=5000, checkpointing_steps=3)), tmp_path / "text")
    wait_for(lambda: list_checkpoints(output))
    ranks[1].kill()
    assert finish(ranks) == [EXIT_LOST_RANK, -signal.SIGKILL]
    text = ranks[0].text()
    assert "error: rank 0: another process of this run has ended" in text, text
    assert "--resume_from_checkpoint latest" in text, text
    assert "Traceback" not in text and list_checkpoints(output)


def nan_after_step_5() -> None:
    loss, calls = Loss.mean, []

    def spoilt(*args):
        calls.append(None)
        return loss(*args) * (1 if len(calls) <= 5 else torch.nan)

    Loss.mean = spoilt


@pytest.mark.parametrize("max_train_steps", [500, 9])
def test_steps_that_are_not_finite_end_the_run(flags, output, tmp_path, max_train_steps):
    run(flags, max_train_steps=5, output_dir=tmp_path / "good")
    limits = dict(max_train_steps=max_train_steps, max_nonfinite_steps=4)
    argv = as_argv(flags | limits | dict(checkpointing_steps=2))
    process = Process(argv, tmp_path / "text", nan_after_step_5)
    assert process.wait() == 1
    text = process.text()
    assert "error: 4 steps in a row had no finite gradient, up to step 9" in text and "--learning_rate" in text
    assert f"{output}/checkpoint-9 (the last one that a finite loss came after: {output}/checkpoint-4)" in text
    assert [row["skipped"] for row in rows(output)] == [False] * 5 + [True] * 4
    kept, good = load_file(output / "checkpoint-9" / UNET_FILE), load_file(tmp_path / "good" / UNET_FILE)
    assert all(torch.equal(kept[name], good[name]) for name in good)
    assert not (output / "model_index.json").exists()


@pytest.mark.parametrize("changes", [dict(checkpointing_steps=3), {}, dict(max_train_steps=3)])
def test_weights_that_are_lost_are_not_kept(flags, output, changes):
    """Nor resumed from; the last good checkpoint is named."""
    run(flags, max_train_steps=2, checkpointing_steps=2)
    good = bits(output / "checkpoint-2")
    flags |= LATEST | dict(allow_changes=True, learning_rate=5e6, max_train_steps=4) | changes
    with pytest.raises(RunFailed, match=r"are not kept: --learning_rate is too large.*step 2 is in .*checkpoint-2"):
        main(as_argv(flags))
    assert [found.step for found in list_checkpoints(output)] == [2] and bits(output / "checkpoint-2") == good
    file, state = output / "checkpoint-2" / UNET_FILE, output / "checkpoint-2/state.json"
    save_file({name: 3 * value for name, value in load_file(file).items()}, file)
    hashes = json.loads(state.read_text())[HASHES] | {UNET_FILE: sha256_of(file)}
    edit_json(state, **{HASHES: hashes})
    with pytest.raises(
        UserError, match="checkpoint-2: its weights are 3 times as large as the base's; resume from an"
    ):
        main(as_argv(flags))


def test_a_run_whose_last_half_has_no_finite_loss_has_no_result(flags, output, tmp_path):
    for steps, code in ((9, 0), (10, 1)):
        argv = as_argv(flags | dict(max_train_steps=steps, output_dir=tmp_path / str(steps)))
        process = Process(argv, tmp_path / f"{steps}.txt", nan_after_step_5)
        assert process.wait() == code, process.text()
    assert "error: 5 steps in a row had no finite gradient" in process.text()


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_two_ranks(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED_AFTER", "5")
    argv = as_argv(flags | dict(max_train_steps=8, checkpointing_steps=2))
    assert finish(start_ranks(2, argv, tmp_path / "whole.txt")) == [0, 0]
    whole = bits(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    process = start(["--standalone", "--nproc_per_node=2", "--max_restarts=1"], RANK_PROGRAM, argv)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert bits(tmp_path / "output") == whole and len(rows(tmp_path / "output")) == 8
    assert run_json(tmp_path / "output")["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun(flags, output, tmp_path, number):
    """It passes the signal on, waits for the ranks, and ends with 1 and a traceback of its own alone."""
    process = start(["--standalone", "--nproc_per_node=2"], TRAIN, as_argv(flags | dict(max_train_steps=5000)))
    wait_for(lambda: len(rows(output)) > 2, 100)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    (checkpoint,) = list_checkpoints(output)
    assert checkpoint.step == len(rows(output)) and no_debris(output)
    assert stderr.count(f"stopped after step {checkpoint.step} of 5000 ({number.name}). The state after step") == 1
    assert process.returncode == 1 and stderr.count("Traceback") == stderr.count("SignalException: ") == 1
    again = as_argv(flags | LATEST | dict(max_train_steps=checkpoint.step + 2))
    assert finish(start_ranks(2, again, tmp_path / "again")) == [0, 0]
