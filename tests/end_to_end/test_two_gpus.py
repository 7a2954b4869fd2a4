"""NCCL: what test_ranks.py shows with gloo processes, on two GPUs. A launch takes 16 s there: six serve all tests."""

import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.script import SHORT, TRAIN, UNET_FILE, as_argv, launch, rows, start
from train_dreambooth_colossalai import main
from utils.command_line import run_main
from utils.data.class_images import read_metadata

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]
NUM_STEPS, CHECKPOINT = 16, 8


@pytest.fixture(scope="module")
def flags(tiny_pipeline_dir, photos_dir) -> dict:
    """Two micro-batches of one sample a step on each rank, in fp16."""
    inputs = dict(pretrained_model_name_or_path=tiny_pipeline_dir, instance_data_dir=photos_dir)
    steps = dict(max_train_steps=NUM_STEPS, checkpointing_steps=CHECKPOINT, gradient_accumulation_steps=2)
    precision = dict(mixed_precision="fp16", save_dtype="fp32", learning_rate=1e-4, deterministic=True)
    return SHORT | inputs | steps | precision


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """The output of the run on two ranks."""
    output = tmp_path_factory.mktemp("whole") / "output"
    result = launch(2, as_argv(flags | dict(output_dir=output)))
    assert result.returncode == 0 and "could not be captured" not in result.stderr, result.stderr
    return output


@pytest.fixture(scope="module")
def from_checkpoint(flags, whole) -> dict:
    """The run from its checkpoint on; into which folder is left out."""
    return flags | dict(resume_from_checkpoint=whole / f"checkpoint-{CHECKPOINT}")


def resume(num_ranks: int, from_checkpoint: dict, output: Path, **changes) -> Path:
    result = launch(num_ranks, as_argv(from_checkpoint | dict(output_dir=output) | changes))
    assert result.returncode == 0 and "could not be captured" not in result.stderr, result.stderr
    return output


# The same four samples a step in fp32, in which sums may be compared.
IN_FP32 = dict(mixed_precision="no", allow_changes=True)


@pytest.fixture(scope="module")
def on_one_rank(from_checkpoint, tmp_path_factory) -> Path:
    whole_batch = dict(train_batch_size=4, gradient_accumulation_steps=1)
    return resume(1, from_checkpoint, tmp_path_factory.mktemp("one") / "output", **whole_batch, **IN_FP32)


def test_a_resumed_run_has_the_same_bits(whole, from_checkpoint, tmp_path):
    output = resume(2, from_checkpoint, tmp_path / "again")
    expected, found = load_file(whole / UNET_FILE), load_file(output / UNET_FILE)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_another_number_of_ranks_is_refused_unless_it_is_allowed(
    whole, from_checkpoint, on_one_rank, tmp_path, capsys
):
    assert run_main(main, as_argv(from_checkpoint | dict(output_dir=tmp_path / "alone"))) == 2
    assert "num_ranks: 2 -> 1" in capsys.readouterr().err
    last, expected = rows(on_one_rank)[-1], rows(whole)[-1]
    assert last["step"] == NUM_STEPS and last["loss"] == pytest.approx(expected["loss"], rel=0.02)


@pytest.mark.parametrize(
    "spread",
    [dict(), dict(train_batch_size=2, gradient_accumulation_steps=1, no_cuda_graph=True)],
    ids=["accumulated in a graph", "one batch without a graph"],
)
def test_two_ranks_train_as_one(from_checkpoint, on_one_rank, tmp_path, spread):
    output = resume(2, from_checkpoint, tmp_path / "two", **spread, **IN_FP32)
    found, expected = rows(output), rows(on_one_rank)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    found, expected = found[-CHECKPOINT:], expected[-CHECKPOINT:]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_class_images_are_shared_out_and_a_killed_rank_ends_the_other_with_a_line(flags, tmp_path):
    folder, output = tmp_path / "class", tmp_path / "output"
    prior = dict(with_prior_preservation=True, class_data_dir=folder, class_prompt="a photo of a cat.")
    changes = prior | dict(num_class_images=5, sample_batch_size=2, max_train_steps=20000, output_dir=output)
    process = start(["--standalone", "--nproc_per_node", 2], TRAIN, as_argv(flags | changes))
    while not (output / "metrics.jsonl").exists() or len(rows(output)) < 20:
        assert process.poll() is None, process.communicate()
    children = psutil.Process(process.pid).children()
    victim = next(child for child in children if child.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and ("exitcode: -9" in stderr or "exitcode  : -9" in stderr)
    assert not (output / "model_index.json").exists()
    images = sorted(folder.glob("*.png"))
    assert len(images) == 5 and len({read_metadata(path)["seed"] for path in images}) == 5
