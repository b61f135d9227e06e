"""Writing GGUF files that llama.cpp loads: whole models, and LoRA adapters."""

import collections
import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from toy.config import LanguageModelConfig
from toy.files import gguf_models
from toy.files.atomic import StrPath, replacing
from toy.files.errors import BadFileError
from toy.files.gguf import ARRAY, BOOL, GGUF, SCALARS, STRING
from toy.files.gguf_types import MIXES, is_plain, tensor_types
from toy.files.gguf_vocabulary import tokenizer_metadata
from toy.models.parameters import check_arrays
from toy.quantized import TYPES, Leaf, QuantizedMatrix, quantize

# beyond these a number or the float16 scale of a block is infinite: a scale times the largest whole number of the type
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0, "Q5_0": 16 * 65504.0}
ALIGNMENT = 32
_ROWS = 2**20  # numbers converted at a time
Quantizer = Callable[[np.ndarray, str], np.ndarray]  # as `toy.quantized.quantize`
_TYPE_CODES = {np.dtype(form): code for code, form in SCALARS.items()}


def write_gguf(
    path: StrPath,
    config: LanguageModelConfig,
    parameters: Mapping[str, npt.ArrayLike | QuantizedMatrix],
    tokenizer: Any = None,
    type: str | Mapping[str, str] = "f32",
    metadata: Mapping[str, Any] | None = None,
    quantizer: Quantizer = quantize,
) -> None:
    """Write a model as a GGUF file for llama.cpp and `toy.GGUF`; atomically, so that `path` is never half a file.

    config: LlamaConfig or GPT2Config. parameters: mapping of this library's names to arrays (adapters merged in).
    tokenizer: one of `toy.data`, or None (llama.cpp then takes token ids alone); what llama.cpp cannot be told about it is
    in `toy.files.gguf_vocabulary.tokenizer_metadata`. type: of the matrices, a name in `toy.files.gguf_types.MIXES` (f16
    for a matrix whose rows are no multiple of the type's block), or a mapping of names to tensor types ("Q4_K"); vectors
    and GPT-2's positions are F32, as llama.cpp wants them. A parameter that is a `toy.quantized.QuantizedMatrix` of the
    type that it is to have keeps its bytes. metadata: further keys, such as general.name; general.* or of your own prefix.
    quantizer: makes bytes of float32 rows and the name of a type, for types that `toy.quantized.quantize` has not. Raises
    ValueError for a config without a GGUF architecture (TransformerLM), parameters or a tokenizer that do not fit it, and
    numbers beyond the range of f16; OSError when the file cannot be written.
    """
    if isinstance(type, str) and type not in MIXES:
        raise ValueError(f"type must be one of {', '.join(MIXES)}, got {type!r}")
    shapes = gguf_models.parameter_shapes(config)
    quantized = {name: leaf.shape for name, leaf in parameters.items() if isinstance(leaf, QuantizedMatrix)}
    fitting = {name for name, shape in quantized.items() if shape == shapes.get(name)}  # `_write` checks their numbers
    check_arrays(
        {name: shape for name, shape in shapes.items() if name not in fitting},
        {name: cast(npt.ArrayLike, leaf) for name, leaf in parameters.items() if name not in fitting},
    )
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    if isinstance(type, str):
        types, file_type = tensor_types(shapes, type, config.n_layers), MIXES[type].file_type
    else:
        types = {name: "F32" if is_plain(name, shape) else type[name] for name, shape in shapes.items()}
        file_type = _file_type(types, shapes)
    architecture = gguf_models.architecture_of(config)
    entries = {
        "general.type": "model",
        "general.name": f"toy {architecture}",
        **gguf_models.metadata_of(config),
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **tokenizer_metadata(tokenizer),
    }
    _add_own(entries, metadata, "general.name")
    tensors = [(name, _leaf(parameters[name]), types[name]) for name in shapes]
    tensors += [(name, array, "F32") for name, array in gguf_models.constant_tensors(config).items()]
    _write(path, entries, tensors, quantizer)


