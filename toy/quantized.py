"""Quantised weights: the tensor types of GGUF files, what numbers their bytes stand for, and matrices of such a type.

A quantised type stores a row in blocks: some bits per number, and one scale (and minimum) for the whole block. Where the
compiled kernels are built they read the common types; otherwise numpy reads F32, F16 and BF16, and the `gguf` package, which
llama.cpp's own authors keep, reads the block formats.

A `QuantizedMatrix` is a frozen weight matrix that stays as it is stored. The op tables take it wherever they take a float32
weight that has no gradient; they dequantise it band by band inside the product and never as a whole.
"""

import functools
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.arrays import whole_numbers
from toy.optional import optional_package


class TensorType(NamedTuple):
    """code: the number in the file. block: numbers in a block; n_bytes: bytes of a block."""

    name: str
    code: int
    block: int
    n_bytes: int


# from the GGUF specification and ggml.h; codes 4, 5 and 31 to 38 were types once and are no more
TYPES = {
    name: TensorType(name, code, block, n_bytes)
    for name, code, block, n_bytes in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8),
        ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8),
        ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q1_0", 41, 128, 18),
        ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
        ("IQ1_S", 19, 256, 50), ("IQ1_M", 29, 256, 56), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74),
        ("IQ2_S", 22, 256, 82), ("IQ3_XXS", 18, 256, 98), ("IQ3_S", 21, 256, 110), ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    )
}  # fmt: skip
BY_CODE = {kind.code: kind for kind in TYPES.values()}

# whole numbers, and what only ggml's own products use for the other operand
_NOT_WEIGHTS = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}

_CHUNK = 2**18  # numbers dequantised at a time: the temporaries stay in the cache and small beside the result
_BAND = 2**20  # numbers of a matrix that a product dequantises at a time


