"""Which file of a folder holds a part's weights, and of which dtype they are."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.models.folder import find_weights
from utils.models.weight_files import safetensors_header


def weights_file(folder: Path, name: str, dtype: torch.dtype) -> Path:
    path = folder / name
    tensors = {"a": torch.zeros(3, dtype=dtype)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({f"{STEM}.safetensors": torch.float32}, "fp32"),
        ({f"{STEM}.safetensors": torch.float16}, "fp16"),
        ({f"{STEM}.safetensors": torch.bfloat16}, "fp32"),
        ({f"{STEM}.bin": torch.float32}, "fp32"),
        ({f"{STEM}.bin": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.safetensors": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.bin": torch.float16}, "fp16"),
        ({f"{STEM}.fp16.safetensors": torch.float16, f"{STEM}.safetensors": torch.float32}, "fp32"),
        ({f"{STEM}.fp16.safetensors": torch.float16, f"{STEM}.bin": torch.float32}, "fp32"),
        ({f"{STEM}.bin": torch.float16, f"{STEM}.safetensors": torch.float32}, "fp32"),
    ],
)
def test_the_output_has_the_dtype_of_the_file_that_is_loaded(tmp_path, files, expected):
    (tmp_path / "unet").mkdir()
    for name, dtype in files.items():
        weights_file(tmp_path / "unet", name, dtype)
    assert find_weights(tmp_path, "unet").save_dtype == expected


STARTS = {
    b"<!DOCTYPE html><html>log in</html>": "a web page",
    b"Entry not found, whatever it was": "a text",
    b'{"error": "Repository not found"}': "JSON",
    b"GGUF\x03\0\0\0": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": r"TensorFlow's \(.h5\)",
    b"\x82\xa4unet": r"Flax's \(.msgpack\)",
    b"\x1f\x8b\x08": "a packed archive",
    b"\x89PNG\r\n\x1a\n": "a picture",
    b"\0" * 100: "a download that was not finished",
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\n": 'git lfs pull --include "\\*model.safetensors"',
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("start", STARTS)
def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path, start, suffix):
    (tmp_path / "unet").mkdir()
    (tmp_path / f"unet/{STEM}{suffix}").write_bytes(start)
    with pytest.raises(UserError, match=STARTS[start].replace(".safetensors", suffix)) as error:
        find_weights(tmp_path, "unet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("suffix", "other"), [(".safetensors", ".bin"), (".bin", ".safetensors")])
def test_weights_are_known_by_their_first_bytes(tmp_path, suffix, other):
    (tmp_path / "unet").mkdir()
    weights_file(tmp_path, f"x{other}", torch.float32).rename(tmp_path / f"unet/{STEM}{suffix}")
    assert list(find_weights(tmp_path, "unet").plain_names) == [f"{STEM}{other}"]


def test_bin_files_of_before_torch_1_6(tmp_path):
    (tmp_path / "unet").mkdir()
    path = tmp_path / f"unet/{STEM}.bin"
    torch.save({"a": torch.zeros(3, dtype=torch.float16)}, path, _use_new_zipfile_serialization=False)
    assert find_weights(tmp_path, "unet").save_dtype == "fp16"


def test_an_empty_bin_file_of_weights_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    torch.save({}, tmp_path / f"unet/{STEM}.bin")
    with pytest.raises(UserError, match="there is none in it"):
        find_weights(tmp_path, "unet")


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
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length or len(header)) + header)
    with pytest.raises(UserError, match=r"a\.safetensors is not a (whole )?safetensors file") as error:
        safetensors_header(path)
    assert "\n" not in str(error.value)
