"""Graph: every constructor against numpy, the memory plan, writing nodes, kernels, and what is refused."""

import ctypes
import sys
import textwrap

import numpy as np
import pytest
from bridge_support import needs_ggml, relative_error, run_graph
from hypothesis import given
from hypothesis import strategies as st

import ggml_bridge

pytestmark = needs_ggml

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


A, B, ROW, COLUMN = normal(2, 3, 4, 6), normal(2, 3, 4, 6), normal(6), normal(2, 3, 4, 1)
M, N = normal(5, 8), normal(7, 8)

CASES = {
    "add": (lambda g, a, b: g.add(a, b), lambda a, b: a + b, (A, B)),
    "add a row": (lambda g, a, b: g.add(a, b), lambda a, b: a + b, (A, ROW)),
    "add a column": (lambda g, a, b: g.add(a, b), lambda a, b: a + b, (A, COLUMN)),
    "sub": (lambda g, a, b: g.sub(a, b), lambda a, b: a - b, (A, B)),
    "mul": (lambda g, a, b: g.mul(a, b), lambda a, b: a * b, (A, B)),
    "div": (lambda g, a, b: g.div(a, b), lambda a, b: a / b, (A, np.exp(B))),
    "scale": (lambda g, a: g.scale(a, -2.5, 0.5), lambda a: -2.5 * a + 0.5, (A,)),
    "sqr": (lambda g, a: g.sqr(a), lambda a: a * a, (A,)),
    "sqrt": (lambda g, a: g.sqrt(a), np.sqrt, (np.exp(A),)),
    "log": (lambda g, a: g.log(a), np.log, (np.exp(A),)),
    "sin": (lambda g, a: g.sin(a), np.sin, (A,)),
    "cos": (lambda g, a: g.cos(a), np.cos, (A,)),
    "tanh": (lambda g, a: g.tanh(a), np.tanh, (A,)),
    "exp": (lambda g, a: g.exp(a), np.exp, (A,)),
    "expm1": (lambda g, a: g.unary(a, "expm1"), np.expm1, (A,)),
    "neg": (lambda g, a: g.neg(a), np.negative, (A,)),
    "abs": (lambda g, a: g.unary(a, "abs"), np.abs, (A,)),
    "sgn": (lambda g, a: g.unary(a, "sgn"), np.sign, (A,)),
    "step": (lambda g, a: g.unary(a, "step"), lambda a: (a > 0) * 1.0, (A,)),
    "relu": (lambda g, a: g.relu(a), lambda a: np.maximum(a, 0), (A,)),
    "sigmoid": (lambda g, a: g.sigmoid(a), sigmoid, (A,)),
    "softplus": (lambda g, a: g.unary(a, "softplus"), lambda a: np.log1p(np.exp(a)), (A,)),
    "silu": (lambda g, a: g.silu(a), lambda a: a * sigmoid(a), (A,)),
    "silu_back": (
        lambda g, d, x: g.silu_back(d, x),
        lambda d, x: d * sigmoid(x) * (1 + x * (1 - sigmoid(x))),
        (A, B),
    ),
    "swiglu": (lambda g, a, b: g.swiglu(a, b), lambda a, b: a * sigmoid(a) * b, (A, B)),
    "sum": (lambda g, a: g.sum(a), lambda a: a.sum(keepdims=True).reshape(1), (A,)),
    "sum_rows": (lambda g, a: g.sum_rows(a), lambda a: a.sum(-1, keepdims=True), (A,)),
    "mean": (lambda g, a: g.mean(a), lambda a: a.mean(-1, keepdims=True), (A,)),
    "cumsum": (lambda g, a: g.cumsum(a), lambda a: a.cumsum(-1), (A,)),
    "argmax": (lambda g, a: g.argmax(a), lambda a: a.argmax(-1), (M,)),
    "mul_mat": (lambda g, w, x: g.mul_mat(w, x), lambda w, x: x @ w.T, (M, N)),
    "mul_mat of batches": (lambda g, w, x: g.mul_mat(w, x), lambda w, x: x @ w.swapaxes(-1, -2), (A, B)),
    "mul_mat with a shared matrix": (
        lambda g, w, x: g.mul_mat(w, x),
        lambda w, x: x @ w.swapaxes(-1, -2),
        (normal(2, 1, 5, 6), B),
    ),
    "mul_mat of slices": (
        lambda g, w, x: g.mul_mat(g.slice(w, 1, 2, 6), g.slice(x, 1, 0, 4)),
        lambda w, x: x[:, 0:4] @ w[:, 2:6].T,
        (M, N),
    ),
    "norm": (
        lambda g, a: g.norm(a, 1e-3),
        lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-3),
        (A,),
    ),
    "rms_norm": (
        lambda g, a: g.rms_norm(a, 1e-3),
        lambda a: a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-3),
        (A,),
    ),
    "soft_max_ext": (lambda g, a: g.soft_max_ext(a, scale=0.3), lambda a: softmax(0.3 * a), (A,)),
    "soft_max_ext with a mask": (
        lambda g, a, m: g.soft_max_ext(a, m, 0.3),
        lambda a, m: softmax(0.3 * a + m),
        (A, np.where(np.tri(4, 6, 2), 0, -np.inf).astype(np.float32)),
    ),
    "slice of rows": (lambda g, a: g.cont(g.slice(a, 2, 1, 3)), lambda a: a[:, :, 1:3], (A,)),
    "slice of columns": (lambda g, a: g.cont(g.slice(a, -1, 1, 5)), lambda a: a[..., 1:5], (A,)),
    "slice of a transposed view": (
        lambda g, a: g.cont(g.slice(g.slice(g.transpose(a), 1, 1, 4), 0, 2, 3)),
        lambda a: a.T[:, 1:4][2:3],
        (M,),
    ),
    "reshape": (lambda g, a: g.reshape(a, (6, 24)), lambda a: a.reshape(6, 24), (A,)),
    "permute": (lambda g, a: g.cont(g.permute(a, (2, 0, 3, 1))), lambda a: a.transpose(2, 0, 3, 1), (A,)),
    "permute of three axes": (lambda g, a: g.cont(g.permute(a, (2, 0, 1))), lambda a: a.transpose(2, 0, 1), (A[0],)),
    "transpose": (lambda g, a: g.cont(g.transpose(a)), lambda a: a.swapaxes(-1, -2), (A,)),
    "transposed": (lambda g, a: g.transposed(a), lambda a: a.swapaxes(-1, -2), (A,)),
    "transposed of one column": (lambda g, a: g.transposed(a), lambda a: a.T, (normal(5, 1),)),
    "cont to a shape": (lambda g, a: g.cont(g.transpose(a), (4, 10)), lambda a: a.T.reshape(4, 10), (M,)),
    "concat of columns": (lambda g, a, b: g.concat(a, b), lambda a, b: np.concatenate([a, b], -1), (A, B)),
    "concat of rows": (lambda g, a, b: g.concat(a, b, 0), lambda a, b: np.concatenate([a, b], 0), (M, N)),
    "repeat": (lambda g, a: g.repeat(a, (10, 24)), lambda a: np.tile(a, (2, 3)), (M,)),
    "full": (lambda g, a: g.add(a, g.full((8,), 2.5)), lambda a: a + 2.5, (M,)),
    "get_rows": (lambda g, a, i: g.get_rows(a, i), lambda a, i: a[i], (M, np.array([4, 0, 4, 2]))),
    "get_rows of batches": (
        lambda g, a, i: g.get_rows(a, i),
        lambda a, i: np.stack([a[0][i[0]], a[1][i[1]]]),
        (A[0, :2], np.array([[3, 0, 1], [2, 2, 1]])),
    ),
    "get_rows by argmax": (lambda g, a, b: g.get_rows(a, g.argmax(b)), lambda a, b: a[b.argmax(1)], (normal(8, 3), M)),
    "set_rows": (
        lambda g, a, r, i: g.set_rows(g.scale(a, 1.0), r, i),
        lambda a, r, i: np.stack([r[0], a[1], r[1], a[3], a[4]]),
        (M, N[:2], np.array([0, 2])),
    ),
    "set_rows of batches": (
        lambda g, a, r, i: g.set_rows(g.scale(a, 1.0), r, i),
        lambda a, r, i: np.stack([np.where(np.arange(8) == i[n], r[n, 0], a[n, :, 0]) for n in range(5)])[..., None],
        (M[..., None], normal(5, 1, 1), np.array([[7], [0], [3], [3], [1]])),
    ),
    "casts": (
        lambda g, a: g.cast(g.cast(a, "f16"), "f32"),
        lambda a: a.astype(np.float16).astype(np.float32),
        (M,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_constructor_against_numpy(case, n_threads):
    build, expected, arrays = CASES[case]
    got = run_graph(build, *arrays, n_threads=n_threads)
    want = expected(*[a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays])
    assert relative_error(got, want) < 1e-6


def test_every_constructor_is_tested():
    methods = {name for name in dir(ggml_bridge.Graph) if not name.startswith("_")}
    attributes = {"backend", "capacity", "check_idle", "closed", "is_allocated", "memory_bytes", "n_recorded"}
    elsewhere = {
        "allocate",
        "clear",
        "close",
        "compute",
        "describe",
        "explain",
        "geglu",  # a table of float16 numbers: test_decoding.py
        "input",
        "limit",
        "on_upload",
        "output",
    }
    elsewhere |= {"add_into", "blank", "cpy", "custom", "custom_into", "fill_into", "opt_step_adamw"}
    here = {name.split()[0] for name in CASES} | {"unary", "cast", "set_name", "rope", "rope_back"}
    assert methods - attributes - elsewhere <= here


def test_rope_rotates_interleaved_pairs_and_back():
    x, positions = normal(5, 3, 8), np.array([0, 1, 7, 2, 100])
    turned, back = run_graph(
        lambda g, x, p: (y := g.rope(x, p, base=1000.0), g.rope_back(y, p, base=1000.0)), x, positions
    )
    angle = positions[:, None, None] * 1000.0 ** (-np.arange(0, 8, 2) / 8)
    even, odd = x[..., 0::2], x[..., 1::2]
    expected = np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1)
    assert relative_error(turned, expected.reshape(x.shape)) < 1e-5
    assert relative_error(back, x) < 1e-5


def test_rope_rotates_halves_with_factors_and_a_magnitude_and_back():
    x, positions, factors = normal(5, 3, 8), np.array([0, 1, 7, 2, 100]), np.array([1.0, 2.5, 8.0, 3.0], np.float32)
    options = {"base": 1000.0, "halves": True, "magnitude": 1.5}
    turned, back = run_graph(
        lambda g, x, p, f: (y := g.rope(x, p, factors=f, **options), g.rope_back(y, p, factors=f, **options)),
        x,
        positions,
        factors,
    )
    angle = positions[:, None, None] * 1000.0 ** (-np.arange(0, 8, 2) / 8) / factors
    a, b = x[..., :4], x[..., 4:]
    expected = 1.5 * np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
    assert relative_error(turned, expected) < 1e-5
    assert relative_error(back, 1.5**2 * x) < 1e-5


def test_rope_of_a_part_of_the_head():
    x = normal(2, 1, 8)
    turned = run_graph(lambda g, x, p: g.rope(x, p, 4), x, np.array([3, 5]))
    assert np.array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[..., :4], x[..., :4])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_weights(dtype):
    with ggml_bridge.Backend("cpu", 1) as backend:
        w = backend.persistent((5, 64), dtype)
        g = backend.graph()
        x = g.input((3, 64))
        y = g.output(g.mul_mat(w, x))
        table = g.output(g.get_rows(w, ids := g.input((2,), "i32")))
        g.allocate()
        weights, activations = normal(5, 64), normal(3, 64)
        w.upload(weights)
        x.upload(activations)
        ids.upload([4, 1])
        g.compute()
        stored = w.download()
        assert relative_error(stored, weights) < {"f16": 5e-4, "bf16": 4e-3}[dtype]
        assert np.array_equal(table.download(), stored[[4, 1]])
        assert relative_error(y.download(), activations @ stored.T) < 5e-3  # ggml rounds the activations too


