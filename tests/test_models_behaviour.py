"""What training and generation do: initial weights, AdamW, loss curves, repeatability, the key/value cache."""

import dataclasses
import functools
import math

import numpy as np
import pytest

import toy
from toy.adamw import check_row
from toy.checks import gradcheck
from toy.models import ARCHITECTURES, model_for
from toy.models.base import KeyValueCache
from toy.models.generation import generate, sample
from toy.ops import reference

V = 13
SIZES = dict(d_model=24, d_ff=40, n_layers=2, context_length=12)
HEADS = {"llama": {"n_heads": 4, "n_kv_heads": 2}}
CONFIGS = {
    arch: row.config(V, **SIZES, **HEADS.get(arch, {"n_heads": 3}))
    for arch, row in ARCHITECTURES.items()
    if row.reads_text
}
POSITION_EMBEDDING = {  # where there is one: Llama turns q and k instead
    arch: name
    for arch, config in CONFIGS.items()
    for name in model_for(config).parameter_shapes(config)
    if name.startswith("pos")
}


def resized(arch, **sizes):
    """The config of `CONFIGS` with other sizes."""
    head_dim = {"head_dim": None} if arch == "llama" else {}  # to be worked out again
    return dataclasses.replace(CONFIGS[arch], **head_dim, **sizes)


@pytest.fixture(params=CONFIGS)
def arch(request):
    return request.param


def realize(backend, config, t_seq=8, t_batch=3, keep_gradients=False, **options):
    recipe = toy.recipes.FromScratch(*backend)
    return recipe.realize(config, toy.RecipeOptions(t_seq=t_seq, t_batch=t_batch, **options), keep_gradients)


