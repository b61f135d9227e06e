"""Which model a Hugging Face `config.json` describes: its keys on one side, this library's configs on the other.

One `Family` is one `model_type`. It says which architecture of GGUF the model is in (so what llama.cpp cannot read is refused
here too), how its modules are called, and which of its keys say what. Of a key that transformers reads for this model, and
that changes a number, the value is used, or refused by the key's name; a key that transformers does not read means nothing.

Source: the configuration and modeling files of transformers, https://github.com/huggingface/transformers
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from toy.config import GPT2Config, LanguageModelConfig, LlamaConfig
from toy.files import gguf_models
from toy.files.errors import BadFileError
from toy.files.gguf_models import UnsupportedModelError, short
from toy.files.safetensors_file import read_json
from toy.models.gpt2 import NORM_EPS

Fields = dict[str, Any]

# keys of transformers' classes that change nothing in what a trained model computes, token by token
HARMLESS = {
    "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop",
    "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
}  # fmt: skip
# read of every model, whatever its type
COMMON = {"model_type", "architectures", "tie_word_embeddings", "quantization_config"}

_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads", "max_position_embeddings": "context_length",
}  # fmt: skip
_GPT2_SIZES = {
    "vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads",
    "n_positions": "context_length",
}  # fmt: skip
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}

# what a module of a layer is called, and the parameters' name for it
_ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}  # fmt: skip
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_GEMMA_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm", **_POST_NORMS}
_LLAMA = {**_ATTENTION, **_MLP, **_PRE_NORMS}
_GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Family(NamedTuple):
    """One `model_type`.

    form: the architecture of GGUF. head: the class of the model with its output matrix. layers: where the layers are, and in
    `modules` what is in one of them; outside: the other modules. more: the fields of the config that this type alone has,
    read from `_Keys`; say: the keys that say them in a file that is written. extra: the keys that `more` reads. only: keys
    and the values that they may have; a missing key means the first. tied: whether a config without `tie_word_embeddings`
    means so. rope_theta, head_dim, eps: what a config without these keys means. kv_heads: whether one without
    `num_key_value_heads` means as many as heads. permuted: rows of queries and keys stand in transformers' order of the pairs
    that RoPE turns, (i, i + d_head/2), and in that of GGUF here. plus_one: norms hold what is added to 1. conv1d: matrices
    are (in, out).
    """

    form: str
    head: str
    layers: str = "model.layers"
    modules: dict[str, str] = _LLAMA
    outside: dict[str, str] = _OUTSIDE
    more: Callable[["_Keys", Fields], Fields] = lambda keys, fields: {}
    say: Callable[[Any], Fields] = lambda config: {}
    extra: frozenset[str] = frozenset()
    only: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012 (never changed)
    tied: bool = False
    rope_theta: float = 10000.0
    head_dim: int | None = None
    eps: float = 1e-6
    kv_heads: bool = False
    permuted: bool = False
    plus_one: bool = False
    conv1d: bool = False

    @property
    def known_keys(self) -> frozenset[str]:
        """Every key that is used, or refused where it does not have a certain value, or that changes nothing."""
        sizes = (
            {*_GPT2_SIZES, "n_inner"}
            if self.form == "gpt2"
            else {*_SIZES, *_ROPE, "num_key_value_heads", "head_dim", "rms_norm_eps"}
        )
        return frozenset(HARMLESS | COMMON | sizes | self.only.keys() | self.extra)


class _Keys:
    """The keys of a config, checked as they are read."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise BadFileError(self.path, f"has no {key}")
        if type(value) is not int or not 0 < value < 2**31:
            raise BadFileError(self.path, f"has {key} = {short(value)}, expected a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None, where: dict[str, Any] | None = None) -> float:
        value = (self.data if where is None else where).get(key)
        value = default if value is None else value
        if value is None:
            raise BadFileError(self.path, f"has no {key}")
        if type(value) not in (int, float) or not (math.isfinite(value) and 0 < value < 1e30):
            raise BadFileError(self.path, f"has {key} = {short(value)}, expected a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise BadFileError(self.path, f"has {key} = {short(value)}, expected true or false")
        return value

    def object(self, key: str) -> dict[str, Any]:
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise BadFileError(self.path, f"has {key} = {short(value)}, expected an object")
        return dict(value or {})

    def refuse(self, key: str, value: Any, why: str = "which this library cannot do") -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path} has {key} = {short(value)}, {why}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> tuple[LanguageModelConfig, Family]:
    """The config in the file `path`, and the family it is of.

    Raises FileNotFoundError, BadFileError for a file that is damaged or contradicts itself, UnsupportedModelError for a model
    (or a value of a key, which is named) that this library does not have.
    """
    return config_of(path, read_json(path))


def config_of(path: Path, data: dict[str, Any]) -> tuple[LanguageModelConfig, Family]:
    """As `read_config`, of what is in the file; path: for error messages."""
    keys = _Keys(path, data)
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise BadFileError(path, "has no model_type: it is no config of a Hugging Face model")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{path} describes a model of the type {short(kind)}; this library has {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    heads = data.get("architectures")
    whole = (family.head.lower(), family.head.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model").lower())
    if isinstance(heads, list) and heads and str(heads[0]).lower() not in whole:
        raise keys.refuse("architectures", heads, f"expected {family.head}: a model that writes text")
    if data.get("quantization_config") is not None:
        raise keys.refuse(
            "quantization_config",
            data["quantization_config"],
            "which this library cannot read: take the original model",
        )
    for key, values in family.only.items():
        value = data.get(key, values[0])
        if not isinstance(value, (str, int, float, type(None))) or value not in values:
            raise keys.refuse(key, value)
    try:
        config = _gpt2_config(keys) if family.form == "gpt2" else _llama_config(keys, family)
    except (BadFileError, UnsupportedModelError):
        raise
    except ValueError as error:
        raise BadFileError(path, f"its sizes make no model ({error})") from error
    if not gguf_models.is_architecture_of(family.form, config):
        raise UnsupportedModelError(f"{path} describes a model that llama.cpp does not read as {family.form}: {config}")
    return config, family


def _gpt2_config(keys: _Keys) -> GPT2Config:
    fields = {field: keys.integer(key) for key, field in _GPT2_SIZES.items()}
    if not math.isclose(keys.number("layer_norm_epsilon", NORM_EPS), NORM_EPS, rel_tol=1e-5):
        raise keys.refuse("layer_norm_epsilon", keys.get("layer_norm_epsilon"), f"this library's GPT2 has {NORM_EPS}")
    return GPT2Config(d_ff=keys.integer("n_inner", 4 * fields["d_model"]), **fields)


def _llama_config(keys: _Keys, family: Family) -> LlamaConfig:
    _, form = gguf_models.FORMS[family.form]
    fields: Fields = dict(form.fixed)
    fields |= {field: keys.integer(key) for key, field in _SIZES.items()}
    every = family.kv_heads or "num_key_value_heads" in keys.data
    fields["n_kv_heads"] = keys.integer("num_key_value_heads", fields["n_heads"] if every else None)
    if keys.get("head_dim") is not None or family.head_dim is not None:
        fields["head_dim"] = keys.integer("head_dim", family.head_dim)
    fields["rms_eps"] = keys.number("rms_norm_eps", family.eps)
    untied = not keys.flag("tie_word_embeddings", family.tied)
    if fields.setdefault("untied", untied) != untied:
        raise keys.refuse("tie_word_embeddings", not untied)
    fields |= family.more(keys, fields)
    if family.form != "gemma3":
        fields |= _rope(keys, family, fields, keys.object("rope_scaling") or keys.object("rope_parameters"))
    config = LlamaConfig(**fields)
    return dataclasses.replace(config, **{field: value(config) for field, value in form.derived.items()})


def _rope(keys: _Keys, family: Family, fields: Fields, said: dict[str, Any], theta: float | None = None) -> Fields:
    """The fields that RoPE's keys say. said: `rope_scaling` or `rope_parameters`."""
    fields = dict(fields)
    found: Fields = {
        "rope_base": keys.number("rope_theta", keys.number("rope_theta", theta or family.rope_theta), said)
    }
    partial = said.get("partial_rotary_factor", keys.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise keys.refuse("partial_rotary_factor", partial)
    kind = said.get("rope_type", said.get("type", "default"))
    original: Any = said.get("original_max_position_embeddings", fields["context_length"])
    original = keys.data.get("original_max_position_embeddings", original)
    if kind in ("llama3", "yarn") and (type(original) is not int or not 0 < original < 2**31):
        raise BadFileError(
            keys.path, f"has original_max_position_embeddings = {short(original)}, expected a whole number above 0"
        )
    if kind == "linear":
        found |= {"rope_scaling": "linear", "rope_scale": keys.number("factor", None, said)}
    elif kind == "llama3":
        d_head = fields.get("head_dim") or fields["d_model"] // fields["n_heads"]
        factor, low, high = (
            keys.number(name, None, said) for name in ("factor", "low_freq_factor", "high_freq_factor")
        )
        if high <= low:
            raise BadFileError(keys.path, f"has high_freq_factor = {high}, expected more than low_freq_factor {low}")
        found["rope_factors"] = llama3_factors(d_head, found["rope_base"], factor, low, high, int(original))
    elif kind == "yarn":
        found |= _yarn(keys, said, int(original), fields["context_length"])
    elif kind != "default":
        raise keys.refuse("rope_type", kind, "this library has default, linear, llama3 and yarn")
    return found


def llama3_factors(
    d_head: int, base: float, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """What Llama 3.1 divides each pair's frequency by: 1 for pairs that turn often within the original context, `factor` for
    those that turn seldom, and something between -> (d_head/2,)."""
    frequencies = base ** -(np.arange(0, d_head, 2) / d_head)
    turns = original * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)  # 1: as it is, 0: divided by the factor
    return tuple((1 / ((1 - share) / factor + share)).tolist())


def _yarn(keys: _Keys, said: dict[str, Any], original: int, context: int) -> Fields:
    for name, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if (said.get(name) or usual) != usual:
            raise keys.refuse(name, said[name], f"this library's yarn has {usual}")
    if said.get("truncate", True) is not True:
        raise keys.refuse("truncate", said["truncate"], "this library's yarn rounds its bounds")
    scale = keys.number("factor", context / original, said)

    def magnitude(weight: float = 1.0) -> float:
        return 1 + 0.1 * weight * math.log(max(scale, 1))

    if said.get("attention_factor") is not None:
        wanted = keys.number("attention_factor", None, said)
    elif said.get("mscale") and said.get("mscale_all_dim"):
        wanted = magnitude(keys.number("mscale", None, said)) / magnitude(keys.number("mscale_all_dim", None, said))
    else:
        wanted = magnitude()
    share = wanted / magnitude()  # llama.cpp multiplies its own by it
    return {
        "rope_scaling": "yarn",
        "rope_scale": scale,
        "rope_original_context": original,
        "rope_attn_factor": 1.0 if math.isclose(share, 1, rel_tol=1e-12) else share,
    }


# -- what the types have of their own -----------------------------------------------------------------------------------


def _layer_types(keys: _Keys, n_layers: int) -> list[str] | None:
    """Of each layer "full_attention" or "sliding_attention", None where the config does not say."""
    types = keys.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layers:
        raise BadFileError(keys.path, f"has layer_types = {short(types)}, expected one for each of {n_layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.refuse("layer_types", kind)
    return types


def _window(keys: _Keys) -> int | None:
    """null means none, a missing key 4096."""
    return None if keys.data.get("sliding_window", 4096) is None else keys.integer("sliding_window", 4096)


def _within(window: int | None, fields: Fields) -> Fields:
    """A window that llama.cpp does not know of in this architecture: up to its length nothing is cut off, so the context ends
    there."""
    return {} if window is None else {"context_length": min(fields["context_length"], window)}


def _mistral(keys: _Keys, fields: Fields) -> Fields:
    return _within(_window(keys), fields)


def _qwen(keys: _Keys, fields: Fields) -> Fields:
    if not keys.flag("use_sliding_window"):
        return {}
    types = _layer_types(keys, fields["n_layers"])
    first = keys.get("max_window_layers")  # the layers from this one on have windows
    slides = "sliding_attention" in types if types else (28 if type(first) is not int else first) < fields["n_layers"]
    return _within(_window(keys), fields) if slides else {}


def _qwen2(keys: _Keys, fields: Fields) -> Fields:
    return {"qkv_bias": True, **_qwen(keys, fields)}


def _biases(keys: _Keys, fields: Fields) -> Fields:
    attention = keys.flag("attention_bias")
    return {"qkv_bias": attention, "attn_output_bias": attention, "mlp_bias": keys.flag("mlp_bias")}


def _say_biases(c: LlamaConfig) -> Fields:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


_GRANITE_SCALES = {
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
    "attention_multiplier": "attention_scale",
}  # fmt: skip


def _granite(keys: _Keys, fields: Fields) -> Fields:
    return _biases(keys, fields) | {field: keys.number(key, 1.0) for key, field in _GRANITE_SCALES.items()}


def _say_granite(c: LlamaConfig) -> Fields:
    said = {key: getattr(c, field) for key, field in _GRANITE_SCALES.items()}
    return _say_biases(c) | said | {"attention_multiplier": c.attention_scale or c.d_head**-0.5}


def _smollm3(keys: _Keys, fields: Fields) -> Fields:
    n, every = fields["n_layers"], keys.integer("no_rope_layer_interval", 4)
    layers = keys.get("no_rope_layers")
    layers = [int((i + 1) % every != 0) for i in range(n)] if layers is None else layers
    if layers != [int((i + 1) % 4 != 0) for i in range(n)]:
        raise keys.refuse("no_rope_layers", layers, "llama.cpp leaves RoPE out of every fourth layer")
    if not keys.flag("use_sliding_window") or keys.get("sliding_window") is None:
        return {}
    types = _layer_types(keys, n)
    slides = "sliding_attention" in types if types else 0 in layers
    return _within(_window(keys), fields) if slides else {}


def _say_smollm3(c: LlamaConfig) -> Fields:
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(c.n_layers)]}


def _cap(keys: _Keys, key: str, default: float | None) -> float | None:
    """A soft cap: null means none, a missing key the default."""
    return keys.number(key) if keys.get(key) is not None else None if key in keys.data else default


def _pattern(types: list[str] | None, default: int) -> int:
    """Every so many-th layer sees all."""
    if types is None:
        return default
    if "full_attention" not in types:
        return default if default > len(types) else len(types) + 1
    return types.index("full_attention") + 1


def _gemma(keys: _Keys, fields: Fields, pattern: int) -> Fields:
    types = _layer_types(keys, fields["n_layers"])
    pattern = _pattern(types, pattern)
    expected = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(fields["n_layers"])]
    if types is not None and types != expected:
        raise keys.refuse(
            "layer_types", types, "expected every so many-th layer with full attention, the others without"
        )
    scalar = keys.number("query_pre_attn_scalar", 256)
    largest = {2: 46, 6: 62}.get(pattern) == fields["n_layers"]  # llama.cpp knows it by its layers
    wanted = fields["d_model"] // fields["n_heads"] if largest else fields["head_dim"]
    if scalar != wanted:
        raise keys.refuse("query_pre_attn_scalar", keys.get("query_pre_attn_scalar"), f"llama.cpp takes {wanted}")
    window = _window(keys)
    if window is None and "sliding_attention" in expected:
        raise keys.refuse("sliding_window", None, "which layers with sliding_attention need")
    return {"sliding_window": window, "window_pattern": pattern}


def _gemma2(keys: _Keys, fields: Fields) -> Fields:
    caps = {
        "attention_softcap": _cap(keys, "attn_logit_softcapping", 50.0),
        "logit_softcap": _cap(keys, "final_logit_softcapping", 30.0),
    }
    for key, value in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps.values()):
        if value is None:
            raise keys.refuse(key, None, "and llama.cpp reads no such model as gemma2")
    return _gemma(keys, fields, 2) | caps


def _gemma3(keys: _Keys, fields: Fields) -> Fields:
    nested = keys.object("rope_parameters")
    inner = {name: nested.get(name) or {} for name in ("full_attention", "sliding_attention")}
    if nested.keys() - inner.keys() or not all(isinstance(said, dict) for said in inner.values()):
        raise keys.refuse("rope_parameters", nested, "expected full_attention and sliding_attention in it")
    full = dict(inner["full_attention"]) | keys.object("rope_scaling")
    local = inner["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise keys.refuse(
            "rope_type", local["rope_type"], "llama.cpp scales no RoPE in the layers with sliding_attention"
        )
    local_base = keys.number("rope_theta", keys.number("rope_local_base_freq", 10000.0), local)
    found = _gemma(keys, fields, keys.integer("sliding_window_pattern", 6))
    found |= {"rope_local_base": local_base, "logit_softcap": _cap(keys, "final_logit_softcapping", None)}
    return found | _rope(keys, FAMILIES["gemma3_text"], fields, full, theta=1e6)


def _say_gemma(c: LlamaConfig) -> Fields:
    scalar = c.d_head if c.attention_scale is None else c.d_model // c.n_heads
    types = [
        "full_attention" if c.window_pattern > 0 and (i + 1) % c.window_pattern == 0 else "sliding_attention"
        for i in range(c.n_layers)
    ]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": c.sliding_window,
        "layer_types": types,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logit_softcap,
    }


