"""The tensor types of GGUF files: how many bytes a block of numbers takes, and what numbers the bytes stand for.

A quantised type stores a row in blocks: some bits per number, and one scale (and minimum) for the whole block. F32, F16 and
BF16 are read by numpy; the block formats by the `gguf` package, which llama.cpp's own authors keep.
"""

from typing import NamedTuple

import numpy as np

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

_CHUNK = 2**18  # numbers dequantised at a time: the temporaries stay in the cache and small beside the result


def dequantize(data, type_name, out):
    """Write what `data` stands for into `out`.

    data: uint8 (rows, bytes of a row), as in the file. out: float32 (rows, numbers of a row), C-contiguous.
    Raises ValueError for a type that holds no floating-point weights or that the `gguf` package cannot read, and
    RuntimeError (with the command to type) when that package is needed and missing.
    """
    if type_name == "F32":
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


def quantize(array, type_name):
    """float32 (rows, n) -> uint8 (rows, bytes of a row): the inverse of `dequantize`, rounded. Type F32, F16 or Q8_0."""
    if type_name in ("F32", "F16"):
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(array, "<f4" if type_name == "F32" else "<f2")
        return numbers.view(np.uint8).reshape(len(array), -1)
    quants, code = _package(type_name)
    return quants.quantize(np.ascontiguousarray(array, np.float32), code)


def _words(data, dtype):
    """The rows read as numbers of this dtype, without a copy where the bytes allow."""
    if data.strides[-1] != 1:
        data = np.ascontiguousarray(data)
    return data.view(dtype)


def _package(type_name):
    if type_name.startswith("I") and type_name[1:].isdigit():
        raise ValueError(f"tensors of type {type_name} hold whole numbers, not weights")
    gguf = optional_package("gguf", f"tensors of type {type_name}")
    try:
        return gguf.quants, gguf.GGMLQuantizationType[type_name]
    except KeyError:
        raise ValueError(f"tensors of type {type_name} need a newer `gguf` package: pip install -U gguf") from None
