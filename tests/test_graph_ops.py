"""Every op of the two graph tables, recorded and run in the memory that training uses, against the reference table."""

import numpy as np
import pytest
from conftest import PURE, needs_kernels
from graph_tables import GRAPH_TABLES, TABLES, on_table, run_case
from hypothesis import given
from hypothesis import strategies as st
from test_ops import BIG_SHAPES, OP_NAMES, assert_close, drawn_case, term_sizes

from toy.checks import gradcheck
from toy.ops import reference

pytestmark = [
    pytest.mark.skipif(PURE, reason="TOY_PURE_PYTHON is set"),
    pytest.mark.usefixtures("kernels"),
]

BAR = {"graph-cpu": gradcheck.TWIN_BAR, "graph-native": 1e-5}  # of the largest element, float32 against float64
ROPE_BAR = 3e-4  # ggml multiplies its way to an angle in float32; that of position 1000 is known to 1e-4

every_table = pytest.mark.parametrize("table", GRAPH_TABLES)


def every_case(which=lambda case: True):
    """Parametrises a test over the indices of `gradcheck.op_cases`, with the names of the cases as ids."""
    cases = [(i, case) for i, case in enumerate(gradcheck.op_cases(np.random.default_rng(0))) if which(case)]
    return pytest.mark.parametrize("index", [i for i, _ in cases], ids=[case.layer for _, case in cases])


def expected_of(case, cotangent):
    """The reference op in float64 on the numbers that the tables get in float32."""
    case = gradcheck.in_dtype(gradcheck.in_dtype(case, np.float32), np.float64)
    cotangent = np.float64(np.float32(cotangent))
    out, cache = gradcheck.forward(case, reference)
    return {"(output)": np.asarray(out)} | gradcheck.backward(case, reference, cotangent, cache)


def in_float32(case, cotangent):
    return gradcheck.in_dtype(case, np.float32), cotangent if np.ndim(cotangent) == 0 else cotangent.astype(np.float32)


def check(table, case, cotangent, **options):
    expected = expected_of(case, cotangent)
    found = run_case(table, *in_float32(case, cotangent), **options)
    bar = ROPE_BAR if (table, case.op) == ("graph-native", "rope") else BAR[table]
    assert_close(found, expected, bar, term_sizes(case, cotangent))


@every_table
@pytest.mark.parametrize("n_threads", [1, 2])
@every_case()
def test_op_agrees_with_the_reference(table, index, n_threads):
    rng = np.random.default_rng(index)
    case = list(gradcheck.op_cases(rng))[index]
    check(table, case, gradcheck.random_cotangent(case, rng), n_threads=n_threads)


@every_table
@pytest.mark.parametrize("op", OP_NAMES)
@given(data=st.data())
def test_op_agrees_with_the_reference_in_any_shape(table, op, data):
    case, rng = data.draw(drawn_case(op))
    check(table, case, gradcheck.random_cotangent(case, rng))


@every_table
@pytest.mark.parametrize("op", OP_NAMES)
def test_op_agrees_with_the_reference_on_a_big_shape(table, op):
    rng = np.random.default_rng(5)
    case = gradcheck.case_of(op, rng, **BIG_SHAPES[op])
    check(table, case, gradcheck.random_cotangent(case, rng), n_threads=2)


def columns_of_a_wider_matrix(ops, x):
    """The same numbers as columns 2 .. of a matrix that has others around them."""
    return ops.split(ops.concat([x, x, x]), (x.shape[1],) * 3)[1]


@every_table
@every_case()
def test_columns_are_taken_as_they_are(table, index):
    rng = np.random.default_rng(index)
    case = list(gradcheck.op_cases(rng))[index]
    check(table, case, gradcheck.random_cotangent(case, rng), arrange=columns_of_a_wider_matrix)


@every_table
@every_case(lambda case: case.parameters)
def test_parameter_gradients_collect_every_use(table, index):
    rng = np.random.default_rng(index)
    case = list(gradcheck.op_cases(rng))[index]
    cotangent = gradcheck.random_cotangent(case, rng)
    expected = expected_of(case, cotangent)
    expected |= {name: 3 * expected[name] for name in case.parameters}
    assert_close(run_case(table, *in_float32(case, cotangent), uses=3), expected, BAR[table])


