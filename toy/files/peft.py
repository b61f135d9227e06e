"""LoRA adapters in the form of PEFT: a folder with `adapter_config.json` and `adapter_model.safetensors`, read and written.

The arrays are the same as in a GGUF file, A (rank, in) and B (out, rank), under other names; the rows of B for queries and
keys stand in the order of the model that they correct (`toy.files.hugging_face`). What a PEFT adapter can say and this
library cannot do is refused by its name, and so is a setting that is not known here and switched on.

Source: PEFT, https://huggingface.co/docs/peft, tuners/lora/config.py of the package
"""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toy.config import LanguageModelConfig
from toy.files import gguf_models
from toy.files.atomic import StrPath
from toy.files.errors import BadFileError
from toy.files.folders import replacing_folder
from toy.files.gguf import GGUF
from toy.files.gguf_models import UnsupportedModelError, short
from toy.files.gguf_write import Adapter, check_adapter, read_adapter
from toy.files.hugging_face import hugging_face_name, permuted_heads, rows_of_pairs
from toy.files.hugging_face_config import FAMILIES, Family
from toy.files.hugging_face_write import write_json
from toy.files.safetensors_file import (
    DTYPES,
    NewTensor,
    StoredTensor,
    map_safetensors,
    read_json,
    refuse_pickle,
    shown,
    write_safetensors,
)
from toy.quantized import Leaf, dequantize, dequantized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
_PREFIX = "base_model.model."
_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# settings that change nothing in what trained adapters compute, or that the tensors themselves say
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config",
}  # fmt: skip
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# the others, "pissa" say, change the base too, whose weights PEFT then makes anew
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_KINDS = {
    "lora_magnitude_vector": "use_dora (a DoRA)", "lora_embedding": "an adapter on an embedding",
    "modules_to_save": "modules_to_save", "lora_bias": "lora_bias", ".bias": "bias",
}  # fmt: skip
_PATTERN = re.compile(r"(?:[\w.^$|()\[\]-]|\\[.dw]|(?<![()|^])[*+?](?![*+?{]))+", re.ASCII)
_LONGEST_PATTERN, _MOST_REPEATS = 200, 3


def open_adapter(
    path: StrPath, config: LanguageModelConfig | None = None, base: GGUF | Mapping[str, Leaf] | None = None
) -> Adapter:
    """The adapter in a GGUF file, or in a folder of PEFT. Arguments and errors as `read_adapter` and `read_peft`."""
    path = Path(path)
    refuse_pickle(path)
    if path.name in FILES and path.is_file():
        path = path.parent
    if not path.is_dir():
        return read_adapter(path, config, base)
    if config is None:
        raise ValueError(f"{path} is an adapter of PEFT, which is read with the config of its base")
    return read_peft(path, config, base)


