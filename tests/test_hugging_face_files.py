"""Folders of Hugging Face and PEFT from strangers: what is damaged, missing or not to be opened is told in one sentence, and
the command line around them. transformers and PEFT themselves are asked in test_hugging_face.py."""

import json
import os
import re
import shutil
import struct

import model_files
import numpy as np
import pytest
from test_gguf_tokenizer import CHAT, bpe_metadata

import toy
from toy.data.chat_template import ChatTemplate
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.tokenizer_json_write import token_ids, tokenizer_files
from toy.data.tokenizers import CharTokenizer
from toy.files.errors import BadFileError
from toy.files.folders import check_replaceable, replacing_folder
from toy.files.gguf import GGUF
from toy.files.gguf_models import UnsupportedModelError
from toy.files.gguf_vocabulary import CHARACTER_OF_BYTE
from toy.files.hugging_face import HuggingFaceModel, is_model_folder, rows_of_pairs
from toy.files.hugging_face_write import FILES, write_model_folder
from toy.files.peft import FILES as PEFT_FILES
from toy.files.peft import open_adapter, read_peft, write_peft
from toy.files.safetensors_file import NewTensor, map_safetensors, write_safetensors
from toy.trained import read_trained
from toy.trained.ollama import Turns, modelfile, turns_of

CONFIG = model_files.config("llama")
V = CONFIG.vocab_size
TOKENIZER = model_files.tokenizer(**{"tokenizer.chat_template": CHAT})


def parameters(config=CONFIG, seed=0):
    generator = np.random.default_rng(seed)
    shapes = toy.Llama.parameter_shapes(config)
    return {
        name: generator.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1) for name, shape in shapes.items()
    }


def write_folder(path, tokenizer=TOKENIZER, dtype="F32", config=CONFIG):
    write_model_folder(path, config, parameters(config), dtype, tokenizer_files(tokenizer), token_ids(tokenizer))
    return path


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path):
    write_peft(tmp_path / "adapter", CONFIG, model_files.adapters(), model_files.ALPHA, "model")
    return tmp_path / "adapter"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# -- safetensors -------------------------------------------------------------------------------------------------------


def test_the_package_reads_what_is_written(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)}
    tensors = {
        name: NewTensor({4: "F32", 2: "F16"}[array.itemsize], array.shape, lambda array=array: [array[:1], array[1:]])
        for name, array in arrays.items()
    }
    write_safetensors(tmp_path / "own", tensors)
    assert all((load_file(tmp_path / "own")[name] == array).all() for name, array in arrays.items())
    save_file(arrays, tmp_path / "theirs")
    for path in (tmp_path / "own", tmp_path / "theirs"):
        mapped, found = map_safetensors(path)
        for name, array in arrays.items():
            tensor = found[name]
            assert tensor.shape == array.shape
            assert mapped[tensor.offset : tensor.offset + tensor.n_bytes] == array.tobytes()


