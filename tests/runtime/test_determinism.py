"""--deterministic: its switches, a run on a GPU that is killed and resumed."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers.kernels import GPU_MARKS
from tests.helpers.script import EMBEDDED, RANK_PROGRAM, TRAIN, as_argv, bits, without_times
from utils.errors import RunFailed
from utils.runtime.determinism import CUBLAS_VARIABLE, deterministic_kernels


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, "wrong")  # so that it is as it was before, afterwards


def test_the_switches_are_set_and_put_back():
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled() and os.environ[CUBLAS_VARIABLE] == "wrong"
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_choice_of_the_users_that_is_deterministic_stays(monkeypatch):
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    with deterministic_kernels(True):
        assert os.environ[CUBLAS_VARIABLE] == ":16:8"


def test_an_operation_without_a_deterministic_kernel_is_one_line():
    with pytest.raises(
        RunFailed, match="^--deterministic: put_ does not have .*; leave the flag out, or update torch$"
    ):
        with deterministic_kernels(True):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def start(argv: list[str], killed_after: int | None = None) -> str:
    """A run in a process of its own, since a forked one cannot use the GPU; returns what it printed."""
    script = TRAIN if killed_after is None else RANK_PROGRAM
    environment = {name: value for name, value in os.environ.items() if name != CUBLAS_VARIABLE}
    environment["KILLED_AFTER"] = str(killed_after)
    result = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment)
    text = result.stdout + result.stderr
    assert result.returncode == (0 if killed_after is None else -signal.SIGKILL), text
    assert "could not be captured" not in text
    return text


RUNS = dict(
    plain=dict(),
    accumulation=dict(gradient_accumulation_steps=2),
    class_images=dict(
        with_prior_preservation=True, class_prompt="a photo of a cat.", num_class_images=3, sample_batch_size=3
    ),
)
DEVICES = [
    pytest.param("cuda", dict(mixed_precision="fp16"), marks=GPU_MARKS, id="cuda"),
    pytest.param("cpu", dict(mixed_precision="no"), marks=pytest.mark.slow, id="cpu"),
]


@pytest.mark.parametrize(("device", "precision"), DEVICES)
@pytest.mark.parametrize("kind", RUNS)
def test_a_deterministic_run_that_is_killed_and_resumed(flags, tmp_path, device, precision, kind):
    """20 steps of the embedded model, checkpoints every 5: killed twice, the second time soon after the resume."""
    changes = dict(pretrained_model_name_or_path=EMBEDDED, resolution=64, max_train_steps=20, checkpointing_steps=5)
    changes |= dict(deterministic=True, learning_rate=1e-4) | precision | RUNS[kind]
    if kind == "class_images":
        changes["class_data_dir"] = tmp_path / "class"
    argv, output = as_argv(flags | changes), tmp_path / "output"
    start(argv)
    whole, expected = bits(output), without_times(output)
    assert len({row["loss"] for row in expected}) == 20
    shutil.rmtree(output)
    first = random.Random(kind).randrange(6, 15)
    start(argv, killed_after=first)
    resumed = [*argv, "--resume_from_checkpoint=latest"]
    kept = first // 5 * 5
    assert f"resuming from {output}/checkpoint-{kept}" in start(resumed, killed_after=kept + 2)
    assert f"resuming from {output}/checkpoint-{kept}" in start(resumed)
    assert without_times(output) == expected
    assert bits(output) == whole