def test_quantized_and_mapped_weights():
    # q8_0: blocks of 32 numbers, a float16 scale and 32 int8
    scale, numbers = np.float16(0.5), rng.integers(-127, 128, (4, 32)).astype(np.int8)
    raw = np.concatenate([np.full((4, 1), scale).view(np.int8), numbers], axis=1)
    assert raw.shape == (4, 34)
    values = numbers.astype(np.float32) * 0.5
    memory = np.zeros(raw.size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + raw.size]
    aligned[:] = raw.reshape(-1).view(np.uint8)
    with ggml_bridge.Backend("cpu", 1) as backend:
        uploaded = backend.persistent((4, 32), "q8_0")
        mapped = backend.mapped(aligned, (4, 32), "q8_0")
        g = backend.graph()
        out = [g.output(g.get_rows(w, ids)) for ids in [g.input((4,), "i32")] for w in (uploaded, mapped)]
        g.allocate()
        uploaded.upload(raw)
        ids = np.arange(4)
        with pytest.raises(RuntimeError, match="never uploaded"):
            g.compute()
        # the only input of this graph
        g.describe()
        del ids
    with ggml_bridge.Backend("cpu", 1) as backend:
        mapped = backend.mapped(aligned, (4, 32), "q8_0", name="base")
        g = backend.graph()
        ids = g.input((4,), "i32")
        rows = g.output(g.get_rows(mapped, ids))
        product = g.output(g.mul_mat(mapped, x := g.input((2, 32))))
        with pytest.raises(ValueError, match="mapped memory"):
            g.fill_into(backend.mapped(aligned[:64].view(np.float32), (4, 4), "f32"), 1.0)
        g.allocate()
        ids.upload(np.arange(4))
        x.upload(activations := normal(2, 32))
        g.compute()
        assert np.array_equal(rows.download(), values)
        assert relative_error(product.download(), activations @ values.T) < 1e-2
        assert out  # handles of a closed backend may be kept