def _file_type(types, shapes):
    """general.file_type, which is told to readers only: that of the mix whose base is the commonest type, by numbers."""
    counts: collections.Counter[str] = collections.Counter()
    for name, kind in types.items():
        if len(shapes[name]) >= 2:
            counts[kind] += math.prod(shapes[name])
    commonest = counts.most_common(1)[0][0]
    return next((mix.file_type for mix in reversed(MIXES.values()) if mix.base == commonest), 0)


def _leaf(leaf):
    return leaf if isinstance(leaf, QuantizedMatrix) else np.asarray(leaf)


class Adapter(NamedTuple):
    """A LoRA adapter. parameters: dict of `blk.0.attn_q.lora_a` (rank, in) and `...lora_b` (out, rank), float32, to be
    put into the parameter tree beside the base's. rank: the largest, of pairs that may have different ones. alpha: the
    product is scaled by alpha / rank, None = by 1. metadata: all keys of the file. ignored: names of its norms, which
    llama.cpp does not read."""

    architecture: str
    rank: int
    alpha: float | None
    parameters: dict[str, np.ndarray]
    metadata: dict[str, Any]
    ignored: tuple[str, ...] = ()


def write_adapter(
    path: StrPath,
    config: LanguageModelConfig,
    adapters: Mapping[str, npt.ArrayLike],
    alpha: float | None,
    base: GGUF | Mapping[str, Leaf] | None = None,
    metadata: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> None:
    """Write LoRA adapters as the GGUF file that llama.cpp takes with --lora, in F32; atomically.

    config: of the base model. adapters: mapping of `blk.0.attn_q.lora_a` (rank, in) and `blk.0.attn_q.lora_b` (out, rank),
    as in the parameter tree. alpha: every product is scaled by alpha / its rank, None: by 1. base: the base model (a `GGUF`,
    or its parameters), whose fingerprint is recorded so that `read_adapter` knows it again. metadata: as `write_gguf`.
    architecture: of the file that the base is in, which llama.cpp compares; None: that of a base that is a `GGUF`, or the one
    in which such a model is written.
    Raises ValueError for adapters that do not fit the model; OSError as `write_gguf`.
    """
    parameters = {name: np.asarray(array) for name, array in dict(adapters).items()}
    check_adapter(parameters, config)
    if architecture is None and isinstance(base, GGUF):
        architecture = base.architecture
    if alpha is not None and not (np.isfinite(alpha) and alpha != 0):
        raise ValueError(f"alpha must be a positive number, or one below 0 to take away, got {alpha!r}")
    entries = {
        "general.type": "adapter",
        "general.architecture": architecture or gguf_models.architecture_of(config),
        "general.name": "toy LoRA adapter",
        "general.file_type": 0,
        "adapter.type": "lora",
    }
    if alpha is not None:
        entries["adapter.lora.alpha"] = float(alpha)
    if base is not None:
        entries["toy.base.fingerprint"] = fingerprint(base)
    _add_own(entries, metadata, "general.name")
    names = {name: re.sub(r"\.(lora_[ab])$", r".weight.\1", name) for name in parameters}
    _write(path, entries, [(names[name], array, "F32") for name, array in parameters.items()])


def read_adapter(
    path: StrPath, config: LanguageModelConfig | None = None, base: GGUF | Mapping[str, Leaf] | None = None
) -> Adapter:
    """The LoRA adapter in a GGUF file -> `Adapter`.

    config: of the model it is for; base: that model (a `GGUF`, or its parameters), compared with the fingerprint in the file
    if there is one. As in llama.cpp every pair has a rank of its own, an alpha of 0, or none, means a scale of 1, and norms
    in the file are not read. Raises BadFileError for a damaged file, ValueError for one that is no LoRA adapter, has what
    cannot be used, or is for another base.
    """
    with GGUF.open(path) as gguf:
        entries = dict(gguf.metadata)
        if entries.get("general.type") != "adapter" or entries.get("adapter.type") != "lora":
            raise ValueError(
                f"{path} is not a LoRA adapter (general.type is {gguf_models.short(entries.get('general.type'))})"
            )
        alpha = entries.get("adapter.lora.alpha", 0.0)
        if type(alpha) is not float or not np.isfinite(alpha):
            raise BadFileError(path, f"has adapter.lora.alpha = {gguf_models.short(alpha)}, expected a float")
        if invoked := sorted(key for key in entries if key.startswith("adapter.alora.")):
            raise ValueError(
                f"{path} has {invoked[0]}: it is to correct only what follows certain tokens, and this library has "
                "adapters for all tokens alone"
            )
        parameters, ignored = {}, []
        for name in gguf.tensors:
            if name.endswith("_norm.weight"):
                ignored.append(name)
                continue
            match = re.fullmatch(r"(.+)\.weight\.(lora_[ab])", name)
            if match is None:
                raise ValueError(
                    f"{path} has the tensor {name!r}, which is no part of an adapter that this library can use"
                )
            parameters[f"{match[1]}.{match[2]}"] = array = gguf.dequantize(name)
            if not np.isfinite(array).all():
                raise BadFileError(path, f"tensor {name!r} holds numbers that are not finite")
    try:
        if config is not None and not gguf_models.is_architecture_of(gguf.architecture, config):
            raise ValueError(f"it is for a {gguf.architecture} model, not {gguf_models.architecture_of(config)}")
        ranks = check_adapter(parameters, config)
    except ValueError as error:
        raise ValueError(f"{path} is an adapter for another base: {error}") from error
    recorded = entries.get("toy.base.fingerprint")
    if base is not None and recorded is not None and recorded != fingerprint(base):
        raise ValueError(f"{path} is an adapter for another base: the weights of its model are not these")
    return Adapter(gguf.architecture, max(ranks.values()), alpha or None, parameters, entries, tuple(ignored))


def fingerprint(base: GGUF | Mapping[str, Leaf]) -> str:
    """What tells a base model from others of the same shape, and is the same in every tensor type: a digest of its norm
    gains, which stay F32 whatever the matrices become. base: a `GGUF` or a mapping of parameters.

    Models that were never trained have gains of 1 and cannot be told apart."""
    read = base.dequantize if isinstance(base, GGUF) else base.__getitem__
    names = base.tensors if isinstance(base, GGUF) else base
    digest = hashlib.sha256()
    for name in sorted(name for name in names if name.endswith("norm.weight")):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(read(name), "<f4").tobytes())
    return digest.hexdigest()


