"""GGUF files: what is written is read back, other writers' files are read alike, and damaged or lying files are refused."""

import ctypes
import dataclasses
import importlib.util
import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from work import Counted

import toy
from toy.data.open_tokenizer import load_tokenizer
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.files import gguf_models
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF, MAX_KEYS, MAX_STRING, MAX_STRINGS, MAX_TENSORS, SCALARS
from toy.files.gguf_models import UnsupportedModelError
from toy.files.gguf_write import fingerprint, read_adapter, write_adapter, write_gguf
from toy.models import ARCHITECTURES, ParameterTree, model_for
from toy.quantized import TYPES
from toy.trained import read_trained
from toy.trained.export import export_adapter, export_model

ROOT = Path(__file__).parent.parent
needs_gguf_package = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed (pip install gguf)"
)
Q8_0 = pytest.param("q8_0", marks=needs_gguf_package)
CONFIGS = {
    "gpt2": toy.GPT2Config(vocab_size=11, d_model=32, n_heads=4, d_ff=64, n_layers=2, context_length=8),
    "llama": toy.LlamaConfig(11, 32, 4, 2, 64, 2, 8),
    "llama-options": toy.LlamaConfig(
        11, 32, 4, 2, 64, 2, 8, rope_base=5e5, rms_eps=1e-6, head_dim=6, untied=True, qkv_bias=True
    ),
}
CHARACTERS = CharTokenizer("\n abcdefgh~")  # 11


def random_parameters(config, seed=0):
    generator = np.random.default_rng(seed)
    shapes = model_for(config).parameter_shapes(config)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def model_file(tmp_path, config):
    """A path, and the parameters that were written there."""
    parameters = random_parameters(config)
    write_gguf(tmp_path / "model.gguf", config, parameters, CHARACTERS)
    return tmp_path / "model.gguf", parameters


# -- a file by hand, so that it can say anything -----------------------------------------------------------------------


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, payload):
    return string(name) + struct.pack("<I", kind) + payload


ARCHITECTURE = key("general.architecture", 8, string("llama"))


def described(name, sizes, code, offset):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, code, offset)


def by_hand(keys=(ARCHITECTURE,), tensors=(), data=b"", n_keys=None, n_tensors=None, version=3, magic=b"GGUF"):
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    header = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


# -- round trips -------------------------------------------------------------------------------------------------------


def test_f32_comes_back_bit_by_bit(model_file, config):
    path, parameters = model_file
    with GGUF.open(path) as gguf:
        assert gguf.config() == config
        read = gguf.parameters()
        assert load_tokenizer(gguf).to_json() == CHARACTERS.to_json()
        assert gguf.architecture == model_for(config).arch
        assert gguf.n_parameters == sum(a.size for a in parameters.values())
        tree = ParameterTree.zeros(model_for(config).parameter_shapes(config))
        gguf.parameters(out=tree)
    assert list(read) == list(parameters)
    for name, array in parameters.items():
        assert np.array_equal(read[name], array) and np.array_equal(tree[name], array), name


@pytest.mark.parametrize("kind", ["f16", Q8_0])
def test_smaller_types_are_rounded_and_vectors_are_not(tmp_path, config, kind):
    bound = {"f16": 2**-11, "q8_0": 1 / 254 + 2**-11}[kind]  # q8_0: half a step, and its float16 scale
    parameters = random_parameters(config)
    write_gguf(tmp_path / "model.gguf", config, parameters, CHARACTERS, type=kind)
    with GGUF.open(tmp_path / "model.gguf") as gguf:
        read = gguf.parameters()
        for name, array in parameters.items():
            if array.ndim == 1 or name == "position_embd.weight":
                assert gguf.tensors[name].type == "F32" and np.array_equal(read[name], array), name
            else:
                whole_blocks = array.shape[1] % 32 == 0
                assert gguf.tensors[name].type == (kind.upper() if whole_blocks else "F16"), name
                assert np.abs(read[name] - array).max() <= bound * np.abs(array).max(), name


def test_metadata_of_every_type(tmp_path):
    given_ = {
        "general.name": "näme",
        "toy.truth": True,
        "toy.count": 2**32 - 1,
        "toy.negative": -(2**40),
        "toy.fraction": 0.5,
        "toy.words": ["", "a", "語"],
        "toy.numbers": np.array([1, -2, 3], np.int16),
        "toy.truths": np.array([True, False]),
        "toy.fractions": [0.25, 1e300],
    }
    write_gguf(tmp_path / "m.gguf", CONFIGS["llama"], random_parameters(CONFIGS["llama"]), metadata=given_)
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        for name, value in given_.items():
            read = gguf.metadata[name]
            if isinstance(value, np.ndarray):
                assert read.dtype == value.dtype and np.array_equal(read, value)
            elif name == "toy.fractions":
                assert read.tolist() == value
            else:
                assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "name", ["llama.block_count", "tokenizer.ggml.model", "general.architecture", "general.alignment"]
)
def test_metadata_that_the_model_decides_cannot_be_chosen(tmp_path, name):
    config = CONFIGS["llama"]
    with pytest.raises(ValueError, match="cannot be chosen"):
        write_gguf(tmp_path / "m.gguf", config, random_parameters(config), metadata={name: "x"})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path):
    config, path = CONFIGS["llama"], tmp_path / "m.gguf"
    parameters = random_parameters(config)
    transformer = toy.TransformerConfig(11, 32, 4, 64, 2, 8)
    with pytest.raises(ValueError, match="no architecture for a TransformerConfig"):
        write_gguf(path, transformer, random_parameters(transformer))
    with pytest.raises(ValueError, match="type must be one of f32, f16, bf16, q8_0"):
        write_gguf(path, config, parameters, type="q4_9")
    with pytest.raises(ValueError, match="the tokenizer has 256 ids, the model 11"):
        write_gguf(path, config, parameters, ByteTokenizer())
    with pytest.raises(ValueError, match=r"missing: output_norm\.weight"):
        write_gguf(path, config, {n: a for n, a in parameters.items() if n != "output_norm.weight"})
    with pytest.raises(ValueError, match="beyond the range of F16"):
        write_gguf(path, config, parameters | {"token_embd.weight": np.full((11, 32), 1e5, np.float32)}, type="f16")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_leaves_the_old_file(tmp_path):
    config, path = CONFIGS["llama"], tmp_path / "m.gguf"
    write_gguf(path, config, random_parameters(config))
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_gguf(path, config, random_parameters(config, seed=1), quantizer=_full_disk)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def _full_disk(*_):
    raise OSError(28, "No space left on device")


