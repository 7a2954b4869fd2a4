"""Safetensors files written one tensor at a time: no second copy of all of them is ever in memory. And with a hash."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from utils.files.hashing import sha256_of_rest

SAVE_DTYPES = dict(fp32=torch.float32, fp16=torch.float16)  # --save_dtype
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}
HASH_KEY = "modelspec.hash_sha256"
NO_HASH = f"0x{'0' * 64}"
PIECE = 1 << 24  # elements that leave a GPU at once


def write_safetensors(path: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Writes (name, tensor) pairs as `dtype`, contiguous. A tensor leaves its device while the last one is written.

    Args:
        named: gone through twice, for the shapes and for the values: what is computed on the way need not be kept.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = dict(dtype=DTYPE_NAMES[dtype], shape=list(tensor.shape), data_offsets=[start, end])
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
        written = writer.submit(file.write, len(encoded).to_bytes(8, "little") + encoded)
        for values in _on_the_host(named, dtype):
            written.result()
            written = writer.submit(file.write, values.view(torch.uint8).numpy().data)
        written.result()


def _on_the_host(named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensors' values as `dtype`, flat, one after another; each stays valid until the one after the next.

    From a GPU they come in pieces through two pinned buffers: fresh memory costs more than the copy.
    """
    buffers: list[torch.Tensor] = []
    for _, tensor in named:
        values = tensor.detach().to(dtype, memory_format=torch.contiguous_format).contiguous().reshape(-1)
        if not values.is_cuda:
            yield values
            continue
        for piece in values.split(PIECE):
            if len(buffers) < 2:
                buffers.append(torch.empty(PIECE, dtype=dtype, pin_memory=True))
            buffers.reverse()
            yield buffers[0][: len(piece)].copy_(piece)


def save_with_hash(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous tensors and their header's metadata, with the SHA-256 of all that follows the header in it.

    The hash is ModelSpec's: hexadecimal, behind "0x".
    """
    save_file(dict(tensors), path, {**metadata, HASH_KEY: NO_HASH})
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        place = file.read(length).index(f'"{HASH_KEY}":"{NO_HASH}"'.encode()) + len(f'"{HASH_KEY}":"0x')
        digest = sha256_of_rest(file)
        file.seek(8 + place)
        file.write(digest.encode())