def dequantize(data: np.ndarray, type_name: str, out: np.ndarray) -> None:
    """Write what `data` stands for into `out`.

    data: uint8 (rows, bytes of a row), as in the file. out: float32 (rows, numbers of a row), C-contiguous.
    Raises ValueError for a type that holds no floating-point weights or that the `gguf` package cannot read, and
    RuntimeError (with the command to type) when that package is needed and missing.
    """
    kernels = _kernels()
    if kernels is not None and type_name in kernels.TYPES:
        kernels.dequantize(np.ascontiguousarray(data), type_name, out)
    elif type_name == "F32":
        out[...] = _words(data, "<f4")
    elif type_name == "F16":
        out[...] = _words(data, "<f2")
    elif type_name == "BF16":  # the upper half of a float32
        out.view(np.uint32)[...] = _words(data, "<u2")
        out.view(np.uint32)[...] <<= 16
    else:
        quants, code = _package(type_name)
        step = max(1, _CHUNK // out.shape[1])
        with np.errstate(all="ignore"):  # a damaged scale may be infinite; the caller sees it in the numbers
            for start in range(0, len(out), step):
                chunk = np.ascontiguousarray(data[start : start + step])
                try:
                    out[start : start + step] = quants.dequantize(chunk, code)
                except NotImplementedError as error:
                    raise ValueError(f"tensors of type {type_name} cannot be dequantised") from error


def quantize(array: np.ndarray, type_name: str) -> np.ndarray:
    """float32 (rows, n) -> uint8 (rows, bytes of a row): the inverse of `dequantize`, rounded. Type F32, F16 or Q8_0."""
    if type_name in ("F32", "F16"):
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(array, "<f4" if type_name == "F32" else "<f2")
        return numbers.view(np.uint8).reshape(len(array), -1)
    quants, code = _package(type_name)
    return quants.quantize(np.ascontiguousarray(array, np.float32), code)


class QuantizedMatrix:
    """A frozen weight matrix (out, in) in the bytes of a GGUF type; `rows`, `take` and `dequantize` give it as float32.

    raw: uint8 (out, bytes of a row), C-contiguous, as `GGUF.raw(name)` gives it; it is not copied. type: a name in TYPES.
    shape: (out, in), the numbers. ndim, size and dtype (float32) are those of the array that it stands for; nbytes is what
    it takes as stored. Raises ValueError for a type that holds no weights and for bytes that do not fit the shape.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, raw: np.ndarray, type: str, shape: Sequence[int]) -> None:
        if type not in TYPES or type in _NOT_WEIGHTS:
            known = ", ".join(name for name in TYPES if name not in _NOT_WEIGHTS)
            raise ValueError(f"the type of a weight matrix must be one of {known}; got {type!r}")
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"a weight matrix has the shape (out, in), both at least 1; got {tuple(shape)}")
        n_out, n_in = (int(size) for size in shape)
        block, plain = TYPES[type], isinstance(raw, np.ndarray) and not isinstance(raw, np.ma.MaskedArray)
        if n_in % block.block:
            raise ValueError(f"rows of type {type} consist of blocks of {block.block} numbers; got rows of {n_in}")
        expected = (n_out, n_in // block.block * block.n_bytes)
        if not plain or raw.dtype != np.uint8 or raw.shape != expected or not raw.flags.c_contiguous:
            given = f"{raw.dtype} {raw.shape}" if plain else f"a {raw.__class__.__name__}"
            wanted = f"C-contiguous uint8 {expected}, the bytes of a {type} matrix {(n_out, n_in)}"
            raise ValueError(f"raw must be {wanted}; got {given}")
        if raw.flags.writeable:
            raw = raw.view()
            raw.flags.writeable = False
        self.raw, self.type, self.shape = raw, type, (n_out, n_in)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows start to stop-1 -> float32 (stop-start, in), written into `out` if one is given (C-contiguous)."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows must lie inside 0:{self.shape[0]}, got {start}:{stop}")
        return self._read(self.raw[start:stop], out)

    def take(self, ids: npt.ArrayLike) -> np.ndarray:
        """One row per id. ids: whole numbers (N,) from 0 to out-1 -> float32 (N, in)."""
        return self._read(self.raw[whole_numbers("token_ids", ids, 0, self.shape[0])], None)

    def dequantize(self) -> np.ndarray:
        """The whole matrix -> float32 (out, in)."""
        return self._read(self.raw, None)

    def bands(self) -> list[slice]:
        """Slices of the rows, one after the other, each few enough to be dequantised at once."""
        step = max(1, _BAND // self.shape[1])
        return [slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    # what the ops of numpy do with a weight: x @ weight.T, d_y @ weight, table[token_ids]

    __array_ufunc__ = None  # `array @ matrix` is __rmatmul__, not a loop over objects

    def __getitem__(self, ids: npt.ArrayLike) -> np.ndarray:
        """One row per id, as `take`."""
        return self.take(ids)

    def __rmatmul__(self, d_y: np.ndarray) -> np.ndarray:
        """d_y W, a band of rows of W at a time: d_y (N, out) -> (N, in)."""
        d_x = np.zeros((len(d_y), self.shape[1]), d_y.dtype)
        for rows in self.bands():
            d_x += d_y[:, rows] @ self.rows(rows.start, rows.stop)  # (N, rows) @ (rows, in)
        return d_x

    @property
    def T(self) -> "_Transposed":
        return _Transposed(self)

    def __repr__(self) -> str:
        return f"QuantizedMatrix({self.shape[0]} x {self.shape[1]} {self.type}, {self.nbytes:,} bytes)"

    def _read(self, raw: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        shape = (len(raw), self.shape[1])
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a C-contiguous float32 array {shape}, got {out.dtype} {out.shape}")
        if len(raw):
            dequantize(raw, self.type, out)
        return out


class _Transposed:
    """W^T of a `QuantizedMatrix` W, to multiply with from the left."""

    __array_ufunc__ = None

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self.matrix = matrix

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """x W^T, a band of rows of W at a time: x (N, in) -> (N, out)."""
        y = np.empty((len(x), self.matrix.shape[0]), x.dtype)
        for rows in self.matrix.bands():
            y[:, rows] = x @ self.matrix.rows(rows.start, rows.stop).T  # (N, in) @ (in, rows)
        return y


QUANTIZED_IS_FROZEN = (
    "d_weight or d_table: a quantised weight is frozen and has no gradient: pass None, or dequantise it to train it"
)


def is_frozen(weight: "Leaf") -> bool:
    """Whether a weight can have no gradient, because it is quantised."""
    return isinstance(weight, QuantizedMatrix)


def check_trainable(weight: "Leaf") -> None:
    """Raises ValueError for a weight that can have no gradient, because it is quantised."""
    if is_frozen(weight):
        raise ValueError(QUANTIZED_IS_FROZEN)


Leaf = np.ndarray | QuantizedMatrix  # of a parameter tree whose matrices may stay as they are stored


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled dequantisers, or None: not built, not for this CPU, or TOY_PURE_PYTHON is set."""
    if os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0") or sys.byteorder != "little":
        return None
    try:
        from toy._kernels import quantized
    except ImportError:
        return None
    return quantized


def _words(data: np.ndarray, dtype: str) -> np.ndarray:
    """The rows read as numbers of this dtype, without a copy where the bytes allow."""
    if data.strides[-1] != 1:
        data = np.ascontiguousarray(data)
    return data.view(dtype)


def _package(type_name: str) -> tuple[Any, Any]:
    if type_name.startswith("I") and type_name[1:].isdigit():
        raise ValueError(f"tensors of type {type_name} hold whole numbers, not weights")
    gguf = optional_package("gguf", f"tensors of type {type_name}")
    try:
        return gguf.quants, gguf.GGMLQuantizationType[type_name]
    except KeyError:
        raise ValueError(f"tensors of type {type_name} need a newer `gguf` package: pip install -U gguf") from None


def dequantized(leaf: Leaf) -> np.ndarray:
    """A leaf of a parameter tree as a float32 array: an array as it is, a `QuantizedMatrix` dequantised as a whole."""
    return leaf.dequantize() if isinstance(leaf, QuantizedMatrix) else leaf