@every_table
def test_a_table_longer_than_the_batch_collects_every_use(table):
    """The native gradient of such a table is written to the rows that the batch uses."""
    rng = np.random.default_rng(0)
    case = gradcheck.embedding_case(rng, rows=12, vocab=40, d=6)
    case.settings["token_ids"][:4] = [39, 0, 0, 11]  # ends of the table, and a row twice
    cotangent = gradcheck.random_cotangent(case, rng)
    for uses in (1, 2):
        expected = expected_of(case, cotangent)
        expected["table"] *= uses
        assert_close(run_case(table, *in_float32(case, cotangent), uses=uses), expected, BAR[table])


@every_table
@every_case(lambda case: case.parameters)
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(table, index):
    rng = np.random.default_rng(index)
    case = list(gradcheck.op_cases(rng))[index]
    cotangent = gradcheck.random_cotangent(case, rng)
    expected = expected_of(case, cotangent)
    for frozen in ([name] for name in case.parameters):
        wanted = {name: array for name, array in expected.items() if name not in frozen}
        assert_close(run_case(table, *in_float32(case, cotangent), frozen=frozen), wanted, BAR[table])


# ----------------------------------------------------------------------------------------------------------------------
# what the rules of the native graph promise
# ----------------------------------------------------------------------------------------------------------------------


@every_table
@pytest.mark.parametrize("dense", [False, True], ids=["integers", "dense"])
@pytest.mark.parametrize("nats", [1.0, 80.0, 95.0, 300.0, 1e4])
def test_the_loss_is_exact_however_large(table, dense, nats):
    """Float32 has no probability below 1e-45, or 104 nats; a loss has no such end."""
    logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    labels = np.array([3, 0, -1, 6])
    logits[np.arange(4), labels] -= np.float32(nats)
    rows = np.eye(7)[labels] * (labels >= 0)[:, None]
    case = gradcheck.Case("loss", "cross_entropy", {"logits": logits}, {"labels": rows if dense else labels})
    expected = expected_of(case, 1.0)
    assert expected["(output)"] > nats
    found = run_case(table, *in_float32(case, 1.0))
    assert found["(output)"] == pytest.approx(expected["(output)"], rel=1e-6)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-7)


@every_table
def test_a_small_loss_keeps_its_digits(table):
    """A model that knows its text by heart: the loss is the rest that its other answers share."""
    logits = np.zeros((3, 5), np.float32)
    labels = np.array([4, 1, 2])
    logits[np.arange(3), labels] = [20.0, 12.0, 9.0]
    case = gradcheck.Case("loss", "cross_entropy", {"logits": logits + 100}, {"labels": labels})
    found, expected = run_case(table, *in_float32(case, 1.0)), expected_of(case, 1.0)
    assert expected["(output)"] < 1e-3
    assert abs(found["(output)"] - expected["(output)"]) < 1e-7


@pytest.mark.parametrize(("vocab", "rows"), [(400, 16), (16, 400)])
def test_the_native_embedding_gradient_has_no_matrix_larger_than_it_needs(vocab, rows):
    case = gradcheck.embedding_case(np.random.default_rng(0), rows=rows, vocab=vocab, d=3)
    shapes = []
    run_case(
        "graph-native", case, np.ones((rows, 3)), look=lambda graph: shapes.extend(n.shape for n in graph.describe())
    )
    sizes = [int(np.prod(shape)) for shape in shapes]
    assert max(sizes) == max(min(vocab, rows) * rows, vocab * 3)
    assert vocab * rows not in sizes or vocab < rows


