"""transformers and PEFT as the judges of folders that are read and written for them: the same logits, the same bits.

Models are small and random, with gains of their own, so large that attention and positions matter.
"""

import dataclasses
import json

import numpy as np
import pytest
from fetch_test_data import COMMAND, vocabularies
from tokenizer_oracle import hard_texts

import toy
from toy.data.bpe_tokenizer import BPETokenizer
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import load_tokenizer
from toy.data.tokenizer_json import read_tokenizer_json
from toy.data.tokenizer_json_write import tokenizer_files
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.files.gguf import GGUF
from toy.files.hugging_face import HuggingFaceModel
from toy.files.hugging_face_config import FAMILIES
from toy.files.hugging_face_write import write_model_folder
from toy.files.peft import read_peft, write_peft
from toy.trained import read_trained
from toy.trained.export import export_adapter, export_hugging_face, export_model, export_peft, merge_adapters

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
# what the judges say of themselves
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BAR = 1e-4  # largest difference of a logit
V, T = 67, 24
SIZES = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **ROPE}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 5, "num_hidden_layers": 3}
# name -> model_type, and what of its config is not in SIZES
MODELS = {
    "llama": ("llama", {}),
    "llama, tied, biases, narrow heads": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "llama, one head for keys": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 42}),
    "llama 3.1": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", **ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn with mscale": ("qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "qwen2, yarn with a factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3, tied": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}),
}


def ids(n=T):
    return np.random.default_rng(1).integers(0, V, (2, n))


def made(folder, name="llama", dtype=None, **changes):
    """A random model of transformers, saved in `folder`."""
    kind, more = MODELS[name]
    sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key.endswith(("_id", "vocab_size"))}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes | more | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            matrix, around = parameter.dim() > 1, 0 if kind.startswith("gemma") else 1
            parameter.copy_(torch.randn_like(parameter) * (0.25 if matrix else 0.2) + (0 if matrix else around))
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(folder)
    return model.float()


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def logits(model, tokens=None):
    with torch.no_grad():
        return model(torch.tensor(ids() if tokens is None else tokens)).logits.float().numpy()


def ours(folder, tokens=None, adapter=None, backend="auto"):
    with toy.load(folder, adapter=adapter, backend=backend) as model:
        return model.logits(ids() if tokens is None else tokens)


def difference(one, other):
    assert np.abs(other).max() > 1, "the logits are too small to tell anything"
    return np.abs(one - other).max()


# -- models in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    want = logits(made(tmp_path, name))
    assert difference(ours(tmp_path), want) < BAR


