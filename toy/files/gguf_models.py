"""Which model a GGUF file holds: metadata keys and tensor names on one side, this library's configs on the other.

The architectures of GGUF and their keys are the `GGUF_FORMS` of the models, after whose tensors this library's parameters are
named; here is how they are read and written. Rows of attn_q and attn_k stand in the order that RoPE wants (`rope_halves` of
the config), in GGUF files as in `toy.Llama`: nothing is permuted.
"""

import dataclasses
import fnmatch
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from toy.config import LanguageModelConfig, ModelConfig
from toy.files.errors import BadFileError
from toy.models import architectures
from toy.models.gguf_form import REQUIRED, Form
from toy.models.parameters import Shapes

short = reprlib.repr  # of what a file says, for error messages: never megabytes

# general.architecture -> the row of the model that computes it, and the form of its files
FORMS = {form.name: (row, form) for row in architectures.ARCHITECTURES.values() for form in row.gguf_forms}


class UnsupportedModelError(ValueError):
    """The file is sound, but holds a model (or something else) that this library does not have."""


def config_of(gguf: Any) -> LanguageModelConfig:
    """The config of an open `GGUF`; errors as `GGUF.config`."""
    check_kind(gguf.path, gguf.metadata)
    row, form = FORMS[gguf.architecture]
    keys = _Keys(gguf)
    if "token_embd.weight" not in gguf.tensors:
        raise UnsupportedModelError(
            f"{gguf.path} has no tensor token_embd.weight: it holds no model (a vocabulary alone?)"
        )
    n_layers = keys.integer("block_count")
    if n_layers > len(gguf.tensors):  # before anything is made for each layer
        raise BadFileError(gguf.path, f"claims {n_layers} layers and has {len(gguf.tensors)} tensors")
    try:
        config = cast(LanguageModelConfig, row.config(**_fields(gguf, keys, row, form)))
        config = dataclasses.replace(config, **_derived(form, config))
    except (BadFileError, UnsupportedModelError):
        raise
    except ValueError as error:
        raise BadFileError(gguf.path, f"its sizes make no model ({error})") from error
    if not form.only(config):
        raise UnsupportedModelError(f"{gguf.path} holds a model that llama.cpp does not read as {form.name}: {config}")
    _check_tensors(gguf, config, form)
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != config.vocab_size:
        raise BadFileError(gguf.path, f"has {len(tokens)} tokens and an embedding of {config.vocab_size} rows")
    return config


