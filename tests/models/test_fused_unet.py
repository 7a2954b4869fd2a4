"""The UNet with fused operations computes what diffusers' computes."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D

from tests.helpers.graphs import replace_graphs
from tests.helpers.kernels import DEVICES, relative_error
from tests.helpers.pipelines import UNET_CONFIG
from utils.models import captured_unet, fused_unet
from utils.models.drawing import sample
from utils.models.folder import read_base
from utils.models.loading import load_pipeline
from utils.training.flat_parameters import FlatParameters
from utils.training.train_step import fastest_step

WIDER = UNET_CONFIG | dict(block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=4)


def small_unet(device, dtype=torch.float32, flattens=True):
    """A UNet in channels_last; with `flattens` its parameters lie one after the other in one buffer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**WIDER).to(device).to(memory_format=torch.channels_last)
    if flattens:
        FlatParameters(unet, dtype, device, torch.channels_last)
    return unet.to(dtype).train()


def unet_inputs(device, dtype=torch.float32):
    torch.manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return sample, torch.tensor([3, 500], device=device), torch.randn(2, 7, 32, device=device).to(dtype)


ALL_FUSED = dict(ResnetBlock2D=8, Transformer2DModel=4, BasicTransformerBlock=4, TimestepEmbedding=1, GroupNorm=1)


def fused(network) -> dict[str, int]:
    """How many modules of each class have a fused forward."""
    return Counter(type(module).__name__ for module in network.modules() if "forward" in module.__dict__)


def forward_backward(unet, inputs):
    unet.zero_grad()
    model_pred = unet(*inputs).sample
    model_pred.float().square().mean().backward()
    return [model_pred.detach(), *(parameter.grad.clone() for parameter in unet.parameters())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flattens", [False, True])
def test_fused_unet_computes_the_same(device, flattens):
    tolerance = 1e-4 if device == "cuda" else 2e-5  # on a GPU attention's backward adds in any order
    unet, inputs = small_unet(device, flattens=flattens), unet_inputs(device)
    names, modules = list(unet.state_dict()), [type(module) for module in unet.modules()]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = forward_backward(unet, inputs)
        for _ in range(2):
            fused_unet.install(unet)
            assert fused(unet) == ALL_FUSED and fused_unet.what_is_not_fused(unet) is None
        result = forward_backward(unet, inputs)
        assert max(map(relative_error, result, plain)) < tolerance
        assert names == list(unet.state_dict()) and modules == [type(module) for module in unet.modules()]
        unet.enable_gradient_checkpointing()
        assert max(map(relative_error, forward_backward(unet, inputs), result)) < tolerance
        unet.disable_gradient_checkpointing()
        fused_unet.uninstall(unet)
        assert not any("forward" in module.__dict__ for module in unet.modules())
        assert max(map(relative_error, forward_backward(unet, inputs), plain)) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_what_precedes_the_prompts_is_computed_once_for_equal_halves(device, monkeypatch):
    unet, (sample, timesteps, prompts) = small_unet(device), unet_inputs(device)
    sample, timesteps, prompts = sample.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([prompts, -prompts])
    batches, attend = [], F.scaled_dot_product_attention

    def counted(query, *others):
        batches.append(len(query))
        return attend(query, *others)

    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = unet(sample, timesteps, prompts).sample
        fused_unet.install(unet, equal_halves=True)
        assert fused(unet) == ALL_FUSED
        monkeypatch.setattr(fused_unet.F, "scaled_dot_product_attention", counted)
        assert relative_error(unet(sample, timesteps, prompts).sample, plain) < 2e-5
    assert batches == [2] + 7 * [4]


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_decoder_computes_the_same(device):
    torch.manual_seed(0)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **kinds).to(device)
    latents = torch.randn(2, 4, 8, 6, device=device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = vae.decode(latents).sample
        fused_unet.install_decoder(vae.decoder)
        assert fused(vae.decoder) == dict(ResnetBlock2D=6, GroupNorm=1)
        assert relative_error(vae.decode(latents).sample, plain) < 2e-5
        fused_unet.uninstall(vae.decoder)
    assert not any("forward" in module.__dict__ for module in vae.modules())


def test_fused_unet_knows_attention_masks():
    unet, inputs = small_unet("cpu"), unet_inputs("cpu")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    plain = unet(*inputs, encoder_attention_mask=mask).sample
    fused_unet.install(unet)
    assert relative_error(unet(*inputs, encoder_attention_mask=mask).sample, plain) < 1e-5


def test_fused_unet_leaves_the_unfamiliar_alone():
    unet = small_unet("cpu")
    unet.down_blocks[0].resnets[0].time_embedding_norm = "scale_shift"
    unet.down_blocks[1].resnets[0].conv1.register_forward_hook(lambda *_: None)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[1].p = 0.1
    unet.up_blocks[0].resnets[0].dropout.p = 0.1
    fused_unet.install(unet)
    assert fused(unet) == dict(ResnetBlock2D=5, Transformer2DModel=3, BasicTransformerBlock=3, GroupNorm=1)


@pytest.fixture
def rename():
    """Gives a class another name, as a later diffusers might."""
    renamed = {}

    def give_another_name(kind: type) -> None:
        renamed[kind], kind.__name__ = kind.__name__, f"New{kind.__name__}"

    yield give_another_name
    for kind, name in renamed.items():
        kind.__name__ = name


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (ResnetBlock2D, "ResnetBlock2D, time_embedding"),
        (Transformer2DModel, "BasicTransformerBlock, Transformer2DModel"),
        (BasicTransformerBlock, "BasicTransformerBlock, Transformer2DModel"),
        (AttnProcessor2_0, "BasicTransformerBlock, Transformer2DModel"),
        (GEGLU, "BasicTransformerBlock, Transformer2DModel"),
        (CrossAttnDownBlock2D, "time_embedding"),
        (UNetMidBlock2DCrossAttn, "time_embedding"),
        (UpBlock2D, "time_embedding"),
    ],
)
def test_a_class_that_diffusers_renames_is_named_in_one_line(kind, changed, rename):
    unet, inputs = small_unet("cpu"), unet_inputs("cpu")
    plain = unet(*inputs).sample
    rename(kind)
    fused_unet.install(unet)
    line = fused_unet.what_is_not_fused(unet)
    assert line.startswith(f"the UNet runs without fused kernels in {changed}, more slowly: diffusers ")
    assert relative_error(unet(*inputs).sample, plain) < 2e-5