def random_batch(recipe, seed=0):
    options = recipe.options
    ids = np.random.default_rng(seed).integers(0, recipe.config.vocab_size, (options.t_batch, options.t_seq + 1))
    return ids[:, :-1], ids[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# the initial weights
# ----------------------------------------------------------------------------------------------------------------------

SIGMAS = 5  # every bound below is this many standard deviations of the estimate: about one false alarm in a million
BIG = {"vocab_size": 120, "d_model": 64, "n_heads": 4, "d_ff": 128, "n_layers": 3, "context_length": 50}


def initial_weights(arch, seed, **options):
    config = resized(arch, **BIG)
    return model_for(config).from_config(config, seed=seed, ops=reference, **options).parameters


def promised_std(name):
    into_the_residual_stream = name.endswith(("w_o", "w_ff2", "attn_output.weight", "ffn_down.weight"))
    return 0.02 / math.sqrt(2 * BIG["n_layers"]) if into_the_residual_stream else 0.02


@pytest.mark.parametrize("seed", [0, 1, 2, 1234, 2**31])
def test_initial_weights_are_normal_with_the_promised_std(arch, seed):
    for name, weight in initial_weights(arch, seed).items():
        if weight.ndim == 1:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name
            continue
        n, z = weight.size, weight.astype(np.float64) / promised_std(name)
        assert abs(z.mean()) < SIGMAS / math.sqrt(n), name
        assert abs(z.std() - 1) < SIGMAS / math.sqrt(2 * n), name
        for limit, probability in (
            (0.0, 0.5),
            (1.0, 0.158655),
            (2.0, 0.02275),
        ):  # of a standard normal beyond the limit
            for share in (np.mean(z > limit), np.mean(z < -limit)):
                assert abs(share - probability) < SIGMAS * math.sqrt(probability * (1 - probability) / n), (name, limit)
        assert len(np.unique(weight, axis=0)) == weight.shape[0], f"{name}: equal rows"
        assert len(np.unique(weight.T, axis=0)) == weight.shape[1], f"{name}: equal columns"
        for axis in (0, 1):  # the means of rows and of columns scatter as those of independent numbers
            means = z.mean(axis=axis) * math.sqrt(z.shape[axis])
            assert abs(means.std() - 1) < SIGMAS / math.sqrt(2 * means.size), (name, axis)


def test_initial_tensors_are_independent_of_each_other(arch):
    """No two tensors, and no two seeds, share their numbers (not even shifted to the same start)."""
    matrices = [
        (f"{name} (seed {seed})", weight.ravel().astype(np.float64))
        for seed in (0, 1)
        for name, weight in initial_weights(arch, seed).items()
        if weight.ndim == 2
    ]
    for i, (name, a) in enumerate(matrices):
        for other, b in matrices[:i]:
            n = min(a.size, b.size)
            assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < SIGMAS / math.sqrt(n), (name, other)


def test_initial_weights_depend_on_the_seed_and_on_nothing_else(arch):
    a, again, other = (initial_weights(arch, seed) for seed in (7, 7, 8))
    for name, weight in a.items():
        assert np.array_equal(weight, again[name]), name
        assert weight.ndim == 1 or not np.array_equal(weight, other[name]), name
    deeper = resized(arch, **(BIG | {"n_layers": 5}))
    deeper = model_for(deeper).from_config(deeper, seed=7, ops=reference).parameters
    first = next(iter(a))
    assert np.array_equal(a[first], deeper[first])


def test_init_scale_multiplies_the_matrices(arch):
    plain, scaled = initial_weights(arch, 0), initial_weights(arch, 0, init_scale=3.0)
    for name, weight in plain.items():
        np.testing.assert_allclose(scaled[name], weight * (3 if weight.ndim == 2 else 1), rtol=1e-6, err_msg=name)


def test_initial_weights_are_the_same_on_every_backend(backend, arch):
    for seed in (0, 3):
        given = realize(backend, CONFIGS[arch], seed=seed).parameters()
        model = model_for(CONFIGS[arch]).from_config(CONFIGS[arch], seed=seed, ops=reference)
        assert list(given) == list(model.parameters)
        assert all(np.array_equal(array, model.parameters[name]) for name, array in given.items())


# ----------------------------------------------------------------------------------------------------------------------
# AdamW: the row of seven numbers
# ----------------------------------------------------------------------------------------------------------------------


def test_adamw_fields_and_their_defaults():
    a = toy.AdamW()
    assert (a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.bias_correct, a.mode) == (
        0.001,
        0.9,
        0.95,
        1e-8,
        0.0,
        False,
        0,
    )
    assert (toy.AdamW.MODE_UNSET, toy.AdamW.MODE_FROM_SCRATCH, toy.AdamW.MODE_LORA) == (0, 1, 2)
    scratch, lora = toy.AdamW.for_from_scratch(), toy.AdamW.for_lora()
    assert (scratch.beta2, scratch.bias_correct, scratch.mode) == (0.95, False, 1)
    assert (lora.beta2, lora.bias_correct, lora.mode) == (0.999, True, 2)


def test_from_scratch_row_holds_the_betas_at_every_step():
    adamw = toy.AdamW.for_from_scratch(lr=0.25, weight_decay=0.5)
    expected = np.array([[0.25, 0.9, 0.95, 1e-8, 0.5, 0.9, 0.95]]).astype(np.float32)
    for row in (adamw.hp(), adamw.hp(1), adamw.hp(0), adamw.hp(1000), adamw.hp_for_step(0), adamw.hp_for_step(99)):
        assert row.shape == (1, 7)
        assert row.dtype == np.float32
        assert np.array_equal(row, expected)


@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 10**6])
def test_lora_row_holds_the_bias_corrections(step):
    adamw = toy.AdamW.for_lora(lr=0.25)
    corrections = [
        1 / (1 - 0.9**step),
        1 / (1 - 0.999**step),
    ]  # in float64; float32 would give 1000.013 for the last at 1
    expected = np.array([[0.25, 0.9, 0.999, 1e-8, 0.0, *corrections]]).astype(np.float32)
    assert np.array_equal(adamw.hp(step), expected)
    assert np.array_equal(adamw.hp_for_step(step - 1), expected)
    assert np.array_equal(adamw.hp_for_step(step - 1, lr=0.5)[0, 1:], expected[0, 1:])
    assert adamw.hp(step, lr=0.5)[0, 0] == 0.5


