"""Reading GGUF, the model files of llama.cpp: memory-mapped, and with nothing believed before it has been checked.

A file is a header (magic, version, counts), metadata (typed keys and values), one description per tensor (name, sizes, type,
offset), and the tensor data, each tensor at a multiple of the alignment. Files from strangers are an old way into programs
that read them, so every count, length, size, offset and type is compared with what is left of the file, and with the bounds
below, before it is used or any memory is taken for it.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from toy.config import LanguageModelConfig
from toy.files import gguf_models
from toy.files.errors import BadFileError
from toy.quantized import BY_CODE, Leaf, QuantizedMatrix, dequantize

# bounds of what is kept in memory: the largest vocabularies in use take two thirds of them, and a file at all of these bounds
# is opened in less than a second and 200 MB
MAX_HEADER = 24 * 2**20  # bytes before the tensor data
MAX_STRING = 4 * 2**20  # bytes
MAX_STRINGS = 2**20  # in all arrays of strings together
MAX_KEYS = 2**14
MAX_TENSORS = 2**16
MAX_NAME = 63  # bytes, as in ggml
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**16
MAX_PARTS = 999  # files of a split model
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    10: "<Q",
    11: "<q",
    12: "<d",
}  # struct and numpy


class TensorRecord(NamedTuple):
    """One tensor of a file. shape: numpy order, a matrix is (out, in). offset: of its first byte, from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    offset: int