HEADERS = {
    "an offset beyond the end": lambda h: h["model.norm.weight"].update(data_offsets=[0, 10**9]),
    "a negative offset": lambda h: h["model.norm.weight"].update(data_offsets=[-4, 124]),
    "offsets the wrong way": lambda h: h["model.norm.weight"].update(data_offsets=[128, 0]),
    "overlapping tensors": lambda h: h["model.norm.weight"].update(data_offsets=[0, 128]),
    "a shape that does not fit": lambda h: h["model.norm.weight"].update(shape=[1]),
    "a huge shape": lambda h: h["model.norm.weight"].update(shape=[2**62, 2**62]),
    "a shape of words": lambda h: h["model.norm.weight"].update(shape=["32"]),
    "no offsets": lambda h: h["model.norm.weight"].pop("data_offsets"),
    "a number in place of a tensor": lambda h: h.update({"model.norm.weight": 3}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_lies_in_a_header(folder, name):
    HuggingFaceModel.open(folder).close()
    header, data = header_of(folder / "model.safetensors")
    HEADERS[name](header)
    rewrite(folder / "model.safetensors", header, data)
    with pytest.raises(BadFileError, match=r"model\.safetensors: (is not a whole|describes the tensor)"):
        HuggingFaceModel.open(folder)


BYTES = {
    "empty": lambda data: b"",
    "cut off in the header": lambda data: data[:100],
    "cut off in the data": lambda data: data[:-1],
    "longer than it says": lambda data: data + b"\0" * 64,
    "a header longer than the file": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "a header of nothing": lambda data: struct.pack("<Q", 0) + data[8:],
    "not JSON": lambda data: data[:8] + b"[" * (len(data) - 8),
    "a pickle": lambda data: b"\x80\x04" + data,
}


@pytest.mark.parametrize("name", BYTES)
def test_damaged_files(folder, name):
    HuggingFaceModel.open(folder).close()
    path = folder / "model.safetensors"
    path.write_bytes(BYTES[name](path.read_bytes()))
    with pytest.raises(BadFileError, match="is not"):
        HuggingFaceModel.open(folder)


def test_every_bit_of_a_header_may_be_wrong(folder):
    """Whatever a changed byte makes of it: an error of one sentence, or a model of the same shapes."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place in np.random.default_rng(0).integers(0, 8 + length, 150).tolist():
        before, data[place] = data[place], data[place] ^ 0x11
        path.write_bytes(data)
        try:
            HuggingFaceModel.open(folder).close()
        except ValueError as error:
            assert "\n" not in str(error)
        data[place] = before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pipes_are_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadFileError, match=r"is a named pipe|is not a regular file"):
        read_trained(folder)


# -- model folders -----------------------------------------------------------------------------------------------------


def test_a_folder_of_our_own(folder):
    stored = read_trained(folder)
    assert stored.config == CONFIG and stored.in_gguf == "llama"
    assert all((stored.parameters[name] == array).all() for name, array in parameters().items())
    assert stored.tokenizer.encode("hello").tolist() == TOKENIZER.encode("hello").tolist()
    assert stored.tokenizer.stop_ids == TOKENIZER.stop_ids
    assert stored.tokenizer.apply_chat_template([{"role": "user", "content": "x"}]).startswith("<|im_start|>user\nx")


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_of_pairs(heads):
    d_head = 6
    rows = rows_of_pairs(heads * d_head, heads)
    assert rows[:6].tolist() == [0, 3, 1, 4, 2, 5]
    assert (rows[rows_of_pairs(heads * d_head, heads, to_gguf=False)] == np.arange(heads * d_head)).all()


def split(folder, n=3):
    """The weights in several files, as transformers names them."""
    header, data = header_of(folder / "model.safetensors")
    header.pop("__metadata__")
    names, index = sorted(header), {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part, offset, blocks = {}, 0, []
        for name in names[i::n]:
            start, stop = header[name]["data_offsets"]
            part[name] = header[name] | {"data_offsets": [offset, offset + stop - start]}
            blocks.append(data[start:stop])
            offset += stop - start
            index[name] = file
        rewrite(folder / file, part, b"".join(blocks))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_several_files(folder):
    before = read_trained(folder).parameters
    split(folder)
    after = read_trained(folder).parameters
    assert all((after[name] == array).all() for name, array in before.items())


def test_a_missing_file_is_named(folder):
    split(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadFileError, match=r"model-00002-of-00003\.safetensors: is missing: .* 3 files"):
        read_trained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "a\0.safetensors",
        "model.bin",
        7,
    ],
)
def test_an_index_leads_nowhere_else(folder, name):
    index = split(folder)
    (folder.parent / "model.safetensors").write_bytes(b"secret")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index | {"model.norm.weight": name}})
    )
    with pytest.raises(BadFileError, match=r"expected the name of a \.safetensors file beside it"):
        read_trained(folder)


def test_an_index_that_contradicts_its_files(folder):
    index = split(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index | {"model.extra.weight": index["model.norm.weight"]}}))
    with pytest.raises(BadFileError, match=r"has no tensor 'model\.extra\.weight', which"):
        read_trained(folder)
    path.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(BadFileError, match="has no weight_map"):
        read_trained(folder)
    first = "model-00001-of-00003.safetensors"
    (folder / "model-00002-of-00003.safetensors").write_bytes((folder / first).read_bytes())
    path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BadFileError, match="which another file of the model has already"):
        read_trained(folder)


CHANGED = {
    "a tensor is missing": (lambda h: h.pop("model.norm.weight"), BadFileError, "not a whole|has no tensor model"),
    "a tensor more": (
        lambda h: h.update({"model.layers.0.mlp.experts.weight": h.pop("model.norm.weight")}), BadFileError,
        "has no tensor model.norm.weight",
    ),
    "another shape": (
        lambda h: h["model.norm.weight"].update(shape=[16, 2]), BadFileError, r"has shape \(16, 2\), expected \(32,\)",
    ),
    "another type": (
        lambda h: h["model.norm.weight"].update(dtype="I32"), UnsupportedModelError, "is of the type 'I32'; weights of F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_tensors_that_do_not_fit_the_config(folder, name):
    change, kind, message = CHANGED[name]
    read_trained(folder)
    header, data = header_of(folder / "model.safetensors")
    change(header)
    rewrite(folder / "model.safetensors", header, data)
    with pytest.raises(kind, match=message):
        read_trained(folder)


def test_tensors_without_a_place_are_named(folder):
    header, data = header_of(folder / "model.safetensors")
    more = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    rewrite(
        folder / "model.safetensors", header | {"model.layers.0.self_attn.rotary_emb.inv_freq": more}, data + b"\0" * 4
    )
    read_trained(folder)  # old files have this table, which is made anew
    rewrite(folder / "model.safetensors", header | {"model.layers.0.self_attn.sinks": more}, data + b"\0" * 4)
    with pytest.raises(UnsupportedModelError, match=r"no place for: 'model\.layers\.0\.self_attn\.sinks'"):
        read_trained(folder)


def test_a_second_embedding(folder):
    """lm_head beside a tied embedding: the same bytes are harmless, others would be left out."""
    header, data = header_of(folder / "model.safetensors")
    embedding = header["model.embed_tokens.weight"]
    start, stop = embedding["data_offsets"]
    head = embedding | {"data_offsets": [len(data), len(data) + stop - start]}
    rewrite(folder / "model.safetensors", header | {"lm_head.weight": head}, data + data[start:stop])
    read_trained(folder)
    rewrite(folder / "model.safetensors", header | {"lm_head.weight": head}, data + data[start : stop - 1] + b"\1")
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight other than its embedding"):
        read_trained(folder)


def test_numbers_that_are_not_finite(folder):
    header, data = header_of(folder / "model.safetensors")
    rewrite(folder / "model.safetensors", header, b"\xff" * 4 + data[4:])
    with pytest.raises(BadFileError, match="not finite"):
        read_trained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "a model of the type 'mamba'; this library has llama, mistral"),
        ({"model_type": 3}, "has no model_type"),
        ({"hidden_size": 0}, "has hidden_size = 0, expected a whole number above 0"),
        ({"hidden_size": "32"}, "has hidden_size = '32'"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": 2**40}, "has hidden_size = 1099511627776"),
        ({"hidden_size": True}, "has hidden_size = True"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "make no model .*n_heads must divide"),
        ({"num_key_value_heads": 3}, "n_kv_heads must divide n_heads"),
        ({"num_hidden_layers": 10**9}, "n_layers must be at most 10,000"),
        ({"num_hidden_layers": 9000}, "has no tensor model.layers.2."),
        ({"rms_norm_eps": -1}, "has rms_norm_eps = -1, expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps = nan"),
        ({"tie_word_embeddings": "no"}, "has tie_word_embeddings = 'no', expected true or false"),
        ({"rope_scaling": [1]}, r"has rope_scaling = \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}}, "has beta_fast = 16, this library's yarn has 32"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "has truncate = False"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "has rope_type = 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has quantization_config = .*take the original model"),
        ({"architectures": ["LlamaForTokenClassification"]}, "has architectures"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(folder, changes, message):
    read_trained(folder)
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_trained(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"]
)
def test_configs_that_are_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BadFileError, match=r"config\.json: (is not|has)"):
        read_trained(folder)


def test_keys_that_transformers_does_not_read_mean_nothing(folder):
    change_json(
        folder / "config.json", is_llama_config=True, rope_interleaved=False, unsloth_version="2026", attn_dropout=0.5
    )
    assert read_trained(folder).config == CONFIG


PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_not_opened(folder, toy_command, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(
        UnsupportedModelError, match=f"in a pickle .{name}., which can run any program .*save_pretrained"
    ):
        read_trained(folder)
    for command in (["generate", folder / name], ["train", "lora", "--model", folder / name], ["describe", folder]):
        code, _, error = toy_command(*command)
        assert code == 2 and "pickle" in error and error.count("\n") == 1, error


def test_folders_that_are_none(tmp_path, folder, adapter):
    assert is_model_folder(folder) and not is_model_folder(tmp_path) and not is_model_folder(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadFileError, match="the weights are missing"):
        read_trained(folder)
    with pytest.raises(UnsupportedModelError, match="is an adapter of PEFT"):
        read_trained(adapter)


def test_a_folder_in_the_hub_s_cache(tmp_path, folder, adapter, toy_command, monkeypatch):
    """It is listed with what it is, by its config alone, and its name works wherever a model is named."""
    for name in ("TOY_CACHE", "HF_HOME", "OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path / "nothing"))
    hub = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    for repository, source in (
        ("anna/good", folder),
        ("anna/other", folder),
        ("anna/pickled", folder),
        ("anna/lora", adapter),
    ):
        place = hub / f"models--{repository.replace('/', '--')}"
        shutil.copytree(source, place / "snapshots" / ("a" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
    change_json(hub / "models--anna--other" / "snapshots" / ("a" * 40) / "config.json", model_type="bert")
    pickled = hub / "models--anna--pickled" / "snapshots" / ("a" * 40)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    code, out, _ = toy_command("list", "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0 and rows.keys() == {"anna/good", "anna/other", "anna/pickled", "anna/lora"}
    assert (
        rows["anna/good"]["usable"]
        and rows["anna/good"]["architecture"] == "llama"
        and rows["anna/good"]["type"] == "F32"
    )
    assert "of the type 'bert'" in rows["anna/other"]["problem"] and "pickle" in rows["anna/pickled"]["problem"]
    assert rows["anna/lora"]["kind"] == "adapter"
    monkeypatch.chdir(tmp_path)
    code, out, error = toy_command("generate", "anna/good", "--tokens", 2)
    assert code == 0, error


# -- the tokenizer beside it -------------------------------------------------------------------------------------------


def test_rows_beyond_the_last_token(tmp_path):
    import dataclasses

    config = dataclasses.replace(CONFIG, vocab_size=TOKENIZER.vocab_size + 5)
    write_folder(tmp_path / "model", config=config)
    stored = read_trained(tmp_path / "model")
    assert stored.tokenizer.vocab_size == config.vocab_size and stored.tokenizer.tokens[-1].startswith("[PAD")
    short = dataclasses.replace(CONFIG, vocab_size=TOKENIZER.vocab_size - 1)
    write_folder(tmp_path / "short", config=short)
    with pytest.raises(BadFileError, match=f"has {TOKENIZER.vocab_size} tokens, and the model's embedding"):
        read_trained(tmp_path / "short")


def test_control_characters_that_a_vocabulary_lacks(folder):
    """SmolLM2's has no token for some; a letter is another matter."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for byte, message in ((4, None), (ord("q"), "has no token for 2 of the 256 bytes")):
        character = CHARACTER_OF_BYTE[byte]
        data["model"]["vocab"][f"a token in its place {byte}"] = data["model"]["vocab"].pop(character)
        path.write_text(json.dumps(data))
        if message is None:
            tokenizer = read_trained(folder).tokenizer
            assert "no token for the bytes 04" in " ".join(tokenizer.notices)
            assert tokenizer.encode("a\4b").tolist() == tokenizer.encode("ab").tolist()
        else:
            with pytest.raises(BadFileError, match=message):
                read_trained(folder)


def test_what_ends_an_answer(folder):
    ids = [TOKENIZER.eos_id, 7, 9]
    change_json(folder / "generation_config.json", eos_token_id=ids)
    assert read_trained(folder).tokenizer.stop_ids >= {*ids}
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", eos_token_id=11)
    assert 11 in read_trained(folder).tokenizer.stop_ids


def test_without_a_tokenizer(tmp_path, toy_command):
    write_folder(tmp_path / "model", tokenizer=None)
    assert read_trained(tmp_path / "model").tokenizer is None
    code, _, error = toy_command("generate", tmp_path / "model")
    assert code == 2 and "has no tokenizer" in error
    code, _, error = toy_command("train", "lora", "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert code == 2 and "tokenizer.json" in error


# -- PEFT --------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_our_own(folder, adapter):
    read = open_adapter(adapter, CONFIG)
    assert read.rank == model_files.RANK and read.alpha == model_files.ALPHA
    arrays = model_files.adapters()
    assert read.parameters.keys() == arrays.keys()
    assert all((read.parameters[name] == array).all() for name, array in arrays.items())
    assert read_trained(folder, adapter).adapters.keys() == arrays.keys()
    assert read_trained(folder, adapter / "adapter_model.safetensors").adapters.keys() == arrays.keys()


SETTINGS = {
    "peft_type": ("LOHA", "of the kind 'LOHA'; LORA alone"),
    "use_dora": (True, "has use_dora = True"),
    "bias": ("lora_only", "has bias = 'lora_only'"),
    "modules_to_save": (["lm_head"], r"has modules_to_save = \['lm_head'\]"),
    "init_lora_weights": ("olora", "has init_lora_weights = 'olora'"),
    "use_qalora": (True, "has use_qalora"),
    "a_switch_of_a_later_version": (True, "has a_switch_of_a_later_version = True"),
    "alora_invocation_tokens": ([1], "has alora_invocation_tokens"),
    "trainable_token_indices": ([1], "has trainable_token_indices"),
    "r": (5, "says rank 5 for model.layers.0"),
    "lora_alpha": (0, "has lora_alpha = 0 for"),
    "use_rslora": ("yes", "has use_rslora = 'yes'"),
    "rank_pattern": ({"q_proj": 5}, "says rank 5"),
    "alpha_pattern": ({"q_proj": "x"}, "has lora_alpha = 'x' for model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_done_here_are_named(adapter, name):
    value, message = SETTINGS[name]
    read_peft(adapter, CONFIG)
    change_json(adapter / "adapter_config.json", **{name: value})
    with pytest.raises(ValueError, match=message):
        read_peft(adapter, CONFIG)


def test_settings_that_change_nothing(adapter):
    change_json(
        adapter / "adapter_config.json", lora_dropout=0.1, layers_to_transform=[0, 1], megatron_core="megatron.core",
        use_dora=False, loftq_config={}, init_lora_weights="gaussian", task_type=None, new_and_off=None, fan_in_fan_out=True,
    )  # fmt: skip
    assert read_peft(adapter, CONFIG).alpha == model_files.ALPHA


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*", "((a*)*)*", ".*.*.*.*x", "a{1,9}", "a" * 300, "(?=a)", "(", "(?P<x>a)", r"\1", "a**"],
)
def test_patterns_that_would_take_for_ever(adapter, pattern):
    change_json(adapter / "adapter_config.json", alpha_pattern={pattern: 3})
    with pytest.raises(ValueError, match="pattern"):
        read_peft(adapter, CONFIG)


def test_patterns_as_in_peft(adapter):
    patterns = {
        r".*\.1\.self_attn\.q_proj": 12,
        "layers.0.self_attn.(q|v)_proj": 3,
        "proj": 99,
        "^model.layers.1.mlp.down_proj": 24,
    }
    change_json(adapter / "adapter_config.json", alpha_pattern=patterns)
    read, arrays = read_peft(adapter, CONFIG), model_files.adapters()
    assert read.alpha is None  # the scales are in B
    wanted = {"blk.1.attn_q": 3, "blk.0.attn_q": 0.75, "blk.0.attn_v": 0.75, "blk.1.ffn_down": 6, "blk.0.ffn_down": 1.5}
    for stem, scale in wanted.items():
        assert np.allclose(read.parameters[f"{stem}.lora_b"], scale * arrays[f"{stem}.lora_b"]), stem


def test_adapters_that_are_damaged_or_missing(adapter):
    weights = adapter / "adapter_model.safetensors"
    header, data = header_of(weights)
    name = next(name for name in header if name.endswith("lora_B.weight"))
    for new, message in (
        ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapter on an embedding"),
        ("base_model.model.lm_head.modules_to_save.weight", "cannot do modules_to_save"),
        (name.replace("lora_B.weight", "lora_magnitude_vector"), "use_dora"),
        (name.replace("lora_B.weight", "lora_B.bias"), "bias"),
        (name.replace("layers.0", "layers.7"), "adapter for another base: the model has no matrix"),
        (name.replace("lora_B", "lora_C"), "no part of a LoRA adapter"),
    ):
        rewrite(weights, {new if key == name else key: entry for key, entry in header.items()}, data)
        with pytest.raises(ValueError, match=message):
            read_peft(adapter, CONFIG)
    rewrite(weights, header, b"\xff" * 4 + data[4:])
    with pytest.raises(BadFileError, match="not finite"):
        read_peft(adapter, CONFIG)
    wide = toy.LlamaConfig(**{**CONFIG.__dict__, "d_model": 64, "head_dim": None})
    rewrite(weights, header, data)
    with pytest.raises(ValueError, match="is an adapter for another base"):
        read_peft(adapter, wide)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="is a pickle"):
        read_peft(adapter, CONFIG)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(BadFileError, match=r"adapter_model\.safetensors: is missing"):
        read_peft(adapter, CONFIG)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BadFileError, match=r"has no adapter_config\.json"):
        open_adapter(adapter, CONFIG)


# -- folders that are written ------------------------------------------------------------------------------------------


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path):
    with replacing_folder(tmp_path / "out", ("a", "b")) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "out", ("a", "b")) as folder:
        (folder / "b").write_text("second")
        raise RuntimeError
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["a"]
    with replacing_folder(tmp_path / "out", ("a", "b")) as folder:
        (folder / "b").write_text("second")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", [1, 2])
def test_an_interruption_between_the_two_renames(tmp_path, monkeypatch, place):
    """Ctrl-C at the worst moments: the old folder is there again, or the new one is."""
    with replacing_folder(tmp_path / "out", ("a",)) as folder:
        (folder / "a").write_text("first")
    rename, calls = os.rename, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == place:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "out", ("a",)) as folder:
        (folder / "a").write_text("second")
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_is_left(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    check_replaceable(out, ("a",))
    (out / "a").write_text("")
    check_replaceable(out, ("a",))
    (out / "diary.txt").write_text("mine")
    for path in (out, out / "diary.txt"):
        with pytest.raises(ValueError, match="choose another --out"):
            check_replaceable(path, ("a",))
    with pytest.raises(ValueError, match=r"diary\.txt"), replacing_folder(out, ("a",)):
        pass
    assert (out / "diary.txt").read_text() == "mine"


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_run(folder, tmp_path, toy_command):
    """A LoRA run of two steps on the folder."""
    (tmp_path / "text.txt").write_text("hello hello world\n" * 60)
    code, _, error = toy_command(
        "train", "lora", "--model", folder, "--corpus", tmp_path / "text.txt", "--steps", 2, "--context", 8, "--rank", 2,
        "--targets", "q,v", "--lr", 0.1, "--out", tmp_path / "run", "--sample-every", 0,
    )  # fmt: skip
    assert code == 0, error
    return tmp_path / "run"


def test_a_run_from_a_folder_to_every_form(tmp_path, folder, lora_run, toy_command):
    want = toy.load(lora_run).logits([5, 6, 7])
    for form, name in (("hf", "merged"), ("peft", "adapter")):
        code, out, error = toy_command("export", lora_run, "--format", form, "--out", tmp_path / name, "--json")
        assert code == 0, error
        assert json.loads(out)["path"] == str(tmp_path / name)
    assert sorted(entry.name for entry in (tmp_path / "adapter").iterdir()) == sorted(PEFT_FILES)
    assert {entry.name for entry in (tmp_path / "merged").iterdir()} <= {*FILES}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )
    with toy.load(tmp_path / "merged") as merged, toy.load(folder, adapter=tmp_path / "adapter") as beside:
        assert np.abs(merged.logits([5, 6, 7]) - want).max() < 1e-5
        assert (beside.logits([5, 6, 7]) == want).all()
    code, out, error = toy_command("export", lora_run, "--out", tmp_path / "adapter.gguf")
    assert code == 0 and f"export {folder} --type keep --out model.gguf && llama-cli -m model.gguf --lora" in out
    code, _, error = toy_command("generate", folder, "--adapter", tmp_path / "adapter", "--tokens", 3)
    assert code == 0, error
    code, _, error = toy_command("export", folder, "--lora", tmp_path / "adapter", "--out", tmp_path / "merged.gguf")
    assert code == 0, error
    assert np.abs(toy.load(tmp_path / "merged.gguf").logits([5, 6, 7]) - want).max() < 1e-5


