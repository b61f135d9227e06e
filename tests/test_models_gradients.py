"""The gradients of whole models: PyTorch twins, central differences of the loss, and what `Gradients` promises."""

import numpy as np
import pytest

import toy
from toy.checks import gradcheck
from toy.models import ARCHITECTURES, ParameterTree, model_for
from toy.ops import reference

F64_BAR = 1e-9  # relative L2 per tensor, float64; the contract asks for 1e-6
F32_BAR = 2e-5  # relative L2 per tensor, float32

V, CONTEXT = 13, 9
SHAPES = {
    "small": {"d_model": 12, "n_heads": 3, "d_ff": 20, "n_layers": 2},
    "odd": {"d_model": 15, "n_heads": 5, "d_ff": 17, "n_layers": 3},
    "narrow": {"d_model": 4, "n_heads": 1, "d_ff": 5, "n_layers": 1},
    "wide": {"d_model": 72, "n_heads": 2, "d_ff": 130, "n_layers": 1},
}
CONFIG_TYPES = {name: row.config for name, row in ARCHITECTURES.items() if row.reads_text}
LLAMA_SHAPES = {  # what only Llama has
    "small": {"n_kv_heads": 1},
    "odd": {"n_kv_heads": 5, "head_dim": 4, "untied": True},
    "narrow": {"n_kv_heads": 1, "qkv_bias": True, "rope_base": 100.0},
    "wide": {"n_kv_heads": 1, "untied": True, "qkv_bias": True, "rms_eps": 1e-2},
}
POSITION_EMBEDDING = {  # where there is one: Llama turns q and k instead
    arch: name
    for arch in CONFIG_TYPES
    for name in ARCHITECTURES[arch].model.parameter_shapes(ARCHITECTURES[arch].tiny)
    if name.startswith("pos")
}


@pytest.fixture(params=CONFIG_TYPES)
def arch(request):
    return request.param


def make_config(arch, shape="small"):
    extra = LLAMA_SHAPES[shape] if arch == "llama" else {}
    return CONFIG_TYPES[arch](vocab_size=V, context_length=CONTEXT, **SHAPES[shape], **extra)


def make_model(arch, ops=reference, dtype=np.float64, shape="small", seed=0):
    """A model whose every number is random: see `gradcheck.random_parameters`."""
    config = make_config(arch, shape)
    model = model_for(config).from_config(config, ops=ops, dtype=dtype)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    return model


def make_batch(batch=2, t_seq=7, seed=0):
    """Token ids and labels, some of them not counted (when there is more than one)."""
    rng = np.random.default_rng(seed)
    token_ids, labels = rng.integers(0, V, (2, batch, t_seq))
    labels[:, 2:3] = labels[-1, 4:5] = -1
    return token_ids, labels


def gradients_of(model, token_ids, labels):
    grads = model.new_gradients()
    _, cache = model.forward(token_ids)
    loss = model.backward(cache, labels, grads)
    return loss, grads


def relative_l2(given, expected):
    return np.linalg.norm(np.asarray(given, np.float64) - expected) / np.linalg.norm(expected)


def assert_same_gradients(given, expected, bar):
    assert list(given) == list(expected)
    errors = {name: relative_l2(given[name], wanted) for name, wanted in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= bar} == {}


# ----------------------------------------------------------------------------------------------------------------------
# against PyTorch
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_models_agree_with_pytorch(ops, torch_models, arch, shape):
    for dtype in (np.float64, np.float32) if ops is reference else (np.float32,):
        model = make_model(arch, ops, dtype, shape)
        for token_ids, labels in (make_batch(), make_batch(batch=3, t_seq=CONTEXT, seed=1), make_batch(1, 1, seed=2)):
            logits, loss, expected = torch_models.run_model(arch, model.parameters, model.config, token_ids, labels)
            given_logits, _ = model.forward(token_ids)
            given_loss, grads = gradients_of(model, token_ids, labels)
            bar = F64_BAR if dtype is np.float64 else F32_BAR
            assert given_logits.shape == (*token_ids.shape, V)
            assert relative_l2(given_logits.reshape(logits.shape), logits) <= bar
            assert given_loss == pytest.approx(loss, rel=bar)
            if token_ids.size == 1:  # one key: nothing to choose from, so no gradient reaches the queries and keys
                expected = {name: g for name, g in expected.items() if np.abs(g).max() > 1e-9}
                grads = {name: grads[name] for name in expected}
            assert_same_gradients(dict(grads.items()), expected, bar)