class GGUF:
    """An open GGUF file: `GGUF.open(path)`, then `close()`, or a `with` block. A model that llama.cpp's gguf-split has cut
    into NAME-00001-of-00003.gguf and so on is opened as one, by any of its parts.

    metadata: read-only mapping of keys to int, float, bool, str, list of str, or 1-D array. tensors: read-only mapping of
    names to `TensorRecord`. architecture: `general.architecture`.
    The file is mapped, not read: opening takes the memory of the metadata alone. It must not be changed while it is open.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mapped: Sequence[mmap.mmap],
        metadata: dict[str, Any],
        tensors: dict[str, TensorRecord],
        parts: Mapping[str, int] | None = None,
    ) -> None:
        """Use `GGUF.open`. parts: in which of the mappings a tensor is, None: in the only one."""
        self.path = Path(path)
        self.metadata = MappingProxyType(metadata)
        self.tensors = MappingProxyType(tensors)
        self._part_of = dict.fromkeys(tensors, 0) if parts is None else parts
        self._mapped = list(mapped)
        # read-only, as the mappings are, one for each part; None when it is closed
        self._bytes: list[np.ndarray] | None = [np.frombuffer(part, np.uint8) for part in mapped]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUF":
        """Map the file at `path` and read its header.

        Raises BadFileError for a file that is not whole, sound GGUF (version 2 or 3, little-endian) and for a missing part
        of a split model, FileNotFoundError for a path where nothing is.
        """
        path, mapped, parts = Path(path), [], None
        try:
            mapped.append(_map(path))
            metadata, tensors = _Header(path, mapped[0]).read()
            if metadata.get("split.count", 1) != 1 or metadata.get("split.no", 0) != 0:
                _close(mapped)
                metadata, tensors, parts = _read_parts(path, metadata, mapped)
        except BaseException:
            _close(mapped)
            raise
        return cls(path, mapped, metadata, tensors, parts)

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(record.shape) for record in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(record.n_bytes for record in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, or of all files that it consists of."""
        return sum(len(part) for part in self._bytes or ())

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor in the file, not copied: read-only uint8, one row per row of the tensor.

        Shape: that of the tensor, the last axis in bytes. Raises ValueError for an unknown name and for a closed file.
        """
        record = self._record(name)
        assert self._bytes is not None  # `_record` says so
        data = self._bytes[self._part_of[name]][record.offset : record.offset + record.n_bytes]
        return data.reshape(*record.shape[:-1], -1)

    def dequantize(
        self, name: str, rows: slice | Sequence[int] | np.ndarray | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A tensor, or some rows of it, as float32; the bytes of the other rows are not touched.

        rows: a slice, or whole numbers (a sequence or array, in any order) that index the first axis; None: everything.
        out: a C-contiguous float32 array of the right shape to fill, None: a new one.
        Raises ValueError for an unknown name, rows out of range, a wrong `out`, and types that hold no weights.
        """
        record = self._record(name)
        data = self.raw(name)
        if rows is not None:
            data = data[_checked_rows(rows, record)]
        shape = (*data.shape[:-1], record.shape[-1])
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a C-contiguous float32 array {shape}, got {out.dtype} {out.shape}")
        if out.size:
            try:
                dequantize(data.reshape(-1, data.shape[-1]), record.type, out.reshape(-1, shape[-1]))
            except ValueError as error:
                raise gguf_models.UnsupportedModelError(f"{self.path}: tensor {name!r}: {error}") from error
        return out

    def matrix(self, name: str) -> Leaf:
        """A tensor as a leaf of a parameter tree, left in the file where that is possible.

        A matrix of a quantised or half-precision type: a `QuantizedMatrix` over its bytes. A tensor of type F32: a read-only
        array over its bytes (a copy where the file did not align them). Vectors of other types are dequantised.
        Raises ValueError for an unknown name and for types that hold no weights.
        """
        record = self._record(name)
        if record.type == "F32":
            data = self.raw(name)
            array = (data if data.ctypes.data % 4 == 0 else data.copy()).view("<f4").reshape(record.shape)
        elif len(record.shape) == 2:
            try:
                return QuantizedMatrix(self.raw(name), record.type, record.shape)
            except ValueError as error:
                raise gguf_models.UnsupportedModelError(f"{self.path}: tensor {name!r}: {error}") from error
        else:
            array = self.dequantize(name)
        array.flags.writeable = False
        return array

    def config(self) -> LanguageModelConfig:
        """The `toy.LlamaConfig` or `toy.GPT2Config` of the model in the file.

        Raises BadFileError when the file contradicts itself, ValueError when it is sound but holds something else
        (another architecture, an adapter, scaled RoPE, experts, ...).
        """
        return gguf_models.config_of(self)

    def parameters(self, out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """dict of this library's parameter names to float32 arrays: every weight of the model, dequantised.

        out: a mapping of the same names to arrays to fill, such as a ParameterTree, None: new ones.
        Raises the errors of `config()`, and BadFileError for numbers that are not finite.
        """
        parameters = {}
        for name in gguf_models.parameter_shapes(self.config()):
            parameters[name] = array = self.dequantize(name, out=None if out is None else out[name])
            if not np.isfinite(array).all():
                raise BadFileError(self.path, f"tensor {name!r} holds numbers that are not finite")
        return parameters

    def close(self) -> None:
        """Let go of the file. Arrays that `raw` gave out keep their part of it mapped until they go too."""
        self._bytes = None
        _close(self._mapped)

    def __enter__(self) -> "GGUF":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUF({str(self.path)!r}, {self.architecture}, {len(self.tensors)} tensors)"

    def _record(self, name: str) -> TensorRecord:
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed: open it again with GGUF.open")
        try:
            return self.tensors[name]
        except KeyError:
            raise ValueError(f"{self.path} has no tensor {name!r}") from None


def _checked_rows(rows: slice | Sequence[int] | np.ndarray, record: TensorRecord) -> slice | np.ndarray:
    """What indexes the first axis: a slice inside it, or an array of row numbers."""
    n_rows = record.shape[0]
    if len(record.shape) < 2:
        raise ValueError(f"{record.name} is a vector: it has no rows to choose from")
    if isinstance(rows, slice):
        start, stop = rows.start or 0, n_rows if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= start <= stop <= n_rows:
            raise ValueError(f"rows of {record.name} must be a slice inside 0:{n_rows} with step 1, got {rows}")
        return slice(start, stop)
    index = np.asarray(rows)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"rows of {record.name} must be a slice or a list of whole numbers, got {rows!r}")
    if index.size and (index.min() < 0 or index.max() >= n_rows):
        raise ValueError(f"rows of {record.name} must lie in [0, {n_rows}), got {index.min()} to {index.max()}")
    return index


def _close(mapped: list[mmap.mmap]) -> None:
    """Unmap what is not looked at any more: of the others the mapping ends with the last array over it."""
    while mapped:
        with contextlib.suppress(BufferError):
            mapped.pop().close()


