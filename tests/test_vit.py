"""The vision transformer: gradients, curves and graphs on every backend, what a batch of images is, an exact resume."""

import dataclasses

import numpy as np
import pytest
from image_files import write_idx
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.checks import gradcheck
from toy.files import read_checkpoint, read_events
from toy.models import model_for
from toy.models.inputs import ImageBatch
from toy.ops import reference
from toy.training import Training
from toy.training.vit_tiny import ViTTinyOptions

F64_BAR = 1e-9  # relative L2 per tensor, float64; the contract asks for 1e-6
F32_BAR = 2e-5  # relative L2 per tensor, float32

CLASSES = 5
SHAPES = {  # image_size, channels, patch_size, d_model, n_heads, d_ff, n_layers
    "small": toy.ViTConfig(6, 1, 2, 12, 3, 20, 2, CLASSES),
    "colour": toy.ViTConfig(4, 3, 2, 8, 2, 12, 1, CLASSES),
    "one-patch": toy.ViTConfig(3, 2, 3, 10, 5, 7, 3, CLASSES),
    "pixels": toy.ViTConfig(4, 1, 1, 4, 1, 5, 1, CLASSES),
    "wide": toy.ViTConfig(4, 1, 2, 72, 2, 130, 1, CLASSES),
}
SMALL = SHAPES["small"]
B = 3


def make_images(config, n=B, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, config.image_size, config.image_size, config.channels)).astype(np.float32)
    return images, rng.integers(0, config.n_classes, n)


def make_model(config, ops=reference, dtype=np.float64, seed=0):
    """A model whose every number is random."""
    model = toy.ViT(config, ops=ops, dtype=dtype)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    return model


def gradients_of(model, images, labels):
    grads = model.new_gradients()
    _, cache = model.forward(images)
    return model.backward(cache, labels, grads), grads


def relative_l2(given, expected):
    return np.linalg.norm(np.asarray(given, np.float64) - expected) / np.linalg.norm(expected)


def assert_same_gradients(given, expected, bar):
    assert list(given) == list(expected)
    errors = {name: relative_l2(given[name], wanted) for name, wanted in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= bar} == {}


def realize(backend, config=SMALL, keep_gradients=True, **options):
    options = toy.RecipeOptions(**{"t_seq": config.n_tokens, "t_batch": B, "seed": 3, **options})
    return toy.recipes.ViTTiny(*backend).realize(config, options, keep_gradients)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# against PyTorch
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, B])
def test_the_model_agrees_with_pytorch(ops, torch_models, shape, n):
    for dtype in (np.float64, np.float32) if ops is reference else (np.float32,):
        model = make_model(SHAPES[shape], ops, dtype)
        images, labels = make_images(model.config, n)
        wanted, loss, expected = torch_models.run_model("vit", model.parameters, model.config, images, labels)
        logits, _ = model.forward(images)
        given_loss, grads = gradients_of(model, images, labels)
        bar = F64_BAR if dtype is np.float64 else F32_BAR
        assert logits.shape == (n, CLASSES) and logits.dtype == dtype
        assert relative_l2(logits, wanted) <= bar
        assert given_loss == pytest.approx(loss, rel=bar)
        assert_same_gradients(dict(grads.items()), expected, bar)


@pytest.mark.parametrize("shape", ["small", "colour"])
@pytest.mark.parametrize("weights", ["initial", "random"])
def test_a_step_on_every_backend_agrees_with_pytorch(backend, torch_models, shape, weights):
    config = SHAPES[shape]
    recipe, (images, labels) = realize(backend, config), make_images(config)
    if weights == "random":
        recipe.load_parameters({name: a.astype(np.float32) for name, a in make_model(config).parameters.items()})
    before = recipe.parameters()
    logits, loss, expected = torch_models.run_model("vit", before, config, images, labels)
    assert relative_l2(recipe.logits(images), logits) <= F32_BAR
    for _ in range(2):  # the second step shows that gradients start at zero each time; lr 0 leaves the weights alone
        hp = recipe.adamw(lr=0.0).hp_for_step(0)
        assert recipe.step(images, labels=labels, hp=hp, is_first=True) == pytest.approx(loss, rel=F32_BAR)
        assert_same_gradients(recipe.gradients(), expected, F32_BAR)
    assert same(before, recipe.parameters())


