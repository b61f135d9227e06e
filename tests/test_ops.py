"""Every op of every table: derivatives, an outside reference, twins, shapes, extremes, accumulation, bad input."""

import importlib
import inspect

import numpy as np
import pytest
from conftest import needs_kernels
from hypothesis import given
from hypothesis import strategies as st

from toy.adamw import AdamW
from toy.checks import gradcheck
from toy.op_table import OpTable
from toy.ops import reference

F64_BAR = 1e-9  # of the largest element, float64 against PyTorch in float64
F32_BAR = 1e-5  # of the largest element, float32 against PyTorch in float64
L2 = 0.5  # the bars in relative L2 are this fraction of those

ROWS = st.sampled_from([1, 2, 3, 5, 8, 13, 40])
WIDTHS = st.sampled_from(
    [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100]
)  # around the widths of SIMD registers
OWN_SHAPES = {
    "embedding": st.fixed_dictionaries({"rows": ROWS, "vocab": ROWS, "d": WIDTHS}),
    "linear": st.fixed_dictionaries({"rows": ROWS, "n_in": WIDTHS, "n_out": WIDTHS, "bias": st.booleans()}),
    "rms_norm": st.fixed_dictionaries({"rows": ROWS, "d": WIDTHS, "eps": st.sampled_from([1e-5, 1e-6, 1e-2])}),
    "layer_norm": st.fixed_dictionaries({"rows": ROWS, "d": WIDTHS, "eps": st.sampled_from([1e-5, 1e-6, 1e-2])}),
    "rope": st.fixed_dictionaries(
        {
            "rows": ROWS,
            "n_heads": st.integers(1, 4),
            "d_head": st.sampled_from([2, 4, 6, 16, 18, 34]),
            "base": st.sampled_from([10000.0, 100000.0]),
            "halves": st.booleans(),
            "scaled": st.booleans(),
        }
    ),
    "attention": st.builds(
        lambda batch, t_q, past, kv, group, d_head, causal, window, softcap: {
            "batch": batch,
            "t_q": t_q,
            "t_k": t_q + past,
            "n_heads": kv * group,
            "n_kv_heads": kv if group > 1 else None,
            "d_head": d_head,
            "causal": causal,
            "window": window if causal else None,
            "softcap": softcap,
        },
        st.integers(1, 3),
        st.sampled_from([1, 2, 3, 7, 8, 17, 33]),
        st.sampled_from([0, 0, 1, 5, 16]),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32]),
        st.booleans(),
        st.sampled_from([None, None, 1, 2, 7, 16, 40]),
        st.sampled_from([None, None, 0.75, 20.0]),
    ),
    "cross_entropy": st.fixed_dictionaries({"rows": ROWS, "vocab": WIDTHS, "dense": st.booleans()}),
}
OWN_BIG_SHAPES = {  # enough work for several threads and for whole blocks of every kernel
    "embedding": {"rows": 700, "vocab": 50, "d": 130},
    "linear": {"rows": 301, "n_in": 257, "n_out": 190},
    "rms_norm": {"rows": 515, "d": 387},
    "layer_norm": {"rows": 515, "d": 387},
    "rope": {"rows": 600, "n_heads": 6, "d_head": 66},
    "attention": {"batch": 2, "t_q": 131, "n_heads": 6, "n_kv_heads": 3, "d_head": 48},
    "cross_entropy": {"rows": 300, "vocab": 1003},
}
OP_NAMES = gradcheck.differentiable_ops()
ELEMENTWISE = [op for op in OP_NAMES if op not in OWN_SHAPES]  # every argument is a matrix (rows, d)
SHAPES = OWN_SHAPES | {op: st.fixed_dictionaries({"rows": ROWS, "d": WIDTHS}) for op in ELEMENTWISE}
BIG_SHAPES = OWN_BIG_SHAPES | {op: {"rows": 300, "d": 515} for op in ELEMENTWISE}


