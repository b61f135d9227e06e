"""Products in bfloat16 (`precision="bf16"`): the rounding, the products in every way there is here, and training with them.

Where the processor has no bf16 products, training runs through the portable way (the variable TOY_BF16), which is slow and
gives the same numbers but for the order of the sums.
"""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from toy import switch
from toy.cli.main import cli
from toy.files.gguf_write import write_gguf
from toy.models import ARCHITECTURES, model_for
from toy.quantized import QuantizedMatrix, dequantized, quantize
from toy.switch import BackendUnavailableError, Resolved
from toy.training import FromScratchOptions, Training

if os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0"):
    pytest.skip("TOY_PURE_PYTHON is set: the compiled kernels are not tested", allow_module_level=True)

from toy._kernels import products

TINY = {arch: row.tiny for arch, row in ARCHITECTURES.items()}
TINY["vit"] = toy.ViTConfig(
    8, 1, 2, 64, 4, 96, 2, 10
)  # in a narrower one any rounding, of the weights too, is seen 20-fold
FORMS = ("nt", "nn", "tn")


@pytest.fixture(params=products.WAYS)
def precision(request):
    """Every way to multiply, as a number."""
    if not products.has(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return products.WAYS[request.param]


@pytest.fixture(autouse=True)
def some_way(monkeypatch):
    """There are products in bfloat16 on any processor."""
    monkeypatch.delenv("TOY_BF16", raising=False)
    if products.bf16() is None:
        monkeypatch.setenv("TOY_BF16", "portable")


@pytest.fixture(params=["cython", "ggml"])
def backend(request):
    row = next(row for row in switch.backends() if row.name == request.param)
    if not row.available:
        pytest.skip(row.reason)
    return request.param


# ----------------------------------------------------------------------------------------------------------------------
# rounding
# ----------------------------------------------------------------------------------------------------------------------


def same_bits_as_torch(x):
    torch = pytest.importorskip("torch")
    expected, found = torch.from_numpy(x).bfloat16().float().numpy(), products.rounded(x)
    nan = np.isnan(x)
    assert np.isnan(found[nan]).all()
    assert (found.view(np.uint32)[~nan] == expected.view(np.uint32)[~nan]).all()
    return found


def test_rounding_of_random_bits_is_that_of_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, (20, 1000), np.uint32)
    found = same_bits_as_torch(bits.view(np.float32))
    assert (found.view(np.uint32) & 0xFFFF == 0).all()


def test_rounding_of_ties_denormals_infinities_and_nan():
    high = np.random.default_rng(1).integers(0, 2**16, 4000, np.uint32) << 16
    x = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    special = [0, 0x80000000, 1, 0x7FFF, 0x8000, 0x18000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
    x = np.concatenate([x, np.array(special, np.uint32)]).view(np.float32)[None]
    found = same_bits_as_torch(x)
    assert found[0, -5] == found[0, -4] == np.inf  # the largest float32 rounds up


@pytest.mark.parametrize("form", FORMS)
def test_the_product_rounds_both_operands_in_that_way(precision, form):
    """Times the identity every number comes back as its rounding: of either operand, packed along k and across it."""
    bits = np.random.default_rng(2).integers(0, 2**32, (32, 32), np.uint32)
    exponent = bits >> 23 & 0xFF  # the instructions take denormal numbers for zeros
    x = np.where((exponent == 0) | (exponent == 255), np.uint32(0x3F808000), bits).view(np.float32)
    one, out = np.eye(32, dtype=np.float32), np.empty((32, 32), np.float32)
    products.multiply(form, x, one, out, precision)
    assert (out == products.rounded(x if form != "tn" else np.ascontiguousarray(x.T))).all()
    products.multiply(form, one, x, out, precision)
    assert (out == products.rounded(x if form != "nt" else np.ascontiguousarray(x.T))).all()
    assert (out != (x if form != "nt" else x.T)).mean() > 0.9


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_stay(precision, form):
    a, b = operands(form, 20, 18, 40)
    rows = a.T if form == "tn" else a
    rows[3, 7], rows[5, 39] = np.nan, np.inf
    out = multiplied(form, a, b, precision)
    assert np.isnan(out[3]).all()
    assert np.isinf(out[5]).all()
    assert np.isfinite(np.delete(out, [3, 5], axis=0)).all()


# ----------------------------------------------------------------------------------------------------------------------
# products
# ----------------------------------------------------------------------------------------------------------------------


def operands(form, m, n, k, seed=0, pad=0):
    """a and b with rows of `pad` numbers more, which are NaN."""
    rng = np.random.default_rng(seed)
    found = []
    for rows, columns in (((k, m) if form == "tn" else (m, k)), ((n, k) if form == "nt" else (k, n))):
        wide = np.full((rows, columns + pad), np.nan, np.float32)
        wide[:, :columns] = rng.standard_normal((rows, columns))
        found.append(wide[:, :columns])
    return found


def in_float64(form, a, b):
    """The exact product of the rounded operands, and that of their absolute values."""
    a, b = (products.rounded(x).astype(np.float64) for x in (a, b))
    a, b = a.T if form == "tn" else a, b.T if form == "nt" else b
    return a @ b, np.abs(a) @ np.abs(b)


def multiplied(form, a, b, precision, add=None):
    m, n = a.shape[form == "tn"], b.shape[form != "nt"]
    wide = np.full((m, n + 3), 7, np.float32)
    wide[:, :n] = np.nan if add is None else add
    products.multiply(form, a, b, wide[:, :n], precision, add is not None)
    assert (wide[:, n:] == 7).all()  # nothing is written beside c
    return wide[:, :n]


def check(form, m, n, k, precision, seed=0, pad=0, add=None):
    a, b = operands(form, m, n, k, seed, pad)
    exact, sizes = in_float64(form, a, b)
    found = multiplied(form, a, b, precision, add)
    start = 0.0 if add is None else add
    # k sums in float32, each off by at most 2^-24 of what is there (Higham 2002, eq. 3.5)
    bar = (k + 1) * 2.0**-24 * (sizes + abs(start))
    assert (np.abs(found - (exact + start)) <= bar).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [1, 15, 17, 31, 33])
