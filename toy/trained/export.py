"""Writing a model that exists as a GGUF file: as it is, with its adapters merged in, or the adapters alone."""

from collections.abc import Mapping
from typing import cast

import numpy as np

from toy.config import LanguageModelConfig, LlamaConfig
from toy.files.atomic import StrPath
from toy.files.gguf_models import architecture_of
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models.lens import without_lens
from toy.quantized import Leaf, dequantized
from toy.trained.load import Stored


def check_exportable(stored: Stored) -> None:
    """Raise ValueError unless llama.cpp has the architecture of this `toy.trained.Stored` (a TransformerLM is none)."""
    architecture_of(stored.config)


def export_model(stored: Stored, path: StrPath, type: str = "f32") -> None:
    """Write the whole model, its adapters merged in, as a GGUF file; atomically.

    stored: a `toy.trained.Stored`. type: of the matrices, "f32", "f16" or "q8_0". Raises the errors of `write_gguf`.
    """
    check_exportable(stored)
    config, leaves = plain_model(stored)
    parameters = {name: dequantized(leaf) for name, leaf in leaves.items()}
    name = stored.name or f"toy {stored.arch}"
    write_gguf(path, config, parameters, stored.tokenizer, type=type, metadata={"general.name": name})


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
    if not stored.adapters or stored.alpha is None:
        raise ValueError(f"{stored.path} has no adapters to export")
    write_adapter(
        path,
        cast(LanguageModelConfig, stored.config),
        stored.adapters,
        stored.alpha,
        base=stored.parameters,
        architecture=stored.in_gguf,
    )


def merge_adapters(parameters: Mapping[str, Leaf], adapters: Mapping[str, np.ndarray], scale: float) -> dict[str, Leaf]:
    """W + scale * B A for every matrix that has adapters (Hu et al. 2021, eq. 3); the other parameters as they are.

    parameters: dict of names to arrays or `toy.quantized.QuantizedMatrix`. adapters: dict of `blk.0.attn_q.lora_a` (rank, in)
    and `blk.0.attn_q.lora_b` (out, rank). The merged matrices are new float32 arrays.
    Raises ValueError for adapters without a matrix of their own.
    """
    merged = dict(parameters)
    for name, lora_a in adapters.items():
        stem, _, kind = name.rpartition(".")
        if kind != "lora_a":
            continue
        if f"{stem}.weight" not in parameters:
            raise ValueError(f"there is no matrix {stem}.weight to merge {name} into")
        correction = np.asarray(adapters[f"{stem}.lora_b"], np.float64) @ lora_a  # (out, in)
        merged[f"{stem}.weight"] = (dequantized(parameters[f"{stem}.weight"]) + scale * correction).astype(np.float32)
    return merged