def random_views(data, ndim):
    """A list of (function of graph and tensor, the same in numpy): slices and orders of axes."""
    steps = []
    for _ in range(data.draw(st.integers(0, 4))):
        if data.draw(st.booleans()):
            axes = tuple(data.draw(st.permutations(range(ndim))))
            steps.append((lambda g, t, axes=axes: g.permute(t, axes), lambda a, axes=axes: a.transpose(axes)))
        else:
            axis, start, length = (data.draw(st.integers(0, most)) for most in (ndim - 1, 3, 4))

            def bounds(shape, axis=axis, start=start, length=length):
                first = min(start, shape[axis] - 1)
                return axis, first, min(first + length + 1, shape[axis])

            def cut(a, bounds=bounds):
                axis, first, last = bounds(a.shape)
                return a[(slice(None),) * axis + (slice(first, last),)]

            steps.append((lambda g, t, bounds=bounds: g.slice(t, *bounds(t.shape)), cut))
    return steps


VIEWED = {
    "cont": (lambda g, a, b: g.cont(a), lambda a, b: a),
    "add": (lambda g, a, b: g.add(a, b), lambda a, b: a + b),
    "mul": (lambda g, a, b: g.mul(a, b), lambda a, b: a * b),
    "div": (lambda g, a, b: g.div(a, b), lambda a, b: a / b),
    "add of a broadcast view": (lambda g, a, b: g.add(a, g.slice(b, -1, 0, 1)), lambda a, b: a + b[..., :1]),
    "scale": (lambda g, a, b: g.scale(a, 2.0, 1.0), lambda a, b: 2 * a + 1),
    "sqr": (lambda g, a, b: g.sqr(a), lambda a, b: a * a),
    "log": (lambda g, a, b: g.log(a), lambda a, b: np.log(a)),
    "tanh": (lambda g, a, b: g.tanh(a), lambda a, b: np.tanh(a)),
    "silu": (lambda g, a, b: g.silu(a), lambda a, b: a * sigmoid(a)),
    "silu_back": (lambda g, a, b: g.silu_back(a, b), lambda a, b: a * sigmoid(b) * (1 + b * (1 - sigmoid(b)))),
    "swiglu": (lambda g, a, b: g.swiglu(a, b), lambda a, b: a * sigmoid(a) * b),
    "sum": (lambda g, a, b: g.sum(a), lambda a, b: a.sum().reshape(1)),
    "sum_rows": (lambda g, a, b: g.sum_rows(a), lambda a, b: a.sum(-1, keepdims=True)),
    "mean": (lambda g, a, b: g.mean(a), lambda a, b: a.mean(-1, keepdims=True)),
    "cumsum": (lambda g, a, b: g.cumsum(a), lambda a, b: a.cumsum(-1)),
    "argmax": (lambda g, a, b: g.argmax(a), lambda a, b: a.argmax(-1).reshape(-1)),
    "repeat": (lambda g, a, b: g.repeat(a, tuple(2 * n for n in a.shape)), lambda a, b: np.tile(a, 2 * np.ones(a.ndim, int))),
    "concat": (lambda g, a, b: g.concat(a, b, 0), lambda a, b: np.concatenate([a, b], 0)),
    "concat of columns": (lambda g, a, b: g.concat(a, b), lambda a, b: np.concatenate([a, b], -1)),
    "mul_mat": (lambda g, a, b: g.mul_mat(a, b), lambda a, b: b @ a.swapaxes(-1, -2)),
    "soft_max_ext": (lambda g, a, b: g.soft_max_ext(a, b), lambda a, b: softmax(a + b)),
    "norm": (
        lambda g, a, b: g.norm(a, 0.1),
        lambda a, b: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 0.1),
    ),
    "rms_norm": (lambda g, a, b: g.rms_norm(a, 0.1), lambda a, b: a / np.sqrt((a * a).mean(-1, keepdims=True) + 0.1)),
    "cast": (lambda g, a, b: g.cast(g.cast(a, "f16"), "f32"), lambda a, b: a.astype(np.float16)),
    "cpy": (lambda g, a, b: g.cpy(a, g.blank(a.shape)), lambda a, b: a),
    "get_rows": (lambda g, a, b: g.get_rows(a, g.argmax(g.full((2, 1), 0.0))), lambda a, b: a[[0, 0]]),
    "set_rows": (
        lambda g, a, b: g.set_rows(g.full(b.shape, 0.0), g.slice(a, 0, 0, 1), g.argmax(g.full((1, 1), 0.0))),
        lambda a, b: np.where(np.arange(len(b))[:, None] == 0, a[:1], 0),
    ),
    "rope": (lambda g, a, b: g.rope(a, g.argmax(g.full((a.shape[-3], 1), 0.0))), lambda a, b: a),  # by no angle
    "add_into": (lambda g, a, b: g.add_into(g.full(b.shape, 1.0), a), lambda a, b: 1 + a),
}  # fmt: skip
AXES = {"get_rows": (2, 2), "set_rows": (2, 2), "rope": (3, 4)}


