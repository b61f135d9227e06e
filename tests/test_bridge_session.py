"""Session: each verb and its gradient against PyTorch in float64, AdamW, the order of calls, and the example."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bridge_support import needs_ggml, relative_error
from hypothesis import given
from hypothesis import strategies as st

import ggml_bridge

pytestmark = needs_ggml

EXAMPLES = Path(__file__).parent.parent / "examples"
HP = [[1e-2, 0.9, 0.95, 1e-8, 0.0, 1.0, 1.0]]

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def persistent(s, shape):
    return s.input_1d_f32_persistent(*shape) if len(shape) == 1 else s.input_2d_f32_persistent(*shape)


def value_and_gradients(verbs, arrays, ids=None, n_threads=1):
    """verbs(session, *params[, ids]) -> tensor. Returns its value, a random cotangent, and the gradients of
    sum(value * cotangent) with respect to the params, all from one graph that also updates the params."""
    with ggml_bridge.Session(n_threads=n_threads) as s:
        params = [persistent(s, a.shape) for a in arrays]
        for param in params:
            s.set_param(param)
        s.finalize_weights()
        for param, array in zip(params, arrays):
            s.upload_row_major(param, array)
        index = [] if ids is None else [s.input_1d_i32(len(ids))]
        out = verbs(s, *params, *index)
        s.set_output(out)
        rows, columns = (1, *out.shape)[-2:]
        cotangent = s.input_2d_f32(1, rows * columns)
        # a random cotangent: with all ones softmax and the norms would have a gradient of zero
        s.set_loss(s.matmul(cotangent, s.cont_2d(out, 1, rows * columns)))
        s.build_backward()
        gradients = [s.tensor_grad(param) for param in params]
        hp = s.input_2d_f32(1, 7)
        for param in params:
            s.opt_step_adamw(param, hp)
        s.realize_backward()
        assert ggml_bridge.metal_unsupported(s) == []
        assert ggml_bridge.cuda_unsupported(s) == []
        s.graph_reset()
        c = normal(1, rows * columns)
        s.upload_row_major(cotangent, c)
        s.upload_row_major(hp, [[0, 0.9, 0.95, 1e-8, 0, 1, 1]])  # a learning rate of 0: outputs may be views of params
        for tensor in index:
            s.upload_int_array(tensor, ids)
        s.compute_backward()
        return s.download(out), c.reshape(rows, columns), [s.download(gradient) for gradient in gradients]


def check(verbs, reference, *arrays, ids=None):
    """A composition of verbs against the same in PyTorch, float64: value and gradients."""
    torch = pytest.importorskip("torch")
    got, cotangent, gradients = value_and_gradients(verbs, arrays, ids)
    params = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    out = reference(torch, *params, *([] if ids is None else [torch.tensor(ids)]))
    assert relative_error(got, out.detach().numpy()) < 2e-6
    (out.reshape(cotangent.shape) * torch.tensor(cotangent, dtype=torch.float64)).sum().backward()
    for gradient, param in zip(gradients, params):
        assert relative_error(gradient, param.grad.numpy()) < 2e-6


def torch_gelu(torch, x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def torch_mask(torch, x, n_past):
    return x.masked_fill(torch.arange(x.shape[1]) > torch.arange(x.shape[0])[:, None] + n_past, -torch.inf)


def torch_rms_norm(torch, x, gamma, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gamma


VERBS = {
    "add": (lambda s, a, b: s.add(a, b), lambda t, a, b: a + b, (normal(4, 6), normal(4, 6))),
    "add a bias": (lambda s, a, b: s.add(a, b), lambda t, a, b: a + b, (normal(4, 6), normal(6))),
    "add a row first": (lambda s, a, b: s.add(a, b), lambda t, a, b: a + b, (normal(1, 6), normal(4, 6))),
    "add a column": (lambda s, a, b: s.add(a, b), lambda t, a, b: a + b, (normal(4, 6), normal(4, 1))),
    "add a number": (lambda s, a, b: s.add(a, b), lambda t, a, b: a + b, (normal(4, 6), normal(1, 1))),
    "add to itself": (lambda s, a: s.add(a, s.add(a, a)), lambda t, a: 3 * a, (normal(4, 6),)),
    "mul": (lambda s, a, b: s.mul(a, b), lambda t, a, b: a * b, (normal(4, 6), normal(4, 6))),
    "mul a row": (lambda s, a, b: s.mul(a, b), lambda t, a, b: a * b, (normal(4, 6), normal(6))),
    "mul a column": (lambda s, a, b: s.mul(a, b), lambda t, a, b: a * b, (normal(4, 6), normal(4, 1))),
    "mul by itself": (lambda s, a: s.mul(a, s.mul(a, a)), lambda t, a: a**3, (normal(4, 6),)),
    "matmul": (lambda s, w, x: s.matmul(w, x), lambda t, w, x: x @ w.T, (normal(5, 6), normal(4, 6))),
    "matmul by itself": (lambda s, x: s.matmul(x, x), lambda t, x: x @ x.T, (normal(4, 6),)),
    "matmul of views": (
        lambda s, w, x: s.matmul(s.transpose(w), s.transpose(x)),
        lambda t, w, x: x.T @ w,
        (normal(6, 5), normal(6, 4)),
    ),
    "matmul of single rows": (lambda s, w, x: s.matmul(w, x), lambda t, w, x: x @ w.T, (normal(1, 6), normal(1, 6))),
    "matmul of columns": (lambda s, w, x: s.matmul(w, x), lambda t, w, x: x @ w.T, (normal(5, 1), normal(4, 1))),
    "scale": (lambda s, x: s.scale(x, -2.5), lambda t, x: -2.5 * x, (normal(4, 6),)),
    "layer_norm": (
        lambda s, x, g, b: s.layer_norm(x, g, b, 1e-5),
        lambda t, x, g, b: t.nn.functional.layer_norm(x, (6,), g, b, 1e-5),
        (3 * normal(4, 6) + 1, normal(6), normal(6)),
    ),
    "layer_norm of tiny rows": (  # eps counts
        lambda s, x, g, b: s.layer_norm(x, g, b, 1e-5),
        lambda t, x, g, b: t.nn.functional.layer_norm(x, (6,), g, b[0], 1e-5),
        (1e-3 * normal(4, 6), normal(6), normal(1, 6)),
    ),
    "rms_norm": (
        lambda s, x, g: s.rms_norm(x, g, 1e-5),
        lambda t, x, g: torch_rms_norm(t, x, g, 1e-5),
        (3 * normal(4, 6) + 1, normal(6)),
    ),
    "rms_norm of tiny rows": (
        lambda s, x, g: s.rms_norm(x, g, 1e-5),
        lambda t, x, g: torch_rms_norm(t, x, g, 1e-5),
        (1e-3 * normal(4, 6), normal(6)),
    ),
    "gelu": (lambda s, x: s.gelu(x), torch_gelu, (3 * normal(4, 6),)),
    "gelu far out": (lambda s, x: s.gelu(x), torch_gelu, (np.linspace(-12, 12, 24, dtype=np.float32).reshape(4, 6),)),
    "silu": (lambda s, x: s.silu(x), lambda t, x: t.nn.functional.silu(x), (3 * normal(4, 6),)),
    "softmax": (lambda s, x: s.softmax(x), lambda t, x: x.softmax(-1), (3 * normal(4, 6),)),
    "softmax of a mask": (
        lambda s, x: s.softmax(s.diag_mask_inf(x, 1)),
        lambda t, x: torch_mask(t, x, 1).softmax(-1),
        (normal(5, 5),),
    ),
    "transpose": (lambda s, x: s.transpose(x), lambda t, x: x.T, (normal(4, 6),)),
    "transpose, then elementwise": (
        lambda s, x, y: s.mul(s.silu(s.transpose(x)), s.transpose(y)),
        lambda t, x, y: t.nn.functional.silu(x.T) * y.T,
        (normal(4, 6), normal(4, 6)),
    ),
    "cont_2d": (lambda s, x: s.cont_2d(s.transpose(x), 8, 3), lambda t, x: x.T.reshape(8, 3), (normal(4, 6),)),
    "concat of columns": (
        lambda s, a, b: s.concat(s.concat(a, b), a),
        lambda t, a, b: t.cat([a, b, a], 1),
        (normal(4, 6), normal(4, 2)),
    ),
    "concat of rows": (
        lambda s, a, b: s.concat(a, b, 0),
        lambda t, a, b: t.cat([a, b], 0),
        (normal(4, 6), normal(1, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_verb_and_its_gradient(verb):
    verbs, reference, arrays = VERBS[verb]
    check(verbs, reference, *arrays)


@pytest.mark.parametrize("v, n", [(3, 8), (8, 8), (50, 8), (1, 4), (7, 1)])
def test_get_rows_collects_the_gradients_of_equal_ids(v, n):
    ids = rng.integers(0, min(v, 4), n)  # ids occur several times
    check(lambda s, table, i: s.get_rows(table, i), lambda t, table, i: table[i], normal(v, 5), ids=ids)


def test_a_tied_embedding_collects_lookup_and_head():
    ids = np.array([2, 0, 2, 5])
    check(
        lambda s, table, w, i: s.matmul(table, s.matmul(w, s.get_rows(table, i))),
        lambda t, table, w, i: table[i] @ w.T @ table.T,
        normal(6, 5),
        normal(5, 5),
        ids=ids,
    )


def test_a_table_looked_up_twice():
    ids = np.array([2, 0, 2])
    check(
        lambda s, table, i: s.mul(s.get_rows(table, i), s.silu(s.get_rows(table, i))),
        lambda t, table, i: table[i] * t.nn.functional.silu(table[i]),
        normal(6, 5),
        ids=ids,
    )


# pairs of a composition of verbs and the same in PyTorch; all (4, 3) -> (4, 3)
COMPOSITIONS = [
    (lambda s, a, b, gain: s.add(a, b), lambda t, a, b, gain: a + b),
    (lambda s, a, b, gain: s.softmax(s.mul(a, b)), lambda t, a, b, gain: (a * b).softmax(-1)),
    (lambda s, a, b, gain: s.gelu(a), lambda t, a, b, gain: torch_gelu(t, a)),
    (lambda s, a, b, gain: s.mul(s.silu(a), b), lambda t, a, b, gain: t.nn.functional.silu(a) * b),
    (lambda s, a, b, gain: s.rms_norm(a, gain, 1e-2), lambda t, a, b, gain: torch_rms_norm(t, a, gain, 1e-2)),
    (
        lambda s, a, b, gain: s.layer_norm(a, gain, gain, 1e-2),
        lambda t, a, b, gain: t.nn.functional.layer_norm(a, (3,), gain, gain, 1e-2),
    ),
    (
        lambda s, a, b, gain: s.matmul(s.transpose(b), s.softmax(s.diag_mask_inf(s.matmul(a, b)))),
        lambda t, a, b, gain: torch_mask(t, b @ a.T, 0).softmax(-1) @ b,
    ),
    (
        lambda s, a, b, gain: s.cont_2d(s.transpose(s.cont_2d(a, 3, 4)), 4, 3),
        lambda t, a, b, gain: a.reshape(3, 4).T.reshape(4, 3),
    ),
    (lambda s, a, b, gain: s.scale(s.add(a, gain), 0.5), lambda t, a, b, gain: (a + gain) * 0.5),
    (
        lambda s, a, b, gain: s.matmul(
            s.transpose(s.concat(a, b, 0)), s.softmax(s.concat(s.matmul(a, b), s.matmul(b, a)))
        ),
        lambda t, a, b, gain: t.cat([b @ a.T, a @ b.T], 1).softmax(-1) @ t.cat([a, b], 0),
    ),
]


@given(st.data())
def test_random_compositions(data):
    """Rules hold when results are used several times and memory is reused."""
    torch = pytest.importorskip("torch")
    number = st.integers(0, 100)
    program = data.draw(st.lists(st.tuples(st.sampled_from(range(len(COMPOSITIONS))), number, number), max_size=12))
    arrays = [normal(4, 3), normal(4, 3), normal(3)]

    def run(which, table, x, y, gain, add, mul):
        pool = [x, y]
        for kind, i, j in program:
            pool.append(COMPOSITIONS[kind][which](table, pool[i % len(pool)], pool[j % len(pool)], gain))
        return add(pool[-1], mul(add(x, y), gain))  # so that every param has a gradient

    got, cotangent, gradients = value_and_gradients(lambda s, *params: run(0, s, *params, s.add, s.mul), arrays)
    params = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    out = run(1, torch, *params, torch.add, torch.mul)
    (out * torch.tensor(cotangent, dtype=torch.float64)).sum().backward()
    # float32 loses digits where numbers of a long composition grow
    assert np.allclose(got, out.detach().numpy(), rtol=1e-3, atol=1e-4 * (1 + out.detach().abs().max().item()))
    for gradient, param in zip(gradients, params):
        expected = param.grad.numpy()
        assert np.allclose(gradient, expected, rtol=1e-3, atol=1e-4 * (1 + np.abs(expected).max()))


# ----------------------------------------------------------------------------------------------------------------------
# the loss
# ----------------------------------------------------------------------------------------------------------------------


def classifier(s, n=6, d=5, v=7, dense=False):
    """A linear classifier; returns what a step needs."""
    w = s.input_2d_f32_persistent(v, d)
    s.set_param(w)
    s.finalize_weights()
    x = s.input_2d_f32(n, d)
    labels = s.input_2d_f32(n, v) if dense else s.input_1d_i32(n)
    logits = s.matmul(w, x)
    loss = s.cross_entropy_loss(logits, labels)
    s.set_loss(loss)
    s.build_backward()
    gradient = s.tensor_grad(w)
    hp = s.input_2d_f32(1, 7)
    s.opt_step_adamw(w, hp)
    s.realize_backward()
    return w, x, labels, loss, gradient, hp


LABELS = {
    "classes": np.array([0, 6, 3, 3, 1, 2]),
    "some not counted": np.array([0, -1, 3, -1, -1, 2]),
    "one counted": np.array([-1, -1, -1, 4, -1, -1]),
    "rows": rng.dirichlet(np.ones(7), 6).astype(np.float32),
    "rows, one not counted": np.where(np.arange(6)[:, None] == 2, 0, rng.random((6, 7))).astype(np.float32),
}


@pytest.mark.parametrize("labels", LABELS)
def test_cross_entropy_against_torch(labels):
    torch = pytest.importorskip("torch")
    values, weights, activations = LABELS[labels], normal(7, 5), normal(6, 5)
    with ggml_bridge.Session(n_threads=1) as s:
        w, x, t_labels, loss, gradient, hp = classifier(s, dense=values.ndim == 2)
        assert ggml_bridge.metal_unsupported(s) == []
        assert ggml_bridge.cuda_unsupported(s) == []
        s.upload_row_major(w, weights)
        s.graph_reset()
        s.upload_row_major(x, activations)
        (s.upload_row_major if values.ndim == 2 else s.upload_int_array)(t_labels, values)
        s.upload_row_major(hp, HP)
        s.compute_backward()
        got, got_gradient = s.download_row_major(loss, 1, 1)[0, 0], s.download(gradient)
    wt = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor(activations, dtype=torch.float64) @ wt.T
    if values.ndim == 1:
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(values), ignore_index=-1)
    else:
        rows = torch.tensor(values, dtype=torch.float64)
        expected = -(rows * logits.log_softmax(-1)).sum() / (rows != 0).any(1).sum()
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(got_gradient, wt.grad.numpy()) < 2e-6


def test_no_row_counted():
    with ggml_bridge.Session(n_threads=1) as s:
        w, x, labels, loss, gradient, hp = classifier(s)
        s.upload_row_major(w, normal(7, 5))
        s.graph_reset()
        s.upload_row_major(x, normal(6, 5))
        s.upload_int_array(labels, np.full(6, -1))
        s.upload_row_major(hp, HP)
        s.compute_backward()
        assert s.download(loss) == 0 and (s.download(gradient) == 0).all()


def test_large_logits_neither_overflow_nor_vanish():
    with ggml_bridge.Session(n_threads=1) as s:
        w, x, labels, loss, gradient, hp = classifier(s)
        s.upload_row_major(w, 1000 * np.eye(7, 5))
        s.graph_reset()
        s.upload_row_major(x, np.eye(6, 5))
        s.upload_int_array(labels, [1, 1, 2, 3, 4, 0])  # the first is wrong by 1000 nats, the last undecided
        s.upload_row_major(hp, HP)
        s.compute_backward()
        assert s.download(loss)[0] == pytest.approx((1000 + np.log(7)) / 6, rel=1e-6)
        assert np.isfinite(s.download(gradient)).all()


def test_a_loss_that_is_a_formula_of_losses():
    torch = pytest.importorskip("torch")
    weights, activations = normal(7, 5), normal(6, 5)
    first, second = np.array([0, 6, 3, -1, 1, 2]), np.array([1, -1, -1, -1, 0, 0])
    with ggml_bridge.Session(n_threads=1) as s:
        w = s.input_2d_f32_persistent(7, 5)
        s.set_param(w)
        s.finalize_weights()
        x, a, b = s.input_2d_f32(6, 5), s.input_1d_i32(6), s.input_1d_i32(6)
        logits = s.matmul(w, x)
        total = s.add(s.cross_entropy_loss(logits, a), s.scale(s.cross_entropy_loss(logits, b), 0.3))
        s.set_loss(total)
        s.build_backward()
        gradient = s.tensor_grad(w)
        s.realize_backward()
        s.upload_row_major(w, weights)
        s.upload_row_major(x, activations)
        s.upload_int_array(a, first)
        s.upload_int_array(b, second)
        s.graph_reset()
        s.compute_backward()
        got, got_gradient = s.download(total)[0], s.download(gradient)
    wt = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor(activations, dtype=torch.float64) @ wt.T
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(logits, torch.tensor(first), ignore_index=-1)
    expected = expected + 0.3 * cross_entropy(logits, torch.tensor(second), ignore_index=-1)
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(got_gradient, wt.grad.numpy()) < 2e-6


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def test_adamw_and_the_two_resets():
    """graph_reset forgets the moments, graph_reset_grads_only keeps them; both make the gradients zero."""
    weights = normal(7, 5)
    with ggml_bridge.Session(n_threads=1) as s:
        w, x, labels, _, gradient, hp = classifier(s)
        s.upload_row_major(w, weights)
        expected = weights.astype(np.float64)
        m, v = np.zeros((7, 5)), np.zeros((7, 5))
        for step, reset in enumerate(["all", "grads", "grads", "all", "grads"], 1):
            if reset == "all":
                s.graph_reset()
                m[:], v[:] = 0, 0
            else:
                s.graph_reset_grads_only()
            assert (s.download(gradient) == 0).all()
            row = [0.05, 0.9, 0.95, 1e-8, 0.1, 1 / (1 - 0.9**step), 1 / (1 - 0.95**step)]
            s.upload_row_major(x, normal(6, 5))
            s.upload_int_array(labels, rng.integers(-1, 7, 6))
            s.upload_row_major(hp, [row])
            s.compute_backward()
            g = s.download(gradient).astype(np.float64)
            lr, beta1, beta2, eps, decay, s5, s6 = row
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            expected = expected * (1 - lr * decay) - lr * (m * s5) / (np.sqrt(v * s6) + eps)
            assert relative_error(s.download(w), expected) < 1e-5, f"step {step}"


def test_frozen_weights_stay():
    with ggml_bridge.Session(n_threads=1) as s:
        frozen, w = s.input_2d_f32_persistent(4, 4), s.input_2d_f32_persistent(3, 4)
        s.set_param(w)
        s.finalize_weights()
        s.upload_row_major(frozen, before := np.float32(2 * np.eye(4)))
        s.upload_row_major(w, normal(3, 4))
        x, labels, hp = s.input_2d_f32(5, 4), s.input_1d_i32(5), s.input_1d_f32(7)
        loss = s.cross_entropy_loss(s.matmul(w, s.silu(s.matmul(frozen, x))), labels)
        s.set_loss(loss)
        s.build_backward()
        with pytest.raises(ValueError, match="no gradient"):
            s.tensor_grad(frozen)
        with pytest.raises(ValueError, match="no param"):
            s.opt_step_adamw(frozen, hp)
        s.opt_step_adamw(w, hp)
        s.realize_backward()
        losses = []
        for step in range(30):
            s.graph_reset() if step == 0 else s.graph_reset_grads_only()
            s.upload_row_major(x, np.eye(5, 4) * 3)
            s.upload_int_array(labels, [0, 1, 2, 0, -1])
            s.upload_row_major(hp, [0.1, 0.9, 0.95, 1e-8, 0, 1, 1])
            s.compute_backward()
            losses.append(s.download(loss)[0])
        assert np.array_equal(s.download(frozen), before)
        assert losses[-1] < 0.1 * losses[0]


def test_gradients_of_results_can_be_watched():
    with ggml_bridge.Session(n_threads=1) as s:
        w = s.input_2d_f32_persistent(2, 3)
        s.set_param(w)
        s.finalize_weights()
        s.upload_row_major(w, normal(2, 3))
        x, labels = s.input_2d_f32(4, 3), s.input_1d_i32(4)
        logits = s.matmul(w, x)
        s.set_loss(s.cross_entropy_loss(logits, labels))
        s.set_output(logits)
        s.build_backward()
        d_logits = s.tensor_grad(logits)
        with pytest.raises(ValueError, match="no gradient"):
            s.tensor_grad(x)
        s.realize_backward()
        s.graph_reset()
        s.upload_row_major(x, normal(4, 3))
        s.upload_int_array(labels, [0, 1, -1, 0])
        s.compute_backward()
        values = s.download(logits).astype(np.float64)
        p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        expected = (p - np.eye(2)[[0, 1, 0, 0]]) / 3
        expected[2] = 0
        assert relative_error(s.download(d_logits), expected) < 1e-5


def test_forward_only():
    weights, activations = normal(4, 3), normal(2, 3)
    with ggml_bridge.Session(n_threads=1) as s:
        w = s.input_2d_f32_persistent(4, 3)
        s.finalize_weights()
        s.upload_row_major(w, weights)
        x = s.input_2d_f32(2, 3)
        y = s.matmul(w, x)
        with pytest.raises(RuntimeError, match="build_forward_only"):
            s.realize()
        s.build_forward_only(y)
        with pytest.raises(RuntimeError, match="realize"):
            s.compute()
        s.realize()
        s.upload_row_major(x, activations)
        s.compute()
        assert relative_error(s.download_row_major(y, 4, 2), (activations @ weights.T).reshape(4, 2)) < 1e-6
        with pytest.raises(RuntimeError, match="realized"):
            s.build_backward()


def test_the_same_twice_is_bit_identical():
    def run():
        local = np.random.default_rng(7)
        with ggml_bridge.Session(n_threads=2) as s:
            w, x, labels, loss, gradient, hp = classifier(s, 16, 24, 33)
            s.upload_row_major(w, local.normal(size=(33, 24)))
            for step in range(5):
                s.graph_reset() if step == 0 else s.graph_reset_grads_only()
                s.upload_row_major(x, local.normal(size=(16, 24)))
                s.upload_int_array(labels, local.integers(-1, 33, 16))
                s.upload_row_major(hp, HP)
                s.compute_backward()
            return s.download(loss), s.download(w), s.download(gradient)

    for first, second in zip(run(), run()):
        assert np.array_equal(first, second)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused, and the order of calls
# ----------------------------------------------------------------------------------------------------------------------


def test_order_of_calls():
    """Every call that comes too early or too late says what comes first."""
    with ggml_bridge.Session(n_threads=1) as s:

        def refused(message, call, *args):
            with pytest.raises(RuntimeError, match=message):
                call(*args)

        refused("come first", s.finalize_weights)
        w = s.input_2d_f32_persistent(3, 4)
        x, labels, hp = s.input_2d_f32(5, 4), s.input_1d_i32(5), s.input_2d_f32(1, 7)
        refused("finalize_weights comes before", s.upload_row_major, w, np.zeros((3, 4)))
        refused("finalize_weights comes before", s.download, w)
        refused("finalize_weights comes before the forward pass", s.matmul, w, x)
        s.set_param(w)
        s.finalize_weights()
        refused("already", s.finalize_weights)
        refused("before finalize_weights", s.set_param, w)
        refused("before finalize_weights", s.input_1d_f32_persistent, 3)
        refused("realize_backward", s.upload_row_major, x, np.zeros((5, 4)))
        refused("realize_backward", s.upload_int_array, labels, np.zeros(5, int))
        s.upload_row_major(w, np.zeros((3, 4)))
        refused("set_loss comes first", s.build_backward)
        refused("build_backward comes first", s.opt_step_adamw, w, hp)
        refused("build_backward comes first", s.tensor_grad, w)
        refused("build_backward comes first", s.realize_backward)
        refused("realize_backward comes first", s.graph_reset)
        refused("realize_backward comes first", s.compute_backward)
        refused("build_backward comes first", s.extend_backward_graph, x)
        loss = s.cross_entropy_loss(s.matmul(w, x), labels)
        s.set_loss(loss)
        s.build_backward()
        refused("forward pass comes before", s.matmul, w, x)
        refused("forward pass comes before", s.build_backward)
        refused("forward pass comes before", s.set_loss, loss)
        refused("realize_backward comes first", s.graph_reset)
        s.opt_step_adamw(w, hp)
        refused("already", s.opt_step_adamw, w, hp)
        s.realize_backward()
        refused("allocated|realized", s.set_output, x)
        refused("realized", s.input_1d_i32, 3)
        refused("allocated", s.realize_backward)
        refused("graph_reset .first.", s.compute_backward)
        s.graph_reset()
        refused("never uploaded", s.compute_backward)
        s.upload_row_major(x, np.zeros((5, 4)))
        s.upload_int_array(labels, np.zeros(5, int))
        s.upload_row_major(hp, HP)
        refused(r"compute\(\) comes first", s.download, loss)
        s.compute_backward()
        refused("graph_reset", s.compute_backward)
        refused("realize", s.compute)
    refused("closed", s.compute_backward)
    refused("closed", s.download, loss)
    refused("closed", s.input_1d_i32, 3)
    refused("closed", s.explain)
    s.close()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda s, w, x, ids: s.matmul(w, s.input_2d_f32(5, 3)), "second axis"),
        (lambda s, w, x, ids: s.matmul(s.input_1d_f32(4), x), "rows, cols"),
        (lambda s, w, x, ids: s.add(x, s.input_2d_f32(3, 5)), "broadcast"),
        (lambda s, w, x, ids: s.add(s.input_2d_f32(5, 1), s.input_1d_f32(4)), "broadcast"),
        (lambda s, w, x, ids: s.add(ids, x), "f32"),
        (lambda s, w, x, ids: s.layer_norm(x, s.input_1d_f32(5), s.input_1d_f32(4)), r"gamma must be \(4,\)"),
        (lambda s, w, x, ids: s.rms_norm(x, s.input_1d_f32(4), -1.0), "negative"),
        (lambda s, w, x, ids: s.rms_norm(x, s.input_1d_f32(4), float("nan")), "finite"),
        (lambda s, w, x, ids: s.get_rows(w, x), "input_1d_i32"),
        (lambda s, w, x, ids: s.cont_2d(x, 3, 7), "another number"),
        (lambda s, w, x, ids: s.concat(x, s.input_2d_f32(6, 4)), "differ"),
        (lambda s, w, x, ids: s.concat(x, x, 2), "axis"),
        (lambda s, w, x, ids: s.diag_mask_inf(x, -1), "n_past"),
        (lambda s, w, x, ids: s.cross_entropy_loss(x, s.input_1d_i32(4)), "labels"),
        (lambda s, w, x, ids: s.cross_entropy_loss(x, w), "labels"),
        (lambda s, w, x, ids: s.set_loss(s.scale(x, 2.0)), "one number"),
        (lambda s, w, x, ids: s.set_loss(s.input_1d_f32(1)), "not computed"),
        (lambda s, w, x, ids: s.input_2d_f32(0, 3), "from 1"),
        (lambda s, w, x, ids: s.upload_row_major(w, np.zeros((4, 3))), r"\(3, 4\), not \(4, 3\)"),
        (lambda s, w, x, ids: s.download_row_major(w, 5, 5), "12 elements"),
        (lambda s, w, x, ids: s.upload_int_array(w, np.zeros((3, 4), int)), "upload_row_major"),
    ],
)
def test_refused(wrong, message):
    with ggml_bridge.Session(n_threads=1) as s:
        w = s.input_2d_f32_persistent(3, 4)
        s.finalize_weights()
        x, ids = s.input_2d_f32(5, 4), s.input_1d_i32(5)
        with pytest.raises(ValueError, match=message):
            wrong(s, w, x, ids)


def test_labels_and_ids_are_checked_at_every_upload():
    with ggml_bridge.Session(n_threads=1) as s:
        table = s.input_2d_f32_persistent(9, 4)
        s.set_param(table)
        s.finalize_weights()
        s.upload_row_major(table, normal(9, 4))
        ids, labels = s.input_1d_i32(3), s.input_1d_i32(3)
        s.set_loss(s.cross_entropy_loss(s.matmul(table, s.get_rows(table, ids)), labels))
        s.build_backward()
        s.realize_backward()
        for wrong in ([0, 1, 9], [-1, 0, 0], [0, 2**40, 0]):
            with pytest.raises(ValueError, match=r"0 to 8 \(rows of a table"):
                s.upload_int_array(ids, wrong)
        for wrong in ([0, 1, 9], [-2, 0, 0]):
            with pytest.raises(ValueError, match=r"-1 to 8 \(classes of the loss"):
                s.upload_int_array(labels, wrong)
        with pytest.raises(TypeError, match="integers"):
            s.upload_int_array(labels, [0.0, 1.0, 2.0])
        s.upload_int_array(ids, [0, 8, 8])
        s.upload_int_array(labels, [-1, 8, 0])
        s.graph_reset()
        s.compute_backward()


def test_graph_capacity():
    with ggml_bridge.Session(n_threads=1, graph_capacity=5) as s:
        x = s.input_2d_f32(2, 2)
        with pytest.raises(RuntimeError, match="capacity of 5"):
            s.gelu(s.gelu(x))
        s.set_graph_capacity(100)
        s.gelu(s.gelu(x))


def test_explain_of_a_training_graph():
    with ggml_bridge.Session(n_threads=1) as s:
        w, *_ = classifier(s)
        explanation = s.explain()
        assert explanation.splits == 1 and explanation.device == "CPU" and explanation.n_threads == 1
        assert explanation.counts()["OPT_STEP_ADAMW"] == 1
        assert explanation.bytes["weights"] == 3 * 192  # the weight and its two moments, padded to 64 bytes
        assert {node.device for node in explanation.nodes} == {"CPU"}
        assert w.name in str(explanation)


def test_metal_on_a_machine_without_it():
    if any(device.backend == "MTL" for device in ggml_bridge.devices()):
        pytest.skip("this machine has Metal")
    with pytest.raises(ValueError, match=r"'metal' was not found; the devices of this ggml: 'CPU'"):
        ggml_bridge.Session(device="metal")


def test_metal_table_finds_what_metal_lacks():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x, ids = g.input((4, 6), name="x"), g.input((4,), "i32")
        for fine in (
            g.tanh(x),
            g.mul_mat(x, x),
            g.get_rows(x, ids),
            g.sum_rows(x),
            g.set_rows(g.full((4, 6), 0), x, ids),
        ):
            g.output(fine)
        assert ggml_bridge.metal_unsupported(g) == []
        half = g.cast(x, "f16")
        g.add(half, x)  # CPU adds f32 to f16, Metal only equal types
        g.cast(g.cast(x, "bf16"), "f16")
        found = ggml_bridge.metal_unsupported(g)
        assert [(node.op, why) for node, why in found] == [
            ("ADD", "inputs are f16 and f32, not both f32 or both f16"),
            ("CPY", "no copy from bf16 to f16"),
        ]


# ----------------------------------------------------------------------------------------------------------------------
# the example
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpt2_by_session

    return gpt2_by_session


def torch_gpt2(torch, w, ids, config):
    """GPT-2 from weights by GGUF name: logits (T, V)."""
    layer_norm = torch.nn.functional.layer_norm
    t, d, h = len(ids), config.d_model, config.n_heads

    def norm(x, name):
        return layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"], config.eps)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["token_embd.weight"][torch.tensor(ids)] + w["position_embd.weight"][:t]
    for i in range(config.n_layers):
        q, k, v = linear(norm(x, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv").split(d, dim=1)
        q, k, v = (part.reshape(t, h, d // h).transpose(0, 1) for part in (q, k, v))
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(a.transpose(0, 1).reshape(t, d), f"blk.{i}.attn_output")
        h1 = torch.nn.functional.gelu(linear(norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up"), approximate="tanh")
        x = x + linear(h1, f"blk.{i}.ffn_down")
    return norm(x, "output_norm") @ w["token_embd.weight"].T


def test_example_gradients_against_torch(example):
    torch = pytest.importorskip("torch")
    config = example.Config(vocab_size=40, d_model=24, n_heads=3, d_ff=96, n_layers=2, context_length=16)
    # far from the initialisation, so that every part counts
    weights = {name: (a + 0.3 * normal(*a.shape)) for name, a in example.init_weights(config).items()}
    ids, labels = rng.integers(0, 40, 16), rng.integers(-1, 40, 16)
    model = example.GPT2(config, weights, n_threads=2)
    loss = model.step(ids, labels, example.adamw_row(0, lr=0.0), is_first=True)
    gradients, logits = model.gradients(), model.session.download(model.logits)
    assert {name: a.shape for name, a in model.weights().items()} == {name: a.shape for name, a in weights.items()}
    assert all(np.array_equal(a, weights[name]) for name, a in model.weights().items())
    assert ggml_bridge.metal_unsupported(model.session) == [] and model.session.explain().splits == 1
    model.close()
    w = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in weights.items()}
    expected_logits = torch_gpt2(torch, w, ids, config)
    expected = torch.nn.functional.cross_entropy(expected_logits, torch.tensor(labels), ignore_index=-1)
    expected.backward()
    assert relative_error(logits, expected_logits.detach().numpy()) < 1e-5
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert set(gradients) == set(w)
    for name, gradient in gradients.items():
        if name.endswith("attn_qkv.bias"):
            # the bias of k has a gradient of zero: it adds the same to all scores of a query
            d = config.d_model
            assert np.abs(gradient[d : 2 * d]).max() < 1e-6
            gradient = np.delete(gradient, slice(d, 2 * d))
            assert relative_error(gradient, np.delete(w[name].grad.numpy(), slice(d, 2 * d))) < 2e-5
        else:
            assert relative_error(gradient, w[name].grad.numpy()) < 2e-5, name


def test_example_trains_as_torch_does(example):
    torch = pytest.importorskip("torch")
    config = example.Config(vocab_size=30, d_model=16, n_heads=2, d_ff=64, n_layers=1, context_length=12)
    weights = example.init_weights(config, seed=3)
    model = example.GPT2(config, weights, n_threads=1)
    w = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in weights.items()}
    optimizer = torch.optim.AdamW(w.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    sequences = rng.integers(0, 30, (4, 13))
    for step in range(60):
        ids, labels = sequences[step % 4, :-1], sequences[step % 4, 1:]
        loss = model.step(ids, labels, example.adamw_row(step, lr=1e-2, weight_decay=0.1), step == 0)
        expected = torch.nn.functional.cross_entropy(torch_gpt2(torch, w, ids, config), torch.tensor(labels))
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-3), f"step {step}"
    model.close()
    assert loss < 1.0  # the four sequences are learnt by heart; the first loss is ln 30 = 3.4


def test_example_as_a_program():
    result = subprocess.run(
        [sys.executable, EXAMPLES / "gpt2_by_session.py", "60"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "characters" in lines[0]
    first, last = (float(line.split("loss ")[1].split()[0]) for line in (lines[1], lines[-1]))
    assert last < first - 0.5