@needs_gguf_package
def test_the_gguf_package_reads_our_file_and_we_read_its(tmp_path):
    import gguf as gguf_package

    config = CONFIGS["llama-options"]
    parameters = random_parameters(config)
    write_gguf(tmp_path / "ours.gguf", config, parameters, CHARACTERS)
    reader = gguf_package.GGUFReader(tmp_path / "ours.gguf")
    assert {tensor.name: tensor.data.shape for tensor in reader.tensors} == {n: a.shape for n, a in parameters.items()}
    assert all(np.array_equal(tensor.data, parameters[tensor.name]) for tensor in reader.tensors)

    with GGUF.open(tmp_path / "ours.gguf") as ours:
        writer = gguf_package.GGUFWriter(tmp_path / "theirs.gguf", "llama")
        for name, value in ours.metadata.items():
            if isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            elif isinstance(value, str):
                writer.add_string(name, value) if name != "general.architecture" else None
            else:
                writer.add_array(name, value if isinstance(value, list) else value.tolist())
        for name, array in parameters.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with GGUF.open(tmp_path / "theirs.gguf") as theirs:
        assert theirs.config() == config
        assert all(np.array_equal(array, parameters[name]) for name, array in theirs.parameters().items())


# -- parts of a tensor -------------------------------------------------------------------------------------------------


def test_raw_bytes_are_the_mapping_itself(model_file):
    path, parameters = model_file
    gguf = GGUF.open(path)
    raw = gguf.raw("token_embd.weight")
    assert raw.dtype == np.uint8 and raw.shape == (11, 32 * 4) and not raw.flags.writeable
    assert np.shares_memory(raw, gguf.raw("token_embd.weight"))
    record = gguf.tensors["token_embd.weight"]
    assert raw.tobytes() == path.read_bytes()[record.offset : record.offset + record.n_bytes]
    assert np.array_equal(raw.view("<f4"), parameters["token_embd.weight"])
    gguf.close()
    assert raw[0, 0] == path.read_bytes()[record.offset]  # an array that was given out outlives the object
    gguf.close()
    with pytest.raises(ValueError, match="is closed"):
        gguf.raw("token_embd.weight")


@pytest.mark.parametrize("kind", ["f32", "f16", Q8_0])
def test_rows(tmp_path, kind):
    config = CONFIGS["llama"]
    write_gguf(tmp_path / "m.gguf", config, random_parameters(config), type=kind)
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        name = "blk.1.ffn_up.weight"
        whole = gguf.dequantize(name)
        assert np.array_equal(gguf.dequantize(name, slice(3, 9)), whole[3:9])
        assert np.array_equal(gguf.dequantize(name, slice(None)), whole)
        assert np.array_equal(gguf.dequantize(name, [5, 0, 5]), whole[[5, 0, 5]])
        assert gguf.dequantize(name, slice(4, 4)).shape == (0, 32)
        out = np.empty((2, 32), np.float32)
        assert gguf.dequantize(name, np.array([1, 2]), out=out) is out and np.array_equal(out, whole[1:3])
        for rows in (slice(0, 65), slice(-1, 3), slice(0, 4, 2), [64], [-1], [0.5], [[0]]):
            with pytest.raises(ValueError, match=r"rows of blk.1.ffn_up.weight"):
                gguf.dequantize(name, rows)
        for wrong in (np.empty((2, 31), np.float32), np.empty((2, 32)), np.empty((32, 2), np.float32).T):
            with pytest.raises(ValueError, match="out must be"):
                gguf.dequantize(name, [1, 2], out=wrong)
        with pytest.raises(ValueError, match="is a vector"):
            gguf.dequantize("output_norm.weight", slice(0, 1))
        with pytest.raises(ValueError, match="has no tensor 'x'"):
            gguf.dequantize("x")


BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture(scope="module")
def libggml():
    """ggml's own dequantisation, an outside reference."""
    package = pytest.importorskip("libggml", reason="libggml-python is not installed")
    found = sorted(Path(package.__path__[0]).rglob("libggml-base.so*")) or sorted(
        Path(package.__path__[0]).rglob("libggml-base*.dylib")
    )
    if not found:
        pytest.skip("libggml-base is not a file that ctypes can load here")
    return ctypes.CDLL(str(found[0]))


@needs_gguf_package
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_dequantisation_is_ggmls_own(tmp_path, libggml, kind):
    block = TYPES[kind]
    rows, columns = 700, 2 * max(block.block, 256)  # more than one chunk
    data = np.random.default_rng(3).integers(0, 256, (rows, columns // block.block, block.n_bytes), np.uint8)
    scales = data.view()
    half = np.frombuffer(np.array([0.01, -0.25], "<f2").tobytes(), np.uint8)
    last = kind in ("Q3_K", "Q6_K")  # where the float16 scale stands in the block
    middle = 80 if kind == "Q2_K" else None
    n_scales = 4 if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 2
    at = middle if middle is not None else block.n_bytes - 2 if last else 0
    scales[..., at : at + n_scales] = half[:n_scales]
    raw = data.tobytes()
    file = by_hand(tensors=[described("w", [columns, rows], block.code, 0)], data=raw)
    (tmp_path / "q.gguf").write_bytes(file)
    with GGUF.open(tmp_path / "q.gguf") as gguf:
        assert gguf.tensors["w"] == ("w", (rows, columns), kind, len(raw), len(file) - len(raw))
        ours = gguf.dequantize("w")
        some = gguf.dequantize("w", [699, 0])
    theirs = np.empty((rows, columns), np.float32)
    function = getattr(libggml, f"dequantize_row_{kind[0].lower()}{kind[1:]}")
    function.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    function(raw, theirs.ctypes.data, theirs.size)
    assert np.isfinite(theirs).all() and np.unique(theirs).size > 8
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1e-9)
    assert np.array_equal(some, ours[[699, 0]])


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    numbers = np.array([[1.5, -2.0, 3e38, 0.0]], np.float32)
    data = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "b.gguf").write_bytes(by_hand(tensors=[described("w", [4, 1], 30, 0)], data=data))
    with GGUF.open(tmp_path / "b.gguf") as gguf:
        read = gguf.dequantize("w")
    assert np.array_equal(read[:, [0, 1, 3]], numbers[:, [0, 1, 3]]) and abs(read[0, 2] / 3e38 - 1) < 2**-7


