"""Safetensors files by their headers alone: names, dtypes and shapes, and whether the file is whole."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from utils.errors import UserError, first_line


class TensorEntry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # "F32", "F16", ...
    shape: tuple[int, ...]


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """{tensor name: its entry}; reads nothing but the header, without torch.

    Raises UserError if the file is shorter or longer than its header says, or the header contradicts itself.
    """
    try:
        with safe_open(path, "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorEntry(each.get_dtype(), tuple(each.get_shape())) for name, each in entries.items()}
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a whole safetensors file ({reason}); copy or download it again") from None


def safetensors_dtype(path: Path) -> str | None:
    """The dtype of the first tensor by name; None if there is no tensor."""
    return next((entry.dtype for entry in safetensors_header(path).values()), None)