@every_table
def test_what_does_not_fit_is_named(table):
    x = {"x": np.ones((6, 4), np.float32), "k": np.ones((4, 4), np.float32)}
    calls = [
        (
            lambda ops, a: ops.attention(a["x"], a["x"], a["k"], 2, 2),
            "attention: q .6, 4., k .6, 4. and v .4, 4. do not fit",
        ),
        (lambda ops, a: ops.swiglu(a["x"], a["k"]), "swiglu"),
        (lambda ops, a: ops.reshape(a["x"], 5), "reshape: rows must be a divisor of the 24 numbers of x .6, 4., not 5"),
        (lambda ops, a: ops.reshape(a["x"], 0), "not 0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            on_table(table, lambda ops, a, grads, call=call: {"y": call(ops, a)}, x)


@every_table
@pytest.mark.parametrize(
    ("settings", "k_rows"),
    [((2, 2), 4), ((4, 2), 6), ((2, 3), 6), ((2, 2, 1), 6), ((0, 2), 6), ((2, 2, 3), 6), ((2, 0), 6)],
)
def test_attention_checks_its_matrices(table, settings, k_rows):
    """The kernels get bare pointers."""
    arrays = {"q": np.ones((6, 8), np.float32), "k": np.ones((k_rows, 8), np.float32)}
    with pytest.raises(ValueError, match="do not fit"):
        on_table(table, lambda ops, a, grads: {"y": ops.attention(a["q"], a["k"], a["k"], *settings)[0]}, arrays)


# ----------------------------------------------------------------------------------------------------------------------
# a class token before the patches of every image, and its row taken out again
# ----------------------------------------------------------------------------------------------------------------------

B, P, D, H, C = 3, 4, 8, 2, 5  # images, patches, width, heads, classes


def vision_block(ops, a, grads):
    """Class token, positions of no account, LayerNorm, full attention, LayerNorm of the class rows, head, loss."""
    zeros, class_cache = ops.embedding(a["token_ids"], a["class_token"])  # (B, D)
    x = ops.concat([zeros, ops.reshape(a["patches"], B)])  # (B, (P+1)*D)
    x = ops.reshape(x, B * (P + 1))  # (B*(P+1), D)
    h, norm = ops.layer_norm(x, a["gamma"], a["beta"])
    qkv, linear = ops.linear(h, a["w_qkv"])  # (N, 3D)
    y, attention = ops.attention(*ops.split(qkv, (D, D, D)), B, H, causal=False)
    y = ops.add(x, y)
    class_rows, rest = ops.split(ops.reshape(y, B), (D, P * D))  # (B, D), (B, P*D)
    f, last_norm = ops.layer_norm(class_rows, a["gamma"], a["beta"])
    logits, head = ops.linear(f, a["w_head"])  # (B, C)
    loss, loss_cache = ops.cross_entropy(logits, a["labels"])
    kept = {"logits": ops.scale(logits, 1.0), "rest": ops.reshape(rest, B * P)}

    d_logits = ops.cross_entropy_backward(loss_cache)
    d_f = ops.linear_backward(d_logits, head, grads["w_head"])
    d_class = ops.layer_norm_backward(d_f, last_norm, grads["gamma"], grads["beta"])
    d_y = ops.reshape(ops.concat([d_class, ops.zeros_like(rest)]), B * (P + 1))
    d_h = ops.linear_backward(ops.concat(ops.attention_backward(d_y, attention)), linear, grads["w_qkv"])
    d_x = ops.add(d_y, ops.layer_norm_backward(d_h, norm, grads["gamma"], grads["beta"]))
    d_class, d_patches = ops.split(ops.reshape(d_x, B), (D, P * D))
    ops.embedding_backward(d_class, class_cache, grads["class_token"])
    return kept | {"d_patches": ops.reshape(d_patches, B * P), "loss": loss}


SHAPES = {"class_token": (1, D), "gamma": (D,), "beta": (D,), "w_qkv": (3 * D, D), "w_head": (C, D)}


def vision_arrays(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return arrays | {"patches": rng.normal(size=(B * P, D))}


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("table", [pytest.param(t, marks=[needs_kernels] * (t == "accelerated")) for t in TABLES])
def test_a_class_token_before_the_patches(table, n_threads):
    torch = pytest.importorskip("torch")
    arrays, labels = vision_arrays(), np.array([4, 0, 2])
    integers = {"token_ids": (np.zeros(B, np.int64), 1), "labels": (labels, C)}
    found = on_table(table, vision_block, arrays, SHAPES, integers, n_threads)

    leaves = {name: torch.tensor(array.astype(np.float32), dtype=torch.float64) for name, array in arrays.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    norm = torch.nn.functional.layer_norm
    x = torch.cat([leaves["class_token"].expand(B, 1, D), leaves["patches"].reshape(B, P, D)], dim=1)
    h = norm(x, (D,), leaves["gamma"], leaves["beta"], 1e-5) @ leaves["w_qkv"].T
    q, k, v = (part.reshape(B, P + 1, H, D // H).transpose(1, 2) for part in h.split(D, dim=2))
    a = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P + 1, D)
    y = x + a
    logits = norm(y[:, 0], (D,), leaves["gamma"], leaves["beta"], 1e-5) @ leaves["w_head"].T
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    loss.backward()

    count = B if table == "graph-native" else 1  # its gradients are of the sum of the losses
    expected = {"logits": logits, "rest": y[:, 1:].reshape(B * P, D)} | {
        name if name in SHAPES else "d_patches": leaf.grad * count for name, leaf in leaves.items()
    }
    assert np.ravel(found.pop("loss"))[0] == pytest.approx(loss.item(), rel=1e-5)
    assert_close(found, {name: tensor.detach().numpy() for name, tensor in expected.items()}, 2e-5)
