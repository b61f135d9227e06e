"""The contract of a realized recipe, on every backend: what `step` takes and refuses, and what can be read and loaded."""

import numpy as np
import pytest

import toy

T, B, V = 8, 3, 11
CONFIGS = {
    "transformer": toy.TransformerConfig(V, d_model=12, n_heads=3, d_ff=20, n_layers=2, context_length=10),
    "gpt2": toy.GPT2Config(V, d_model=12, n_heads=3, d_ff=20, n_layers=2, context_length=10),
}


@pytest.fixture(params=CONFIGS, ids=str)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def make(backend, config):
    def make(**options):
        recipe = toy.recipes.FromScratch(*backend)
        return recipe.realize(config, toy.RecipeOptions(**{"t_seq": T, "t_batch": B, **options}), keep_gradients=True)

    return make


@pytest.fixture
def batch():
    ids = np.random.default_rng(0).integers(0, V, (B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def run(recipe, batch, steps, lr=1e-2, **fields):
    adamw = recipe.adamw(lr=lr, **fields)
    return [recipe.step(batch[0], None, batch[1], adamw.hp_for_step(k), is_first=k == 0) for k in range(steps)]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_step_returns_a_float_near_the_uniform_loss_and_learns(make, batch):
    losses = run(make(), batch, 60)
    assert type(losses[0]) is float
    assert abs(losses[0] - np.log(V)) < 0.05
    assert losses[-1] < 0.5 * losses[0]


def test_loss_is_the_one_before_the_update(make, batch):
    recipe = make()
    before = recipe.evaluate(*batch)
    assert run(recipe, batch, 1)[0] == before
    assert recipe.evaluate(*batch) < before


def test_positions_default_and_given_agree(make, batch):
    recipe, adamw = make(), toy.AdamW.for_lora()
    row = np.array(adamw.hp(1))  # a plain array is taken as it is
    losses = []
    for positions in (None, np.arange(T), np.arange(T)[::-1]):
        recipe.realize(recipe.engine.config, recipe.engine.options)
        losses.append(recipe.step(batch[0], positions, batch[1], row, is_first=True))
    assert losses[0] == losses[1] != losses[2]


def test_logits_shape_and_loss_agree(make, batch):
    recipe = make()
    logits = recipe.logits(batch[0])
    assert logits.shape == (B, T, V) and logits.dtype == np.float32
    z = logits.astype(np.float64).reshape(-1, V)
    loss = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(B * T), batch[1].ravel()])
    assert abs(loss - recipe.evaluate(*batch)) < 1e-5


def test_flat_sequences_with_batch_one(make, batch):
    recipe = make(t_batch=1)
    one = recipe.evaluate(batch[0][0], batch[1][0])
    assert one == recipe.evaluate(batch[0][:1], batch[1][:1])
    assert recipe.logits(batch[0][0]).shape == (1, T, V)


def test_dense_rows_equal_integer_labels(make, batch):
    token_ids, labels = batch[0], batch[1].copy()
    labels[0, :3] = -1
    rows = np.zeros((B * T, V), np.float32)
    counted = labels.ravel() >= 0
    rows[counted, labels.ravel()[counted]] = 1
    a, b = make(), make()
    assert abs(run(a, (token_ids, labels), 1)[0] - run(b, (token_ids, rows), 1)[0]) < 1e-6
    for name, gradient in a.gradients().items():
        np.testing.assert_allclose(gradient, b.gradients()[name], atol=1e-6, err_msg=name)


def test_is_first_zeroes_the_moments(make, batch):
    recipe = make()
    run(recipe, batch, 3)
    weights = recipe.parameters()
    row = recipe.adamw(lr=1e-2).hp_for_step(0)
    recipe.step(*[batch[0], None, batch[1]], row, is_first=False)
    kept = recipe.parameters()
    recipe.load_parameters(weights)
    recipe.step(*[batch[0], None, batch[1]], row, is_first=True)
    zeroed = recipe.parameters()
    fresh = make()
    fresh.load_parameters(weights)
    fresh.step(*[batch[0], None, batch[1]], row, is_first=True)
    assert same(zeroed, fresh.parameters())
    assert not same(zeroed, kept)


