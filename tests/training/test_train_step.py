"""The step in a CUDA graph against its eager definition, with the real script on a small model."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pipelines import write_photos
from tests.helpers.script import UNET_FILE, run, weight_change
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.train_step import WARM_UP_STEPS

pytestmark = pytest.mark.gpu


def graph_and_eager(flags: dict, tmp_path, capsys) -> tuple[list[dict], list[dict]]:
    """Rows of metrics.jsonl of both; the results lie in graph/ and eager/."""
    flags = flags | dict(learning_rate=1e-4, max_train_steps=WARM_UP_STEPS + 9)
    graph_rows = run(flags, output_dir=tmp_path / "graph")
    assert "could not be captured" not in capsys.readouterr().err
    return graph_rows, run(flags, output_dir=tmp_path / "eager", no_cuda_graph=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(train_batch_size=4),
        dict(gradient_accumulation_steps=2),
        dict(train_batch_size=4, gradient_checkpointing=True),
    ],
    ids=["plain", "accumulation", "checkpointing"],
)
@pytest.mark.parametrize("deterministic", [True, None])
def test_graph_and_eager_agree(flags, tmp_path, tiny_pipeline_dir, capsys, precision, changes, deterministic):
    """To the bit with deterministic kernels; without, attention's backward adds in an order of its own every time."""
    flags |= dict(mixed_precision=precision, deterministic=deterministic) | changes
    for graph_row, eager_row in zip(*graph_and_eager(flags, tmp_path, capsys), strict=True):
        for key in ("lr", "loss_scale", "skipped", *(("loss", "grad_norm") if deterministic else ())):
            assert graph_row[key] == eager_row[key]
        assert graph_row["loss"] == pytest.approx(eager_row["loss"], rel=1e-4 if precision == "no" else 2e-3)
    if deterministic:
        graph_weights, eager_weights = (load_file(tmp_path / name / UNET_FILE) for name in ("graph", "eager"))
        assert all(torch.equal(graph_weights[key], eager_weights[key]) for key in eager_weights)
    change, expected = (weight_change(tiny_pipeline_dir, tmp_path / name) for name in ("graph", "eager"))
    assert torch.nn.functional.cosine_similarity(change, expected, dim=0) > 0.99
    assert change.abs().max() > 1e-4


def test_prior_preservation_in_the_graph(prior, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    (photos / "photo-1.txt").write_text("my cat asleep")
    prior |= dict(instance_data_dir=photos, train_batch_size=4, snr_gamma=5, noise_offset=0.1)
    graph_rows, eager_rows = graph_and_eager(prior, tmp_path, capsys)
    for name in ("instance_loss", "class_loss"):
        assert [row[name] for row in graph_rows] == pytest.approx([row[name] for row in eager_rows], rel=1e-4)


def test_an_overflow_inside_the_graph_is_skipped(flags, monkeypatch):
    monkeypatch.setitem(MasterWeightsOptimizer.__init__.__kwdefaults__, "growth_interval", 1)
    rows = run(flags, learning_rate=1e-4, train_batch_size=4, mixed_precision="fp16", max_train_steps=40)
    skipped = [row for row in rows[WARM_UP_STEPS + 1 :] if row["skipped"]]
    assert skipped, "the scale doubles every step, so some step must overflow inside the graph"
    for row in skipped:
        following = next((later for later in rows if later["step"] == row["step"] + 1), None)
        assert following is None or following["loss_scale"] == row["loss_scale"] / 2