def family_of(config: LanguageModelConfig) -> Family:
    """How a model of this config is called in Hugging Face's world. Raises ValueError when it is not there."""
    for family in FAMILIES.values():
        if gguf_models.is_architecture_of(family.form, config):
            return family
    raise ValueError(f"PEFT has no names for a model of architecture {gguf_models.architecture_of(config)}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_peft(path: Path, config: LanguageModelConfig, base: GGUF | Mapping[str, Leaf] | None = None) -> Adapter:
    """The LoRA adapter in a folder of PEFT -> `Adapter`. config: of the model that it is for. base: that model; PEFT puts a
    copy of its matrices beside adapters on the output, which must be the same.

    Raises BadFileError for files that are damaged or missing, UnsupportedModelError for what this library cannot do (DoRA,
    whole modules, biases, embeddings), ValueError for an adapter of another base.
    """
    if not (path / CONFIG).exists():
        raise BadFileError(path, f"has no {CONFIG}: it is no adapter of PEFT")
    said = read_json(path / CONFIG)
    _check_settings(path / CONFIG, said)
    if not (path / WEIGHTS).exists():
        for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"):
            if (path / name).exists():
                refuse_pickle(path / name)
        raise BadFileError(path / WEIGHTS, "is missing: the adapters should be in it")
    parameters, modules = _parameters(path / WEIGHTS, config, base)
    try:
        check_adapter(parameters, config)
    except ValueError as error:
        raise ValueError(f"{path} is an adapter for another base: {error}") from error
    ranks = {stem: len(parameters[f"{stem}.lora_a"]) for stem in modules}
    for stem, module in modules.items():
        rank = _said_for(path / CONFIG, said, "rank_pattern", module, said.get("r", 8))
        if type(rank) is not int or rank != ranks[stem]:
            raise BadFileError(
                path, f"says rank {short(rank)} for {module}, and its adapters are of rank {ranks[stem]}"
            )
    alphas = {stem: _alpha(path / CONFIG, said, modules[stem], ranks[stem]) for stem in modules}
    alpha: float | None = next(iter(alphas.values()))
    if len(set(alphas.values())) > 1:  # scales of their own: they go into B
        alpha = None
        for stem, own in alphas.items():
            parameters[f"{stem}.lora_b"] = parameters[f"{stem}.lora_b"] * np.float32(own / ranks[stem])
    return Adapter(family_of(config).form, max(ranks.values()), alpha, parameters, said)


def _check_settings(path: Path, said: dict[str, Any]) -> None:
    if said.get("peft_type") != "LORA":
        raise UnsupportedModelError(
            f"{path} describes an adapter of the kind {short(said.get('peft_type'))}; LORA alone can be used"
        )
    for name, off in (("bias", ("none", None)), ("init_lora_weights", _STARTS)):
        value = said.get(name)
        if not isinstance(value, (str, bool, type(None))) or value not in off:
            raise UnsupportedModelError(f"{path} has {name} = {short(value)}, which this library cannot do")
    for name, value in said.items():
        if name not in _HARMLESS | _USED and value not in (None, False, "", [], {}, 0):
            raise UnsupportedModelError(f"{path} has {name} = {short(value)}, which this library cannot do")


def _parameters(
    path: Path, config: LanguageModelConfig, base: GGUF | Mapping[str, Leaf] | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by this library's names, and of each matrix what its module is called."""
    family, shapes = family_of(config), gguf_models.parameter_shapes(config)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    places = {
        hugging_face_name(name, family).removesuffix(".weight"): name.removesuffix(".weight") for name in matrices
    }
    prefix = family.layers.partition(".")[0] + "."
    mapped, tensors = map_safetensors(path)
    data, parameters, modules = np.frombuffer(mapped, np.uint8), {}, {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        copied = _COPY.fullmatch(name)
        if copied is not None and places.get(copied[1]) in ("token_embd", "output"):
            _check_copy(path, name, f"{places[copied[1]]}.weight", tensor, data, base)
            continue
        if match is None:
            kind = next((words for part, words in _KINDS.items() if part in name), None)
            why = f": this library cannot do {kind}" if kind else ": it is no part of a LoRA adapter"
            raise UnsupportedModelError(f"{path} has the tensor {shown(name)}{why}")
        module = match[1] if match[1] in places else prefix + match[1]
        if module not in places:
            raise ValueError(f"{path} is an adapter for another base: the model has no matrix {shown(match[1])}")
        if tensor.dtype not in DTYPES or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise BadFileError(
                path, f"has {shown(name)} as {tensor.dtype} {tensor.shape}, expected a matrix of numbers"
            )
        stem = places[module]
        array = np.empty(tensor.shape, np.float32)
        raw = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(tensor.shape[0], -1)
        dequantize(raw, tensor.dtype, array)
        if not np.isfinite(array).all():
            raise BadFileError(path, f"tensor {shown(name)} holds numbers that are not finite")
        heads = permuted_heads(f"{stem}.weight", config, family)
        if match[2] == "B" and heads is not None and array.shape[0] == shapes[f"{stem}.weight"][0]:
            array = array[rows_of_pairs(len(array), heads)]
        key = f"{stem}.lora_{match[2].lower()}"
        if key in parameters:
            raise BadFileError(path, f"has the adapters of {shown(match[1])} twice")
        parameters[key], modules[stem] = array, module
    if not parameters:
        raise BadFileError(path, "has no adapters in it")
    return parameters, modules


def _check_copy(
    path: Path, name: str, ours: str, tensor: StoredTensor, data: np.ndarray, base: GGUF | Mapping[str, Leaf] | None
) -> None:
    """Raise UnsupportedModelError unless a copy of the embedding or the output matrix is that of the base."""
    if base is not None and tensor.dtype in DTYPES and len(tensor.shape) == 2:
        numbers = np.empty(tensor.shape, np.float32)
        raw = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(tensor.shape[0], -1)
        dequantize(raw, tensor.dtype, numbers)
        leaf = base.matrix(ours) if isinstance(base, GGUF) else base[ours]
        if np.array_equal(numbers, dequantized(leaf)):
            return
    raise UnsupportedModelError(
        f"{path} has weights of its own for {shown(name)}, other than the base's: merge it with PEFT's merge_and_unload first"
    )


def _alpha(path: Path, said: dict[str, Any], module: str, rank: int) -> float:
    """alpha, such that the scale is alpha / rank."""
    alpha = _said_for(path, said, "alpha_pattern", module, said.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
        raise BadFileError(path, f"has lora_alpha = {short(alpha)} for {module}, expected a number above 0")
    root = said.get("use_rslora", False)
    if type(root) is not bool:
        raise BadFileError(path, f"has use_rslora = {short(root)}, expected true or false")
    return float(alpha * rank**0.5 if root else alpha)


def _said_for(path: Path, said: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """What a pattern says of a module. As in PEFT a pattern stands for the end of the module's name, and the first counts."""
    patterns = said.get(key) or {}
    if not isinstance(patterns, dict):
        raise BadFileError(path, f"has {key} = {short(patterns)}, expected an object")
    for pattern, value in patterns.items():
        repeats = sum(pattern.count(sign) for sign in "*+?")
        if len(pattern) > _LONGEST_PATTERN or repeats > _MOST_REPEATS or _PATTERN.fullmatch(pattern) is None:
            raise UnsupportedModelError(f"{path} has the pattern {shown(pattern)} in {key}: name the modules instead")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadFileError(path, f"has the pattern {shown(pattern)} in {key}, which is none ({error})") from error
    return default


# -- writing -----------------------------------------------------------------------------------------------------------


def write_peft(
    path: Path,
    config: LanguageModelConfig,
    adapters: Mapping[str, npt.ArrayLike],
    alpha: float | None,
    base: str | None = None,
) -> None:
    """Write LoRA adapters as a folder that PEFT's `from_pretrained` opens; atomically.

    config: of the model that they are for. adapters: dict of `blk.0.attn_q.lora_a` (rank, in) and `...lora_b` (out, rank).
    alpha: every product is scaled by alpha / its rank, None: by 1. base: the name or path of that model, for the reader.
    Raises ValueError for adapters that do not fit the model, a model that Hugging Face does not have, and a folder with other
    files; OSError when it cannot be written.
    """
    parameters = {name: np.asarray(array, np.float32) for name, array in dict(adapters).items()}
    check_adapter(parameters, config)
    family, tensors, ranks = family_of(config), {}, {}
    for name, array in parameters.items():
        stem, _, kind = name.rpartition(".")
        if stem == "token_embd":
            raise ValueError("an adapter on the token embedding cannot be written for PEFT: export it as GGUF")
        module = hugging_face_name(f"{stem}.weight", family).removesuffix(".weight")
        heads = permuted_heads(f"{stem}.weight", config, family)
        if kind == "lora_a":
            ranks[module] = len(array)
        elif heads is not None:
            array = array[rows_of_pairs(len(array), heads, to_gguf=False)]
        tensors[f"{_PREFIX}{module}.lora_{kind[-1].upper()}.weight"] = _tensor(array)
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    main = rank if alpha is None else alpha
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": int(main) if main == int(main) else main, "use_rslora": False, "lora_dropout": 0.0, "bias": "none",
        "target_modules": _targets(ranks, family, config.n_layers), "fan_in_fan_out": family.conv1d, "rank_pattern": others,
        "alpha_pattern": others if alpha is None else {}, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    with replacing_folder(path, FILES) as folder:
        write_safetensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, said)


def _tensor(array: np.ndarray) -> NewTensor:
    data = np.ascontiguousarray(array, "<f4")
    return NewTensor("F32", data.shape, lambda: [data])


def _targets(modules: Mapping[str, int], family: Family, n_layers: int) -> list[str]:
    """The names of the modules within a layer, when all layers have adapters on the same ones; else every module by itself.

    PEFT takes a name for every module that ends with it.
    """
    found: dict[str, set[str]] = {}
    for module in modules:
        layer = re.fullmatch(rf"{re.escape(family.layers)}\.(\d+)\.(.+)", module)
        found.setdefault("" if layer is None else layer[1], set()).add(module if layer is None else layer[2])
    outside = found.pop("", set())
    alike = len(found) == n_layers and len({frozenset(names) for names in found.values()}) == 1
    return sorted({name for names in found.values() for name in names} | outside) if alike else sorted(modules)
