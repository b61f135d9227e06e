"""`.safetensors` files, read in place (where each tensor lies, checked, and the file mapped) and written piece by piece.

The `safetensors` package checks the file, but has no numpy array for bfloat16, copies what it reads, and writes only what is
in memory as a whole; a model stays in its file. Source: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toy.files.errors import BadFileError
from toy.files.gguf_models import UnsupportedModelError, short
from toy.files.regular import open_regular, read_regular

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}  # that hold weights, and their bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER = 32 * 2**20  # bytes: some 100,000 tensors
_MAX_JSON = 16 * 2**20  # bytes of a config or an index


class StoredTensor(NamedTuple):
    """dtype: a key of DTYPES, or another of the format. offset: of its first byte, from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, StoredTensor]]:
    """The whole file as a read-only mapping, and its tensors by name.

    Raises FileNotFoundError, and BadFileError for a file that is not whole, sound safetensors.
    """
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise BadFileError(path, f"is not a whole safetensors file (header of {length} bytes in a file of {size})")
        header = file.read(length)
        try:
            with safe_open(path, framework="numpy"):  # sizes, gaps and overlaps
                pass
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadFileError(path, f"is not a whole safetensors file ({error})") from error
    described = _parsed(path, header)
    described.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in described.items()}
    return mapped, tensors


class NewTensor(NamedTuple):
    """What is written: bytes come in order, some at a time, from the function `parts`."""

    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]


def write_safetensors(path: Path, tensors: Mapping[str, NewTensor]) -> None:
    """Write the tensors, with the mark that transformers asks for. Raises OSError, and what `parts` raise."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * DTYPES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first number is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written = sum(file.write(part.data) for part in tensor.parts())
            if written != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
                raise RuntimeError(f"{name}: {written} bytes were written")


def read_json(path: Path, at_most: int = _MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and BadFileError for anything else."""
    return _parsed(path, read_regular(path, at_most))


def shown(name: str) -> str:
    """A name out of a file, for error messages: as long as any model's are."""
    return repr(name if len(name) <= 120 else f"{name[:120]}...")


def refuse_pickle(path: Path) -> None:
    """Raise UnsupportedModelError for a file of PyTorch's own format: reading it runs what is in it."""
    if path.suffix in PICKLES:
        raise UnsupportedModelError(
            f"{path} is a pickle, which can run any program when it is read, so it is not opened: convert it to safetensors, "
            "where you trust it, with transformers' from_pretrained and save_pretrained"
        )


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, first, last))
        sound = sound and len(shape) <= 8 and first <= last <= size - start
        sound = sound and (dtype not in DTYPES or last - first == math.prod(shape) * DTYPES[dtype])
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise BadFileError(path, f"describes the tensor {shown(name)} as {short(entry)}, which does not fit the file")
    return StoredTensor(dtype, shape, start + first, last - first)


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"is not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise BadFileError(path, "is not a JSON object")
    return parsed