def test_nothing_is_overwritten(tmp_path, folder, toy_command):
    out = tmp_path / "out"
    assert toy_command("export", folder, "--format", "hf", "--out", out)[0] == 0
    code, _, error = toy_command("export", folder, "--format", "hf", "--out", out)
    assert code == 2 and "--force" in error
    assert toy_command("export", folder, "--format", "hf", "--out", out, "--force")[0] == 0
    (out / "notes.txt").write_text("mine")
    code, _, error = toy_command("export", folder, "--format", "hf", "--out", out, "--force")
    assert code == 2 and "notes.txt" in error and (out / "notes.txt").exists()
    code, _, error = toy_command("export", folder, "--format", "hf", "--out", folder, "--force")  # of its own files
    assert code == 0, error
    assert read_trained(folder).config == CONFIG


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "peft"], "has no adapter of its own: leave out --format peft"),
        (["--format", "hf", "--type", "q4_0"], "--type 'q4_0' is not one of f32, f16, bf16, keep"),
        (["--format", "hf", "--adapter"], "by --format peft"),
        (["--format", "peft", "--type", "f16"], "leave out --merge and --type"),
        (["--format", "hf", "--out", "x.gguf"], "is a folder"),
        (["--ollama", "x", "--format", "hf"], "leave out --format hf"),
        (["--ollama", "x", "--out", "y"], "leave out --out y"),
        (["--format", "hf", "--out", "no/such/place"], "is not a directory"),
    ],
)
def test_what_does_not_go_together(folder, toy_command, monkeypatch, options, message):
    monkeypatch.chdir(folder.parent)
    code, _, error = toy_command("export", folder, *options)
    assert code == 2 and message in error, error


