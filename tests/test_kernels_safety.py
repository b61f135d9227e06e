"""Nothing that Python calls on the op tables ends the process, never returns, or computes with other rows than were given."""

import copy
import importlib
import itertools
import os
import pickle
import pkgutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import toy
from toy.ops import reference
from toy.quantized import QuantizedMatrix

PURE = os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0")
needs_kernels = pytest.mark.usefixtures("kernels")

FUZZ = Path(__file__).parent / "kernels_fuzz.py"
ROOT = FUZZ.parent.parent


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(FUZZ.parent)))},
    )


# -- random programs ---------------------------------------------------------------------------------------------------


def last_program(log):
    return log.read_text(encoding="utf-8").rpartition("# example\n")[2][-6000:] if log.exists() else "(no log)"


@needs_kernels
def test_random_programs_end_in_exceptions_only(tmp_path, pytestconfig):
    log = tmp_path / "program.py"
    thorough = pytestconfig.getoption("--hypothesis-profile") == "thorough"
    result = run_python(FUZZ, log, 5000 if thorough else 250)
    assert result.returncode == 0, (
        f"exit code {result.returncode}\n--- the program\n{last_program(log)}\n--- stderr\n{result.stderr[-3000:]}"
    )
    # the programs are worth running: backwards are computed, and calls are refused, in large numbers
    lines = log.read_text(encoding="utf-8").splitlines()
    calls = [(line, after) for line, after in itertools.pairwise(lines) if line.startswith("result = ")]
    refused = sum(after.startswith(("# ValueError", "# TypeError")) for _, after in calls)
    assert len(calls) - refused > 100 and refused > 100


@needs_kernels
@pytest.mark.parametrize(
    "line", ["os.abort()", "raise OverflowError('x')", "raise ValueError('a message that names nothing')"]
)
def test_the_fuzz_test_would_notice(tmp_path, line):
    log = tmp_path / "program.py"
    script = (
        "import sys, os, kernels_fuzz\n"
        "def wrong(program):\n"
        "    program.space['os'] = os\n"
        f"    program.run({line!r}, named=['x'])\n"
        "kernels_fuzz.OPS[:] = [wrong]\n"
        "kernels_fuzz.main(sys.argv[1], 1)\n"
    )
    assert run_python("-c", script, log).returncode != 0
    assert last_program(log).splitlines()[-1] == line


# -- what the fuzz test may not draw every time ------------------------------------------------------------------------

