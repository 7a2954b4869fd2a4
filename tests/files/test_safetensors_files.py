"""The header of a safetensors file: what it says, and that it is not believed."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.files.safetensors_files import safetensors_dtype


def write_header(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", None),
        (b"{", None),
        (b"{}", 1 << 62),
        (b"\xff\xff", None),
        (b"[]", None),
        (b"7", None),
        (b'{"a": 7}', None),
        (b'{"a": {"shape": [1]}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": []}}', None),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, "x"]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
    ],
)
def test_a_lying_safetensors_header_is_refused(tmp_path, header, length):
    path = write_header(tmp_path / "a.safetensors", header, length)
    with pytest.raises(UserError, match=r"a\.safetensors is not a (whole )?safetensors file") as error:
        safetensors_dtype(path)
    assert "\n" not in str(error.value)


def test_the_dtype_in_a_safetensors_header(tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype, name in ((torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")):
        save_file({"a": torch.zeros(3, dtype=dtype)}, path, {"format": "pt"})
        assert safetensors_dtype(path) == name
    assert safetensors_dtype(write_header(path, b'{"__metadata__": {"format": "pt"}}')) is None