def test_the_other_recipes_begin_with_a_folder(tmp_path, folder, toy_command):
    (tmp_path / "text.txt").write_text("hello hello world\n" * 60)
    for recipe in ("full-finetune", "warm-start"):
        code, _, error = toy_command(
            "train", recipe, "--model", folder, "--corpus", tmp_path / "text.txt", "--steps", 2, "--context", 8, "--batch", 1,
            "--out", tmp_path / recipe, "--sample-every", 0,
        )  # fmt: skip
        assert code == 0, error
        run = tmp_path / recipe
        assert toy_command("train", recipe, "--resume", run, "--steps", 3)[0] == 0
        assert np.isfinite(toy.load(run).logits([1, 2])).all()
    code, out, _ = toy_command(
        "eval", folder, "--corpus", tmp_path / "text.txt", "--context", 8, "--limit", 30, "--json"
    )
    assert code == 0 and json.loads(out)["loss"] > 0


def test_half_precision_out_of_range(tmp_path):
    arrays = parameters()
    arrays["blk.0.attn_v.weight"][0, 0] = 1e5
    write_model_folder(tmp_path / "bf16", CONFIG, arrays, "BF16", {}, {})
    with pytest.raises(ValueError, match="beyond the range of F16"):
        write_model_folder(tmp_path / "f16", CONFIG, arrays, "F16", {}, {})
    assert not (tmp_path / "f16").exists()