def test_state_can_be_carried_to_another_recipe(make, batch):
    a, b = make(seed=0), make(seed=1)
    run(a, batch, 3)
    b.load_parameters(a.parameters())
    b.load_optimizer_state(a.optimizer_state())
    row = a.adamw().hp_for_step(3)
    assert a.step(batch[0], None, batch[1], row, False) == b.step(batch[0], None, batch[1], row, False)
    assert same(a.parameters(), b.parameters())


def test_parameters_and_gradients_are_copies_with_the_documented_names(make, batch, config):
    recipe = make()
    run(recipe, batch, 1)
    names = list(recipe.model_class.parameter_shapes(config))
    expected = "blocks.1.w_ff2" if recipe.arch == "transformer" else "blk.1.ffn_down.bias"
    assert expected in names
    before = recipe.parameters()
    for mapping in (recipe.parameters(), recipe.gradients()):
        assert list(mapping) == names and all(a.dtype == np.float32 for a in mapping.values())
        for array in mapping.values():
            array[...] = 7
    assert same(before, recipe.parameters())
    assert recipe.n_parameters == sum(a.size for a in before.values())


def test_grad_norm_and_clip(make, batch):
    free, clipped = make(), make(grad_clip=1e-3)
    run(free, batch, 1)
    run(clipped, batch, 1, eps=1e-2)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in free.gradients().values()))
    assert abs(free.grad_norm - norm) < 1e-5 * norm
    assert clipped.grad_norm == free.grad_norm > 1e-3
    m_norm = np.sqrt(sum(np.sum(m.astype(np.float64) ** 2) for m in clipped.optimizer_state()["m"].values()))
    beta1 = clipped.adamw().beta1
    assert abs(m_norm - (1 - beta1) * 1e-3) < 1e-8  # the moment saw a gradient of length 1e-3


