"""The fused operations against float64 torch: by Triton on a GPU or (TRITON_INTERPRET=1) interpreted, else by torch.

The cases on a GPU are chosen so that few kernels are compiled: every shape and every option once, not all of them.
"""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.kernels import DEVICES, GPU_MARKS, INTERPRETED, TRITON_ONLY, relative_error
from utils.kernels import operations

ROUNDING = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
OPTIONS = [(False, True, True), (True, False, True), (False, True, False)]  # shifted, forks, silu
SMALL_IMAGES = [(2, 64, 6, 10, 16), (2, 64, 18, 17, 16), (1, 320, 4, 4, 32), (2, 1920, 1, 1, 32), (1, 96, 8, 8, 1)]
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
    shifted, forks, silu = options
    *size, num_groups = shape
    batch, channels = size[:2]
    weight, bias, shift_bias = (torch.randn(channels, device=device).to(dtype) for _ in range(3))
    shift = torch.randn(batch, channels, device=device).to(dtype)

    def fused(x, weight, bias, shift, shift_bias):
        return operations.group_norm(x, weight, bias, num_groups, 1e-5, silu, shift, shift_bias, forks)

    def definition(x, weight, bias, shift, shift_bias):
        total = x if shift is None else x + shift[:, :, None, None] + shift_bias[:, None, None]
        y = F.group_norm(total, num_groups, weight, bias, 1e-5)
        y = F.silu(y) if silu else y
        return (y, x * 1) if forks else y

    arguments = [random_image(*size, dtype, device), weight, bias, *((shift, shift_bias) if shifted else (None, None))]
    tolerance = ROUNDING[dtype] * (1 if operations.runs_triton(arguments[0]) else 3)
    check(fused, definition, arguments, 2 if forks else 1, tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_of_an_image_in_another_layout(device):
    x = torch.randn(2, 32, 6, 9, device=device)[..., 1:]
    weight, bias = torch.randn(2, 32, device=device)
    y = operations.group_norm(x, weight, bias, 8, 1e-5, True)
    assert relative_error(y, F.silu(F.group_norm(x, 8, weight, bias, 1e-5))) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_group_norm_where_the_mean_is_large(device):
    x = (1000 + torch.randn(1, 32, 8, 8, device=device)).contiguous(memory_format=torch.channels_last)
    if not operations.runs_triton(x):
        pytest.skip("torch's own statistics of channels_last images on a CPU are 10% off here")
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    y = operations.group_norm(x, weight, bias, 4, 1e-5, False)
    assert relative_error(y, F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)) < 2e-4


@pytest.mark.parametrize("device, dtype, shape, adds", token_cases(), ids=str)
def test_add_layer_norm(device, dtype, shape, adds):
    (rows, features), (adds_bias, adds_residual) = shape, adds
    x, residual = torch.randn(2, 1, rows, features, device=device).to(dtype)
    weight, bias, x_bias = torch.randn(3, features, device=device).to(dtype)

    def definition(x, weight, bias, residual, x_bias):
        total = x if x_bias is None else x + x_bias
        total = total if residual is None else total + residual
        total = total * 1 + (total.detach().to(dtype).double() - total.detach())  # normalised as it is rounded
        return total, F.layer_norm(total, (features,), weight, bias, 1e-5)

    def fused(x, weight, bias, residual, x_bias):
        return operations.add_layer_norm(x, weight, bias, 1e-5, residual, x_bias)

    arguments = [x, weight, bias, residual if adds_residual else None, x_bias if adds_bias else None]
    check(fused, definition, arguments, 2, ROUNDING[dtype])


@pytest.mark.parametrize("device, dtype", FEW_CASES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 2 * 40), (2, 64, 2 * 1280), (3, 77, 2 * 300)], ids=str)
def test_geglu(device, dtype, has_bias, shape):
    def definition(x, bias=None):
        hidden, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    arguments = [2 * torch.randn(size, device=device) for size in (shape, shape[-1:])[: 1 + has_bias]]
    check(operations.geglu, definition, [argument.to(dtype) for argument in arguments], 1, ROUNDING[dtype])


@pytest.mark.parametrize("device, dtype", FEW_CASES)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_add_bias_residual(device, dtype, num_biases):
    images = [random_image(2, 320, 5, 7, dtype, device) for _ in range(2)]
    biases = [torch.randn(320, device=device).to(dtype) for _ in range(num_biases)]

    def definition(x, residual, *biases):
        return x + residual + sum(bias[:, None, None] for bias in biases)

    check(operations.add_bias_residual, definition, images + biases, 1, ROUNDING[dtype])


@pytest.mark.parametrize("device, dtype", FEW_CASES)
@pytest.mark.parametrize("rows", [3, 2000])
def test_add_bias_residual_of_tokens(device, dtype, rows):
    shapes = (1, rows, 72), (1, rows, 72), (72,)
    arguments = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    tolerance = ROUNDING[dtype] * (1 if operations.runs_triton(arguments[0]) else 20)  # torch's own sum on a CPU
    check(
        operations.add_bias_residual_of_tokens, lambda x, residual, bias: x + bias + residual, arguments, 1, tolerance
    )