@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_run_and_a_drawing_say_what_is_not_fused(is_renamed, tiny_pipeline_dir, rename, monkeypatch):
    """Once each: in training when its kernels are compiled, in drawing when the first graph is captured."""
    pipeline = load_pipeline(read_base(tiny_pipeline_dir), torch.float32, torch.device("cpu"))
    replace_graphs(monkeypatch)
    if is_renamed:
        rename(GEGLU)
    drawing, training = [], []
    captured = captured_unet.CapturedUNet(drawing.append)
    monkeypatch.setattr(captured_unet.operations, "HAS_TRITON", True)
    for size in (32, 40):
        sample(pipeline, "a cat", [0], num_inference_steps=1, height=size, captured=captured)
    fused_unet.install(pipeline.unet)
    gpu = SimpleNamespace(flat=SimpleNamespace(device=torch.device("cuda")))
    unet = SimpleNamespace(unwrap=lambda: pipeline.unet)
    step = SimpleNamespace(unet=unet, optimizer=gpu, compile_kernels=lambda _: None)
    assert fastest_step(step, list, uses_cuda_graph=False, say=training.append) is step
    assert [len(drawing), len(training)] == [is_renamed, is_renamed] and drawing == training


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_unet_is_as_near_to_float32_as_the_plain_one(dtype):
    reference = forward_backward(small_unet("cuda"), unet_inputs("cuda"))
    unet, inputs = small_unet("cuda", dtype), unet_inputs("cuda", dtype)
    plain = [relative_error(*pair) for pair in zip(forward_backward(unet, inputs), reference, strict=True)]
    fused_unet.install(unet)
    fused = [relative_error(*pair) for pair in zip(forward_backward(unet, inputs), reference, strict=True)]
    assert fused[0] < 1.2 * plain[0]
    assert sum(fused) < 1.2 * sum(plain)


@pytest.mark.gpu
def test_fused_unet_is_captured_in_a_cuda_graph():
    unet, inputs = small_unet("cuda", torch.float16), unet_inputs("cuda", torch.float16)
    fused_unet.install(unet)
    eager = forward_backward(unet, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(unet, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(unet, inputs)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert max(map(relative_error, captured, eager)) < 5e-3