_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False, None)}
_GELU: dict[str, tuple[Any, ...]] = {"hidden_activation": ("gelu_pytorch_tanh", "gelu_new")}
_ONE_WAY: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, False)}
_WINDOW = frozenset({"sliding_window", "layer_types"})
_QWEN_WINDOW = _WINDOW | {"use_sliding_window", "max_window_layers"}

# model_type -> its family; the first of an architecture of GGUF is the one that it is written as
FAMILIES = {
    "llama": Family(
        "llama", "LlamaForCausalLM", more=_biases, say=_say_biases, extra=frozenset({"attention_bias", "mlp_bias"}),
        only=_SILU, kv_heads=True, permuted=True,
    ),
    "mistral": Family(
        "llama", "MistralForCausalLM", more=_mistral, extra=frozenset({"sliding_window"}), only=_SILU, permuted=True
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", more=_qwen2, extra=_QWEN_WINDOW, only=_SILU),
    "qwen3": Family(
        "qwen3", "Qwen3ForCausalLM", modules=_LLAMA | _QK_NORMS, more=_qwen, extra=_QWEN_WINDOW, only=_SILU | _NO_BIAS,
        head_dim=128,
    ),
    "granite": Family(
        "granite", "GraniteForCausalLM", more=_granite, say=_say_granite,
        extra=frozenset({"attention_bias", "mlp_bias", *_GRANITE_SCALES}), only=_SILU, kv_heads=True, permuted=True,
    ),
    "smollm3": Family(
        "smollm3", "SmolLM3ForCausalLM", more=_smollm3, say=_say_smollm3,
        extra=_WINDOW | {"use_sliding_window", "no_rope_layers", "no_rope_layer_interval"},
        only=_SILU | _NO_BIAS | {"mlp_bias": (False, None)}, tied=True, rope_theta=2e6, permuted=True,
    ),
    "olmo2": Family(
        "olmo2", "Olmo2ForCausalLM", modules=_ATTENTION | _MLP | _QK_NORMS | _POST_NORMS, only=_SILU | _NO_BIAS, eps=1e-5,
        kv_heads=True,
    ),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", modules=_ATTENTION | _MLP | _GEMMA_NORMS, more=_gemma2, say=_say_gemma,
        extra=_WINDOW | {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"},
        only=_GELU | _NO_BIAS | _ONE_WAY, tied=True, head_dim=256, plus_one=True,
    ),
    "gemma3_text": Family(
        "gemma3", "Gemma3ForCausalLM", modules=_ATTENTION | _MLP | _QK_NORMS | _GEMMA_NORMS, more=_gemma3, say=_say_gemma,
        extra=_WINDOW
        | {"query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq", "sliding_window_pattern"}
        | {"_sliding_window_pattern"},  # written beside layer_types, which say it
        only=_GELU | _NO_BIAS | _ONE_WAY | {"attn_logit_softcapping": (None,)}, tied=True, head_dim=256, plus_one=True,
    ),
    "gpt2": Family(
        "gpt2", "GPT2LMHeadModel", layers="transformer.h", modules=_GPT2,
        outside={"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"},
        extra=frozenset({"layer_norm_epsilon"}), conv1d=True,
        only={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "tie_word_embeddings": (True,),
        }, tied=True,
    ),
}  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------------


def keys_of(config: LanguageModelConfig) -> tuple[Fields, LanguageModelConfig, str]:
    """What `config_of` reads as this config -> keys, the config, its `model_type`.

    The config differs from the one that was given where transformers has one switch for biases that are there in part: the
    missing ones are zero. Raises ValueError for a config that transformers has no model for.
    """
    architecture = gguf_models.architecture_of(config)
    kind = next((name for name, family in FAMILIES.items() if family.form == architecture), None)
    if kind is None:
        raise ValueError(
            f"a model of architecture {architecture} cannot be written for Hugging Face: export it as GGUF"
        )
    family = FAMILIES[kind]
    if isinstance(config, LlamaConfig):
        config = _with_whole_biases(config, family)
        keys = {key: getattr(config, field) for key, field in _SIZES.items()}
        keys |= {"num_key_value_heads": config.n_kv_heads, "head_dim": config.d_head, "rms_norm_eps": config.rms_eps}
        keys |= _say_rope(config, family) | family.say(config) | {"tie_word_embeddings": not config.untied}
    else:
        keys = {key: getattr(config, field) for key, field in _GPT2_SIZES.items()} | {"n_inner": config.d_ff}
        keys |= {"layer_norm_epsilon": NORM_EPS}
    keys |= {key: values[0] for key, values in family.only.items() if key not in keys and values[0] is not None}
    keys |= {"model_type": kind, "architectures": [family.head]}
    try:
        again, _ = config_of(Path("config.json"), keys)
    except ValueError as error:
        raise ValueError(f"this model cannot be written for Hugging Face: {error}") from error
    for field in dataclasses.fields(config):
        wanted, found = getattr(config, field.name), getattr(again, field.name)
        if not _same(wanted, found):
            raise ValueError(
                f"transformers' {kind} has no place for {field.name} = {short(wanted)}: export the model as GGUF"
            )
    return keys, config, kind


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (float, tuple)) and isinstance(other, (float, tuple)):
        return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=1e-6, atol=0))
    return cast(bool, one == other)


