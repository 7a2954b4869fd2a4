"""Which file of a folder holds a part's weights, and of which dtype they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.models.folder import find_weights


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


def bin_file(folder: Path, content: bytes | None = None) -> Path:
    (folder / "unet").mkdir()
    path = folder / "unet" / f"{STEM}.bin"
    if content is not None:
        path.write_bytes(content)
    return path


def test_bin_files_of_before_torch_1_6(tmp_path):
    path = bin_file(tmp_path)
    torch.save({"a": torch.zeros(3, dtype=torch.float16)}, path, _use_new_zipfile_serialization=False)
    assert find_weights(tmp_path, "unet").save_dtype == "fp16"


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."])
def test_a_bin_file_without_weights_is_refused_and_runs_nothing(tmp_path, content):
    bin_file(tmp_path, content)
    with pytest.raises(UserError, match=r"model\.bin is not a file of weights") as error:
        find_weights(tmp_path, "unet")
    assert "\n" not in str(error.value)


def test_an_empty_bin_file_of_weights_is_refused(tmp_path):
    torch.save({}, bin_file(tmp_path))
    with pytest.raises(UserError, match="there is none in it"):
        find_weights(tmp_path, "unet")