def test_load_parameters_is_strict_and_changes_nothing_when_it_refuses(make):
    recipe = make()
    good = recipe.parameters()
    name = next(iter(good))
    wrong_shape = {**good, name: good[name].T[:-1]}
    not_finite = {**good, name: np.full_like(good[name], np.nan)}
    too_large = {**good, name: np.full(good[name].shape, 1e300)}
    for mapping, message in (
        ({k: v for k, v in good.items() if k != name}, "missing: " + name.replace(".", r"\.")),
        ({**good, "surplus": good[name]}, "unknown: surplus"),
        (wrong_shape, "shape"),
        (not_finite, "finite"),
        (too_large, "finite"),
        ({**good, name: good[name].astype(str)}, "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.load_parameters(mapping)
    assert same(good, recipe.parameters())


BAD_STEPS = {
    "ids-shape": (lambda x, y: (x[:, :-1], None, y), "shape"),
    "ids-float": (lambda x, y: (x.astype(float), None, y), "integers"),
    "ids-bool": (lambda x, y: (x > 3, None, y), "integers"),
    "ids-too-large": (lambda x, y: (x * 0 + V, None, y), rf"\[0, {V}\)"),
    "ids-negative": (lambda x, y: (x * 0 - 1, None, y), "got -1"),
    "ids-huge-unsigned": (lambda x, y: (x.astype(np.uint64) + np.uint64(2**63), None, y), "token_ids"),
    "positions-shape": (lambda x, y: (x, np.arange(T + 1), y), "positions"),
    "positions-range": (lambda x, y: (x, np.arange(T) + 5, y), "positions"),
    "positions-float": (lambda x, y: (x, np.arange(T) * 1.0, y), "positions"),
    "labels-shape": (lambda x, y: (x, None, y[:1]), "labels"),
    "labels-too-large": (lambda x, y: (x, None, y * 0 + V), "labels"),
    "labels-below": (lambda x, y: (x, None, y * 0 - 2), "labels"),
    "labels-none-counted": (lambda x, y: (x, None, y * 0 - 1), "nothing to learn"),
    "rows-shape": (lambda x, y: (x, None, np.ones((B * T, V + 1), np.float32)), "labels"),
    "rows-nan": (lambda x, y: (x, None, np.full((B * T, V), np.nan, np.float32)), "finite"),
    "rows-negative": (lambda x, y: (x, None, -np.ones((B * T, V), np.float32)), "negative"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_refused_step_changes_nothing(make, batch, case):
    recipe = make()
    run(recipe, batch, 2)
    weights, moments, gradients = recipe.parameters(), recipe.optimizer_state(), recipe.gradients()
    change, message = BAD_STEPS[case]
    with pytest.raises(ValueError, match=message):
        recipe.step(*change(*batch), recipe.adamw().hp_for_step(2), is_first=True)
    assert same(weights, recipe.parameters()) and same(gradients, recipe.gradients())
    assert same(moments["m"], recipe.optimizer_state()["m"]) and same(moments["v"], recipe.optimizer_state()["v"])


def test_a_row_of_the_other_convention_is_refused(make, batch):
    recipe = make()
    other = toy.AdamW.for_from_scratch() if recipe.hp_mode == toy.AdamW.MODE_LORA else toy.AdamW.for_lora()
    with pytest.raises(ValueError, match=r"slots 5 and 6"):
        recipe.step(batch[0], None, batch[1], other.hp(1), is_first=True)
    assert recipe.step(batch[0], None, batch[1], np.array(other.hp(1)), is_first=True) > 0


@pytest.mark.parametrize("row", [np.zeros((1, 6)), np.full((1, 7), np.nan), np.zeros((7, 1))], ids=["6", "nan", "7x1"])
def test_a_bad_row_is_refused(make, batch, row):
    with pytest.raises(ValueError, match="hp must be"):
        make().step(batch[0], None, batch[1], row, is_first=True)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_weight_dtype_trains_on_rounded_copies_of_f32_masters(make, batch, dtype):
    exact, rounded = make(), make(weight_dtype=dtype)
    assert same(exact.parameters(), rounded.parameters())  # the masters are float32
    a, b = run(exact, batch, 20), run(rounded, batch, 20)
    assert a != b and np.allclose(a, b, atol=0.05)
    if dtype == "f16":
        halves = {name: w.astype(np.float16).astype(np.float32) for name, w in rounded.parameters().items()}
        exact.load_parameters(halves)
        np.testing.assert_allclose(exact.logits(batch[0]), rounded.logits(batch[0]), atol=1e-5)


def test_before_realize(backend):
    recipe = toy.recipes.FromScratch(*backend)
    with pytest.raises(RuntimeError, match="realize"):
        recipe.step(None, None, None, None)
    assert (recipe.backend, recipe.device) == backend


def test_realize_refuses_what_does_not_fit(make, backend, config):
    with pytest.raises(ValueError, match="context"):
        make(t_seq=11)
    with pytest.raises(ValueError, match="untied"):
        make(untied=True)
    with pytest.raises(TypeError, match="TransformerConfig"):
        toy.recipes.FromScratch(*backend).realize({"vocab_size": 3}, toy.RecipeOptions(t_seq=4))
    with pytest.raises(TypeError, match="RecipeOptions"):
        toy.recipes.FromScratch(*backend).realize(config, {"t_seq": 4})


def test_gpt2_engine_by_its_own_name(backend, batch):
    engine = toy.engines.GPT2SeqEngine(*backend)
    engine.realize(V, 12, 3, 20, 2, 10, 0, t_seq=T, t_batch=B)
    recipe = toy.recipes.FromScratch(*backend).realize(CONFIGS["gpt2"], toy.RecipeOptions(t_seq=T, t_batch=B))
    assert same(engine.parameters(), recipe.parameters())
    assert run(engine, batch, 3) == run(recipe, batch, 3)
    whole = toy.engines.GPT2SeqEngine(*backend).realize(V, 12, 3, 20, 2, 10, 0)
    assert whole.logits(np.arange(10)).shape == (1, 10, V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"d_model": 12.0}, "d_model must be a whole number"),
        ({"n_layers": True}, "n_layers"),
    ],
)
def test_configs_refuse_what_cannot_be_built(change, message):
    fields = {"vocab_size": 5, "d_model": 12, "n_heads": 3, "d_ff": 8, "n_layers": 1, "context_length": 4, **change}
    with pytest.raises(ValueError, match=message):
        toy.TransformerConfig(**fields)


@pytest.mark.parametrize(
    "change",
    [{"t_seq": 0}, {"t_batch": 0}, {"weight_dtype": "f8"}, {"seed": -1}, {"init_scale": 0}, {"grad_clip": 0.0}],
)
def test_options_refuse_what_cannot_be_built(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        toy.RecipeOptions(**{"t_seq": 4, **change})