def test_edges(precision, form, m):
    for n in (1, 15, 17, 31, 33):
        for k in (1, 15, 17, 31, 33):
            check(form, m, n, k, precision, pad=5)
            check(form, m, n, k, precision, add=2.5)


@pytest.mark.parametrize("form", FORMS)
def test_several_blocks_along_each_side(precision, form):
    check(form, 290, 70, 40, precision)
    check(form, 40, 560, 40, precision, pad=1)
    check(form, 35, 40, 1100, precision)
    check(form, 270, 530, 530, precision, add=-1.0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.sampled_from(sorted(products.WAYS)),
    st.tuples(*[st.integers(1, 90)] * 3),
    st.integers(0, 3),
    st.sampled_from([None, 0.0, -3.0]),
    st.integers(0, 2**31),
)
def test_any_shape(form, way, shape, pad, add, seed):
    if products.has(way):
        check(form, *shape, products.WAYS[way], seed, pad, add)


@pytest.mark.parametrize("form", FORMS)
def test_of_no_numbers(precision, form):
    for m, n, k in ((0, 4, 5), (4, 0, 5), (4, 5, 0), (0, 0, 0)):
        a, b = operands(form, m, n, k)
        assert (multiplied(form, a, b, precision) == 0).all()
        assert (multiplied(form, a, b, precision, add=2.0) == 2).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_ways_agree(form):
    there = {name: way for name, way in products.WAYS.items() if products.has(name)}
    if len(there) < 2:
        pytest.skip("this processor has no bf16 products to compare with the portable ones")
    a, b = operands(form, 65, 70, 700)
    _, sizes = in_float64(form, a, b)
    found = {name: multiplied(form, a, b, way) for name, way in there.items()}
    for other in found.values():
        assert (np.abs(other - found["portable"]) <= 2 * 701 * 2.0**-24 * sizes).all()


def test_multiply_refuses_what_does_not_fit():
    a, b, c = np.ones((4, 5), np.float32), np.ones((5, 6), np.float32), np.ones((4, 6), np.float32)
    way = products.WAYS["portable"]
    products.multiply("nn", a, b, c, way)
    assert (c == 5).all()
    for form, x, y in (("nt", a, b), ("nn", b, a), ("tn", a, b), ("tt", a, b), ("nn", a.astype(np.float64), b)):
        with pytest.raises(ValueError):
            products.multiply(form, x, y, c, way)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match="precision"):
            products.multiply("nn", a, b, c, wrong)
    c.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        products.multiply("nn", a, b, c, way)