def _read_parts(
    path: Path, found: dict[str, Any], mapped: list[mmap.mmap]
) -> tuple[dict[str, Any], dict[str, TensorRecord], dict[str, int]]:
    """The metadata and the tensors of a split model, and which part each is in.

    found: the metadata of the part at `path`. mapped: gets every part.
    """
    count, number = found.get("split.count"), found.get("split.no")
    match = _PART.fullmatch(path.name)
    if type(count) is not int or type(number) is not int or not 0 <= number < count <= MAX_PARTS:
        raise BadFileError(path, f"is part {number!r} of {count!r} of a split model: these are not numbers of parts")
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise BadFileError(
            path,
            f"is part {number + 1} of the {count} of a split model, and they are found by their names: call it "
            f"NAME-{number + 1:05}-of-{count:05}.gguf again, beside the others",
        )
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorRecord] = {}
    parts: dict[str, int] = {}
    for i, part in enumerate(parts_of(path)):
        try:
            mapped.append(_map(part))
        except FileNotFoundError:
            raise BadFileError(
                part, f"is missing: the model consists of {count} parts, and this is part {i + 1}"
            ) from None
        keys, records = _Header(part, mapped[-1]).read()
        if (keys.get("split.no"), keys.get("split.count")) != (i, count):
            raise BadFileError(part, f"is not part {i + 1} of {count}: it is of another model, or was renamed")
        metadata = keys if i == 0 else metadata
        for name, record in records.items():
            if name in tensors:
                raise BadFileError(part, f"has the tensor {name!r}, which an earlier part has already")
            tensors[name], parts[name] = record, i
    if "general.architecture" not in metadata:
        raise BadFileError(path, "names no architecture in its first part (general.architecture)")
    if (n := metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise BadFileError(path, f"is of a model of {n} tensors, and its {count} parts have {len(tensors)}")
    return metadata, tensors, parts


def part_number(name: str) -> int | None:
    """Which part of a split model a file of this name is, counted from 1; None for a whole model."""
    match = _PART.fullmatch(name)
    return None if match is None else int(match[2])


def parts_of(path: Path) -> list[Path]:
    """The files of the model that begins with `path`: itself, or all parts of a split one, there or not."""
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match[3]) <= MAX_PARTS:
        return [path]
    return [path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") for i in range(int(match[3]))]


def read_head(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file as far as its vocabulary, which is most of them and comes after what the model is.

    Raises BadFileError for a file that does not begin as GGUF, FileNotFoundError for a path where nothing is.
    """
    mapped = _map(path)
    try:
        header, metadata = _Header(path, mapped), {}
        _, n_keys = header.counts()
        for _ in range(n_keys):
            key, kind = header.key()
            if kind == ARRAY and key.startswith("tokenizer."):
                break
            metadata[key] = header.value(kind, key)
        return metadata
    finally:
        _close([mapped])


def _map(path: Path) -> mmap.mmap:
    """The whole file as a read-only mapping. Only a regular file: opening a pipe would wait for its other end."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadFileError(path, "is not a regular file")
        if status.st_size < 24:
            raise BadFileError(path, f"is too short for a GGUF file ({status.st_size} bytes)")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, BadFileError):
            raise
        raise BadFileError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


class _Header:
    """A cursor over the part of the file before the tensor data. Every step is checked against `end`."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.data, self.size = path, mapped, len(mapped)
        self.position, self.end = 0, min(self.size, MAX_HEADER)
        self.strings_left = MAX_STRINGS

    def counts(self) -> tuple[int, int]:
        """-> how many tensors and metadata keys the file says to have; the magic and the version are checked."""
        if self.take(4, "the magic") != b"GGUF":
            raise self.bad("is not a GGUF file (it does not begin with GGUF)")
        version = self.number("<I", "the version")
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise self.bad("is a big-endian GGUF file, which this library does not read")
            raise self.bad(f"has GGUF version {version}; versions 2 and 3 can be read")
        n_tensors = self.count("<Q", "tensors", MAX_TENSORS, 24)
        return n_tensors, self.count("<Q", "metadata keys", MAX_KEYS, 13)

    def key(self) -> tuple[str, int]:
        """-> the next metadata key and the type of its value."""
        key = self.string("a metadata key")
        if not key:
            raise self.bad("has an empty metadata key")
        return key, self.number("<I", f"the type of {key!r}")

    def read(self) -> tuple[dict[str, Any], dict[str, TensorRecord]]:
        """-> metadata, tensors."""
        n_tensors, n_keys = self.counts()
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key, kind = self.key()
            if key in metadata:
                raise self.bad(f"has the metadata key {key!r} twice")
            metadata[key] = self.value(kind, key)
        architecture = metadata.get("general.architecture")
        later = architecture is None and metadata.get("split.no", 0) != 0  # the first part of a split model names it
        if not later and (not isinstance(architecture, str) or not 0 < len(architecture) <= MAX_NAME):
            raise self.bad("names no architecture (general.architecture)")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.bad(f"has the alignment {alignment!r}, expected a power of two from 8 to {MAX_ALIGNMENT}")
        return metadata, self.tensors(n_tensors, alignment)

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorRecord]:
        """The tensor descriptions. Like ggml, this asks for the data in the order of the descriptions, without holes: so
        nothing overlaps, and a changed size or offset does not go unnoticed."""
        described, offset = [], 0
        for _ in range(n_tensors):
            name = self.string("a tensor name", MAX_NAME)
            n_dimensions = self.number("<I", f"the dimensions of {name!r}")
            if not 1 <= n_dimensions <= MAX_DIMENSIONS:
                raise self.bad(f"tensor {name!r} has {n_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
            sizes = [self.number("<Q", f"the sizes of {name!r}") for _ in range(n_dimensions)]
            code, given = self.number("<I", f"the type of {name!r}"), self.number("<Q", f"the offset of {name!r}")
            kind = BY_CODE.get(code)
            if kind is None:
                raise self.bad(f"tensor {name!r} has the unknown type {code}")
            numbers = math.prod(sizes)
            if not 0 < numbers <= self.size * kind.block:
                raise self.bad(
                    f"tensor {name!r} has the sizes {_some(sizes)}, which do not fit a file of {self.size} bytes"
                )
            if sizes[0] % kind.block:
                raise self.bad(
                    f"tensor {name!r} has rows of {sizes[0]} numbers, no multiple of {kind.name}'s {kind.block}"
                )
            if given != offset:
                raise self.bad(f"tensor {name!r} is at offset {given}, expected {offset}")
            n_bytes = numbers // kind.block * kind.n_bytes
            described.append((name, tuple(reversed(sizes)), kind.name, n_bytes, offset))
            offset += -(-n_bytes // alignment) * alignment
        start = -(-self.position // alignment) * alignment
        records = {}
        for name, shape, type_name, n_bytes, offset in described:
            if start + offset + n_bytes > self.size:
                raise self.bad(f"is cut off: tensor {name!r} ends at byte {start + offset + n_bytes} of {self.size}")
            if name in records:
                raise self.bad(f"has the tensor {name!r} twice")
            records[name] = TensorRecord(name, shape, type_name, n_bytes, start + offset)
        last = max((record.offset + record.n_bytes for record in records.values()), default=self.position)
        more = self.size - last  # a few zeros are padding
        if more >= alignment and (more > MAX_ALIGNMENT or self.data[last:].strip(b"\0")):
            raise self.bad(f"goes on for {self.size - last} bytes after its last tensor")
        return records

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == BOOL:
            return self.boolean(key)
        if kind == STRING:
            return self.string(repr(key))
        if kind == ARRAY:
            return self.array(self.number("<I", key), key)
        raise self.bad(f"metadata {key!r} has the unknown type {kind}")

    def array(self, kind: int, key: str) -> Any:
        if kind == STRING:
            n = self.count("<Q", f"strings in {key!r}", self.strings_left, 8)
            self.strings_left -= n
            return self.strings(n, key)
        if kind not in SCALARS and kind != BOOL:
            raise self.bad(f"metadata {key!r} is an array of type {kind}, which is unknown or nested")
        dtype = np.dtype(SCALARS.get(kind, "<B"))
        n = self.count("<Q", f"numbers in {key!r}", MAX_HEADER, dtype.itemsize)
        numbers = np.frombuffer(self.take(n * dtype.itemsize, key), dtype)
        if kind != BOOL:
            return numbers
        if (numbers > 1).any():
            raise self.bad(f"metadata {key!r} has a truth value that is neither 0 nor 1")
        return numbers.astype(bool)

    def strings(self, n: int, key: str) -> list[str]:
        """The tight loop of the reader: vocabularies have hundreds of thousands of tokens."""
        data, position, end = self.data, self.position, self.end
        unpack, strings = struct.Struct("<Q").unpack_from, []
        for _ in range(n):
            start = position + 8
            if start > end:
                raise self.short(key)
            length = unpack(data, position)[0]
            position = start + length
            if position > end or length > MAX_STRING:
                raise self.bad(f"claims a string of {length} bytes in {key!r}: too long")
            try:
                strings.append(data[start:position].decode())
            except UnicodeDecodeError as error:
                raise self.bad(f"metadata {key!r} holds text that is not UTF-8 ({error.reason})") from error
        self.position = position
        return strings

    def string(self, what: str, longest: int = MAX_STRING) -> str:
        length = self.count("<Q", f"bytes in {what}", longest, 1)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8 text ({error.reason})") from error

    def boolean(self, what: str) -> bool:
        value = self.number("<B", what)
        if value > 1:
            raise self.bad(f"metadata {what} has the truth value {value}, expected 0 or 1")
        return bool(value)

    def count(self, form: str, what: str, most: int, least_bytes: int) -> int:
        """A number of things that take at least `least_bytes` each: no more than `most`, and no more than still fit."""
        n = self.number(form, f"the number of {what}")
        if n > most or n * least_bytes > self.end - self.position:
            raise self.bad(f"claims {n} {what}: too many for a file of {self.size} bytes")
        return n

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def take(self, n_bytes: int, what: str) -> bytes:
        start, stop = self.position, self.position + n_bytes
        if stop > self.end:
            raise self.short(what)
        self.position = stop
        return self.data[start:stop]

    def short(self, what: str) -> BadFileError:
        if self.end < self.size:
            return self.bad(f"its metadata do not end within {MAX_HEADER} bytes")
        return self.bad(f"is cut off: it ends within {what}")

    def bad(self, problem: str) -> BadFileError:
        return BadFileError(self.path, problem if len(problem) <= 300 else f"{problem[:300]}...")


def _some(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
