"""Which model a GGUF file holds: metadata keys and tensor names on one side, this library's configs on the other.

The two architectures are `llama` and `gpt2`, whose tensors this library's parameters are named after. Rows of attn_q and
attn_k stand in the order of interleaved RoPE pairs, in GGUF `llama` files as in `toy.Llama`: nothing is permuted.
"""

import math
import re
import reprlib

import numpy as np

from toy.config import GPT2Config, LlamaConfig
from toy.files.errors import BadFileError
from toy.models import architectures
from toy.models.gpt2 import NORM_EPS

short = reprlib.repr  # of what a file says, for error messages: never megabytes
_REQUIRED = object()

# keys that would change what a Llama computes, and the values with which they do not
_HARMLESS = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}


class UnsupportedModelError(ValueError):
    """The file is sound, but holds a model (or something else) that this library does not have."""


def config_of(gguf):
    """The config of an open `GGUF`; errors as `GGUF.config`."""
    kind = gguf.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{gguf.path} is not a model: its general.type is {short(kind)}")
    architecture = gguf.architecture
    if architecture not in architectures.IN_GGUF:
        raise UnsupportedModelError(
            f"{gguf.path} holds a model of architecture {architecture!r}; "
            f"this library has {' and '.join(sorted(architectures.IN_GGUF, reverse=True))}"
        )
    keys = _Keys(gguf)
    if "token_embd.weight" not in gguf.tensors:
        raise UnsupportedModelError(
            f"{gguf.path} has no tensor token_embd.weight: it holds no model (a vocabulary alone?)"
        )
    n_layers = keys.integer("block_count")
    if n_layers > len(gguf.tensors):  # before anything is made for each layer
        raise BadFileError(gguf.path, f"claims {n_layers} layers and has {len(gguf.tensors)} tensors")
    try:
        config = (_llama if architecture == "llama" else _gpt2)(gguf, keys)
    except (BadFileError, UnsupportedModelError):
        raise
    except ValueError as error:
        raise BadFileError(gguf.path, f"its sizes make no model ({error})") from error
    _check_tensors(gguf, config)
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != config.vocab_size:
        raise BadFileError(gguf.path, f"has {len(tokens)} tokens and an embedding of {config.vocab_size} rows")
    return config


def parameter_shapes(config):
    """dict of parameter names (GGUF tensor names) to shapes, for a config that GGUF has an architecture for.

    Raises ValueError for any other config.
    """
    return _row(config).model.parameter_shapes(config)


def architecture_of(config):
    """The GGUF architecture of a config. Raises ValueError when there is none."""
    return _row(config).name


def metadata_of(config):
    """dict of the metadata keys that describe the model's sizes: what `config_of` reads."""
    arch = architecture_of(config)
    metadata = {
        "general.architecture": arch,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.block_count": config.n_layers,
        f"{arch}.feed_forward_length": config.d_ff,
        f"{arch}.attention.head_count": config.n_heads,
    }
    if arch == "gpt2":
        return metadata | {f"{arch}.attention.layer_norm_epsilon": NORM_EPS}
    metadata |= {
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_eps,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_base,
    }
    if config.head_dim * config.n_heads != config.d_model:
        metadata |= {f"{arch}.attention.{kind}_length": config.head_dim for kind in ("key", "value")}
    return metadata


def _row(config):
    row = architectures.architecture_of(config)
    if row.in_gguf:
        return row
    raise ValueError(
        f"GGUF and llama.cpp have no architecture for a {type(config).__name__}: "
        "train a GPT-2 (toy.GPT2Config) or a Llama (toy.LlamaConfig) to export it"
    )


def _llama(gguf, keys):
    for key, harmless in _HARMLESS.items():
        value = keys.get(key, harmless[0])
        if not isinstance(value, (str, int, float)) or value not in harmless:
            raise UnsupportedModelError(
                f"{gguf.path} has {keys.arch}.{key} = {short(value)}, which this library's Llama cannot do"
            )
    n_heads, d_model = keys.integer("attention.head_count"), keys.integer("embedding_length")
    n_kv_heads = keys.integer("attention.head_count_kv", n_heads)
    if d_model % n_heads and keys.get("attention.key_length") is None:
        raise ValueError(f"{n_heads} heads do not divide a width of {d_model}")
    head_dim = keys.integer("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{gguf.path} has {keys.arch}.{key} = {keys.integer(key)} and heads of {head_dim}: they must be the same"
            )
    return LlamaConfig(
        vocab_size=_vocab_size(gguf, keys),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=keys.integer("feed_forward_length"),
        n_layers=keys.integer("block_count"),
        context_length=keys.integer("context_length"),
        rope_base=keys.number("rope.freq_base", 10000.0),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        head_dim=head_dim,
        untied="output.weight" in gguf.tensors,
        qkv_bias=any(name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias")) for name in gguf.tensors),
    )


def _gpt2(gguf, keys):
    eps = keys.number("attention.layer_norm_epsilon")
    if not math.isclose(eps, NORM_EPS, rel_tol=1e-5):
        raise UnsupportedModelError(
            f"{gguf.path} has a LayerNorm epsilon of {eps}; this library's GPT-2 has {NORM_EPS}"
        )
    n_heads = keys.integer("attention.head_count")
    if keys.integer("attention.head_count_kv", n_heads) != n_heads:
        raise UnsupportedModelError(f"{gguf.path} has grouped key/value heads, which this library's GPT-2 has not")
    return GPT2Config(
        vocab_size=_vocab_size(gguf, keys),
        d_model=keys.integer("embedding_length"),
        n_heads=n_heads,
        d_ff=keys.integer("feed_forward_length"),
        n_layers=keys.integer("block_count"),
        context_length=keys.integer("context_length"),
    )


def _vocab_size(gguf, keys):
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if keys.integer("vocab_size", rows) != rows:
        raise BadFileError(gguf.path, f"claims {keys.integer('vocab_size')} tokens and has an embedding of {rows} rows")
    return rows


def _check_tensors(gguf, config):
    """Every tensor of the model is there with the right shape, and nothing that the model would leave out."""
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in gguf.tensors:
            raise BadFileError(gguf.path, f"has no tensor {name}")
        if gguf.tensors[name].shape != shape:
            raise BadFileError(gguf.path, f"tensor {name} has shape {gguf.tensors[name].shape}, expected {shape}")
    others = [name for name in gguf.tensors if name not in shapes and not _harmless(gguf, name)]
    if others:
        raise UnsupportedModelError(
            f"{gguf.path} has tensors that this library's {architecture_of(config)} has no place for: "
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

    def integer(self, key, default=_REQUIRED):
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and len(value):  # one number a layer: fine when they are all the same
            if (value != value[0]).any():
                raise UnsupportedModelError(f"{self.path} has different values of {self.arch}.{key} in its layers")
            value = value[0].item()
        if type(value) is not int or not 0 < value < 2**31:
            raise BadFileError(self.path, f"has {self.arch}.{key} = {short(value)}, expected a whole number above 0")
        return value

    def number(self, key, default=_REQUIRED):
        value = self._value(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise BadFileError(self.path, f"has {self.arch}.{key} = {short(value)}, expected a number above 0")
        return float(str(np.float32(value)))  # 1e-05, not the 9.99999974e-06 that float32 makes of it

    def _value(self, key, default):
        value = self.get(key, default)
        if value is _REQUIRED:
            raise BadFileError(self.path, f"has no metadata key {self.arch}.{key}")
        return value