@pytest.mark.parametrize("n", [1, 24, 700])
def test_linear_has_the_same_bits_on_any_number_of_threads(precision, n):
    from toy._kernels import linear, threads

    rng = np.random.default_rng(3)
    x, weight, d_y = (rng.standard_normal(shape, np.float32) for shape in ((n, 200), (330, 200), (n, 330)))
    bias, before = rng.standard_normal(330, np.float32), threads.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3, 5):
            threads.set_num_threads(n_threads)
            d_weight, d_bias = np.ones_like(weight), np.ones_like(bias)
            y, cache = linear.linear(x, weight, bias, precision)
            d_x = linear.linear_backward(d_y, cache, d_weight, d_bias)
            results.append([y, d_x, d_weight, d_bias])
    finally:
        threads.set_num_threads(before)
    for others in results[1:]:
        for found, expected in zip(others, results[0]):
            assert (found == expected).all()
    exact = in_float64("nt", x, weight)[0] + bias
    assert np.abs(results[0][0] - exact).max() < 1e-4
    assert np.abs(results[0][1] - in_float64("nn", d_y, weight)[0]).max() < 1e-4
    assert np.abs(results[0][2] - 1 - in_float64("tn", d_y, x)[0]).max() < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def realize(kind, backend, precision, gguf=None, **options):
    options = {"t_seq": 8, "t_batch": 3, "init_scale": 5.0, "precision": precision, **options}
    if kind == "lora":
        recipe = toy.recipes.LoRA(backend).realize(
            gguf, None, 4, toy.RecipeOptions(**options), targets=("q", "v", "down"), keep_gradients=True
        )
        rng = np.random.default_rng(3)  # B starts at zero, and then A has no gradient
        recipe.load_parameters({name: rng.normal(0, 0.3, array.shape) for name, array in recipe.parameters().items()})
        return recipe
    config = TINY[kind]
    made = toy.recipes.ViTTiny if kind == "vit" else toy.recipes.FromScratch
    options["t_seq"] = config.n_tokens if kind == "vit" else 5
    return made(backend).realize(config, toy.RecipeOptions(**options), keep_gradients=True)


@pytest.fixture(scope="module", params=["q8_0", "q4_k_m", "iq4_nl"])
def gguf(request, tmp_path_factory):
    config = toy.LlamaConfig(40, d_model=256, n_heads=2, n_kv_heads=1, d_ff=256, n_layers=2, context_length=16)
    rng, shapes = np.random.default_rng(0), model_for(config).parameter_shapes(config)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    more = {}
    if request.param != "q8_0":
        if not next(row.available for row in switch.backends() if row.name == "ggml"):
            pytest.skip("it is ggml that quantises to this type")
        from toy.trained.export import _quantize

        more = {"quantizer": _quantize}
    write_gguf(path, config, weights, type=request.param, **more)
    with toy.GGUF.open(path) as gguf:
        yield gguf


def one_step(recipe):
    inputs, labels = recipe.engine.step_batch.random(np.random.default_rng(1))
    loss = recipe.step(inputs, labels=labels, hp=recipe.adamw().hp_for_step(0), is_first=True)
    return loss, np.concatenate([g.ravel() for g in recipe.gradients().values()])


def compare_one_step(kind, backend, gguf=None, **options):
    loss, gradient = one_step(realize(kind, backend, "f32", gguf, **options))
    rounded_loss, rounded_gradient = one_step(realize(kind, backend, "bf16", gguf, **options))
    assert rounded_loss == pytest.approx(loss, rel=1e-2)
    assert rounded_loss != loss
    off = np.linalg.norm(rounded_gradient - gradient) / np.linalg.norm(gradient)
    assert 1e-4 < off < 2e-2


@pytest.mark.parametrize("kind", TINY)
def test_gradients_are_close_to_those_of_float32_and_not_equal(kind, backend):
    compare_one_step(kind, backend, init_scale=1.0)


@pytest.mark.parametrize("options", [{"recompute": True}, {"accumulate": 2}, {"weight_dtype": "bf16"}], ids=str)
def test_with_other_options(options, backend):
    if "weight_dtype" not in options:
        compare_one_step("llama", backend, **options)
        return
    loss, _ = one_step(realize("llama", backend, "f32"))
    rounded, _ = one_step(realize("llama", backend, "bf16", **options))
    # the weights that are rounded in each product are rounded already, the others are norms
    assert rounded == pytest.approx(loss, rel=1e-2)


