"""Exports in every tensor type: ggml's own quantiser through the bridge, llama.cpp's mixes, files that keep their types."""

import math

import numpy as np
import pytest
from fetch_test_data import COMMAND, smollm2
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.data.tokenizers import ByteTokenizer
from toy.files.gguf import GGUF
from toy.files.gguf_types import MIXES, fitting, tensor_types
from toy.files.gguf_write import write_gguf
from toy.models import model_for
from toy.quantized import TYPES, QuantizedMatrix, dequantize, dequantized, quantize
from toy.trained import load_trained, read_trained
from toy.trained.export import EXPORT_TYPES, export_model

gguf_package = pytest.importorskip("gguf", reason="quantised files need the gguf package")

QUANTIZABLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
# largest root mean square error, as a share of the numbers' own, of normal numbers; 2^-bits and a little
ERRORS = {"q2_k": 0.35, "q3_k": 0.2, "q8_0": 0.01, "q6_k": 0.03, "q5_k": 0.06, "q5_0": 0.06, "q5_1": 0.06}


@pytest.fixture
def bridge(kernels):
    import ggml_bridge

    return ggml_bridge


def llama(untied=False, d_model=256, n_layers=9):
    config = toy.LlamaConfig(
        256, d_model=d_model, n_heads=4, n_kv_heads=2, d_ff=256, n_layers=n_layers, context_length=32, untied=untied
    )
    return config, random_parameters(config)


