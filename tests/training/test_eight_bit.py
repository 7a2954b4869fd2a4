"""AdamW's moments in 8 bits: what they lose, that they lose it once, and that runs with them resume exactly."""

import pytest
import torch

from tests.helpers.kernels import DEVICES, INTERPRETED, adamw_scalars
from tests.helpers.script import LATEST, as_argv, bits, run, without_times
from train_dreambooth_colossalai import main
from utils import kernels
from utils.eight_bit import BLOCK, EightBit
from utils.errors import UserError


def make(numel: int, signed: bool, device="cpu") -> EightBit:
    return EightBit.zeros(numel, signed=signed, device=torch.device(device), on_host=False)


def wide_values(numel: int, signed: bool) -> torch.Tensor:
    """Of magnitudes from 1e-30 to 1e3, one block of zeros among them."""
    values = torch.randn(numel) * torch.logspace(-30, 3, numel)
    values[BLOCK : 2 * BLOCK] = 0
    values[3 * BLOCK + 5 :: 1000] = 0
    return values if signed else values.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("numel", [1, 255, 256, 10_000])
def test_quantising_what_was_dequantised_gives_the_same_bits(signed, numel):
    torch.manual_seed(0)
    first, second = make(numel, signed), make(numel, signed)
    first.quantize_(wide_values(numel, signed))
    values = first.dequantize()
    second.quantize_(values)
    assert values.shape == (numel,) and values.isfinite().all()
    assert torch.equal(first.levels, second.levels) and torch.equal(first.scales, second.scales)
    assert torch.equal(values, second.dequantize())


@pytest.mark.parametrize("signed", [True, False])
def test_how_near_the_values_are(signed):
    torch.manual_seed(0)
    values = torch.randn(100 * BLOCK)
    values = values if signed else values.square()
    eight_bit = make(len(values), signed)
    eight_bit.quantize_(values)
    blocks, found = values.view(-1, BLOCK), eight_bit.dequantize().view(-1, BLOCK)
    largest = blocks.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest), blocks.gather(1, largest), rtol=1e-6, atol=0)
    assert ((found - blocks).norm() / blocks.norm()).item() < (0.01 if signed else 0.006)
    assert torch.equal(found == 0, blocks == 0) or signed  # the update divides by the second moment's root


def test_slices_copies_and_pieces(monkeypatch):
    monkeypatch.setattr("utils.eight_bit._PIECE", 2 * BLOCK)
    torch.manual_seed(0)
    values, device = torch.randn(5 * BLOCK + 3), torch.device("cpu")
    whole, in_pieces = make(len(values), True), make(len(values), True)
    whole.quantize_(values)
    in_pieces.write_from(values, device)
    assert torch.equal(whole.levels, in_pieces.levels) and torch.equal(whole.scales, in_pieces.scales)
    assert [piece.stop for piece in whole.pieces()] == [2 * BLOCK, 4 * BLOCK, 5 * BLOCK + 3]
    read = torch.empty_like(values)
    whole.read_into(read, device)
    assert torch.equal(read, whole.dequantize())
    assert torch.equal(whole[slice(BLOCK, 3 * BLOCK)].dequantize(), read[BLOCK : 3 * BLOCK])


def steps(device: str, numel: int, weight_dtype, num_steps: int, update) -> list[torch.Tensor]:
    """Weight, master and both moments' parts after `num_steps` of `update`, the third of which is skipped."""
    torch.manual_seed(0)
    master = torch.randn(numel, device=device) * 0.1
    weight = None if weight_dtype is None else master.to(weight_dtype)
    moments = make(numel, True, device), make(numel, False, device)
    for step in range(1, num_steps + 1):
        grad = torch.randn(numel, device=device) * torch.logspace(-5, 0, numel, device=device)
        grad = grad.to(weight_dtype or torch.float32)
        grad[300:600] = 0
        applies = step != 3
        grad[0] = grad[0] if applies else torch.nan
        before = [part.clone() for part in (moments[0].levels, moments[1].levels, master)]
        update(weight, grad, master, *moments, adamw_scalars(step, 0.25, applies, device))
        if not applies:
            assert torch.equal(before[0], moments[0].levels) and torch.equal(before[1], moments[1].levels)
            assert torch.equal(before[2], master)
    parts = [part for moment in moments for part in (moment.levels.float(), moment.scales)]
    return [master, *parts] if weight is None else [weight.float(), master, *parts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numel", [100, 4096, 5003])
def test_the_kernel_computes_what_torch_computes(device, weight_dtype, numel, monkeypatch):
    if device == "cpu" and not INTERPRETED:
        pytest.skip("says something about Triton only")
    found = steps(device, numel, weight_dtype, 5, kernels.adamw_8bit_)
    monkeypatch.setattr(kernels, "runs_triton", lambda x: False)
    expected = steps(device, numel, weight_dtype, 5, kernels.adamw_8bit_)
    for ours, theirs in zip(found[-4:], expected[-4:], strict=True):
        assert ((ours - theirs).abs() > 1e-6 * theirs.abs()).double().mean() <= 1e-3  # a level at a rounding boundary
    torch.testing.assert_close(found[-5], expected[-5], rtol=1e-5, atol=1e-6)
    if weight_dtype and not (INTERPRETED and weight_dtype == torch.bfloat16):  # the interpreter truncates
        assert torch.equal(found[0], found[1].to(weight_dtype).float())


@pytest.mark.parametrize("weight_dtype", [None, torch.float16])
def test_the_first_update_is_that_of_exact_moments(weight_dtype):
    """They are rounded after their use."""
    torch.manual_seed(0)
    master, grad = torch.randn(2, 1000)
    exact = master.clone()
    scalars = adamw_scalars(1, 0.25, True, "cpu")
    grad = grad.to(weight_dtype or torch.float32)
    kernels.adamw_8bit_(None, grad, master, make(1000, True), make(1000, False), scalars)
    kernels.adamw_reference_(None, grad, exact, torch.zeros(1000), torch.zeros(1000), scalars)
    assert torch.equal(master, exact)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_resumes_to_the_same_bits(flags, tmp_path, precision):
    options = dict(use_8bit_adam=True, mixed_precision=precision)
    run(flags, max_train_steps=7, output_dir=tmp_path / "whole", **options)
    run(flags, max_train_steps=7, output_dir=tmp_path / "exact", mixed_precision=precision)
    run(flags, max_train_steps=4, checkpointing_steps=4, **options)
    assert main(as_argv(flags | LATEST | options | dict(max_train_steps=7))) == 0
    assert bits(tmp_path / "output") == bits(tmp_path / "whole") != bits(tmp_path / "exact")
    assert without_times(tmp_path / "output") == without_times(tmp_path / "whole")


def test_a_resumed_run_may_not_change_to_8_bits(flags, tmp_path):
    run(flags, max_train_steps=4, checkpointing_steps=2)
    with pytest.raises(UserError, match="use_8bit_adam"):
        main(as_argv(flags | LATEST | dict(max_train_steps=6, use_8bit_adam=True)))
