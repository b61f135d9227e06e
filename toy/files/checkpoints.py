"""Checkpoints: parameters, AdamW moments, step and config in ONE safetensors file.

Tensors, all float32: the parameters under their own names, the moments as `adamw.m.<name>` and `adamw.v.<name>`.
Metadata: `format`, `step`, `config` (JSON) and `sha256` of everything that is loaded, because safetensors itself does not
notice a changed bit. A reader believes nothing before it has checked it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toy.files.atomic import StrPath, replacing
from toy.files.errors import BadFileError
from toy.files.regular import open_regular

FORMAT = "toy-checkpoint-1"
_SLOTS = ("m", "v")
_NAME = re.compile(r"step_(\d{1,15})\.safetensors")
_MAX_HEADER = 32 * 2**20  # bytes: some 100,000 tensors


class Checkpoint(NamedTuple):
    """step: updates done. config: the run's config (see toy/files/runs.py). moments: {"m": {name: array}, "v": ...}."""

    step: int
    config: dict[str, Any]
    parameters: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]]


def write_checkpoint(path: StrPath, checkpoint: Checkpoint) -> None:
    """Write `path` atomically. Raises OSError when that fails (a full disk); an older file of that name is then unharmed."""
    tensors = dict(checkpoint.parameters)
    for slot in _SLOTS:
        tensors |= {f"adamw.{slot}.{name}": array for name, array in checkpoint.moments[slot].items()}
    tensors = {name: np.ascontiguousarray(array, dtype="<f4") for name, array in tensors.items()}
    metadata = {"format": FORMAT, "step": str(checkpoint.step), "config": json.dumps(checkpoint.config)}
    shapes = {name: array.shape for name, array in tensors.items()}
    metadata["sha256"] = _checksum(metadata, shapes, tensors.__getitem__)

    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # also what it makes of a full disk
            reason = str(error).removeprefix("Error while serializing: I/O error: ")
            raise OSError(reason.partition(" (os error")[0]) from error
        temporary.chmod(mode)  # safetensors makes files that only their owner can read


def read_checkpoint(path: StrPath) -> Checkpoint:
    """-> `Checkpoint`, checked: size and header, names, shapes, dtypes, checksum, finite numbers, moments that match.

    Raises BadFileError otherwise, and FileNotFoundError for a path where nothing is. A file that is named step_<N> must be
    of that step.
    """
    path = Path(path)
    _check_outside(path)

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            step, config = _check_metadata(path, metadata)
            if (named := _NAME.fullmatch(path.name)) and int(named[1]) != step:
                raise BadFileError(path, f"holds step {step}, its name says {int(named[1])}: it is another checkpoint")
            shapes = {}
            for name in file.keys():  # noqa: SIM118 (a safe_open is no dict)
                view = file.get_slice(name)
                if view.get_dtype() != "F32":
                    raise BadFileError(path, f"tensor {name} is {view.get_dtype()}, expected F32")
                shapes[name] = tuple(view.get_shape())
            _check_names(path, shapes)
            tensors = {}

            def load(name: str) -> np.ndarray:
                tensors[name] = array = file.get_tensor(name)
                return array

            if _checksum(metadata, shapes, load) != metadata["sha256"]:
                raise BadFileError(path, "the checksum does not match: the file was damaged after it was written")
    except FileNotFoundError:  # it was deleted in between
        raise
    except (SafetensorError, OSError) as error:
        raise BadFileError(path, f"is not a whole safetensors file ({error})") from error
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise BadFileError(path, f"tensor {name} holds numbers that are not finite")
    parameters = {name: array for name, array in tensors.items() if not name.startswith("adamw.")}
    trained = [name for name in parameters if f"adamw.m.{name}" in tensors]
    moments = {slot: {name: tensors[f"adamw.{slot}.{name}"] for name in trained} for slot in _SLOTS}
    if any((array < 0).any() for array in moments["v"].values()):
        raise BadFileError(path, "a second moment of AdamW is negative")
    return Checkpoint(step, config, parameters, moments)


def _check_outside(path: Path) -> None:
    """What can be said before a parser sees the file: there is one, and its header fits into it and into bounds."""
    with open_regular(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise BadFileError(path, f"is not a whole safetensors file (header of {length} bytes in a file of {size})")


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise BadFileError(path, f"is not a checkpoint of toy (format {metadata.get('format')!r}, expected {FORMAT!r})")
    missing = [name for name in ("step", "config", "sha256") if name not in metadata]
    if missing:
        raise BadFileError(path, f"has no {' and no '.join(missing)} in its metadata")
    step = metadata["step"]
    if not (step.isascii() and step.isdigit() and len(step) < 16):
        raise BadFileError(path, f"step is {step[:40]!r}, expected a whole number")
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise BadFileError(path, f"its config is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadFileError(path, "its config is not a JSON object")
    return int(step), config


def _check_names(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A parameter has two moments, of its own shape, or (when it is not trained) none, and there is nothing else."""
    parameters = [name for name in shapes if not name.startswith("adamw.")]
    if not parameters:
        raise BadFileError(path, "holds no parameters")
    frozen = {name for name in parameters if not {f"adamw.m.{name}", f"adamw.v.{name}"} & shapes.keys()}
    if len(frozen) == len(parameters):
        raise BadFileError(path, "holds no moments of AdamW")
    expected = {
        f"{prefix}{name}": shapes[name]
        for name in parameters
        for prefix in (("",) if name in frozen else ("", "adamw.m.", "adamw.v."))
    }
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise BadFileError(path, f"tensor {name} has shape {shapes.get(name)}, expected {expected.get(name)}")


def _checksum(
    metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], np.ndarray]
) -> str:
    """SHA-256 of the metadata, names and shapes, then of the bytes of every tensor in the order of the names."""
    head = {key: metadata[key] for key in ("format", "step", "config")}
    digest = hashlib.sha256(json.dumps([head, sorted((name, *shape) for name, shape in shapes.items())]).encode())
    for name in sorted(shapes):
        array = load(name)
        if array.size:
            digest.update(array.data.cast("B"))
    return digest.hexdigest()
