"""Safetensors files as the library itself writes and reads them."""

import pytest
import torch
from safetensors.torch import load_file

from utils.files import safetensors_writer
from utils.files.safetensors_writer import write_safetensors


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_start_at_a_multiple_of_eight_bytes(tmp_path, length):
    """As the format asks for: who maps the file into memory reads aligned numbers."""
    path, value = tmp_path / "a.safetensors", torch.randn(3, 4, 5).permute(2, 0, 1)
    write_safetensors(path, [("x" * length, value), ("y", value[0])], torch.float32)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    found = load_file(path)
    assert torch.equal(found["x" * length], value) and torch.equal(found["y"], value[0])


def test_values_are_rounded_to_the_wanted_dtype(tmp_path):
    value = torch.tensor([1 + 2**-12, 70000.0])
    write_safetensors(tmp_path / "a.safetensors", [("x", value)], torch.float16)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], value.half())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_leaves_a_gpu_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "PIECE", 64)
    values = {str(n): torch.randn(n, 3, 3, device="cuda").permute(2, 0, 1) for n in (1, 7, 8, 9, 50)}
    write_safetensors(tmp_path / "a.safetensors", list(values.items()), torch.float32)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value.cpu()) for name, value in values.items())
