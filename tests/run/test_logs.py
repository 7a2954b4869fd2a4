"""metrics.jsonl and TensorBoard."""

import pytest

from tests.helpers.processes import Process
from tests.helpers.script import as_argv, losses, run


def test_tensorboard(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(flags, report_to="tensorboard", logging_dir="boards")
    assert list((tmp_path / "output/boards").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "output/boards"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    assert [scalar.value for scalar in scalars] == pytest.approx(losses(found), rel=1e-6)


def test_without_tensorboard_there_are_no_logs(flags, tmp_path):
    run(flags, max_train_steps=1)
    assert not (tmp_path / "output/logs").exists()


def test_the_metrics_file_on_a_full_disk(flags, tmp_path):
    process = Process(as_argv(flags | dict(max_train_steps=60)), tmp_path / "text", full_metrics)
    assert process.wait() == 0
    assert process.text().count("could not be written (No space left on device); the training continues") == 1


def full_metrics() -> None:
    from utils.run import logs

    class Full:
        name = "metrics.jsonl"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError(28, "No space left on device")

        close = fileno

    start = logs.TrainingLog.__init__

    def with_full_disk(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self._file = Full()

    logs.TrainingLog.__init__ = with_full_disk