def check_kind(path: Any, metadata: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError when a file of this metadata holds no model, or one of an architecture that this library
    does not have. Keys and tensors of one that it has are not looked at."""
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise UnsupportedModelError(f"{path} is not a model: its general.type is {short(kind)}")
    experts = metadata.get(f"{architecture}.expert_count", 0)
    if experts != 0 or "moe" in str(architecture):
        raise UnsupportedModelError(
            f"{path} holds a mixture of experts ({architecture}.expert_count = {short(experts)}), which this "
            "library does not have: take a dense model"
        )
    if architecture not in FORMS:
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {short(architecture)}; this library has {_what_there_is()}"
        )


def parameter_shapes(config: ModelConfig) -> Shapes:
    """dict of parameter names (GGUF tensor names) to shapes, for a config that GGUF has an architecture for.

    Raises ValueError for any other config.
    """
    row, _ = _row_and_form(config)
    return row.model.parameter_shapes(config)


def architecture_of(config: ModelConfig) -> str:
    """The GGUF architecture in which a model of this config is written. Raises ValueError when there is none."""
    _, form = _row_and_form(config)
    return form.name


def is_architecture_of(name: str, config: ModelConfig) -> bool:
    """Whether files of the GGUF architecture `name` can hold a model of this config."""
    row, form = FORMS.get(name, (None, None))
    return row is not None and type(config) is row.config and _fits(form, config)


def metadata_of(config: LanguageModelConfig) -> dict[str, Any]:
    """dict of the metadata keys that describe the model's sizes: what `config_of` reads."""
    _, form = _row_and_form(config)
    metadata = {"vocab_size": config.vocab_size, **form.constants}
    metadata |= {key.key: getattr(config, key.field) for key in form.keys if not key.unless(config)}
    return {"general.architecture": form.name} | {f"{form.name}.{key}": value for key, value in metadata.items()}


def constant_tensors(config: LanguageModelConfig) -> dict[str, np.ndarray]:
    """dict of the names of tensors to what they hold of the config: float32 vectors, written beside the parameters."""
    _, form = _row_and_form(config)
    values = {name: getattr(config, field) for field, name in form.vectors.items()}
    return {name: np.array(value, np.float32) for name, value in values.items() if value is not None}


def _row_and_form(config: ModelConfig) -> tuple[architectures.Architecture, Form]:
    row = architectures.architecture_of(config)
    for form in row.gguf_forms:
        if _fits(form, config):
            return row, form
    if row.gguf_forms:
        raise ValueError(f"GGUF and llama.cpp have no architecture for this model: {config}")
    raise ValueError(
        f"GGUF and llama.cpp have no architecture for a {type(config).__name__}: "
        "train a GPT-2 (toy.GPT2Config) or a Llama (toy.LlamaConfig) to export it"
    )


def _fits(form, config):
    values = form.fixed | _derived(form, config)
    return all(getattr(config, field) == value for field, value in values.items()) and form.only(config)


def _derived(form, config):
    return {field: value(config) for field, value in form.derived.items()}


def _what_there_is():
    """The architectures of GGUF, in words: those of the models' own names, and what else is read as one of them."""
    own = [row.name for row in architectures.ARCHITECTURES.values() if row.in_gguf]
    others = [f"{form.name} as {row.name}" for row, form in FORMS.values() if form.name != row.name]
    return " and ".join(own) + (f" (and reads {', '.join(others)})" if others else "")


def _fields(gguf, keys, row, form):
    """dict of the fields of the config that a file of this form says."""
    for key, harmless in form.harmless.items():
        value = keys.get(key, harmless[0])
        if not isinstance(value, (str, int, float)) or value not in harmless:
            raise UnsupportedModelError(
                f"{gguf.path} has {keys.arch}.{key} = {short(value)}, which this library's {row.model.__name__} cannot do"
            )
    for key, constant in form.constants.items():
        value = keys.number(key)
        if not math.isclose(value, constant, rel_tol=1e-5):
            raise UnsupportedModelError(
                f"{gguf.path} has {keys.arch}.{key} = {value}; this library's {row.model.__name__} has {constant}"
            )
    fields = dict(form.fixed)
    for key in form.keys:
        known = fields.get(key.field)
        if known is not None:
            if keys.read(key, known) != known:
                raise UnsupportedModelError(
                    f"{gguf.path} has {keys.arch}.{key.key} = {keys.read(key)} and {key.says} {known}: they must be the same"
                )
            continue
        default = key.default
        if callable(default) and keys.get(key.key) is None:
            default = default(fields)
        fields[key.field] = keys.read(key, default)
    for field, pattern in form.tensors.items():
        fields[field] = any(fnmatch.fnmatchcase(name, pattern) for name in gguf.tensors)
    for field, name in form.vectors.items():
        fields[field] = tuple(gguf.dequantize(name).ravel().tolist()) if name in gguf.tensors else None
    longest = form.longest(keys.get)
    if type(longest) is int and longest > 0:
        fields["context_length"] = min(fields["context_length"], longest)
    return fields | {"vocab_size": _vocab_size(gguf, keys)}


def _vocab_size(gguf, keys):
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if keys.integer("vocab_size", rows) != rows:
        raise BadFileError(gguf.path, f"claims {keys.integer('vocab_size')} tokens and has an embedding of {rows} rows")
    return rows


def _check_tensors(gguf, config, form):
    """Every tensor of the model is there with the right shape, and nothing that the model would leave out."""
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in gguf.tensors:
            raise BadFileError(gguf.path, f"has no tensor {name}")
        if gguf.tensors[name].shape != shape:
            raise BadFileError(gguf.path, f"tensor {name} has shape {gguf.tensors[name].shape}, expected {shape}")
    known = {*shapes, *form.vectors.values()}
    others = [name for name in gguf.tensors if name not in known and not _harmless(gguf, name)]
    if others:
        raise UnsupportedModelError(
            f"{gguf.path} has tensors that this library's {form.name} has no place for: "
            + ", ".join(repr(name) for name in others[:3])
            + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        )


def _harmless(gguf, name):
    """A GPT-2 file's second copy of the embedding, and tables that old converters left in."""
    if name == "output.weight":
        first = gguf.tensors["token_embd.weight"]
        same = gguf.tensors[name].shape == first.shape and gguf.tensors[name].type == first.type
        return same and (gguf.raw(name) == gguf.raw("token_embd.weight")).all()
    return re.fullmatch(r"blk\.\d+\.(attn_rot_embd|attn\.bias|attn\.masked_bias)(\.weight)?", name) is not None


class _Keys:
    """The metadata under the architecture's prefix, checked as it is read."""

    def __init__(self, gguf):
        self.path, self.metadata, self.arch = gguf.path, gguf.metadata, gguf.architecture

    def get(self, key, default=None):
        return self.metadata.get(f"{self.arch}.{key}", default)

    def read(self, key, default=REQUIRED):
        """The value of a `Key`; default: what it is when the file has none."""
        name = key.formerly if key.formerly and self.get(key.key) is None else key.key
        value = self.get(name)
        if default is not REQUIRED and (value is None or (key.zero and type(value) in (int, float) and value == 0)):
            return default
        if key.words:
            if value not in key.words:
                raise UnsupportedModelError(
                    f"{self.path} has {self.arch}.{name} = {short(value)}; this library has {', '.join(key.words)}"
                )
            return value
        return self.number(name) if key.number else self.integer(name)

    def integer(self, key, default=REQUIRED):
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and len(value):  # one number a layer: fine when they are all the same
            if (value != value[0]).any():
                raise UnsupportedModelError(f"{self.path} has different values of {self.arch}.{key} in its layers")
            value = value[0].item()
        if type(value) is not int or not 0 < value < 2**31:
            raise BadFileError(self.path, f"has {self.arch}.{key} = {short(value)}, expected a whole number above 0")
        return value

    def number(self, key, default=REQUIRED):
        value = self._value(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise BadFileError(self.path, f"has {self.arch}.{key} = {short(value)}, expected a number above 0")
        return float(str(np.float32(value)))  # 1e-05, not the 9.99999974e-06 that float32 makes of it

    def _value(self, key, default):
        value = self.get(key, default)
        if value is REQUIRED:
            raise BadFileError(self.path, f"has no metadata key {self.arch}.{key}")
        return value
