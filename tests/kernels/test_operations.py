"""The fused operations against float64 torch: by Triton on a GPU or (TRITON_INTERPRET=1) interpreted, else by torch.

The cases on a GPU are chosen so that few kernels are compiled: every shape and every option once, not all of them.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from tests.helpers.kernels import DEVICES, GPU_MARKS, INTERPRETED, adamw_scalars
from utils import fused_unet, kernels

ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
UNET_CONFIG = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=32,
    attention_head_dim=4,
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
OPTIONS = [(False, True, True), (True, False, True), (False, True, False)]  # shifted, forks, silu
SMALL_IMAGES = [(2, 64, 6, 10, 16), (1, 320, 4, 4, 32), (2, 1920, 1, 1, 32), (1, 96, 8, 8, 1)]
LARGE_IMAGES = [
    (1, 320, 64, 64, 32),
    (2, 960, 48, 80, 32),
    (1, 2560, 8, 8, 32),
    (8, 640, 32, 32, 32),
    (3, 66, 5, 7, 11),
]
TOKENS = [(6, 40), (64, 320), (33, 1000), (4096, 320), (1024, 640), (77, 1280)]


def on_gpu(*cases):
    return [pytest.param("cuda", *case, marks=GPU_MARKS) for case in cases]


def image_cases():
    """(device, dtype, shape, options) of every test of group_norm."""
    cpu = [("cpu", torch.float32, shape, options) for shape in SMALL_IMAGES for options in OPTIONS]
    cpu += [("cpu", torch.float16, SMALL_IMAGES[0], options) for options in OPTIONS]
    shapes = [*LARGE_IMAGES, *SMALL_IMAGES]
    gpu = [(torch.float16, shape, OPTIONS[number % 3]) for number, shape in enumerate(shapes)]
    gpu += [(torch.float16, LARGE_IMAGES[0], options) for options in OPTIONS[1:]]
    gpu += [(dtype, LARGE_IMAGES[1], OPTIONS[1]) for dtype in (torch.float32, torch.bfloat16)]
    return [*cpu, *on_gpu(*gpu)]


def token_cases():
    """(device, dtype, shape, (adds bias, adds residual)) of every test of add_layer_norm."""
    options = [(True, True), (True, False), (False, False)]
    cpu = [("cpu", torch.float32, shape, adds) for shape in TOKENS[:3] for adds in options]
    gpu = [(torch.float16, shape, options[number % 3]) for number, shape in enumerate(TOKENS)]
    gpu += [(dtype, TOKENS[2], options[0]) for dtype in (torch.float32, torch.bfloat16)]
    return [*cpu, *on_gpu(*gpu)]


FEW_CASES = [("cpu", torch.float32), *on_gpu((torch.float32,), (torch.float16,), (torch.bfloat16,))]


def relative_error(result, expected):
    return ((result.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm()).item()


def check(function, definition, arguments, num_outputs, tolerance):
    """Outputs and all gradients of function against definition in float64, for random output gradients."""
    arguments = [argument if argument is None else argument.requires_grad_() for argument in arguments]
    tensors = [argument for argument in arguments if argument is not None]
    doubles = [None if a is None else a.detach().double().requires_grad_() for a in arguments]
    outputs, expected = function(*arguments), definition(*doubles)
    outputs, expected = ((o,) if num_outputs == 1 else o for o in (outputs, expected))
    output_grads = [torch.randn_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, tensors, output_grads)
    expected_grads = torch.autograd.grad(
        expected, [d for d in doubles if d is not None], [g.double() for g in output_grads]
    )
    for result, reference in zip((*outputs, *grads), (*expected, *expected_grads), strict=True):
        assert result.shape == reference.shape and result.dtype == tensors[0].dtype
        assert relative_error(result, reference) < tolerance


def random_image(batch, channels, height, width, dtype, device):
    x = torch.randn(batch, height, width, channels, device=device).permute(0, 3, 1, 2)
    return (3 * x + 1).to(dtype)


@pytest.mark.parametrize("device, dtype, shape, options", image_cases(), ids=str)
def test_group_norm(device, dtype, shape, options):
    torch.manual_seed(0)
    shifted, forks, silu = options
    *size, num_groups = shape
    batch, channels = size[:2]
    weight, bias, shift_bias = (torch.randn(channels, device=device).to(dtype) for _ in range(3))
    shift = torch.randn(batch, channels, device=device).to(dtype)

    def fused(x, weight, bias, shift, shift_bias):
        return kernels.group_norm(x, weight, bias, num_groups, 1e-5, silu, shift, shift_bias, forks)

    def definition(x, weight, bias, shift, shift_bias):
        total = x if shift is None else x + shift[:, :, None, None] + shift_bias[:, None, None]
        y = F.group_norm(total, num_groups, weight, bias, 1e-5)
        y = F.silu(y) if silu else y
        return (y, x * 1) if forks else y

    arguments = [random_image(*size, dtype, device), weight, bias, *((shift, shift_bias) if shifted else (None, None))]
    tolerance = ROUNDING[dtype] * (1 if kernels.runs_triton(arguments[0]) else 3)
    check(fused, definition, arguments, 2 if forks else 1, tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_of_an_image_in_another_layout(device):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 9, device=device)[..., 1:]
    weight, bias = torch.randn(2, 32, device=device)
    y = kernels.group_norm(x, weight, bias, 8, 1e-5, True)
    assert relative_error(y, F.silu(F.group_norm(x, 8, weight, bias, 1e-5))) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_where_the_mean_is_large(device):
    torch.manual_seed(0)
    x = (1000 + torch.randn(1, 32, 8, 8, device=device)).contiguous(memory_format=torch.channels_last)
    if not kernels.runs_triton(x):
        pytest.skip("torch's own statistics of channels_last images on a CPU are 10% off here")
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    y = kernels.group_norm(x, weight, bias, 4, 1e-5, False)
    assert relative_error(y, F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)) < 2e-4


@pytest.mark.parametrize("device, dtype, shape, adds", token_cases(), ids=str)
def test_add_layer_norm(device, dtype, shape, adds):
    torch.manual_seed(0)
    (rows, features), (adds_bias, adds_residual) = shape, adds
    x, residual = torch.randn(2, 1, rows, features, device=device).to(dtype)
    weight, bias, x_bias = torch.randn(3, features, device=device).to(dtype)

    def definition(x, weight, bias, residual, x_bias):
        total = x if x_bias is None else x + x_bias
        total = total if residual is None else total + residual
        total = total * 1 + (total.detach().to(dtype).double() - total.detach())  # normalised as it is rounded
        return total, F.layer_norm(total, (features,), weight, bias, 1e-5)

    def fused(x, weight, bias, residual, x_bias):
        return kernels.add_layer_norm(x, weight, bias, 1e-5, residual, x_bias)

    arguments = [x, weight, bias, residual if adds_residual else None, x_bias if adds_bias else None]
    check(fused, definition, arguments, 2, ROUNDING[dtype])


@pytest.mark.parametrize("device, dtype", FEW_CASES)
@pytest.mark.parametrize("shape", [(1, 5, 2 * 40), (2, 64, 2 * 1280), (3, 77, 2 * 300)], ids=str)
def test_geglu(device, dtype, shape):
    torch.manual_seed(0)

    def definition(x):
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    check(kernels.geglu, definition, [(2 * torch.randn(shape, device=device)).to(dtype)], 1, ROUNDING[dtype])


@pytest.mark.parametrize("device, dtype", FEW_CASES)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_add_bias_residual(device, dtype, num_biases):
    torch.manual_seed(0)
    images = [random_image(2, 320, 5, 7, dtype, device) for _ in range(2)]
    biases = [torch.randn(320, device=device).to(dtype) for _ in range(num_biases)]

    def definition(x, residual, *biases):
        return x + residual + sum(bias[:, None, None] for bias in biases)

    check(kernels.add_bias_residual, definition, images + biases, 1, ROUNDING[dtype])


def adamw_state(num, weight_dtype, device):
    master = torch.randn(num, device=device) * 0.1
    weight = None if weight_dtype is None else master.to(weight_dtype)
    return weight, master, torch.zeros_like(master), torch.zeros_like(master)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("update", [kernels.adamw_, kernels.adamw_reference_], ids=["fused", "reference"])
def test_adamw_is_torch_adamw(device, weight_dtype, update):
    torch.manual_seed(0)
    weight, master, exp_avg, exp_avg_sq = adamw_state(5003, weight_dtype, device)
    expected = torch.nn.Parameter(master.clone())
    start = master.clone()
    optimizer = torch.optim.AdamW([expected], lr=1e-3, weight_decay=1e-2)
    for step in range(1, 21):
        grad = torch.randn(5003, device=device).to(weight_dtype or torch.float32)
        update(weight, grad, master, exp_avg, exp_avg_sq, adamw_scalars(step, 0.25, True, device))
        expected.grad = grad.float() * 0.25
        optimizer.step()
    assert relative_error(master - start, expected.detach() - start) < 1e-4
    if weight is not None and not (INTERPRETED and weight_dtype == torch.bfloat16):  # the interpreter truncates
        assert torch.equal(weight, master.to(weight_dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("update", [kernels.adamw_, kernels.adamw_reference_], ids=["fused", "reference"])
def test_adamw_skips_whatever_the_gradient_holds(device, update):
    torch.manual_seed(0)
    state = adamw_state(5003, torch.float16, device)
    before = [buffer.clone() for buffer in state]
    grad = torch.full((5003,), torch.nan, dtype=torch.float16, device=device)
    grad[::2] = torch.inf
    weight, master, exp_avg, exp_avg_sq = state
    update(weight, grad, master, exp_avg, exp_avg_sq, adamw_scalars(1, torch.nan, False, device), zero_grad=True)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))
    assert not grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numels", [(2048, 1024, 3000, 8, 512), (8, 1024, 2051)])
def test_scattered_gradients_give_what_flat_ones_give(device, weight_dtype, numels):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("says something about Triton only")
    assert kernels.gradient_table([5, 1024, 2048], device) is None
    compare_scattered_with_flat(kernels.gradient_table(list(numels), device), numels, weight_dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numels", [(5, 1024, 2051, 4096), (1023, 3, 2049, 1024)])
def test_scattered_gradients_of_parameters_at_odd_offsets(device, weight_dtype, numels):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("says something about Triton only")
    table = kernels.kernels_scattered.GradientTable(list(numels), device)
    assert not table.is_aligned
    compare_scattered_with_flat(table, numels, weight_dtype, device)


def compare_scattered_with_flat(table, numels, weight_dtype, device):
    """Three updates, the second of which is skipped."""
    torch.manual_seed(0)
    flat_state = adamw_state(sum(numels), weight_dtype, device)
    scattered_state = [None if buffer is None else buffer.clone() for buffer in flat_state]
    dtype = weight_dtype or torch.float32
    norms = torch.zeros(2, 1, device=device)
    for step, applies in ((1, True), (2, False), (3, True)):
        grad = torch.randn(sum(numels), device=device).to(dtype)
        grad = grad if applies else torch.full_like(grad, torch.nan)
        pieces = [piece.clone() for piece in grad.split(list(numels))]
        table.set_addresses(pieces)
        kernels.grad_norm_(grad, norms[0])
        table.grad_norm_(dtype, norms[1])
        assert relative_error(*norms) < 1e-5 if applies else norms.isnan().all()
        scalars = adamw_scalars(step, 0.25, applies, device)
        kernels.adamw_(flat_state[0], grad, *flat_state[1:], scalars)
        table.adamw_(scattered_state[0], dtype, *scattered_state[1:], scalars)
        for flat, scattered in zip(flat_state, scattered_state, strict=True):
            assert flat is None or torch.equal(flat, scattered)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num", [1, 4097, 100_003])
def test_grad_norm(device, num):
    torch.manual_seed(0)
    grad = torch.randn(num, device=device).half()
    out = torch.zeros(1, device=device)
    kernels.grad_norm_(grad, out)
    assert relative_error(out, grad.double().norm()) < 1e-5
    for value in (torch.inf, torch.nan):
        grad[num // 2] = value
        kernels.grad_norm_(grad, out)
        assert not out.isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_bit_reproducible(device):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("says something about Triton only")
    torch.manual_seed(0)
    size = (2, 320, 32, 32) if device == "cuda" else (2, 64, 8, 8)
    x = random_image(*size, torch.float32, device).requires_grad_()
    tokens = torch.randn(2, 64, 640, device=device).requires_grad_()
    weight, bias = torch.randn(2, size[1], device=device).requires_grad_()
    scale, offset = torch.randn(2, 640, device=device).requires_grad_()

    def run():
        torch.manual_seed(1)
        y, x_again = kernels.group_norm(x, weight, bias, 32, 1e-5, True, fork=True)
        total, normed = kernels.add_layer_norm(tokens, scale, offset, 1e-5, x_bias=offset)
        outputs = [y, x_again, total, normed, kernels.geglu(tokens)]
        grads = torch.autograd.grad(
            outputs, [x, weight, bias, tokens, scale, offset], [torch.randn_like(o) for o in outputs]
        )
        out = torch.zeros(1, device=device)
        kernels.grad_norm_(grads[0].flatten(), out)
        return *outputs, *grads, out

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def small_unet(device, dtype=torch.float32, flattens=True):
    """A UNet in channels_last; with `flattens` its parameters lie one after the other in one buffer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET_CONFIG).to(device, dtype).to(memory_format=torch.channels_last)
    if flattens:
        buffer = torch.empty(unet.num_parameters(), device=device, dtype=dtype)
        for parameter, flat in zip(
            unet.parameters(), buffer.split([p.numel() for p in unet.parameters()]), strict=True
        ):
            shape = parameter.shape
            is_image = parameter.dim() == 4
            view = flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if is_image else flat.view(shape)
            parameter.data = view.copy_(parameter.data)
    return unet.train()


def unet_inputs(device, dtype=torch.float32):
    torch.manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return sample, torch.tensor([3, 500], device=device), torch.randn(2, 7, 32, device=device).to(dtype)


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
        counts = fused_unet.install(unet)
        assert counts == dict(resnets=8, transformers=4, blocks=4, norm_out=1, time_embedding=1)
        assert fused_unet.install(unet) == counts
        fused = forward_backward(unet, inputs)
        assert max(map(relative_error, fused, plain)) < tolerance
        assert names == list(unet.state_dict()) and modules == [type(module) for module in unet.modules()]
        unet.enable_gradient_checkpointing()
        assert max(map(relative_error, forward_backward(unet, inputs), fused)) < tolerance
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
        counts = fused_unet.install(unet)
        assert fused_unet.install(unet, equal_halves=True) == counts
        monkeypatch.setattr(fused_unet.F, "scaled_dot_product_attention", counted)
        assert relative_error(unet(sample, timesteps, prompts).sample, plain) < 2e-5
    assert batches == [2] + 7 * [4]


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
    counts = fused_unet.install(unet)
    assert counts == dict(resnets=5, transformers=3, blocks=3, norm_out=1, time_embedding=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
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
