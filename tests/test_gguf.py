"""GGUF files: what is written is read back, other writers' files are read alike, and damaged or lying files are refused."""

import ctypes
import dataclasses
import importlib.util
import math
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy
from toy.data.open_tokenizer import load_tokenizer
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.files import gguf_models
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF, MAX_STRING, MAX_STRINGS
from toy.files.gguf_models import UnsupportedModelError
from toy.files.gguf_write import fingerprint, read_adapter, write_adapter, write_gguf
from toy.models import ARCHITECTURES, ParameterTree, model_for
from toy.quantized import TYPES
from toy.trained import read_trained
from toy.trained.export import export_adapter, export_model

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
    with pytest.raises(ValueError, match="type must be one of f32, f16, q8_0"):
        write_gguf(path, config, parameters, type="q4_0")
    with pytest.raises(ValueError, match="the tokenizer has 256 ids, the model 11"):
        write_gguf(path, config, parameters, ByteTokenizer())
    with pytest.raises(ValueError, match=r"missing: output_norm\.weight"):
        write_gguf(path, config, {n: a for n, a in parameters.items() if n != "output_norm.weight"})
    with pytest.raises(ValueError, match="beyond the range of F16"):
        write_gguf(path, config, parameters | {"token_embd.weight": np.full((11, 32), 1e5, np.float32)}, type="f16")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_leaves_the_old_file(tmp_path, monkeypatch):
    config, path = CONFIGS["llama"], tmp_path / "m.gguf"
    write_gguf(path, config, random_parameters(config))
    before = path.read_bytes()
    monkeypatch.setattr("toy.files.gguf_write.quantize", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(path, config, random_parameters(config, seed=1))
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
            {"general.architecture": "qwen2"},
            UnsupportedModelError,
            "architecture 'qwen2'; this library has llama and gpt2",
        ),
        ({"general.type": "adapter"}, UnsupportedModelError, "general.type is 'adapter'"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModelError, "rope.scaling.type = 'yarn'"),
        ({"llama.rope.scaling.factor": 4.0}, UnsupportedModelError, "rope.scaling.factor = 4.0"),
        (
            {"llama.rope.scaling.attn_factor": 0.5},
            UnsupportedModelError,
            "attn_factor = 0.5, which this library's Llama",
        ),
        ({"llama.expert_count": 8}, UnsupportedModelError, "expert_count = 8"),
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
    assert list(gguf_models.FORMS) == ["llama", "mistral3", "gpt2"]
    for name, (row, form) in gguf_models.FORMS.items():
        fields = {field.name for field in dataclasses.fields(row.config)}
        said = {"vocab_size", *(key.field for key in form.keys), *form.tensors, *form.fixed}
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
    [("attention.temperature_scale", 0.5), ("rope.scaling.type", "yarn"), ("rope.scaling.attn_factor", 1.5)],
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
        (adapters | random_adapter(config, rank=2, targets=("ffn_up",)), "different ranks: 2, 3"),
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
    that takes a second, ends the test."""
    path.write_bytes(data)
    start = time.process_time()  # not the clock: other processes may be at work
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
    assert time.process_time() - start < 1.0
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


HUGE = (2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
LIES = {
    "empty": b"",
    "another magic": by_hand(magic=b"GGML"),
    "version 1": by_hand(version=1),
    "version 4": by_hand(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "no architecture": by_hand(keys=[]),
    "architecture is a number": by_hand(keys=[key("general.architecture", 4, struct.pack("<I", 7))]),
    "a key twice": by_hand(keys=[ARCHITECTURE, ARCHITECTURE]),
    "an empty key": by_hand(keys=[ARCHITECTURE, key("", 4, struct.pack("<I", 7))]),
    "a key that is not text": by_hand(keys=[ARCHITECTURE, key(b"\xff\xfe", 4, struct.pack("<I", 7))]),
    "unknown value type": by_hand(keys=[ARCHITECTURE, key("x", 13, bytes(8))]),
    "an architecture of a million letters": by_hand(keys=[key("general.architecture", 8, string("a" * 10**6))]),
    "nested arrays": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQIQ", 9, 1, 9, 1) + bytes(64))]),
    "truth value 2": by_hand(keys=[ARCHITECTURE, key("x", 7, b"\x02")]),
    "truth values 2": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 7, 2) + b"\x01\x02")]),
    "alignment 0": by_hand(keys=[ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 24": by_hand(keys=[ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment 2^31": by_hand(keys=[ARCHITECTURE, key("general.alignment", 4, struct.pack("<I", 2**31))]),
    "alignment is text": by_hand(keys=[ARCHITECTURE, key("general.alignment", 8, string("32"))]),
    "no dimensions": by_hand(tensors=[string("w") + struct.pack("<IIQ", 0, 0, 0)], data=bytes(64)),
    "five dimensions": by_hand(tensors=[described("w", [1] * 5, 0, 0)], data=bytes(64)),
    "dimensions 2^32 - 1": by_hand(tensors=[string("w") + struct.pack("<I", 2**32 - 1)], data=bytes(64)),
    "a size of 0": by_hand(tensors=[described("w", [0, 4], 0, 0)], data=bytes(64)),
    "a product that wraps to 0": by_hand(tensors=[described("w", [2**32, 2**32], 0, 0)], data=bytes(64)),
    "a product that wraps to 16": by_hand(tensors=[described("w", [2**62 + 4, 4], 0, 0)], data=bytes(64)),
    "half a block": by_hand(tensors=[described("w", [16, 1], 2, 0)], data=bytes(64)),
    "an unknown tensor type": by_hand(tensors=[described("w", [4], 4, 0)], data=bytes(64)),
    "tensor type 2^32 - 1": by_hand(tensors=[described("w", [4], 2**32 - 1, 0)], data=bytes(64)),
    "a name of 64 bytes": by_hand(tensors=[described("w" * 64, [4], 0, 0)], data=bytes(64)),
    "a tensor twice": by_hand(tensors=[described("w", [8], 0, 0), described("w", [8], 0, 32)], data=bytes(64)),
    "overlapping": by_hand(tensors=[described("a", [8], 0, 0), described("b", [8], 0, 0)], data=bytes(64)),
    "overlapping by half": by_hand(tensors=[described("a", [16], 0, 0), described("b", [8], 0, 32)], data=bytes(64)),
    "a hole": by_hand(tensors=[described("a", [8], 0, 0), described("b", [8], 0, 64)], data=bytes(96)),
    "not aligned": by_hand(tensors=[described("a", [1], 0, 0), described("b", [1], 0, 4)], data=bytes(64)),
    "beyond the end": by_hand(tensors=[described("w", [17], 0, 0)], data=bytes(64)),
    "bytes after the end": by_hand(tensors=[described("w", [16], 0, 0)], data=bytes(128)),
}
for n in HUGE:
    LIES |= {
        f"{n} tensors": by_hand(n_tensors=n),
        f"{n} keys": by_hand(n_keys=n),
        f"a key of {n} bytes": by_hand(keys=[ARCHITECTURE, struct.pack("<Q", n)]),
        f"a string of {n} bytes": by_hand(keys=[ARCHITECTURE, key("x", 8, struct.pack("<Q", n))]),
        f"an array of {n} bytes": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 0, n))]),
        f"an array of {n} doubles": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 12, n))]),
        f"an array of {n} strings": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 8, n))]),
        f"{n} columns": by_hand(tensors=[described("w", [n], 0, 0)], data=bytes(64)),
        f"{n} rows": by_hand(tensors=[described("w", [4, n], 0, 0)], data=bytes(64)),
        f"offset {n}": by_hand(tensors=[described("w", [4], 0, n)], data=bytes(64)),
    }


@pytest.mark.parametrize("name", LIES)
def test_lies(tmp_path, name):
    assert outcome(tmp_path / "lie.gguf", LIES[name]) == "refused"


def test_places_that_are_not_files(tmp_path):
    with pytest.raises(BadFileError, match="not a regular file"):
        GGUF.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        GGUF.open(tmp_path / "nothing")


def test_the_largest_header_takes_little_time_and_memory(tmp_path):
    """As many strings as are believed, as much text as is believed, and both a little larger: alone in a process, under a
    second each and under 200 MB together with the interpreter and numpy."""
    n = MAX_STRINGS
    wide = string("a" * (MAX_STRING - 4) + "\U0001f600")  # one emoji makes Python use four bytes for every letter
    files = {
        "most": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 8, n) + string("ab") * n)]),
        "longest": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 8, 5) + wide * 5)]),
        "too many": by_hand(keys=[ARCHITECTURE, key("x", 9, struct.pack("<IQ", 8, n + 1) + string("") * (n + 1))]),
        "too long": by_hand(keys=[ARCHITECTURE, key("x", 8, string("a" * (MAX_STRING + 1)))]),
        "too large": by_hand(keys=[ARCHITECTURE, *(key(f"{i}", 8, wide) for i in range(6))]),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import pathlib, re, sys, time\n"
        "from toy.files.gguf import GGUF\n"
        "from toy.files.errors import BadFileError\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try:\n"
        "        GGUF.open(path).close()\n"
        "        result = 'read'\n"
        "    except BadFileError:\n"
        "        result = 'refused'\n"
        "    print(result, time.process_time() - start)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory of a process is read from /proc here")
    paths = [str(tmp_path / name) for name in files]
    lines = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    results, seconds = zip(*(line.split() for line in lines[:-1]))
    assert results == ("read", "read", "refused", "refused", "refused")
    assert max(map(float, seconds)) < 1.0
    assert int(lines[-1]) * 1024 < 200e6