@pytest.mark.parametrize("kind", ["dense", "not-counted"])
def test_other_labels_agree_with_pytorch(backend, torch_models, kind):
    images, labels = make_images(SMALL)
    if kind == "dense":
        labels = np.random.default_rng(1).dirichlet(np.ones(CLASSES), B).astype(np.float32)
        labels[1] = 0  # not counted
    else:
        labels[1] = -1
    recipe = realize(backend)
    recipe.load_parameters({name: a.astype(np.float32) for name, a in make_model(SMALL).parameters.items()})
    wanted = labels.astype(np.float64) if kind == "dense" else labels
    _, loss, expected = torch_models.run_model("vit", recipe.parameters(), SMALL, images, wanted)
    hp = recipe.adamw(lr=0.0).hp_for_step(0)
    assert recipe.evaluate(images, labels) == pytest.approx(loss, rel=F32_BAR)
    assert recipe.step(images, labels=labels, hp=hp, is_first=True) == pytest.approx(loss, rel=F32_BAR)
    assert_same_gradients(recipe.gradients(), expected, F32_BAR)


def test_the_gradient_check_notices_a_missing_residual(monkeypatch):
    """And without the mistake it is satisfied."""
    model = make_model(SMALL)
    assert all(row.ok for row in gradcheck.check_model(model, np.random.default_rng(0)))
    real = toy.ViT.block_backward
    monkeypatch.setattr(toy.ViT, "block_backward", lambda self, d_x, *rest: real(self, d_x, *rest) - d_x)
    rows = {row.gradient: row.ok for row in gradcheck.check_model(model, np.random.default_rng(0))}
    assert rows["head.weight"] and rows["output_norm.weight"]
    assert not rows["class_embd.weight"] and not rows["blk.0.ffn_up.weight"]


def test_every_parameter_gets_a_gradient_at_the_start(ops):
    model = toy.ViT(SMALL, ops=ops)
    _, grads = gradients_of(model, *make_images(SMALL, n=8))
    for name, gradient in grads.items():
        parts = np.split(gradient, 3) if "attn_qkv" in name else [gradient]
        if name.endswith("attn_qkv.bias"):
            parts = [parts[0], parts[2]]  # a key bias moves all scores of a query alike: its gradient is 0
        for part in parts:
            assert np.abs(part).reshape(len(part), -1).max(axis=1).min() > 0, name


# ----------------------------------------------------------------------------------------------------------------------
# what the model sees
# ----------------------------------------------------------------------------------------------------------------------


def test_patches_are_cut_in_the_documented_order():
    config = toy.ViTConfig(6, 2, 2, 4, 1, 4, 1, 3)
    images = np.arange(2 * 6 * 6 * 2).reshape(2, 6, 6, 2)
    inputs = ImageBatch(config, 2, config.n_tokens).check(images)
    patches = inputs["patches"].reshape(2, 3, 3, 2, 2, 2)  # image, row and column of the patch, row, column, channel
    for n, i, j, row, column, channel in np.ndindex(*patches.shape):
        assert patches[n, i, j, row, column, channel] == images[n, 2 * i + row, 2 * j + column, channel]
    assert inputs["class_ids"].tolist() == [0, 0]
    assert inputs["positions"].tolist() == [*range(10)] * 2
    assert all(array.flags.c_contiguous for array in inputs.values())