@needs_gguf_package
@pytest.mark.parametrize(("code", "n_bytes", "message"), [(26, 16, "whole numbers"), (28, 32, "cannot be dequantised")])
def test_types_without_weights_open_but_are_not_dequantised(tmp_path, code, n_bytes, message):
    file = by_hand(tensors=[described("w", [4], code, 0)], data=bytes(n_bytes))
    (tmp_path / "i.gguf").write_bytes(file)
    with GGUF.open(tmp_path / "i.gguf") as gguf:
        assert gguf.raw("w").size == n_bytes
        with pytest.raises(UnsupportedModelError, match=f"tensor 'w': .*{message}"):
            gguf.dequantize("w")


def test_without_the_gguf_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", CONFIGS["llama"], random_parameters(CONFIGS["llama"]), type="f16")
    file = by_hand(tensors=[described("w", [32], 20, 0)], data=bytes(18))
    (tmp_path / "q.gguf").write_bytes(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        gguf.parameters()  # plain types need nothing
    with GGUF.open(tmp_path / "q.gguf") as gguf, pytest.raises(RuntimeError, match="pip install gguf"):
        gguf.dequantize("w")


# -- models that are not ours ------------------------------------------------------------------------------------------


def rewritten(path, change):
    """The model file at `path` with its metadata changed: `change` takes and gives a dict."""
    from toy.files import gguf_write

    with GGUF.open(path) as gguf:
        entries = change(dict(gguf.metadata))
        tensors = [(name, gguf.dequantize(name), "F32") for name in gguf.tensors]
    gguf_write._write(path, entries, tensors)
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"general.architecture": "falcon"},
            UnsupportedModelError,
            "architecture 'falcon'; this library has llama and gpt2",
        ),
        ({"general.architecture": "qwen3moe"}, UnsupportedModelError, "mixture of experts"),
        ({"general.type": "adapter"}, UnsupportedModelError, "general.type is 'adapter'"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModelError, "rope.scaling.type = 'longrope'"),
        ({"llama.rope.scaling.factor": -4.0}, BadFileError, "rope.scaling.factor = -4.0"),
        ({"llama.rope.scaling.factor": "4"}, BadFileError, "rope.scaling.factor = '4'"),
        ({"llama.rope.scaling.attn_factor": float("inf")}, BadFileError, "attn_factor = inf"),
        ({"llama.expert_count": 8}, UnsupportedModelError, r"mixture of experts \(llama.expert_count = 8\)"),
        (
            {"llama.nextn_predict_layers": 1},
            UnsupportedModelError,
            "nextn_predict_layers = 1, which this library's Llama",
        ),
        ({"llama.rope.dimension_count": 4}, UnsupportedModelError, "rope.dimension_count = 4 and heads of 8"),
        ({"llama.block_count": None}, BadFileError, "no metadata key llama.block_count"),
        ({"llama.block_count": 2**31}, BadFileError, "llama.block_count = 2147483648"),
        ({"llama.block_count": 2**30}, BadFileError, "claims 1073741824 layers"),
        ({"llama.block_count": 3}, BadFileError, "has no tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, UnsupportedModelError, "has no place for: 'blk.1.attn_norm.weight'"),
        ({"llama.embedding_length": "32"}, BadFileError, "embedding_length = '32'"),
        ({"llama.feed_forward_length": 96}, BadFileError, "ffn_gate.weight has shape"),
        ({"llama.attention.head_count": 5}, BadFileError, "5 heads do not divide"),
        ({"llama.attention.head_count_kv": 3}, BadFileError, "n_kv_heads must divide"),
        ({"llama.attention.head_count_kv": [2, 1]}, UnsupportedModelError, "different values"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, BadFileError, "epsilon = nan"),
        ({"llama.vocab_size": 12}, BadFileError, "claims 12 tokens"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, BadFileError, "has 2 tokens and an embedding of 11"),
    ],
)
def test_what_config_refuses(tmp_path, change, error, message):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIGS["llama"], random_parameters(CONFIGS["llama"]), CHARACTERS)

    def changed(entries):
        return {name: value for name, value in (entries | change).items() if value is not None}

    with GGUF.open(rewritten(path, changed)) as gguf, pytest.raises(error, match=message) as caught:
        gguf.config()
    assert type(caught.value) is error


def test_optional_keys_have_llama_cpps_defaults(tmp_path):
    path, config = tmp_path / "m.gguf", CONFIGS["llama"]
    write_gguf(path, config, random_parameters(config))
    optional = ("attention.head_count_kv", "rope.dimension_count", "rope.freq_base", "vocab_size")

    def changed(entries):
        entries["llama.attention.head_count_kv"] = [2, 2]  # one a layer
        return {name: value for name, value in entries.items() if name.removeprefix("llama.") not in optional[1:]}

    with GGUF.open(rewritten(path, changed)) as gguf:
        assert gguf.config() == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpt2.attention.layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06; this library's GPT2 has 1e-05"),
        ({"gpt2.attention.head_count_kv": 2}, "head_count_kv = 2 and attention.head_count = 4: they must be the same"),
    ],
)
def test_what_config_refuses_of_gpt2(tmp_path, change, message):
    config, path = CONFIGS["gpt2"], tmp_path / "m.gguf"
    write_gguf(path, config, random_parameters(config))
    with GGUF.open(rewritten(path, lambda entries: entries | {"gpt2.attention.head_count_kv": 4})) as gguf:
        assert gguf.config() == config
    rewritten(path, lambda entries: entries | change)
    with GGUF.open(path) as gguf, pytest.raises(UnsupportedModelError, match=re.escape(message)):
        gguf.config()