def test_every_model_type_has_a_row():
    assert {kind for kind, _ in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_half_precision_is_used_as_it_lies_there(tmp_path, name, dtype):
    made(tmp_path, name, getattr(torch, dtype))
    with HuggingFaceModel.open(tmp_path) as model:
        kind = {"float16": "F16", "bfloat16": "BF16"}[dtype]
        assert {record.type for record in model.tensors.values() if len(record.shape) == 2} == {kind}
    assert difference(ours(tmp_path, backend="numpy"), logits(opened(tmp_path))) < BAR


def test_several_files(tmp_path):
    model = made(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    assert (ours(tmp_path / "several") == ours(tmp_path / "one")).all()


def test_keys_as_older_versions_wrote_them(tmp_path):
    """rope_theta and rope_scaling beside the sizes, in place of rope_parameters."""
    want = logits(made(tmp_path, "llama, yarn"))
    keys = json.loads((tmp_path / "config.json").read_text())
    said = keys.pop("rope_parameters")
    theta, kind = said.pop("rope_theta"), said.pop("rope_type")
    keys |= {"rope_theta": theta, "rope_scaling": {"type": kind, **said}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert difference(logits(opened(tmp_path)), want) == 0  # so transformers reads them
    assert difference(ours(tmp_path), want) < BAR


def test_names_without_what_is_in_front(tmp_path):
    """GPT-2 as it was published: saved from the model without its output matrix."""
    want = logits(model := made(tmp_path / "whole", "gpt2"))
    model.transformer.save_pretrained(tmp_path / "inner")
    assert difference(ours(tmp_path / "inner"), want) < BAR


@pytest.mark.parametrize("name, key", [("mistral", {"sliding_window": 9}), ("qwen2", {"sliding_window": 9})])
def test_a_window_is_kept_by_a_shorter_context(tmp_path, name, key):
    """llama.cpp has no windows there: within its length nothing is cut off."""
    more = {"use_sliding_window": True, "max_window_layers": 1} if name == "qwen2" else {}
    model = made(tmp_path, name, **key, **more)
    with toy.load(tmp_path) as read:
        assert read.config.context_length == 9
    assert difference(ours(tmp_path, ids(9)), logits(model, ids(9))) < BAR
    assert toy.load(tmp_path).config.context_length < 64


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_key_of_transformers_is_passed_over(kind):
    """What its class knows is used, refused where it is not as expected, or changes nothing."""
    keys = transformers.AutoConfig.for_model(kind).to_dict().keys()
    assert keys - FAMILIES[kind].known_keys == set()


CHANGES = {
    "llama": {
        "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1,
        "rope_theta": 7.0, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "quantization_config": {"quant_method": "fp8"}, "architectures": ["LlamaForSequenceClassification"], "head_dim": 10,
        "num_key_value_heads": 4, "max_position_embeddings": 8, "vocab_size": 68, "num_hidden_layers": 3,
    },
    "qwen3": {"attention_bias": True, "hidden_act": "relu", "layer_types": ["full_attention", "chunked_attention"]},
    "granite": {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 1], "no_rope_layer_interval": 3},
    "gemma2": {
        "query_pre_attn_scalar": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 3,
        "use_bidirectional_attention": True, "hidden_activation": "silu",
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {
        "activation_function": "gelu", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True, "layer_norm_epsilon": 0.1, "n_inner": 41, "n_head": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in CHANGES.items() for key in keys])
def test_a_key_is_used_or_refused_by_name(tmp_path, name, key):
    """A changed key changes the logits as it does in transformers, shortens the context, or is an error that names it."""
    extra = {"use_sliding_window": True, "sliding_window": 4} if key == "layer_types" and name == "qwen3" else {}
    before = logits(made(tmp_path, name))
    assert difference(ours(tmp_path), before) < BAR
    keys = json.loads((tmp_path / "config.json").read_text())
    if key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        keys.pop("rope_parameters")
    if key == "no_rope_layer_interval":
        keys.pop("no_rope_layers")
    (tmp_path / "config.json").write_text(json.dumps(keys | extra | {key: CHANGES[name][key]}))
    try:
        got = ours(tmp_path)
    except ValueError as error:
        known = {
            "num_key_value_heads": "k_proj",
            "head_dim": "_proj",
            "vocab_size": "embed_tokens",
            "num_hidden_layers": "layers",
        }
        known |= {"attention_bias": "bias", "mlp_bias": "bias", "tie_word_embeddings": "lm_head", "n_inner": "mlp"}
        known |= {
            "max_position_embeddings": "context",
            "no_rope_layer_interval": "no_rope_layers",
            "rope_scaling": "rope_type",
        }
        assert key in str(error) or known.get(key, key) in str(error), error
        return
    want = logits(opened(tmp_path))
    assert difference(want, before) > 100 * BAR, "the change changes nothing"
    assert difference(got, want) < BAR


# -- recipes, and the way to GGUF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_lora_on_a_folder(tmp_path, name, backend):
    made(tmp_path, name, torch.bfloat16)
    with HuggingFaceModel.open(tmp_path) as model:
        options = toy.RecipeOptions(t_seq=8, seed=1)
        with toy.recipes.LoRA(*backend).realize(model, None, 2, options, targets=("q", "k")) as recipe:
            tokens = ids(9)[0]
            losses = [
                recipe.step(tokens[:-1], labels=tokens[1:], hp=recipe.adamw(0.03).hp_for_step(k)) for k in range(4)
            ]
            assert losses[-1] < losses[0] - 0.05
            first = -torch.log_softmax(torch.tensor(ours(tmp_path, tokens[:-1])), -1)[np.arange(8), tokens[1:]].mean()
            assert losses[0] == pytest.approx(float(first), abs=2e-4)


@pytest.mark.parametrize("name", ["llama, yarn", "llama 3.1", "gemma3", "gpt2"])
def test_as_gguf(tmp_path, name):
    want = logits(made(tmp_path / "folder", name))
    export_model(read_trained(tmp_path / "folder"), tmp_path / "model.gguf")
    assert difference(ours(tmp_path / "model.gguf"), want) < BAR
    with GGUF.open(tmp_path / "model.gguf") as gguf, HuggingFaceModel.open(tmp_path / "folder") as model:
        assert gguf.config() == pytest.approx(model.config()) or gguf.architecture == model.architecture


# -- models out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(tmp_path, name):
    made(tmp_path / "first", name)
    stored = read_trained(tmp_path / "first")
    export_hugging_face(stored, tmp_path / "second")
    again = read_trained(tmp_path / "second")
    for name, leaf in stored.parameters.items():
        assert np.allclose(again.parameters[name], leaf, rtol=0, atol=3e-7 if name.endswith("norm.weight") else 0), name
    tokens = ids(9)
    assert difference(logits(opened(tmp_path / "second"), tokens), logits(opened(tmp_path / "first"), tokens)) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kept_bytes(tmp_path, dtype):
    made(tmp_path / "first", "llama", getattr(torch, dtype))
    export_hugging_face(read_trained(tmp_path / "first"), tmp_path / "second", "keep")
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.dtype == getattr(torch, dtype)
    theirs = dict(second.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in first.named_parameters())


def config(**changes):
    sizes = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 20, "n_layers": 2, "context_length": 32}
    return toy.LlamaConfig(vocab_size=V, **sizes | changes)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": True},  # transformers has one switch for four biases: that of the output becomes zeros
        {"rope_scaling": "yarn", "rope_scale": 4.0, "rope_original_context": 8, "rope_attn_factor": 1.2},
        {"rope_scaling": "linear", "rope_scale": 2.0, "untied": True},
    ],
)
def test_a_model_of_our_own(tmp_path, fields):
    model = toy.Llama(config(**fields), seed=3)
    for name, array in model.parameters.items():
        array[...] = np.random.default_rng(len(name)).normal(0, 0.3, array.shape) + (array.ndim == 1)
    parameters = {name: np.asarray(array) for name, array in model.parameters.items()}
    write_model_folder(tmp_path / "folder", model.config, parameters, "F32", {}, {})
    tokens = ids(12)
    want = logits(opened(tmp_path / "folder"), tokens)
    assert difference(np.asarray(model.forward(tokens)[0]), want) < BAR
    assert difference(ours(tmp_path / "folder", tokens), want) < BAR


