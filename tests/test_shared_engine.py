"""Several processes that share each batch: what rank 0 sees is the engine of the whole batch. Here the ranks are threads;
tests/test_ranks.py runs them under MPI."""

import numpy as np
import pytest
from ranks_in_threads import Together
from test_accumulate import TINY, B, N, T, batches, close
from test_accumulate import gguf as gguf
from test_accumulate import kind as kind

import toy
from toy.engines.shared import DriftError

ROWS = 5  # of a pass: two ranks have 2 and 3, four have 1, 1, 1 and 2


def maker(kind, backend, gguf, accumulate=1, keep_gradients=False, batch=ROWS, **options):
    """make(ranks): a recipe of this kind, whose `ranks` are these (None: one process)."""

    def make(ranks):
        if kind == "lora":
            opts = toy.RecipeOptions(t_seq=T, t_batch=batch, accumulate=accumulate, **options)
            recipe = toy.recipes.LoRA(*backend)
            recipe.ranks = ranks
            recipe.realize(gguf, None, 2, opts, targets=("q", "v"), keep_gradients=keep_gradients)
            return recipe
        config = TINY[kind]
        recipe = (toy.recipes.ViTTiny if kind == "vit" else toy.recipes.FromScratch)(*backend)
        recipe.ranks = ranks
        t_seq = config.n_tokens if kind == "vit" else min(T, config.context_length)
        opts = toy.RecipeOptions(t_seq=t_seq, t_batch=batch, accumulate=accumulate, init_scale=5.0, **options)
        return recipe.realize(config, opts, keep_gradients=keep_gradients)

    return make


def test_dropout_is_that_of_the_whole_batch(backend, gguf):
    """Each share draws its own rows of the masks of the whole step."""
    whole_and_shared = []
    for size in (None, 2):

        def make(ranks):
            recipe = toy.recipes.LoRA(*backend)
            recipe.ranks = ranks
            opts = toy.RecipeOptions(t_seq=T, t_batch=ROWS, accumulate=2)
            return recipe.realize(gguf, None, 2, opts, targets=("q", "v"), dropout=0.5)

        def losses(recipe):
            start(recipe)
            inputs, labels = recipe.engine.step_batch.random(np.random.default_rng(1))
            rows = [recipe.adamw(lr=0.05).hp_for_step(k) for k in range(4)]
            return [recipe.step(inputs, labels=labels, hp=row, is_first=k == 0) for k, row in enumerate(rows)]

        if size is None:
            whole_and_shared.append(losses(make(None)))
        else:
            with Together(size, make) as recipe:
                whole_and_shared.append(losses(recipe))
    assert np.abs(np.subtract(*whole_and_shared)).max() <= 1e-5


def start(recipe):
    """Other weights than a recipe begins with: an adapter's B starts at zero, and then A has no gradient."""
    rng = np.random.default_rng(3)
    recipe.load_parameters({name: rng.normal(0, 0.3, array.shape) for name, array in recipe.parameters().items()})


def unequal(recipe, n, passes):
    """n batches in which some shares have many labels that count, some few, some none."""
    rng = np.random.default_rng(1)
    for _ in range(n):
        inputs, labels = recipe.engine.step_batch.random(rng)
        labels = labels.copy().reshape(passes * ROWS, -1)
        labels[rng.random(labels.shape) < 0.4] = -1
        labels[0], labels[1, 1:] = -1, -1
        labels[-1, -1] = 0
        yield inputs, labels.reshape(recipe.engine.step_batch.label_shape)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_shared_step_is_the_step_of_one_process(kind, backend, gguf, size, accumulate):
    make = maker(kind, backend, gguf, accumulate, keep_gradients=True, grad_clip=0.05)
    whole = make(None)
    with Together(size, make) as shared:
        assert shared.engine.step_batch.label_shape == whole.engine.step_batch.label_shape
        for recipe in (whole, shared):
            start(recipe)
        adamw = whole.adamw(lr=0.01, weight_decay=0.1)
        for k, (inputs, labels) in enumerate(unequal(whole, 2, accumulate)):
            losses = [r.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0) for r in (whole, shared)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-6)
            assert shared.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5) and whole.grad_norm > 0.05
            for name, gradient in whole.gradients().items():
                assert close(shared.gradients()[name], gradient, 1e-5 if k == 0 else 1e-4), name
            shared.load_parameters(whole.parameters())  # AdamW turns rounding into steps: each is judged by itself
            shared.load_optimizer_state(whole.optimizer_state())