# every key that a file of ours has about its sizes, as the first files had them
WRITTEN = {
    "gpt2": {
        "general.architecture": "gpt2", "gpt2.vocab_size": 11, "gpt2.context_length": 8, "gpt2.embedding_length": 32,
        "gpt2.block_count": 2, "gpt2.feed_forward_length": 64, "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
    },
    "llama": {
        "general.architecture": "llama", "llama.vocab_size": 11, "llama.context_length": 8,
        "llama.embedding_length": 32, "llama.block_count": 2, "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    },
}  # fmt: skip
WRITTEN["llama-options"] = WRITTEN["llama"] | {
    "llama.rope.dimension_count": 6, "llama.attention.key_length": 6, "llama.attention.value_length": 6,
    "llama.rope.freq_base": 5e5, "llama.attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_keys_that_are_written(name):
    assert gguf_models.metadata_of(CONFIGS[name]) == WRITTEN[name]


# -- the forms of GGUF -------------------------------------------------------------------------------------------------


def test_every_field_of_a_config_is_said_by_every_form():
    assert list(gguf_models.FORMS) == [
        "llama",
        "qwen2",
        "qwen3",
        "granite",
        "smollm3",
        "gemma2",
        "gemma3",
        "olmo2",
        "mistral3",
        "gpt2",
    ]
    for name, (row, form) in gguf_models.FORMS.items():
        fields = {field.name for field in dataclasses.fields(row.config)}
        said = {
            "vocab_size",
            *(key.field for key in form.keys),
            *form.tensors,
            *form.vectors,
            *form.derived,
            *form.fixed,
        }
        assert said == fields, name
        keys = [key.key for key in form.keys] + [*form.constants, *form.harmless]
        assert len(keys) == len(set(keys)), name
    for row in ARCHITECTURES.values():  # a model is written under its own name
        assert not row.in_gguf or row.gguf_forms[0].name == row.name


@pytest.fixture
def ministral(tmp_path):
    """The path of a file of architecture mistral3, its config and its parameters."""
    config = CONFIGS["llama-options"]
    parameters = random_parameters(config)
    write_gguf(tmp_path / "ministral.gguf", config, parameters, CHARACTERS)
    return renamed(tmp_path / "ministral.gguf", "mistral3"), config, parameters


def renamed(path, architecture, **more):
    """The llama file at `path` as one of another architecture with the same keys, and more of them."""

    def change(entries):
        entries = {re.sub(r"^llama\.", f"{architecture}.", name): value for name, value in entries.items()}
        return entries | {"general.architecture": architecture} | more

    return rewritten(path, change)


def test_mistral3_is_read_as_the_llama_it_is(ministral, tmp_path):
    path, config, parameters = ministral
    with GGUF.open(path) as gguf:
        assert gguf.architecture == "mistral3" and gguf.config() == config
        assert all(np.array_equal(array, parameters[name]) for name, array in gguf.parameters().items())
        assert gguf.matrix("blk.0.attn_q.weight").shape == (24, 32)
    with toy.load(path, backend="numpy") as loaded:
        assert isinstance(loaded.model, toy.Llama) and len(loaded.generate("abc", 4)) == 4
    export_model(read_trained(path), tmp_path / "again.gguf")
    with GGUF.open(tmp_path / "again.gguf") as gguf:
        assert gguf.architecture == "llama" and gguf.config() == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.scaling.yarn_beta_fast", 8.0), ("rope.scaling.yarn_beta_slow", 0.5), ("nextn_predict_layers", 1)],
)
def test_what_a_llama_cannot_do_is_refused_by_name(ministral, key, value):
    path, *_ = ministral
    rewritten(path, lambda entries: entries | {f"mistral3.{key}": value})
    message = re.escape(f"has mistral3.{key} = {value!r}, which this library's Llama cannot do")
    with GGUF.open(path) as gguf, pytest.raises(UnsupportedModelError, match=message):
        gguf.config()


def test_adapters_carry_the_name_of_their_bases_architecture(ministral, tmp_path):
    """llama.cpp compares it; here both names are the same model."""
    path, config, _ = ministral
    adapters, out = random_adapter(config), tmp_path / "adapter.gguf"
    with GGUF.open(path) as base:
        write_adapter(out, config, adapters, alpha=2.0, base=base)
        adapter = read_adapter(out, config, base)
    assert adapter.architecture == "mistral3"
    stored = read_trained(path, out)
    export_adapter(stored, tmp_path / "again.gguf")
    assert read_adapter(tmp_path / "again.gguf", config).architecture == "mistral3"
    write_adapter(out, config, adapters, alpha=2.0)
    assert read_adapter(out, config).architecture == "llama"
    with pytest.raises(ValueError, match="it is for a llama model, not gpt2"):
        read_adapter(out, CONFIGS["gpt2"])


def test_a_fixed_field_chooses_the_form(monkeypatch):
    """A form that fixes a field reads it so, and writes the configs that have it so; what no form has is not written."""
    row, form = gguf_models.FORMS["llama"]
    forms = (form._replace(fixed={"rms_eps": 1e-5}), form._replace(name="other", fixed={"rms_eps": 1e-6}))
    monkeypatch.setitem(ARCHITECTURES, "llama", row._replace(gguf_forms=forms))
    assert gguf_models.architecture_of(CONFIGS["llama"]) == "llama"
    assert gguf_models.architecture_of(CONFIGS["llama-options"]) == "other"
    with pytest.raises(ValueError, match=r"no architecture for this model: LlamaConfig\(.*rms_eps=0.5"):
        gguf_models.architecture_of(dataclasses.replace(CONFIGS["llama"], rms_eps=0.5))


def test_gpt2_with_a_second_copy_of_the_embedding(tmp_path):
    """Old converters write the tied output matrix once more; another matrix there is not GPT-2."""
    config = CONFIGS["gpt2"]
    parameters = random_parameters(config)
    write_gguf(tmp_path / "m.gguf", config, parameters)
    for output, accepted in ((parameters["token_embd.weight"], True), (parameters["token_embd.weight"] + 1, False)):
        from toy.files import gguf_write

        with GGUF.open(tmp_path / "m.gguf") as gguf:
            tensors = [(name, gguf.dequantize(name), "F32") for name in gguf.tensors]
            gguf_write._write(tmp_path / "two.gguf", dict(gguf.metadata), [*tensors, ("output.weight", output, "F32")])
        with GGUF.open(tmp_path / "two.gguf") as gguf:
            if accepted:
                assert gguf.config() == config and "output.weight" not in gguf.parameters()
            else:
                with pytest.raises(UnsupportedModelError, match=r"no place for: 'output\.weight'"):
                    gguf.config()


def test_numbers_that_are_not_finite(tmp_path, config):
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_parameters(config))
    with GGUF.open(path) as gguf:
        offset = gguf.tensors["output_norm.weight"].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = struct.pack("<f", math.inf)
    path.write_bytes(data)
    with (
        GGUF.open(path) as gguf,
        pytest.raises(BadFileError, match=r"output_norm\.weight' holds numbers that are not finite"),
    ):
        gguf.parameters()


# -- adapters ----------------------------------------------------------------------------------------------------------


