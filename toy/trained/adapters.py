"""Adapters at use: read from their files, each with a scale of its own, and put together to one."""

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toy.config import LanguageModelConfig
from toy.files.atomic import StrPath
from toy.files.gguf_write import Adapter, check_adapter, rank_axes
from toy.files.peft import open_adapter
from toy.quantized import Leaf

# one adapter, several, or several with what each is multiplied by
Adapters = StrPath | Iterable[StrPath] | Mapping[StrPath, float]


class Together(NamedTuple):
    """Adapters put together. parameters: dict of names to arrays, beside the base's in the tree. alpha: of all of them, None:
    their scale is in the arrays."""

    parameters: dict[str, np.ndarray]
    alpha: float | None


class AdapterWarning(UserWarning):
    """Something in an adapter's file is not used."""


def with_scales(adapters: Adapters | None) -> list[tuple[Path, float]]:
    """Pairs of the paths of adapters and their scales. Raises ValueError for a scale that is no finite number."""
    if adapters is None:
        return []
    if isinstance(adapters, (str, os.PathLike)):
        return [(Path(adapters), 1.0)]
    pairs = adapters.items() if isinstance(adapters, Mapping) else ((path, 1.0) for path in adapters)
    found = [(Path(path), float(scale)) for path, scale in pairs]
    for path, scale in found:
        if not np.isfinite(scale):
            raise ValueError(f"the scale of {path} must be a finite number, got {scale}")
    return found


def read_adapters(
    adapters: Iterable[tuple[Path, float]], config: LanguageModelConfig, base: Mapping[str, Leaf]
) -> Together:
    """The adapters in GGUF files and PEFT folders, each times its scale -> `Together`. config, base: of the model.

    Errors as `open_adapter`; an AdapterWarning for norms in a file, which are not used.
    """
    read = []
    for path, scale in adapters:
        adapter = open_adapter(path, config, base=base)
        read.append((adapter, scale))
        if adapter.ignored:
            more = "" if len(adapter.ignored) == 1 else f" and {len(adapter.ignored) - 1} more"
            message = (
                f"{path} has norms beside its adapters ({adapter.ignored[0]}{more}): they are not used, as in llama.cpp"
            )
            warnings.warn(message, AdapterWarning, stacklevel=2)
    return together(read)


def together(adapters: Iterable[tuple[Adapter, float]]) -> Together:
    """One adapter that computes the sum of several, each times its scale.

    s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]. What needs no such joining is left as it is: the alpha of a single adapter
    whose pairs are of one rank.
    """
    adapters = list(adapters)
    if len(adapters) == 1:
        (adapter, scale), ranks = adapters[0], set(check_adapter(adapters[0][0].parameters).values())
        if len(ranks) == 1 and scale != 0:
            # None and a rank as alpha are the same scale of 1
            alpha = adapter.alpha if scale == 1 else scale * (adapter.alpha or ranks.pop())
            return Together(adapter.parameters, alpha)
    parts: dict[str, list[np.ndarray]] = {}
    for adapter, scale in adapters:
        for stem, rank in check_adapter(adapter.parameters).items():
            factor = scale if adapter.alpha is None else scale * adapter.alpha / rank
            parts.setdefault(f"{stem}.lora_a", []).append(adapter.parameters[f"{stem}.lora_a"])
            parts.setdefault(f"{stem}.lora_b", []).append(np.float32(factor) * adapter.parameters[f"{stem}.lora_b"])
    joined = {}
    for name, arrays in parts.items():
        axis = rank_axes(name.rpartition(".")[0])["ab".index(name[-1])]
        joined[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)
    return Together(joined, None)