def test_adapters_agree_with_pytorch(ops, torch_models):
    """LoRA beside frozen weights: only the adapters have gradients, and they are those of the whole model."""
    dtype = np.float64 if ops is reference else np.float32
    config, (token_ids, labels) = make_config("llama"), make_batch()
    shapes = toy.Llama.parameter_shapes(config)
    adapters = {}
    for name in ("blk.0.attn_q", "blk.1.attn_k", "blk.1.attn_output", "blk.0.ffn_gate", "blk.1.ffn_down"):
        d_out, d_in = shapes[f"{name}.weight"]
        adapters |= {f"{name}.lora_a": (3, d_in), f"{name}.lora_b": (d_out, 3)}
    tree = ParameterTree.zeros(shapes | adapters, dtype)
    gradcheck.random_parameters(tree, np.random.default_rng(0))
    scale = 0.75
    model = toy.Llama(config, ops=ops, parameters=tree, lora_scale=scale)
    scaled = {name: array * (scale if name.endswith("lora_b") else 1.0) for name, array in tree.items()}
    logits, loss, expected = torch_models.run_model("llama", scaled, config, token_ids, labels)
    expected = {name: g * (scale if name.endswith("lora_b") else 1.0) for name, g in expected.items()}
    bar = F64_BAR if dtype is np.float64 else F32_BAR
    given_loss, grads = gradients_of(model, token_ids, labels)
    assert given_loss == pytest.approx(loss, rel=bar)
    assert relative_l2(model.forward(token_ids)[0].reshape(logits.shape), logits) <= bar
    assert_same_gradients(dict(grads.items()), expected, bar)
    frozen = ParameterTree({name: g if "lora" in name else None for name, g in model.new_gradients().items()})
    _, (rows, cache) = model.forward(token_ids)
    _, loss_cache = ops.cross_entropy(rows, labels.ravel())
    model.backward_rows(ops.cross_entropy_backward(loss_cache), cache, frozen)
    for name in adapters:
        assert np.array_equal(frozen[name], grads[name]), name


def test_an_adapter_that_starts_at_zero_changes_nothing(ops):
    config, (token_ids, labels) = make_config("llama"), make_batch()
    plain = make_model("llama", ops, np.float32)
    adapters = {"blk.0.attn_q.lora_a": (2, 12), "blk.0.attn_q.lora_b": (12, 2)}
    tree = ParameterTree.zeros(toy.Llama.parameter_shapes(config) | adapters)
    for name, array in plain.parameters.items():
        tree[name][...] = array
    tree["blk.0.attn_q.lora_a"][...] = np.random.default_rng(0).normal(size=(2, 12))
    model = toy.Llama(config, ops=ops, parameters=tree, lora_scale=2.0)
    assert np.array_equal(model.forward(token_ids)[0], plain.forward(token_ids)[0])
    _, grads = gradients_of(model, token_ids, labels)
    assert grads["blk.0.attn_q.lora_b"].any()
    assert not grads["blk.0.attn_q.lora_a"].any()  # B = 0 hides A until B has moved