def random_adapter(config, rank=3, targets=("attn_q", "ffn_down"), seed=1):
    generator = np.random.default_rng(seed)
    shapes, adapters = model_for(config).parameter_shapes(config), {}
    for layer in range(config.n_layers):
        for target in targets:
            n_out, n_in = shapes[f"blk.{layer}.{target}.weight"]
            adapters[f"blk.{layer}.{target}.lora_a"] = generator.standard_normal((rank, n_in)).astype(np.float32)
            adapters[f"blk.{layer}.{target}.lora_b"] = generator.standard_normal((n_out, rank)).astype(np.float32)
    return adapters


def test_adapter_round_trip(tmp_path):
    config, path = CONFIGS["llama"], tmp_path / "a.gguf"
    parameters, adapters = random_parameters(config), random_adapter(config)
    write_adapter(path, config, adapters, alpha=6.0, base=parameters, metadata={"general.name": "mine"})
    write_gguf(tmp_path / "base.gguf", config, parameters, type="f16")
    with GGUF.open(tmp_path / "base.gguf") as base:
        assert fingerprint(base) == fingerprint(parameters)  # the same in every tensor type
        adapter = read_adapter(path, config, base)
    assert (adapter.architecture, adapter.rank, adapter.alpha) == ("llama", 3, 6.0)
    assert adapter.metadata["general.name"] == "mine"
    assert adapter.parameters.keys() == adapters.keys()
    assert all(np.array_equal(adapter.parameters[name], array) for name, array in adapters.items())
    with GGUF.open(path) as gguf:
        assert gguf.tensors["blk.0.attn_q.weight.lora_a"].shape == (3, 32)
        assert gguf.tensors["blk.0.attn_q.weight.lora_b"].shape == (32, 3)
        with pytest.raises(UnsupportedModelError, match="is not a model"):
            gguf.config()


def test_adapters_that_do_not_fit(tmp_path):
    config, path = CONFIGS["llama"], tmp_path / "a.gguf"
    adapters = random_adapter(config)
    write_adapter(path, config, adapters, alpha=3.0, base=random_parameters(config))
    with pytest.raises(ValueError, match=r"adapter for another base: .* has shape"):
        read_adapter(path, toy.LlamaConfig(11, 64, 4, 2, 64, 2, 8))
    with pytest.raises(ValueError, match=r"adapter for another base: the model has no matrix blk\.1"):
        read_adapter(path, toy.LlamaConfig(11, 32, 4, 2, 64, 1, 8))
    with pytest.raises(ValueError, match="adapter for another base: it is for a llama model, not gpt2"):
        read_adapter(path, CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="adapter for another base: the weights of its model are not these"):
        read_adapter(path, config, random_parameters(config, seed=7))
    write_gguf(tmp_path / "m.gguf", config, random_parameters(config))
    with pytest.raises(ValueError, match="is not a LoRA adapter"):
        read_adapter(tmp_path / "m.gguf", config)

    new = tmp_path / "new.gguf"
    for wrong, message in (
        ({}, "it has no adapters"),
        ({"blk.0.attn_q.lora_a": adapters["blk.0.attn_q.lora_a"]}, "not one of a pair"),
        (adapters | {"blk.0.attn_q.lora_b": np.zeros((32, 4))}, "has shape|different ranks"),
        (adapters | {"blk.0.attn_q.lora_b": np.full((32, 3), np.nan)}, "not finite"),
        ({n.replace("attn_q", "attn_norm"): a for n, a in adapters.items()}, "the model has no matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            write_adapter(new, config, wrong, alpha=1.0)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        write_adapter(new, config, adapters, alpha=0)
    assert not new.exists()


def test_damaged_adapters_give_one_kind_of_error(tmp_path):
    config, path = CONFIGS["llama"], tmp_path / "a.gguf"
    write_adapter(path, config, random_adapter(config, targets=("attn_q",)), alpha=3.0)
    data, refused = path.read_bytes(), 0
    for position in range(0, 700, 3):
        path.write_bytes(data[:position] + bytes((data[position] ^ 1 << position % 8,)) + data[position + 1 :])
        try:
            read_adapter(path, config)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 150


# -- damaged and lying files -------------------------------------------------------------------------------------------


def outcome(path, data):
    """Open the file, and read all that can be read -> "refused" or "read". Any other error than the promised ones, and any
    that does a second's work, ends the test."""
    path.write_bytes(data)
    with Counted() as work:
        try:
            with GGUF.open(path) as gguf:
                try:
                    gguf.config()
                    gguf.parameters()
                    load_tokenizer(gguf)
                    result = "read"
                except (BadFileError, UnsupportedModelError):
                    result = "refused"
                except ValueError as error:  # a tokenizer of a kind that is not supported
                    assert "tokenizer" in str(error), error
                    result = "refused"
        except BadFileError:
            result = "refused"
    assert work.calls < 100_000
    return result


@pytest.fixture(scope="module", params=[pytest.param("llama q8_0, BPE", marks=needs_gguf_package), "gpt2 f32, rwkv"])
def small_file(request, tmp_path_factory):
    """The bytes of a small sound file, where its tensor data begin, and a folder for its damaged relatives."""
    folder = tmp_path_factory.mktemp("fuzz")
    if request.param.startswith("llama"):
        config, kind, tokenizer = toy.LlamaConfig(4, 32, 2, 1, 32, 1, 8), "q8_0", CharTokenizer("\nabé")
    else:
        config, kind, tokenizer = toy.GPT2Config(5, 4, 1, 4, 1, 4), "f32", CharTokenizer("\nabcd")
    write_gguf(folder / "sound.gguf", config, random_parameters(config), tokenizer, type=kind)
    data = (folder / "sound.gguf").read_bytes()
    assert outcome(folder / "copy.gguf", data) == "read"
    with GGUF.open(folder / "sound.gguf") as gguf:
        start = min(record.offset for record in gguf.tensors.values())
        end = max(record.offset + record.n_bytes for record in gguf.tensors.values())
    return data, start, end, folder


# every byte of the header with --hypothesis-profile=thorough, otherwise every third
STEP = 1 if hypothesis.settings.default.max_examples > 100 else 3


def test_every_truncation_is_refused(small_file):
    data, start, end, folder = small_file
    lengths = [*range(0, start, STEP), *range(start, end, 13 * STEP), end - 1]  # beyond `end` there is padding alone
    assert {outcome(folder / "cut.gguf", data[:n]) for n in lengths} == {"refused"}


def test_flipped_bits(small_file):
    """One bit of a byte before the tensor data, and of some in them, where only numbers can change."""
    data, start, _, folder = small_file
    outcomes = []
    for position in [*range(0, start, STEP), *range(start, len(data), 97)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position * 5 + 3) % 8
        outcomes.append(outcome(folder / "flip.gguf", damaged))
    assert outcomes.count("refused") > start / STEP / 3  # the others changed a name, a number or a token


@given(st.data())
def test_random_damage(small_file, data):
    original, start, _, folder = small_file
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, start - 9))
        damaged[position : position + 8] = data.draw(
            st.binary(min_size=8, max_size=8) | st.sampled_from([bytes(8), b"\xff" * 8, struct.pack("<q", 2**62)])
        )
    outcome(folder / "random.gguf", damaged)


