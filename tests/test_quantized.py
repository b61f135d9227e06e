"""Frozen weights in the block types of GGUF files: the numbers that they stand for, and every op that takes them."""

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PURE, needs_kernels
from hypothesis import given
from hypothesis import strategies as st

import toy
from toy import quantized
from toy.ops import reference
from toy.quantized import TYPES, QuantizedMatrix

HAS_GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf_package = pytest.mark.skipif(not HAS_GGUF, reason="the gguf package is not installed (pip install gguf)")

BAR = 2e-6  # of the largest element, against float64 on the dequantised weight
COMPILED = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
OTHERS = ["IQ4_NL", "Q2_K"]  # read by the gguf package in numpy and by ggml in graphs
# where the half-precision scales of a block stand, and how many
SCALES = {"Q6_K": (208, 1), "Q2_K": (80, 2)} | dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
TABLES = ["reference", "accelerated", "graph-cpu", "graph-native"]
if PURE:
    TABLES = ["reference"]


def random_matrix(rng, kind, shape):
    """A QuantizedMatrix of random bits with moderate scales."""
    n_out, n_in = shape
    if kind in ("F32", "F16", "BF16"):
        numbers = rng.standard_normal(shape).astype(np.float32)
        if kind == "BF16":
            raw = (numbers.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        else:
            raw = numbers.astype("<f2" if kind == "F16" else "<f4").view(np.uint8)
        return QuantizedMatrix(raw, kind, shape)
    block = TYPES[kind]
    raw = rng.integers(0, 256, (n_out, n_in // block.block, block.n_bytes), np.uint8)
    at, n_scales = SCALES.get(kind, (0, 1))
    scales = rng.uniform(-0.05, 0.05, (*raw.shape[:2], n_scales)).astype("<f2")
    raw[..., at : at + 2 * n_scales] = scales.view(np.uint8)
    return QuantizedMatrix(raw.reshape(n_out, -1), kind, shape)


def aligned(raw):
    """A copy that begins at a multiple of 32 bytes, as mapped tensors must."""
    memory = np.empty(raw.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 32
    memory[start : start + raw.nbytes] = raw.reshape(-1)
    return memory[start : start + raw.nbytes]


# ----------------------------------------------------------------------------------------------------------------------
# what the bytes stand for
# ----------------------------------------------------------------------------------------------------------------------


def by_the_gguf_package(raw, kind):
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    import gguf

    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


@needs_kernels
@needs_gguf_package
@pytest.mark.parametrize("kind", COMPILED)
def test_every_bit_of_any_bytes_is_that_of_the_gguf_package(kind):
    """Random bytes: scales of any size and sign, subnormal, infinite and NaN ones among them."""
    from toy._kernels import quantized as kernels

    block, rng = TYPES[kind], np.random.default_rng(1)
    for n_blocks in (1, 2, 3, 11):
        raw = rng.integers(0, 256, (3000 // n_blocks, n_blocks * block.n_bytes), np.uint8)
        expected, found = by_the_gguf_package(raw, kind), np.empty((len(raw), n_blocks * block.block), np.float32)
        kernels.dequantize(raw, kind, found)
        number = ~np.isnan(expected)
        assert np.array_equal(np.isnan(found), ~number)
        assert np.array_equal(found[number].view(np.uint32), expected[number].view(np.uint32))
        assert np.unique(found[number]).size > 100


@needs_kernels
def test_all_half_precision_numbers():
    """Each as a number, and as the scale of a block."""
    from toy._kernels import quantized as kernels

    halves = np.arange(2**16, dtype="<u2")
    expected = halves.view("<f2").astype(np.float32)
    found = np.empty((2**13, 8), np.float32)
    kernels.dequantize(halves.view(np.uint8).reshape(-1, 16), "F16", found)
    assert np.array_equal(found.reshape(-1), expected, equal_nan=True)
    odd = np.empty((2**16, 1), np.float32)
    kernels.dequantize(halves.view(np.uint8).reshape(-1, 2), "F16", odd)
    assert np.array_equal(odd[:, 0], expected, equal_nan=True)
    blocks = np.ones((2**16, 34), np.uint8)
    blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    found = np.empty((2**16, 32), np.float32)
    kernels.dequantize(blocks, "Q8_0", found)
    assert np.array_equal(found, np.repeat(expected[:, None], 32, axis=1), equal_nan=True)


@needs_kernels
def test_the_compiled_types_are_those_of_the_table():
    from toy._kernels import quantized as kernels

    assert sorted(kernels.TYPES) == sorted(COMPILED)
    assert {name: TYPES[name].code for name in COMPILED} == kernels.TYPES


@needs_kernels
def test_the_kernels_check_what_they_are_given():
    from toy._kernels import quantized as kernels

    raw, x = np.zeros((4, 40), np.uint8), np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="no compiled kernel for the type 'Q2_K'"):
        kernels.linear(x, raw, "Q2_K", None)
    with pytest.raises(ValueError, match="uint8"):
        kernels.linear(x, raw.astype(np.int8), "Q4_1", None)
    with pytest.raises(ValueError, match="C-contiguous"):
        kernels.linear(x, np.zeros((4, 80), np.uint8)[:, ::2], "Q4_1", None)
    with pytest.raises(ValueError, match="rows of 41 bytes, expected a multiple of 20"):
        kernels.linear(x, np.zeros((4, 41), np.uint8), "Q4_1", None)
    with pytest.raises(ValueError, match=r"x: .* expected \(any, 64\)"):
        kernels.linear(x[:, :32], raw, "Q4_1", None)
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(x, raw, "Q4_1", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"d_y: .* expected \(any, 4\)"):
        kernels.linear_backward(x, raw, "Q4_1", None)
    with pytest.raises(ValueError, match="element 1 is 4"):
        kernels.embedding(np.array([0, 4]), raw, "Q4_1")
    out = np.zeros((4, 64), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kernels.dequantize(raw, "Q4_1", out)


# ----------------------------------------------------------------------------------------------------------------------
# QuantizedMatrix
# ----------------------------------------------------------------------------------------------------------------------


@needs_gguf_package
@pytest.mark.parametrize("kind", ["F32", *COMPILED, *OTHERS])
def test_a_matrix_gives_its_rows(kind):
    matrix = random_matrix(np.random.default_rng(0), kind, (50, 512))
    whole = matrix.dequantize()
    assert whole.shape == matrix.shape == (50, 512) and whole.dtype == matrix.dtype == np.float32
    assert (matrix.ndim, matrix.size, matrix.nbytes) == (2, 50 * 512, matrix.raw.nbytes)
    assert np.isfinite(whole).all() and np.abs(whole).max() > 0.1
    if kind != "F32":
        assert np.array_equal(whole, by_the_gguf_package(matrix.raw, kind))
    assert np.array_equal(matrix.rows(3, 17), whole[3:17])
    assert matrix.rows(5, 5).shape == (0, 512)
    out = np.full((50, 512), np.nan, np.float32)
    assert matrix.rows(0, 50, out) is out and np.array_equal(out, whole)
    assert np.array_equal(matrix.take([49, 0, 49]), whole[[49, 0, 49]])
    bands = matrix.bands()
    assert np.array_equal(np.concatenate([matrix.rows(b.start, b.stop) for b in bands]), whole)
    assert repr(matrix) == f"QuantizedMatrix(50 x 512 {kind}, {matrix.nbytes:,} bytes)"


def test_bands_cover_a_large_matrix_in_pieces():
    matrix = QuantizedMatrix(np.zeros((5000, 1088), np.uint8), "Q8_0", (5000, 1024))
    bands = matrix.bands()
    assert len(bands) > 2 and [b.start for b in bands[1:]] == [b.stop for b in bands[:-1]]
    assert (bands[0].start, bands[-1].stop) == (0, 5000)


def test_the_bytes_are_not_copied_and_become_read_only():
    raw = np.zeros((4, 34), np.uint8)
    matrix = QuantizedMatrix(raw, "Q8_0", (4, 32))
    assert np.shares_memory(matrix.raw, raw) and not matrix.raw.flags.writeable and raw.flags.writeable


def test_wrong_arguments_are_named():
    raw = np.zeros((4, 34), np.uint8)
    for kind in ("I32", "F64", "Q8_1", "Q9_Z"):
        with pytest.raises(ValueError, match=f"must be one of F32, .*got '{kind}'"):
            QuantizedMatrix(raw, kind, (4, 32))
    with pytest.raises(ValueError, match=r"shape \(out, in\)"):
        QuantizedMatrix(raw, "Q8_0", (4, 32, 1))
    with pytest.raises(ValueError, match="blocks of 32 numbers; got rows of 33"):
        QuantizedMatrix(raw, "Q8_0", (4, 33))
    for wrong in (raw[:3], raw.astype(np.int8), np.zeros((4, 68), np.uint8)[:, ::2], raw.tobytes()):
        with pytest.raises(ValueError, match=r"raw must be C-contiguous uint8 \(4, 34\)"):
            QuantizedMatrix(wrong, "Q8_0", (4, 32))
    matrix = QuantizedMatrix(raw, "Q8_0", (4, 32))
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="inside 0:4"):
            matrix.rows(start, stop)
    with pytest.raises(ValueError, match="out must be"):
        matrix.rows(0, 2, np.zeros((2, 32)))
    for ids in ([-1], [4]):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 4\)"):
            matrix.take(ids)
    with pytest.raises(ValueError, match="vector of whole numbers"):
        matrix.take([0.5])


@needs_gguf_package
def test_without_the_kernels_the_numbers_are_the_same(monkeypatch):
    matrix = random_matrix(np.random.default_rng(0), "Q4_K", (70, 512))
    expected = matrix.dequantize()
    monkeypatch.setenv("TOY_PURE_PYTHON", "1")
    quantized._kernels.cache_clear()
    try:
        assert quantized._kernels() is None
        assert np.array_equal(matrix.dequantize(), expected)
    finally:
        monkeypatch.undo()
        quantized._kernels.cache_clear()
    assert PURE or quantized._kernels() is not None


def gguf_file(path, tensors):
    """A GGUF file of (name, code, shape, bytes), each tensor right after the one before: alignment 8."""

    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 2)
    head += string("general.architecture") + struct.pack("<I", 8) + string("llama")
    head += string("general.alignment") + struct.pack("<II", 4, 8)
    data = b""
    for name, code, shape, content in tensors:
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", code, len(data))
        data += content + bytes(-len(content) % 8)
    path.write_bytes(head + bytes(-len(head) % 8) + data)
    return path


def test_tensors_of_a_file_as_leaves(tmp_path):
    rng = np.random.default_rng(0)
    quants, halves = random_matrix(rng, "Q8_0", (6, 64)), random_matrix(rng, "F16", (3, 5))
    plain, vector = rng.standard_normal((4, 3)).astype("<f4"), rng.standard_normal(7).astype("<f2")
    tensors = [
        ("q", 8, (6, 64), quants.raw.tobytes()),
        ("h", 1, (3, 5), halves.raw.tobytes()),
        ("f", 0, (4, 3), plain.tobytes()),
        ("v", 1, (7,), vector.tobytes()),
        ("i", 26, (2, 2), bytes(16)),
    ]
    with toy.GGUF.open(gguf_file(tmp_path / "m.gguf", tensors)) as gguf:
        q, h, f, v = (gguf.matrix(name) for name in "qhfv")
        assert (q.type, q.shape, h.type, h.shape) == ("Q8_0", (6, 64), "F16", (3, 5))
        assert np.shares_memory(q.raw, gguf.raw("q")) and np.shares_memory(f, gguf.raw("f"))
        assert np.array_equal(q.dequantize(), gguf.dequantize("q"))
        assert np.array_equal(h.dequantize(), halves.dequantize())
        assert np.array_equal(f, plain) and f.dtype == np.float32 and not f.flags.writeable
        assert np.array_equal(v, vector.astype(np.float32)) and not v.flags.writeable
        with pytest.raises(ValueError, match="no tensor 'w'"):
            gguf.matrix("w")
        with pytest.raises(ValueError, match=r"tensor 'i': .*got 'I32'"):
            gguf.matrix("i")


# ----------------------------------------------------------------------------------------------------------------------
# the ops, on every table
# ----------------------------------------------------------------------------------------------------------------------


def with_ops(table, n_threads, record):
    """record(ops, leaf, array, integers, gradient) records or computes; it returns a dict of results, given back as arrays.

    leaf(matrix): a weight as the table takes it; array(numpy array): an activation; integers(ids, limit): token ids;
    gradient(parameter): something to collect the gradient of a bias in, and what it holds at the end as a result.
    """
    if not table.startswith("graph"):
        ops = importlib.import_module(f"toy.ops.{table}")
        before = ops.get_num_threads() if table == "accelerated" else None
        if before:
            ops.set_num_threads(n_threads)
        try:
            return record(ops, lambda m: m, lambda a: a, lambda ids, limit: ids, lambda p: np.zeros_like(p))
        finally:
            if before:
                ops.set_num_threads(before)
    import ggml_bridge
    from toy.ops import graph as graph_ops

    class_ = graph_ops.CpuGraphOps if table == "graph-cpu" else graph_ops.NativeGraphOps
    with ggml_bridge.Backend("cpu", n_threads) as backend:
        graph, kept = backend.graph(), {}
        ops = class_(graph)

        def leaf(matrix):
            return backend.mapped(aligned(matrix.raw), matrix.shape, matrix.type.lower())

        def integers(ids, limit):
            kept["token_ids"] = ids
            return ops.integers("token_ids", len(ids), limit)

        def gradient(parameter):
            return ops.slots.setdefault(id(parameter), graph_ops.Slot("bias", parameter))

        results = record(ops, leaf, ops.constant, integers, gradient)
        results = {
            name: result.tensor if isinstance(result, graph_ops.Slot) else result for name, result in results.items()
        }
        for tensor in results.values():
            graph.output(tensor)
        graph.allocate()
        if table == "graph-native":
            assert ggml_bridge.metal_unsupported(graph) == []
            assert ggml_bridge.cuda_unsupported(graph) == []
        for tensor, value in ops.feeds:
            value = value(kept) if callable(value) else value
            tensor.upload(np.ascontiguousarray(value, np.int32 if tensor.dtype == "i32" else np.float32))
        ops.compute()
        return {name: tensor.download() for name, tensor in results.items()}


def assert_close(found, expected, bar=BAR, size=0.0):
    """size: of a sum of such terms with random signs: what counts where the few numbers there are happen to be small."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bar * max(np.abs(expected).max(), np.max(size))


def check_linear(table, kind, n, n_out, n_in, bias, n_threads, seed=0):
    """Forward, backward and the gradient of a bias; x and d_y are columns of wider matrices."""
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, kind, (n_out, n_in))
    wide, d_wide = rng.standard_normal((n, n_in + 9)).astype("f"), rng.standard_normal((n, n_out + 5)).astype("f")
    b = rng.standard_normal(n_out).astype("f") if bias else None

    def record(ops, leaf, array, integers, gradient):
        weight, b_ = leaf(matrix), None if b is None else array(b)
        d_bias = None if b is None else gradient(b_)
        x = ops.split(array(wide), (3, n_in, 6))[1]
        d_y = ops.split(array(d_wide), (n_out, 5))[0]
        y, cache = ops.linear(x, weight, b_)
        d_x = ops.linear_backward(d_y, cache, None, d_bias)
        return {"y": y, "d_x": d_x} | ({} if b is None else {"d_bias": d_bias})

    found = with_ops(table, n_threads, record)
    x, d_y, w = (a.astype(np.float64) for a in (wide[:, 3 : 3 + n_in], d_wide[:, :n_out], matrix.dequantize()))
    assert found["y"].dtype == found["d_x"].dtype == np.float32
    assert_close(found["y"], x @ w.T + (0 if b is None else b), size=np.sqrt(x**2 @ (w**2).T))
    assert_close(found["d_x"], d_y @ w, size=np.sqrt(d_y**2 @ w**2))
    if bias:
        assert_close(found["d_bias"], d_y.sum(axis=0), size=np.sqrt((d_y**2).sum(axis=0)))


@st.composite
def linear_shapes(draw):
    kind = draw(st.sampled_from(["F16", "Q4_1", "Q8_0", "Q5_0", "Q6_K", "IQ4_NL"]))
    block = TYPES[kind].block
    n_in = draw(st.integers(1, 90)) if block == 1 else block * draw(st.integers(1, 3 if block == 256 else 9))
    n_out = draw(st.one_of(st.integers(1, 130), st.sampled_from([31, 64, 65])))
    n = draw(st.one_of(st.integers(1, 6), st.integers(7, 70)))
    return {
        "kind": kind,
        "n": n,
        "n_out": n_out,
        "n_in": n_in,
        "bias": draw(st.booleans()),
        "n_threads": draw(st.sampled_from([1, 2])),
    }


@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
@given(case=linear_shapes(), seed=st.integers(0, 2**16))
def test_linear(table, case, seed):
    check_linear(table, seed=seed, **case)


@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q2_K"]
)
def test_linear_of_every_type(table, kind):
    for n in (1, 33):
        check_linear(table, kind, n, 70, 512, True, 1)


@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("n", "n_out", "n_in", "n_threads"),
    [(1, 3001, 2560, 2), (2, 37, 5120, 2), (40, 3001, 2560, 2), (200, 1500, 2816, 2), (17, 9001, 256, 1)],
)
def test_linear_in_several_bands(table, n, n_out, n_in, n_threads):
    check_linear(table, "Q4_K" if n > 20 else "Q8_0", n, n_out, n_in, n < 20, n_threads)


@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16", "IQ4_NL"])
def test_embedding(table, kind):
    rng = np.random.default_rng(0)
    matrix, ids = random_matrix(rng, kind, (300, 256)), rng.integers(0, 300, 77)

    def record(ops, leaf, array, integers, gradient):
        rows, cache = ops.embedding(integers(ids, 300), leaf(matrix))
        ops.embedding_backward(rows, cache, None)
        return {"rows": rows}

    found = with_ops(table, 1, record)["rows"]
    assert np.array_equal(found, matrix.dequantize()[ids])


@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
def test_a_tied_model_of_two_layers(table):
    """Several products with weights of different types in one graph, whose memory is used again and again."""
    rng = np.random.default_rng(0)
    table_, up, down = (
        random_matrix(rng, kind, shape)
        for kind, shape in (("Q8_0", (500, 64)), ("Q4_1", (160, 64)), ("Q5_1", (64, 160)))
    )
    ids, d_logits = rng.integers(0, 500, 24), rng.standard_normal((24, 500)).astype("f")

    def record(ops, leaf, array, integers, gradient):
        e, w_up, w_down = leaf(table_), leaf(up), leaf(down)
        x, looked_up = ops.embedding(integers(ids, 500), e)
        hidden, first = ops.linear(x, w_up)
        back, second = ops.linear(hidden, w_down)
        stream = ops.add(x, back)
        logits, last = ops.linear(stream, e)
        d_stream = ops.linear_backward(array(d_logits), last, None)
        d_hidden = ops.linear_backward(d_stream, second, None)
        d_x = ops.add(d_stream, ops.linear_backward(d_hidden, first, None))
        ops.embedding_backward(d_x, looked_up, None)
        return {"logits": logits, "d_x": d_x}

    found = with_ops(table, 2, record)
    e, u, d = (m.dequantize().astype(np.float64) for m in (table_, up, down))
    x = e[ids]
    assert_close(found["logits"], (x + x @ u.T @ d.T) @ e.T)
    d_stream = d_logits @ e
    assert_close(found["d_x"], d_stream + d_stream @ d @ u)


def test_float64_activations_stay_float64():
    rng = np.random.default_rng(0)
    matrix, x = random_matrix(rng, "F16", (8, 5)), rng.standard_normal((4, 5))
    y, cache = reference.linear(x, matrix)
    d_x = reference.linear_backward(y, cache, None)
    w = matrix.dequantize().astype(np.float64)
    assert y.dtype == d_x.dtype == np.float64
    assert_close(y, x @ w.T, 1e-14)
    assert_close(d_x, y @ w, 1e-14)


@pytest.mark.parametrize("table", TABLES)
def test_the_cache_does_not_keep_the_activations(table):
    if table.startswith("graph"):  # there memory goes by what later nodes read
        import ggml_bridge
        from toy.ops import graph as graph_ops

        def bytes_of(kind):
            with ggml_bridge.Backend("cpu", 1) as backend:
                class_ = graph_ops.CpuGraphOps if table == "graph-cpu" else graph_ops.NativeGraphOps
                graph = backend.graph()
                ops = class_(graph)
                weights = [backend.persistent((64, 64), kind) for _ in range(20)]
                x, caches = graph.scale(graph.input((1024, 64)), 2.0), []
                for weight in weights:
                    x, cache = ops.linear(x, weight)
                    caches.append(cache)
                for cache in reversed(caches):
                    x = ops.linear_backward(x, cache, None)
                graph.output(x)
                graph.allocate()
                return graph.memory_bytes

        assert bytes_of("q8_0") < 8 * 1024 * 64 * 4  # not 20 times
        return
    ops = importlib.import_module(f"toy.ops.{table}")
    x = np.ones((3, 32), np.float32)
    _, cache = ops.linear(x, QuantizedMatrix(np.zeros((4, 34), np.uint8), "Q8_0", (4, 32)))
    assert not any(part is x for part in cache)


@pytest.mark.parametrize("table", TABLES)
def test_a_gradient_of_a_quantised_weight_is_refused(table):
    matrix = QuantizedMatrix(np.zeros((4, 34), np.uint8), "Q8_0", (4, 32))
    x, ids, d = np.ones((2, 32), np.float32), np.array([1, 3]), np.zeros((4, 32), np.float32)

    def through_linear(ops, leaf, array, integers, gradient):
        y, cache = ops.linear(array(x), leaf(matrix))
        return {"d_x": ops.linear_backward(y, cache, array(d), None)}

    def through_embedding(ops, leaf, array, integers, gradient):
        rows, cache = ops.embedding(integers(ids, 4), leaf(matrix))
        ops.embedding_backward(rows, cache, array(d))
        return {"rows": rows}

    def by_slot(ops, leaf, array, integers, gradient):
        weight = leaf(matrix)
        gradient(weight)
        return {"y": ops.linear(array(x), weight)[0]}

    for record in (through_linear, through_embedding) + ((by_slot,) if table.startswith("graph") else ()):
        with pytest.raises(ValueError, match="a quantised weight is frozen and has no gradient"):
            with_ops(table, 1, record)


@needs_kernels
def test_types_that_ggml_does_not_hold_are_named():
    import ggml_bridge

    with ggml_bridge.Backend("cpu", 1) as backend, pytest.raises(ValueError, match="dtype 'q9_z' is unknown"):
        backend.persistent((4, 32), "q9_z")


@needs_kernels
@needs_gguf_package
def test_ids_out_of_range_are_refused_on_every_eager_table(ops):
    for kind in ("Q8_0", "IQ4_NL"):
        matrix = random_matrix(np.random.default_rng(0), kind, (5, 32))
        for ids in ([5], [-1]):
            with pytest.raises(ValueError, match=r"-1|5"):
                ops.embedding(np.array(ids), matrix)


# ----------------------------------------------------------------------------------------------------------------------
# memory
# ----------------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_quantized import QuantizedMatrix, aligned, check_linear, with_ops

n_out, n_in, n = 40000, 1024, 4  # 43 MB as stored, 164 MB in float32
block = np.frombuffer(np.float16(0.01).tobytes() + bytes(range(32)), np.uint8)
raw = np.tile(block, (n_out, n_in // 32))
matrix = QuantizedMatrix(raw, "Q8_0", (n_out, n_in))
x, d_y = np.ones((n, n_in), "f"), np.ones((n, n_out), "f")

def record(ops, leaf, array, integers, gradient):
    y, cache = ops.linear(array(x), leaf(matrix))
    return {"y": y, "d_x": ops.linear_backward(array(d_y), cache, None)}

check_linear(sys.argv[1], "F16", 4, 40, 64, False, 1)  # everything is imported
copy = aligned(raw) if sys.argv[1].startswith("graph") else None  # and the copy that with_ops makes is paid for
del copy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = with_ops(sys.argv[1], 1, record)
assert np.allclose(found["y"], 0.01 * sum(range(32)) * n_in / 32, rtol=1e-3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the pages of this process as Linux does")
@needs_gguf_package
@pytest.mark.parametrize("table", TABLES)
def test_a_product_never_holds_the_whole_matrix(table):
    folder = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", PEAK, table, folder], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60_000, f"{run.stdout} kB more than before, the matrix takes 164,000"
