"""What lets long contexts fit: the loss of a large vocabulary a band of rows at a time, and blocks that are computed again in
the backward. The same numbers, in fewer bytes, on every backend."""

import dataclasses
import importlib
import tracemalloc

import numpy as np
import pytest
from bridge_fuzz import aligned
from conftest import needs_kernels
from graph_tables import TABLES, on_table

import toy
from toy import op_table
from toy.checks import gradcheck
from toy.engines import base, memory
from toy.files.gguf_write import write_gguf
from toy.models import ARCHITECTURES, model_for
from toy.ops import reference
from toy.quantized import QuantizedMatrix, quantize
from toy.training import Training
from toy.training.from_scratch import FromScratchOptions

N, D, V = 23, 6, 11  # rows, width, classes
BANDS = (5 * V, 4)  # numbers of logits at a time, least rows: five bands of five rows or four

every_table = pytest.mark.parametrize(
    "table", [pytest.param(table, marks=[needs_kernels] * (table != "reference")) for table in TABLES]
)
in_bands = pytest.mark.parametrize("bands", [None, BANDS], ids=["whole", "in bands"])


def set_bands(monkeypatch, bands):
    if bands is not None:
        monkeypatch.setattr(op_table, "LOGITS_AT_ONCE", bands[0])
        monkeypatch.setattr(op_table, "LEAST_ROWS", bands[1])


