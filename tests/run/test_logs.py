"""metrics.jsonl and TensorBoard."""

import itertools
import shutil
import time
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.processes import Process, after_step
from tests.helpers.script import as_argv, rows, run
from utils.run import logs
from utils.run.logs import TrainingLog
from utils.runtime import process
from utils.runtime.environment import DRAWS_AFTERWARDS
from utils.training.validation import Validation


def test_the_metrics_file_on_a_full_disk(flags, tmp_path):
    def full_metrics() -> None:
        start = TrainingLog.__init__

        def with_full_disk(self, *args, **kwargs):
            start(self, *args, **kwargs)
            self._file = open("/dev/full", "w", buffering=1)

        TrainingLog.__init__ = with_full_disk

    process = Process(as_argv(flags | dict(max_train_steps=60)), tmp_path / "text", full_metrics)
    assert process.wait() == 0
    assert process.text().count("could not be written (No space left on device); the training continues") == 1
    assert not (tmp_path / "output/logs").exists()  # TensorBoard's, which nobody asked for


def test_a_validation_on_a_full_disk(flags, output, tmp_path):
    validation = dict(validation_prompt="x", validation_steps=1, num_validation_images=1, validation_inference_steps=2)

    def nothing_of_it_can_be_written() -> None:
        (output / "validation.jsonl").unlink()
        (output / "validation.jsonl").mkdir()
        shutil.rmtree(output / "validation")
        (output / "validation").write_text("in the way")

    argv = as_argv(flags | validation | dict(max_train_steps=4))
    process = Process(argv, tmp_path / "text", after_step(2, nothing_of_it_can_be_written))
    assert process.wait() == 0, process.text()
    for name in ("validation.jsonl", "validation"):
        assert process.text().count(f"{output / name} could not be written (") == 1, name
    assert [process.text().count(f"step {step}: validation loss") for step in range(5)] == [1] * 5


def test_what_a_validation_takes_is_no_steps_time(flags, monkeypatch):
    measure = Validation.loss
    monkeypatch.setattr(Validation, "loss", lambda self: time.sleep(3) or measure(self))
    assert all(row["step_time"] < 3 for row in run(flags, validation_steps=2, max_train_steps=3))


def test_tensorboard_on_a_full_disk(flags, tmp_path):
    def full_boards() -> None:
        from torch.utils.tensorboard import SummaryWriter

        def full(self, *arguments, **options):
            raise OSError(28, "No space left on device")

        SummaryWriter.add_scalar = SummaryWriter.close = full

    argv = as_argv(flags | dict(report_to="tensorboard", validation_steps=2))
    process = Process(argv, tmp_path / "text", full_boards)
    assert process.wait() == 0, process.text()
    assert process.text().count("TensorBoard's files could not be written (No space left on device)") == 1
    assert len(rows(tmp_path / "output")) == 3


def test_steps_before_a_resume_do_not_stop_it(flags, output):
    """On a GPU a step's result may arrive after the run has asked whether to stop."""
    run(flags, checkpointing_steps=3)
    metrics = output / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"skipped": false', '"skipped": true'))
    plan = SimpleNamespace(num_steps=6, output_dir=output, validation=dict(every=0), arguments=dict(report_to="none"))
    log = TrainingLog(plan, 3, torch.device("cpu"), is_main=True)
    assert (log.nonfinite_streak, log.num_skipped) == (0, 3)
    log.close()


@pytest.mark.parametrize(("draws", "said"), [("1000", "about 8 min in all"), ("0", "about 4 min in all"), ("", "")])
def test_how_long_in_all(output, monkeypatch, capsys, draws, said):
    """100 steps of 2 s are left, then 1000 denoising steps of 0.5 x 2 s / 4 each; 10 s are over, and 6 s to come."""
    output.mkdir()
    monkeypatch.setenv(DRAWS_AFTERWARDS, draws)
    monkeypatch.setattr(process, "marks", {"first step": 6.0})
    monkeypatch.setattr(process, "seconds_so_far", lambda: 10.0)
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=itertools.count(step=2.0).__next__))
    plan = SimpleNamespace(
        num_steps=108, output_dir=output, validation=dict(every=0), arguments=dict(report_to="none")
    )
    plan.samples_per_step, plan.num_ranks, plan.class_images = 4, 1, None
    log = TrainingLog(plan, 0, torch.device("cpu"), is_main=True)
    for step in range(20):
        log.step(step + 1, torch.ones(len(logs.METRICS)))
    log.close()
    found = [line for line in capsys.readouterr().err.splitlines() if "in all" in line]
    assert [line.strip() for line in found] == [said] * bool(said)


def test_a_duration_in_words():
    said = [logs.in_words(seconds) for seconds in (41.2, 99, 160, 5900, 9000)]
    assert said == ["41 s", "99 s", "3 min", "98 min", "2.5 h"]


def test_the_next_command_is_said_unless_run_sh_runs_it(flags, monkeypatch, capsys):
    run(flags, max_train_steps=1)
    assert "To draw it beside the base, with scores:\n  " in capsys.readouterr().out
    monkeypatch.setenv(DRAWS_AFTERWARDS, "1")
    run(flags, max_train_steps=1, overwrite_output_dir=True)
    assert capsys.readouterr().out.endswith(f"; the pipeline is in {flags['output_dir']}\n")