@given(st.binary(max_size=400))
def test_random_bytes_after_a_sound_beginning(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("noise")
    assert outcome(folder / "n.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + data) == "refused"
    assert outcome(folder / "n.gguf", data) == "refused"


X = "general.x"  # a key of no meaning


def with_key(kind, payload, name=X):
    return by_hand(keys=[ARCHITECTURE, key(name, kind, payload)])


def with_tensors(*tensors, data=64, keys=(ARCHITECTURE,)):
    return by_hand(keys=keys, tensors=[described(*tensor) for tensor in tensors], data=bytes(data))


def alignment(n, kind="I", code=4):
    return by_hand(
        keys=[ARCHITECTURE, key("general.alignment", code, struct.pack(f"<{kind}", n))],
        tensors=[described("w", [8], 0, 0)],
        data=bytes(max(n, 32) + 64),
    )


def aligned_file(n):
    """One tensor of 32 bytes behind a header with that alignment, which is a power of two."""
    keys = [ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", n))]
    header = by_hand(keys=keys, tensors=[described("w", [8], 0, 0)])
    exact = len(b"GGUF") + 20 + sum(map(len, keys)) + len(described("w", [8], 0, 0))
    return header[:exact] + bytes(-exact % n) + bytes(32)


def array(kind, n, payload=b""):
    return struct.pack("<IQ", kind, n) + payload


ONE_TENSOR = with_tensors(("w", [16], 0, 0))
U32 = struct.pack("<I", 7)
# name: the file, the same without the lie, what the reader says. Without a lie they are all opened.
LIES = {
    "empty": (b"", by_hand(), "too short for a GGUF file (0 bytes)"),
    "23 bytes": (by_hand()[:23], by_hand(), "too short for a GGUF file (23 bytes)"),
    "24 bytes": (by_hand()[:24], by_hand(), "claims 1 metadata keys: too many for a file of 24 bytes"),
    "another magic": (by_hand(magic=b"GGML"), by_hand(), "does not begin with GGUF"),
    "version 1": (by_hand(version=1), by_hand(version=2), "has GGUF version 1"),
    "version 4": (by_hand(version=4), by_hand(version=3), "has GGUF version 4"),
    "version 2^16 + 3": (by_hand(version=2**16 + 3), by_hand(), "has GGUF version 65539"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), by_hand(), "big-endian"),
    "no architecture": (by_hand(keys=[]), by_hand(), "names no architecture"),
    "architecture is empty": (by_hand(keys=[key("general.architecture", 8, string(""))]), by_hand(), "names no architecture"),
    "architecture is a number": (by_hand(keys=[key("general.architecture", 4, U32)]), by_hand(), "names no architecture"),
    "an architecture of 64 letters": (
        by_hand(keys=[key("general.architecture", 8, string("a" * 64))]),
        by_hand(keys=[key("general.architecture", 8, string("a" * 63))]),
        "names no architecture",
    ),
    "a key twice": (by_hand(keys=[ARCHITECTURE, ARCHITECTURE]), by_hand(), "'general.architecture' twice"),
    "an empty key": (with_key(4, U32, ""), with_key(4, U32), "has an empty metadata key"),
    "a key that is not text": (with_key(4, U32, b"\xff\xfe"), with_key(4, U32), "a metadata key is not UTF-8"),
    "a string that is not text": (with_key(8, string(b"\xff")), with_key(8, string("a")), "'general.x' is not UTF-8"),
    "strings that are not text": (
        with_key(9, array(8, 2, string("a") + string(b"\xff"))),
        with_key(9, array(8, 2, string("a") + string("b"))),
        "'general.x' holds text that is not UTF-8",
    ),
    "unknown value type": (with_key(13, bytes(8)), with_key(12, bytes(8)), "'general.x' has the unknown type 13"),
    "an unknown array type": (with_key(9, array(13, 1, bytes(8))), with_key(9, array(12, 1, bytes(8))), "array of type 13"),
    "nested arrays": (
        with_key(9, array(9, 1, array(9, 1)) + bytes(64)), with_key(9, array(0, 64, bytes(64))), "array of type 9",
    ),
    "truth value 2": (with_key(7, b"\x02"), with_key(7, b"\x01"), "the truth value 2"),
    "truth values 2": (with_key(9, array(7, 2, b"\x01\x02")), with_key(9, array(7, 2, b"\x01\x00")), "neither 0 nor 1"),
    "alignment 0": (alignment(0), aligned_file(32), "the alignment 0"),
    "alignment 4": (alignment(4), aligned_file(8), "the alignment 4"),
    "alignment 24": (alignment(24), aligned_file(16), "the alignment 24"),
    "alignment 2^17": (alignment(2**17), aligned_file(2**16), "the alignment 131072"),
    "alignment -32": (alignment(-32, "i", 5), alignment(32, "i", 5)[:-64], "the alignment -32"),
    "alignment 32.0": (alignment(32, "f", 6), aligned_file(32), "the alignment 32.0"),
    "alignment is text": (with_key(8, string("32"), "general.alignment"), aligned_file(32), "the alignment '32'"),
    "no dimensions": (
        by_hand(tensors=[string("w") + struct.pack("<IIQ", 0, 0, 0)], data=bytes(64)), ONE_TENSOR, "'w' has 0 dimensions",
    ),
    "five dimensions": (
        with_tensors(("w", [1, 1, 1, 1, 16], 0, 0)), with_tensors(("w", [1, 1, 1, 16], 0, 0)), "'w' has 5 dimensions",
    ),
    "dimensions 2^32 - 1": (
        by_hand(tensors=[string("w") + struct.pack("<I", 2**32 - 1)], data=bytes(64)),
        ONE_TENSOR,
        "'w' has 4294967295 dimensions",
    ),
    "a size of 0": (with_tensors(("w", [0, 4], 0, 0)), with_tensors(("w", [4, 4], 0, 0)), "the sizes 0 x 4"),
    "a product that wraps to 0": (
        with_tensors(("w", [2**32, 2**32], 0, 0)), ONE_TENSOR, "the sizes 4294967296 x 4294967296",
    ),
    "a product that wraps to 16": (
        with_tensors(("w", [2**62 + 4, 4], 0, 0)), with_tensors(("w", [4, 4], 0, 0)), "the sizes 4611686018427387908 x 4",
    ),
    "half a block": (
        with_tensors(("w", [16, 2], 2, 0), data=32), with_tensors(("w", [32, 1], 2, 0), data=32), "rows of 16 numbers",
    ),
    "an unknown tensor type": (with_tensors(("w", [16], 4, 0)), ONE_TENSOR, "'w' has the unknown type 4"),
    "tensor type 2^32 - 1": (with_tensors(("w", [16], 2**32 - 1, 0)), ONE_TENSOR, "the unknown type 4294967295"),
    "a name of 64 bytes": (
        with_tensors(("w" * 64, [16], 0, 0)), with_tensors(("w" * 63, [16], 0, 0)), "claims 64 bytes in a tensor name",
    ),
    "a name that is not text": (with_tensors((b"\xff", [16], 0, 0)), ONE_TENSOR, "a tensor name is not UTF-8"),
    "a tensor twice": (
        with_tensors(("w", [8], 0, 0), ("w", [8], 0, 32)), with_tensors(("w", [8], 0, 0), ("v", [8], 0, 32)), "'w' twice",
    ),
    "overlapping": (
        with_tensors(("a", [8], 0, 0), ("b", [8], 0, 0)), with_tensors(("a", [8], 0, 0), ("b", [8], 0, 32)),
        "'b' is at offset 0, expected 32",
    ),
    "overlapping by half": (
        with_tensors(("a", [16], 0, 0), ("b", [8], 0, 32), data=96),
        with_tensors(("a", [16], 0, 0), ("b", [8], 0, 64), data=96),
        "'b' is at offset 32, expected 64",
    ),
    "a hole": (
        with_tensors(("a", [8], 0, 0), ("b", [8], 0, 64), data=96), with_tensors(("a", [8], 0, 0), ("b", [8], 0, 32)),
        "'b' is at offset 64, expected 32",
    ),
    "not aligned": (
        with_tensors(("a", [1], 0, 0), ("b", [1], 0, 4)), with_tensors(("a", [1], 0, 0), ("b", [1], 0, 32)),
        "'b' is at offset 4, expected 32",
    ),
    "the first not at 0": (with_tensors(("w", [8], 0, 32)), with_tensors(("w", [8], 0, 0), data=32), "'w' is at offset 32"),
    "beyond the end": (with_tensors(("w", [17], 0, 0)), ONE_TENSOR, "is cut off: tensor 'w' ends at byte"),
    "a byte short": (ONE_TENSOR[:-1], ONE_TENSOR, "is cut off: tensor 'w' ends at byte"),
    "bytes after the end": (
        ONE_TENSOR + bytes(32) + b"x",
        ONE_TENSOR + bytes(33),
        "goes on for 33 bytes after its last tensor",
    ),
    "zeros after the end": (ONE_TENSOR + bytes(2**17), ONE_TENSOR + bytes(2**16), "bytes after its last tensor"),
}  # fmt: skip
for n in (2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1):
    LIES |= {
        f"{n} tensors": (by_hand(n_tensors=n), by_hand(n_tensors=0), f"claims {n} tensors: too many"),
        f"{n} keys": (by_hand(n_keys=n), by_hand(n_keys=1), f"claims {n} metadata keys: too many"),
        f"a key of {n} bytes": (
            by_hand(keys=[ARCHITECTURE, struct.pack("<Q", n)]), with_key(4, U32), f"claims {n} bytes in a metadata key",
        ),
        f"a string of {n} bytes": (
            with_key(8, struct.pack("<Q", n)), with_key(8, string("abc")), f"claims {n} bytes in 'general.x'",
        ),
        f"an array of {n} bytes": (
            with_key(9, array(0, n)), with_key(9, array(0, 3, bytes(3))), f"claims {n} numbers in 'general.x'",
        ),
        f"an array of {n} doubles": (
            with_key(9, array(12, n)), with_key(9, array(12, 3, bytes(24))), f"claims {n} numbers in 'general.x'",
        ),
        f"an array of {n} strings": (
            with_key(9, array(8, n)), with_key(9, array(8, 1, string("a"))), f"claims {n} strings in 'general.x'",
        ),
        f"a string of {n} bytes in an array": (
            with_key(9, array(8, 2, string("a") + struct.pack("<Q", n))),
            with_key(9, array(8, 2, string("a") + string("b"))),
            f"claims a string of {n} bytes in 'general.x'",
        ),
        f"{n} columns": (with_tensors(("w", [n], 0, 0)), ONE_TENSOR, f"the sizes {n}, which do not fit"),
        f"{n} rows": (with_tensors(("w", [4, n], 0, 0)), ONE_TENSOR, f"the sizes 4 x {n}, which do not fit"),
        f"offset {n}": (with_tensors(("w", [16], 0, n)), ONE_TENSOR, f"'w' is at offset {n}, expected 0"),
    }  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies(tmp_path, name):
    """The reader alone refuses the file, for the reason that was meant; the same file without the lie opens."""
    lie, truth, message = LIES[name]
    path = tmp_path / "lie.gguf"
    path.write_bytes(truth)
    GGUF.open(path).close()
    path.write_bytes(lie)
    with Counted() as work, pytest.raises(BadFileError) as caught:
        GGUF.open(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert work.calls < 2000


def test_metadata_that_end_within_anything_are_cut_off(tmp_path):
    """Cut at every byte of a header with every kind of value: refused by the reader, and the last byte is needed too."""
    values = [(code, bytes(struct.calcsize(form))) for code, form in SCALARS.items()] + [
        (7, b"\x01"),
        (8, string("abc")),
    ]
    arrays = [(9, array(code, 2, 2 * payload)) for code, payload in values]
    keys = [key(f"k{i}", code, payload) for i, (code, payload) in enumerate(values + arrays)]
    path, whole = tmp_path / "cut.gguf", by_hand(keys=[ARCHITECTURE, *keys])
    end = 24 + len(ARCHITECTURE) + sum(map(len, keys))
    path.write_bytes(whole[:end])
    with GGUF.open(path) as gguf:
        assert len(gguf.metadata) == 1 + len(keys)
        assert [len(gguf.metadata[f"k{i}"]) for i in range(len(values), len(keys))] == [2] * len(arrays)
    for n in range(end):
        path.write_bytes(whole[:n])
        with pytest.raises(BadFileError, match=r"too short|cut off|claims"):
            GGUF.open(path)


def test_places_that_are_not_files(tmp_path):
    with pytest.raises(BadFileError, match="not a regular file"):
        GGUF.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        GGUF.open(tmp_path / "nothing")


def test_the_largest_header_takes_little_time_and_memory(tmp_path):
    """As many strings as are believed, as much text as is believed, and both a little larger: a few calls a string, and
    under 200 MB together with the interpreter and numpy, alone in a process."""
    n = MAX_STRINGS
    wide = string("a" * (MAX_STRING - 4) + "\U0001f600")  # one emoji makes Python use four bytes for every letter
    files = {
        "most": with_key(9, array(8, n, string("ab") * n)),
        "longest": with_key(9, array(8, 5, wide * 5)),
        "too many": with_key(9, array(8, n + 1, string("") * (n + 1))),
        "too long": with_key(8, string("a" * (MAX_STRING + 1))),
        "too large": by_hand(keys=[ARCHITECTURE, *(key(f"{i}", 8, wide) for i in range(6))]),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import pathlib, re, sys\n"
        "from toy.files.gguf import GGUF\n"
        "from toy.files.errors import BadFileError\n"
        "from work import Counted\n"
        "for path in sys.argv[1:]:\n"
        "    with Counted() as work:\n"
        "        try:\n"
        "            GGUF.open(path).close()\n"
        "            result = 'read'\n"
        "        except BadFileError:\n"
        "            result = 'refused'\n"
        "    print(result, work.calls)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc here")
    paths = [str(tmp_path / name) for name in files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    lines = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True, env=environment
    ).stdout.splitlines()
    results, calls = zip(*(line.split() for line in lines[:-1]))
    assert results == ("read", "read", "refused", "refused", "refused")
    calls = list(map(int, calls))
    assert calls[0] < 4 * n + 1000 and max(calls[1:]) < 1000
    assert int(lines[-1]) * 1024 < 200e6


@pytest.mark.parametrize(("more", "result"), [(0, "opened"), (1, "refused")])
def test_arrays_of_strings_share_one_budget(tmp_path, more, result):
    half = MAX_STRINGS // 2
    keys = [key(f"k{i}", 9, array(8, n, string("") * n)) for i, n in enumerate((half, half + more))]
    path = tmp_path / "m.gguf"
    path.write_bytes(by_hand(keys=[ARCHITECTURE, *keys]))
    try:
        with GGUF.open(path) as gguf:
            assert [len(gguf.metadata[f"k{i}"]) for i in (0, 1)] == [half, half]
        found = "opened"
    except BadFileError as error:
        assert f"claims {half + 1} strings in 'k1': too many" in str(error)
        found = "refused"
    assert found == result


def many(n, make):
    return [make(i) for i in range(n)]


@pytest.mark.parametrize(
    ("most", "file", "message"),
    [
        (
            MAX_KEYS - 1,
            lambda n: by_hand(keys=[ARCHITECTURE, *many(n, lambda i: key(f"k{i}", 0, b"1"))]),
            "metadata keys",
        ),
        (
            MAX_TENSORS,
            lambda n: by_hand(tensors=many(n, lambda i: described(f"t{i}", [1], 0, 32 * i)), data=bytes(32 * n)),
            "tensors",
        ),
    ],
    ids=["keys", "tensors"],
)
def test_as_many_as_are_believed_and_one_more(tmp_path, most, file, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(file(most))
    GGUF.open(path).close()
    path.write_bytes(file(most + 1))
    with pytest.raises(BadFileError, match=rf"claims \d+ {message}: too many"):
        GGUF.open(path)


def test_more_than_the_largest_models_have_is_believed(tmp_path):
    """Those have some 60 keys and, with a tensor for each expert, some thousands of tensors."""
    keys, tensors = many(500, lambda i: key(f"k{i}", 0, b"1")), many(5000, lambda i: described(f"t{i}", [1], 0, 32 * i))
    (tmp_path / "m.gguf").write_bytes(by_hand(keys=[ARCHITECTURE, *keys], tensors=tensors, data=bytes(32 * 5000)))
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        assert len(gguf.metadata) == 501 and len(gguf.tensors) == 5000


# -- numbers at the ends of a type -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [65504.0, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_beyond_f16_are_refused_on_both_sides(tmp_path, sign, number):
    config, path = CONFIGS["llama"], tmp_path / "m.gguf"
    parameters = random_parameters(config)
    name = "blk.1.ffn_up.weight"
    parameters[name][3, 5] = sign * number
    if number > 65504:
        with pytest.raises(ValueError, match=rf"{name} has numbers beyond the range of F16: write the model as f32"):
            write_gguf(path, config, parameters, type="f16")
        assert not list(tmp_path.iterdir())
        write_gguf(path, config, parameters)  # as float32 it can be written
        number = np.float32(number)
    else:
        write_gguf(path, config, parameters, type="f16")
    with GGUF.open(path) as gguf:
        assert gguf.dequantize(name)[3, 5] == sign * number


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_numpys_own_readers_give_the_numbers_of_the_compiled_ones(tmp_path, monkeypatch, kind):
    """What runs where no kernels are built: every exponent, both signs, infinities and NaN."""
    from toy import quantized

    block = TYPES[kind]
    words = (
        np.arange(2**16, dtype=np.uint32) if block.n_bytes == 2 else np.arange(2**16, dtype=np.uint32) << 16 | 0x1234
    )
    raw = words.astype(f"<u{block.n_bytes}").reshape(256, 256).view(np.uint8)
    found = {}
    for which in ("compiled", "numpy"):
        if which == "numpy":
            monkeypatch.setattr(quantized, "_kernels", lambda: None)
        elif quantized._kernels() is None or kind not in quantized._kernels().TYPES:
            continue  # a pure Python run: the numbers below are still checked
        found[which] = np.empty((256, 256), np.float32)
        quantized.dequantize(raw, kind, found[which])
    if kind == "BF16":
        expected = (words << 16).view(np.float32)
    else:
        expected = words.astype(f"<u{block.n_bytes}").view(f"<f{block.n_bytes}").astype(np.float32)
    for numbers in found.values():
        assert np.array_equal(numbers.ravel(), expected, equal_nan=True)
        assert np.array_equal(np.signbit(numbers.ravel()), np.signbit(expected))