@pytest.mark.parametrize("case", VIEWED)
@given(data=st.data())
def test_views_are_refused_or_computed_right(case, data):
    """ggml's kernels differ in the strides they can read; what one cannot read must have been refused."""
    build, expected = VIEWED[case]
    least, most = AXES.get(case, (2, 4))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=least, max_size=most))
    steps = random_views(data, len(shape))
    # both inputs go through the same views: they fit each other, and mostly have strides that none would have alone
    first, second = (np.exp(normal(*shape)) for _ in range(2))
    a, b = first, second
    for _, view in steps:
        a, b = view(a), view(b)

    def viewed(g, x, y):
        for view, _ in steps:
            x, y = view(g, x), view(g, y)
        return build(g, x, y)

    try:
        got = run_graph(viewed, first, second)
    except ValueError:
        return
    want = expected(a, b)
    assert got.shape == want.shape
    assert np.allclose(got, want, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# the memory plan
# ----------------------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 3, 4


def random_node(data, g, pool):
    """Record one random operation on (tensor, value) pairs of shape (ROWS, COLUMNS); values stay within a few units."""

    def some():
        # old results too: they must have survived
        return pool[data.draw(st.integers(0, len(pool) - 1))]

    (x, a), (y, b) = some(), some()
    kind = data.draw(st.integers(0, 13))
    if kind == 0:
        return g.tanh(g.add(x, y)), np.tanh(a + b)
    if kind == 1:
        return g.tanh(g.mul(x, y)), np.tanh(a * b)
    if kind == 2:
        return g.scale(g.sub(x, y), 0.5, 0.1), (a - b) * np.float32(0.5) + np.float32(0.1)
    if kind == 3:
        return g.neg(x), -a
    if kind == 4:  # neighbouring nodes that backends fuse
        rms = a / np.sqrt((a * a).mean(1, keepdims=True) + np.float32(1e-2))
        return g.tanh(g.mul(g.rms_norm(x, 1e-2), y)), np.tanh(rms * b)
    if kind == 5:
        return g.soft_max_ext(x, y), softmax(a + b)
    if kind == 6:  # through views of other shapes
        turned = g.cont(g.transpose(g.reshape(x, (COLUMNS, ROWS))))
        return turned, np.ascontiguousarray(a.reshape(COLUMNS, ROWS).T)
    if kind == 7:
        halves = g.concat(g.slice(x, 1, 0, 2), g.slice(y, 1, 2, COLUMNS))
        return halves, np.concatenate([a[:, :2], b[:, 2:]], 1)
    if kind == 8:
        product = g.mul_mat(y, x)  # (ROWS, ROWS)
        return g.tanh(g.mul_mat(g.cont(g.transpose(y)), product)), np.tanh(a @ b.T @ b)
    if kind == 9:
        return g.tanh(g.add(x, g.sum_rows(y))), np.tanh(a + b.sum(1, keepdims=True))
    if kind == 10:
        return g.add(g.full((ROWS, COLUMNS), 0.25), g.scale(x, 0.5)), np.float32(0.25) + np.float32(0.5) * a
    if kind == 11:  # writes into a copy, which is then read through another view
        copy = g.scale(x, 1.0)
        g.add_into(copy, y)
        return g.tanh(g.reshape(copy, (ROWS, COLUMNS))), np.tanh(a + b)
    if kind == 12:
        copy = g.scale(x, 1.0)
        g.cpy(g.scale(y, 2.0), copy)
        return g.tanh(copy), np.tanh(2 * b)
    return g.tanh(g.div(x, g.scale(g.sqr(y), 1.0, 1.0))), np.tanh(a / (b * b + 1))


@given(st.data())
def test_random_graphs_against_numpy(data):
    """Memory is reused only where nobody reads any more; inputs and outputs keep their values from run to run."""
    n_threads = data.draw(st.sampled_from([1, 1, 2]))
    with ggml_bridge.Backend("cpu", n_threads) as backend:
        g = backend.graph()
        arrays = [np.tanh(normal(ROWS, COLUMNS)) for _ in range(3)]
        weight = backend.persistent((ROWS, COLUMNS))
        inputs = [weight, g.input((ROWS, COLUMNS)), g.input((ROWS, COLUMNS))]
        pool = list(zip(inputs, arrays))
        for _ in range(data.draw(st.integers(1, 40))):
            pool.append(random_node(data, g, pool))
        chosen = data.draw(st.sets(st.integers(3, len(pool) - 1), min_size=1))
        for i in chosen:
            g.output(pool[i][0])
        g.allocate()
        for tensor, array in zip(inputs, arrays):
            tensor.upload(array)
        for run in range(2):
            g.compute()
            for i in chosen:
                assert np.allclose(pool[i][0].download(), pool[i][1], atol=2e-4), f"run {run}, node {i}"
        for tensor, array in zip(inputs, arrays):
            assert np.array_equal(tensor.download(), array)


def test_memory_is_reused():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x = g.input((100, 100))
        y = x
        for _ in range(50):
            y = g.cont(g.transpose(y))  # cannot be done in place
        g.output(y)
        g.allocate()
        # the input, the output, and the few results that wait until no fused neighbour can need them
        assert g.memory_bytes <= 5 * 100 * 100 * 4


def test_elementwise_chains_stay_in_place():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x = g.input((100, 100))
        y = g.add(x, x)
        for _ in range(50):
            y = g.tanh(g.scale(y, 2.0))
        g.output(g.sum_rows(y))
        g.allocate()
        assert g.memory_bytes <= 2 * 100 * 100 * 4 + 4096


def test_more_gaps_than_the_library_would_stand():
    """ggml's own graph allocator aborts at 256 gaps; a graph with a thousand is planned here."""
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x = g.input((8, 8))
        kept = []
        for i in range(1000):
            g.output(g.sum_rows(large := g.mul_mat(x, x)))  # an output between every two results that end
            if i % 2:
                kept.append(g.output(g.scale(large, 0.5)))
        g.allocate()
        values = normal(8, 8)
        x.upload(values)
        g.compute()
        for tensor in kept[::100]:
            assert relative_error(tensor.download(), 0.5 * values @ values.T) < 1e-6


def test_nodes_that_lead_nowhere_are_dropped():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x = g.input((2, 2), name="x")
        unused = g.input((3,), name="unused")
        y = g.output(g.tanh(x))
        g.exp(g.scale(x, 2.0))
        g.allocate()
        assert [node.op for node in g.describe()] == ["TANH"]
        unused.upload(np.ones(3))  # it has memory all the same
        with pytest.raises(RuntimeError, match=r"'x'.*never uploaded"):
            g.compute()
        with pytest.raises(RuntimeError, match=r"compute\(\) comes first"):
            y.download()


def test_intermediate_results_cannot_be_downloaded():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x = g.input((2, 2))
        y = g.tanh(x)
        z = g.output(g.scale(y, 2.0))
        g.allocate()
        x.upload(np.eye(2))
        g.compute()
        assert np.allclose(z.download(), 2 * np.tanh(np.eye(2)))
        with pytest.raises(RuntimeError, match=r"output\(\)"):
            y.download()


def test_several_graphs_share_persistent_tensors():
    """A training graph writes the weights, an evaluation graph of another shape reads them."""
    with ggml_bridge.Backend("cpu", 1) as backend:
        w = backend.persistent((2, 3), name="w")
        train, evaluate = backend.graph(), backend.graph()
        d = train.input((2, 3))
        train.add_into(w, train.scale(d, -0.5))
        x = evaluate.input((4, 3))
        y = evaluate.output(evaluate.mul_mat(w, x))
        train.allocate()
        evaluate.allocate()
        weights, gradient, activations = normal(2, 3), normal(2, 3), normal(4, 3)
        w.upload(weights)
        d.upload(gradient)
        x.upload(activations)
        for step in range(3):
            evaluate.compute()
            assert relative_error(y.download(), activations @ (weights - 0.5 * step * gradient).T) < 1e-6
            train.compute()
        train.close()
        evaluate.compute()
        with pytest.raises(RuntimeError, match="closed"):
            train.compute()
        with pytest.raises(ValueError, match="another session"):
            evaluate_again = backend.graph()
            evaluate_again.add(w, y)


# ----------------------------------------------------------------------------------------------------------------------
# nodes that write
# ----------------------------------------------------------------------------------------------------------------------


def test_writes_happen_in_the_order_of_recording():
    with ggml_bridge.Backend("cpu", 1) as backend:
        w, total = backend.persistent((2, 3)), backend.persistent((2, 3))
        g = backend.graph()
        x = g.input((2, 3))
        before = g.output(g.scale(w, 1.0))
        g.add_into(w, x)
        between = g.output(g.scale(w, 1.0))
        g.cpy(g.scale(w, 10.0), w2 := backend.persistent((3, 2)))
        g.fill_into(w, 7.0)
        after = g.output(g.scale(w, 1.0))
        g.add_into(total, x)
        g.allocate()
        weights, values = normal(2, 3), normal(2, 3)
        w.upload(weights)
        x.upload(values)
        g.compute()
        assert np.array_equal(before.download(), weights)
        assert np.allclose(between.download(), weights + values)
        assert np.allclose(w2.download(), 10 * (weights + values).reshape(3, 2), rtol=1e-5)
        assert (after.download() == 7).all() and (w.download() == 7).all()
        g.compute()
        assert np.allclose(total.download(), 2 * values)


def test_a_transposed_copy_is_made_once_and_anew_after_a_write():
    with ggml_bridge.Backend("cpu", 1) as backend:
        w = backend.persistent((2, 3))
        g = backend.graph()
        x = g.input((2, 3))
        for tensor in (x, w):
            before = g.n_recorded
            g.transposed(tensor)
            assert g.n_recorded == before + 2  # the view and its copy
            g.transposed(tensor)
            assert g.n_recorded == before + 2
        column = g.slice(x, 0, 0, 1)
        before = g.n_recorded
        assert g.transposed(column).is_input  # a view of one row: nothing to copy, and still an input
        assert g.n_recorded == before + 1
        old = g.output(g.transposed(w))
        g.add_into(w, x)
        new = g.output(g.transposed(w))
        part = g.slice(w, 0, 0, 2)
        g.transposed(part)
        g.fill_into(w, 7.0)  # the memory that the part is a view of
        last = g.output(g.transposed(part))
        g.allocate()
        weights, values = normal(2, 3), normal(2, 3)
        w.upload(weights)
        x.upload(values)
        g.compute()
        assert np.array_equal(old.download(), weights.T)
        assert np.allclose(new.download(), (weights + values).T)
        assert (last.download() == 7).all()


def test_a_blank_tensor_is_filled_by_nodes():
    values = normal(2, 3)

    def build(g, x):
        scratch = g.blank((2, 3))
        g.cpy(x, scratch)
        g.add_into(scratch, x)
        return g.tanh(scratch)

    assert np.allclose(run_graph(build, values), np.tanh(2 * values), atol=1e-6)


def test_opt_step_adamw_against_its_formula():
    with ggml_bridge.Backend("cpu", 2) as backend:
        w, m, v = (backend.persistent((5, 7), name=name) for name in "wmv")
        g = backend.graph()
        d, hp = g.input((5, 7)), g.input((1, 7))
        with pytest.raises(ValueError, match="different tensors"):
            g.opt_step_adamw(w, d, m, m, hp)
        with pytest.raises(ValueError, match="seven numbers"):
            g.opt_step_adamw(w, d, m, v, g.input((6,)))
        with pytest.raises(ValueError, match="persistent"):
            g.opt_step_adamw(g.scale(w, 1.0), d, m, v, hp)
        g.opt_step_adamw(w, d, m, v, hp)
        g.allocate()
        weight = normal(5, 7).astype(np.float64)
        first, second = np.zeros_like(weight), np.zeros_like(weight)
        w.upload(weight)
        for step in range(1, 6):
            gradient = normal(5, 7)
            row = [1e-2, 0.9, 0.95, 1e-8, 0.1, 1 / (1 - 0.9**step), 1 / (1 - 0.95**step)]
            lr, beta1, beta2, eps, decay, s5, s6 = row
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient.astype(np.float64) ** 2
            weight = weight * (1 - lr * decay) - lr * (first * s5) / (np.sqrt(second * s6) + eps)
            d.upload(gradient)
            hp.upload([row])
            g.compute()
        assert relative_error(w.download(), weight) < 1e-6
        assert relative_error(m.download(), first) < 1e-6
        assert relative_error(v.download(), second) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# kernels
# ----------------------------------------------------------------------------------------------------------------------

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


def python_kernel(function, kept=[]):  # noqa: B006  ggml calls it: it must never be collected
    """A kernel capsule around a Python function, for tests only."""
    callback = KERNEL(function)
    kept.append(callback)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.cast(callback, ctypes.c_void_p), b"ggml_bridge.kernel", None)