@st.composite
def drawn_case(draw, op):
    """A case of random shape, and the generator to draw more from."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return gradcheck.case_of(op, rng, **draw(SHAPES[op])), rng


def cast(case, cotangent, dtype):
    return gradcheck.in_dtype(case, dtype), cotangent if np.ndim(cotangent) == 0 else cotangent.astype(dtype)


def run(case, ops, cotangent):
    """-> the output and all gradients, by name"""
    out, cache = gradcheck.forward(case, ops)
    return {"(output)": np.asarray(out)} | gradcheck.backward(case, ops, cotangent, cache)


def assert_close(given, expected, bar, scales=None, l2=None):
    """Every array within bar times its largest element; scales: {name: a size to use where that is smaller}."""
    assert given.keys() == expected.keys()
    for name, wanted in expected.items():
        result = np.asarray(given[name])
        assert result.shape == np.shape(wanted), name
        assert np.isfinite(result).all(), name
        difference = np.asarray(result, np.float64) - wanted
        scale = max((scales or {}).get(name, 0.0), 1e-300)
        assert np.abs(difference).max(initial=0.0) <= bar * max(np.abs(wanted).max(initial=0.0), scale), name
        if l2 is not None:
            assert np.linalg.norm(difference) <= l2 * max(np.linalg.norm(wanted), scale), name


def term_sizes(case, cotangent):
    """The size of the terms that an op subtracts from each other, by the result that is their difference.

    Norms subtract a mean or a projection, softmax a weighted mean. Where that leaves nothing (one column, one key) the
    result is rounding error, and only the terms say how small it has to be.
    """
    inputs = {name: array.astype(np.float64) for name, array in case.inputs.items()}
    if case.op in ("rms_norm", "layer_norm"):
        mean = inputs["x"].mean(axis=1, keepdims=True) if case.op == "layer_norm" else 0.0
        rstd = 1 / np.sqrt(((inputs["x"] - mean) ** 2).mean(axis=1, keepdims=True) + case.settings["eps"])
        far = max(1.0, np.abs(mean * rstd).max())  # a row that lies far from 0 loses digits when it is centred
        return {
            "(output)": far * np.abs(inputs["gamma"]).max(),
            "x": far * np.abs(cotangent * inputs["gamma"] * rstd).max(),
            "gamma": far * np.abs(cotangent).max(),
        }
    if case.op == "gelu":  # 1 + tanh, where the tanh is nearly -1
        return {"(output)": np.abs(inputs["x"]).max() / 2, "x": np.abs(cotangent).max()}
    if case.op == "geglu":
        return {
            "(output)": np.abs(inputs["gate"]).max() / 2 * np.abs(inputs["up"]).max(),
            "gate": np.abs(cotangent * inputs["up"]).max(),
            "up": np.abs(cotangent * inputs["gate"]).max() / 2,
        }
    if case.op == "silu":  # its derivative crosses 0
        return {"x": np.abs(cotangent).max()}
    if case.op == "swiglu":
        return {"gate": np.abs(cotangent * inputs["up"]).max()}
    if case.op == "cross_entropy":  # probability minus label
        labels = case.settings["labels"]
        largest, counted = (1.0, (labels >= 0).sum()) if labels.ndim == 1 else (labels.max(), labels.any(axis=1).sum())
        return {"logits": cotangent * largest / max(counted, 1)}
    if case.op == "attention":
        q, k, v = (np.abs(inputs[name]).max() for name in "qkv")
        d_scores = (
            np.abs(cotangent).max() * v
        )  # before the scale 1/sqrt(d_head), which the sum over d_head makes up for
        return {"q": d_scores * k, "k": d_scores * q}
    return {}


def dtypes_of(ops):
    return (np.float64, np.float32) if ops is reference else (np.float32,)


# ----------------------------------------------------------------------------------------------------------------------
# derivatives
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("index", range(len(list(gradcheck.op_cases(np.random.default_rng(0))))))
def test_backward_is_the_derivative_of_forward(index, seed):
    rng = np.random.default_rng([index, seed])
    case = list(gradcheck.op_cases(rng))[index]
    rows = list(gradcheck.check_op(case, rng))
    assert [row.gradient for row in rows] == list(case.inputs)
    assert [row for row in rows if not row.ok] == []


def test_every_op_with_a_backward_has_a_case():
    backwards = {name.removesuffix("_backward") for name in vars(reference) if name.endswith("_backward")}
    differentiable = backwards - set(reference.PARTS)  # those are checked below, and inside attention
    assert {case.op for case in gradcheck.op_cases(np.random.default_rng(0))} == differentiable == set(OP_NAMES)


def test_plain_attention_on_four_axes_is_the_derivative_of_itself():
    rng = np.random.default_rng(0)
    q, k, v, d_out = rng.normal(size=(4, 2, 3, 5, 4))  # (B, H, T, d_head) each
    hidden = np.triu(np.ones((5, 5), bool), k=1)
    _, probabilities = reference.multi_head_attention(q, k, v, hidden)
    given = reference.multi_head_attention_backward(d_out, q, k, v, probabilities)
    for x, gradient in zip((q, k, v), given):
        measured = gradcheck.central_difference(lambda _: reference.multi_head_attention(q, k, v, hidden)[0], x, d_out)
        assert gradcheck.relative_error(gradient, measured) < gradcheck.DERIVATIVE_BAR
    scores, d_probabilities = rng.normal(size=(2, 3, 7))
    measured = gradcheck.central_difference(reference.softmax, scores, d_probabilities)
    gradient = reference.softmax_backward(d_probabilities, reference.softmax(scores))
    assert gradcheck.relative_error(gradient, measured) < gradcheck.DERIVATIVE_BAR


@pytest.mark.parametrize("causal", [True, False])
def test_attention_on_rows_is_plain_attention_of_every_head(causal):
    """The op that models call, and the fifteen lines on four axes that a reader sees first."""
    batch, heads, t, d_head = 2, 3, 5, 4
    rng = np.random.default_rng(1)
    q, k, v, d_out = rng.normal(size=(4, batch * t, heads * d_head))
    out, cache = reference.attention(q, k, v, batch, heads, causal=causal)
    on_four_axes = [a.reshape(batch, t, heads, d_head).swapaxes(1, 2) for a in (q, k, v, d_out)]  # (B, H, T, d_head)
    hidden = np.triu(np.ones((t, t), bool), k=1) if causal else None
    expected, probabilities = reference.multi_head_attention(*on_four_axes[:3], hidden)
    gradients = reference.multi_head_attention_backward(on_four_axes[3], *on_four_axes[:3], probabilities)
    for on_rows, plain in zip((out, *reference.attention_backward(d_out, cache)), (expected, *gradients)):
        assert np.array_equal(on_rows.reshape(batch, t, heads, d_head), plain.swapaxes(1, 2))
    assert np.array_equal(cache.probabilities.reshape(probabilities.shape), probabilities)


class WrongGELU:
    """The reference table with a GELU backward that forgets the derivative of tanh."""

    def __getattr__(self, name):
        return getattr(reference, name)

    @staticmethod
    def gelu_backward(d_y, cache):
        x = cache.x
        return d_y * 0.5 * (1.0 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def test_the_check_notices_a_wrong_backward(monkeypatch):
    rng = np.random.default_rng(0)
    case = gradcheck.case_of("gelu", rng)
    assert all(row.ok for row in gradcheck.check_op(case, rng))
    monkeypatch.setattr(gradcheck, "reference", WrongGELU())
    assert not any(row.ok for row in gradcheck.check_op(case, rng))


def test_central_difference_of_a_known_function():
    x = np.array([[0.3, -1.2, 0.7]])
    before = x.copy()
    cotangent = np.array([[2.0, -1.0, 0.5]])
    derivative = gradcheck.central_difference(np.sin, x, cotangent)
    np.testing.assert_allclose(derivative, cotangent * np.cos(x), rtol=1e-12)
    np.testing.assert_allclose(gradcheck.central_difference(np.sin, x, cotangent, [2]), derivative[0, 2:], rtol=0)
    assert np.array_equal(x, before)
    with pytest.raises(ValueError, match="float64"):
        gradcheck.central_difference(np.sin, x.astype(np.float32), cotangent)
    with pytest.raises(ValueError, match="contiguous"):
        gradcheck.central_difference(np.sin, np.ones((3, 2)).T, np.ones((2, 3)))


def test_a_gradient_that_is_not_a_number_is_not_ok():
    assert gradcheck.relative_error(np.array([1.0, np.nan]), np.ones(2)) != 0
    assert not gradcheck._row(
        "layer", "x", (2,), gradcheck.relative_error(np.array([1.0, np.nan]), np.ones(2)), 1e-7
    ).ok
    assert gradcheck.relative_error(np.array([1.0, 2.0]), np.array([1.0, 2.2])) == pytest.approx(0.2 / 2.2)
    with pytest.raises(ValueError, match="shapes"):
        gradcheck.relative_error(np.ones((2, 1)), np.ones(2))


def test_check_all_is_complete_and_passes():
    rows = gradcheck.check_all(seed=1)
    assert [row for row in rows if not row.ok] == []
    layers = {row.layer for row in rows}
    assert {
        "TransformerLM",
        "GPT2",
        "Llama",
        "Llama (LoRA on q)",
        "linear",
        "cross_entropy",
        "attention (causal, grouped)",
    } <= layers


@needs_kernels
def test_check_all_compares_the_compiled_ops():
    rows = gradcheck.check_all()
    twins = [row for row in rows if row.layer.endswith(", compiled")]
    assert {row.bar for row in twins} == {2e-6}
    layers = {row.layer.removesuffix(", compiled") for row in twins}
    compared = {(row.layer, row.gradient) for row in rows if row.layer in layers}
    assert {(row.layer.removesuffix(", compiled"), row.gradient) for row in twins} == compared | {
        (layer, "(output)") for layer in layers
    }


# ----------------------------------------------------------------------------------------------------------------------
# against PyTorch, and the tables against each other
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OP_NAMES)
@given(data=st.data())
def test_agrees_with_pytorch(ops, torch_models, op, data):
    case, rng = data.draw(drawn_case(op))
    if op == "cross_entropy" and not np.any(case.settings["labels"] > 0):
        case.settings["labels"][0] = (
            0 if case.settings["labels"].ndim == 1 else 1.0
        )  # PyTorch gives nan for none counted
    cotangent = gradcheck.random_cotangent(case, rng)
    for dtype in dtypes_of(ops):
        cast_case, cast_cotangent = cast(case, cotangent, dtype)
        bar = F64_BAR if dtype is np.float64 else F32_BAR
        out, gradients = torch_models.run_case(cast_case, cast_cotangent)
        given_results = run(cast_case, ops, cast_cotangent)
        assert all(result.dtype == dtype for name, result in given_results.items() if name != "(output)")
        assert_close(given_results, {"(output)": out} | gradients, bar, term_sizes(case, cotangent), l2=L2 * bar)


@needs_kernels
@pytest.mark.parametrize("op", OP_NAMES)
@given(data=st.data())
def test_compiled_op_agrees_with_its_reference(op, data):
    from toy.ops import accelerated

    case, rng = data.draw(drawn_case(op))
    case, cotangent = cast(case, gradcheck.random_cotangent(case, rng), np.float32)
    expected = run(case, reference, cotangent)
    assert_close(run(case, accelerated, cotangent), expected, gradcheck.TWIN_BAR, term_sizes(case, cotangent))


@needs_kernels
@pytest.mark.parametrize("op", OP_NAMES)
def test_compiled_op_agrees_with_its_reference_on_a_big_shape(op):
    from toy.ops import accelerated

    rng = np.random.default_rng(5)
    case = gradcheck.case_of(op, rng, **BIG_SHAPES[op])
    # in float64, where the sums over hundreds of rows have no rounding error of their own
    case, cotangent = cast(case, gradcheck.random_cotangent(case, rng), np.float32)
    expected = run(gradcheck.in_dtype(case, np.float64), reference, cotangent)
    assert_close(run(case, accelerated, cotangent), expected, gradcheck.TWIN_BAR)


@needs_kernels
@pytest.mark.parametrize("op", OP_NAMES)
def test_compiled_op_gives_the_same_bits_every_time(op):
    from toy.ops import accelerated

    rng = np.random.default_rng(6)
    case = gradcheck.case_of(op, rng, **BIG_SHAPES[op])
    case, cotangent = cast(case, gradcheck.random_cotangent(case, rng), np.float32)
    first, second = run(case, accelerated, cotangent), run(case, accelerated, cotangent)
    for name in first:
        assert np.array_equal(first[name], second[name]), name


EAGER_ONLY = {
    "sum_of_squares": "a graph makes one tensor a gradient (`squares`) and adds them in `norm_and_factor`",
}
KERNELS_ONLY = {
    "get_num_threads": "numpy's threads are those of its BLAS, a graph's those of its device",
    "set_num_threads": "as get_num_threads",
}
GRAPH_ONLY = {
    "integers": "integers are filled in at every step, so they are made, not given",
    "feed": "an input that a function fills at every step",
    "constant": "an input that is filled once",
    "used": "counts the uses of a parameter, so that its gradient is known to be complete",
    "contributed": "as used",
    "finish_gradient": "the native graph divides by the number of rows here, not in the loss",
    "squares": "for the norm of the whole gradient",
    "norm_and_factor": "as squares",
    "scaled": "passes of a step that are added up, and clipping where AdamW is a device's own",
    "loss_value": "the loss is a tensor until the graph has run",
    "compute": "runs what was recorded",
    "runner": "says on whose threads",
}


def signatures(table):
    """{name: [(parameter, default, kind)]} of the public functions of a table; what it imports for checks is none."""
    if inspect.ismodule(table):
        ours = {n: f for n, f in vars(table).items() if inspect.isroutine(f) and f.__module__.startswith("toy.")}
        elsewhere = ("toy.arrays", "toy.op_table", "toy.quantized", "toy._kernels.arrays")
        functions = {n: f for n, f in ours.items() if f.__module__ not in elsewhere}
    else:
        functions = {name: f for name in dir(table) if inspect.isfunction(f := getattr(table, name))}
    parameters = {name: list(inspect.signature(f).parameters.values()) for name, f in functions.items()}
    return {
        name: [(p.name, p.default, p.kind) for p in listed if p.name != "self"]
        for name, listed in parameters.items()
        if not name.startswith("_") and name.removesuffix("_backward") not in reference.PARTS
    }


@pytest.mark.parametrize(
    "table", [pytest.param("accelerated", marks=needs_kernels), "graph.CpuGraphOps", "graph.NativeGraphOps"]
)
def test_every_table_has_the_ops_of_the_reference_with_their_parameters(table):
    module, _, class_name = table.partition(".")
    twin = importlib.import_module(f"toy.ops.{module}")
    twin = getattr(twin, class_name) if class_name else twin
    expected, found = signatures(reference), signatures(twin)
    assert len(expected) > 20 and EAGER_ONLY.keys() < expected.keys()
    if module == "graph":
        expected = {name: parameters for name, parameters in expected.items() if name not in EAGER_ONLY}
    extra = GRAPH_ONLY if module == "graph" else KERNELS_ONLY
    assert found.keys() - expected.keys() == extra.keys()
    assert {name: parameters for name, parameters in found.items() if name not in extra} == expected


def test_the_type_of_a_table_has_them_too():
    """`toy.op_table.OpTable` is what the models see of a table: a type checker believes it."""
    assert signatures(OpTable) == signatures(reference)


@needs_kernels
def test_tables_have_their_names():
    from toy.ops import accelerated
    from toy.ops.graph import CpuGraphOps, NativeGraphOps

    names = [table.name for table in (reference, accelerated, CpuGraphOps, NativeGraphOps)]
    assert names == ["reference", "accelerated", "graph-cpu", "graph-native"]


# ----------------------------------------------------------------------------------------------------------------------
# what all ops promise
# ----------------------------------------------------------------------------------------------------------------------


def table_cases(ops, seed=0):
    """Every case with its cotangent, in the dtypes of a table."""
    rng = np.random.default_rng(seed)
    for case in gradcheck.op_cases(rng):
        cotangent = gradcheck.random_cotangent(case, rng)
        for dtype in dtypes_of(ops):
            yield cast(case, cotangent, dtype)


def test_parameter_gradients_accumulate(ops):
    rng = np.random.default_rng(1)
    for case, cotangent in table_cases(ops):
        if not case.parameters:
            continue
        _, cache = gradcheck.forward(case, ops)
        once = gradcheck.backward(case, ops, cotangent, cache)
        dtype = case.inputs[case.parameters[0]].dtype
        start = {name: rng.normal(size=case.inputs[name].shape).astype(dtype) for name in case.parameters}
        grown = {name: array.copy() for name, array in start.items()}
        for calls in (1, 2):
            given = gradcheck.backward(case, ops, cotangent, cache, grown)
            for name, array in given.items():
                wanted = start[name] + calls * once[name] if name in case.parameters else once[name]
                np.testing.assert_allclose(array, wanted, rtol=0, atol=8 * np.finfo(dtype).eps, err_msg=case.layer)


def test_none_freezes_a_parameter_and_changes_nothing_else(ops):
    for case, cotangent in table_cases(ops):
        _, cache = gradcheck.forward(case, ops)
        everything = gradcheck.backward(case, ops, cotangent, cache)
        for frozen in ([name] for name in case.parameters):
            some = {name: None if name in frozen else np.zeros_like(case.inputs[name]) for name in case.parameters}
            given = gradcheck.backward(case, ops, cotangent, cache, some)
            for name, array in given.items():
                assert array is None if name in frozen else np.array_equal(array, everything[name]), (case.layer, name)
        if case.parameters:
            nothing = gradcheck.backward(case, ops, cotangent, cache, dict.fromkeys(case.parameters))
            for name in case.inputs.keys() - set(case.parameters):
                assert np.array_equal(nothing[name], everything[name]), case.layer


def test_inputs_and_caches_are_not_modified(ops):
    for case, cotangent in table_cases(ops):
        arrays = case.inputs | {k: v for k, v in case.settings.items() if isinstance(v, np.ndarray)}
        if np.ndim(cotangent):
            arrays["(cotangent)"] = cotangent
        before = {name: array.copy() for name, array in arrays.items()}
        out, cache = gradcheck.forward(case, ops)
        kept = np.array(out)
        saved = [np.array(field) for field in cache] if isinstance(cache, tuple) else []
        gradients = gradcheck.backward(case, ops, cotangent, cache)
        for field, before_backward in zip(cache if saved else (), saved):
            assert np.array_equal(field, before_backward), f"{case.layer}: the backward changed its cache"
        for name, again in gradcheck.backward(case, ops, cotangent, cache).items():
            assert np.array_equal(gradients[name], again), (case.layer, name)
        for name, array in arrays.items():
            assert np.array_equal(array, before[name]), (case.layer, name)
        assert np.array_equal(out, kept), f"{case.layer}: the backward changed the output"


def test_results_outlive_later_calls(ops):
    """A table may reuse memory, but not memory that somebody still holds."""
    for case, cotangent in table_cases(ops):
        first = run(case, ops, cotangent)
        kept = {name: array.copy() for name, array in first.items()}
        other = case._replace(inputs={name: -0.5 * array for name, array in case.inputs.items()})
        for _ in range(3):
            run(other, ops, -2 * cotangent)
        for name, array in first.items():
            assert np.array_equal(array, kept[name]), (case.layer, name)


def test_column_slices_are_taken_as_they_are(ops):
    """`split` gives views whose rows do not follow each other in memory, and every op reads them."""
    for case, cotangent in table_cases(ops):
        expected = run(case, ops, cotangent)
        activations = {
            name: middle_columns(ops, array) for name, array in case.inputs.items() if name not in case.parameters
        }
        sliced = case._replace(inputs=case.inputs | activations)
        d_out = middle_columns(ops, cotangent) if np.ndim(cotangent) else cotangent
        given = run(sliced, ops, d_out)
        for name, array in expected.items():
            np.testing.assert_allclose(given[name], array, rtol=1e-5, atol=1e-6, err_msg=f"{case.layer}: {name}")


def middle_columns(ops, array):
    """The same numbers as a view into a wider matrix."""
    rows, width = array.shape
    wide = np.full((rows, width + 5), np.nan, array.dtype)
    wide[:, 2 : 2 + width] = array
    view = ops.split(wide, (2, width, 3))[1]
    assert not view.flags.owndata
    return view


# ----------------------------------------------------------------------------------------------------------------------
# one by one: what an op means, and extreme values
# ----------------------------------------------------------------------------------------------------------------------


def test_split_and_concat_undo_each_other(ops):
    x = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    parts = ops.split(x, (2, 4, 3))
    assert [part.shape for part in parts] == [(3, 2), (3, 4), (3, 3)]
    assert all(np.shares_memory(part, x) for part in parts)
    assert np.array_equal(ops.concat(parts), x)
    assert np.array_equal(ops.concat(parts[::-1]), np.hstack([x[:, 6:], x[:, 2:6], x[:, :2]]))


def test_reshape_regroups_the_numbers_row_by_row(ops):
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    y = ops.reshape(x, 2)
    assert np.array_equal(y, x.reshape(2, 12)) and np.shares_memory(x, y)
    assert np.array_equal(ops.reshape(y, 6), x)  # the backward
    columns = ops.split(x, (1, 3))[1]  # rows with gaps between them: copied first
    assert np.array_equal(ops.reshape(columns, 2), x[:, 1:].reshape(2, 9))
    assert np.array_equal(ops.split(ops.reshape(columns, 9), (1, 1))[1], x[:, 1:].reshape(9, 2)[:, 1:])
    for rows in (5, 0, -1, 48):
        with pytest.raises(ValueError, match=r"rows|reshape|dimension"):
            ops.reshape(x, rows)


def test_zeros_like(ops):
    for x in (np.ones((3, 5), np.float32), np.ones((3, 9), np.float32)[:, 2:7], np.ones((300, 200), np.float32)):
        zeros = ops.zeros_like(x)
        assert zeros.shape == x.shape and zeros.dtype == np.float32 and not zeros.any() and x.all()
        zeros += 1  # memory of its own
        assert not ops.zeros_like(x).any()


def test_add(ops):
    a, b = np.random.default_rng(0).normal(size=(2, 5, 17)).astype(np.float32)
    before = a.copy()
    total = ops.add(a, b)
    assert np.array_equal(total, a + b)
    assert np.array_equal(a, before)
    assert not np.shares_memory(total, a)


def test_scale(ops):
    x = np.random.default_rng(0).normal(size=(5, 34)).astype(np.float32)[:, ::2][:, :17]
    before = x.copy()
    y = ops.scale(x, 0.1)
    assert np.array_equal(y, before * np.float32(0.1)) and y.dtype == np.float32
    assert np.array_equal(x, before) and not np.shares_memory(x, y)


def test_masked(ops):
    x = np.random.default_rng(0).normal(size=(5, 34)).astype(np.float32)[:, ::2][:, :17]
    before, mask = x.copy(), np.float32([[0, 1.25] * 8 + [0]] * 5)
    y = ops.masked(x, mask)
    assert np.array_equal(y, before * mask) and y.dtype == np.float32
    assert np.array_equal(x, before) and not np.shares_memory(x, y)


def test_repeated_ids_collect_all_their_rows(ops):
    ids = np.array([3] * 1000 + [0, 4, 3])
    table = np.zeros((6, 9), np.float32)
    d_out = np.random.default_rng(0).normal(size=(len(ids), 9)).astype(np.float32)
    out, cache = ops.embedding(ids, table + np.arange(6, dtype=np.float32)[:, None])
    assert np.array_equal(out, np.repeat(ids[:, None], 9, axis=1))
    assert ops.embedding_backward(d_out, cache, table) is None
    expected = np.zeros((6, 9))
    for i, row in zip(ids, d_out):
        expected[i] += row
    np.testing.assert_allclose(table, expected, atol=1e-4)
    assert not table[[1, 2, 5]].any()


def test_rope_turns_by_the_difference_of_positions(ops):
    """Lengths stay, position 0 stays, and a dot product depends on the distance of two positions alone."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 8)).astype(np.float32)

    def at(x, position):
        return ops.rope(x, np.array([position]), 2)[0].reshape(2, 4)

    assert np.array_equal(at(q, 0), q.reshape(2, 4))
    np.testing.assert_allclose(np.linalg.norm(at(q, 77), axis=1), np.linalg.norm(q.reshape(2, 4), axis=1), rtol=1e-5)
    for shift in (1, 500):
        products = (at(q, 9 + shift) * at(k, 4 + shift)).sum(axis=1)
        np.testing.assert_allclose(products, (at(q, 9) * at(k, 4)).sum(axis=1), rtol=1e-3, atol=1e-4)
    # the first pair turns by one radian a position, as columns 0 and 1
    np.testing.assert_allclose(at(np.eye(1, 8, dtype=np.float32), 1)[0, :2], [np.cos(1), np.sin(1)], rtol=1e-6)