def make_labels(kind):
    """Labels of which some do not count, and none of the rows 10 to 14, which are a band."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, V, N)
    labels[[2, 7, *range(10, 15)]] = -1
    if kind == "integers":
        return labels
    return (rng.dirichlet(np.ones(V), N) * rng.uniform(0.5, 2, (N, 1)) * (labels >= 0)[:, None]).astype(np.float32)


def make_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(N, D)), "weight": rng.normal(size=(V, D))}


def separate(ops, a, grads, cap):
    """The ops that `linear_cross_entropy` is one of, one after the other, on whole matrices."""
    logits, product = ops.linear(a["x"], a["weight"])
    if cap is not None:
        logits, capped = ops.softcap(logits, cap)
    loss, cache = ops.cross_entropy(logits, a["labels"])
    d_logits = ops.cross_entropy_backward(cache)
    if cap is not None:
        d_logits = ops.softcap_backward(d_logits, capped)
    return {"loss": loss, "d_x": ops.linear_backward(d_logits, product, grads.get("weight"))}


def fused(ops, a, grads, cap):
    loss, d_x = ops.linear_cross_entropy(a["x"], a["weight"], a["labels"], cap, grads.get("weight"))
    return {"loss": loss, "d_x": d_x}


# ----------------------------------------------------------------------------------------------------------------------
# the loss in bands of rows
# ----------------------------------------------------------------------------------------------------------------------


def test_bands_are_all_rows_in_order_and_nearly_equal():
    for rows, columns, numbers, least in [(23, 11, 55, 4), (23, 11, 55, 7), (1, 9, 4, 1), (2048, 49152, 2**24, 128)]:
        with pytest.MonkeyPatch.context() as patch:
            set_bands(patch, (numbers, least))
            bands = op_table.row_bands(rows, columns)
        heights = [band.stop - band.start for band in bands]
        assert [i for band in bands for i in range(band.start, band.stop)] == list(range(rows))
        assert max(heights) - min(heights) <= 1 and max(heights) <= max(numbers // columns, least)
    assert op_table.row_bands(512, 65) == [slice(0, 512)]  # a small vocabulary: whole, as it was
    assert op_table.row_bands(0, 65) == []


@every_table
@in_bands
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("labels", ["integers", "dense"])
def test_loss_and_gradients_are_those_of_the_separate_ops(monkeypatch, table, bands, trained, cap, labels):
    set_bands(monkeypatch, bands)
    arrays, labels = make_arrays(), make_labels(labels)
    integers, trained = {"labels": (labels, V)}, ["weight"] if trained else []
    found, expected = (
        on_table(table, lambda ops, a, grads, how=how: how(ops, a, grads, cap), arrays, trained, integers)
        for how in (fused, separate)
    )
    assert found.keys() == expected.keys() == {"loss", "d_x", *trained}
    assert np.ravel(found["loss"])[0] == pytest.approx(np.ravel(expected["loss"])[0], rel=1e-6)
    for name in expected.keys() - {"loss"}:
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-6 * largest, err_msg=name)
    assert not np.any(found["d_x"][10:15])


@every_table
@in_bands
def test_without_a_backward_there_is_the_loss_alone(monkeypatch, table, bands):
    set_bands(monkeypatch, bands)

    def record(ops, a, grads):
        loss, d_x = ops.linear_cross_entropy(a["x"], a["weight"], a["labels"], 1.5, backward=False)
        assert d_x is None
        return {"loss": loss}

    integers = {"labels": (make_labels("integers"), V)}
    found = np.ravel(on_table(table, record, make_arrays(), (), integers)["loss"])[0]
    expected = on_table("reference", lambda *given: separate(*given, 1.5), make_arrays(), (), integers)["loss"]
    assert found == pytest.approx(float(expected), rel=1e-6)


@in_bands
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("labels", ["integers", "dense"])
def test_derivatives_of_the_reference(monkeypatch, bands, cap, labels):
    set_bands(monkeypatch, bands)
    arrays, labels = make_arrays(), make_labels(labels).astype(np.int64 if labels == "integers" else np.float64)
    d_weight = np.zeros_like(arrays["weight"])
    _, d_x = reference.linear_cross_entropy(**arrays, labels=labels, cap=cap, d_weight=d_weight)
    for name, given in (("x", d_x), ("weight", d_weight)):
        measured = gradcheck.central_difference(
            lambda _: reference.linear_cross_entropy(**arrays, labels=labels, cap=cap)[0], arrays[name], 1.0
        )
        assert gradcheck.relative_error(given, measured) < gradcheck.DERIVATIVE_BAR


@every_table
def test_weight_gradients_are_added_to(monkeypatch, table):
    """Tied: the head is also the embedding, whose gradient collects both uses; twice the op, twice its gradient."""
    set_bands(monkeypatch, BANDS)
    ids = np.arange(N) % V

    def record(ops, a, grads):
        _, lookup = ops.embedding(a["token_ids"], a["weight"])
        fused(ops, a, grads, None)
        found = fused(ops, a, grads, None)
        ops.embedding_backward(a["x"], lookup, grads["weight"])
        return found

    integers = {"labels": (make_labels("integers"), V), "token_ids": (ids, V)}
    once = on_table(table, lambda *given: fused(*given, None), make_arrays(), ["weight"], integers)["weight"]
    found = on_table(table, record, make_arrays(), ["weight"], integers)["weight"]
    looked_up = np.zeros((V, D))
    np.add.at(looked_up, ids, make_arrays()["x"])
    np.testing.assert_allclose(found, 2 * once + looked_up, atol=1e-4)


@every_table
@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_quantised_head_gives_the_gradient_of_the_hidden_states(monkeypatch, table, kind):
    set_bands(monkeypatch, (5 * V, 4))
    rng, labels = np.random.default_rng(0), make_labels("integers")
    x, numbers = rng.normal(size=(N, 32)).astype(np.float32), rng.normal(size=(V, 32)).astype(np.float32)
    weight = QuantizedMatrix(quantize(numbers, kind), kind, (V, 32))
    arrays = {"x": x, "weight": weight.dequantize()}
    expected = on_table("reference", lambda *given: separate(*given, 2.0), arrays, (), {"labels": (labels, V)})
    if table.startswith("graph"):
        import ggml_bridge
        from toy.ops import graph as graph_ops

        class_ = graph_ops.CpuGraphOps if table == "graph-cpu" else graph_ops.NativeGraphOps
        raw = aligned(weight.raw.nbytes)
        raw[:] = weight.raw.reshape(-1)
        with ggml_bridge.Backend("cpu", 1) as backend:
            graph = backend.graph()
            ops, head = class_(graph), backend.mapped(raw, weight.shape, kind.lower())
            a = {"x": ops.constant(x), "weight": head, "labels": ops.integers("labels", N, V)}
            kept = {name: graph.output(tensor) for name, tensor in fused(ops, a, {}, 2.0).items()}
            graph.allocate()
            for tensor, value in ops.feeds:
                tensor.upload(value({"labels": labels}) if callable(value) else value)
            ops.compute()
            count = (labels >= 0).sum() if table == "graph-native" else 1  # its gradient is of the sum
            found = {"loss": kept["loss"].download()[0], "d_x": kept["d_x"].download() / count}
    else:
        ops = importlib.import_module(f"toy.ops.{table}")
        found = fused(ops, {"x": x, "weight": weight, "labels": labels}, {}, 2.0)
        with pytest.raises(ValueError, match="a quantised weight is frozen"):
            ops.linear_cross_entropy(x, weight, labels, None, np.zeros((V, 32), np.float32))
    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    np.testing.assert_allclose(found["d_x"], expected["d_x"], rtol=0, atol=1e-5 * np.abs(expected["d_x"]).max())


@pytest.mark.parametrize("change", ["class", "length", "dense"])
def test_labels_that_do_not_fit_change_nothing(monkeypatch, ops, change):
    set_bands(monkeypatch, BANDS)
    arrays = {name: array.astype(np.float32) for name, array in make_arrays().items()}
    labels, d_weight = make_labels("integers"), np.zeros((V, D), np.float32)
    ops.linear_cross_entropy(**arrays, labels=labels)  # these do
    wrong = {"class": np.append(labels[:-1], V), "length": labels[:-1], "dense": np.zeros((N, V + 1), np.float32)}
    with pytest.raises(ValueError, match="labels"):
        ops.linear_cross_entropy(**arrays, labels=wrong[change], d_weight=d_weight)
    assert not d_weight.any()


@pytest.mark.parametrize("untied", [False, True])
def test_a_weight_is_updated_when_every_band_has_added_to_its_gradient(monkeypatch, backend, untied):
    """A graph updates each weight as soon as its gradient is complete: the head of a model not before its last band."""
    config = dataclasses.replace(ARCHITECTURES["llama"].tiny, untied=untied)
    found = []
    for bands in (None, (3 * config.vocab_size, 3)):
        set_bands(monkeypatch, bands)
        recipe = toy.recipes.FromScratch(*backend).realize(
            config, toy.RecipeOptions(t_seq=5, t_batch=2, init_scale=5.0)
        )
        rng, adamw = np.random.default_rng(0), recipe.adamw(lr=1e-2, eps=1e-2)
        for k in range(2):
            inputs, labels = recipe.engine.batch.random(rng)
            recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
        found.append(recipe.parameters())
    for name, array in found[0].items():
        np.testing.assert_allclose(found[1][name], array, rtol=0, atol=2e-6, err_msg=name)


# -- in bytes -----------------------------------------------------------------------------------------------------------


def bytes_of_steps(recipe, backend):
    """{"step": bytes of activations and everything else that a training step makes, "evaluate": likewise}."""
    inputs, labels = recipe.engine.batch.random(np.random.default_rng(0))
    row = recipe.adamw().hp_for_step(0)
    calls = {
        "step": lambda: recipe.step(inputs, labels=labels, hp=row),
        "evaluate": lambda: recipe.evaluate(inputs, labels=labels),
    }
    recipe.step(inputs, labels=labels, hp=row, is_first=True)
    recipe.evaluate(inputs, labels=labels)
    if backend.name == "ggml":
        graphs = recipe.engine._graphs
        return {
            "step": graphs["integers"].graph.memory_bytes,
            "evaluate": graphs["forward", "integers"].graph.memory_bytes,
        }
    found = {}
    for name, call in calls.items():
        if (
            backend.name == "cython"
        ):  # the kernels' own memory, which tracemalloc does not see, is kept when it has been used
            from toy._kernels.memory import clear, idle_memory

            clear()
        tracemalloc.start()
        call()
        found[name] = tracemalloc.get_traced_memory()[1] + (idle_memory() if backend.name == "cython" else 0)
        tracemalloc.stop()
    return found


@pytest.mark.parametrize("untied", [False, True])
def test_neither_a_step_nor_an_evaluation_holds_all_logits(monkeypatch, backend, untied):
    config = toy.LlamaConfig(
        4000, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, n_layers=1, context_length=256, untied=untied
    )
    found = []
    for bands in (None, (32 * 4000, 32)):  # all logits, an eighth of them
        set_bands(monkeypatch, bands)
        recipe = toy.recipes.FromScratch(*backend).realize(config, toy.RecipeOptions(t_seq=256))
        found.append(bytes_of_steps(recipe, backend))
    for name in ("step", "evaluate"):
        assert found[0][name] - found[1][name] > 0.7 * 4 * 256 * 4000, found


# ----------------------------------------------------------------------------------------------------------------------
# blocks that are computed again
# ----------------------------------------------------------------------------------------------------------------------

KINDS = [*ARCHITECTURES, "gemma", "lora", "lora with dropout"]
GEMMA = toy.LlamaConfig(
    40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=32, n_layers=4, context_length=32, geglu=True, post_norms=True,
    qk_norm=True, sliding_window=5, window_pattern=2, attention_softcap=3.0, logit_softcap=4.0, logit_scale=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    config = toy.LlamaConfig(40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, n_layers=4, context_length=64)
    rng, shapes = np.random.default_rng(0), model_for(config).parameter_shapes(config)
    weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_gguf(path, config, weights, type="q8_0")
    with toy.GGUF.open(path) as gguf:
        yield gguf


def realize(kind, backend, gguf, keep_gradients=True, **options):
    if kind.startswith("lora"):
        options = toy.RecipeOptions(**{"t_seq": 12, "t_batch": 2} | options)
        recipe = toy.recipes.LoRA(*backend).realize(
            gguf, None, 2, options, targets=("q", "down"), dropout=0.3 * (kind != "lora"), keep_gradients=keep_gradients
        )
        rng = np.random.default_rng(3)  # B starts at zero, and then A has no gradient
        recipe.load_parameters({name: rng.normal(0, 0.3, array.shape) for name, array in recipe.parameters().items()})
        return recipe
    config = GEMMA if kind == "gemma" else dataclasses.replace(ARCHITECTURES[kind].tiny, n_layers=4)
    made = toy.recipes.ViTTiny if kind == "vit" else toy.recipes.FromScratch
    t_seq = config.n_tokens if kind == "vit" else min(12, config.context_length)
    options = toy.RecipeOptions(**{"t_seq": t_seq, "t_batch": 2, "init_scale": 5.0} | options)
    return made(*backend).realize(config, options, keep_gradients=keep_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_the_same_to_the_bit(kind, backend, gguf):
    results = []
    for recompute in (False, True):
        recipe = realize(kind, backend, gguf, recompute=recompute, accumulate=2)
        assert recipe.recompute == 3 * recompute and recipe.recompute_reason == "as asked for"
        rng, adamw = np.random.default_rng(2), recipe.adamw(lr=1e-2)
        losses = []
        for k in range(3):
            inputs, labels = recipe.engine.step_batch.random(rng)
            losses.append(recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0))
        results.append((losses, recipe.gradients(), recipe.parameters()))
    (losses, *trees), (losses_again, *trees_again) = results
    assert losses == losses_again
    for tree, tree_again in zip(trees, trees_again):
        for name, array in tree.items():
            assert array.any() and np.array_equal(array, tree_again[name]), name


def test_every_block_but_the_last_runs_its_forward_twice(gguf, monkeypatch):
    recipe = realize("transformer", ("numpy", "cpu"), gguf, recompute=True)
    calls, forward = [], recipe.engine.model.block_forward
    monkeypatch.setattr(
        recipe.engine.model, "block_forward", lambda layer, *rest: (calls.append(layer), forward(layer, *rest))[1]
    )
    inputs, labels = recipe.engine.batch.random(np.random.default_rng(0))
    recipe.step(inputs, labels=labels, hp=recipe.adamw().hp_for_step(0), is_first=True)
    assert calls == [0, 1, 2, 3, 2, 1, 0]
    calls.clear()
    recipe.evaluate(inputs, labels=labels)
    assert calls == [0, 1, 2, 3]  # nothing is kept there, and nothing made again
    for blocks, again in ((False, []), (2, [1, 0]), (9, [2, 1, 0])):
        assert realize("transformer", ("numpy", "cpu"), gguf, recompute=blocks).recompute == len(again)


def test_a_graph_repeats_no_more_than_the_blocks(gguf, kernels, monkeypatch):
    """Norms: two in a block and one at the end; a cheap result is computed twice where it was not kept, never three times."""
    from toy.ops.graph import cpu

    monkeypatch.setattr(cpu, "WORTH_COMPUTING_AGAIN", 0)
    nodes = realize("transformer", ("ggml", "cpu"), gguf, recompute=True).explain().nodes
    assert sum(node.name.startswith("rms_norm ") for node in nodes) == 2 * (2 * 4 + 1)
    # what only gives the output of a block that is made again is left out: four layers, whose last linear layer runs once
    forward, again = 4 * 6, 3 * 5
    assert sum(node.name.startswith("linear ") for node in nodes) == forward + again + 1  # and the head
    frozen = realize("lora", ("ggml", "cpu"), gguf, recompute=True).explain().nodes
    assert sum(node.name.startswith("quantized_linear ") for node in frozen) == 4 * 7 + 3 * 6 + 1


@pytest.mark.parametrize("kind", ["transformer", "gpt2", "llama", "lora"])
def test_a_step_keeps_the_inputs_of_the_blocks_alone(kind, backend, gguf, tmp_path):
    """Eight blocks in the memory of not much more than one, and their inputs."""
    rows, d, layers = 2 * 64, 32, 8
    if kind == "lora":
        config = toy.LlamaConfig(40, d_model=d, n_heads=2, n_kv_heads=1, d_ff=96, n_layers=layers, context_length=64)
        shapes, path = model_for(config).parameter_shapes(config), tmp_path / "base.gguf"
        write_gguf(path, config, {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}, type="q8_0")
    elif kind == "llama":
        config = toy.LlamaConfig(40, d_model=d, n_heads=2, n_kv_heads=1, d_ff=96, n_layers=layers, context_length=64)
    else:
        config = {"transformer": toy.TransformerConfig, "gpt2": toy.GPT2Config}[kind](40, d, 2, 96, layers, 64)
    found = []
    for recompute in (False, True):
        options = toy.RecipeOptions(t_seq=64, t_batch=2, recompute=recompute)
        if kind == "lora":
            recipe = toy.recipes.LoRA(*backend).realize(toy.GGUF.open(path), None, 2, options)
        else:
            recipe = toy.recipes.FromScratch(*backend).realize(config, options)
        found.append(bytes_of_steps(recipe, backend))
    kept, again = found
    of_block = (kept["step"] - again["step"]) / (layers - 2)  # of what a block kept, without its input
    native = backend.device == "cpu-native"
    least = memory.kept_numbers(config, backend.name != "ggml" or native) - d
    assert of_block > 0.6 * 4 * rows * least, (found, of_block / (4 * rows * least))
    assert again["evaluate"] == kept["evaluate"] or backend.name != "ggml"


@pytest.mark.parametrize("free", [10**15, 20_000, None])  # bytes
def test_it_is_chosen_where_memory_would_not_do(monkeypatch, backend, gguf, free):
    monkeypatch.setattr(base, "free_memory", lambda: free)
    recipe = realize("llama", backend, gguf)
    assert recipe.recompute == recipe.engine.model_options["recompute"] == (3 if free == 20_000 else 0)
    said = "GiB are free" if recipe.recompute else "memory enough"
    assert said in recipe.recompute_reason
    assert realize("llama", backend, gguf, recompute=False).recompute == 0


def test_no_more_blocks_are_computed_again_than_need_be(monkeypatch, gguf):
    engine = realize("llama", ("numpy", "cpu"), gguf).engine
    needed, of_a_block = (
        engine._bytes_of_a_step(),
        4 * (engine._kept_of_a_block() - engine.n_rows * engine.config.d_model),
    )
    for blocks in (1, 2):
        monkeypatch.setattr(base, "free_memory", lambda n=blocks: (needed - (n - 0.5) * of_a_block) / 0.8)
        assert realize("llama", ("numpy", "cpu"), gguf).recompute == blocks
    with pytest.raises(ValueError, match="recompute must be True, False, a number of blocks or None, got -1"):
        toy.RecipeOptions(t_seq=4, recompute=-1)


def test_the_estimate_is_of_the_size_of_what_a_graph_takes(kernels):
    """Of a step that needs more than a little memory, by the planner."""
    for device in ("cpu", "cpu-native"):
        for config in (
            toy.TransformerConfig(65, 192, 6, 768, 6, 128),
            toy.LlamaConfig(65, d_model=192, n_heads=6, n_kv_heads=2, d_ff=512, n_layers=6, context_length=128),
        ):
            recipe = toy.recipes.FromScratch("ggml", device).realize(config, toy.RecipeOptions(t_seq=128, t_batch=4))
            sizes = recipe.explain().bytes
            assert 0.8 < recipe.engine._bytes_of_a_step() / (sizes["weights"] + sizes["graph"]) < 1.3


def test_free_memory_is_less_than_there_is():
    free, there = memory.free_memory(), memory.machine_memory()
    assert free is None or 0 < free < there


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return str(path)


def test_the_choices_say_so(monkeypatch, toy_command, corpus):
    short = f"train from-scratch --corpus {corpus} --backend numpy --steps 1 --batch 1 --context 8 --sample-every 0 --dry-run"

    def line(*flags):
        code, out, _ = toy_command(*short.split(), *flags)
        assert code == 0
        return [row for row in out.splitlines() if row.startswith("recompute")]

    assert line() == []
    assert line("--recompute") == line("--recompute", "on") == ["recompute      3 of 4 blocks (as asked for)"]
    monkeypatch.setattr(base, "free_memory", lambda: 1000)
    (told,) = line()
    assert told.startswith("recompute      3 of 4 blocks (all activations would take it to ") and "GiB are free" in told
    assert line("--recompute", "off") == []
    with pytest.raises(ValueError, match="recompute must be one of auto, on, off, got 'yes'"):
        FromScratchOptions(recompute="yes")


def test_a_run_may_go_on_with_the_other(tmp_path, corpus):
    options = dict(corpus=corpus, backend="numpy", batch=1, context=8, sample_every=0, eval_batches=1, seed=1)
    for folder, change in (("a", {}), ("b", {"recompute": "on"})):
        for _ in Training(FromScratchOptions(steps=2, **options), out=tmp_path / folder).run():
            pass
        for _ in Training.resume(tmp_path / folder, steps=4, **change).run():
            pass
    a, b = (toy.load(tmp_path / folder).model.parameters for folder in "ab")
    assert all(np.array_equal(array, b[name]) for name, array in a.items())