def test_dense_labels_agree_with_pytorch(ops, torch_models, arch):
    dtype = np.float64 if ops is reference else np.float32
    model, (token_ids, _) = make_model(arch, ops, dtype), make_batch()
    rows = np.random.default_rng(1).dirichlet(np.ones(V), token_ids.size).astype(dtype)
    rows[4] = 0  # not counted
    _, loss, expected = torch_models.run_model(arch, model.parameters, model.config, token_ids, rows.astype(np.float64))
    given_loss, grads = gradients_of(model, token_ids, rows)
    bar = F64_BAR if dtype is np.float64 else F32_BAR
    assert given_loss == pytest.approx(loss, rel=bar)
    assert_same_gradients(dict(grads.items()), expected, bar)


@pytest.mark.parametrize("weights", ["initial", "random"])
def test_recipes_agree_with_pytorch(backend, torch_models, arch, weights):
    """The gradients a training step really used, on every backend."""
    config, (token_ids, labels) = make_config(arch), make_batch()
    recipe = toy.recipes.FromScratch(*backend)
    recipe.realize(config, toy.RecipeOptions(t_seq=7, t_batch=2, seed=3), keep_gradients=True)
    if weights == "random":
        recipe.load_parameters({name: array.astype(np.float32) for name, array in make_model(arch).parameters.items()})
    before = recipe.parameters()
    logits, loss, expected = torch_models.run_model(arch, before, config, token_ids, labels)
    assert relative_l2(recipe.logits(token_ids).reshape(logits.shape), logits) <= F32_BAR
    for _ in range(2):  # the second step shows that gradients start at zero each time; lr 0 leaves the weights alone
        hp = recipe.adamw(lr=0.0).hp_for_step(0)
        assert recipe.step(token_ids, None, labels, hp, is_first=True) == pytest.approx(loss, rel=F32_BAR)
        assert_same_gradients(recipe.gradients(), expected, F32_BAR)
    for name, array in recipe.parameters().items():
        assert np.array_equal(array, before[name]), name


# ----------------------------------------------------------------------------------------------------------------------
# against central differences, through the loss
# ----------------------------------------------------------------------------------------------------------------------


def test_backward_is_the_derivative_of_the_loss(arch):
    rng = np.random.default_rng(0)
    model, (token_ids, labels) = make_model(arch), make_batch()
    loss, grads = gradients_of(model, token_ids, labels)
    assert loss == grads.loss
    cotangent = -np.eye(V + 1)[labels.ravel()][:, :V] / np.sum(
        labels >= 0
    )  # of log p; a label of -1 gives a row of zeros

    def log_probabilities(_):
        logits = model.forward(token_ids)[0].reshape(-1, V)
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    assert loss == pytest.approx(float((cotangent * log_probabilities(None)).sum()), rel=1e-12)
    for name, weight in model.parameters.items():
        chosen = rng.choice(weight.size, min(4, weight.size), replace=False)
        measured = gradcheck.central_difference(log_probabilities, weight, cotangent, chosen)
        error = gradcheck.relative_error(grads[name].ravel()[chosen], measured, scale=np.abs(grads[name]).max())
        assert error <= gradcheck.DERIVATIVE_BAR, name


def test_the_model_check_notices_a_missing_residual(arch, monkeypatch):
    """A block that forgets the gradient of its residual path fails in the parameters below it."""
    model = make_model(arch)
    real = type(model).block_backward

    def block_backward(self, d_x, cache, grads):
        return real(self, d_x, cache, grads) - d_x

    monkeypatch.setattr(type(model), "block_backward", block_backward)
    rows = {row.gradient: row.ok for row in gradcheck.check_model(model, np.random.default_rng(0))}
    final = "norm_final_gamma" if arch == "transformer" else "output_norm.weight"
    embedding = next(iter(model.parameters))
    assert rows[final]
    assert not rows[embedding]


# ----------------------------------------------------------------------------------------------------------------------
# what Gradients promises
# ----------------------------------------------------------------------------------------------------------------------


