"""The relatives of Llama, one row each: log-probabilities, text and adapters as in llama.cpp, gradients as in PyTorch.

A row is an architecture of GGUF and the fields of a `LlamaConfig` that make it, so the next architecture is a row. Files are
small and their numbers random, so large that attention and positions matter. Of quantised files llama.cpp rounds the
activations too: what it computes is compared on the same numbers written as F32.
"""

import dataclasses
import types
from typing import NamedTuple

import numpy as np
import pytest

import toy
from toy.checks import gradcheck
from toy.data.tokenizers import CharTokenizer
from toy.engines.adapters import TARGETS
from toy.files import gguf_models, gguf_write
from toy.files.gguf import GGUF
from toy.files.gguf_models import UnsupportedModelError
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models.architectures import language_models
from toy.models.parameters import ParameterTree
from toy.ops import reference
from toy.trained import load_trained, read_trained
from toy.trained.export import export_adapter, export_model

BAR = 1e-3  # nats, largest difference of a log-probability from llama.cpp's
GRADIENT_BAR = 2e-5  # relative L2 per tensor, float32 against PyTorch's float64
TOKENIZER = CharTokenizer("".join(chr(i) for i in range(32, 127)) + "\n\t")  # ASCII alone: no end token
V, CONTEXT, T = TOKENIZER.vocab_size, 72, 12
IDS = np.arange(T) ** 2 * 7 % V


class Relative(NamedTuple):
    """architecture: of GGUF. fields: of the config. odd: what is different in the odd sizes. heads: untied or not."""

    architecture: str
    fields: dict
    odd: dict = {"head_dim": 14}  # noqa: RUF012 (never changed)
    heads: tuple = (False, True)