def test_one_image_is_as_good_as_in_a_batch(ops):
    model, (images, _) = make_model(SMALL, ops, np.float32), make_images(SMALL, n=4)
    together, _ = model.forward(images)
    for i in range(4):
        alone, _ = model.forward(images[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-5 * np.abs(together).max())
    assert np.abs(together[0] - together[1]).max() > 0.1  # they are not all alike
    grey, _ = model.forward(images[..., 0])
    assert np.array_equal(grey, together)  # (B, height, width) of one channel


def test_on_every_backend_an_image_does_not_see_the_others(backend):
    recipe, (images, _) = realize(backend), make_images(SMALL)
    logits = recipe.logits(images)
    assert logits.shape == (B, CLASSES) and logits.dtype == np.float32
    others = images.copy()
    others[1:] = 0.5
    changed = recipe.logits(others)
    assert np.array_equal(changed[0], logits[0])
    assert np.abs(changed[1:] - logits[1:]).max() > 1e-3


def test_patches_may_change_places_when_their_positions_do(ops):
    """What is seen is a set of patches with positions: nothing else says where a patch lay."""
    model, (images, _) = make_model(SMALL, ops, np.float32), make_images(SMALL)
    logits, _ = model.forward(images)
    moved = images.copy()
    moved[:, 0:2, 0:2], moved[:, 4:6, 2:4] = images[:, 4:6, 2:4], images[:, 0:2, 0:2]  # patches 0 and 7
    assert np.abs(model.forward(moved)[0] - logits).max() > 0.1
    positions = model.parameters.position_embd.weight
    positions[[1, 8]] = positions[[8, 1]]  # position 0 is the class token's
    np.testing.assert_allclose(model.forward(moved)[0], logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_the_first_weights_have_the_documented_spread(backend):
    config = toy.ViTConfig(16, 1, 4, 96, 4, 192, 2, 10)
    recipes = [realize(backend, config, seed=seed, init_scale=scale) for seed, scale in ((0, 1.0), (1, 1.0), (0, 2.0))]
    first, other, doubled = (recipe.parameters() for recipe in recipes)
    residual = (2 * config.n_layers) ** -0.5
    for name, array in first.items():
        if name.endswith("bias"):
            assert not array.any()
        elif array.ndim == 1:
            assert (array == 1).all()
        else:
            std = array.shape[1] ** -0.5 * (residual if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1)
            if name in ("class_embd.weight", "position_embd.weight"):
                std = 0.1
            error = 5 / array.size**0.5  # of a mean in units of std: five standard errors
            assert abs(array.mean()) < error * std and abs(array.std() / std - 1) < error, name
            assert abs(np.mean(array * other[name])) < error * std**2  # another seed, other numbers
            np.testing.assert_allclose(doubled[name], 2 * array, rtol=1e-6)
    assert same(first, realize(("numpy", "cpu"), config, seed=0).parameters())


# ----------------------------------------------------------------------------------------------------------------------
# training
# ----------------------------------------------------------------------------------------------------------------------


def batches(n, config=SMALL, seed=5):
    """Images with something to learn: one of CLASSES pictures and noise."""
    rng = np.random.default_rng(seed)
    pictures = rng.normal(size=(CLASSES, config.image_size, config.image_size, config.channels))
    for _ in range(n):
        labels = rng.integers(0, CLASSES, B)
        yield (pictures[labels] + 0.7 * rng.normal(size=pictures[labels].shape)).astype(np.float32), labels


def train(recipe, data, first=0, lr=5e-3):
    adamw = recipe.adamw(lr=lr, weight_decay=0.05)
    return [
        recipe.step(images, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
        for k, (images, labels) in enumerate(data, first)
    ]


@pytest.fixture(scope="module")
def numpy_curves():
    return {clip: train(realize(("numpy", "cpu"), grad_clip=clip), batches(100)) for clip in (None, 0.5)}


@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
def test_100_steps_are_numpys_and_the_same_twice(backend, numpy_curves, clip):
    expected = numpy_curves[clip]
    assert np.mean(expected[:10]) - np.mean(expected[-10:]) > 0.8  # it learns
    found = train(realize(backend, grad_clip=clip, keep_gradients=False), batches(100))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert train(realize(backend, grad_clip=clip, keep_gradients=False), batches(30)) == found[:30]


def test_a_run_goes_on_on_another_backend(backend):
    data = list(batches(16))
    straight = train(realize(("numpy", "cpu")), data)
    for first, second in ((backend, ("numpy", "cpu")), (("numpy", "cpu"), backend)):
        a, b = realize(first), realize(second, seed=9)
        losses = train(a, data[:8])
        b.load_parameters(a.parameters())
        b.load_optimizer_state(a.optimizer_state())
        losses += train(b, data[8:], first=8)
        np.testing.assert_allclose(losses, straight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_weight_dtype_trains_on_rounded_copies_of_f32_masters(backend, dtype):
    exact, rounded, data = realize(backend), realize(backend, weight_dtype=dtype), list(batches(20))
    assert same(exact.parameters(), rounded.parameters())  # the masters are float32
    a, b = train(exact, data), train(rounded, data)
    assert a != b and np.allclose(a, b, atol=0.1)
    masters = rounded.parameters()
    assert any(not np.array_equal(w.astype(np.float16).astype(np.float32), w) for w in masters.values())
    if dtype == "f16":
        exact.load_parameters({name: w.astype(np.float16).astype(np.float32) for name, w in masters.items()})
        np.testing.assert_allclose(exact.logits(data[0][0]), rounded.logits(data[0][0]), rtol=0, atol=1e-5)


def test_the_engines_and_recipes_of_a_vit_are_the_same(backend):
    options = toy.RecipeOptions(SMALL.n_tokens, B, seed=3)
    made = {
        "recipe": realize(backend),
        "from-scratch": toy.recipes.FromScratch(*backend).realize(SMALL, options),
        "without-options": toy.recipes.ViTTiny(*backend).realize(SMALL, t_batch=B, seed=3),
        "engine": toy.engines.ViTTinyEngine(*backend).realize(6, 1, 2, 12, 3, 20, 2, CLASSES, 3, t_batch=B),
    }
    losses = {name: train(recipe, batches(4)) for name, recipe in made.items()}
    assert all(found == losses["recipe"] for found in losses.values())
    for recipe in made.values():
        assert recipe.hp_mode == toy.AdamW.MODE_FROM_SCRATCH and recipe.arch == "vit"
        assert recipe.n_parameters == sum(array.size for array in recipe.parameters().values())


# ----------------------------------------------------------------------------------------------------------------------
# bad input
# ----------------------------------------------------------------------------------------------------------------------

HUGE = np.full((B, 6, 6, 1), 1e300)
BAD_STEPS = {
    "another-size": (lambda x, y: {"token_ids": x[:, :4, :4], "labels": y}, r"\(3, 6, 6, 1\).*got float32 \(3, 4, 4, 1\)"),
    "not-square": (lambda x, y: {"token_ids": x[:, :, :4], "labels": y}, r"\(3, 6, 4, 1\)"),
    "channels": (lambda x, y: {"token_ids": np.repeat(x, 3, axis=3), "labels": y}, r"\(3, 6, 6, 3\)"),
    "channels-first": (lambda x, y: {"token_ids": x.transpose(0, 3, 1, 2), "labels": y}, r"\(3, 1, 6, 6\)"),
    "fewer-images": (lambda x, y: {"token_ids": x[:2], "labels": y[:2]}, r"\(2, 6, 6, 1\)"),
    "one-image": (lambda x, y: {"token_ids": x[0], "labels": y}, r"\(6, 6, 1\)"),
    "flat": (lambda x, y: {"token_ids": x.reshape(B, -1), "labels": y}, r"\(3, 36\)"),
    "nan": (lambda x, y: {"token_ids": np.where(x > 0, np.nan, x), "labels": y}, "images must be finite"),
    "infinite": (lambda x, y: {"token_ids": np.where(x > 0, -np.inf, x), "labels": y}, "images must be finite"),
    "too-large": (lambda x, y: {"token_ids": HUGE, "labels": y}, "images must be finite numbers in float32"),
    "bool": (lambda x, y: {"token_ids": x > 0, "labels": y}, "images must be numbers"),
    "text": (lambda x, y: {"token_ids": x.astype(str), "labels": y}, "images must be numbers"),
    "none": (lambda x, y: {"token_ids": None, "labels": y}, "images must be numbers"),
    "positions": (lambda x, y: {"token_ids": x, "labels": y, "positions": np.arange(10)}, "leave positions out"),
    "labels-too-large": (lambda x, y: {"token_ids": x, "labels": y * 0 + CLASSES}, r"labels must lie in \[-1, 5\), got 5"),
    "labels-below": (lambda x, y: {"token_ids": x, "labels": y * 0 - 2}, r"labels must lie in \[-1, 5\), got -2"),
    "labels-huge": (lambda x, y: {"token_ids": x, "labels": y.astype(np.uint64) + np.uint64(2**63)}, "labels"),
    "labels-shape": (lambda x, y: {"token_ids": x, "labels": y[:2]}, r"shape \(3,\) \(t_batch,\), got \(2,\)"),
    "labels-column": (lambda x, y: {"token_ids": x, "labels": y[:, None]}, r"got \(3, 1\)"),
    "labels-float": (lambda x, y: {"token_ids": x, "labels": y * 1.0}, "labels must be integers"),
    "labels-none-counted": (lambda x, y: {"token_ids": x, "labels": y * 0 - 1}, "nothing to learn"),
    "no-labels": (lambda x, y: {"token_ids": x}, "labels is missing"),
    "rows-shape": (lambda x, y: {"token_ids": x, "labels": np.ones((B, CLASSES + 1))}, "labels"),
    "rows-nan": (lambda x, y: {"token_ids": x, "labels": np.full((B, CLASSES), np.nan)}, "finite"),
    "rows-negative": (lambda x, y: {"token_ids": x, "labels": -np.ones((B, CLASSES))}, "negative"),
    "rows-zero": (lambda x, y: {"token_ids": x, "labels": np.zeros((B, CLASSES))}, "nothing to learn"),
}  # fmt: skip


def state(recipe):
    moments = recipe.optimizer_state()
    everything = {"w": recipe.parameters(), "g": recipe.gradients(), "m": moments["m"], "v": moments["v"]}
    return {(kind, name): array for kind, arrays in everything.items() for name, array in arrays.items()}


def test_what_is_not_a_batch_is_refused_and_changes_nothing(backend):
    recipe, (images, labels) = realize(backend), make_images(SMALL)
    train(recipe, batches(2))
    before = state(recipe)
    hp = recipe.adamw().hp_for_step(2)
    for case, (change, message) in BAD_STEPS.items():
        with pytest.raises(ValueError, match=message) as error:
            recipe.step(**change(images, labels), hp=hp, is_first=True)
        assert "\n" not in str(error.value), case
        assert same(before, state(recipe)), case
    other = toy.AdamW.bias_corrected().hp_for_step(2)
    with pytest.raises(ValueError, match="slots 5 and 6"):
        recipe.step(images, labels=labels, hp=other, is_first=True)
    assert same(before, state(recipe))
    recipe.step(images, labels=labels, hp=hp)
    assert not same(before, state(recipe))  # the good one passes


def test_logits_and_evaluate_refuse_the_same(backend):
    recipe, (images, labels) = realize(backend), make_images(SMALL)
    good = recipe.evaluate(images, labels)
    for case, (change, message) in BAD_STEPS.items():
        arguments = change(images, labels)
        if "labels" not in arguments:
            continue
        with pytest.raises(ValueError, match=message):
            recipe.evaluate(**arguments)
        if "label" not in case and "rows" not in case:
            with pytest.raises(ValueError, match=message):
                recipe.logits(arguments["token_ids"], arguments.get("positions"))
    assert recipe.evaluate(images, labels) == good


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 6, 6, 1)), "at least one"),
        (np.zeros((0, 6, 6)), "at least one"),
        (np.zeros((6, 6)), r"\(1, 6, 6, 1\).*got float64 \(6, 6\)"),
        (np.zeros((2, 6, 6, 3)), r"\(2, 6, 6, 1\).*got float64 \(2, 6, 6, 3\)"),
        (np.zeros((2, 8, 8, 1)), r"\(2, 6, 6, 1\).*got float64 \(2, 8, 8, 1\)"),
        (np.full((2, 6, 6), np.nan), "finite"),
        (3.0, "images must be numbers"),
        (None, "images must be numbers"),
    ],
)
def test_the_models_forward_refuses_bad_images(ops, images, message):
    model = make_model(SMALL, ops, np.float32)
    assert model.forward(np.zeros((2, 6, 6)))[0].shape == (2, CLASSES)
    with pytest.raises(ValueError, match=message):
        model.forward(images)