@pytest.mark.parametrize("num_images, num_queries, num_keys, width", [(2, 1100, 77, 40), (1, 1024, 5, 64)])
@pytest.mark.parametrize("device, dtype", [("cpu", torch.float16), *on_gpu((torch.float16,), (torch.bfloat16,))])
def test_attention_to_few_keys(device, dtype, num_images, num_queries, num_keys, width):
    lengths = num_queries, num_keys, num_keys
    rows = [torch.randn(num_images, length, 2, width, device=device).to(dtype) for length in lengths]

    def attention(function):
        return lambda *rows: function(*(states.transpose(1, 2) for states in rows)).transpose(1, 2)

    check(attention(operations.attention), attention(F.scaled_dot_product_attention), rows, 1, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_bit_reproducible(device):
    if device == "cpu" and not INTERPRETED:
        pytest.skip(TRITON_ONLY)
    size = (2, 320, 32, 32) if device == "cuda" else (2, 64, 4, 4)
    x = random_image(*size, torch.float32, device).requires_grad_()
    tokens = torch.randn(2, 4 if INTERPRETED else 64, 640, device=device).requires_grad_()
    weight, bias = torch.randn(2, size[1], device=device).requires_grad_()
    scale, offset = torch.randn(2, 640, device=device).requires_grad_()

    def run():
        torch.manual_seed(1)
        y, x_again = operations.group_norm(x, weight, bias, 32, 1e-5, True, fork=True)
        total, normed = operations.add_layer_norm(tokens, scale, offset, 1e-5, x_bias=offset)
        outputs = [y, x_again, total, normed, operations.geglu(tokens)]
        grads = torch.autograd.grad(
            outputs, [x, weight, bias, tokens, scale, offset], [torch.randn_like(o) for o in outputs]
        )
        out = torch.zeros(1, device=device)
        operations.grad_norm_(grads[0].flatten(), out)
        return *outputs, *grads, out

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def weights() -> list[torch.nn.Parameter]:
    """Three weights [5, 6] that are neighbours in memory."""
    buffer = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return [torch.nn.Parameter(weight) for weight in buffer]


def gradients(outputs, weights, x) -> list[torch.Tensor]:
    """Those of a loss that tells the outputs apart, of x and of the weights; the weights' are left in `grad`."""
    x.grad = None
    sum((k * output.square()).sum() for k, output in enumerate(outputs, 1)).backward()
    return [x.grad, *(weight.grad for weight in weights)]


def expected(weights, x) -> list[torch.Tensor]:
    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    return gradients([F.linear(x, weight.flatten(1)) for weight in plain], plain, x)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["neighbours", "apart"])
def test_layers_of_one_input(weights, order):
    x = torch.randn(2, 4, 6, requires_grad=True)
    chosen = [weights[number] for number in order]
    outputs = operations.project(x, chosen)
    for output, weight in zip(outputs, chosen, strict=True):
        torch.testing.assert_close(output, F.linear(x, weight))
    torch.testing.assert_close(gradients(outputs, chosen, x), expected(chosen, x))


def test_a_1x1_convolution_in_channels_last(weights):
    weight = torch.nn.Parameter(torch.randn(5, 1, 1, 6).permute(0, 3, 1, 2))
    x = torch.randn(2, 3, 3, 6, requires_grad=True)
    found = gradients([operations.linear(x, weight)], [weight], x)
    assert found[1].stride() == weight.stride()
    x_grad, weight_grad = expected([weight], x)
    torch.testing.assert_close(found, [x_grad, weight_grad])


def test_gradients_are_written_where_they_are_to_lie(weights):
    x = torch.randn(2, 4, 6, requires_grad=True)
    places = list(torch.full((3, 5, 6), torch.nan))
    assert operations.are_neighbours(places)
    for weight, place in zip(weights, places, strict=True):
        setattr(weight, operations.GRAD_PLACE, place)
    found = gradients(operations.project(x, weights), weights, x)
    torch.testing.assert_close(found, expected(weights, x))
    assert [weight.grad.data_ptr() for weight in weights] == [place.data_ptr() for place in places]


def test_a_second_backward_pass_adds_to_the_first(weights):
    inputs = list(torch.randn(2, 2, 4, 6))
    for weight, place in zip(weights, torch.zeros(3, 5, 6), strict=True):
        setattr(weight, operations.GRAD_PLACE, place)
    sums = [torch.zeros(5, 6) for _ in weights]
    for x in inputs:
        found = gradients(operations.project(x.requires_grad_(), weights), weights, x)
        sums = [total + grad for total, grad in zip(sums, expected(weights, x)[1:], strict=True)]
    torch.testing.assert_close(found[1:], sums)


def test_places_that_are_apart_are_not_written_to(weights):
    x = torch.randn(2, 4, 6, requires_grad=True)
    places = [torch.full((5, 6), torch.nan) for _ in weights]
    for weight, place in zip(weights, places, strict=True):
        setattr(weight, operations.GRAD_PLACE, place)
    torch.testing.assert_close(gradients(operations.project(x, weights), weights, x), expected(weights, x))
    assert all(place.isnan().all() for place in places)