HALVES = {"rope_halves": True}
YARN = {"rope_scaling": "yarn", "rope_scale": 4.0, "rope_original_context": 24}
RELATIVES = {
    "llama": Relative("llama", {}),
    "llama, biases": Relative("llama", {"qkv_bias": True, "attn_output_bias": True, "mlp_bias": True}),
    "llama, frequency factors": Relative("llama", {"rope_factors": lambda c: np.geomspace(1, 8, c.d_head // 2)}),
    "llama, linear": Relative("llama", {"rope_scaling": "linear", "rope_scale": 2.5}),
    "llama, yarn": Relative("llama", {**YARN, "rope_attn_factor": 1.25}),
    "llama, yarn and factors": Relative(
        "llama", {**YARN, "rope_factors": lambda c: np.linspace(3, 1, c.d_head // 2), "rope_base": 500.0}
    ),
    "llama, yarn of a long context": Relative(
        "llama", {"rope_scaling": "yarn", "rope_scale": 8.0, "rope_original_context": 4096}, odd={"head_dim": 64}
    ),
    "qwen2": Relative("qwen2", {**HALVES, "qkv_bias": True}, odd={"d_model": 30}),
    "qwen2, yarn": Relative("qwen2", {**HALVES, **YARN, "qkv_bias": True}, odd={"d_model": 30}),
    "qwen3": Relative("qwen3", {**HALVES, "qk_norm": True}),
    "qwen3, linear, biases": Relative(
        "qwen3", {**HALVES, "qk_norm": True, "qkv_bias": True, "rope_scaling": "linear", "rope_scale": 3.0}
    ),
    "granite": Relative(
        "granite", {"embedding_scale": 2.5, "residual_scale": 0.4, "logit_scale": 1.5, "attention_scale": 0.2}
    ),
    "granite, biases, yarn": Relative(
        "granite", {**YARN, "logit_scale": 0.7, "residual_scale": 0.6, "qkv_bias": True, "mlp_bias": True}
    ),
    "mistral3": Relative("mistral3", {**YARN, "rope_scale": 16.0, "yarn_log_multiplier": 1.0}),
    "mistral3, half": Relative("mistral3", {**YARN, "yarn_log_multiplier": 0.5, "rope_attn_factor": 1.1}),
    "smollm3": Relative("smollm3", {"rope_skips": 4, "n_layers": 5}),
    "smollm3, linear": Relative(
        "smollm3", {"rope_skips": 4, "n_layers": 4, "rope_scaling": "linear", "rope_scale": 2.0}
    ),
    "gemma2": Relative(
        "gemma2",
        {
            **HALVES, "geglu": True, "post_norms": True, "window_pattern": 2, "sliding_window": 5, "attention_softcap": 4.0,
            "logit_softcap": 6.0, "embedding_scale": lambda c: c.d_model**0.5, "n_layers": 3,
        },
        heads=(False,),
    ),
    "gemma3": Relative(
        "gemma3",
        {
            **HALVES, "geglu": True, "post_norms": True, "qk_norm": True, "window_pattern": 6, "sliding_window": 4,
            "rope_local_base": 10000.0, "rope_base": 300.0, "embedding_scale": lambda c: c.d_model**0.5, "n_layers": 7,
        },
    ),
    "gemma3, all of it": Relative(
        "gemma3",
        {
            **HALVES, "geglu": True, "post_norms": True, "qk_norm": True, "window_pattern": 6, "rope_local_base": 10000.0,
            "rope_scaling": "linear", "rope_scale": 8.0, "embedding_scale": lambda c: c.d_model**0.5,
        },
    ),
    "olmo2": Relative(
        "olmo2",
        {
            **HALVES, "qk_norm": True, "qk_norm_together": True, "no_pre_norms": True, "post_norms": True,
        },
        odd={"d_model": 30}, heads=(True,),
    ),
    "olmo2, yarn": Relative(
        "olmo2",
        {
            **HALVES, **YARN, "qk_norm": True, "qk_norm_together": True, "no_pre_norms": True, "post_norms": True,
        },
        odd={"d_model": 30}, heads=(True,),
    ),
}  # fmt: skip
ODD = {"d_model": 21, "n_heads": 3, "n_kv_heads": 1, "d_ff": 29, "n_layers": 2}  # no multiple of anything
EVEN = {"d_model": 96, "n_heads": 3, "n_kv_heads": 3, "d_ff": 64, "n_layers": 2}  # rows in whole blocks of Q8_0


@pytest.fixture(params=RELATIVES)
def relative(request):
    return RELATIVES[request.param]


def make_config(relative, sizes, untied=None):
    untied = relative.heads[0] if untied is None else untied
    if untied not in relative.heads:
        pytest.skip(f"{relative.architecture} is always {'untied' if relative.heads[0] else 'tied'}")
    sizes = {"vocab_size": V, "context_length": CONTEXT, "untied": untied, "rms_eps": 1e-6, **sizes}
    if sizes["d_model"] == ODD["d_model"]:
        sizes |= relative.odd
    fields = {name: value for name, value in relative.fields.items() if not callable(value)}
    config = toy.LlamaConfig(**{**sizes, **fields})
    derived = {name: value(config) for name, value in relative.fields.items() if callable(value)}
    return dataclasses.replace(config, **derived)


def random_parameters(config, seed=0):
    """Far from where training starts: predictions that are far from uniform, gains and biases of their own."""
    model = toy.Llama(config)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    model.parameters.output_norm.weight *= (
        2.5 if config.untied else 2.5 / config.d_model**0.5
    )  # logits of a size of 2.5
    return dict(model.parameters.items())


def random_adapters(config, seed=5, rank=3):
    generator, arrays = np.random.default_rng(seed), {}
    for name, shape in toy.Llama.parameter_shapes(config).items():
        if name.startswith("blk.") and len(shape) == 2:
            stem = name.removesuffix(".weight")
            arrays[f"{stem}.lora_a"] = generator.normal(0, shape[1] ** -0.5, (rank, shape[1])).astype(np.float32)
            arrays[f"{stem}.lora_b"] = generator.normal(0, 0.3, (shape[0], rank)).astype(np.float32)
    return arrays


def outer_adapters(config, rank=2):
    """On the output matrix and on the embedding, whose A has a row for each token."""
    generator, d = np.random.default_rng(6), config.d_model
    shapes = {"output.lora_a": (rank, d), "output.lora_b": (V, rank)}
    shapes |= {"token_embd.lora_a": (V, rank), "token_embd.lora_b": (d, rank)}
    return {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def as_there(loaded):
    """The log-probabilities of IDS by a `toy.load`ed model, with llama.cpp's GELU, a table of float16 numbers, in the place
    of ours. Its own way of rounding is up to 4e-3 of what Gemma gives."""
    if loaded.config.geglu:
        loaded.model.ops = types.SimpleNamespace(**(vars(reference) | {"geglu": geglu_of_a_table}))
    return log_softmax(loaded.logits(IDS[: loaded.config.context_length]))


def geglu_of_a_table(gate, up):
    from test_llama_cpp import half_precision_gelu

    return half_precision_gelu(gate)[0] * up, None


def relative_l2(given, expected):
    return np.linalg.norm(np.asarray(given, np.float64) - expected) / np.linalg.norm(expected)


def assert_same_gradients(given, expected):
    assert given.keys() == expected.keys()
    norms = {name: np.linalg.norm(array) for name, array in expected.items()}
    tiny = 1e-6 * max(norms.values())  # a key bias moves all scores of a query alike: its gradient is rounding error
    errors = {name: relative_l2(given[name], array) for name, array in expected.items() if norms[name] > tiny}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_BAR} == {}
    return max(errors.values())


def make_batch(batch=2, t_seq=7, seed=0):
    token_ids, labels = np.random.default_rng(seed).integers(0, V, (2, batch, t_seq))
    labels[:, 2:3] = labels[-1, 4:5] = -1
    return token_ids, labels


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [False, True])
def test_a_file_says_the_config_and_opens_as_it(relative, tmp_path, untied):
    for sizes in (ODD, EVEN):
        config = make_config(relative, sizes, untied)
        parameters = random_parameters(config)
        write_gguf(tmp_path / "m.gguf", config, parameters, TOKENIZER)
        with GGUF.open(tmp_path / "m.gguf") as gguf:
            assert gguf.architecture == relative.architecture
            assert gguf.config() == config
            assert all(np.array_equal(array, parameters[name]) for name, array in gguf.parameters().items())
        with pytest.raises(ValueError, match="adapter for another base: it is for a gpt2 model"):
            gpt2 = write_adapter_for_gpt2(tmp_path)
            load_trained(tmp_path / "m.gguf", gpt2, backend="numpy")


def write_adapter_for_gpt2(folder):
    config = toy.GPT2Config(V, 8, 2, 8, 1, 8)
    arrays = {"blk.0.attn_output.lora_a": np.ones((1, 8)), "blk.0.attn_output.lora_b": np.ones((8, 1))}
    write_adapter(folder / "gpt2.gguf", config, arrays, 1.0)
    return folder / "gpt2.gguf"


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    from test_llama_cpp import LlamaCpp

    return LlamaCpp


@pytest.mark.llama_cpp
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_log_probabilities_and_greedy_text(relative, llama_cpp, tmp_path, untied):
    path = tmp_path / "m.gguf"
    config = make_config(relative, ODD, untied)
    write_gguf(path, config, random_parameters(config), TOKENIZER)
    judge = llama_cpp(path)
    theirs = judge.log_probabilities(IDS, V)
    assert theirs.std() > 0.8  # not a uniform distribution, with which anything would agree
    plain = toy.Llama(
        dataclasses.replace(config, **unset(relative)), parameters=ParameterTree(random_parameters(config))
    )
    if unset(relative):  # and without its flags it is another model
        assert np.abs(theirs - log_softmax(plain.forward(IDS)[0])).max() > 0.05
    assert np.abs(theirs - as_there(toy.load(path, backend="numpy"))).max() <= BAR
    for backend in ("numpy", "cython"):
        loaded = toy.load(path, backend=backend)
        assert np.abs(theirs - log_softmax(loaded.logits(IDS))).max() <= (5 * BAR if config.geglu else BAR)
        for prompt in ("The ", "b = "):
            assert loaded.generate(prompt, 64, temperature=0) == judge.write(prompt, 64)


def unset(relative):
    """The fields of a row back at their defaults, those of them that change no parameter."""
    kept = {"qkv_bias", "attn_output_bias", "mlp_bias", "qk_norm", "qk_norm_together", "post_norms", "no_pre_norms"}
    kept |= {"n_layers", "rope_base"}
    defaults = {field.name: field.default for field in dataclasses.fields(toy.LlamaConfig)}
    return {name: defaults[name] for name in relative.fields if name not in kept}


@pytest.mark.llama_cpp
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_a_quantised_file(relative, llama_cpp, tmp_path, untied):
    pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    config = make_config(relative, EVEN, untied)
    write_gguf(tmp_path / "q8_0.gguf", config, random_parameters(config), TOKENIZER, type="q8_0")
    with GGUF.open(tmp_path / "q8_0.gguf") as gguf:
        assert gguf.tensors["blk.1.ffn_down.weight"].type == "Q8_0"
        write_gguf(tmp_path / "f32.gguf", config, gguf.parameters(), TOKENIZER)
    ours = as_there(toy.load(tmp_path / "q8_0.gguf", backend="numpy"))
    assert np.abs(llama_cpp(tmp_path / "f32.gguf").log_probabilities(IDS, V) - ours).max() <= BAR
    rounded = np.abs(llama_cpp(tmp_path / "q8_0.gguf").log_probabilities(IDS, V) - ours)
    assert np.median(rounded) < 0.1  # it rounds the activations


@pytest.mark.llama_cpp
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_decoding_graph(relative, llama_cpp, tmp_path, kind):
    """It rounds as llama.cpp does: the same log-probabilities on a quantised file too, and the same greedy text. What is left
    of Gemma in float32 is llama.cpp's GELU. Its queries are scaled before they are rounded to half precision, ours
    afterwards: heads of 16, whose scale is a power of two, are rounded alike."""
    from toy.engines.decoding import Decoder

    heads = {"n_heads": 6, "n_kv_heads": 6} if "geglu" in relative.fields else {}
    config, path = make_config(relative, EVEN | heads), tmp_path / "m.gguf"
    write_gguf(path, config, random_parameters(config), TOKENIZER, type=kind)
    loaded = toy.load(path, backend="ggml", device="cpu-native")
    decoder, judge = loaded.generator.model, llama_cpp(path, half_cache=kind != "f32")
    assert isinstance(decoder, Decoder)
    cache, ids = decoder.new_kv_cache(), IDS[:, None]
    ours = log_softmax(np.concatenate([decoder.forward(one, kv_cache=cache, last_only=True)[0] for one in ids]))
    theirs = judge.log_probabilities(IDS, V)
    if kind == "f32":
        assert np.abs(theirs - ours).max() <= (5 * BAR if config.geglu else BAR)
    else:  # a number that was rounded up here and down there is a step of the rounding
        rounding = np.abs(theirs - log_softmax(loaded.logits(IDS))).mean()
        assert np.abs(theirs - ours).mean() <= 0.1 * rounding
    for prompt in ("The ", "b = "):
        assert loaded.generate(prompt, 64, temperature=0) == judge.write(prompt, 64)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_an_adapter_and_the_merged_model(relative, llama_cpp, tmp_path, untied):
    """Of adapters on every matrix, those before and after the blocks too: exported as they are, and merged into the base."""
    config = make_config(relative, ODD, untied)
    base, adapter, alpha = tmp_path / "base.gguf", tmp_path / "adapter.gguf", 4.5
    write_gguf(base, config, random_parameters(config), TOKENIZER)
    with GGUF.open(base) as gguf:
        adapters = random_adapters(config) | (outer_adapters(config) if config.untied else {})
        write_adapter(adapter, config, adapters, alpha, base=gguf)
    loaded = toy.load(base, adapter)
    ours = as_there(toy.load(base, adapter, backend="numpy"))
    theirs = llama_cpp(base, adapter=adapter).log_probabilities(IDS, V)
    assert np.abs(theirs - ours).max() <= BAR
    assert np.abs(theirs - log_softmax(toy.load(base).logits(IDS))).max() > 0.1  # the adapter does something
    stored = read_trained(base, adapter)
    export_adapter(stored, tmp_path / "again.gguf")
    assert np.abs(llama_cpp(base, tmp_path / "again.gguf").log_probabilities(IDS, V) - ours).max() <= BAR
    export_model(stored, tmp_path / "merged.gguf")
    judge = llama_cpp(tmp_path / "merged.gguf")
    assert np.abs(judge.log_probabilities(IDS, V) - ours).max() <= BAR
    assert loaded.generate("The ", 40, temperature=0) == judge.write("The ", 40)


# keys that some architecture of llama.cpp reads, with a value that would change what is computed
KEYS = {
    "rope.scaling.factor": 4.0, "rope.scale_linear": 4.0, "rope.scaling.attn_factor": 1.5, "rope.scaling.type": "yarn",
    "rope.scaling.original_context_length": 16, "rope.scaling.yarn_ext_factor": 0.5, "rope.scaling.yarn_attn_factor": 1.5,
    "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 0.25, "rope.scaling.yarn_log_multiplier": 0.5,
    "rope.scaling.finetuned": False, "rope.scaling.alpha": 2.0, "rope.freq_base": 77.0, "rope.freq_base_swa": 77.0,
    "rope.dimension_count_swa": 4, "attention.key_length_swa": 4, "attention.sliding_window": 3,
    "attention.sliding_window_pattern": 3,
    "attention.clamp_kqv": 0.2, "attention.max_alibi_bias": 1.0, "attention.scale": 0.9, "attention.output_scale": 2.0,
    "attention.value_scale": 2.0, "attention.temperature_scale": 0.5, "attention.temperature_length": 4,
    "attention.layer_norm_rms_epsilon": 0.5, "attention.layer_norm_epsilon": 0.5, "attention.causal": False,
    "logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 2.0, "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 3.0, "use_parallel_residual": True, "swin_norm": True,
    "nextn_predict_layers": 1, "hidden_activation": "gelu", "attention.shared_kv_layers": 1, "context_length": 40,
}  # fmt: skip
TOGETHER = {
    "experts": {"expert_count": 2, "expert_used_count": 1},
    "linear of old": {"rope.scale_linear": 4.0, "rope.scaling.type": "linear"},
    "factor of no type": {"rope.scaling.factor": 4.0, "rope.scaling.type": "none", "rope.scaling.attn_factor": 1.5},
    "factor 0": {"rope.scaling.factor": 0.0, "rope.scaling.type": "linear"},
    "yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    "yarn, all": {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.5, "rope.scaling.yarn_ext_factor": 0.5, "rope.scaling.yarn_attn_factor": 1.5,
        "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 0.25, "rope.scaling.yarn_log_multiplier": 0.5,
    },
    "shorter": {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5},
    "longrope": {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
    "temperature": {"attention.temperature_scale": 0.5, "rope.scaling.original_context_length": 4},
    "scales of 0": {"attention.scale": 0.0, "residual_scale": 0.0, "embedding_scale": 0.0},
}  # fmt: skip
# of which llama.cpp's result for this prompt and these tensors shows nothing, and which mean another model nevertheless
CAUTION = {
    "attention.causal", "rope.scaling.type", "expert_count", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "granite", "smollm3", "mistral3", "gemma2", "gemma3", "olmo2"]
)
def test_every_key_is_used_or_refused_by_name(llama_cpp, tmp_path, name):
    row = RELATIVES["llama" if name == "mistral3" else name]
    row = row._replace(odd={"d_model": 96, "head_dim": 32})  # heads wide enough for YaRN to tell contexts apart
    config = make_config(row, {**ODD, "rope_base": 1000.0})
    write_gguf(tmp_path / "plain.gguf", config, random_parameters(config), TOKENIZER)
    plain = llama_cpp(tmp_path / "plain.gguf").log_probabilities(IDS, V)
    outcomes = {"same": 0, "used": 0, "refused": 0}
    for keys in [{key: value} for key, value in KEYS.items()] + list(TOGETHER.values()):
        path = with_keys(tmp_path, name, keys)
        try:
            theirs = llama_cpp(path).log_probabilities(IDS, V)
        except RuntimeError:
            theirs = None  # it does not load the file
        try:
            loaded = toy.load(path, backend="numpy")
        except UnsupportedModelError as error:
            assert any(f"{name}.{key}" in str(error) for key in keys), error
            assert theirs is None or CAUTION & keys.keys() or np.abs(theirs - plain).max() > 1e-3, f"strict: {keys}"
            outcomes["refused"] += 1
            continue
        ours = as_there(loaded)
        t = len(ours)  # a context may be shorter than the file says
        assert theirs is not None and np.abs(theirs[:t] - ours).max() <= BAR, keys
        assert t == T or np.abs(theirs[t:] - plain[t:]).max() > 0.1, f"strict: {keys}"
        outcomes["same" if np.abs(theirs - plain).max() < 1e-5 else "used"] += 1
    most = {"gemma2": 14, "gemma3": 10}.get(name, 7)
    assert outcomes["same"] >= 20 and outcomes["refused"] <= most and outcomes["used"] >= 7, outcomes


def with_keys(folder, name, keys):
    """plain.gguf under the architecture `name`, with these keys."""
    with GGUF.open(folder / "plain.gguf") as gguf:
        entries = {key.replace(f"{gguf.architecture}.", f"{name}.", 1): value for key, value in gguf.metadata.items()}
        tensors = [(tensor, gguf.dequantize(tensor), "F32") for tensor in gguf.tensors]
    entries |= {"general.architecture": name} | {f"{name}.{key}": value for key, value in keys.items()}
    gguf_write._write(folder / "keys.gguf", entries, tensors)
    return folder / "keys.gguf"


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", gguf_models.FORMS)
def test_tensors_that_an_architecture_does_not_have_are_refused(llama_cpp, tmp_path, name):
    """Those that llama.cpp refuses, and those that it would compute with."""
    if name == "gpt2":
        pytest.skip("no Llama")
    row = RELATIVES.get(name, RELATIVES["llama"])
    config = make_config(row._replace(odd={"d_model": 24}), ODD)
    write_gguf(tmp_path / "plain.gguf", config, random_parameters(config), TOKENIZER)
    ones = np.ones(config.d_head, np.float32)
    extra = {
        "output.bias": np.ones(V, np.float32), "rope_factors_long.weight": ones[:4], "blk.0.attn_q.scale": ones[:1],
        "blk.0.attn_sinks.weight": ones[:3],
    }  # fmt: skip
    if not config.post_norms:
        extra |= {"blk.0.post_attention_norm.weight": np.ones(24, np.float32)}
    if "rope_factors" not in gguf_models.FORMS[name][1].vectors:
        extra["rope_freqs.weight"] = ones[:4]
    if not config.qk_norm:
        extra |= {"blk.0.attn_q_norm.weight": ones}
    for tensor, array in extra.items():
        with GGUF.open(with_keys(tmp_path, name, {})) as gguf:
            tensors = [(each, gguf.dequantize(each), "F32") for each in gguf.tensors]
            gguf_write._write(tmp_path / "extra.gguf", dict(gguf.metadata), [*tensors, (tensor, array, "F32")])
        with pytest.raises(UnsupportedModelError, match=f"this library's {name} has no place for: '{tensor}'"):
            toy.load(tmp_path / "extra.gguf")
    toy.load(tmp_path / "keys.gguf").close()  # without them it opens


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_gradients_of_all_weights_are_torchs(backend, relative, torch_models, untied):
    config, (token_ids, labels) = make_config(relative, ODD, untied), make_batch()
    recipe = toy.recipes.FromScratch(*backend).realize(
        config, toy.RecipeOptions(t_seq=7, t_batch=2), keep_gradients=True
    )
    recipe.load_parameters(random_parameters(config))
    logits, loss, expected = torch_models.run_model("llama", recipe.parameters(), config, token_ids, labels)
    assert relative_l2(recipe.logits(token_ids).reshape(logits.shape), logits) <= GRADIENT_BAR
    hp = recipe.adamw(lr=0.0).hp_for_step(0)
    assert recipe.step(token_ids, None, labels, hp, is_first=True) == pytest.approx(loss, rel=GRADIENT_BAR)
    assert_same_gradients(recipe.gradients(), expected)


@pytest.mark.parametrize("kind, sizes", [("f32", ODD), ("q8_0", EVEN)])
def test_gradients_of_adapters_are_torchs(backend, relative, torch_models, tmp_path, kind, sizes):
    if kind == "q8_0":
        pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    config, (token_ids, labels), scale = make_config(relative, sizes), make_batch(), 1.5
    write_gguf(tmp_path / "m.gguf", config, random_parameters(config), type=kind)
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        options = toy.RecipeOptions(t_seq=7, t_batch=2)
        recipe = toy.recipes.LoRA(*backend).realize(
            gguf, None, 3, options, alpha=3 * scale, targets=tuple(TARGETS), keep_gradients=True
        )
        adapters = random_adapters(config)
        recipe.load_parameters(adapters)
        of_b = {name: np.float32(scale if name.endswith("lora_b") else 1) for name in adapters}
        weights = gguf.parameters() | {name: array * of_b[name] for name, array in adapters.items()}
        _, loss, expected = torch_models.run_model("llama", weights, config, token_ids, labels)
        hp = recipe.adamw(lr=0.0).hp_for_step(0)
        assert recipe.step(token_ids, None, labels, hp, is_first=True) == pytest.approx(loss, rel=GRADIENT_BAR)
        assert_same_gradients(recipe.gradients(), {name: expected[name] * of_b[name] for name in adapters})


@pytest.mark.usefixtures("kernels")
def test_the_native_graph_is_one_piece_that_metal_runs(relative, tmp_path):
    import ggml_bridge

    config, options = make_config(relative, ODD), toy.RecipeOptions(t_seq=7, t_batch=2)
    write_gguf(tmp_path / "m.gguf", config, random_parameters(config))
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        for recipe in (
            toy.recipes.FromScratch("ggml", "cpu-native").realize(config, options),
            toy.recipes.LoRA("ggml", "cpu-native").realize(gguf, None, 3, options, targets=tuple(TARGETS)),
        ):
            graph = recipe.engine._training("integers").graph
            assert ggml_bridge.metal_unsupported(graph) == []
            assert ggml_bridge.cuda_unsupported(graph) == []
            assert recipe.engine.explain().splits == 1
            assert ggml_bridge.metal_unsupported(recipe.engine._forward(None).graph) == []
            assert ggml_bridge.cuda_unsupported(recipe.engine._forward(None).graph) == []


def test_token_by_token_is_all_at_once(ops, relative):
    config = make_config(relative, ODD)
    model = toy.Llama(config, ops=ops, parameters=ParameterTree(random_parameters(config)))
    logits, _ = model.forward(IDS)
    cache = model.new_kv_cache()
    rows = [model.forward(IDS[part], kv_cache=cache)[0] for part in (slice(5), slice(5, 6), slice(6, T))]
    assert np.abs(np.concatenate(rows) - logits).max() <= 1e-5 * np.abs(logits).max()


def test_it_learns_from_scratch_as_on_numpy(backend, relative):
    config, ids = make_config(relative, ODD), np.tile([3, 1, 4, 1, 5, 9, 2, 6, 5], (2, 1))

    def losses(backend):
        recipe = toy.recipes.FromScratch(*backend).realize(config, toy.RecipeOptions(t_seq=8, t_batch=2, seed=1))
        adamw = recipe.adamw(lr=0.005)
        return [recipe.step(ids[:, :-1], None, ids[:, 1:], adamw.hp_for_step(k), k == 0) for k in range(30)]

    curve = losses(backend)
    assert curve[0] == pytest.approx(np.log(V), abs=0.5) and curve[-1] < curve[0] - 1
    np.testing.assert_allclose(curve, losses(("numpy", "cpu")), atol=1e-3)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2"])
def test_runs_on_a_file_of_it(toy_command, llama_cpp, tmp_path, name):
    """LoRA and full fine-tuning on the command line, and what they export, in llama.cpp."""
    config = make_config(RELATIVES[name], EVEN)
    write_gguf(tmp_path / "base.gguf", config, random_parameters(config), TOKENIZER)
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    start = ["--model", tmp_path / "base.gguf", "--corpus", tmp_path / "text.txt", "--steps", 8, "--context", 16]
    start += ["--batch", 2, "--sample-tokens", 1, "--lr", 0.01]
    for recipe, more in (("lora", ["--targets", "q,v,down"]), ("full-finetune", [])):
        code, _, error = toy_command("train", recipe, *start, *more, "--out", tmp_path / recipe)
        assert code == 0, error
        merge = ["--merge"] if recipe == "lora" else []
        assert toy_command("export", tmp_path / recipe, *merge, "--out", tmp_path / f"{recipe}.gguf")[0] == 0
        ours = as_there(toy.load(tmp_path / recipe, backend="numpy"))
        judge = llama_cpp(tmp_path / f"{recipe}.gguf")
        assert np.abs(judge.log_probabilities(IDS, V) - ours).max() <= BAR
        before = log_softmax(toy.load(tmp_path / "base.gguf").logits(IDS))
        assert np.abs(ours - before).max() > 0.05  # the run did something
    assert toy_command("export", tmp_path / "lora", "--out", tmp_path / "adapter.gguf")[0] == 0
    theirs = llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf").log_probabilities(IDS, V)
    assert np.abs(theirs - as_there(toy.load(tmp_path / "lora", backend="numpy"))).max() <= BAR
    with GGUF.open(tmp_path / "adapter.gguf") as gguf:
        assert gguf.architecture == RELATIVES[name].architecture


@pytest.mark.parametrize("arch", [name for name, (_, fields) in language_models().items() if fields])
def test_a_run_of_that_name(toy_command, tmp_path, arch):
    """From random weights on the command line: the run opens again, and its file is of that architecture."""
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    sizes = ["--d-model", 24, "--heads", 3, "--kv-heads", 1, "--layers", 4, "--d-ff", 40, "--context", 16, "--batch", 2]
    code, _, error = toy_command(
        "train", "from-scratch", "--arch", arch, "--corpus", tmp_path / "text.txt", "--out", tmp_path / "run", *sizes,
        "--steps", 5, "--sample-tokens", 3, "--backend", "numpy",
    )  # fmt: skip
    assert code == 0, error
    config = read_trained(tmp_path / "run").config
    row, fields = language_models()[arch]
    assert type(config) is row.config and {name: getattr(config, name) for name in fields} == fields
    assert toy_command("export", tmp_path / "run", "--out", tmp_path / "m.gguf")[0] == 0
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        assert gguf.architecture == arch and gguf.config() == config
    code, written, error = toy_command("generate", tmp_path / "run", "--prompt", "to ", "--tokens", 3)
    assert code == 0 and written, error


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": "longrope", "rope_scale": 2.0},
            "rope_scaling must be one of none, linear, yarn, got 'longrope'",
        ),
        ({"rope_scaling": "yarn", "rope_scale": 0.0}, "rope_scale must be a positive number, got 0.0"),
        (
            {"rope_scaling": "yarn", "rope_scale": 2.0, "rope_original_context": -1},
            "rope_original_context must be at least 1",
        ),
        ({"rope_factors": (1.0,)}, "rope_factors must be 7 positive numbers, one for each pair of a head"),
        ({"rope_factors": (0.0,) * 7}, "rope_factors must be 7 positive numbers"),
        ({"rope_skips": -1}, "rope_skips must be a whole number of at least 0"),
        ({"logit_scale": float("nan")}, "logit_scale must be a positive number"),
        ({"attention_scale": -1.0}, "attention_scale must be a positive number or None"),
        ({"logit_softcap": 0.0}, "logit_softcap must be a positive number or None, got 0.0"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"window_pattern": 1.5}, "window_pattern must be a whole number of at least 0, got 1.5"),
        ({"qk_norm_together": True}, "qk_norm_together is a kind of qk_norm: set both, or neither"),
        ({"yarn_log_multiplier": float("nan")}, "yarn_log_multiplier must be a number of at least 0"),
    ],
)
def test_a_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_config(RELATIVES["llama"], ODD), **fields)


def test_a_model_that_llama_cpp_does_not_have_is_not_written(tmp_path):
    config = make_config(Relative("", {"rope_halves": True, "rope_skips": 3}), ODD)
    with pytest.raises(ValueError, match=r"GGUF and llama\.cpp have no architecture for this model: LlamaConfig"):
        write_gguf(tmp_path / "m.gguf", config, random_parameters(config))
    assert not (tmp_path / "m.gguf").exists()


def test_heads_that_do_not_fill_the_width_of_a_qwen2_are_refused(tmp_path):
    config = make_config(RELATIVES["qwen2"]._replace(odd={"head_dim": 14}), ODD)
    with pytest.raises(ValueError, match="no architecture for this model"):
        write_gguf(tmp_path / "m.gguf", config, random_parameters(config))