@pytest.mark.parametrize("t_seq", [1, SMALL.n_patches, SMALL.n_tokens + 1])
def test_realize_refuses_another_number_of_tokens(backend, t_seq):
    with pytest.raises(
        ValueError, match=f"t_seq must be 10, the 9 patches of an image and the class token; got {t_seq}"
    ):
        realize(backend, t_seq=t_seq)


def test_realize_refuses_what_does_not_fit(backend):
    options = toy.RecipeOptions(SMALL.n_tokens)
    recipe = toy.recipes.ViTTiny(*backend)
    with pytest.raises(TypeError, match=r"toy\.ViTConfig, got GPT2Config"):
        recipe.realize(toy.GPT2Config(5, 8, 2, 8, 1, 10), options)
    with pytest.raises(TypeError, match=r"toy\.RecipeOptions, got dict"):
        recipe.realize(SMALL, {"t_seq": 10})
    with pytest.raises(ValueError, match="ViTConfig has no option 'untied'"):
        recipe.realize(SMALL, dataclasses.replace(options, untied=True))
    for given in ({"t_batch": 4}, {"seed": 4}):
        with pytest.raises(ValueError, match="t_batch and seed stand in opts already"):
            recipe.realize(SMALL, options, **given)
    with pytest.raises(RuntimeError, match="realize"):
        recipe.step(None)
    assert recipe.realize(SMALL, options).n_parameters > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 4}, "patch_size must divide image_size: 6 / 4 leaves 2 pixels; it could be"),
        ({"patch_size": 7}, "patch_size must divide image_size"),
        ({"n_heads": 5}, "n_heads must divide d_model"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"n_classes": 0}, "n_classes must be at least 1"),
        ({"image_size": 6.0}, "image_size must be a whole number"),
        ({"n_layers": True}, "n_layers must be a whole number"),
    ],
)
def test_a_config_refuses_what_cannot_be_built(change, message):
    assert dataclasses.replace(SMALL, patch_size=3).n_tokens == 5
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