def test_custom_nodes_run_on_every_thread_with_their_parameters():
    calls = []
    kernel = python_kernel(lambda dst, ith, nth, params: calls.append((ith, nth, ctypes.string_at(params, 5), params)))
    with ggml_bridge.Backend("cpu", 2) as backend:
        g = backend.graph()
        x = g.input((4, 4))
        g.output(g.custom(kernel, [x], (2, 2), params=b"hello", name="mine"))
        g.output(g.custom(kernel, [x], (2, 2), params=b"again", n_tasks=1))
        dropped = python_kernel(lambda *_: calls.append("dropped"))
        g.custom(dropped, [x], (1,))
        g.allocate()
        assert [node.op for node in g.describe()] == ["CUSTOM", "CUSTOM"]
        x.upload(np.zeros((4, 4)))
        g.compute()
    assert sorted(call[:3] for call in calls) == [(0, 1, b"again"), (0, 2, b"hello"), (1, 2, b"hello")]
    assert all(call[3] % 64 == 0 for call in calls)


def test_custom_nodes_that_write_are_kept_and_ordered():
    order = []

    def note(name):
        return python_kernel(lambda dst, ith, nth, params: order.append(name) if ith == 0 else None)

    with ggml_bridge.Backend("cpu", 1) as backend:
        w = backend.persistent((4,))
        g = backend.graph()
        x = g.input((4,))
        first = g.custom_into(note("first"), w, [x])
        g.custom(note("second"), [w, first], (1,), writes=[w])
        g.custom_into(note("third"), w, [])
        with pytest.raises(ValueError, match="none of the inputs"):
            g.custom(note("x"), [x], (1,), writes=[w])
        with pytest.raises(ValueError, match="is an input"):
            g.custom(note("x"), [x], (1,), writes=[x])
        with pytest.raises(TypeError, match="kernel_capsule"):
            g.custom(print, [x], (1,))
        with pytest.raises(ValueError, match="at most 9"):
            g.custom(note("x"), [x] * 10, (1,))
        g.allocate()
        x.upload(np.zeros(4))
        g.compute()
    assert order == ["first", "second", "third"]


