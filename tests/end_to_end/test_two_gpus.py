"""NCCL: what test_ranks.py shows with gloo processes, on two GPUs."""

import signal

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.script import TRAIN, as_argv, launch, rows, start
from utils.data.class_images import read_metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
SPREAD = dict(mixed_precision="fp16", learning_rate=1e-4, save_dtype="fp32", train_batch_size=1)


def weights(output) -> dict:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def ranks(argv: dict, num_ranks: int = 2):
    return launch(num_ranks, as_argv(argv))


@pytest.mark.parametrize("no_cuda_graph", [None, True])
def test_two_ranks_train_as_one(flags, tmp_path, no_cuda_graph):
    flags |= SPREAD | dict(max_train_steps=24, no_cuda_graph=no_cuda_graph, mixed_precision="no")
    one = ranks(flags | dict(train_batch_size=2, output_dir=tmp_path / "one"), 1)
    two = ranks(flags | dict(output_dir=tmp_path / "two"))
    assert one.returncode == two.returncode == 0, two.stderr
    assert "could not be captured" not in two.stderr
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_accumulation_on_two_ranks(flags, tmp_path):
    flags |= SPREAD | dict(max_train_steps=16, mixed_precision="no")
    accumulated = dict(gradient_accumulation_steps=2, output_dir=tmp_path / "accumulated")
    assert ranks(flags | accumulated).returncode == 0
    assert ranks(flags | dict(train_batch_size=2, output_dir=tmp_path / "whole")).returncode == 0
    for ours, theirs in zip(rows(tmp_path / "accumulated"), rows(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_resumed_on_two_and_refused_on_one(flags, tmp_path):
    flags |= SPREAD | dict(max_train_steps=30, checkpointing_steps=15, deterministic=True)
    assert ranks(flags | dict(output_dir=tmp_path / "whole")).returncode == 0
    again = dict(output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-15")
    resumed = ranks(flags | again)
    assert resumed.returncode == 0, resumed.stderr
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "again").items())
    alone = ranks(flags | again | dict(output_dir=tmp_path / "alone"), 1)
    assert alone.returncode != 0 and "num_ranks: 2 -> 1" in alone.stderr
    changed = dict(output_dir=tmp_path / "changed", allow_changes=True, train_batch_size=2)
    assert ranks(flags | again | changed, 1).returncode == 0
    last, expected = rows(tmp_path / "changed")[-1], rows(tmp_path / "whole")[-1]
    assert last["step"] == 30 and last["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_class_images_are_shared_out(flags, tmp_path):
    folder = tmp_path / "class"
    prior = dict(with_prior_preservation=True, class_data_dir=folder, class_prompt="a photo of a cat.")
    result = ranks(flags | SPREAD | prior | dict(num_class_images=5, sample_batch_size=2, max_train_steps=3))
    assert result.returncode == 0, result.stderr
    images = sorted(folder.glob("*.png"))
    assert len(images) == 5 and len({read_metadata(path)["seed"] for path in images}) == 5


def test_a_killed_rank_ends_the_other_with_a_line(flags, tmp_path):
    process = start(
        ["--standalone", "--nproc_per_node", 2], TRAIN, as_argv(flags | SPREAD | dict(max_train_steps=20000))
    )
    while not (tmp_path / "output" / "metrics.jsonl").exists() or len(rows(tmp_path / "output")) < 20:
        assert process.poll() is None, process.communicate()
    children = psutil.Process(process.pid).children()
    victim = next(child for child in children if child.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and "exitcode: -9" in stderr or "exitcode  : -9" in stderr
    assert not (tmp_path / "output" / "model_index.json").exists()
