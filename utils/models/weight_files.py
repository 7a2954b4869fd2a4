"""A file of weights by its first bytes, whatever its name: safetensors, or torch's pickle, of which nothing is run."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from utils.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

FIRST_SAFE_TORCH = (2, 6)  # before, torch.load(weights_only=True) could be made to run code (CVE-2025-32434)
LFS_POINTER = b"version https://git-lfs"
SAFETENSORS, PICKLE = "safetensors", "bin"  # the endings by which the libraries know what is in a file
OTHER_STARTS = (  # in lower case
    (rb"<", "a web page (of a login, or an error)"),
    (rb"\{", "JSON, not weights"),
    (rb"gguf", "a GGUF file, of quantised weights"),
    (rb"\x89hdf", "TensorFlow's (.h5)"),
    (rb"\x1f\x8b|7z\xbc\xaf|rar!", "a packed archive: unpack it first"),
    (rb"\x89png|\xff\xd8\xff", "a picture"),
    (rb"[a-z ]{12}", "a text"),
    (rb"[\x81-\x8f\xde\xdf]", "Flax's (.msgpack)"),
    (rb"\0{16}", "a download that was not finished"),
)
FRAMEWORK = "pytorch_lightning."  # whose classes the first checkpoints name beside their weights
DEEPEST = 3  # dictionaries in one another in which a pickle's weights may lie
Tensors = dict[str, "torch.Tensor"]


class TensorEntry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # "F32", "F16", ...
    shape: tuple[int, ...]


def check_file(path: Path) -> bytes:
    """The file's first bytes. Raises UserError unless it can be read and is the file itself, not git-lfs's pointer."""
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing; copy or download the whole pipeline again")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; copy or download the whole pipeline again")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise _unfit(path, f"cannot be read ({error.strerror})") from None
    if start.startswith(LFS_POINTER):
        which = re.sub(r"^.*model(?=\.)", "*model", path.name)  # the same of every part
        raise UserError(
            f"{path} is a git-lfs pointer, not the file; run 'git lfs install && git lfs pull --include \"{which}\"' "
            f"in {path.parent}"
        )
    if not start:
        raise _unfit(path, "is empty")
    return start


def is_there(path: Path) -> bool:
    """Whether it is a file with something in it, not a pointer to it."""
    with contextlib.suppress(UserError):
        return bool(check_file(path))
    return False


def _unfit(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; copy or download it again")


def kind_of(path: Path) -> str:
    """SAFETENSORS or PICKLE. Raises UserError that says what else the file is."""
    start = check_file(path)
    if start[8:9] == b"{" and b"\0" in start[:8]:  # a length in 8 bytes, which no text is, and JSON
        return SAFETENSORS
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):  # torch's format since 1.6, and before
        return PICKLE
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, what in OTHER_STARTS:
        if re.match(pattern, text):
            raise _unfit(path, f"is not a file of weights (it is {what})")
    return SAFETENSORS if path.suffix.lower() == ".safetensors" else PICKLE  # whoever reads it says what is wrong


def tensor_entries(path: Path) -> dict[str, TensorEntry]:
    """{name: dtype and shape} of the tensors in a weight file. Raises UserError if it is damaged, or a pointer."""
    if kind_of(path) == SAFETENSORS:
        entries = safetensors_header(path)
    else:
        import torch  # only for pickles: its import takes longer than all the checks

        names = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}
        found = _read_pickle(path, "meta")
        entries = {name: TensorEntry(names.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in found.items()}
    if not entries:
        raise _unfit(path, "is not a file of weights (there is none in it)")
    return entries


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """{tensor name: its entry}, by the header alone, without torch; UserError if the file is not whole."""
    try:
        with safe_open(path, "numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorEntry(each.get_dtype(), tuple(each.get_shape())) for name, each in entries.items()}
    except (OSError, SafetensorError) as error:
        raise _unfit(path, f"is not a whole safetensors file ({first_line(error)})") from None


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A file's tensors by name, on the CPU, and the texts in its header; UserError if it is not whole."""
    if kind_of(path) == PICKLE:
        return _read_pickle(path, "cpu"), {}
    from safetensors.torch import load, load_file

    try:
        length, header = _read_header(path)
        said = header.pop("__metadata__", {})
        texts = {name: value for name, value in said.items() if isinstance(value, str)}
        if texts == said:
            return load_file(path), texts
        content = path.read_bytes()  # the library refuses such a header: without it the tensors stay where they are
        return load(content[:8] + _as_header(header, length) + content[8 + length :]), texts
    except Exception as error:  # as below
        raise _unfit(path, f"is not a whole safetensors file ({first_line(error)})") from None


def clean_metadata(path: Path, clean: Callable[[Any], Any]) -> None:
    """What a safetensors file says beside its tensors becomes what `clean` makes of it, which is no longer."""
    length, header = _read_header(path)
    said = header.get("__metadata__")
    if (cleaned := clean(said)) != said:
        with path.open("r+b") as file:
            file.seek(8)
            file.write(_as_header(header | {"__metadata__": cleaned}, length))


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """A safetensors file's header, which may hold what the library refuses, and how many bytes it takes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(length))


def _as_header(header: dict[str, Any], length: int) -> bytes:
    """In so many bytes, so that the tensors stay where they are."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(text) == length
    return text


def read_onto(paths: Iterable[Path], device: "torch.device | str") -> Tensors:
    """The tensors of several files by name, on `device`; needs torch alone, so it can run beside the imports."""
    return {name: tensor.to(device) for path in paths for name, tensor in read_tensors(path)[0].items()}


def _read_pickle(path: Path, device: str) -> Tensors:
    if torch_version() < FIRST_SAFE_TORCH:
        raise UserError(f"{path} is a pickle, not safe to read before torch 2.6 (CVE-2025-32434): update it")
    import torch

    unknown = [f"{FRAMEWORK}callbacks.model_checkpoint.ModelCheckpoint"]
    try:
        if check_file(path).startswith(b"PK"):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign := [name for name in unknown if not name.startswith(FRAMEWORK)]:
            raise UserError(f"{path} holds more than weights: reading it would run {foreign[0]}; take a safetensors")
        # An empty class stands for each of the framework's, which are names beside the weights and are never used.
        known: list = [(type("Unused", (), {}), name) for name in unknown]
        # An open file: by a name that ends in .safetensors torch would take it for one.
        with torch.serialization.safe_globals(known), path.open("rb") as file:
            loaded = torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged pickles fail in many ways, and every one is about the file
        raise _unfit(path, f"is not a file of weights ({first_line(error)})") from None

    def tensors_in(value: Any, depth: int) -> Tensors:
        """Those of the dictionary that holds most, of `value` and those in it."""
        if not isinstance(value, dict) or depth < 0:
            return {}
        own = {name: each.detach() for name, each in value.items() if isinstance(name, str) and torch.is_tensor(each)}
        return max(own, *(tensors_in(each, depth - 1) for each in value.values()), {}, key=len)

    return tensors_in(loaded, DEEPEST)


def torch_version() -> tuple[int, int]:
    """Major and minor version of the installed torch, without importing it."""
    major, minor = metadata.version("torch").split(".")[:2]
    return int(major), int(minor)