def test_gradients_mirror_the_parameters_and_start_at_zero():
    model = toy.TransformerLM(V, 12, 20, 3, 2, CONTEXT)
    grads = toy.Gradients(V, 12, 20, 3, 4, 2, CONTEXT)
    assert {name: g.shape for name, g in grads.items()} == {name: p.shape for name, p in model.parameters.items()}
    assert not any(g.any() for _, g in grads.items())
    assert grads.loss == 0.0
    assert grads.token_embed.shape == (V, 12)
    assert grads.pos_embed.shape == (CONTEXT, 12)
    assert grads.norm_final_gamma.shape == (12,)
    assert len(grads.blocks) == 2
    for block in grads.blocks:
        shapes = {
            name: getattr(block, name).shape for name in ("norm1_gamma", "norm2_gamma", "w_q", "w_k", "w_v", "w_o")
        }
        assert shapes == {"norm1_gamma": (12,), "norm2_gamma": (12,)} | dict.fromkeys(
            ("w_q", "w_k", "w_v", "w_o"), (12, 12)
        )
        assert (block.w_ff1.shape, block.w_ff2.shape) == ((20, 12), (12, 20))
        assert not any(getattr(block, name).any() for name in ("norm1_gamma", "w_q", "w_ff1"))


def test_attributes_and_names_are_the_same_arrays():
    grads = toy.Gradients(V, 12, 20, 3, 4, 2, CONTEXT)
    assert grads["blocks.1.w_q"] is grads.blocks[1].w_q
    grads.blocks[1].w_q += 2
    assert (grads["blocks.1.w_q"] == 2).all()
    assert grads.flat.sum() == 2 * 144
    assert not grads.blocks[0].w_q.any()
    grads.blocks[1].w_q = np.ones((12, 12))  # an assignment copies into the array
    assert (grads["blocks.1.w_q"] == 1).all()
    with pytest.raises(ValueError, match=r"\(12, 12\).*\(3, 12\)"):
        grads.blocks[1].w_q = np.ones((3, 12))
    with pytest.raises(AttributeError, match="w_z"):
        grads.blocks[1].w_z = np.ones((12, 12))


