"""Safetensors files by their headers alone: dtypes, shapes, and whether the file is whole."""

import json
import math
import struct
from pathlib import Path

from utils.errors import UserError

SAFETENSORS_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "fp32", "F64": "fp32"}
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def safetensors_dtype(path: Path) -> str | None:
    """The dtype of the first tensor, as the header names it ("F32", "F16", ...); None if there is no tensor."""
    return next((entry["dtype"] for entry in safetensors_header(path).values()), None)


def safetensors_header(path: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}} of a safetensors file; reads nothing but its header.

    Raises UserError if the file is shorter or longer than its header says, or the header contradicts itself.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(num_bytes, MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if expected != num_bytes:
            raise ValueError(f"its header promises {expected} bytes, it has {num_bytes}")
        _check_offsets(tensors)
        return tensors
    except (ValueError, OverflowError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} is not a safetensors file (its header lists no tensors); download it again") from None


def _check_offsets(tensors: dict[str, dict]) -> None:
    """Raises ValueError if tensors overlap, leave gaps, or have other sizes than their shapes say."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if any(type(side) is not int or side < 0 for side in entry["shape"]) or start != end:
            raise ValueError(f"its header contradicts itself at {name[:80]!r}")
        num_bytes = DTYPE_BYTES.get(entry["dtype"], 0) * math.prod(entry["shape"])
        if entry["dtype"] in DTYPE_BYTES and stop - start != num_bytes:
            raise ValueError(f"{name[:80]!r} has {stop - start} bytes, but its shape asks for {num_bytes}")
        end = stop