BEFORE = """
import copy, pickle, sys
import numpy as np
from toy._kernels import quantized
from toy.ops import accelerated as ops
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
except ImportError:
    pass
x, w, g = np.ones((6, 8), np.float32), np.ones((5, 8), np.float32), np.ones(8, np.float32)
ids, raw = np.array([0, 1, 2, 3, 4, 0]), np.ones((4, 20), np.uint8)
"""
# A line that is right, and one that once ended the process, or never returned; and what the error must name.
ENDINGS = {
    "quantized, no columns": (
        "quantized.linear(np.ones((3, 32), np.float32), raw, 'Q4_1', None)",
        "quantized.linear(np.ones((3, 0), np.float32), raw[:, :0].copy(), 'Q4_1', None)",
        "raw",
    ),
    "quantized backward, no columns": (
        "quantized.linear_backward(np.ones((3, 4), np.float32), raw, 'Q4_1', None)",
        "quantized.linear_backward(np.ones((3, 4), np.float32), raw[:, :0].copy(), 'Q4_1', None)",
        "raw",
    ),
    "quantized, no rows": (
        "quantized.dequantize(raw, 'Q4_1', np.ones((4, 32), np.float32))",
        "quantized.linear_backward(np.ones((3, 0), np.float32), raw[:0], 'Q4_1', None)",
        "raw",
    ),
    "probabilities of an empty cache": (
        "ops.attention(x, x, x, 1, 2)[1].probabilities",
        "type(ops.attention(x, x, x, 1, 2)[1])().probabilities",
        "cache",
    ),
    "widths that wrap": ("ops.split(x, [1, 7])", "ops.split(x, [1, 2**63 - 1])", "widths"),
    "a batch that no array has": ("ops.attention(x, x, x, 2, 2)", "ops.attention(x, x, x, 2**31, 2)", "batch"),
    "a label that an array of 64 bits hides": (
        "ops.cross_entropy(x, ids.astype(np.uint64))",
        "ops.cross_entropy(x, np.full(6, 2**64 - 1, np.uint64))",
        "labels",
    ),
    "an array made small": (
        "c = ops.linear(x.copy(), w)[1]; ops.linear_backward(x[:, :5], c, None)",
        "y = np.ones((400, 400), np.float32); c = ops.gelu(y)[1]; y.resize((1, 1), refcheck=False); "
        "ops.gelu_backward(np.ones((400, 400), np.float32), c)",
        "cache",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", ENDINGS)
def test_calls_that_once_ended_the_process(name):
    right, wrong, word = ENDINGS[name]
    after = f"\ntry:\n    {wrong}\nexcept ValueError as error:\n    print(error)\n"
    result = run_python("-c", f"{BEFORE}{right}{after}")
    assert result.returncode == 0, result.stderr
    assert word in result.stdout


@needs_kernels
@pytest.mark.parametrize("batch", [2, 2**31 - 1])
def test_no_rows_in_any_number_of_sequences_return_at_once(batch):
    lines = (
        f"nothing = np.ones((0, 8), np.float32)\nout, c = ops.attention(nothing, nothing, nothing, {batch}, 2)\n"
        "print(out.shape, [d.shape for d in ops.attention_backward(out, c)])\n"
    )
    assert run_python("-c", BEFORE + lines).stdout == "(0, 8) [(0, 8), (0, 8), (0, 8)]\n"


def caches():
    """One of every kind of cache of the compiled table, by op, with the backward that takes it."""
    from toy.ops import accelerated as ops

    x, w, g, ids = normal(6, 8), normal(5, 8), normal(8), np.zeros(6, int)
    return {
        "linear": (ops.linear(x, w)[1], lambda c: ops.linear_backward(normal(6, 5), c, None)),
        "rms_norm": (ops.rms_norm(x, g)[1], lambda c: ops.rms_norm_backward(x, c, None)),
        "layer_norm": (ops.layer_norm(x, g, g)[1], lambda c: ops.layer_norm_backward(x, c, None, None)),
        "gelu": (ops.gelu(x)[1], lambda c: ops.gelu_backward(x, c)),
        "swiglu": (ops.swiglu(x, x)[1], lambda c: ops.swiglu_backward(x, c)),
        "embedding": (ops.embedding(ids, w)[1], lambda c: ops.embedding_backward(x, c, np.zeros_like(w))),
        "rope": (ops.rope(x, ids, 2)[1], lambda c: ops.rope_backward(x, c)),
        "attention": (ops.attention(x, x, x, 2, 2)[1], lambda c: ops.attention_backward(x, c)),
        "cross_entropy": (ops.cross_entropy(x, ids)[1], lambda c: ops.cross_entropy_backward(c)),
    }


@needs_kernels
def test_every_cache_class_is_among_them():
    from toy import _kernels

    modules = [
        importlib.import_module(f"toy._kernels.{module.name}") for module in pkgutil.iter_modules(_kernels.__path__)
    ]
    classes = {value for module in modules for name, value in vars(module).items() if name.endswith("Cache")}
    assert classes == {type(cache) for cache, _ in caches().values()}


@needs_kernels
def test_a_cache_lets_nobody_at_what_it_keeps():
    """Ids and tables that a backward indexes with cannot be reached, so they cannot be changed either."""
    for op, (cache, backward) in caches().items():
        backward(cache)
        assert [name for name in dir(cache) if not name.startswith("__")] in ([], ["probabilities"]), op
        for way in (copy.copy, copy.deepcopy, pickle.dumps, lambda c: pickle.dumps(c, 0)):
            with pytest.raises(TypeError, match="pickle"):
                way(cache)
        for empty in (type(cache)(), type(cache).__new__(type(cache))):
            with pytest.raises(ValueError, match=r"^cache: expected the cache that \w+ returned"):
                backward(empty)
        backward(cache)


# -- what the caller does to the arrays between forward and backward ---------------------------------------------------


def test_ids_positions_and_labels_may_be_reused_before_the_backward(ops):
    x, table = normal(6, 8), normal(5, 8)
    integers = np.array([0, 3, 1, 4, 4, 2])

    def results(disturb):
        ids, labels, positions, rows = integers.copy(), integers.copy(), integers.copy(), np.abs(normal(6, 8))
        arrays = [ids, labels, positions, rows]
        made = [
            ops.embedding(ids, table),
            ops.cross_entropy(x, labels),
            ops.rope(x, positions, 2),
            ops.cross_entropy(x, rows),
        ]
        cache_e, cache_l, cache_r, cache_d = (cache for _, cache in made)
        for array in arrays if disturb else []:
            array[:] = 1
        d_table = np.zeros_like(table)
        ops.embedding_backward(x, cache_e, d_table)
        gradients = [
            ops.cross_entropy_backward(cache_l),
            ops.rope_backward(x, cache_r),
            ops.cross_entropy_backward(cache_d),
        ]
        return [d_table, *gradients]

    for left, reused in zip(results(False), results(True)):
        assert np.array_equal(left, reused)


def test_a_models_backward_is_that_of_its_forwards_tokens(ops):
    ids = np.random.default_rng(1).integers(0, 11, (2, 6))
    gradients = []
    for disturb in (False, True):
        model = toy.TransformerLM(11, d_model=8, d_ff=12, n_heads=2, n_layers=1, context_length=6, ops=ops)
        given, positions = ids.copy(), np.arange(6)
        _, cache = model.forward(given, positions)
        if disturb:
            given[...], positions[...] = 0, 3
        grads = model.new_gradients()
        model.backward(cache, ids, grads)
        gradients.append(grads.copies())
    assert all(np.array_equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# -- integers that are no ids, arrays that are not what they look like -------------------------------------------------

NO_IDS = {
    "beyond": lambda n: np.full(6, n),
    "below": lambda n: np.full(6, -2),
    "64 bits": lambda n: np.full(6, 2**64 - 1, np.uint64),
    "half of 64 bits": lambda n: np.full(6, 2**63, np.uint64),
    "masked": lambda n: np.ma.array(np.zeros(6, int), mask=[True] + 5 * [False]),
    "floats": lambda n: np.zeros(6),
}


@pytest.mark.parametrize("case", NO_IDS)
def test_integers_that_are_no_ids_or_labels_are_refused(ops, case):
    table, x, wrong = normal(5, 8), normal(6, 8), NO_IDS[case]
    right = np.array([0, 4, 1, 1, 2, 3], np.uint64)
    ops.embedding(right, table)
    ops.cross_entropy(x, right)
    ops.embedding(right, matrix := QuantizedMatrix(np.zeros((5, 34), np.uint8), "Q8_0", (5, 32)))
    with pytest.raises(ValueError, match="token_ids"):
        ops.embedding(wrong(5), table)
    with pytest.raises(ValueError, match="token_ids"):
        ops.embedding(wrong(5), matrix)
    with pytest.raises(ValueError, match="labels"):
        ops.cross_entropy(x, wrong(8))


@needs_kernels
def test_masked_arrays_are_refused_by_every_kernel():
    from toy.ops import accelerated as ops

    x, w, g = normal(6, 8), normal(5, 8), normal(8)
    turned = x.T
    masked = {id(a): np.ma.array(a, mask=False) for a in (x, w, g, turned)}
    hp = np.array([[1e-3, 0.9, 0.95, 1e-8, 0.1, 0.9, 0.95]])
    calls = {
        "x": [
            *((ops.linear, (x, w)), (ops.gelu, (x,)), (ops.rms_norm, (x, g)), (ops.rope, (x, np.zeros(6, int), 2))),
            *((ops.split, (x, [8])), (ops.scale, (x, 2.0)), (ops.scale, (turned, 2.0)), (ops.sum_of_squares, (x,))),
            *((ops.reshape, (x, 4)), (ops.zeros_like, (x,))),
        ],
        "weight": [(ops.linear, (x, w)), (ops.adamw_step, (w, w.copy(), w.copy(), w.copy(), hp))],
        "gamma": [(ops.layer_norm, (x, g, g.copy()))],
        "table": [(ops.embedding, (np.zeros(6, int), w))],
        "q": [(ops.attention, (x, x.copy(), x.copy(), 1, 2))],
        "logits": [(ops.cross_entropy, (x, np.zeros(6, int)))],
        "a": [(ops.add, (x, x.copy()))],
        "gate": [(ops.swiglu, (x, x.copy()))],
    }
    index = {"weight": {ops.linear: 1}, "gamma": {ops.layer_norm: 1}, "table": {ops.embedding: 1}}
    for name, some in calls.items():
        for function, arguments in some:
            function(*arguments)
            place = index.get(name, {}).get(function, 0)
            wrong = [masked.get(id(a), a) if i == place else a for i, a in enumerate(arguments)]
            assert isinstance(wrong[place], np.ma.MaskedArray)
            with pytest.raises(ValueError, match=rf"\b{name}\b.*masked"):
                function(*wrong)
    with pytest.raises(ValueError, match=r"hp: is a MaskedArray"):
        ops.adamw_step(w, w.copy(), w.copy(), w.copy(), np.ma.array(hp))


def test_masked_arrays_are_refused_by_models_and_engines(backend):
    config = toy.TransformerConfig(11, d_model=8, n_heads=2, d_ff=12, n_layers=1, context_length=6)
    recipe = toy.recipes.FromScratch(*backend).realize(config, toy.RecipeOptions(t_seq=6, t_batch=2))
    ids, positions, row = np.ones((2, 6), int), np.arange(6), recipe.adamw().hp_for_step(0)
    rows = np.ones((12, 11), np.float32)
    model, before = recipe.model_copy(), recipe.parameters()
    _, cache = model.forward(ids)
    calls = [
        lambda f: recipe.step(f(ids), None, ids, row, True),
        lambda f: recipe.step(ids, f(positions), ids, row, True),
        lambda f: recipe.step(ids, None, f(ids), row, True),
        lambda f: recipe.step(ids, None, f(rows), row, True),
        lambda f: recipe.step(ids, None, ids, f(np.array(row)), True),
        lambda f: recipe.evaluate(f(ids), ids),
        lambda f: recipe.logits(f(ids)),
        lambda f: recipe.load_parameters({name: f(array) for name, array in before.items()}),
        lambda f: model.forward(f(ids)),
        lambda f: model.forward(ids, f(positions)),
        lambda f: model.backward(cache, f(ids), model.new_gradients()),
        lambda f: model.backward(cache, f(rows), model.new_gradients()),
    ]
    for number, call in enumerate(calls):
        call(np.asarray)
        recipe.load_parameters(before)
        with pytest.raises(ValueError, match="masked"):
            call(lambda a: np.ma.array(a, mask=a == a.flat[0]))
        assert all(np.array_equal(array, before[name]) for name, array in recipe.parameters().items()), number


def test_positions_of_a_model_are_whole_numbers():
    model = toy.TransformerLM(11, d_model=8, d_ff=12, n_heads=2, n_layers=1, context_length=6, ops=reference)
    model.forward(np.ones(4, int), np.arange(4))
    with pytest.raises(ValueError, match="positions must be integers"):
        model.forward(np.ones(4, int), np.arange(4) + 0.5)


# -- results that would be written over what they are computed from ----------------------------------------------------

HP = np.array([[1e-3, 0.9, 0.95, 1e-8, 0.1, 0.9, 0.95]])


@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_adamw_takes_four_arrays_of_their_own(ops, pair):
    whole = np.abs(normal(8, 6))
    arrays = [array.copy() for array in (whole,) * 4]
    ops.adamw_step(*arrays, HP)
    halves = [whole[:4], whole[4:], whole[:4].copy(), whole[4:].copy()]  # beside one another is not the same memory
    ops.adamw_step(*halves, HP)
    for view in (lambda a: a, lambda a: a[:], lambda a: a.reshape(6, 8).reshape(8, 6)):
        shared = [array.copy() for array in arrays]
        shared[pair[1]] = view(shared[pair[0]])
        before = [array.copy() for array in shared]
        with pytest.raises(ValueError, match=r"memory|overlap"):
            ops.adamw_step(*shared, HP)
        assert all(np.array_equal(a, b) for a, b in zip(shared, before))


@needs_kernels
def test_gradients_are_not_written_over_what_they_are_computed_from():
    from toy.ops import accelerated as ops

    x, w, d_y, gamma = normal(6, 8), normal(6, 8), normal(6, 6), normal(8)
    _, cache = ops.linear(x, w)
    _, norm = ops.layer_norm(x, gamma, gamma.copy())
    _, lookup = ops.embedding(np.arange(6), normal(6, 8, seed=1))
    total = np.zeros(8, np.float32)
    right = [
        lambda: ops.linear_backward(d_y, cache, np.zeros_like(w), np.zeros(6, np.float32)),
        lambda: ops.layer_norm_backward(x, norm, np.zeros(8, np.float32), np.zeros(8, np.float32)),
        lambda: ops.embedding_backward(x, lookup, np.zeros((6, 8), np.float32)),
    ]
    d_weight = np.zeros((6, 8), np.float32)
    wrong = {
        "d_weight and the cache's weight": lambda: ops.linear_backward(d_y, cache, w),
        "d_weight and the cache's x": lambda: ops.linear_backward(d_y, cache, x),
        "d_weight and d_bias": lambda: ops.linear_backward(d_y, cache, d_weight, d_weight[0, :6]),
        "d_bias and d_y": lambda: ops.linear_backward(d_y, cache, None, d_y[2]),
        "d_gamma and d_beta": lambda: ops.layer_norm_backward(x, norm, total, total),
        "d_gamma and the cache's gamma": lambda: ops.layer_norm_backward(x, norm, gamma, total),
        "d_beta and d_y": lambda: ops.layer_norm_backward(x, norm, None, x[1]),
        "d_table and d_out": lambda: ops.embedding_backward(x, lookup, x),
    }
    for call in right:
        call()
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


# -- RoPE --------------------------------------------------------------------------------------------------------------


def test_a_far_position_takes_no_table_of_all_positions_before_it(ops):
    x, positions = normal(3, 128), np.array([0, 5, 2**24 - 1])
    expected, _ = reference.rope(x.astype(np.float64), positions, 2)
    tracemalloc.start()
    try:
        y, cache = ops.rope(x, positions, 2)
        back = ops.rope_backward(y, cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.abs(y - expected).max() < 2e-6 and np.abs(back - x).max() < 2e-6
    assert peak < 1e6


@needs_kernels
def test_rope_tables_grow_to_their_bound_and_agree_on_both_sides_of_it():
    from toy.ops import accelerated as ops

    x = normal(4, 64)
    for last in (255, 256, 2**16, 2**17 - 1, 2**17, 2**17 + 5):  # 2**17 positions of 32 numbers are the largest table
        positions = np.array([0, 1, last - 1, last])
        expected, _ = reference.rope(x.astype(np.float64), positions, 1)
        y, cache = ops.rope(x, positions, 1)
        assert np.abs(y - expected).max() < 2e-6, last
        assert np.abs(ops.rope_backward(y, cache) - x).max() < 2e-6, last
