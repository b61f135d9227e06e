"""A ggml device other than the CPU, named by TOY_TEST_DEVICE ("vulkan", "metal"): every GPU path but the driver itself.

CI runs this on Debian's software Vulkan device; `toy selftest --device NAME` is the same comparison for users.
"""

import os

import numpy as np
import pytest

import toy
from toy.files.gguf_write import write_gguf
from toy.models import ARCHITECTURES
from toy.models.generation import generate
from toy.trained import read_trained
from toy.trained.export import export_model
from toy.trained.generator import generator

DEVICE = os.environ.get("TOY_TEST_DEVICE", "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="TOY_TEST_DEVICE names no device")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=str)
def runs(request):
    """The same recipe on numpy and on the device, after 200 steps: (numpy's losses, the device's, the device's recipe)."""
    config = ARCHITECTURES[request.param].small
    losses, recipe = [], None
    for backend, device in (("numpy", "cpu"), ("ggml", DEVICE)):
        recipe = toy.recipes.FromScratch(backend=backend, device=device)
        recipe.realize(config, toy.RecipeOptions(t_seq=config.context_length, t_batch=2, seed=0, grad_clip=1.0))
        adamw, (inputs, labels) = recipe.adamw(lr=1e-3), recipe.engine.batch.random(np.random.default_rng(0))
        steps = range(200)
        losses.append([recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0) for k in steps])
    yield *losses, recipe
    recipe.close()


def test_the_loss_curve_is_numpys(runs):
    expected, found, _ = runs
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_everything_runs_and_stays_on_the_device(runs):
    *_, recipe = runs
    explanation = recipe.explain()
    assert explanation.splits == 1
    assert {node.device for node in explanation.nodes} == {explanation.device} != {"CPU"}


def test_weights_go_to_the_device_and_come_back(runs):
    *_, recipe = runs
    weights = recipe.parameters()
    recipe.load_parameters(weights)
    again = recipe.parameters()
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


def test_evaluation_logits_and_dense_labels(runs):
    *_, recipe = runs
    batch = recipe.engine.batch
    inputs, labels = batch.random(np.random.default_rng(1))
    labels = labels.copy()
    labels.ravel()[0] = -1
    rows = np.zeros((labels.size, batch.n_classes), np.float32)
    counted = labels.ravel() >= 0
    rows[counted, labels.ravel()[counted]] = 1
    z = recipe.logits(inputs).reshape(-1, batch.n_classes).astype(np.float64)
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels.ravel()]
    assert abs(recipe.evaluate(inputs, labels) - losses[counted].mean()) < 1e-3
    assert abs(recipe.evaluate(inputs, rows) - losses[counted].mean()) < 1e-3


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def lora_runs(request, tmp_path_factory):
    """LoRA on a base of this type, on numpy and on the device: (numpy's losses, the device's, the device's recipe)."""
    config = toy.LlamaConfig(96, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, n_layers=2, context_length=16)
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_gguf(path, config, toy.Llama(config, seed=1, init_scale=4.0).parameters, type=request.param)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.context_length + 1))
    losses, recipe = [], None
    with toy.GGUF.open(path) as gguf:
        for backend, device in (("numpy", "cpu"), ("ggml", DEVICE)):
            recipe = toy.recipes.LoRA(backend=backend, device=device)
            recipe.realize(gguf, None, 4, toy.RecipeOptions(t_seq=16, t_batch=2), targets=("q", "v", "down"))
            adamw = recipe.adamw(lr=1e-2)
            losses.append([recipe.step(ids[:, :-1], None, ids[:, 1:], adamw.hp_for_step(k), k == 0) for k in range(40)])
    yield *losses, recipe
    recipe.close()


def test_lora_on_a_quantised_base(lora_runs):
    expected, found, recipe = lora_runs
    assert expected[-1] < expected[0] - 0.3
    np.testing.assert_allclose(found, expected, atol=0.02)
    explanation = recipe.explain()
    assert explanation.splits == 1
    assert {node.device for node in explanation.nodes} == {explanation.device} != {"CPU"}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0", "q4_1"])
def test_generation_on_the_device(tmp_path, kind):
    """The graph that decodes: its numbers are the CPU's, a prompt in one run or token by token, and so is its text."""
    config = toy.LlamaConfig(96, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, n_layers=2, context_length=300)
    write_gguf(tmp_path / "f32.gguf", config, toy.Llama(config, seed=1, init_scale=4.0).parameters)
    path = tmp_path / "m.gguf"
    export_model(read_trained(tmp_path / "f32.gguf"), path, kind)
    model, ids = read_trained(path).model("cython"), np.arange(280) ** 2 * 7 % 96
    made = generator(model, "ggml", DEVICE)
    decoder, wanted = made.model, model.forward(ids)[0]
    assert f"ggml graph on {decoder.device}" in made.how
    cache = decoder.new_kv_cache()
    parts, ends = (ids[:250], *ids[250:260, None], ids[260:280]), [249, *range(250, 260), 279]
    found = np.concatenate([decoder.forward(part, kv_cache=cache, last_only=True)[0] for part in parts])
    assert np.abs(found - wanted[ends]).max() < 0.05 * wanted.std()
    explanation = decoder.explain()
    assert explanation.splits == 1
    assert {node.device for node in explanation.nodes} == {explanation.device} != {"CPU"}
    # Vulkan leaves the activations beside quantised weights as they are, other devices round them
    if kind == "f32" or (kind == "q8_0" and DEVICE.lower().startswith("vulkan")):
        for prompt in (ids[:17], ids[60:93]):
            texts = [list(generate(which, prompt, 16, temperature=0)) for which in (decoder, model)]
            assert texts[0] == texts[1]
    decoder.close()