def test_what_transformers_has_no_place_for_is_refused(tmp_path):
    fine, wrong = config(), config(rope_factors=tuple(np.linspace(1, 5, 3)))
    parameters = {name: np.asarray(array) for name, array in toy.Llama(fine).parameters.items()}
    write_model_folder(tmp_path / "fine", fine, parameters, "F32", {}, {})
    with pytest.raises(ValueError, match="no RoPE with these factors"):
        write_model_folder(tmp_path / "wrong", wrong, parameters, "F32", {}, {})
    with pytest.raises(ValueError, match="rope_attn_factor"):
        write_model_folder(tmp_path / "wrong", config(rope_attn_factor=1.5), parameters, "F32", {}, {})
    assert not (tmp_path / "wrong").exists()


# -- tokenizers out ----------------------------------------------------------------------------------------------------

TEXT = "Hello world, hello 1234 words' worth!\n\n  Ünï日本 <|im_end|> x"


def written_tokenizer(folder, tokenizer):
    folder.mkdir()
    for name, data in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(data)
    return transformers.AutoTokenizer.from_pretrained(folder)


def subword_tokenizers():
    from test_gguf_tokenizer import CHAT, bpe_metadata, key, sentencepiece_metadata

    chat = {"tokenizer.chat_template": CHAT}
    return {
        "smollm": GGUFTokenizer(bpe_metadata(**chat)),
        "llama 3": GGUFTokenizer(bpe_metadata(**{key("pre"): "llama-bpe", key("add_bos_token"): True})),
        "an alias": GGUFTokenizer(bpe_metadata(**{key("pre"): "starcoder"})),
        "no model's own pattern": GGUFTokenizer(bpe_metadata(**{key("pre"): "falcon"})),
        "sentencepiece": GGUFTokenizer(sentencepiece_metadata()),
        "sentencepiece without a space": GGUFTokenizer(sentencepiece_metadata(**{key("add_space_prefix"): False})),
        "trained here": BPETokenizer.train(TEXT * 3, 270),
    }