# -- Ollama ------------------------------------------------------------------------------------------------------------


class GoTemplate:
    """As much of Go's text/template as a Modelfile here has: range over .Messages, if, else if, end, and, eq, ne, strings."""

    def __init__(self, text):
        text = re.sub(r"\s*\{\{- ", "{{ ", text)
        text = re.sub(r" -\}\}\s*", " }}", text)
        self.parts = re.split(r"\{\{ (.*?) \}\}", text)

    def render(self, messages):
        out, place = self._run(0, messages, None, 0, True)
        assert place == len(self.parts)
        return out

    def _run(self, place, messages, message, i, active):
        """-> text, the place behind the end of this block."""
        out = ""
        while place < len(self.parts):
            part, is_action = self.parts[place], place % 2
            if not is_action:
                assert part == "" or not part.isspace(), "white space that was not trimmed"
                out += part if active else ""
                place += 1
                continue
            if part == "end" or part.startswith("else"):
                return out, place
            place += 1
            if part.startswith("range"):
                assert part == "range $i, $_ := .Messages"
                start = place
                for i, message in enumerate(messages):
                    inner, place = self._run(start, messages, message, i, active)
                    out += inner
                place += 1
            elif part.startswith("if "):
                done = False
                condition = part.removeprefix("if ")
                while True:
                    holds = not done and self._value(condition, messages, message, i)
                    done = done or holds
                    inner, place = self._run(place, messages, message, i, active and holds)
                    out += inner
                    word = self.parts[place]
                    place += 1
                    if word == "end":
                        break
                    condition = word.removeprefix("else if ")
            elif part.startswith("$last := "):
                assert part == "$last := eq (len (slice $.Messages $i)) 1"
            else:
                out += self._value(part, messages, message, i) if active else ""
        return out, place

    def _value(self, text, messages, message, i):
        if text.startswith('"'):
            return json.loads(text)
        last = len(messages[i:]) == 1
        names = {".Content": message["content"], ".Role": message["role"], "$last": last, "$i": i} if message else {}
        if text in names:
            return names[text]
        if found := re.fullmatch(r"(eq|ne) (\S+) (\S+)", text):
            one, other = (names[word] if word in names else json.loads(word) for word in found.groups()[1:])
            return (one == other) == (found[1] == "eq")
        if found := re.fullmatch(r"and (\(.+?\)|\S+) \((.+)\)", text):
            return all(self._value(word.strip("()"), messages, message, i) for word in found.groups())
        raise AssertionError(text)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content }}"
    "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe \"kind\".<|im_end|>\\n' }}{% endif %}" + CHAT
)
ENDS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ '[' + m.role + ']' + m.content + '[/]' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [CHAT, LLAMA3, DEFAULT, ENDS])
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_a_template_of_ollama_gives_the_same_text(source, begin):
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    turns = turns_of(template, begin)
    go = GoTemplate(turns.go())
    for roles in (
        "user",
        "system user",
        "user assistant user",
        "system user assistant user assistant",
        "user assistant",
    ):
        messages = [{"role": role, "content": f'{role} {n}: "a"\n\u65e5'} for n, role in enumerate(roles.split())]
        text = template.render(messages, add_generation_prompt=messages[-1]["role"] != "assistant")
        assert go.render(messages) == turns.render(messages) == text.removeprefix(begin), roles


