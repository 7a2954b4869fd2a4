"""Images through graphs are the plain ones, whichever UNet the graphs' weights belong to."""

from shutil import copytree

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bench.random_sd14 import EMBEDDED
from tests.helpers.graphs import replace_graphs
from tests.helpers.pipelines import UNET_CONFIG, write_pipeline
from utils.kernels.operations import are_neighbours
from utils.models import captured_unet
from utils.models.captured_unet import CapturedUNet
from utils.models.drawing import sample
from utils.models.folder import read_base
from utils.models.loading import load_pipeline

CPU = torch.device("cpu")
PROMPT = "a photo of my cat."


@pytest.fixture
def stand_in(monkeypatch):
    return replace_graphs(monkeypatch)


def refuse(message: str) -> None:
    raise AssertionError(message)


def pixels(pipeline, seeds=(0, 1), num_inference_steps=3, **options) -> np.ndarray:
    images = sample(pipeline, PROMPT, list(seeds), num_inference_steps=num_inference_steps, **options)
    return np.stack([np.asarray(image, int) for image in images])


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipeline.unet.state_dict().items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one architecture."""
    root = tmp_path_factory.mktemp("models")
    return [write_pipeline(root / str(seed), seed) for seed in (0, 1)]


def test_a_decoder_that_cannot_be_fused_is_the_plain_one(folders, stand_in, monkeypatch):
    pipeline, said = load_pipeline(read_base(folders[0]), torch.float32, CPU), []
    plain = pixels(pipeline)

    def no_compiler(decoder):
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(captured_unet.operations, "HAS_TRITON", True)
    monkeypatch.setattr(captured_unet.fused_unet, "install_decoder", no_compiler)
    captured = CapturedUNet(said.append)
    for _ in range(2):
        assert np.abs(pixels(pipeline, captured=captured) - plain).max() <= 1
    assert said == ["images are decoded without fused kernels, more slowly: there is no compiler"]


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_models_take_turns_in_one_graph(folders, stand_in, guidance_scale):
    pipelines = [load_pipeline(read_base(folder), torch.float32, CPU) for folder in folders]
    weights = [weights_of(pipeline) for pipeline in pipelines]
    plain = [pixels(pipeline, guidance_scale=guidance_scale) for pipeline in pipelines]
    assert np.abs(plain[0] - plain[1]).max() > 5
    captured = CapturedUNet(refuse)
    for number in (0, 1, 1, 0, 1):
        images = pixels(pipelines[number], captured=captured, guidance_scale=guidance_scale)
        assert np.abs(images - plain[number]).max() <= 1
    assert stand_in.captures == 1
    for pipeline, expected in zip(pipelines, weights, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in pipeline.unet.state_dict().items())
        assert "forward" not in vars(pipeline.unet) and "set_timesteps" not in vars(pipeline.scheduler)


def test_a_model_that_is_gone_leaves_its_place(folders, stand_in):
    captured = CapturedUNet(refuse)
    for folder in (*folders, folders[0]):
        pipeline = load_pipeline(read_base(folder), torch.float32, CPU)
        plain = pixels(pipeline)
        assert np.abs(pixels(pipeline, captured=captured) - plain).max() <= 1
        del pipeline
    assert stand_in.captures == 1


def test_each_shape_has_its_graph(folders, stand_in):
    pipeline = load_pipeline(read_base(folders[0]), torch.float32, CPU)
    captured = CapturedUNet(refuse)
    plain = pixels(pipeline, seeds=range(5))
    for _ in range(2):
        assert np.abs(pixels(pipeline, seeds=range(5), batch_size=3, captured=captured) - plain).max() <= 1
    assert stand_in.captures == 2  # of three images and of two
    pixels(pipeline, height=40, captured=captured)
    assert stand_in.captures == 3


def test_another_architecture_starts_anew(folders, stand_in, tmp_path):
    other = write_pipeline(tmp_path / "other")
    UNet2DConditionModel(**UNET_CONFIG | dict(attention_head_dim=4)).save_pretrained(other / "unet")
    captured = CapturedUNet(refuse)
    for folder in (folders[0], other, folders[0]):
        pipeline = load_pipeline(read_base(folder), torch.float32, CPU)
        assert np.abs(pixels(pipeline, captured=captured) - pixels(pipeline)).max() <= 1
    assert stand_in.captures == 3


def test_where_a_capture_fails_the_plain_call_makes_the_image(folders, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured_unet, "_Graph", fail)
    monkeypatch.setattr(captured_unet.operations, "HAS_TRITON", False)
    pipeline, said = load_pipeline(read_base(folders[0]), torch.float32, CPU), []
    plain = pixels(pipeline)
    captured = CapturedUNet(said.append)
    for _ in range(2):
        assert np.abs(pixels(pipeline, captured=captured) - plain).max() <= 1
    assert said == ["the UNet samples without a CUDA graph, more slowly: not permitted when stream is capturing"]


def test_neighbouring_weights_follow_one_another_in_memory(folders):
    unet = load_pipeline(read_base(folders[0]), torch.float32, CPU).unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    captured_unet.into_one_buffer(list(unet.parameters()))
    assert len({parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}) == 1
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    weights = [linear.weight for linear in (attention.to_q, attention.to_k, attention.to_v)]
    assert are_neighbours(weights)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# On a GPU: the embedded model, 20 steps, guidance 7.5; differences in levels of 255.


@pytest.fixture(scope="module")
def changed_embedded(tmp_path_factory):
    """The embedded model with other weights in its UNet."""

    folder = copytree(EMBEDDED, tmp_path_factory.mktemp("changed") / "model")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: 0.9 * value for name, value in weights.items()}, path, {"format": "pt"})
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "largest", "mean"), [(torch.float32, 3, 0.05), (torch.float16, 255, 1.5)])
def test_graphs_draw_what_the_plain_pipeline_draws(changed_embedded, dtype, largest, mean):
    device = torch.device("cuda")
    options = dict(seeds=range(6), num_inference_steps=20, batch_size=4)
    pipelines = [load_pipeline(read_base(folder), dtype, device) for folder in (EMBEDDED, changed_embedded)]
    captured = CapturedUNet(refuse)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = [pixels(pipeline, **options) for pipeline in pipelines]
        assert np.abs(plain[0] - plain[1]).mean() > 10
        for number in (0, 1, 0):
            difference = np.abs(pixels(pipelines[number], captured=captured, **options) - plain[number])
            assert difference.max() <= largest and difference.mean() <= mean
        again = [pixels(pipeline, **options) for pipeline in pipelines]
    assert len(captured._graphs) == 2
    for images, expected in zip(again, plain, strict=True):  # the modules still hold their own weights
        assert np.abs(images - expected).mean() <= mean