def test_lora_on_a_quantised_base(gguf, backend):
    compare_one_step("lora", backend, gguf, init_scale=1.0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lora"])
def test_both_backends_multiply_the_same(kind, gguf):
    rows = {row.name: row.available for row in switch.backends()}
    if not rows["ggml"]:
        pytest.skip("ggml is not there")
    found = [one_step(realize(kind, name, "bf16", gguf, init_scale=1.0)) for name in ("cython", "ggml")]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    # a sum that is rounded otherwise may bring a number to another bfloat16: far less than products in float32 would differ
    assert np.linalg.norm(found[0][1] - found[1][1]) <= 3e-4 * np.linalg.norm(found[0][1])


@pytest.mark.parametrize("n", [1, 3, 40])
def test_products_with_a_quantised_weight_round_what_it_stands_for(precision, n):
    rng = np.random.default_rng(4)
    dense = rng.standard_normal((330, 2112), np.float32)
    weight = QuantizedMatrix(quantize(dense, "Q8_0"), "Q8_0", dense.shape)
    x, d_y = rng.standard_normal((n, 2112), np.float32), rng.standard_normal((n, 330), np.float32)
    bias, numbers = rng.standard_normal(330, np.float32), dequantized(weight)
    ops = switch.ops_for("cython", precision)
    y, cache = ops.linear(x, weight, bias)
    d_x = ops.linear_backward(d_y, cache, None)
    assert np.abs(y - bias - in_float64("nt", x, numbers)[0]).max() < 1e-3
    assert np.abs(d_x - in_float64("nn", d_y, numbers)[0]).max() < 1e-3


def test_evaluation_and_logits_have_the_precision_of_training(backend):
    for verb in ("evaluate", "logits"):
        results = []
        for precision in ("f32", "bf16"):
            recipe = realize("transformer", backend, precision)
            inputs, labels = recipe.engine.batch.random(np.random.default_rng(1))
            results.append(recipe.evaluate(inputs, labels) if verb == "evaluate" else recipe.logits(inputs))
        assert np.abs(results[0] - results[1]).max() > 1e-6
        assert results[1] == pytest.approx(results[0], rel=0.1, abs=0.1)


def trained(recipe, steps=12):
    """Losses of some steps, and the weights after them."""
    adamw = recipe.adamw(lr=0.01)
    rng = np.random.default_rng(5)
    losses = []
    for k in range(steps):
        inputs, labels = recipe.engine.step_batch.random(rng)
        losses.append(recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0))
    return losses, recipe.parameters()


def same(found, expected):
    return found[0] == expected[0] and all((found[1][name] == array).all() for name, array in expected[1].items())


