"""The step in a CUDA graph against its eager definition, with the real script on a small model."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.photos import write_cut_out
from tests.helpers.pipelines import write_photos
from train_dreambooth_colossalai import main
from utils.training.optimizer import MasterWeightsOptimizer
from utils.training.train_step import WARM_UP_STEPS

NUM_STEPS = WARM_UP_STEPS + 9


def train(base, photos, output, *flags: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Rows of metrics.jsonl and the saved UNet's weights."""
    arguments = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}", f"--output_dir={output}"]
    arguments += ["--instance_prompt=a photo of my cat.", "--resolution=32", "--learning_rate=1e-4"]
    assert main([*arguments, f"--max_train_steps={NUM_STEPS}", *flags]) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize(
    "flags",
    [(), ("--gradient_accumulation_steps=2", "--train_batch_size=1"), ("--gradient_checkpointing",)],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_graph_and_eager_agree(tiny_pipeline_dir, photos_dir, tmp_path, capsys, precision, flags):
    """To the bit with deterministic kernels; without, attention's backward adds in an order of its own every time."""
    flags = (f"--mixed_precision={precision}", *flags)
    for deterministic in (("--deterministic",), ()):
        name = "-".join(("graph", *deterministic))
        graph_rows, graph_weights = train(tiny_pipeline_dir, photos_dir, tmp_path / name, *deterministic, *flags)
        assert "could not be captured" not in capsys.readouterr().err
        eager = (*deterministic, "--no_cuda_graph", *flags)
        eager_rows, eager_weights = train(tiny_pipeline_dir, photos_dir, tmp_path / f"eager-{name}", *eager)
        for graph_row, eager_row in zip(graph_rows, eager_rows, strict=True):
            for key in ("lr", "loss_scale", "skipped", *(("loss", "grad_norm") if deterministic else ())):
                assert graph_row[key] == eager_row[key]
            assert graph_row["loss"] == pytest.approx(eager_row["loss"], rel=1e-4 if precision == "no" else 2e-3)
        if deterministic:
            assert all(torch.equal(graph_weights[key], eager_weights[key]) for key in eager_weights)
    base = load_file(tiny_pipeline_dir / "unet" / "diffusion_pytorch_model.safetensors")
    change = torch.cat([(graph_weights[name] - base[name]).flatten() for name in base])
    expected = torch.cat([(eager_weights[name] - base[name]).flatten() for name in base])
    assert torch.nn.functional.cosine_similarity(change, expected, dim=0) > 0.99
    assert change.abs().max() > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_prior_preservation_in_the_graph(tiny_pipeline_dir, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos")
    (photos / "photo-1.txt").write_text("my cat asleep")
    flags = ["--mixed_precision=no", "--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}"]
    flags += ["--class_prompt=a photo of a cat.", "--num_class_images=5", "--snr_gamma=5", "--noise_offset=0.1"]
    graph_rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "graph", *flags)
    assert "could not be captured" not in capsys.readouterr().err
    eager_rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "eager", "--no_cuda_graph", *flags)
    for name in ("instance_loss", "class_loss"):
        assert [row[name] for row in graph_rows] == pytest.approx([row[name] for row in eager_rows], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_alpha_mask_in_the_graph(tiny_pipeline_dir, tmp_path, capsys):
    """Random crops of photos that are opaque on the left alone: the graph must read each step's own weights."""
    photos = write_cut_out(tmp_path / "photos", (64, 48))
    flags = ["--mixed_precision=no", "--train_batch_size=1"]
    graph_rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "graph", "--alpha_mask", *flags)
    assert "could not be captured" not in capsys.readouterr().err
    eager_rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "eager", "--alpha_mask", "--no_cuda_graph", *flags)
    assert [row["loss"] for row in graph_rows] == pytest.approx([row["loss"] for row in eager_rows], rel=1e-4)
    plain_rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "plain", *flags)
    assert [row["loss"] for row in plain_rows] != pytest.approx([row["loss"] for row in eager_rows], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_an_overflow_inside_the_graph_is_skipped(tiny_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.optimizer.GROWTH_INTERVAL", 1)

    monkeypatch.setitem(MasterWeightsOptimizer.__init__.__kwdefaults__, "growth_interval", 1)
    photos = write_photos(tmp_path / "photos")
    rows, _ = train(tiny_pipeline_dir, photos, tmp_path / "out", "--mixed_precision=fp16", "--max_train_steps=40")
    skipped = [row for row in rows[WARM_UP_STEPS + 1 :] if row["skipped"]]
    assert skipped, "the scale doubles every step, so some step must overflow inside the graph"
    for row in skipped:
        following = next((later for later in rows if later["step"] == row["step"] + 1), None)
        assert following is None or following["loss_scale"] == row["loss_scale"] / 2