@pytest.mark.parametrize("t_q", [1, 3])
def test_attention_with_past_keys_equals_the_end_of_the_whole(ops, t_q):
    rng = np.random.default_rng(0)
    batch, t_k, heads, kv, d_head = 2, 7, 4, 2, 5
    q = rng.normal(size=(batch, t_k, heads * d_head)).astype(np.float32)
    k, v = rng.normal(size=(2, batch * t_k, kv * d_head)).astype(np.float32)
    whole, _ = ops.attention(q.reshape(batch * t_k, -1), k, v, batch, heads, kv)
    end = np.ascontiguousarray(q[:, -t_q:]).reshape(batch * t_q, -1)
    part, _ = ops.attention(end, k, v, batch, heads, kv)
    expected = whole.reshape(batch, t_k, -1)[:, -t_q:]
    np.testing.assert_allclose(part.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_first_query_sees_the_first_key_alone(ops):
    q, k, v = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    out, _ = ops.attention(q, k, v, 2, 2)
    np.testing.assert_allclose(out[[0, 3]], v[[0, 3]], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_probabilities_in_the_cache_are_those_of_the_picture(ops, causal):
    """Attention maps are drawn from this cache: (B, n_heads, Tq, Tk) after a reshape, rows sum to 1, no future."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 10, 12)).astype(np.float32)
    out, cache = ops.attention(q, k, v, 2, 3, causal=causal)
    p = np.asarray(cache.probabilities).reshape(2, 3, 5, 5)
    np.testing.assert_allclose(p.sum(axis=3), 1, rtol=1e-6)
    assert np.triu(p, 1).any() != causal
    per_head = np.einsum("bhqk,bkhd->bqhd", p, v.reshape(2, 5, 3, 4))
    np.testing.assert_allclose(out, per_head.reshape(10, 12), atol=1e-6)


@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_large_attention_scores(ops, torch_models, size):
    rng = np.random.default_rng(0)
    case = gradcheck.attention_case(rng, t_q=9, d_head=8)
    case.inputs["q"] *= size
    case, cotangent = cast(case, gradcheck.random_cotangent(case, rng), np.float32)
    out, gradients = torch_models.run_case(case, cotangent)
    # a score of size s has a rounding error of s * 6e-8, which exp turns into a relative error of the probability
    bar = 2e-7 * size + 1e-5
    # one probability is nearly 1: what it adds to the gradient of a key is rounding error times a query of this size
    scales = {"(output)": 1.0, "q": 1.0, "k": max(1.0, 5e-7 * size / bar), "v": 1.0}
    assert_close(run(case, ops, cotangent), {"(output)": out} | gradients, bar, scales)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("dense", [False, True])
def test_large_logits(ops, torch_models, dense, size):
    rng = np.random.default_rng(0)
    case, cotangent = cast(
        gradcheck.cross_entropy_case(rng, rows=8, vocab=33, dense=dense, scale=size), 1.0, np.float32
    )
    out, gradients = torch_models.run_case(case, cotangent)
    assert_close(run(case, ops, cotangent), {"(output)": out} | gradients, F32_BAR)


def test_equal_logits_cost_log_v(ops):
    for offset in (0.0, -1e4, 1e4):
        loss, cache = ops.cross_entropy(np.full((4, 65), offset, np.float32), np.array([0, 64, 7, -1]))
        assert loss == pytest.approx(np.log(65), rel=1e-6)
        assert isinstance(loss, float)
        d_logits = ops.cross_entropy_backward(cache)
        np.testing.assert_allclose(d_logits.sum(axis=1), 0, atol=1e-6)
        assert d_logits[1, 64] == pytest.approx((1 / 65 - 1) / 3, rel=1e-5)


def test_nothing_counted_costs_nothing(ops):
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    for labels in (np.full(4, -1), np.zeros((4, 5), np.float32)):
        loss, cache = ops.cross_entropy(logits, labels)
        assert loss == 0.0
        d_logits = ops.cross_entropy_backward(cache)
        assert d_logits.shape == (4, 5)
        assert not d_logits.any()


def test_rows_not_counted_change_nothing(ops):
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    labels = np.array([1, -1, 4, -1])
    loss, cache = ops.cross_entropy(logits, labels)
    d_logits = ops.cross_entropy_backward(cache)
    counted_loss, counted_cache = ops.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    assert loss == pytest.approx(counted_loss, rel=1e-6)
    np.testing.assert_allclose(d_logits[[0, 2]], ops.cross_entropy_backward(counted_cache), rtol=1e-6)
    assert not d_logits[[1, 3]].any()


def test_dense_one_hot_rows_equal_integer_labels(ops):
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = np.array([4, 0, -1, 2, 2, -1])
    rows = np.eye(6, 5, dtype=np.float32)[labels]  # row 5 of the eye is zero: not counted
    loss, cache = ops.cross_entropy(logits, labels)
    dense_loss, dense_cache = ops.cross_entropy(logits, rows)
    assert dense_loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(ops.cross_entropy_backward(dense_cache), ops.cross_entropy_backward(cache), atol=1e-7)


@pytest.mark.parametrize("op", ["gelu", "silu", "swiglu"])
def test_activations_at_their_ends(ops, torch_models, op):
    x = np.array(
        [[-1e4, -200.0, -100.0, -88.0, -20.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 20.0, 88.0, 100.0, 1e4]], np.float32
    )
    inputs = {"gate": x, "up": np.full_like(x, -1.5)} if op == "swiglu" else {"x": x}
    case = gradcheck.Case(op, op, inputs)
    out, gradients = torch_models.run_case(case, np.ones_like(x))
    for name, given_array in run(case, ops, np.ones_like(x)).items():
        wanted = out if name == "(output)" else gradients[name]
        # element by element, so that 1e4 does not hide the others
        np.testing.assert_allclose(given_array, wanted, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("offset,spread", [(0.0, 0.0), (0.0, 1e-6), (3.0, 0.0), (1000.0, 1.0), (-50.0, 1e-2)])
def test_norms_of_rows_with_little_variance(ops, torch_models, offset, spread):
    rng = np.random.default_rng(0)
    for maker in (gradcheck.layer_norm_case, gradcheck.rms_norm_case):
        case = maker(rng, rows=5, d=48)
        case.inputs["x"][:] = offset + spread * rng.normal(size=(5, 48))
        case, cotangent = cast(case, rng.normal(size=(5, 48)), np.float32)
        out, gradients = torch_models.run_case(case, cotangent)
        # the mean of a row of size |offset| is known to about |offset| * 6e-8, to be seen against the row's spread
        std = (spread**2 + 1e-5) ** 0.5
        bar = F32_BAR + 4e-7 * abs(offset) / std
        rstd = 1 / std if case.op == "layer_norm" else 1 / (offset**2 + spread**2 + 1e-5) ** 0.5
        given_results = run(case, ops, cotangent)
        expected = {"(output)": out} | gradients
        d_x, wanted = given_results.pop("x"), expected.pop("x")
        assert_close(given_results, expected, bar, dict.fromkeys(expected, 1.0))
        np.testing.assert_allclose(
            d_x, wanted, rtol=0, atol=bar * rstd * np.abs(cotangent * case.inputs["gamma"]).max()
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_shows_in_its_row_and_nowhere_else(ops):
    """A run that diverges shows NaN, not a plausible number."""
    for case, _ in table_cases(ops):
        if case.op in ("embedding", "attention", "cross_entropy"):
            continue
        clean, _ = gradcheck.forward(case, ops)
        for name in case.inputs.keys() - set(case.parameters):
            spoiled = case.inputs[name].copy()
            spoiled[1, 0] = np.nan
            out, _ = gradcheck.forward(case._replace(inputs=case.inputs | {name: spoiled}), ops)
            assert np.isnan(out[1]).any(), case.layer
            np.testing.assert_allclose(np.delete(out, 1, 0), np.delete(clean, 1, 0), rtol=1e-5, atol=1e-6)
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = np.nan
    loss, cache = ops.cross_entropy(logits, np.array([0, 1, 2]))
    assert np.isnan(loss)
    d_logits = ops.cross_entropy_backward(cache)
    assert np.isnan(d_logits[1]).any()
    assert np.isfinite(d_logits[[0, 2]]).all()
    q = np.ones((4, 4), np.float32)
    q[2, 1] = np.nan
    out, _ = ops.attention(q, np.ones_like(q), np.ones_like(q), 1, 2)
    assert np.isnan(out[2, :2]).all()
    assert np.isfinite(np.delete(out, 2, axis=0)).all()


# ----------------------------------------------------------------------------------------------------------------------
# the optimizer
# ----------------------------------------------------------------------------------------------------------------------


def adamw_formula(weight, gradient, m, v, hp):
    """DESIGN's update in float64."""
    lr, beta1, beta2, eps, weight_decay, s5, s6 = np.ravel(hp).astype(np.float64)
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    return weight * (1 - lr * weight_decay) - lr * (m * s5) / (np.sqrt(v * s6) + eps), m, v


@pytest.mark.parametrize("size", [1, 7, 16, 1003, 70001])
@pytest.mark.parametrize("convention", ["for_from_scratch", "for_lora"])
def test_adamw_step_is_the_formula(ops, convention, size):
    rng = np.random.default_rng(size)
    adamw = getattr(AdamW, convention)(lr=1e-2, weight_decay=0.3, eps=1e-3)
    for dtype in dtypes_of(ops):
        weight = rng.normal(size=size).astype(dtype)
        m, v = np.zeros_like(weight), np.zeros_like(weight)
        expected = weight.astype(np.float64), 0.0, 0.0
        for k in range(5):
            gradient = (rng.normal(size=size) * 10.0 ** rng.integers(-3, 1, size)).astype(dtype)
            kept, hp = gradient.copy(), adamw.hp_for_step(k)
            factor = [None, 0.37, 1.0, 1e-3, 0.0][k]  # of clipping
            assert ops.adamw_step(weight, gradient, m, v, hp if k % 2 else hp[0], factor) is None
            assert np.array_equal(gradient, kept)
            used = gradient.astype(np.float64) * (1 if factor is None else factor)
            expected = adamw_formula(expected[0], used, *expected[1:], hp)
        bar = 1e-12 if dtype is np.float64 else 2e-6
        for given_array, wanted in zip((weight, m, v), expected):
            np.testing.assert_allclose(given_array, wanted, rtol=bar, atol=bar)


def test_adamw_step_leaves_a_weight_without_gradient(ops):
    weight = np.linspace(-1, 1, 33, dtype=np.float32)
    before = weight.copy()
    m, v = np.zeros((2, 33), np.float32)
    ops.adamw_step(weight, np.zeros(33, np.float32), m, v, AdamW.for_lora().hp(1))
    assert np.array_equal(weight, before)
    assert not m.any()
    assert not v.any()


def test_sum_of_squares(ops):
    rng = np.random.default_rng(0)
    for shape in ((0,), (1,), (7,), (33, 65), (300001,)):
        x = rng.normal(size=shape).astype(np.float32)
        total = ops.sum_of_squares(x)
        assert isinstance(total, float)
        assert total == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-9, abs=0)


# ----------------------------------------------------------------------------------------------------------------------
# bad input: the compiled ops get bare pointers, so everything is checked before
# ----------------------------------------------------------------------------------------------------------------------


def compiled_cases():
    rng = np.random.default_rng(0)
    for case in gradcheck.op_cases(rng):
        yield cast(case, gradcheck.random_cotangent(case, rng), np.float32)


def float_arguments(case):
    dense = {k: v for k, v in case.settings.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    return case.inputs | dense


def with_argument(case, name, value):
    if name in case.inputs:
        return case._replace(inputs=case.inputs | {name: value})
    return case._replace(settings=case.settings | {name: value})


def refused(message, call, *arguments):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments)
    return str(caught.value)


@needs_kernels
def test_forward_names_an_argument_of_the_wrong_kind():
    from toy.ops import accelerated

    for case, _ in compiled_cases():
        for name, array in float_arguments(case).items():
            for wrong, why in (
                (array.astype(np.float64), "float64.*float32"),
                (array.astype(np.float16), "float16.*float32"),
                (array.astype(">f4"), "byte order"),
                (array.tolist(), "list.*not a numpy array|list"),
                (array.reshape(1, *array.shape), "axes|shape"),
            ):
                message = refused(
                    f"^{name}: .*({why})", gradcheck.forward, with_argument(case, name, wrong), accelerated
                )
                if isinstance(wrong, np.ndarray):
                    assert str(wrong.shape) in message, message


@needs_kernels
def test_forward_refuses_arrays_it_cannot_walk_through():
    from toy.ops import accelerated

    for case, _ in compiled_cases():
        for name, array in float_arguments(case).items():
            backwards = array[..., ::-1]
            every_other = np.repeat(array, 2, axis=-1)[..., ::2]
            overlapping = np.lib.stride_tricks.as_strided(array, array.shape, (4, 4)) if array.ndim == 2 else backwards
            for wrong in (backwards, every_other, overlapping):
                refused(f"^{name}: .*contiguous", gradcheck.forward, with_argument(case, name, wrong), accelerated)
        for name in case.parameters:
            array = case.inputs[name]
            if array.ndim == 2:  # activations may be columns of a wider matrix, parameters not
                sliced = np.concatenate([array, array], axis=1)[:, : array.shape[1]]
                refused(f"^{name}: .*contiguous", gradcheck.forward, with_argument(case, name, sliced), accelerated)


@needs_kernels
def test_forward_names_the_argument_whose_shape_does_not_fit():
    from toy.ops import accelerated

    assert {"gelu", "silu", "swiglu"} <= set(ELEMENTWISE)
    for case, _ in compiled_cases():
        any_shape_is_right = case.op == "embedding" or (case.op in ELEMENTWISE and len(case.inputs) == 1)
        for name, array in float_arguments(case).items():
            if any_shape_is_right or (case.op == "cross_entropy" and case.settings["labels"].ndim == 1):
                continue
            narrower = np.ascontiguousarray(array[..., :-1])
            message = refused("shape|labels", gradcheck.forward, with_argument(case, name, narrower), accelerated)
            assert message.split(":")[0] in (*float_arguments(case), case.op), message
            if case.op not in ("rope", "attention"):  # theirs is a matter of divisors, and named so
                assert message.count("(") >= 2, message  # the given shape and the expected one


@needs_kernels
def test_backward_refuses_what_does_not_fit_and_adds_nothing():
    from toy.ops import accelerated

    for case, cotangent in compiled_cases():
        _, cache = gradcheck.forward(case, accelerated)
        zeros = {name: np.zeros_like(case.inputs[name]) for name in case.parameters}
        if np.ndim(cotangent):
            for wrong in (
                cotangent.astype(np.float64),
                cotangent[:, :-1].copy(),
                cotangent[:-1],
                cotangent[:, ::-1],
                cotangent[0],
                None,
            ):
                refused(r"^d_\w+: ", gradcheck.backward, case, accelerated, wrong, cache, zeros)
        read_only = {name: array.copy() for name, array in zeros.items()}
        for array in read_only.values():
            array.flags.writeable = False
        for name, array in zeros.items():
            for wrong in (
                array.astype(np.float64),
                np.zeros((*array.shape[:-1], array.shape[-1] + 1), np.float32),
                np.zeros((*array.shape[:-1], 2 * array.shape[-1]), np.float32)[..., ::2],
                read_only[name],
                array.tolist(),
            ):
                message = refused(
                    f"^d_{name}: ", gradcheck.backward, case, accelerated, cotangent, cache, zeros | {name: wrong}
                )
                assert str(array.shape) in message, message
        assert not any(array.any() for array in zeros.values()), case.layer
        foreign = object() if case.op == "cross_entropy" else accelerated.cross_entropy(*cross_entropy_arguments())[1]
        refused(
            f"^cache: .*{case.op.split('_backward')[0]}",
            gradcheck.backward,
            case,
            accelerated,
            cotangent,
            foreign,
            zeros,
        )


def cross_entropy_arguments():
    return np.zeros((2, 3), np.float32), np.array([0, 1])


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**62)])
def test_ids_out_of_range_are_named(wrong):
    from toy.ops import accelerated

    table = np.zeros((5, 4), np.float32)
    refused(f"^token_ids: .*{wrong}.*0 to 4", accelerated.embedding, np.array([0, 4, wrong]), table)
    if wrong != -1:
        refused(
            f"^labels: .*{wrong}.*-1 to 4",
            accelerated.cross_entropy,
            np.zeros((3, 5), np.float32),
            np.array([0, 4, wrong]),
        )
    if wrong < 0:
        refused(f"^positions: .*{wrong}", accelerated.rope, np.zeros((3, 4), np.float32), np.array([0, 1, wrong]), 1)