def digest(leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 of weights as they are stored: names, types, shapes and bytes. leaves: dict of names to float32 arrays or
    `toy.quantized.QuantizedMatrix`."""
    result = hashlib.sha256()
    for name in sorted(leaves):
        leaf = leaves[name]
        data, kind = (leaf, "F32") if isinstance(leaf, np.ndarray) else (leaf.raw, leaf.type)
        result.update(repr((name, kind, leaf.shape)).encode())
        result.update(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


EMBEDDING = "token_embd"  # the one matrix whose rows are looked up: lora_a is (V, rank) and lora_b (D, rank)


def check_adapter(parameters: Mapping[str, np.ndarray], config: LanguageModelConfig | None = None) -> dict[str, int]:
    """dict of the matrices, `blk.0.attn_q`, to the ranks of their adapters.

    Raises ValueError unless there are pairs that fit the matrices of `config` (None: any).
    """
    shapes = None if config is None else gguf_models.parameter_shapes(config)
    if not parameters:
        raise ValueError("it has no adapters")
    ranks: dict[str, int] = {}
    for name, array in parameters.items():
        stem, _, kind = name.rpartition(".")
        other = f"{stem}.{'lora_b' if kind == 'lora_a' else 'lora_a'}"
        if kind not in ("lora_a", "lora_b") or other not in parameters:
            raise ValueError(f"{name} is not one of a pair lora_a, lora_b")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected a matrix")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        inner = rank_axes(stem)["ab".index(kind[-1])]
        if ranks.setdefault(stem, array.shape[inner]) != array.shape[inner]:
            raise ValueError(f"the adapters of {stem} have different ranks: {ranks[stem]} and {array.shape[inner]}")
        if shapes is not None:
            weight = shapes.get(f"{stem}.weight")
            if weight is None or len(weight) != 2:
                tied = ": its output matrix is its token embedding" if stem == "output" else ""
                raise ValueError(f"the model has no matrix {stem}.weight{tied}")
            if stem == EMBEDDING and "output.weight" not in shapes:
                raise ValueError(
                    f"it corrects {stem}.weight, which is the model's output matrix too: llama.cpp takes no such adapter"
                )
            if stem == "position_embd":
                raise ValueError(
                    f"{stem}.weight is looked up, and llama.cpp corrects only matrices that are multiplied"
                )
            looked_up, is_a = stem == EMBEDDING, kind == "lora_a"
            if array.shape[1 - inner] != weight[0 if looked_up == is_a else 1]:
                wanted = ", whose adapters are (rows, rank) and (columns, rank)" if looked_up else ""
                raise ValueError(f"{name} has shape {array.shape} and {stem}.weight {weight}{wanted}")
    return ranks


def rank_axes(stem: str) -> tuple[int, int]:
    """Which axis of the `lora_a` and the `lora_b` of a matrix is the rank."""
    return (1 if stem == EMBEDDING else 0), 1


def product(stem: str, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """The correction of a matrix (out, in) by its adapters, float64: B A, of the embedding A B^T."""
    a, b = np.asarray(lora_a, np.float64), np.asarray(lora_b, np.float64)
    return a @ b.T if stem == EMBEDDING else b @ a


def _add_own(entries, metadata, *replaceable):
    for key, value in (metadata or {}).items():
        taken = key in entries and key not in replaceable
        if taken or key == "general.alignment" or key.split(".")[0] in {"tokenizer", "adapter", *gguf_models.FORMS}:
            raise ValueError(f"the metadata key {key!r} is written from the model and cannot be chosen")
        entries[key] = value


def _write(path, entries, tensors, quantizer=quantize):
    """tensors: list of (name, array or QuantizedMatrix, type name). Matrices are converted some rows at a time; those that
    are of the type already are written as they are."""
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)))
    for key, value in entries.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for name, array, kind in tensors:
        header += _string(name) + struct.pack("<I", array.ndim)
        header += struct.pack(f"<{array.ndim}Q", *reversed(array.shape))
        header += struct.pack("<IQ", TYPES[kind].code, offset)
        offset += _padded(array.size // TYPES[kind].block * TYPES[kind].n_bytes)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.write(bytes(_padded(len(header)) - len(header)))
        for name, array, kind in tensors:
            start = file.tell()
            width = array.shape[-1]
            step, n_rows = max(1, _ROWS // width), array.size // width
            for first in range(0, n_rows, step):
                last = min(first + step, n_rows)
                if isinstance(array, QuantizedMatrix):
                    part = array.rows(first, last)
                    if not np.isfinite(part).all():
                        raise ValueError(f"{name} holds numbers that are not finite: the file it is from is damaged")
                    if array.type == kind:
                        file.write(array.raw[first:last].data)
                        continue
                else:
                    part = np.ascontiguousarray(array.reshape(-1, width)[first:last], np.float32)
                if max(part.max(), -part.min()) > LARGEST.get(kind, np.inf):
                    raise ValueError(f"{name} has numbers beyond the range of {kind}: write the model as f32")
                file.write(quantizer(part, kind).data)
            file.write(bytes(_padded(file.tell() - start) - (file.tell() - start)))
        file.flush()
        os.fsync(file.fileno())


def _padded(n_bytes):
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key, value):
    """The type code and the bytes of a metadata value. Whole numbers are written as uint32, as llama.cpp reads them."""
    if isinstance(value, (bool, np.bool_)):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, (int, np.integer)):
        kind = 4 if 0 <= value < 2**32 else 11
        return struct.pack("<I", kind) + struct.pack(SCALARS[kind], value)
    if isinstance(value, (float, np.floating)):
        return struct.pack("<If", 6, value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    array = np.asarray(value)
    if array.ndim == 1 and array.dtype == bool:
        return struct.pack("<IIQ", ARRAY, BOOL, len(array)) + array.tobytes()
    if array.ndim == 1 and array.dtype in _TYPE_CODES:
        return struct.pack("<IIQ", ARRAY, _TYPE_CODES[array.dtype], len(array)) + array.tobytes()
    raise ValueError(f"the metadata key {key!r} has a value that GGUF cannot hold: {str(value)[:60]}")