def test_two_backward_calls_give_twice_the_gradient_and_loss(ops, arch):
    model = make_model(arch, ops, np.float32)
    batches = make_batch(), make_batch(seed=5)
    (loss_a, a), (loss_b, b) = (gradients_of(model, *batch) for batch in batches)
    grads = model.new_gradients()
    for token_ids, labels in (batches[0], batches[0], batches[1]):
        _, cache = model.forward(token_ids)
        returned = model.backward(cache, labels, grads)
    assert returned == loss_b  # its own loss, not the sum
    assert grads.loss == pytest.approx(2 * loss_a + loss_b, rel=1e-12)
    for name, total in grads.items():
        wanted = 2 * a[name] + b[name]
        np.testing.assert_allclose(total, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_fill_zero_starts_anew(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch()
    loss, grads = gradients_of(model, token_ids, labels)
    once = grads.copies()
    grads.fill_zero()
    assert grads.loss == 0.0
    assert not any(g.any() for _, g in grads.items())
    _, cache = model.forward(token_ids)
    assert model.backward(cache, labels, grads) == loss
    for name, array in grads.items():
        assert np.array_equal(array, once[name]), name


def test_backward_can_be_repeated_on_one_cache(ops, arch):
    """The cache is read only; with release_cache it is given up, and the gradient is the same."""
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch()
    _, cache = model.forward(token_ids)
    grads = [model.new_gradients() for _ in range(3)]
    losses = [model.backward(cache, labels, g, release_cache=g is grads[2]) for g in grads]
    assert losses[0] == losses[1] == losses[2]
    for g in grads[1:]:
        assert all(np.array_equal(g[name], grads[0][name]) for name in g)


def test_every_parameter_gets_a_gradient(ops, arch):
    """At the initial weights, where training starts: no tensor and no part of a fused one is left out."""
    config = make_config(arch)
    model = model_for(config).from_config(config, ops=ops)
    token_ids = np.arange(CONTEXT)[None] % V
    _, grads = gradients_of(model, token_ids, (token_ids + 1) % V)
    for name, gradient in grads.items():
        parts = np.split(gradient, 3) if "attn_qkv" in name else [gradient]
        if name.endswith("attn_qkv.bias"):
            parts = [parts[0], parts[2]]  # a key bias moves all scores of a query alike: its gradient is 0
        for part in parts:
            rows = np.abs(part).reshape(len(part), -1).max(axis=1)
            assert (rows > 0).all(), name


@pytest.mark.parametrize("arch", POSITION_EMBEDDING)
def test_tied_embedding_has_one_gradient_with_both_contributions(arch):
    model = make_model(arch)
    token_ids, labels = np.array([[4, 1, 7, 2]]), np.array([[1, 7, 2, 0]])
    logits, (rows, cache) = model.forward(token_ids)
    grads = model.new_gradients()
    model.backward((rows, cache), labels, grads)
    _, loss_cache = reference.cross_entropy(rows, labels.ravel())
    unembedding = reference.cross_entropy_backward(loss_cache).T @ cache.unembed.linear.x  # (V, D)
    total, position = grads[next(iter(grads))], grads[POSITION_EMBEDDING[arch]]
    lookup = np.zeros_like(total)
    lookup[token_ids[0]] = position[:4]  # token and position embedding are added, so their gradients are the same rows
    assert np.abs(lookup).max() > 1e-3 < np.abs(unembedding).max()
    np.testing.assert_allclose(total, lookup + unembedding, atol=1e-12)
    assert logits.shape == (1, 4, V)


@pytest.mark.parametrize("arch", POSITION_EMBEDDING)
def test_unused_positions_get_no_gradient(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch(t_seq=5)
    _, grads = gradients_of(model, token_ids, labels)
    position = grads[POSITION_EMBEDDING[arch]]
    assert not position[5:].any()
    assert position[:5].any(axis=1).all()


# ----------------------------------------------------------------------------------------------------------------------
# who influences whom
# ----------------------------------------------------------------------------------------------------------------------


def test_a_later_token_changes_no_earlier_logit(ops, arch):
    model, (token_ids, _) = make_model(arch, ops, np.float32), make_batch()
    logits, _ = model.forward(token_ids)
    for changed in range(7):
        others = token_ids.copy()
        others[0, changed] = (others[0, changed] + 1) % V
        given, _ = model.forward(others)
        assert np.array_equal(given[0, :changed], logits[0, :changed])
        assert np.array_equal(given[1], logits[1])  # nor anything in another sequence
        assert not np.array_equal(given[0, changed], logits[0, changed])
        if changed < 6:
            assert not np.allclose(given[0, -1], logits[0, -1], atol=1e-4)  # the last token sees all of them


@pytest.mark.parametrize("arch", POSITION_EMBEDDING)
def test_the_loss_at_a_position_gives_no_gradient_to_later_ones(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch(batch=1)
    for counted in range(7):
        only = np.full_like(labels, -1)
        only[0, counted] = 3
        _, grads = gradients_of(model, token_ids, only)
        position = grads[POSITION_EMBEDDING[arch]]
        assert not position[counted + 1 :].any()
        assert position[: counted + 1].any(axis=1).all()


def test_ignored_labels_give_no_gradient(ops, arch):
    """A sequence without a counted label is as good as absent."""
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch(batch=3)
    labels[1] = -1
    loss, grads = gradients_of(model, token_ids, labels)
    without_loss, without = gradients_of(model, token_ids[[0, 2]], labels[[0, 2]])
    assert loss == pytest.approx(without_loss, rel=1e-6)
    for name, gradient in grads.items():
        np.testing.assert_allclose(
            gradient, without[name], rtol=0, atol=1e-5 * np.abs(without[name]).max(), err_msg=name
        )


def test_nothing_counted_gives_loss_zero_and_no_gradient(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch()
    loss, grads = gradients_of(model, token_ids, np.full_like(labels, -1))
    assert loss == grads.loss == 0.0
    assert not any(gradient.any() for _, gradient in grads.items())


def test_a_batch_of_two_is_the_mean_of_two_batches_of_one(ops, arch):
    model = make_model(arch, ops, np.float32)
    token_ids, labels = np.random.default_rng(3).integers(0, V, (2, 2, 7))
    labels[:, 1] = -1  # the same number counted in both
    loss, grads = gradients_of(model, token_ids, labels)
    singles = [gradients_of(model, token_ids[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert loss == pytest.approx((singles[0][0] + singles[1][0]) / 2, rel=1e-6)
    for name, gradient in grads.items():
        wanted = (singles[0][1][name] + singles[1][1][name]) / 2
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_flat_and_batched_token_ids_agree(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch(batch=1)
    logits, _ = model.forward(token_ids)
    flat, _ = model.forward(token_ids[0])
    assert flat.shape == (7, V)
    assert np.array_equal(flat, logits[0])
    loss, grads = gradients_of(model, token_ids[0], labels[0])
    batched_loss, batched = gradients_of(model, token_ids, labels)
    assert loss == batched_loss
    assert all(np.array_equal(grads[name], batched[name]) for name in grads)


@pytest.mark.parametrize("arch", POSITION_EMBEDDING)
def test_positions_choose_the_rows_of_the_position_embedding(ops, arch):
    model, (token_ids, labels) = make_model(arch, ops, np.float32), make_batch(t_seq=3)
    labels[:, -1] = 0  # the last position counts
    positions = np.array([6, 0, 4])
    logits, cache = model.forward(token_ids, positions)
    assert not np.allclose(logits, model.forward(token_ids)[0], atol=1e-3)
    grads = model.new_gradients()
    model.backward(cache, labels, grads)
    gradient = grads[POSITION_EMBEDDING[arch]]
    assert sorted(np.flatnonzero(gradient.any(axis=1))) == [0, 4, 6]


BAD_FORWARDS = {
    "ids-too-large": (np.full((1, 3), V), rf"\[0, {V}\), got {V}"),
    "ids-negative": (np.full((1, 3), -1), "got -1"),
    "ids-float": (np.zeros((1, 3)), "integers"),
    "ids-3d": (np.zeros((1, 1, 3), int), "token_ids"),
    "ids-empty": (np.zeros((1, 0), int), "token_ids"),
    "ids-too-long": (np.zeros((1, CONTEXT + 1), int), f"context of {CONTEXT}"),
}


@pytest.mark.parametrize("case", BAD_FORWARDS)
def test_forward_refuses_bad_token_ids(ops, arch, case):
    token_ids, message = BAD_FORWARDS[case]
    with pytest.raises(ValueError, match=message):
        make_model(arch, ops, np.float32).forward(token_ids)


@pytest.mark.parametrize("positions", [[0, 1], [0, 1, CONTEXT], [-1, 0, 1]])
def test_forward_refuses_bad_positions(ops, arch, positions):
    with pytest.raises(ValueError, match="positions"):
        make_model(arch, ops, np.float32).forward(np.zeros((1, 3), int), np.array(positions))


@pytest.mark.parametrize(
    "labels", [np.full((2, 7), V), np.full((2, 7), -2), np.zeros((2, 6), int), np.zeros((14, V + 1))]
)
def test_backward_refuses_bad_labels_and_adds_nothing(ops, arch, labels):
    model, (token_ids, _) = make_model(arch, ops, np.float32), make_batch()
    _, cache = model.forward(token_ids)
    grads = model.new_gradients()
    with pytest.raises(ValueError, match="labels"):
        model.backward(cache, labels, grads)
    assert not any(gradient.any() for _, gradient in grads.items())
    assert grads.loss == 0.0