def test_a_node_that_writes_into_scratch_alone_is_dropped():
    ran = []

    def note(name):
        return python_kernel(lambda dst, ith, nth, params: ran.append(name) if ith == 0 else None)

    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x, scratch = g.input((4,)), g.blank((4,))
        g.custom(note("for nobody"), [x, scratch], (1,), scratch=[scratch])
        g.output(g.custom(note("for an output"), [x, scratch], (1,), scratch=[scratch]))
        g.custom(note("a write"), [x, scratch], (1,), writes=[scratch])
        with pytest.raises(ValueError, match="none of the inputs"):
            g.custom(note("x"), [x], (1,), scratch=[scratch])
        with pytest.raises(ValueError, match="is an input"):
            g.custom(note("x"), [x], (1,), scratch=[x])
        g.allocate()
        x.upload(np.zeros(4))
        g.compute()
    assert ran == ["for an output", "a write"]


@pytest.mark.skipif(sys.platform == "win32", reason="compiles with the flags of gcc and clang")
def test_a_kernel_written_in_cython(tmp_path, monkeypatch):
    """What kernel.pxd promises: cimport it, fill a capsule, use it."""
    libggml = pytest.importorskip("libggml")
    setuptools = pytest.importorskip("setuptools")
    build = pytest.importorskip("Cython.Build")
    (tmp_path / "double_rows.pyx").write_text(
        textwrap.dedent(
            """
            # cython: language_level=3
            from ggml_bridge.kernel cimport ggml_tensor, kernel_capsule

            cdef void double_rows(ggml_tensor *dst, int ith, int nth, void *params) noexcept nogil:
                cdef const ggml_tensor *x = dst.src[0]
                cdef const float *a = <const float *>x.data
                cdef float *y = <float *>dst.data
                cdef float factor = (<float *>params)[0]
                cdef Py_ssize_t i, j
                i = ith
                while i < x.ne[1]:
                    for j in range(x.ne[0]):
                        y[i * x.ne[0] + j] = factor * a[i * x.ne[0] + j]
                    i += nth

            DOUBLE_ROWS = kernel_capsule(double_rows)
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    include = f"{next(iter(libggml.__path__))}/include"
    extension = setuptools.Extension("double_rows", ["double_rows.pyx"], include_dirs=[include])
    extensions = build.cythonize([extension], quiet=True, include_path=[f"{ggml_bridge.__path__[0]}/.."])
    command = ["build_ext", "--inplace", "--build-temp", str(tmp_path / "build"), "--quiet"]
    setuptools.setup(name="double_rows", ext_modules=extensions, script_args=command)
    monkeypatch.syspath_prepend(tmp_path)
    import double_rows

    values = normal(5, 3)
    factor = np.float32(2).tobytes()
    doubled = run_graph(lambda g, x: g.custom(double_rows.DOUBLE_ROWS, [x], (5, 3), params=factor), values, n_threads=2)
    assert np.array_equal(doubled, 2 * values)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def g():
    with ggml_bridge.Backend("cpu", 1) as backend:
        yield backend.graph()


REFUSED = {
    "add": (lambda g, m: g.add(m, g.input((5, 7))), ValueError, "broadcast"),
    "add, first is smaller": (lambda g, m: g.add(g.input((8,)), m), ValueError, "broadcast"),
    "add of integers": (lambda g, m: g.add(g.input((5, 8), "i32"), m), ValueError, "types"),
    "add of no tensor": (lambda g, m: g.add(m, 1.0), TypeError, "Tensor"),
    "mul_mat": (lambda g, m: g.mul_mat(m, g.input((5, 7))), ValueError, "last axes"),
    "mul_mat, batches": (lambda g, m: g.mul_mat(g.input((3, 5, 8)), g.input((2, 5, 8))), ValueError, "leading axes"),
    "mul_mat, transposed": (lambda g, m: g.mul_mat(g.transpose(m), g.input((2, 5))), ValueError, "cont"),
    "reshape": (lambda g, m: g.reshape(m, (5, 7)), ValueError, "another number"),
    "reshape of a view": (lambda g, m: g.reshape(g.transpose(m), (40,)), ValueError, "gaps"),
    "slice": (lambda g, m: g.slice(m, 1, 5, 9), ValueError, "no part"),
    "slice, empty": (lambda g, m: g.slice(m, 1, 5, 5), ValueError, "no part"),
    "permute": (lambda g, m: g.permute(m, (0, 0)), ValueError, "order of"),
    "concat": (lambda g, m: g.concat(m, g.input((4, 8)), 1), ValueError, "differ"),
    "repeat": (lambda g, m: g.repeat(m, (5, 9)), ValueError, "whole number"),
    "scale by NaN": (lambda g, m: g.scale(m, float("nan")), ValueError, "finite"),
    "scale of a view": (lambda g, m: g.scale(g.slice(m, 1, 0, 4), 2.0), ValueError, "gaps"),
    "unary": (lambda g, m: g.unary(m, "gelu_quick"), ValueError, "none of"),
    "norm": (lambda g, m: g.norm(m, -1.0), ValueError, "negative"),
    "soft_max_ext": (lambda g, m: g.soft_max_ext(m, g.input((4, 8))), ValueError, "does not fit"),
    "rope": (lambda g, m: g.rope(m, g.input((5,), "i32")), ValueError, "heads"),
    "rope, odd": (lambda g, m: g.rope(g.input((5, 1, 7)), g.input((5,), "i32")), ValueError, "even"),
    "rope, factors": (
        lambda g, m: g.rope(g.input((5, 1, 8)), g.input((5,), "i32"), factors=g.input((8,))),
        ValueError,
        r"factors must be f32 \(4,\)",
    ),
    "rope, positions": (lambda g, m: g.rope(g.input((5, 1, 8)), g.input((4,), "i32")), ValueError, "positions"),
    "get_rows with floats": (lambda g, m: g.get_rows(m, g.input((3,))), ValueError, "i32"),
    "get_rows by a wide argmax": (lambda g, m: g.get_rows(m, g.argmax(g.input((2, 6)))), ValueError, "<= 5"),
    "set_rows into an input": (
        lambda g, m: g.set_rows(m, g.input((2, 8)), g.input((2,), "i32")),
        ValueError,
        "is an input",
    ),
    "cpy onto itself": (lambda g, m: g.cpy(y := g.exp(m), g.reshape(y, (8, 5))), ValueError, "share memory"),
    "argmax": (lambda g, m: g.argmax(g.input((2, 3, 4))), ValueError, "matrix"),
    "a shape of nothing": (lambda g, m: g.input((3, 0)), ValueError, "at least|from 1"),
    "a shape of floats": (lambda g, m: g.input((3.0,)), TypeError, "integers"),
    "five axes": (lambda g, m: g.input((1, 1, 1, 1, 1)), ValueError, "1 to 4"),
    "too many elements": (lambda g, m: g.input((2**16, 2**16)), ValueError, "elements"),
    "dtype": (lambda g, m: g.input((3,), "f64"), ValueError, "unknown"),
    "quantized input": (lambda g, m: g.input((32,), "q8_0"), ValueError, "persistent"),
    "broken blocks": (lambda g, m: g.backend.persistent((3, 33), "q8_0"), ValueError, "multiple of 32"),
    "limit of floats": (lambda g, m: g.limit(m, 0, 5), ValueError, "i32"),
    "capacity": (lambda g, m: setattr(g, "capacity", 0), ValueError, "capacity"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(g, case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(g, g.input((5, 8), name="m"))


def test_errors_name_what_was_given(g):
    with pytest.raises(ValueError, match=r"<Tensor b f32 \(5, 7\)> cannot be broadcast to <Tensor a f32 \(5, 8\)>"):
        g.add(g.input((5, 8), name="a"), g.input((5, 7), name="b"))


def test_capacity(g):
    g.capacity = 3
    x = g.input((2,))
    for _ in range(3):
        x = g.exp(x)
    with pytest.raises(RuntimeError, match="capacity of 3"):
        g.exp(x)
    g.capacity = 4
    g.output(g.exp(x))
    assert g.n_recorded == 4


def test_indices_are_checked_at_every_upload(g):
    ids = g.input((3,), "i32", name="ids")
    table, small = g.input((10, 2)), g.input((4, 2))
    g.output(g.get_rows(table, ids))
    rows = g.output(g.get_rows(small, ids))  # the smaller table counts
    g.allocate()
    table.upload(np.zeros((10, 2)))
    small.upload(np.arange(8).reshape(4, 2))
    for wrong in ([0, 1, 4], [0, -1, 2], [0, 2**31, 0], np.array([0, 2**63, 0], np.uint64)):
        with pytest.raises(ValueError, match="integers from 0 to 3"):
            ids.upload(wrong)
    with pytest.raises(TypeError, match="integers"):
        ids.upload([0.0, 1.0, 2.0])
    ids.upload([3, 0, 3])
    g.compute()
    assert np.array_equal(rows.download(), [[6, 7], [0, 1], [6, 7]])


def test_a_persistent_index_that_is_out_of_range_already():
    with ggml_bridge.Backend("cpu", 1) as backend:
        ids = backend.persistent((2,), "i32")
        backend.allocate()
        ids.upload([7, 1])
        g = backend.graph()
        with pytest.raises(ValueError, match="already holds values from 1 to 7"):
            g.get_rows(g.input((5, 2)), ids)


def test_uploads_are_checked(g):
    x = g.input((2, 3), name="x")
    y = g.output(g.exp(x))
    with pytest.raises(RuntimeError, match=r"allocate\(\)"):
        x.upload(np.zeros((2, 3)))
    g.allocate()
    for wrong in (np.zeros((3, 2)), np.zeros(5), np.zeros((2, 3, 1)), 1.0, [[1], [2, 3]]):
        with pytest.raises(ValueError, match="array"):
            x.upload(wrong)
    for wrong in (np.zeros((2, 3), complex), np.full((2, 3), None), np.full((2, 3), "a"), np.zeros((2, 3), bool)):
        with pytest.raises(TypeError, match="real numbers"):
            x.upload(wrong)
    with pytest.raises(ValueError, match="computed by the graph"):
        y.upload(np.zeros((2, 3)))
    x.upload(np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert np.array_equal(x.download(), np.arange(6).reshape(2, 3))
    x.upload(np.arange(6).reshape(1, 1, 2, 3))  # leading axes of length 1
    x.upload([[np.nan, np.inf, 1], [0, 0, 0]])  # allowed: masks need them
    g.compute()
    assert np.isnan(y.download()[0, 0])


def test_listeners_follow_uploads(g):
    x = g.input((2, 2), name="x")
    doubled = g.input((2, 2))
    g.on_upload(x, lambda values: doubled.upload(2 * values))
    part = g.slice(x, 0, 0, 1)
    y = g.output(g.add(doubled, part))
    g.allocate()
    x.upload([[1, 2], [3, 4]])
    g.compute()
    assert np.array_equal(y.download(), [[3, 6], [7, 10]])
    with pytest.raises(ValueError, match="upload the whole"):
        part.upload([[5, 5]])
    x.zero()
    assert (doubled.download() == 0).all()


def test_explain(g):
    x = g.input((2, 3), name="x")
    g.output(g.set_name(g.tanh(x), "y"))
    g.allocate()
    explanation = g.explain()
    (node,) = explanation.nodes
    assert (node.op, node.name, node.shape, node.dtype, node.device) == ("TANH", "y", (1, 1, 2, 3), "f32", "CPU")
    assert [source.name for source in node.sources] == ["x"]
    assert explanation.splits == 1 and explanation.counts() == {"TANH": 1}
    assert explanation.bytes["graph"] == 2 * 64 and explanation.bytes["weights"] == 0
    text = str(explanation)
    assert "TANH" in text and "2x3" in text and "1 split on CPU" in text and "128 bytes" in text


def test_version_and_devices():
    ok, text = ggml_bridge.available()
    assert ok and ggml_bridge.version() in text
    cpu = next(device for device in ggml_bridge.devices() if device.kind == "cpu")
    assert cpu.name == "CPU" and cpu.memory_total > 2**28