def _with_whole_biases(c: LlamaConfig, family: Family) -> LlamaConfig:
    if family.form in ("llama", "granite") and c.qkv_bias != c.attn_output_bias:
        return dataclasses.replace(c, qkv_bias=True, attn_output_bias=True)
    return c


def _say_rope(c: LlamaConfig, family: Family) -> Fields:
    """The keys as transformers writes them from version 5 on, and as it read them before."""
    said: Fields = {"rope_type": "default"}
    if c.rope_factors is not None:
        if c.rope_scaling != "none":
            raise ValueError("transformers has no RoPE with both factors and a scaling: export the model as GGUF")
        said = {"rope_type": "llama3", **_llama3_numbers(c)}
    elif c.rope_scaling == "linear":
        said = {"rope_type": "linear", "factor": c.rope_scale}
    elif c.rope_scaling == "yarn":
        said = {
            "rope_type": "yarn",
            "factor": c.rope_scale,
            "original_max_position_embeddings": c.rope_original_context,
        }
        sharper = 0.1 * math.log(max(c.rope_scale, 1))
        if c.rope_attn_factor != 1 or c.yarn_log_multiplier:
            said["attention_factor"] = c.rope_attn_factor * (1 + sharper) / (1 + c.yarn_log_multiplier * sharper)
    scaling = {} if said["rope_type"] == "default" else {"rope_scaling": said}
    theta: Fields = {"rope_theta": c.rope_base}
    if family.form == "gemma3":
        local = {"rope_type": "default", "rope_theta": c.rope_local_base}
        return (
            theta
            | scaling
            | {
                "rope_local_base_freq": c.rope_local_base,
                "rope_parameters": {"full_attention": said | theta, "sliding_attention": local},
            }
        )
    return theta | {"rope_parameters": said | theta} | scaling


def _llama3_numbers(c: LlamaConfig) -> Fields:
    """Llama 3.1's numbers that give a config's factors, which are all that a GGUF file keeps of them."""
    factors = cast(tuple[float, ...], c.rope_factors)
    for factor in (max(factors), 8.0, 32.0):
        for original in (8192, *(2**n for n in range(3, 20))):
            if np.allclose(llama3_factors(c.d_head, c.rope_base, factor, 1, 4, original), factors, rtol=1e-6, atol=0):
                return {
                    "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }  # fmt: skip
    raise ValueError("transformers has no RoPE with these factors: export the model as GGUF")