def test_a_row_remembers_its_mode():
    for adamw in (toy.AdamW.for_from_scratch(), toy.AdamW.for_lora()):
        row = adamw.hp(1)
        assert row.mode == adamw.mode
        assert row.copy().mode == row[0].mode == row.reshape(7).mode == adamw.mode
        assert check_row(row, adamw.mode).shape == (1, 7)
        with pytest.raises(ValueError, match=r"made by AdamW\.for_.* but this model reads"):
            check_row(row, 3 - adamw.mode)
        assert check_row(np.array(row), 3 - adamw.mode).shape == (1, 7)  # a plain array carries no mode
        assert check_row(row.ravel().tolist(), 3 - adamw.mode).shape == (1, 7)


@pytest.mark.parametrize(
    ("adamw", "step", "message"),
    [
        (toy.AdamW(), 1, r"unset.*for_from_scratch.*for_lora"),
        (toy.AdamW(mode=3), 1, r"unset.*for_from_scratch.*for_lora"),
        (toy.AdamW(mode=toy.AdamW.MODE_FROM_SCRATCH, bias_correct=True), 1, r"from_scratch but bias_correct is True"),
        (toy.AdamW(mode=toy.AdamW.MODE_LORA, bias_correct=False), 1, r"lora but bias_correct is False"),
        (toy.AdamW.for_lora(), 0, r"at least 1.*got 0"),
        (toy.AdamW.for_lora(), -3, r"at least 1.*got -3"),
        (toy.AdamW.for_lora(), None, r"at least 1.*got None"),
        (toy.AdamW.for_lora(lr=-1.0), 1, r"lr must be in"),
        (toy.AdamW.for_lora(lr=float("nan")), 1, r"lr must be in"),
        (toy.AdamW.for_lora(beta1=1.0), 1, r"beta1 must be in"),
        (toy.AdamW.for_from_scratch(beta2=-0.1), 1, r"beta2 must be in"),
        (toy.AdamW.for_from_scratch(eps=-1e-8), 1, r"eps must be in"),
        (toy.AdamW.for_from_scratch(weight_decay=float("inf")), 1, r"weight_decay must be in"),
    ],
)
def test_hp_fails_loudly(adamw, step, message):
    with pytest.raises(ValueError, match=message):
        adamw.hp(step)


