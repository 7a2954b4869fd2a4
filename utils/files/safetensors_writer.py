"""Safetensors files written one tensor at a time: no second copy of all of them is ever in memory. And with a hash."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

SAVE_DTYPES = dict(fp32=torch.float32, fp16=torch.float16)  # --save_dtype
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
HASH_KEY = "modelspec.hash_sha256"
NO_HASH = f"0x{'0' * 64}"


def write_safetensors(path: Path, named: Sequence[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Writes (name, tensor) pairs as `dtype`, contiguous. A tensor leaves its device while the last one is written."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = dict(dtype=DTYPE_NAMES[dtype], shape=list(tensor.shape), data_offsets=[start, end])
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in named:
            values = tensor.detach().to(dtype, memory_format=torch.contiguous_format).contiguous().cpu()
            written.result()
            written = writer.submit(file.write, values.reshape(-1).view(torch.uint8).numpy().data)
        written.result()


def save_with_hash(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors and their header's metadata, with the SHA-256 of all that follows the header in it.

    The hash is ModelSpec's: hexadecimal, behind "0x".
    """
    save_file(dict(tensors), path, {**metadata, HASH_KEY: NO_HASH})
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        place = file.read(length).index(f'"{HASH_KEY}":"{NO_HASH}"'.encode()) + len(f'"{HASH_KEY}":"0x')
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(8 + place)
        file.write(digest.hexdigest().encode())