@pytest.mark.parametrize("name", subword_tokenizers())
def test_a_tokenizer_in_transformers(tmp_path, name):
    tokenizer = subword_tokenizers()[name]
    theirs = written_tokenizer(tmp_path / "folder", tokenizer)
    for text in (TEXT, "", " ", "hello", "hellohello  hello\n"):
        want = tokenizer.encode(text, add_special=True, parse_special=True).tolist()
        assert theirs(text)["input_ids"] == want, text
    assert theirs.bos_token_id == tokenizer.bos_id and theirs.eos_token_id == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "hello"}]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("name", [name for name in subword_tokenizers() if "no model" not in name])
def test_a_tokenizer_and_back(tmp_path, name):
    tokenizer = subword_tokenizers()[name]
    written_tokenizer(tmp_path / "folder", tokenizer)
    again = read_tokenizer_json(tmp_path / "folder")
    assert again.encode(TEXT, add_special=True).tolist() == tokenizer.encode(TEXT, add_special=True).tolist()
    assert again.stop_ids == tokenizer.stop_ids and again.chat_template == tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "falcon"])
def test_published_vocabularies_in_the_library(tmp_path, name):
    """Those of llama.cpp's test data, as tokenizer.json: ids of hard texts and runs of spaces in the tokenizers library."""
    if vocabularies() is None:
        pytest.skip(f"llama.cpp's vocabularies were not fetched: {COMMAND}")
    library = pytest.importorskip("tokenizers")
    with GGUF.open(vocabularies() / f"ggml-vocab-{name}.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    theirs = library.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"].decode())
    for text in [*hard_texts(100, 7), *("a" + " " * n + "b" for n in range(40))]:
        assert theirs.encode(text).ids == tokenizer.encode(text, add_special=True, parse_special=True).tolist(), text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(" \nabcdehlorwÜ日!"), CharTokenizer("a")])
def test_bytes_and_characters_in_transformers(tmp_path, tokenizer):
    theirs = written_tokenizer(tmp_path / "folder", tokenizer)
    text = "hello wor\nld 日Ü!" if tokenizer.vocab_size > 1 else "aaa"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text).tolist()) == text


def test_a_trained_run_with_characters(tmp_path):
    """The folder of a model with its own characters is read again with the same tokenizer."""
    tokenizer = CharTokenizer("".join(map(chr, range(32, 32 + V))))
    parameters = {name: np.asarray(array) for name, array in toy.Llama(config()).parameters.items()}
    write_model_folder(tmp_path / "folder", config(), parameters, "F32", tokenizer_files(tokenizer), {})
    with toy.load(tmp_path / "folder") as model:
        assert isinstance(model.tokenizer, CharTokenizer) and model.tokenizer.characters == tokenizer.characters
        assert len(model.generate("HI", 5, seed=1)) == 5


