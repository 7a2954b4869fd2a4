"""Promises of the documentation that show neither in a result nor in a message, observed from outside.

Durability, TensorBoard's curves.
"""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from tests.helpers.script import losses, run

RENAMED = re.compile(r"checkpoint-\d+|model_index\.json|scheduler|text_encoder|tokenizer|unet|vae")


class Disk:
    """Every sync and rename of this process, in order: (thread, "sync", path) or (thread, "rename", path, unsynced).

    `unsynced`: what of the thing renamed, files and folders, had not been synced under the name that it had then.
    """

    def __init__(self, monkeypatch):
        self.events: list[tuple] = []
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.note_sync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self.noting(getattr(os, name)))

    def note_sync(self, descriptor) -> None:
        """os.fsync, of a file or a descriptor."""
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.fsync(number)
        self.events.append((threading.get_ident(), "sync", os.readlink(f"/proc/self/fd/{number}")))

    def noting(self, rename):
        """os.rename or os.replace, noted."""

        def noted(source, target) -> None:
            synced = {event[2] for event in self.events if event[1] == "sync"}
            source, target = Path(source), Path(target)
            below = [str(path) for path in [source, *source.rglob("*")]]
            rename(source, target)
            self.events.append((threading.get_ident(), "rename", target, sorted(set(below) - synced)))

        return noted


def test_everything_is_synced_before_it_is_put_in_its_place(flags, tmp_path, monkeypatch):
    output = tmp_path.resolve() / "output"
    disk = Disk(monkeypatch)
    run(flags, output_dir=output, checkpointing_steps=2)
    renames = [event for event in disk.events if event[1] == "rename" and event[2].parent == output]
    placed = {event[2].name: event for event in renames if RENAMED.fullmatch(event[2].name)}
    parts = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert placed.keys() == {"checkpoint-2"} | parts
    for name, (_, _, _, unsynced) in placed.items():
        assert unsynced == [], f"{name} was renamed before these were synced"
    # The folder itself holds the names: after the checkpoint's by the same thread, after the pipeline's last.
    for last in (placed["checkpoint-2"], placed["model_index.json"]):
        assert (last[0], "sync", str(output)) in disk.events[disk.events.index(last) :]


def test_tensorboard_shows_validation_and_no_step_twice_after_a_resume(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags |= dict(checkpointing_steps=2, report_to="tensorboard", validation_steps=2)
    run(flags)
    steps = run(flags, resume_from_checkpoint="checkpoint-2")  # step 3 anew
    events = EventAccumulator(str(tmp_path / "output/logs"))
    events.Reload()
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses(steps), 1)]
    rows = [json.loads(line) for line in (tmp_path / "output/validation.jsonl").read_text().splitlines()]
    found = [(scalar.step, scalar.value) for scalar in events.Scalars("validation/loss")]
    assert found == [(row["step"], pytest.approx(row["validation_loss"], rel=1e-6)) for row in rows]
    assert [step for step, _ in found] == [0, 2]
    speeds = [scalar.value for scalar in events.Scalars("train/samples_per_second")]
    times = [1 / scalar.value for scalar in events.Scalars("train/step_time")]
    assert speeds == pytest.approx(times, rel=1e-5)  # one sample a step
    (_, settings) = events.Tensors("settings/text_summary")
    assert b"| learning_rate | " in settings.tensor_proto.string_val[0]
