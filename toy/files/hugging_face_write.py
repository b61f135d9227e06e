"""Writing a model as a folder that transformers' `from_pretrained` opens: the inverse of `toy.files.hugging_face`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toy.config import LanguageModelConfig
from toy.files import gguf_models
from toy.files.folders import replacing_folder
from toy.files.gguf_write import LARGEST
from toy.files.hugging_face import (
    CONFIG,
    WEIGHTS,
    hugging_face_name,
    is_less_one,
    is_transposed,
    permuted_heads,
    rows_of_pairs,
)
from toy.files.hugging_face_config import FAMILIES, Family, keys_of
from toy.files.safetensors_file import NewTensor, write_safetensors
from toy.models.parameters import Shapes, check_arrays
from toy.quantized import Leaf, QuantizedMatrix, dequantized, quantize

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FILES = (CONFIG, WEIGHTS, "generation_config.json", *TOKENIZER_FILES)
_NUMBERS = 2**22  # converted at a time


def write_model_folder(
    path: Path,
    config: LanguageModelConfig,
    parameters: Mapping[str, Leaf],
    dtype: str,
    tokenizer_files: Mapping[str, bytes],
    token_ids: Mapping[str, Any],
) -> None:
    """Write the folder; atomically, so that `path` is never half a model.

    parameters: by this library's names, adapters merged in. dtype: of the matrices, a key of `TORCH_NAMES`; vectors too where
    they lose nothing by it, else float32. tokenizer_files: what is in them, by name. token_ids: bos_token_id and
    eos_token_id, where there are such tokens.
    Raises ValueError for a model that transformers does not have, numbers that are beyond the range of float16, and a folder
    that holds other files; OSError when it cannot be written.
    """
    keys, whole, kind = keys_of(config)
    family, shapes = FAMILIES[kind], gguf_models.parameter_shapes(whole)
    parameters = dict(parameters)
    for name in shapes.keys() - gguf_models.parameter_shapes(config).keys():
        parameters[name] = np.zeros(shapes[name], np.float32)  # the biases that `keys_of` adds
    _check(shapes, parameters)
    tensors = {
        hugging_face_name(name, family): _tensor(name, parameters[name], dtype, whole, family) for name in shapes
    }
    # null: the defaults of transformers' classes are tokens of the original models
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **token_ids}
    keys |= {"dtype": TORCH_NAMES[dtype], "torch_dtype": TORCH_NAMES[dtype], **ids}
    with replacing_folder(path, FILES) as folder:
        write_safetensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, keys)
        if token_ids:
            write_json(folder / "generation_config.json", token_ids)
        for name, data in tokenizer_files.items():
            (folder / name).write_bytes(data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8", newline="\n"
    )


def plain_dtype(parameters: Mapping[str, Leaf]) -> str:
    """The type in which matrices lose nothing: that of all of them when it is float16 or bfloat16, else float32."""
    types = {
        leaf.type if isinstance(leaf, QuantizedMatrix) else "F32" for leaf in parameters.values() if leaf.ndim == 2
    }
    return types.pop() if len(types) == 1 and types <= TORCH_NAMES.keys() else "F32"


def _check(shapes: Shapes, parameters: Mapping[str, Leaf]) -> None:
    plain = {name: leaf for name, leaf in parameters.items() if isinstance(leaf, np.ndarray)}
    check_arrays({name: shape for name, shape in shapes.items() if name in plain or name not in parameters}, plain)


def _tensor(name: str, leaf: Leaf, dtype: str, config: LanguageModelConfig, family: Family) -> NewTensor:
    """One tensor as it stands in a Hugging Face model."""
    shape = leaf.shape
    heads = permuted_heads(name, config, family)
    if is_transposed(name, family):
        return NewTensor(dtype, shape[::-1], lambda: _bands(name, dequantized(leaf).T, dtype))
    if len(shape) == 1:
        vector = np.asarray(leaf, np.float32)
        vector = vector - np.float32(1) if is_less_one(name, family) else vector
        if heads is not None:
            vector = vector[rows_of_pairs(len(vector), heads, to_gguf=False)]
        with np.errstate(over="ignore"):
            kept = quantize(vector[None], dtype)
        exact = dtype == "F32" or (dtype == "F16" and (vector.astype(np.float16) == vector).all())
        exact = exact or (dtype == "BF16" and not (vector.view(np.uint32) & 0xFFFF).any())
        return NewTensor(dtype, shape, lambda: [kept]) if exact else NewTensor("F32", shape, lambda: [vector])
    order = np.arange(shape[0]) if heads is None else rows_of_pairs(shape[0], heads, to_gguf=False)
    return NewTensor(dtype, shape, lambda: _rows(name, leaf, order, dtype))


def _rows(name: str, leaf: Leaf, order: np.ndarray, dtype: str) -> Iterable[np.ndarray]:
    """The rows of a matrix in this order, some at a time: bytes of the type."""
    step = max(1, _NUMBERS // leaf.shape[1])
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        if isinstance(leaf, QuantizedMatrix) and leaf.type == dtype:
            yield np.ascontiguousarray(leaf.raw[rows])
        else:
            yield from _bands(name, leaf.take(rows) if isinstance(leaf, QuantizedMatrix) else leaf[rows], dtype)


def _bands(name: str, matrix: np.ndarray, dtype: str) -> Iterable[np.ndarray]:
    step = max(1, _NUMBERS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        band = np.ascontiguousarray(matrix[start : start + step], np.float32)
        if not np.isfinite(band).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if max(band.max(), -band.min()) > LARGEST.get(dtype, np.inf):
            raise ValueError(f"{name} has numbers beyond the range of {dtype}: write the model as f32")
        yield np.ascontiguousarray(quantize(band, dtype))
