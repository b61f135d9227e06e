"""What is particular to the compiled kernels: errors before any pointer is taken, threads, recycled memory, strides, NaN.

That every op computes the same numbers as its numpy twin is tested in test_ops.py; here only where a kernel has a case of its
own (blocks, slices, strides, vector tails).
"""

import os
import shlex
import subprocess
import sys
import threading
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

if os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0"):
    pytest.skip("TOY_PURE_PYTHON is set: the compiled kernels are not tested", allow_module_level=True)

from toy import _kernels
from toy._kernels import blas, cpu, elementwise, memory, threads
from toy.ops import accelerated, reference

BAR = 2e-6  # of the largest element


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def assert_close(given, expected, bar=BAR):
    if isinstance(expected, tuple):
        assert len(given) == len(expected)
        for one, other in zip(given, expected):
            assert_close(one, other, bar)
        return
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max(initial=0) <= bar * np.abs(expected).max(initial=1e-30)


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def n_threads(request):
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


@pytest.fixture
def two_threads():
    before = threads.get_num_threads()
    threads.set_num_threads(2)
    yield
    threads.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# the exponential
# ----------------------------------------------------------------------------------------------------------------------


def test_exp_is_accurate_over_the_whole_range():
    x = np.concatenate([np.linspace(-87.3, 88.7, 3_000_001), np.linspace(-1e-3, 1e-3, 10_001)]).astype(np.float32)[
        :, None
    ]
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(elementwise.exp(x) - exact) / ulp).max() < 1.5


def test_exp_at_its_ends():
    ends = np.array([[0, -0.0, 1e-30, -np.inf, np.inf, -200, -104.5, 89, 3e38, -3e38, np.nan]], np.float32)
    expected = np.array([[1, 1, 1, 0, np.inf, 0, 0, np.inf, np.inf, 0, np.nan]], np.float32)
    with np.errstate(all="raise"):
        assert np.array_equal(elementwise.exp(ends), expected, equal_nan=True)


def test_exp_underflows_gradually():
    x = np.linspace(-103, -87.4, 1001, dtype=np.float32)[:, None]
    smallest = np.spacing(np.float32(0)).astype(np.float64)
    assert np.abs(elementwise.exp(x) - np.exp(x.astype(np.float64))).max() <= 1.01 * smallest


@pytest.mark.parametrize("op", ["gelu", "silu"])
def test_activations_far_from_zero(op):
    x = np.concatenate([np.linspace(-100, 100, 20_001), [-1e4, 1e4, -1e18, 1e18]]).astype(np.float32)[:, None]
    forward, backward = getattr(accelerated, op), getattr(accelerated, f"{op}_backward")
    y, cache = forward(x)
    with np.errstate(over="ignore", invalid="ignore"):
        y64, cache64 = getattr(reference, op)(x[:-4].astype(np.float64))
        d64 = getattr(reference, f"{op}_backward")(np.ones_like(y64), cache64)
    assert_close(y[:-4], y64)
    assert_close(backward(np.ones_like(x), cache)[:-4], d64)
    assert y[-4:, 0].tolist() == [0, np.float32(1e4), 0, np.float32(1e18)]


# ----------------------------------------------------------------------------------------------------------------------
# agreement where a kernel has cases of its own
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, n_in, n_out", [(0, 8, 8), (1, 1, 1), (3, 40, 17), (300, 33, 65), (40, 70, 600), (600, 64, 48)]
)
def test_linear_slices(n_threads, n, n_in, n_out):
    x, weight, bias, d_y = normal(n, n_in), normal(n_out, n_in), normal(n_out), normal(n, n_out)
    y, cache = reference.linear(x, weight, bias)
    gradients = [normal(n_out, n_in, seed=1), normal(n_out, seed=1)]
    d_x = reference.linear_backward(d_y, cache, *gradients)
    y2, cache2 = accelerated.linear(x, weight, bias)
    gradients2 = [normal(n_out, n_in, seed=1), normal(n_out, seed=1)]
    assert_close((y2, accelerated.linear_backward(d_y, cache2, *gradients2)), (y, d_x))
    assert_close(tuple(gradients2), tuple(gradients))


ATTENTION_SHAPES = [
    # batch, heads, kv heads, Tq, Tk, d_head, causal
    (1, 1, 1, 1, 1, 1, True),
    (2, 4, 4, 63, 63, 16, True),
    (2, 4, 2, 65, 65, 8, True),
    (1, 6, 3, 200, 200, 64, True),
    (2, 4, 1, 3, 130, 8, True),
    (2, 2, 2, 70, 30, 8, False),
    (1, 2, 1, 130, 130, 4, False),
    # what ends in the middle of a vector, a tile or a block: widths, rows, keys
    (1, 3, 1, 37, 37, 33, True),
    (1, 2, 2, 17, 230, 19, True),
    (2, 2, 1, 5, 5, 3, True),
    (3, 1, 1, 33, 200, 66, False),
    (1, 4, 2, 100, 196, 80, True),
    (1, 2, 2, 16, 97, 7, False),
]


@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_blocks(n_threads, shape):
    batch, heads, kv_heads, t_q, t_k, d_head, causal = shape
    widths = [heads * d_head, kv_heads * d_head, kv_heads * d_head]
    if t_q == t_k:  # columns of one matrix, as a fused product gives them
        q, k, v = accelerated.split(normal(batch * t_q, sum(widths)), widths)
    else:
        q, k, v = normal(batch * t_q, widths[0]), normal(batch * t_k, widths[1]), normal(batch * t_k, widths[2], seed=1)
    d_out = normal(batch * t_q, widths[0], seed=2)
    out, cache = reference.attention(q, k, v, batch, heads, kv_heads, causal)
    out2, cache2 = accelerated.attention(q, k, v, batch, heads, kv_heads, causal)
    assert_close(out2, out)
    assert_close(accelerated.attention_backward(d_out, cache2), reference.attention_backward(d_out, cache))