# ----------------------------------------------------------------------------------------------------------------------
# the graphs
# ----------------------------------------------------------------------------------------------------------------------

SPELLINGS = ["cpu", "cpu-native"]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("labels", ["integers", "dense"])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 1.0}, {"weight_dtype": "f16"}], ids=["plain", "clip", "f16"])
def test_every_native_node_is_one_that_metal_runs(options, labels):
    import ggml_bridge

    recipe = realize(("ggml", "cpu-native"), keep_gradients=False, **options)
    assert ggml_bridge.metal_unsupported(recipe.engine._training(labels).graph) == []
    assert ggml_bridge.cuda_unsupported(recipe.engine._training(labels).graph) == []
    for kind in (None, labels):
        assert ggml_bridge.metal_unsupported(recipe.engine._forward(kind).graph) == []
        assert ggml_bridge.cuda_unsupported(recipe.engine._forward(kind).graph) == []
    kernels = realize(("ggml", "cpu"), keep_gradients=False, **options)
    assert ggml_bridge.metal_unsupported(kernels.engine._training(labels).graph)  # the check can find something


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("device", SPELLINGS)
def test_a_step_is_one_graph_in_one_split(device):
    explanation = realize(("ggml", device), keep_gradients=False).explain()
    assert explanation.splits == 1
    assert {node.device for node in explanation.nodes} == {explanation.device}
    kinds = explanation.counts()
    assert ("CUSTOM" in kinds) == (device == "cpu") and ("MUL_MAT" in kinds) == (device == "cpu-native")