@pytest.mark.parametrize("size", [2, 4])
def test_a_hundred_steps_have_the_same_curve(backend, size):
    """And the same ranks have it to the bit."""
    make = maker("gpt2", backend, None, accumulate=2, grad_clip=1.0)
    curves = []
    for again in range(3):
        recipe = make(None)
        rng, adamw = np.random.default_rng(5), recipe.adamw(lr=1e-3)
        data = [recipe.engine.step_batch.random(rng) for _ in range(4)]

        def train(recipe, adamw=adamw, data=data):
            rows = enumerate(data * 25)
            return [recipe.step(x, labels=y, hp=adamw.hp_for_step(k), is_first=k == 0) for k, (x, y) in rows]

        if again == 0:
            curves.append(train(recipe))
            continue
        with Together(size, make) as recipe:
            curves.append(train(recipe))
    assert np.abs(np.subtract(curves[0], curves[1])).max() <= 1e-5
    assert curves[1] == curves[2] and curves[0][0] > curves[0][-1] + 0.1


def test_evaluation_and_logits_are_those_of_the_whole_batch(kind, backend, gguf):
    make = maker(kind, backend, gguf)
    whole = make(None)
    inputs, labels = next(unequal(whole, 1, 1))
    with Together(2, make) as shared:
        for recipe in (whole, shared):
            start(recipe)
        assert shared.evaluate(inputs, labels) == pytest.approx(whole.evaluate(inputs, labels), rel=1e-6)
        np.testing.assert_allclose(shared.logits(inputs), whole.logits(inputs), rtol=1e-4, atol=1e-5)
        assert shared.n_parameters == whole.n_parameters and shared.decayed == whole.decayed


def test_rows_of_probabilities(backend):
    make = maker("gpt2", backend, None, keep_gradients=True)
    whole = make(None)
    rng = np.random.default_rng(2)
    inputs, labels = whole.engine.batch.random(rng)
    rows = rng.random((labels.size, whole.n_classes)).astype(np.float32)
    rows /= rows.sum(axis=1, keepdims=True)
    rows[: labels.size // ROWS * 2 + 3] = 0.0  # all that the first of two ranks has, and more
    row = whole.adamw().hp_for_step(0)
    with Together(2, make) as shared:
        losses = [recipe.step(inputs, labels=rows, hp=row, is_first=True) for recipe in (whole, shared)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        for name, g in whole.gradients().items():
            assert close(shared.gradients()[name], g, 1e-5), name


def test_a_wrong_batch_changes_nothing_anywhere(backend):
    make = maker("gpt2", backend, None)
    with Together(2, make) as shared:
        before = shared.parameters()
        inputs, labels = shared.engine.step_batch.random(np.random.default_rng(0))
        row = shared.adamw().hp_for_step(0)
        for wrong in (inputs[:2], inputs + 10_000):
            with pytest.raises(ValueError, match="token_ids must"):
                shared.step(wrong, labels=labels, hp=row, is_first=True)
        with pytest.raises(ValueError, match="names do not match"):
            shared.load_parameters({"x": np.zeros(3)})
        for name, array in shared.parameters().items():
            assert np.array_equal(array, before[name])
        shared.step(inputs, labels=labels, hp=row, is_first=True)
        assert any((array != before[name]).any() for name, array in shared.parameters().items())


def test_a_batch_smaller_than_the_ranks_is_refused(backend):
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 4 ranks: give a batch of at least 4"):
        Together(4, maker("gpt2", backend, None, batch=3))


def test_weights_that_drift_apart_are_noticed(backend):
    make = maker("gpt2", backend, None)
    for noticed_by in ("step", "parameters"):
        together = Together(3, make)
        with together as shared:
            inputs, labels = shared.engine.step_batch.random(np.random.default_rng(0))
            row = shared.adamw().hp_for_step(0)
            shared.step(inputs, labels=labels, hp=row, is_first=True)
            shared.parameters()  # all ranks are done with the step then
            own = together.recipes[2].engine.own
            if noticed_by == "step":
                together.recipes[2].engine.grad_norm += 1e-6
            else:
                own.load_parameters({name: array * np.float32(1.001) for name, array in own.parameters().items()})
            with pytest.raises(DriftError, match=r"rank 2 on host h2 .* than rank 0 on host h0"):
                shared.step(inputs, labels=labels, hp=row) if noticed_by == "step" else shared.parameters()
            assert together.ranks[0].broken
        assert len(together.errors) == 2


def test_the_helpers_of_the_other_file_are_what_is_tested(gguf, backend):
    """`batches` cuts labels out of whole passes, which a rank must bear as well."""
    make = maker("gpt2", backend, gguf, accumulate=N, batch=B)
    whole = make(None)
    with Together(2, make) as shared:
        for k, (inputs, labels) in enumerate(batches(whole, 2, True)):
            row = whole.adamw(eps=1e-2).hp_for_step(k)
            losses = [recipe.step(inputs, labels=labels, hp=row, is_first=k == 0) for recipe in (whole, shared)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)