@st.composite
def attention_calls(draw):
    """(q, k, v, d_out), what follows q, k and v in a call: any heads, width and mask; several blocks of queries and keys."""
    batch, kv_heads, group, d_head = (draw(st.integers(1, n)) for n in (2, 2, 3, 40))
    t_q, causal = draw(st.integers(1, 80)), draw(st.booleans())
    t_k = t_q + draw(st.integers(0, 130)) if causal else draw(st.integers(1, 200))
    window = draw(st.none() | st.integers(1, 150)) if causal else None
    rows = batch * t_q, batch * t_k
    if t_q == t_k and draw(st.booleans()):  # columns of one matrix
        widths = [group * kv_heads * d_head, kv_heads * d_head, kv_heads * d_head]
        q, k, v = accelerated.split(normal(rows[0], sum(widths)), widths)
    else:
        q, k, v = (normal(*shape, seed=seed) for seed, shape in enumerate(
            [(rows[0], group * kv_heads * d_head), (rows[1], kv_heads * d_head), (rows[1], kv_heads * d_head)]
        ))  # fmt: skip
    arguments = batch, group * kv_heads, kv_heads, causal, window, draw(st.none() | st.floats(0.5, 50))
    return (q, k, v, normal(*q.shape, seed=3)), arguments


@hypothesis.given(attention_calls())
def test_attention_of_any_shape(call):
    (q, k, v, d_out), arguments = call
    out, cache = accelerated.attention(q, k, v, *arguments)
    exact, exact_cache = reference.attention(*(a.astype(np.float64) for a in (q, k, v)), *arguments)
    assert_close(out, exact)
    given = accelerated.attention_backward(d_out, cache)
    for d, wanted in zip(given, reference.attention_backward(d_out.astype(np.float64), exact_cache)):
        # the difference of two numbers of size 1 may be much smaller than its own rounding
        assert np.abs(d - wanted).max() <= 4e-6 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("d_head", [7, 16, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_query_that_sees_one_key_alone_has_no_gradient(d_head, softcap):
    """Its probability is 1 whatever the score: exactly 0, where a rounded one would be the direction of an AdamW step."""
    q, k, v, d_out = (normal(75, 2 * d_head, seed=seed) for seed in range(4))
    out, cache = accelerated.attention(q, k, v, 1, 2, None, True, 1, softcap)
    assert np.array_equal(out, v)
    d_q, d_k, d_v = accelerated.attention_backward(d_out, cache)
    assert not d_q.any() and not d_k.any() and np.array_equal(d_v, d_out)
    out, cache = accelerated.attention(q, k, v, 1, 2, softcap=softcap)  # the first query of a causal mask
    assert np.array_equal(out[0], v[0])
    assert not accelerated.attention_backward(d_out, cache)[0][0].any()
    assert accelerated.attention_backward(d_out, cache)[0][1:].any(axis=1).all()


def test_attention_has_the_same_bits_for_any_number_of_threads():
    q, k, v, d_out = (normal(4 * 150, width, seed=1) for width in (6 * 24, 3 * 24, 3 * 24, 6 * 24))
    before, results = threads.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            threads.set_num_threads(n)
            out, cache = accelerated.attention(q, k, v, 4, 6, 3)
            results.append([a.tobytes() for a in (out, *accelerated.attention_backward(d_out, cache))])
    finally:
        threads.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("t_q", [3, 256])
def test_keys_that_no_query_of_a_block_sees_are_not_looked_at(t_q):
    """Those behind the window and those after the last query; blocks are at most 64 rows."""
    q, k, v, d_out = normal(t_q, 32), normal(256, 32), normal(256, 32, seed=1), normal(t_q, 32, seed=2)
    for dark, arguments, rows in (
        (slice(0, 64), (1, 2, 2, True, 8), slice(max(0, 128 - 256 + t_q), None)),
        (slice(192, 256), (1, 2), slice(0, max(0, 128 - 256 + t_q))),
    ):
        for hidden in (k, v):
            kept = hidden[dark].copy()
            hidden[dark] = np.nan
            out, cache = accelerated.attention(q, k, v, *arguments)
            d_q = accelerated.attention_backward(d_out, cache)[0]
            assert np.isfinite(out[rows]).all() and np.isfinite(d_q[rows]).all()
            hidden[dark] = kept


def test_attention_with_scores_that_overflow_exp():
    q, k, v = 40 * normal(70, 8), 40 * normal(70, 8, seed=1), normal(70, 8, seed=2)
    out, cache = accelerated.attention(q, k, v, 1, 1)
    out64, cache64 = reference.attention(*(a.astype(np.float64) for a in (q, k, v)), 1, 1)
    d_out = normal(70, 8, seed=3)
    assert_close(out, out64, 1e-4)  # the scores are some thousands: their own rounding is 1e-4
    assert_close(
        accelerated.attention_backward(d_out, cache),
        reference.attention_backward(d_out.astype(np.float64), cache64),
        1e-3,
    )


def test_split_and_concat_copy_nothing():
    x = normal(10, 12)
    parts = accelerated.split(x, [4, 0, 5, 3])
    assert [part.shape for part in parts] == [(10, 4), (10, 0), (10, 5), (10, 3)]
    assert all(np.shares_memory(part, x) for part in parts if part.size)
    assert np.array_equal(accelerated.concat(parts), x)

    out, cache = accelerated.attention(*accelerated.split(normal(10, 12), [4, 4, 4]), 1, 2)
    d_qkv = accelerated.attention_backward(out, cache)
    assert accelerated.concat(d_qkv) is d_qkv[0].base
    for wrong_order in ([d_qkv[1], d_qkv[0], d_qkv[2]], d_qkv[:2], [d_qkv[0], d_qkv[1], d_qkv[2].copy()]):
        together = accelerated.concat(wrong_order)
        assert np.array_equal(together, np.concatenate(wrong_order, axis=1))
        assert not np.shares_memory(together, d_qkv[0])


def strided(a):
    """The same numbers as columns of a wider matrix that is otherwise NaN."""
    wide = np.full((a.shape[0], a.shape[1] + 7), np.nan, np.float32)
    wide[:, 3:-4] = a
    return wide[:, 3:-4]


def test_every_op_takes_row_strided_matrices(n_threads):
    n, d = 150, 40
    x, d_y, up = normal(n, d), normal(n, d, seed=1), normal(n, d, seed=2)
    gamma, beta, weight = normal(d), normal(d, seed=1), normal(24, d)
    ids, labels, positions = np.arange(n) % d, np.arange(n) % d - 1, np.arange(n)

    def everything(arrange):
        s_x, s_d_y, s_up = arrange(x), arrange(d_y), arrange(up)
        results = [accelerated.add(s_x, s_up)]
        gradients = [np.zeros_like(a) for a in (weight, gamma, gamma, beta, weight.T)]
        gradients[4] = np.zeros((d, d), np.float32)
        y, cache = accelerated.linear(s_x, weight)
        results += [y, accelerated.linear_backward(arrange(y), cache, gradients[0])]
        for forward, backward in (("gelu", "gelu_backward"), ("silu", "silu_backward")):
            y, cache = getattr(accelerated, forward)(s_x)
            results += [y, getattr(accelerated, backward)(s_d_y, cache)]
        y, cache = accelerated.swiglu(s_x, s_up)
        results += [y, *accelerated.swiglu_backward(s_d_y, cache)]
        y, cache = accelerated.rms_norm(s_x, gamma)
        results += [y, accelerated.rms_norm_backward(s_d_y, cache, gradients[1])]
        y, cache = accelerated.layer_norm(s_x, gamma, beta)
        results += [y, accelerated.layer_norm_backward(s_d_y, cache, gradients[2], gradients[3])]
        y, cache = accelerated.rope(s_x, positions, 4)
        results += [y, accelerated.rope_backward(s_d_y, cache)]
        _, cache = accelerated.embedding(ids, gradients[4])
        accelerated.embedding_backward(s_d_y, cache, gradients[4])
        loss, cache = accelerated.cross_entropy(s_x, labels)
        results += [loss, accelerated.cross_entropy_backward(cache)]
        loss, cache = accelerated.cross_entropy(s_x, arrange(np.abs(up)))
        results += [loss, accelerated.cross_entropy_backward(cache)]
        out, cache = accelerated.attention(s_x, s_up, s_d_y, 2, 4)
        results += [out, *accelerated.attention_backward(s_d_y, cache)]
        return results + gradients

    for given, expected in zip(everything(strided), everything(np.array)):
        assert_close(given, expected)
        assert np.isfinite(expected).all()


def test_inputs_are_left_alone():
    x, weight, bias, d_y = normal(90, 32), normal(96, 32), normal(96), normal(90, 96)
    copies = [a.copy() for a in (x, weight, bias, d_y)]
    y, cache = accelerated.linear(x, weight, bias)
    accelerated.linear_backward(d_y, cache, None)
    out, cache = accelerated.attention(*accelerated.split(y, [32] * 3), 2, 4)
    y_before = y.copy()
    accelerated.attention_backward(out.copy(), cache)
    loss_cache = accelerated.cross_entropy(y, np.zeros(90, int))[1]
    accelerated.cross_entropy_backward(loss_cache)
    assert np.array_equal(y, y_before)
    assert all(np.array_equal(a, b) for a, b in zip((x, weight, bias, d_y), copies))


def test_a_frozen_parameter_gets_no_work_and_no_change():
    x, weight, d_y, bias = normal(20, 8), normal(6, 8), normal(20, 6), normal(6)
    _, cache = accelerated.linear(x, weight, bias)
    d_bias = np.zeros(6, np.float32)
    d_x = accelerated.linear_backward(d_y, cache, None, d_bias)  # weight frozen, bias not
    assert_close(d_bias, d_y.sum(0))
    assert_close(d_x, d_y @ weight)
    _, cache = accelerated.layer_norm(x, normal(8), normal(8))
    accelerated.layer_norm_backward(x, cache, None, None)
    _, cache = accelerated.rms_norm(x, normal(8))
    accelerated.rms_norm_backward(x, cache, None)
    accelerated.embedding_backward(x, accelerated.embedding(np.zeros(20, int), weight)[1], None)


def test_zero_rows(n_threads):
    nothing, gamma, no_ids = np.empty((0, 8), np.float32), np.ones(8, np.float32), np.empty(0, int)
    for forward in ("gelu", "silu"):
        y, cache = getattr(accelerated, forward)(nothing)
        assert y.shape == getattr(accelerated, f"{forward}_backward")(nothing, cache).shape == (0, 8)
    assert accelerated.add(nothing, nothing).shape == (0, 8)
    d_gamma = np.ones(8, np.float32)
    _, cache = accelerated.layer_norm(nothing, gamma, gamma)
    assert accelerated.layer_norm_backward(nothing, cache, d_gamma, d_gamma.copy()).shape == (0, 8)
    assert np.array_equal(d_gamma, gamma)
    _, cache = accelerated.linear(nothing, normal(5, 8))
    d_weight = np.ones((5, 8), np.float32)
    assert accelerated.linear_backward(np.empty((0, 5), np.float32), cache, d_weight).shape == (0, 8)
    assert (d_weight == 1).all()
    out, cache = accelerated.attention(nothing, nothing, nothing, 1, 2)
    assert [a.shape for a in (out, *accelerated.attention_backward(out, cache))] == [(0, 8)] * 4
    assert accelerated.embedding(no_ids, normal(3, 8))[0].shape == (0, 8)
    assert accelerated.rope(nothing, no_ids, 2)[0].shape == (0, 8)
    loss, cache = accelerated.cross_entropy(nothing, no_ids)
    assert loss == 0.0 and accelerated.cross_entropy_backward(cache).shape == (0, 8)
    assert accelerated.sum_of_squares(nothing) == 0.0


@pytest.mark.parametrize("window", [1, 40, 64, 70, 1000])
@pytest.mark.parametrize("past", [0, 90])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_across_the_blocks_of_queries(window, past, softcap):
    """Blocks whose first keys are hidden from all of their queries, and from some."""
    q, k, v, d_out = (normal(2 * t, width) for t, width in ((150, 24), (150 + past, 8), (150 + past, 8), (150, 24)))
    arguments = (2, 3, 1, True, window, softcap)
    out, cache = accelerated.attention(q, k, v, *arguments)
    expected, expected_cache = reference.attention(*(a.astype(np.float64) for a in (q, k, v)), *arguments)
    assert np.abs(out - expected).max() <= 2e-6 * np.abs(expected).max()
    given = accelerated.attention_backward(d_out, cache)
    for d, wanted in zip(given, reference.attention_backward(d_out.astype(np.float64), expected_cache)):
        assert np.abs(d - wanted).max() <= 4e-6 * np.abs(wanted).max()
    assert np.abs(cache.probabilities - expected_cache.probabilities).max() < 1e-5


def test_nan_stays_visible(n_threads):
    """One NaN in a row shows in everything that depends on the row, and in nothing else."""
    x = normal(70, 32)
    x[3, 5] = np.nan
    clean = np.delete(np.arange(70), 3)
    gamma = np.ones(32, np.float32)
    for y in (
        accelerated.rms_norm(x, gamma)[0],
        accelerated.layer_norm(x, gamma, gamma)[0],
        accelerated.linear(x, normal(9, 32))[0],
    ):
        assert np.isnan(y[3]).all() and np.isfinite(y[clean]).all()
    for y in (accelerated.gelu(x)[0], accelerated.silu(x)[0]):
        assert np.isnan(y[3, 5]) and np.isnan(y).sum() == 1
    loss, cache = accelerated.cross_entropy(x, np.zeros(70, int))
    d_logits = accelerated.cross_entropy_backward(cache)
    assert np.isnan(loss) and np.isnan(d_logits[3]).all() and np.isfinite(d_logits[clean]).all()
    q = normal(70, 32, seed=1)
    out = accelerated.attention(q, x, q, 1, 1)[0]  # keys with a NaN at position 3: every later query sees it
    assert np.isfinite(out[:3]).all() and np.isnan(out[3:]).all()
    assert np.isnan(accelerated.sum_of_squares(x))
    assert accelerated.sum_of_squares(np.full(3, np.inf, np.float32)) == np.inf


def test_sums_of_a_wide_vocabulary_keep_their_digits():
    logits = normal(4, 50257) * 3
    labels = np.array([0, 50256, -1, 777])
    loss, cache = accelerated.cross_entropy(logits, labels)
    loss64, cache64 = reference.cross_entropy(logits.astype(np.float64), labels)
    assert abs(loss - loss64) < 1e-6
    assert_close(accelerated.cross_entropy_backward(cache), reference.cross_entropy_backward(cache64), 1e-6)


def test_sum_of_squares_and_scale(n_threads):
    x = normal(700, 300)
    assert accelerated.sum_of_squares(x) == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-14)
    assert np.array_equal(accelerated.scale(x, 0.37), x * np.float32(0.37))
    threads.set_num_threads(1)
    assert accelerated.sum_of_squares(x) == one_thread_sum(x)


def one_thread_sum(x):
    """The documented order: blocks of 8192 elements, each block's sum added in turn."""
    total = 0.0  # not sum(): from Python 3.12 on it compensates for rounding
    for block in np.split(x.ravel(), range(8192, x.size, 8192)):
        total += accelerated.sum_of_squares(block)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# errors
# ----------------------------------------------------------------------------------------------------------------------

X, W, G, IDS = normal(6, 4), normal(5, 4), normal(4), np.zeros(6, int)
D_Y = normal(6, 5)  # of linear(X, W)
READ_ONLY = normal(5, 4)
READ_ONLY.flags.writeable = False
LINEAR_CACHE = accelerated.linear(X, W)[1]
MISALIGNED = np.frombuffer(bytearray(4 * 24 + 1), np.uint8)[1:].view(np.float32).reshape(6, 4)
HP = np.zeros((1, 7), np.float32)

WRONG_CALLS = {
    "list instead of array": (lambda: accelerated.gelu([[1.0]]), ["x", "list", "numpy"]),
    "float64": (lambda: accelerated.gelu(X.astype(float)), ["x", "float64", "backend 'numpy'"]),
    "float64 weight": (lambda: accelerated.linear(X, W.astype(float)), ["weight", "float64"]),
    "foreign byte order": (lambda: accelerated.gelu(X.astype(">f4")), ["x", "byte order"]),
    "misaligned": (lambda: accelerated.gelu(MISALIGNED), ["x", "misaligned"]),
    "one axis": (lambda: accelerated.gelu(G), ["x", "(4,)", "(any, any)"]),
    "transposed": (lambda: accelerated.gelu(np.ones((4, 6), np.float32).T), ["x", "ascontiguousarray"]),
    "every second column": (lambda: accelerated.gelu(normal(6, 8)[:, ::2]), ["x", "contiguous"]),
    "rows backwards": (lambda: accelerated.gelu(X[::-1]), ["x", "contiguous"]),
    "one row repeated": (lambda: accelerated.gelu(np.broadcast_to(G, (6, 4))), ["x", "overlap"]),
    "weight of another width": (lambda: accelerated.linear(X, normal(5, 3)), ["weight", "(5, 3)", "(any, 4)", "(out, in)"]),
    "weight with gaps": (lambda: accelerated.linear(X, normal(5, 8)[:, :4]), ["weight", "C-contiguous"]),
    "bias length": (lambda: accelerated.linear(X, W, G), ["bias", "(4,)", "(5,)"]),
    "bias is a matrix": (lambda: accelerated.linear(X, W, normal(1, 5)), ["bias", "(1, 5)", "(5,)"]),
    "d_y": (lambda: accelerated.linear_backward(X, LINEAR_CACHE, None), ["d_y", "(6, 4)", "(6, 5)"]),
    "d_weight shape": (lambda: accelerated.linear_backward(D_Y, LINEAR_CACHE, normal(4, 5)), ["d_weight", "(4, 5)"]),
    "d_weight read-only": (lambda: accelerated.linear_backward(D_Y, LINEAR_CACHE, READ_ONLY), ["d_weight", "read-only"]),
    "cache of another op": (lambda: accelerated.gelu_backward(X, LINEAR_CACHE), ["cache", "gelu", "LinearCache"]),
    "cache of another activation": (lambda: accelerated.silu_backward(X, accelerated.gelu(X)[1]), ["cache", "silu"]),
    "cache of the other norm": (
        lambda: accelerated.rms_norm_backward(X, accelerated.layer_norm(X, G, G)[1], None), ["cache", "rms_norm"],
    ),
    "cache is None": (lambda: accelerated.attention_backward(X, None), ["cache", "attention", "NoneType"]),
    "gamma": (lambda: accelerated.rms_norm(X, normal(5)), ["gamma", "(5,)", "(4,)"]),
    "beta": (lambda: accelerated.layer_norm(X, G, normal(3)), ["beta", "(3,)", "(4,)"]),
    "beta is None": (lambda: accelerated.layer_norm(X, G, None), ["beta", "NoneType"]),
    "add": (lambda: accelerated.add(X, normal(6, 5)), ["b", "(6, 5)", "(6, 4)"]),
    "add None": (lambda: accelerated.add(X, None), ["b", "None"]),
    "swiglu": (lambda: accelerated.swiglu(X, normal(5, 4)), ["up", "(5, 4)", "(6, 4)"]),
    "id too large": (lambda: accelerated.embedding(np.array([0, 5]), W), ["token_ids", "element 1 is 5", "0 to 4"]),
    "id negative": (lambda: accelerated.embedding(np.array([-1]), W), ["token_ids", "-1", "0 to 4"]),
    "id beyond int64": (lambda: accelerated.embedding(np.array([2**63 + 1], np.uint64), W), ["token_ids", "0 to 4"]),
    "ids are floats": (lambda: accelerated.embedding(np.zeros(3), W), ["token_ids", "float64", "integers"]),
    "ids are a list": (lambda: accelerated.embedding([0, 1], W), ["token_ids", "list"]),
    "ids have two axes": (lambda: accelerated.embedding(np.zeros((2, 2), int), W), ["token_ids", "(2, 2)"]),
    "d_table": (
        lambda: accelerated.embedding_backward(X, accelerated.embedding(IDS, W)[1], normal(6, 4)),
        ["d_table", "(6, 4)", "(5, 4)"],
    ),
    "position negative": (lambda: accelerated.rope(X, np.full(6, -2), 2), ["positions", "-2"]),
    "positions too few": (lambda: accelerated.rope(X, np.zeros(5, int), 2), ["positions", "(5,)", "(6,)"]),
    "rope heads": (lambda: accelerated.rope(X, IDS, 3), ["n_heads=3", "(6, 4)"]),
    "rope odd head": (lambda: accelerated.rope(normal(6, 6), IDS, 2), ["n_heads=2", "even"]),
    "rope base": (lambda: accelerated.rope(X, IDS, 2, 0.0), ["base", "0.0"]),
    "heads do not divide": (lambda: accelerated.attention(X, X, X, 1, 3), ["q", "n_heads=3", "(6, 4)"]),
    "batch does not divide": (lambda: accelerated.attention(X, X, X, 4, 2), ["q", "batch=4"]),
    "batch zero": (lambda: accelerated.attention(X, X, X, 0, 2), ["batch=0"]),
    "kv heads": (lambda: accelerated.attention(X, X, X, 1, 4, 3), ["n_kv_heads=3", "multiple"]),
    "k width": (lambda: accelerated.attention(X, normal(6, 2), X, 1, 2), ["k", "(6, 2)", "(any, 4)"]),
    "v rows": (lambda: accelerated.attention(X, X, normal(5, 4), 1, 2), ["v", "(5, 4)", "(6, 4)"]),
    "fewer keys than queries": (lambda: accelerated.attention(X, X[:3], X[:3], 1, 2), ["k", "Tk >= Tq"]),
    "no keys": (lambda: accelerated.attention(X, X[:0], X[:0], 1, 2, causal=False), ["k", "Tk >= 1"]),
    "label too large": (lambda: accelerated.cross_entropy(X, np.full(6, 4)), ["labels", "element 0 is 4", "-1 to 3"]),
    "label too small": (lambda: accelerated.cross_entropy(X, np.full(6, -2)), ["labels", "-2", "-1 to 3"]),
    "labels too few": (lambda: accelerated.cross_entropy(X, IDS[:2]), ["labels", "(2,)", "(6,)"]),
    "labels are floats": (lambda: accelerated.cross_entropy(X, np.zeros(6)), ["labels", "float64"]),
    "dense labels": (lambda: accelerated.cross_entropy(X, normal(6, 3)), ["labels", "(6, 3)", "(6, 4)"]),
    "dense labels in float64": (lambda: accelerated.cross_entropy(X, np.zeros((6, 4))), ["labels", "float64"]),
    "no vocabulary": (lambda: accelerated.cross_entropy(normal(6, 0), IDS), ["logits", "(6, 0)"]),
    "adamw gradient": (lambda: accelerated.adamw_step(W, normal(4, 5), W, W, HP), ["gradient", "(4, 5)", "(5, 4)"]),
    "adamw read-only": (lambda: accelerated.adamw_step(READ_ONLY, W, W, W, HP), ["weight", "read-only"]),
    "adamw moments": (lambda: accelerated.adamw_step(W, W, W, W.astype(float), HP), ["v", "float64"]),
    "adamw row": (lambda: accelerated.adamw_step(W, W, W, W, HP[:, :6]), ["hp", "(1, 6)", "(1, 7)"]),
    "adamw factor": (lambda: accelerated.adamw_step(*np.zeros((4, 3), np.float32), HP, "half"), ["factor='half'", "real"]),
    "scale in float64": (lambda: accelerated.scale(W.astype(float), 2.0), ["x", "float64"]),
    "reshape": (lambda: accelerated.reshape(X, 5), ["rows", "5", "24 numbers", "(6, 4)"]),
    "reshape to nothing": (lambda: accelerated.reshape(X, 0), ["rows", "0"]),
    "reshape of a vector": (lambda: accelerated.reshape(G, 2), ["x", "(4,)"]),
    "zeros like a list": (lambda: accelerated.zeros_like([[1.0]]), ["x", "list"]),
    "sum of a transposed matrix": (lambda: accelerated.sum_of_squares(W.T), ["x", "C-contiguous"]),
    "split": (lambda: accelerated.split(X, [2, 3]), ["widths", "[2, 3]", "(6, 4)"]),
    "split negative": (lambda: accelerated.split(X, [5, -1]), ["widths", "[5, -1]"]),
    "concat nothing": (lambda: accelerated.concat([]), ["parts", "empty"]),
    "concat rows": (lambda: accelerated.concat([X, X[:2]]), ["parts", "(2, 4)", "(6, any)"]),
    "threads zero": (lambda: threads.set_num_threads(0), ["0", "1 to 1024"]),
    "threads huge": (lambda: threads.set_num_threads(10**30), ["1 to 1024"]),
    "threads float": (lambda: threads.set_num_threads(2.0), ["2.0", "integer"]),
    "idle limit": (lambda: memory.set_idle_limit(-1), ["-1"]),
}  # fmt: skip


@pytest.mark.parametrize("call, words", WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_wrong_arguments_are_value_errors_that_say_what_is_wrong(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_ids_and_labels_are_copied():
    """A data loader may reuse its arrays; the backward must not index with what they hold by then."""
    ids, labels, positions = np.zeros(6, int), np.zeros(6, int), np.zeros(6, int)
    _, embedding_cache = accelerated.embedding(ids, W)
    _, loss_cache = accelerated.cross_entropy(X, labels)
    _, rope_cache = accelerated.rope(X, positions, 2)
    ids[:], labels[:], positions[:] = 10**12, 10**12, 10**12
    d_table = np.zeros_like(W)
    accelerated.embedding_backward(X, embedding_cache, d_table)
    assert_close(d_table[0], X.sum(0))
    assert np.isfinite(accelerated.cross_entropy_backward(loss_cache)).all()
    assert np.array_equal(accelerated.rope_backward(X, rope_cache), X)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i4", ">i8"])
def test_ids_of_any_integer_dtype(dtype):
    ids = np.array([3, 0, 4, 4], dtype)
    assert np.array_equal(accelerated.embedding(ids, W)[0], W[[3, 0, 4, 4]])
    assert np.array_equal(accelerated.embedding(np.repeat(ids, 2)[::2], W)[0], W[[3, 0, 4, 4]])


# ----------------------------------------------------------------------------------------------------------------------
# threads
# ----------------------------------------------------------------------------------------------------------------------


def one_step(seed=0):
    """Some of every kind of kernel, large enough to be spread over threads -> the bytes of all results."""
    x, weight, d_y = normal(512, 96, seed=seed), normal(288, 96, seed=seed), normal(512, 288, seed=seed)
    d_weight, d_bias, d_gamma = np.zeros_like(weight), np.zeros(288, np.float32), np.zeros(96, np.float32)
    y, cache = accelerated.linear(x, weight, d_bias)
    results = [y, accelerated.linear_backward(d_y, cache, d_weight, d_bias)]
    out, cache = accelerated.attention(*accelerated.split(y, [96] * 3), 4, 6)
    results += [out, *accelerated.attention_backward(x, cache)]
    normed, cache = accelerated.rms_norm(x, weight[0].copy())
    results += [normed, accelerated.rms_norm_backward(x, cache, d_gamma)]
    loss, cache = accelerated.cross_entropy(y, np.arange(512) % 288)
    results += [np.float64(loss), accelerated.cross_entropy_backward(cache), accelerated.gelu(y)[0]]
    results += [d_weight, d_bias, d_gamma, np.float64(accelerated.sum_of_squares(y))]
    return [result.tobytes() for result in results]


def test_same_bits_every_time(n_threads):
    first = one_step()
    for _ in range(20):
        assert one_step() == first


def test_long_ops_are_cut_into_more_slices_than_threads_and_stay_the_same():
    """What is computed row by row has the same bits for any number of threads; sums over rows agree closely."""
    x, gamma = normal(3000, 800), normal(800)
    labels = np.arange(3000) % 800
    results, sums = {}, {}
    before = threads.get_num_threads()
    try:
        for n in (1, 2, 3):
            threads.set_num_threads(n)
            y, cache = accelerated.layer_norm(x, gamma, gamma)
            d_gamma, d_beta = np.zeros_like(gamma), np.zeros_like(gamma)
            d_x = accelerated.layer_norm_backward(y, cache, d_gamma, d_beta)
            loss, loss_cache = accelerated.cross_entropy(x, labels)
            results[n] = [accelerated.gelu(x)[0], y, d_x, loss, accelerated.cross_entropy_backward(loss_cache)]
            sums[n] = (d_gamma, d_beta)
    finally:
        threads.set_num_threads(before)
    for n in (2, 3):
        assert all(np.array_equal(one, other) for one, other in zip(results[1], results[n]))
        assert_close(sums[n], sums[1])


def test_two_python_threads_at_once(two_threads):
    """One of them has the pool, the other does all its slices itself: the same slices, so the same bits."""
    expected = {seed: one_step(seed) for seed in (0, 1)}
    wrong = []

    def work(seed):
        for _ in range(25):
            if one_step(seed) != expected[seed]:
                wrong.append(seed)

    both = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong


def test_the_number_of_threads_can_change_while_kernels_run(two_threads):
    stop = threading.Event()
    expected = {}
    for n in (1, 2, 4):
        threads.set_num_threads(n)
        expected[n] = one_step()
    failures = []

    def work():
        while not stop.is_set():
            try:
                one_step()
            except BaseException as error:
                failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for n in [1, 4, 2, 3, 1, 2] * 5:
        threads.set_num_threads(n)
        assert threads.get_num_threads() == n
    stop.set()
    worker.join()
    assert not failures
    for n in (1, 2, 4):
        threads.set_num_threads(n)
        assert one_step() == expected[n]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kernels_work_in_a_forked_child(two_threads):
    expected = one_step()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import signal

            signal.alarm(60)  # a pool that waits for threads that were not forked would wait for ever
            status = 0 if one_step() == expected else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert one_step() == expected


def test_blas_gets_its_threads_back(two_threads):
    info = blas.blas_info()
    if not info["held_to_one_thread"]:
        pytest.skip(f"the BLAS of this scipy is {info['name']}, whose thread count is left alone")
    before = info["threads_outside_kernels"]
    one_step()
    with pytest.raises(ValueError):
        accelerated.linear(X, normal(5, 3))
    assert blas.blas_info()["threads_outside_kernels"] == before


UNCONTROLLED_BLAS = """
import ctypes, sys

real = ctypes.CDLL
DEAF = {deaf}  # True: it has OpenBLAS's functions, and does not do what they are told; False: it has none, as MKL

@ctypes.CFUNCTYPE(ctypes.c_int)
def get_num_threads():
    return 4

@ctypes.CFUNCTYPE(None, ctypes.c_int)
def set_num_threads(n):
    pass

def library(name, *arguments, **keywords):
    if "cython_blas" not in str(name):
        return real(name, *arguments, **keywords)
    functions = dict(openblas_get_num_threads=get_num_threads, openblas_set_num_threads=set_num_threads)
    return type("BLAS", (), functions if DEAF else dict())

ctypes.CDLL = library
from toy._kernels import blas
assert not blas.blas_info()["held_to_one_thread"]
"""


@pytest.mark.parametrize("deaf", [False, True], ids=["no control", "deaf"])
def test_a_blas_that_cannot_be_held_to_one_thread(tmp_path, deaf):
    """Simulated: scipy's BLAS keeps its two threads, and the kernels cannot set them. Debian and conda let one choose such.

    The numbers are right all the same, op by op and in a ggml graph, and `toy backends` says that the BLAS goes its own way.
    """
    (tmp_path / "uncontrolled_blas.py").write_text(UNCONTROLLED_BLAS.format(deaf=deaf))
    places = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(_kernels.__path__[0]))])
    result = run_python(THREE_CURVES, PYTHONPATH=places, OPENBLAS_NUM_THREADS="2", TOY_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    said, *curves = result.stdout.splitlines()
    assert said.count("cannot be held to one thread") == 1
    numpy, cython, ggml = ([float(loss) for loss in curve.split()] for curve in curves)
    assert numpy[0] > numpy[-1]
    np.testing.assert_allclose([cython, ggml], [numpy] * 2, atol=1e-5)


THREE_CURVES = """
import uncontrolled_blas
import numpy as np, toy

print(toy.backends())
for backend in ("numpy", "cython", "ggml"):
    config = toy.LlamaConfig(
        vocab_size=65, d_model=128, n_heads=4, n_kv_heads=2, d_ff=256, n_layers=2, context_length=64
    )
    recipe = toy.recipes.FromScratch(backend=backend)
    recipe.realize(config, toy.RecipeOptions(t_seq=64, t_batch=4))
    adamw, tokens = recipe.adamw(lr=1e-3), np.random.default_rng(0).integers(0, 65, (4, 65))
    print(*(
        recipe.step(tokens[:, :-1], None, tokens[:, 1:], adamw.hp_for_step(k), is_first=k == 0) for k in range(4)
    ))
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_toy_num_threads_is_obeyed():
    code = "from toy.ops import accelerated; print(accelerated.get_num_threads())"
    assert run_python(code, TOY_NUM_THREADS="3").stdout == "3\n"
    assert int(run_python(code, TOY_NUM_THREADS="").stdout) >= 1


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "100000"])
def test_a_wrong_toy_num_threads_is_a_value_error(text):
    result = run_python("import toy.ops.accelerated", TOY_NUM_THREADS=text)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "TOY_NUM_THREADS" in last and repr(text) in last


# ----------------------------------------------------------------------------------------------------------------------
# recycled memory
# ----------------------------------------------------------------------------------------------------------------------


def test_memory_is_recycled_only_when_nothing_uses_it():
    memory.clear()
    x = normal(300, 100)
    y = accelerated.add(x, x)
    address, part = y.ctypes.data, y[5:, 10:20]
    del y
    assert memory.idle_memory() == 0  # the view still uses the block
    z = accelerated.add(x, part.base)
    assert z.ctypes.data != address
    assert np.array_equal(part, 2 * x[5:, 10:20])
    del part
    assert memory.idle_memory() >= x.nbytes
    assert accelerated.add(x, x).ctypes.data == address  # taken from the idle block, and given back at once
    memory.clear()
    assert memory.idle_memory() == 0


def test_new_arrays_are_aligned_writable_and_ordinary():
    y = accelerated.add(normal(300, 100), normal(300, 100))
    assert y.ctypes.data % 64 == 0
    assert y.flags.c_contiguous and y.flags.writeable and y.dtype == np.float32 and type(y) is np.ndarray
    y += 1.0


def test_idle_memory_has_a_limit():
    memory.clear()
    x = normal(500, 1000)
    memory.set_idle_limit(5_000_000)
    try:
        several = [accelerated.add(x, x) for _ in range(6)]
        del several
        assert x.nbytes <= memory.idle_memory() <= 5_000_000
    finally:
        memory.set_idle_limit(1 << 30)
        memory.clear()


def test_a_size_that_fits_no_memory_is_a_memory_error():
    one_column = np.lib.stride_tricks.as_strided(np.zeros(2**20, np.float32), (2**19, 1), (8, 4))
    with pytest.raises(MemoryError):
        accelerated.linear(one_column, np.zeros((2**31 - 1, 1), np.float32)[:, :])


# ----------------------------------------------------------------------------------------------------------------------
# the build
# ----------------------------------------------------------------------------------------------------------------------


def test_build_info():
    info = _kernels.build_info()
    assert info["simd_bits"] in (128, 256, 512)
    assert info["threads"] == threads.get_num_threads()
    assert info["blas"]["name"]
    assert ("avx2" in info["cpu_features"]) <= (info["simd_bits"] >= 256)
    assert cpu.missing_features() == []


def test_a_cpu_without_the_features_is_an_import_error_before_any_kernel_is_loaded():
    code = """
import sys, types
sys.modules["toy._kernels.cpu"] = fake = types.ModuleType("toy._kernels.cpu")
fake.missing_features = lambda: ["avx512f"]
try:
    import toy.ops.accelerated
except ImportError as error:
    loaded = [name for name in sys.modules if name.startswith("toy._kernels.") and name != "toy._kernels.cpu"]
    print(error, loaded)
"""
    output = run_python(code).stdout
    assert "avx512f" in output and "reinstall" in output and output.endswith("[]\n")


def test_missing_kernels_are_an_import_error_that_says_how_to_build_them():
    code = """
import sys
sys.modules["toy._kernels.cpu"] = None
try:
    import toy.ops.accelerated
except ImportError as error:
    print(error)
"""
    output = run_python(code).stdout
    assert "not built" in output and "compiler" in output


REBUILD = "pip install --force-reinstall --no-cache-dir --no-deps "

# where toy was installed from (PEP 610's direct_url.json, None: no such file) -> what pip is to be given
ORIGINS = {
    "an index": (None, "--no-binary toy toy"),
    "a folder": ('{"url": "file:///home/a%20b/toy", "dir_info": {}}', "file:///home/a%20b/toy"),
    "an sdist": ('{"url": "https://example.org/toy-1.tar.gz", "archive_info": {}}', "https://example.org/toy-1.tar.gz"),
    "a wheel": ('{"url": "file:///tmp/toy-1-py3-none-any.whl", "archive_info": {}}', "--no-binary toy toy"),
    "git": (
        '{"url": "https://example.org/toy.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
        "git+https://example.org/toy.git@abc",
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_what_to_type_to_build_it_again(monkeypatch, tmp_path, origin):
    record, source = ORIGINS[origin]
    distribution = types.SimpleNamespace(read_text={"direct_url.json": record}.get)
    monkeypatch.setattr(_kernels.importlib.metadata, "distribution", {"toy": distribution}.get)
    monkeypatch.setattr(_kernels, "__file__", str(tmp_path / "site-packages" / "toy" / "_kernels" / "__init__.py"))
    assert _kernels.rebuild_command() == REBUILD + source


def test_what_to_type_in_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "setup.py").touch()
    monkeypatch.setattr(_kernels, "__file__", str(tmp_path / "a b" / "toy" / "_kernels" / "__init__.py"))
    command = _kernels.rebuild_command()
    assert command == f"{REBUILD}-e {(tmp_path / 'a b').as_uri()}"
    assert len(shlex.split(command)) == 7, "no shell takes the folder apart"


def test_both_messages_name_the_command():
    """Missing kernels, and kernels for another CPU."""
    code = """
import sys, types
sys.modules["toy._kernels.cpu"] = CPU
try:
    import toy.ops.accelerated
except ImportError as error:
    print(error)
"""
    other = 'fake = types.ModuleType("cpu"); fake.missing_features = lambda: ["avx512f"]\n'
    for module in ("None", "fake"):
        printed = run_python(code.replace("sys.modules", other + "sys.modules").replace("CPU", module)).stdout
        assert _kernels.rebuild_command() in printed