# ----------------------------------------------------------------------------------------------------------------------
# a run
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path, backend, monkeypatch):
    monkeypatch.setattr(Training, "_draw", lambda training: None)
    return ViTTinyOptions(
        data=str(write_idx(tmp_path / "idx")), d_model=8, heads=2, layers=1, batch=7, steps=10, eval_every=4,
        weight_dtype="f32", backend=backend.name, device=backend.device,
    )  # fmt: skip


def run(training, stop_after=None):
    for event in training.run():
        if event.kind == "step" and event.step == stop_after:
            break


def checkpoint_of(folder):
    checkpoint = read_checkpoint(folder / "weights" / (folder / "weights" / "latest").read_text().strip())
    arrays = {"p": checkpoint.parameters, **checkpoint.moments}
    return checkpoint.step, {(kind, n): a.tobytes() for kind, some in arrays.items() for n, a in some.items()}


def history(folder):
    """(kind, step, loss, accuracy of a validation) of every event that has a loss."""
    events = [event for event in read_events(folder / "events.jsonl") if event["kind"] in ("step", "eval")]
    return [(event["kind"], event["step"], event["loss"], event.get("accuracy")) for event in events]


def test_four_and_six_steps_are_ten(options, tmp_path):
    run(Training(options, out=tmp_path / "whole"))
    run(Training(options, out=tmp_path / "parts"), stop_after=4)  # in the middle of an epoch: 24 images, 7 in a step
    assert checkpoint_of(tmp_path / "parts")[0] == 4
    run(Training.resume(tmp_path / "parts"))
    assert checkpoint_of(tmp_path / "parts") == checkpoint_of(tmp_path / "whole")
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    evals = [row for row in history(tmp_path / "whole") if row[0] == "eval"]
    assert [step for _, step, *_ in evals] == [0, 4, 8, 10] and all(0 <= accuracy <= 1 for *_, accuracy in evals)


def test_a_run_needs_the_same_images_again(options, tmp_path):
    run(Training(options, out=tmp_path / "run"))
    moved = (tmp_path / "idx").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no folder .*idx"):
        Training.resume(tmp_path / "run", steps=12)
    assert Training.resume(tmp_path / "run", steps=12, data=str(moved)).step == 10
    write_idx(moved, n_train=25)
    with pytest.raises(ValueError, match=r"are not the images this run was trained on .*give them with --data"):
        Training.resume(tmp_path / "run", steps=12, data=str(moved))


def test_the_model_of_a_run_is_what_was_trained(options, tmp_path):
    training = Training(options, out=tmp_path / "run")
    run(training)
    model, data = training.model(), training.start.data
    assert model_for(training.config) is type(model) is toy.ViT
    images = training.start.normalise(data.images[training.start.test])
    np.testing.assert_allclose(model.forward(images)[0], training.start.logits(), rtol=0, atol=1e-5)
    with toy.load(tmp_path / "run", backend=options.backend) as loaded:
        np.testing.assert_allclose(
            loaded.logits(data.images[training.start.test]), training.start.logits(), rtol=0, atol=1e-5
        )