@needs_kernels
def test_ids_of_another_kind_are_refused_or_converted():
    from toy.ops import accelerated

    table = np.arange(20, dtype=np.float32).reshape(5, 4)
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, ">i4"):
        assert np.array_equal(accelerated.embedding(np.array([4, 0, 2], dtype), table)[0], table[[4, 0, 2]]), dtype
    for wrong in (np.array([0.0, 1.0]), [0, 1], np.array([True, False]), np.array([[0, 1]]), None):
        refused("^token_ids: ", accelerated.embedding, wrong, table)


@needs_kernels
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": 5}, "batch=5"),
        ({"batch": 2, "n_heads": 3}, "n_heads=3"),
        ({"batch": 2, "n_heads": 0}, "n_heads=0"),
        ({"batch": 2, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3"),
    ],
)
def test_attention_names_what_does_not_divide(settings, message):
    from toy.ops import accelerated

    q = np.zeros((6, 8), np.float32)
    refused(message, lambda: accelerated.attention(q, q, q, **({"n_heads": 2} | settings)))


@needs_kernels
def test_causal_attention_needs_a_key_for_every_query():
    from toy.ops import accelerated

    q, k = np.zeros((6, 8), np.float32), np.zeros((4, 8), np.float32)
    refused("^k: .*Tk", accelerated.attention, q, k, k, 2, 2)
    refused("^v: ", accelerated.attention, q, q, k, 2, 2)
    assert accelerated.attention(q, k, k, 2, 2, causal=False)[0].shape == (6, 8)


@needs_kernels
def test_adamw_step_refuses_what_does_not_fit_and_changes_nothing():
    from toy.ops import accelerated

    arrays = {name: np.ones(6, np.float32) for name in ("weight", "gradient", "m", "v")}
    hp = AdamW.for_lora().hp(1)
    for name in arrays:
        for wrong in (np.ones(6), np.ones(5, np.float32), np.ones(12, np.float32)[::2], np.ones((2, 3), np.float32)):
            given_arrays = arrays | {name: wrong}
            with pytest.raises(ValueError, match=r"\(6,\)|float32|contiguous|shape"):
                accelerated.adamw_step(*given_arrays.values(), hp)
    for wrong in (hp[:, :6], np.ones((2, 7), np.float32), np.ones(8, np.float32)):
        refused("^hp: .*shape", accelerated.adamw_step, *arrays.values(), wrong)
    assert all((array == 1).all() for array in arrays.values())