# -- PEFT --------------------------------------------------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "llama, all": ("llama", {"target_modules": ALL}),
    "llama, narrow heads": ("llama, tied, biases, narrow heads", {"target_modules": ["q_proj", "k_proj"]}),
    "llama, rsLoRA": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "llama, a regular expression": ("llama", {"target_modules": r".*\.1\.self_attn\.[qk]_proj"}),
    "llama, ranks of their own": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3, "^model.layers.0.self_attn.q_proj": 7},
        },
    ),
    "llama, the output": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "gemma3": ("gemma3", {"target_modules": ["k_proj", "up_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def adapted(folder, base, settings):
    """A model of PEFT with random adapters, saved in `folder`."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def adapters_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def on_base(folder, model):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(opened(folder), model).eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft(tmp_path, name):
    base, settings = ADAPTERS[name]
    model = adapted(tmp_path / "adapter", made(tmp_path / "base", base), settings)
    want = logits(model)
    assert difference(ours(tmp_path / "base"), want) > 100 * BAR
    assert difference(ours(tmp_path / "base", adapter=tmp_path / "adapter"), want) < BAR


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_there_and_back_bit_for_bit(tmp_path, name):
    base, settings = ADAPTERS[name]
    model = adapted(tmp_path / "adapter", made(tmp_path / "base", base), settings)
    stored = read_trained(tmp_path / "base")
    config = stored.config
    read = read_peft(tmp_path / "adapter", config, stored.parameters)
    write_peft(tmp_path / "again", config, read.parameters, read.alpha, str(tmp_path / "base"))
    again = read_peft(tmp_path / "again", config)
    assert again.alpha == read.alpha and again.parameters.keys() == read.parameters.keys()
    assert all((again.parameters[name] == array).all() for name, array in read.parameters.items())
    theirs = on_base(tmp_path / "base", tmp_path / "again")
    mine = adapters_of(theirs)
    assert mine.keys() == adapters_of(model).keys()
    assert all(torch.equal(array, mine[name]) for name, array in adapters_of(model).items())
    assert difference(logits(theirs), logits(model)) < 1e-5


def test_scales_of_their_own(tmp_path):
    """alpha_pattern, by names and by a regular expression: the scales go into B."""
    patterns = {"up_proj": 3, r"layers.0.self_attn.(q|k)_proj": 10}
    settings = {"target_modules": ["q_proj", "k_proj", "up_proj"], "alpha_pattern": patterns}
    want = logits(adapted(tmp_path / "adapter", made(tmp_path / "base"), settings))
    assert difference(ours(tmp_path / "base", adapter=tmp_path / "adapter"), want) < BAR


def test_a_copy_of_the_output_matrix(tmp_path):
    """PEFT saves it beside adapters on it: the base's own is nothing new, another one would be left out."""
    model = adapted(tmp_path / "adapter", made(tmp_path / "base"), {"target_modules": ["lm_head"]})
    assert difference(ours(tmp_path / "base", adapter=tmp_path / "adapter"), logits(model)) < BAR
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight[3, 4] += 1
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"weights of its own for .*lm_head\.base_layer\.weight"):
        ours(tmp_path / "base", adapter=tmp_path / "adapter")


def test_rslora_with_ranks_of_their_own(tmp_path):
    settings = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "use_rslora": True}
    want = logits(adapted(tmp_path / "adapter", made(tmp_path / "base"), settings))
    assert difference(ours(tmp_path / "base", adapter=tmp_path / "adapter"), want) < BAR


def test_several_with_scales(tmp_path):
    """A GGUF adapter and one of PEFT together, each times its scale."""
    model = adapted(tmp_path / "adapter", made(tmp_path / "base"), {"target_modules": ["q_proj", "k_proj"]})
    export_adapter(read_trained(tmp_path / "base", tmp_path / "adapter"), tmp_path / "adapter.gguf")
    both = {tmp_path / "adapter": 0.75, tmp_path / "adapter.gguf": 0.25}
    assert difference(ours(tmp_path / "base", adapter=both), logits(model)) < BAR


def test_merged_and_exported(tmp_path):
    want = logits(adapted(tmp_path / "adapter", made(tmp_path / "base"), {"target_modules": ALL}))
    stored = read_trained(tmp_path / "base", tmp_path / "adapter")
    export_hugging_face(stored, tmp_path / "merged")
    assert difference(logits(opened(tmp_path / "merged")), want) < BAR
    export_peft(stored, tmp_path / "out")
    assert difference(logits(on_base(tmp_path / "base", tmp_path / "out")), want) < BAR
    merged = merge_adapters(stored.parameters, stored.adapters, stored.lora_scale)
    assert merged.keys() == stored.parameters.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_modules": ["embed_tokens"]}, "an adapter on an embedding|weights of its own"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias = True"),
    ],
)
def test_what_peft_can_and_this_cannot_is_refused_by_name(tmp_path, settings, message):
    base = {"target_modules": ["q_proj"]}
    config = read_trained_config(tmp_path / "base")
    adapted(tmp_path / "fine", opened(tmp_path / "base"), base)
    assert read_peft(tmp_path / "fine", config).rank == 4
    adapted(tmp_path / "adapter", opened(tmp_path / "base"), base | settings)
    with pytest.raises(ValueError, match=message):
        read_peft(tmp_path / "adapter", config)


def read_trained_config(folder):
    made(folder)
    return dataclasses.replace(read_trained(folder).config)