def test_hp_for_step_counts_from_zero():
    for adamw in (toy.AdamW.for_lora(), toy.AdamW.for_from_scratch()):
        with pytest.raises(ValueError, match="counted from 0, got -1"):
            adamw.hp_for_step(-1)
    with pytest.raises(ValueError, match="unset"):
        toy.AdamW().hp_for_step(0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_convention_is_torch_adamw(ops, torch_models, weight_decay):
    rng = np.random.default_rng(0)
    dtype = np.float64 if ops is reference else np.float32
    weight, gradients = rng.normal(size=(7, 5)).astype(dtype), rng.normal(size=(20, 7, 5)).astype(dtype)
    adamw = toy.AdamW.for_lora(lr=2**-6, eps=1e-6, weight_decay=weight_decay)
    expected = torch_models.adamw(weight, gradients, 2**-6, adamw.beta1, adamw.beta2, adamw.eps, weight_decay)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for k, wanted in enumerate(expected):
        ops.adamw_step(weight, gradients[k], m, v, adamw.hp_for_step(k))
        # the row is float32: 1 - beta2 is then known to 3e-5
        np.testing.assert_allclose(weight, wanted, rtol=0, atol=2e-6)


def test_every_step_is_the_formula_of_its_convention(backend, arch):
    """Weights and moments after each step, from the gradients the engine reports, in five lines of float64."""
    recipe = realize(backend, CONFIGS[arch], keep_gradients=True)
    token_ids, labels = random_batch(recipe)
    adamw = recipe.adamw(lr=0.01, weight_decay=0.1, eps=1e-4)
    lora = recipe.hp_mode == toy.AdamW.MODE_LORA
    assert lora == (arch == "gpt2")
    weights = {name: array.astype(np.float64) for name, array in recipe.parameters().items()}
    m, v = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    beta1, beta2 = 0.9, (0.999 if lora else 0.95)
    for k in range(4):
        recipe.step(token_ids, None, labels, adamw.hp_for_step(k), is_first=k == 0)
        s5, s6 = (1 / (1 - beta1 ** (k + 1)), 1 / (1 - beta2 ** (k + 1))) if lora else (beta1, beta2)
        for name, g in recipe.gradients().items():
            g = g.astype(np.float64)
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            decay = 0.1 if name in recipe.decayed else 0.0
            weights[name] = weights[name] * (1 - 0.01 * decay) - 0.01 * (m[name] * s5) / (np.sqrt(v[name] * s6) + 1e-4)
        state = recipe.optimizer_state()
        for name, array in recipe.parameters().items():
            np.testing.assert_allclose(array, weights[name], rtol=0, atol=2e-6, err_msg=f"{name} after step {k}")
            np.testing.assert_allclose(state["m"][name], m[name], rtol=0, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(state["v"][name], v[name], rtol=2e-4, atol=1e-9, err_msg=name)


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def train(recipe, batches, lr):
    adamw = recipe.adamw(lr=lr)
    return [
        recipe.step(token_ids, None, labels, adamw.hp_for_step(k), is_first=k == 0)
        for k, (token_ids, labels) in enumerate(batches)
    ]


def test_overfits_one_batch(backend, arch):
    recipe = realize(backend, CONFIGS[arch])
    losses = train(recipe, [random_batch(recipe)] * 80, lr=1e-2)
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert losses[-1] < 0.05
    assert recipe.evaluate(*random_batch(recipe)) < losses[-1]


@functools.cache
def text_ids():
    """Real text as character ids: the documentation in the standard library."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in ("assignment", "binary", "class", "debugger"))
    characters = sorted(set(text))
    return np.array([characters.index(c) for c in text]), len(characters)


def text_batches(steps, t_batch, t_seq, seed=0):
    ids, _ = text_ids()
    starts = np.random.default_rng(seed).integers(0, len(ids) - t_seq - 1, (steps, t_batch))
    windows = ids[starts[:, :, None] + np.arange(t_seq + 1)]
    return [(window[:, :-1], window[:, 1:]) for window in windows]


@functools.cache
def loss_curve(backend, arch):
    config = resized(arch, vocab_size=text_ids()[1], d_model=32, n_heads=4, d_ff=64, n_layers=2, context_length=24)
    # GPT-2's std of 0.02 is made for a width of 768; here it would leave the model near a saddle, with gradients of the
    # attention weights of 1e-8, and rounding errors would choose the way out of it
    recipe = realize(backend, config, t_seq=24, t_batch=4, seed=1, init_scale=(768 / 32) ** 0.5)
    return train(recipe, text_batches(200, t_batch=4, t_seq=24), lr=3e-3)


def test_two_hundred_steps_follow_the_numpy_curve(backend, arch):
    expected = loss_curve(type(backend)("numpy", "cpu"), arch)
    given = loss_curve(backend, arch)
    assert np.mean(given[-20:]) < np.mean(given[:5]) - 1.0  # it learned something to compare
    assert np.abs(np.subtract(given, expected)).max() <= 1e-3


def test_training_follows_pytorch(backend, arch, torch_models):
    """Twenty steps of PyTorch in float64 from the same weights: its own autograd, and its own AdamW where it has ours."""
    recipe = realize(backend, CONFIGS[arch], seed=2)
    adamw = recipe.adamw(lr=1e-2, weight_decay=0.1)
    weights = {name: array.astype(np.float64) for name, array in recipe.parameters().items()}
    m, v = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for k in range(20):
        token_ids, labels = random_batch(recipe, seed=k % 4)
        row = adamw.hp_for_step(k)
        loss = recipe.step(token_ids, None, labels, row, is_first=k == 0)
        _, expected, gradients = torch_models.run_model(arch, weights, recipe.config, token_ids, labels)
        assert loss == pytest.approx(expected, abs=2e-4)
        lr, beta1, beta2, eps, weight_decay, s5, s6 = row[0].astype(np.float64)
        for name, g in gradients.items():
            m[name], v[name] = beta1 * m[name] + (1 - beta1) * g, beta2 * v[name] + (1 - beta2) * g * g
            decay = weight_decay if name in recipe.decayed else 0.0
            weights[name] = weights[name] * (1 - lr * decay) - lr * m[name] * s5 / (np.sqrt(v[name] * s6) + eps)


def test_the_same_seed_gives_the_same_bits(backend, arch):
    runs = []
    for seed in (4, 4, 5):
        recipe = realize(backend, CONFIGS[arch], seed=seed)
        losses = train(recipe, [random_batch(recipe, k) for k in range(20)], lr=1e-2)
        runs.append((losses, recipe.parameters()))
    (losses, weights), (again, weights_again), (other, _) = runs
    assert losses == again != other
    assert all(np.array_equal(array, weights_again[name]) for name, array in weights.items())


@pytest.mark.parametrize("arch", POSITION_EMBEDDING)
def test_weight_decay_shrinks_what_gets_no_gradient(backend, arch):
    """Decoupled: the row of a position that never occurs shrinks by lr * weight_decay a step, and nothing else happens."""
    recipe = realize(backend, CONFIGS[arch])
    name = POSITION_EMBEDDING[arch]
    before = recipe.parameters()[name][8:]  # t_seq is 8, the context 12
    adamw = recipe.adamw(lr=0.1, weight_decay=0.5)
    for k in range(3):
        recipe.step(*random_batch(recipe)[:1], None, random_batch(recipe)[1], adamw.hp_for_step(k), is_first=k == 0)
    np.testing.assert_allclose(recipe.parameters()[name][8:], before * (1 - 0.1 * 0.5) ** 3, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# generation
# ----------------------------------------------------------------------------------------------------------------------


def talkative_model(arch, ops, seed=0):
    """A model with an opinion: random weights of size 1, so that its probabilities are far from equal."""
    model = model_for(CONFIGS[arch]).from_config(CONFIGS[arch], ops=ops)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    return model


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 1, 5), (12,), (4, 8)])
def test_key_value_cache_gives_the_logits_of_the_whole(ops, arch, pieces):
    model = talkative_model(arch, ops)
    token_ids = np.random.default_rng(1).integers(0, V, 12)
    whole, _ = model.forward(token_ids)
    cache, parts, start = model.new_kv_cache(), [], 0
    for length in pieces:
        parts.append(model.forward(token_ids[start : start + length], kv_cache=cache)[0])
        start += length
        assert cache.length == start
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-5 * np.abs(whole).max())
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        model.forward(token_ids[:1], kv_cache=cache)
    assert cache.length == 12


def test_greedy_generation_is_the_argmax_of_the_full_forward(ops, arch):
    model = talkative_model(arch, ops)
    prompt = [3, 1, 4]
    ids = list(prompt)
    for _ in range(9):
        ids.append(int(model.forward(np.array(ids))[0][-1].argmax()))
    assert model.generate(prompt, 9, temperature=0) == ids[3:]
    assert model.generate(prompt, 9, temperature=1.0, top_k=1) == ids[3:]
    assert model.generate(prompt, 9, temperature=1.0, top_p=1e-9) == ids[3:]


def test_generation_goes_on_when_the_context_is_full(ops, arch):
    """Then the last half of the context is read again, from position 0."""
    model = talkative_model(arch, ops)
    prompt = [3, 1, 4]
    ids, window_start = list(prompt), 0
    for _ in range(30):
        if len(ids) - window_start > 12:
            window_start = len(ids) - 6
        ids.append(int(model.forward(np.array(ids[window_start:]))[0][-1].argmax()))
    assert model.generate(prompt, 30, temperature=0) == ids[3:]


def test_generation_ends_at_a_stop_token(ops, arch):
    model = talkative_model(arch, ops)
    text = list(generate(model, [3], 30, temperature=2.0, seed=3))
    for stop in {text[0], text[7], text[29]}:
        n = text.index(stop)
        stopped = generate(model, [3], 30, temperature=2.0, seed=3, stop_ids={stop, V + 1})
        assert list(stopped) == text[:n]


def test_the_last_position_alone_has_the_logits_of_the_whole(ops, arch):
    model = talkative_model(arch, ops)
    for token_ids in (np.array([3, 1, 4, 1]), np.array([[3, 1, 4], [1, 5, 9]])):
        whole, _ = model.forward(token_ids)
        last, cache = model.forward(token_ids, last_only=True)
        assert last.shape == (*token_ids.shape[:-1], 1, V) and cache is None
        np.testing.assert_allclose(last, whole[..., -1:, :], atol=2e-5 * np.abs(whole).max())


def test_a_prompt_longer_than_the_context_is_read_from_its_end(ops, arch):
    model = talkative_model(arch, ops)
    prompt = np.random.default_rng(2).integers(0, V, 40)
    first = int(model.forward(prompt[-12:])[0][-1].argmax())
    assert model.generate(prompt, 1, temperature=0) == [first]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_follow_the_probabilities(temperature):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=V)
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    n = 4000
    share = np.bincount([sample(logits, rng, temperature) for _ in range(n)], minlength=V) / n
    assert (np.abs(share - p) <= SIGMAS * np.sqrt(p * (1 - p) / n) + 1 / n).all()


def test_top_k_and_top_p_leave_the_tail_out():
    rng = np.random.default_rng(0)
    p = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    for settings, kept in (
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.84}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-300}, {1}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),  # of 0.4 : 0.25 : 0.2 the first two reach one half
    ):
        drawn = [sample(np.log(p), rng, **settings) for _ in range(400)]
        assert set(drawn) == kept, settings
        share = drawn.count(1) / 400
        wanted = 0.4 / sum(p[i] for i in kept)
        assert abs(share - wanted) <= SIGMAS * math.sqrt(wanted * (1 - wanted) / 400) + 1e-12, settings


@pytest.mark.parametrize("n", [1, 3, 7, 49])
def test_equally_likely_tokens_have_a_nucleus_too(n):
    for p in (1e-300, 0.5, 1 - 1e-16):
        drawn = sample(np.full(n, 0.3), np.random.default_rng(0), top_p=p)
        assert 0 <= drawn < n


def test_generation_repeats_with_its_seed(ops, arch):
    model = talkative_model(arch, ops)
    a, again, other = (model.generate([1], 20, temperature=2.0, seed=seed) for seed in (0, 0, 1))
    assert a == again != other
    assert model.generate([1], 0) == []
    assert all(isinstance(token, int) and 0 <= token < V for token in a)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, V], {}, f"got {V}"),
        ([-1], {}, "got -1"),
        ([1], {"temperature": -0.5}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": 0}, "top_k"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.5}, "top_p"),
    ],
)
def test_generation_refuses_bad_settings(arch, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        talkative_model(arch, reference).generate(prompt, 2, **settings)
    with pytest.raises(ValueError, match="n_tokens"):
        talkative_model(arch, reference).generate([1], -1)


def test_a_key_value_cache_holds_one_sequence(arch):
    model = talkative_model(arch, reference)
    with pytest.raises(ValueError, match="batch"):
        model.forward(np.zeros((2, 3), int), kv_cache=model.new_kv_cache())


def test_key_value_cache_keeps_earlier_rows():
    cache = KeyValueCache(2, 6)
    k = np.arange(12, dtype=np.float32).reshape(6, 2)
    for start, end in ((0, 4), (4, 6)):
        for layer in range(2):
            keys, values = cache.extend(layer, k[start:end] + layer, -k[start:end])
            assert np.array_equal(keys, k[:end] + layer)
            assert np.array_equal(values, -k[:end])
        cache.length = end