def random_parameters(config):
    rng, shapes = np.random.default_rng(0), model_for(config).parameter_shapes(config)
    return {
        name: rng.normal(1 if len(shape) == 1 else 0, 0.2 if len(shape) == 1 else shape[-1] ** -0.5, shape).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


# -- ggml's quantiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_what_is_quantised_is_close_to_what_it_was(bridge, name):
    rng, kind = np.random.default_rng(1), TYPES[name.upper()]
    numbers = rng.normal(0, 0.1, (7, 2 * 256)).astype(np.float32)
    raw = bridge.quantize(numbers, name)
    assert raw.dtype == np.uint8 and raw.shape == (7, 512 // kind.block * kind.n_bytes)
    back = np.empty_like(numbers)
    dequantize(raw, kind.name, back)
    error = np.sqrt(np.mean((back - numbers) ** 2)) / 0.1
    assert error <= ERRORS.get(name, 0.11)
    assert np.array_equal(bridge.quantize(numbers, name), raw)
    assert np.array_equal(bridge.quantize(numbers[2:3], name)[0], raw[2])  # a row does not depend on the others


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_it_is_the_quantiser_of_the_gguf_package(bridge, name):
    numbers = np.random.default_rng(2).normal(0, 0.1, (40, 96)).astype(np.float32)
    assert np.array_equal(bridge.quantize(numbers, name), quantize(numbers, name.upper()))


def test_what_cannot_be_quantised(bridge):
    good = np.ones((2, 256), np.float32)
    assert bridge.quantize(good, "Q4_K").shape == (2, 144)
    for array, name, message in (
        (good, "q9", "dtype must be one of"),
        (good, "iq2_xxs", "dtype must be one of"),  # needs importances
        (good, "q8_k", "dtype must be one of"),
        (good, 4, "dtype must be one of"),
        (good[:, :100], "q4_k", "a multiple of 256 numbers, not 100"),
        (good.astype(np.float64), "q4_k", "a float32 array"),
        (good[0], "q4_k", "a float32 array"),
        (good[:0], "q4_k", "not empty"),
        (good * np.nan, "q4_k", "finite"),
        (good * np.inf, "q8_0", "finite"),
        (good * np.float32(3e38), "q4_0", "too large"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge.quantize(array, name)
    assert np.array_equal(bridge.quantize(np.asfortranarray(good), "q4_k"), bridge.quantize(good, "q4_k"))


# -- mixes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [False, True])
def test_the_mixes_are_llama_cpps(untied):
    """The types of Llama files that llama.cpp's quantiser wrote: 32 blocks, tied and not."""
    config, _ = llama(untied, n_layers=32)
    shapes = model_for(config).parameter_shapes(config)
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)}  # of q4_k_m: blocks with q6_k
    types = tensor_types(shapes, "q4_k_m", 32)
    for i in range(32):
        for name in ("attn_v", "ffn_down"):
            assert types[f"blk.{i}.{name}.weight"] == ("Q6_K" if i in more else "Q4_K"), (i, name)
        for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            assert types[f"blk.{i}.{name}.weight"] == "Q4_K"
        assert types[f"blk.{i}.attn_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q4_K" if untied else "Q6_K")
    assert types.get("output.weight", "Q6_K") == "Q6_K"
    types = tensor_types(shapes, "q4_k_s", 32)
    assert [types[f"blk.{i}.attn_v.weight"] for i in (0, 3, 4, 31)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert [types[f"blk.{i}.ffn_down.weight"] for i in (0, 3, 4, 31)] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert tensor_types(shapes, "q5_k_m", 32)["blk.31.attn_v.weight"] == "Q6_K"
    assert set(tensor_types(shapes, "q8_0", 32).values()) == {"F32", "Q8_0"}
    assert set(tensor_types(shapes, "q6_k", 32).values()) == {"F32", "Q6_K"}


def test_rows_that_no_block_divides():
    assert [fitting(kind, 576) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0")] == ["Q5_0", "Q5_1", "Q8_0", "Q8_0"]
    assert [fitting(kind, 100) for kind in ("Q4_K", "Q8_0", "F16")] == ["F16"] * 3
    assert fitting("Q4_K", 512) == "Q4_K"


@pytest.mark.parametrize("type", MIXES)
def test_a_model_in_every_type(kernels, tmp_path, type):
    config, parameters = llama()
    path = tmp_path / "model.gguf"
    write_gguf(tmp_path / "f32.gguf", config, parameters, ByteTokenizer())
    export_model(read_trained(tmp_path / "f32.gguf"), path, type)
    with GGUF.open(path) as gguf:
        assert gguf.metadata["general.file_type"] == MIXES[type].file_type
        types = {name: record.type for name, record in gguf.tensors.items()}
        assert types == tensor_types(model_for(config).parameter_shapes(config), type, config.n_layers)
        for name, array in gguf.parameters().items():
            bar = {"F32": 0, "F16": 1e-3, "BF16": 5e-3}.get(types[name], ERRORS.get(types[name].lower(), 0.11))
            assert np.linalg.norm(dequantized(array) - parameters[name]) <= bar * np.linalg.norm(parameters[name])
    exact, found = load_trained(tmp_path / "f32.gguf"), load_trained(path)
    ids = np.arange(20) % 256
    difference = np.abs(found.model.forward(ids)[0] - exact.model.forward(ids)[0]).mean()
    assert difference < {"f32": 1e-6, "f16": 1e-2, "bf16": 0.05, "q8_0": 0.05}.get(type, 0.6)


def test_types_that_cannot_be(tmp_path, kernels):
    config, parameters = llama()
    with pytest.raises(ValueError, match=r"type must be one of f32, f16, bf16, q8_0, .*got 'q7'"):
        write_gguf(tmp_path / "a.gguf", config, parameters, type="q7")
    parameters["blk.0.attn_q.weight"][3, 5] = 1e38
    for type in ("f16", "q4_k_m", "q8_0"):
        with pytest.raises(ValueError, match=r"blk.0.attn_q.weight|too large|beyond the range"):
            write_gguf(tmp_path / "a.gguf", config, parameters, type=type, quantizer=_bridge_quantizer())
    assert list(tmp_path.iterdir()) == []


def _bridge_quantizer():
    from toy.trained.export import _quantize

    return _quantize


# -- keep --------------------------------------------------------------------------------------------------------------


def test_keep_changes_nothing_that_was_not_changed(kernels, tmp_path):
    config, parameters = llama()
    base, again, merged = (tmp_path / name for name in ("base.gguf", "again.gguf", "merged.gguf"))
    write_gguf(tmp_path / "f32.gguf", config, parameters, ByteTokenizer())
    export_model(read_trained(tmp_path / "f32.gguf"), base, "q4_k_m")
    export_model(read_trained(base), again, "keep")
    stored = read_trained(base)
    rng = np.random.default_rng(3)
    adapters = {
        "blk.2.attn_q.lora_a": rng.normal(0, 0.1, (4, 256)).astype(np.float32),
        "blk.2.attn_q.lora_b": rng.normal(0, 0.1, (256, 4)).astype(np.float32),
    }
    export_model(stored._replace(adapters=adapters, alpha=4.0), merged, "keep")
    with GGUF.open(base) as a, GGUF.open(again) as b, GGUF.open(merged) as c:
        for name, record in a.tensors.items():
            assert record.type == b.tensors[name].type == c.tensors[name].type
            assert np.array_equal(a.raw(name), b.raw(name))
            assert np.array_equal(a.raw(name), c.raw(name)) == (name != "blk.2.attn_q.weight")
        assert a.metadata["general.file_type"] == b.metadata["general.file_type"] == 15
        was, now = (
            dequantized(a.parameters()["blk.2.attn_q.weight"]),
            dequantized(c.parameters()["blk.2.attn_q.weight"]),
        )
        wanted = was + adapters["blk.2.attn_q.lora_b"] @ adapters["blk.2.attn_q.lora_a"]
        assert np.linalg.norm(now - wanted) < 0.11 * np.linalg.norm(wanted) < np.linalg.norm(was - wanted)


def test_a_damaged_block_is_not_passed_on(tmp_path, kernels):
    config, parameters = llama()
    raw = quantize(parameters["blk.1.attn_q.weight"], "Q8_0").copy()
    good = {**parameters, "blk.1.attn_q.weight": QuantizedMatrix(raw.copy(), "Q8_0", (256, 256))}
    types = dict.fromkeys(parameters, "F32") | {"blk.1.attn_q.weight": "Q8_0"}
    write_gguf(tmp_path / "good.gguf", config, good, type=types)
    raw[7, :2] = np.array([np.nan], np.float16).view(np.uint8)
    bad = {**parameters, "blk.1.attn_q.weight": QuantizedMatrix(raw, "Q8_0", (256, 256))}
    for type in (types, "f32", "q4_k_m"):
        with pytest.raises(ValueError, match=r"blk.1.attn_q.weight holds numbers that are not finite"):
            write_gguf(tmp_path / "bad.gguf", config, bad, type=type, quantizer=_bridge_quantizer())
    assert not (tmp_path / "bad.gguf").exists()


def test_without_ggml_the_plain_types_remain(tmp_path, monkeypatch):
    import ggml_bridge

    config, parameters = llama(n_layers=1)
    write_gguf(tmp_path / "f32.gguf", config, parameters, ByteTokenizer())
    monkeypatch.setattr(ggml_bridge, "available", lambda: (False, "it is not installed"))
    stored = read_trained(tmp_path / "f32.gguf")
    for type in ("q8_0", "bf16", "q4_0"):
        if type == "q4_0":  # the output matrix of that mix is q6_k
            with pytest.raises(ValueError, match="Q6_K is made by ggml's own quantiser, which is not there"):
                export_model(stored, tmp_path / "a.gguf", type)
        else:
            export_model(stored, tmp_path / f"{type}.gguf", type)


def test_the_command_line(tmp_path, monkeypatch, toy_command, kernels):
    monkeypatch.chdir(tmp_path)
    config, parameters = llama(n_layers=2)
    write_gguf("model.gguf", config, parameters, ByteTokenizer())
    code, out, err = toy_command("export", "model.gguf", "--type=q4_k_m")
    assert (code, err) == (0, "") and out.startswith("model-q4_k_m.gguf (")
    with GGUF.open("model-q4_k_m.gguf") as gguf:
        assert gguf.tensors["blk.0.attn_q.weight"].type == "Q4_K"
    for arguments, message in (
        (["--type=q7"], "--type 'q7' is not one of f32, f16, bf16"),
        (["--out=model.safetensors"], "does not end with .gguf"),
    ):
        code, out, err = toy_command("export", "model.gguf", *arguments)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert set(EXPORT_TYPES) == {*MIXES, "keep"}


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "type", ["bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl"]
)
def test_llama_cpp_reads_every_type(kernels, tmp_path, type):
    test_llama_cpp = pytest.importorskip("test_llama_cpp")
    config, parameters = llama(n_layers=3)
    write_gguf(tmp_path / "f32.gguf", config, parameters, ByteTokenizer())
    export_model(read_trained(tmp_path / "f32.gguf"), tmp_path / "model.gguf", type)
    ids = [3, 200, 17, 45, 9]
    theirs = test_llama_cpp.LlamaCpp(tmp_path / "model.gguf").log_probabilities(ids, 256)
    ours = test_llama_cpp.log_softmax(load_trained(tmp_path / "model.gguf").model.forward(np.array(ids))[0])
    exact = test_llama_cpp.log_softmax(load_trained(tmp_path / "f32.gguf").model.forward(np.array(ids))[0])
    # llama.cpp rounds the activations too: its result is nearer to ours than the original is
    assert np.median(np.abs(theirs - ours)) < 0.1
    assert np.median(np.abs(theirs - ours)) < np.median(np.abs(theirs - exact)) + 0.01


@pytest.mark.slow
def test_smollm2_requantised(kernels, tmp_path):
    """The perplexity of a real model in several types goes up with the bits left out, and by little."""
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    from toy.data.corpora import python_documentation

    text = python_documentation().text[:1500]
    losses = {}
    for type in ("keep", "q8_0", "q4_k_m"):
        export_model(read_trained(path), tmp_path / f"{type}.gguf", type)
        losses[type] = toy.load(tmp_path / f"{type}.gguf").evaluate(text).loss
    before = toy.load(path).evaluate(text).loss
    assert losses["keep"] == before
    assert math.isclose(losses["q8_0"], before, rel_tol=5e-3)
    assert math.isclose(losses["q4_k_m"], before, rel_tol=3e-2)