@pytest.mark.parametrize(
    "source",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT,
        CHAT.replace("message['content']", "message['content'] | upper"),
        CHAT.replace("{% for", "{{ messages | length }}{% for"),
        "{{ strftime_now('%d %b %Y') }}" + CHAT,
        "{% for message in messages[-1:] %}{{ message.content }}{% endfor %}",
    ],
)
def test_other_templates_are_left_out(source):
    assert turns_of(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})) is None


def test_quotes_do_not_end_the_template_of_a_modelfile():
    around = ('"""\n', '\\"')
    turns = Turns('"""', '"', dict.fromkeys(("system", "user", "assistant"), around), '"""')
    messages = [{"role": "user", "content": "x"}]
    assert '"""' not in turns.go() and GoTemplate(turns.go()).render(messages) == turns.render(messages)


@pytest.mark.parametrize("options", [[], ["--merge"], ["--type", "q8_0"]])
def test_a_folder_for_ollama(tmp_path, lora_run, toy_command, options):
    pytest.importorskip("gguf")
    want = toy.load(lora_run).logits([5, 6, 7])
    code, _, error = toy_command("export", lora_run, "--ollama", tmp_path / "out", *options)
    assert code == 0, error
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert said.startswith("FROM ./model.gguf\n") and 'PARAMETER stop "<|im_end|>"\n' in said
    beside = "--merge" not in options
    assert ("ADAPTER ./adapter.gguf\n" in said) == (tmp_path / "out" / "adapter.gguf").exists() == beside
    adapter = tmp_path / "out" / "adapter.gguf" if beside else None
    got = toy.load(tmp_path / "out" / "model.gguf", adapter=adapter).logits([5, 6, 7])
    assert np.abs(got - want).max() < (0.1 if "q8_0" in options else 1e-5)
    messages = [{"role": "user", "content": "hello"}]
    template = re.search('TEMPLATE """(.*?)"""', said, re.DOTALL)[1]
    assert GoTemplate(template).render(messages) == TOKENIZER.apply_chat_template(messages)
    with GGUF.open(tmp_path / "out" / "model.gguf") as gguf:
        assert gguf.metadata["tokenizer.chat_template"] == CHAT


def test_ollama_and_a_file(tmp_path, toy_command):
    """A GGUF file is copied as it is; a template that is left out is told."""
    pytest.importorskip("gguf")
    odd = bpe_metadata(**{"tokenizer.chat_template": "{{ messages | length }}"})
    model_files.write_model(tmp_path / "model.gguf", tokenizer=GGUFTokenizer(odd))
    code, _, error = toy_command("export", tmp_path / "model.gguf", "--ollama", tmp_path / "out")
    assert code == 0 and "its chat template has no form as a template of Ollama" in error
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()
    model_files.write_model(tmp_path / "plain.gguf", tokenizer=CharTokenizer("".join(map(chr, range(V)))))
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(read_trained(tmp_path / "plain.gguf"))[0]
