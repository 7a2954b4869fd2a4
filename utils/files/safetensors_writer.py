"""Safetensors files written one tensor at a time: no second copy of all of them is ever in memory."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SAVE_DTYPES = dict(fp32=torch.float32, fp16=torch.float16)  # --save_dtype
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16"}


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
