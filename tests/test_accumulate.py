"""Several passes that make one step (`accumulate`): the step of one large batch, in the memory of a small one. And which
parameters weight decay acts on."""

import tracemalloc

import numpy as np
import pytest

import toy
from toy.files.gguf_write import write_gguf
from toy.models import ARCHITECTURES, model_for

N, B, T = 4, 2, 6  # passes, sequences in a pass, tokens
TINY = {arch: row.tiny for arch, row in ARCHITECTURES.items()}


@pytest.fixture(params=[*TINY, "lora"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    config = toy.LlamaConfig(40, d_model=32, n_heads=2, n_kv_heads=1, d_ff=32, n_layers=2, context_length=T)
    rng, shapes = np.random.default_rng(0), model_for(config).parameter_shapes(config)
    weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_gguf(path, config, weights, type="q8_0")
    with toy.GGUF.open(path) as gguf:
        yield gguf


def realize(kind, backend, gguf, batch, accumulate=1, keep_gradients=True, **options):
    if kind == "lora":
        options = toy.RecipeOptions(t_seq=T, t_batch=batch, accumulate=accumulate, **options)
        recipe = toy.recipes.LoRA(*backend).realize(
            gguf, None, 2, options, targets=("q", "v"), keep_gradients=keep_gradients
        )
        rng = np.random.default_rng(3)  # B starts at zero, and then A has no gradient
        recipe.load_parameters({name: rng.normal(0, 0.3, array.shape) for name, array in recipe.parameters().items()})
        return recipe
    config = TINY[kind]
    made = toy.recipes.ViTTiny if kind == "vit" else toy.recipes.FromScratch
    t_seq = config.n_tokens if kind == "vit" else min(T, config.context_length)
    options = toy.RecipeOptions(t_seq=t_seq, t_batch=batch, accumulate=accumulate, init_scale=5.0, **options)
    return made(*backend).realize(config, options, keep_gradients=keep_gradients)


def batches(recipe, n, uncounted):
    """n batches of a whole step. uncounted: leave out labels, very unequally, in one pass all of them."""
    rng = np.random.default_rng(1)
    for _ in range(n):
        inputs, labels = recipe.engine.step_batch.random(rng)
        if uncounted:
            labels = labels.copy()
            flat = labels.reshape(N, -1)
            flat[1] = -1
            flat[2, 1:] = -1
            flat[3][rng.random(flat.shape[1]) < 0.4] = -1
        yield inputs, labels


def close(found, expected, bar):
    scale = np.linalg.norm(expected)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) <= bar * max(scale, 1e-12)


@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("uncounted", [False, True], ids=["all count", "unequal"])
def test_several_passes_are_the_step_of_one_batch(kind, backend, gguf, uncounted, clip):
    whole = realize(kind, backend, gguf, N * B, grad_clip=clip)
    cut = realize(kind, backend, gguf, B, N, grad_clip=clip)
    assert cut.engine.step_batch.label_shape == whole.engine.batch.label_shape
    adamw = whole.adamw(lr=0.01, weight_decay=0.1)
    for k, (inputs, labels) in enumerate(batches(whole, 3, uncounted)):
        row = adamw.hp_for_step(k)
        losses = [recipe.step(inputs, labels=labels, hp=row, is_first=k == 0) for recipe in (whole, cut)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        if clip is not None:
            assert whole.grad_norm > clip
        gradients = whole.gradients(), cut.gradients()
        assert close(np.concatenate([g.ravel() for g in gradients[1].values()]),
                     np.concatenate([g.ravel() for g in gradients[0].values()]), 3e-6 if k == 0 else 2e-5)  # fmt: skip
        cut.load_parameters(whole.parameters())  # AdamW turns rounding into steps: each step is judged by itself
        cut.load_optimizer_state(whole.optimizer_state())


def test_the_update_is_that_of_the_whole_gradient(kind, backend, gguf):
    """Without kept gradients, which is how a run trains: the weights after two steps."""
    whole = realize(kind, backend, gguf, N * B, keep_gradients=False)
    cut = realize(kind, backend, gguf, B, N, keep_gradients=False)
    adamw = whole.adamw(lr=0.01, eps=1e-2)
    for k, (inputs, labels) in enumerate(batches(whole, 2, True)):
        for recipe in (whole, cut):
            recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
    for name, array in whole.parameters().items():
        assert np.abs(cut.parameters()[name] - array).max() <= 1e-5, name


def test_rows_of_probabilities(backend, gguf):
    whole, cut = realize("gpt2", backend, gguf, N * B), realize("gpt2", backend, gguf, B, N)
    rng, classes = np.random.default_rng(2), whole.n_classes
    inputs, labels = whole.engine.batch.random(rng)
    rows = rng.random((labels.size, classes)).astype(np.float32)
    rows /= rows.sum(axis=1, keepdims=True)
    rows[5 : labels.size // N + 3] = 0.0
    losses = [
        recipe.step(inputs, labels=rows, hp=recipe.adamw().hp_for_step(0), is_first=True) for recipe in (whole, cut)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, g in whole.gradients().items():
        assert close(cut.gradients()[name], g, 1e-5), name


def test_a_small_batch_is_refused(backend, gguf):
    cut = realize("gpt2", backend, gguf, B, N)
    inputs, labels = cut.engine.step_batch.random(np.random.default_rng(0))
    row = cut.adamw().hp_for_step(0)
    cut.step(inputs, labels=labels, hp=row, is_first=True)
    with pytest.raises(ValueError, match=rf"token_ids must have shape \({N * B}, "):
        cut.step(inputs[:B], labels=labels[:B], hp=row)
    assert cut.evaluate(inputs[:B], labels[:B]) > 0  # evaluation takes the rows of a pass
    with pytest.raises(ValueError, match="accumulate must be at least 1"):
        toy.RecipeOptions(t_seq=T, accumulate=0)


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_the_memory_is_that_of_a_pass(name, request):
    if name == "cython":
        request.getfixturevalue("kernels")
    config = toy.GPT2Config(64, d_model=32, n_heads=4, d_ff=128, n_layers=4, context_length=64)

    def peak(batch, accumulate):
        recipe = toy.recipes.FromScratch(name, "cpu")
        recipe.realize(config, toy.RecipeOptions(t_seq=64, t_batch=batch, accumulate=accumulate))
        inputs, labels = recipe.engine.step_batch.random(np.random.default_rng(0))
        row = recipe.adamw().hp_for_step(0)
        recipe.step(inputs, labels=labels, hp=row, is_first=True)
        tracemalloc.start()
        recipe.step(inputs, labels=labels, hp=row)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    one = peak(2, 1)
    assert peak(2, 8) <= 1.1 * one + 100_000
    assert peak(16, 1) > 4 * one  # so that this test can fail


def test_the_graph_of_a_pass_takes_the_memory_of_a_pass(kernels):
    config = toy.GPT2Config(64, d_model=32, n_heads=4, d_ff=128, n_layers=4, context_length=64)

    def bytes_of(batch, accumulate):
        recipe = toy.recipes.FromScratch("ggml", "cpu")
        recipe.realize(config, toy.RecipeOptions(t_seq=64, t_batch=batch, accumulate=accumulate))
        return sum(recipe.explain().bytes.values()), 4 * recipe.n_parameters

    (one, weights), (cut, _), (whole, _) = bytes_of(2, 1), bytes_of(2, 8), bytes_of(16, 1)
    assert cut <= one + 2 * weights < whole / 2  # the sums, and what is scaled


# -- weight decay -------------------------------------------------------------------------------------------------------


def test_weight_decay_shrinks_matrices_and_embeddings_only(kind, backend, gguf):
    """Against the same step without it: what is decayed differs by lr * weight_decay * w, the rest not by a bit."""
    after = []
    for decay in (0.0, 0.5):
        recipe = realize(kind, backend, gguf, B)
        start, (inputs, labels) = recipe.parameters(), next(batches(realize(kind, backend, gguf, B), 1, False))
        recipe.step(inputs, labels=labels, hp=recipe.adamw(lr=0.1, weight_decay=decay).hp_for_step(0), is_first=True)
        after.append(recipe.parameters())
    assert recipe.decayed == recipe.engine.decayed == {name for name, array in start.items() if array.ndim >= 2}
    assert kind == "lora" or recipe.decayed < start.keys()
    for name, array in start.items():
        if name in recipe.decayed:
            assert np.abs(after[0][name] - after[1][name] - 0.1 * 0.5 * array).max() <= 1e-5, name
            assert np.linalg.norm(after[0][name] - after[1][name]) > 0.01 * np.linalg.norm(array)
        else:
            assert np.array_equal(after[0][name], after[1][name]), name


def test_weight_decay_in_several_passes(backend, gguf):
    whole, cut = realize("gpt2", backend, gguf, N * B), realize("gpt2", backend, gguf, B, N)
    adamw = whole.adamw(lr=0.1, weight_decay=0.5, eps=1e-2)
    inputs, labels = whole.engine.batch.random(np.random.default_rng(0))
    for recipe in (whole, cut):
        recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(0), is_first=True)
    for name, array in whole.parameters().items():
        np.testing.assert_allclose(cut.parameters()[name], array, rtol=0, atol=1e-5)