def test_engines_of_both_precisions_do_not_influence_each_other(backend):
    """In turns in one thread, and in two threads at once: the bits of each alone."""
    sizes = {"t_batch": 16}
    alone = {precision: trained(realize("llama", backend, precision, **sizes)) for precision in ("f32", "bf16")}
    assert alone["f32"][0] != alone["bf16"][0]

    recipes = {precision: realize("llama", backend, precision, **sizes) for precision in alone}
    found, rng = {precision: [] for precision in alone}, np.random.default_rng(5)
    adamw = recipes["f32"].adamw(lr=0.01)
    for k in range(12):
        inputs, labels = recipes["f32"].engine.step_batch.random(rng)
        for precision, recipe in recipes.items():
            loss = recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
            found[precision].append(loss)
    for precision, recipe in recipes.items():
        assert same((found[precision], recipe.parameters()), alone[precision])

    recipes = [(precision, realize("llama", backend, precision, **sizes)) for precision in alone for _ in range(2)]
    results = [None] * len(recipes)

    def work(i):
        results[i] = trained(recipes[i][1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (precision, _), result in zip(recipes, results):
        assert same(result, alone[precision])


@pytest.mark.slow
def test_a_loss_curve_stays_within_two_hundredths_of_float32s():
    """The readable transformer, the sizes of a character model, 100 steps on this project's README."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text])
    config = toy.TransformerConfig(len(letters), 128, 4, 512, 4, 64)
    ends = {}
    for precision in ("f32", "bf16"):
        recipe = toy.recipes.FromScratch("cython").realize(config, toy.RecipeOptions(64, 12, precision=precision))
        adamw, rng = recipe.adamw(lr=1e-3), np.random.default_rng(0)
        for k in range(100):
            starts = rng.integers(0, len(ids) - 65, 12)
            batch = np.stack([ids[start : start + 65] for start in starts])
            recipe.step(batch[:, :-1], labels=batch[:, 1:], hp=adamw.hp_for_step(k), is_first=k == 0)
        held = np.stack([ids[start : start + 65] for start in range(0, 12 * 65, 65)])
        ends[precision] = recipe.evaluate(held[:, :-1], held[:, 1:])
    assert ends["f32"] < 3.0  # it has learned something
    assert 0 < abs(ends["bf16"] - ends["f32"]) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# runs, and what is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return FromScratchOptions(
        corpus=str(corpus), d_model=8, heads=2, d_ff=16, layers=2, context=8, batch=4, steps=12, eval_every=4,
        eval_batches=2, sample_every=0, schedule="constant", precision="bf16",
    )  # fmt: skip


def test_a_run_goes_on_bit_for_bit(options, tmp_path, backend):
    import dataclasses

    options = dataclasses.replace(options, backend=backend)
    whole = Training(options, tmp_path / "whole")
    list(whole.run())
    assert {choice.name: choice.value for choice in whole.choices()}["precision"] == "bf16"
    list(Training(dataclasses.replace(options, steps=8), tmp_path / "cut").run())
    resumed = Training.resume(tmp_path / "cut", steps=12)
    assert resumed.options.precision == resumed.recipe.options.precision == "bf16"
    list(resumed.run())
    for name, array in whole.recipe.parameters().items():
        assert (resumed.recipe.parameters()[name] == array).all(), name
    in_float32 = Training(dataclasses.replace(options, precision="f32"))
    list(in_float32.run())
    assert any((in_float32.recipe.parameters()[name] != a).any() for name, a in whole.recipe.parameters().items())
    assert "precision" not in {choice.name for choice in in_float32.choices()}


def test_a_run_does_not_go_on_with_another_precision(options, tmp_path):
    list(Training(options, tmp_path / "run").run())
    assert Training.resume(tmp_path / "run", steps=20, precision="bf16").options.precision == "bf16"
    with pytest.raises(ValueError, match="begun with precision bf16 and cannot go on with f32"):
        Training.resume(tmp_path / "run", steps=20, precision="f32")


def test_an_unknown_precision_is_refused():
    assert toy.RecipeOptions(8, precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="precision must be one of f32, bf16, got 'f16'"):
        toy.RecipeOptions(8, precision="f16")


def test_numpy_and_devices_refuse_it():
    for choice, said in (
        (Resolved("numpy", "cpu", ""), "backend 'numpy' has no precision 'bf16'"),
        (Resolved("ggml", "cpu-native", ""), "device 'cpu-native' has no precision 'bf16'"),
        (Resolved("ggml", "CUDA0", ""), "device 'CUDA0' has no precision 'bf16'"),
    ):
        assert switch.kernel_precision("f32", choice) == 0
        with pytest.raises(ValueError, match=f"{said}.*float32"):
            switch.kernel_precision("bf16", choice)
    recipe = toy.recipes.FromScratch("numpy")
    with pytest.raises(ValueError, match="backend 'numpy' has no precision"):
        recipe.realize(TINY["gpt2"], toy.RecipeOptions(5, precision="bf16"))


def without_bf16(monkeypatch):
    monkeypatch.delenv("TOY_BF16", raising=False)
    monkeypatch.setattr(products, "bf16_name", lambda: None)
    monkeypatch.setattr(products, "bf16", lambda: None)


def test_a_processor_without_them_refuses(backend, monkeypatch):
    realize("gpt2", backend, "bf16")
    without_bf16(monkeypatch)
    realize("gpt2", backend, "f32")
    with pytest.raises(BackendUnavailableError, match=r"this processor has no bf16 products .*float32"):
        realize("gpt2", backend, "bf16")


def test_toy_train_says_so_and_writes_nothing(options, tmp_path, monkeypatch):
    arguments = [
        "train",
        "from-scratch",
        "--corpus",
        options.corpus,
        "--steps",
        "2",
        "--d-model",
        "8",
        "--heads",
        "2",
    ]
    arguments += ["--precision", "bf16", "--backend", "cython", "--sample-every", "0"]
    good = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "good")])
    assert good.exit_code == 0, good.output
    assert "precision" in good.output
    without_bf16(monkeypatch)
    bad = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "bad")])
    assert bad.exit_code == 2
    assert "no bf16 products" in bad.output
    assert not (tmp_path / "bad").exists()


def test_the_variable_of_tests(monkeypatch):
    monkeypatch.setenv("TOY_BF16", "portable")
    assert products.bf16_name() == switch.bf16_products() == "portable"
    assert products.bf16() == products.WAYS["portable"]
    monkeypatch.setenv("TOY_BF16", "fast")
    with pytest.raises(ValueError, match=r"TOY_BF16 is 'fast', and this machine has .*portable"):
        products.bf16()


def test_toy_backends_says_what_there_is(monkeypatch):
    monkeypatch.setenv("TOY_BF16", "portable")
    said = " ".join(CliRunner().invoke(cli, ["backends"]).output.split())
    assert "ggml's cpu): portable" in said
    without_bf16(monkeypatch)
    said = " ".join(CliRunner().invoke(cli, ["backends"]).output.split())
    assert "ggml's cpu): none here that are faster than float32's" in said
    assert '"bf16_products": null' in CliRunner().invoke(cli, ["backends", "--json"]).output
