"""Writing a model that exists as a GGUF file: as it is, with its adapters merged in, or the adapters alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from toy.config import LanguageModelConfig, LlamaConfig
from toy.data.tokenizer_json_write import token_ids, tokenizer_files
from toy.files.atomic import StrPath
from toy.files.gguf_models import architecture_of
from toy.files.gguf_types import MIXES
from toy.files.gguf_write import product, write_adapter, write_gguf
from toy.files.hugging_face_write import FILES as HUGGING_FACE_FILES
from toy.files.hugging_face_write import plain_dtype, write_model_folder
from toy.files.peft import FILES as PEFT_FILES
from toy.files.peft import write_peft
from toy.models.lens import without_lens
from toy.quantized import Leaf, QuantizedMatrix, dequantized, quantize
from toy.trained.load import Stored

_PLAIN = ("F32", "F16", "BF16", "Q8_0")


def check_exportable(stored: Stored) -> None:
    """Raise ValueError unless llama.cpp has the architecture of this `toy.trained.Stored` (a TransformerLM is none)."""
    architecture_of(stored.config)


KEEP = "keep"
EXPORT_TYPES = (*MIXES, KEEP)


def export_model(stored: Stored, path: StrPath, type: str = "f32") -> None:
    """Write the whole model, its adapters merged in, as a GGUF file; atomically.

    stored: a `toy.trained.Stored`. type: of the matrices, one of EXPORT_TYPES; "keep": each in the type that it is stored
    in, where nothing was merged into it byte for byte. Raises the errors of `write_gguf`, and ValueError for a type that
    ggml alone can make where ggml is missing.
    """
    check_exportable(stored)
    config, leaves = plain_model(stored)
    types: str | dict[str, str] = type
    if type == KEEP:
        kept = {name: leaf.type for name, leaf in stored.parameters.items() if isinstance(leaf, QuantizedMatrix)}
        types = {name: kept.get(name, "F32") for name in leaves}
    name = stored.name or f"toy {stored.arch}"
    metadata = {"general.name": name}
    write_gguf(path, config, leaves, stored.tokenizer, type=types, metadata=metadata, quantizer=_quantize)


def _quantize(array: np.ndarray, type: str) -> np.ndarray:
    """float32 rows in the bytes of a type, by ggml's own quantiser where it has one and ggml is there."""
    if type in _PLAIN:
        return quantize(array, type)
    import ggml_bridge

    there, why = ggml_bridge.available()
    if there:
        return ggml_bridge.quantize(array, type.lower())
    try:
        return quantize(array, type)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{type} is made by ggml's own quantiser, which is not there ({why}); or choose q8_0"
        ) from error


def plain_model(stored: Stored) -> tuple[LanguageModelConfig, Mapping[str, Leaf]]:
    """The config and the parameters of a `toy.trained.Stored` with its adapters merged in and without a lens. What neither
    concerns is left as it is stored."""
    config = cast(LanguageModelConfig, stored.config)
    parameters: Mapping[str, Leaf] = stored.parameters
    if stored.adapters:
        parameters = merge_adapters(parameters, stored.adapters, stored.lora_scale)
    if "token_embd.lens" in parameters:
        config, parameters = without_lens(cast(LlamaConfig, config), parameters)
    return config, parameters


def export_adapter(stored: Stored, path: StrPath) -> None:
    """Write the adapters of a LoRA run as the GGUF file that llama.cpp takes with --lora; atomically.

    Raises ValueError for a model without adapters, and the errors of `write_adapter`.
    """
    if not stored.adapters:
        raise ValueError(f"{stored.path} has no adapters to export")
    write_adapter(
        path,
        cast(LanguageModelConfig, stored.config),
        stored.adapters,
        stored.alpha,
        base=stored.parameters,
        architecture=stored.in_gguf,
    )


__all__ = [
    "EXPORT_TYPES", "HUGGING_FACE_FILES", "HUGGING_FACE_TYPES", "KEEP", "PEFT_FILES", "check_exportable", "export_adapter",
    "export_hugging_face", "export_model", "export_peft", "merge_adapters", "plain_model",
]  # fmt: skip

HUGGING_FACE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def export_hugging_face(stored: Stored, path: StrPath, type: str = "f32") -> None:
    """Write the whole model, its adapters merged in, as a folder that transformers' from_pretrained opens; atomically.

    type: of the matrices, f32, f16, bf16, or "keep": as they are stored where that is one of these, else f32. Raises the
    errors of `write_model_folder`, and ValueError for another type and a tokenizer that cannot be written.
    """
    config, leaves = plain_model(stored)
    if type not in (*HUGGING_FACE_TYPES, KEEP):
        raise ValueError(f"a model for Hugging Face is written as {', '.join(HUGGING_FACE_TYPES)} or keep, not {type}")
    dtype = plain_dtype(leaves) if type == KEEP else HUGGING_FACE_TYPES[type]
    write_model_folder(
        Path(path), config, leaves, dtype, tokenizer_files(stored.tokenizer), token_ids(stored.tokenizer)
    )


def export_peft(stored: Stored, path: StrPath) -> None:
    """Write the adapters of a LoRA run as a folder that PEFT's from_pretrained opens; atomically.

    Raises ValueError for a model without adapters, and the errors of `write_peft`.
    """
    if not stored.adapters:
        raise ValueError(f"{stored.path} has no adapters to export")
    base = stored.path if stored.base is None else stored.base
    write_peft(Path(path), cast(LanguageModelConfig, stored.config), stored.adapters, stored.alpha, str(base))


def merge_adapters(parameters: Mapping[str, Leaf], adapters: Mapping[str, np.ndarray], scale: float) -> dict[str, Leaf]:
    """W + scale * B A for every matrix that has adapters (Hu et al. 2021, eq. 3); the other parameters as they are.

    parameters: dict of names to arrays or `toy.quantized.QuantizedMatrix`. adapters: dict of `blk.0.attn_q.lora_a` (rank, in)
    and `blk.0.attn_q.lora_b` (out, rank), of any matrices. The merged matrices are new float32 arrays.
    Raises ValueError for adapters without a matrix of their own.
    """
    merged = dict(parameters)
    for name, lora_a in adapters.items():
        stem, _, kind = name.rpartition(".")
        if kind != "lora_a":
            continue
        if f"{stem}.weight" not in parameters:
            raise ValueError(f"there is no matrix {stem}.weight to merge {name} into")
        correction = product(stem, lora_a, adapters[f"{stem}.lora_b"])  # (out, in)
        merged[f"{stem}.weight"] = (dequantized(parameters[f"{stem}.weight"]) + scale * correction).astype(np.float32)
    return merged
