"""Numbers that only show when something other than the default is asked for: constants of the config, a clip that does not
bite, memory of the graph, files with one bad scale, long batches, the start of a lens. On every backend."""

import dataclasses
import struct

import numpy as np
import pytest

import toy
from toy.files.gguf_write import write_gguf
from toy.models import model_for

V, T, B = 32, 24, 2
LLAMA = toy.LlamaConfig(V, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, n_layers=2, context_length=T)
F32_BAR = 2e-5  # relative L2


def loud_parameters(config, seed=0):
    """Far from the start: positions, scores and norms all matter to the loss."""
    rng = np.random.default_rng(seed)
    shapes = model_for(config).parameter_shapes(config)
    return {name: rng.normal(0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def batch(seed=0, t_batch=B, t_seq=T, vocab=V):
    ids = np.random.default_rng(seed).integers(0, vocab, (t_batch, t_seq + 1))
    return ids[:, :-1], ids[:, 1:]


def realize(backend, config=LLAMA, **options):
    recipe = toy.recipes.FromScratch(*backend)
    return recipe.realize(config, toy.RecipeOptions(**{"t_seq": T, "t_batch": B, **options}), keep_gradients=True)


def distance(a, b):
    return np.linalg.norm(np.ravel(a).astype(float) - np.ravel(b)) / np.linalg.norm(np.ravel(b).astype(float))


# -- constants of the config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"rope_base": 100.0}, {"rope_base": 1e6}, {"rms_eps": 0.3}], ids=str)
def test_constants_of_a_llama_reach_the_forward_and_the_backward(backend, change):
    config = dataclasses.replace(LLAMA, **change)
    ids, labels = batch()
    results = {}
    for name, where, given in (
        ("here", backend, config),
        ("numpy", ("numpy", "cpu"), config),
        ("default", backend, LLAMA),
    ):
        recipe = realize(where, given)
        recipe.load_parameters(loud_parameters(config))
        logits = recipe.logits(ids)
        recipe.step(ids, None, labels, recipe.adamw(lr=0.0).hp_for_step(0), is_first=True)
        results[name] = {"logits": logits, **recipe.gradients()}
    for name, array in results["numpy"].items():
        assert distance(results["here"][name], array) < F32_BAR, name
    for name in ("logits", "blk.0.attn_q.weight", "blk.1.attn_k.weight"):
        assert distance(results["default"][name], results["numpy"][name]) > 1e-2, f"{name} does not depend on {change}"


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["transformer", "gpt2"])
def test_a_norm_below_the_clip_leaves_everything_as_it_is(backend, arch):
    config = {"transformer": toy.TransformerConfig, "gpt2": toy.GPT2Config}[arch](V, 16, 4, 24, 1, T)
    ids, labels = batch()
    free = realize(backend, config)
    row = free.adamw(lr=1e-2).hp_for_step(0)
    free.step(ids, None, labels, row, is_first=True)
    norm = free.grad_norm
    for clip, scale in ((1.001 * norm, 1.0), (1e6 * norm, 1.0), (0.5 * norm, 0.5)):
        recipe = realize(backend, config, grad_clip=clip)
        recipe.step(ids, None, labels, row, is_first=True)
        assert recipe.grad_norm == norm
        for slot, power in (("m", 1), ("v", 2)):
            for name, array in free.optimizer_state()[slot].items():
                found = recipe.optimizer_state()[slot][name]
                if scale == 1.0:
                    assert np.array_equal(found, array), (clip, slot, name)
                else:
                    np.testing.assert_allclose(found, array * scale**power, rtol=1e-4, atol=1e-12)
        same = all(np.array_equal(array, free.parameters()[name]) for name, array in recipe.parameters().items())
        assert same == (scale == 1.0)


# -- memory of the recorded graph --------------------------------------------------------------------------------------

WIDE = {
    "transformer": toy.TransformerConfig(32, d_model=64, n_heads=4, d_ff=512, n_layers=4, context_length=64),
    "gpt2": toy.GPT2Config(32, d_model=64, n_heads=4, d_ff=512, n_layers=4, context_length=64),
    "llama": toy.LlamaConfig(32, d_model=64, n_heads=4, n_kv_heads=4, d_ff=512, n_layers=4, context_length=64),
}


@pytest.mark.parametrize("arch", WIDE)
def test_cheap_results_are_computed_again_and_their_memory_is_free_in_between(kernels, monkeypatch, arch):
    """Of a block stay, for each token: its input twice (before either half), q, k, v and the attention's result, and of the
    MLP what the activation is computed from. Both norms' results and the activation's do not."""
    from toy.ops.graph import CpuGraphOps, cpu

    monkeypatch.setattr(cpu, "WORTH_COMPUTING_AGAIN", 0)
    small, t_batch = WIDE[arch], 4
    n = t_batch * small.context_length
    ids, labels = batch(0, t_batch, small.context_length, small.vocab_size)

    def numbers_a_token():
        """How many numbers a further block adds to the graph for each token, and the losses. Over twelve blocks: how the
        tensors are packed at the ends moves the size by some tens of numbers a token."""
        sizes, losses = [], []
        for n_layers in (small.n_layers, 4 * small.n_layers):
            recipe = toy.recipes.FromScratch("ggml", "cpu")
            config = dataclasses.replace(small, n_layers=n_layers)
            recipe.realize(config, toy.RecipeOptions(t_seq=small.context_length, t_batch=t_batch))
            sizes.append(recipe.explain().bytes["graph"])
            losses.append(recipe.step(ids, None, labels, recipe.adamw().hp_for_step(0), is_first=True))
        return (sizes[1] - sizes[0]) / (3 * small.n_layers) / n / 4, losses

    recomputing, losses = numbers_a_token()
    monkeypatch.setattr(CpuGraphOps, "_recomputed", lambda ops, x: x)
    keeping, same = numbers_a_token()
    assert losses == same
    d, f = small.d_model, small.d_ff
    must_stay = 6 * d + (2 * f if arch == "llama" else f)  # a llama's gate and up
    few = 24  # the norms' and the softmax's statistics, and rounding to the alignment
    assert must_stay <= recomputing <= must_stay + few
    assert keeping >= must_stay + 2 * d + f


# -- one bad scale in a quantised file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q8_0_file(tmp_path_factory):
    """A sound Q8_0 llama, and where in the file each tensor begins."""
    pytest.importorskip("gguf", reason="quantised files need the gguf package")
    path = tmp_path_factory.mktemp("q8") / "sound.gguf"
    write_gguf(path, LLAMA, loud_parameters(LLAMA), type="q8_0")
    with toy.GGUF.open(path) as gguf:
        return path.read_bytes(), {name: (record.type, record.offset) for name, record in gguf.tensors.items()}


STARTS = {
    "LoRA": lambda recipe, gguf, opts: recipe.realize(gguf, None, 2, opts),
    "FullFinetune": lambda recipe, gguf, opts: recipe.realize(gguf, None, opts),
    "WarmStart": lambda recipe, gguf, opts: recipe.realize(gguf, LLAMA, opts),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"])
def test_a_scale_that_is_not_finite_is_found_before_anything_is_trained(q8_0_file, tmp_path, start, scale, name):
    data, places = q8_0_file
    kind, offset = places[name]
    assert kind == ("F32" if name.endswith("norm.weight") else "Q8_0")
    path = tmp_path / "bad.gguf"
    opts = toy.RecipeOptions(t_seq=8)

    def begin():
        with toy.GGUF.open(path) as gguf:
            STARTS[start](getattr(toy.recipes, start)("numpy"), gguf, opts).logits(np.zeros(8, int))

    path.write_bytes(data)
    begin()
    bad = bytearray(data)
    if kind == "F32":
        bad[offset + 4 : offset + 8] = struct.pack("<f", float(np.uint16(scale).view(np.float16)))
    else:
        last_block = offset + 34 * (V * LLAMA.d_model // 32 - 1 if name.startswith("token") else 5)
        bad[last_block : last_block + 2] = struct.pack("<H", scale)
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=rf"{path.name}.*{name}.*not finite"):
        begin()


# -- many rows ---------------------------------------------------------------------------------------------------------


def test_the_mean_over_many_rows_keeps_its_digits(ops):
    """100,000 losses of about 3 added one by one in float32 would be off in the fourth digit."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((100_000, 7))).astype(np.float32)
    labels = rng.integers(-1, 7, len(logits))
    x = logits.astype(np.float64)
    counted = np.flatnonzero(labels >= 0)
    losses = np.log(np.exp(x).sum(axis=1))[counted] - x[counted, labels[counted]]
    loss, cache = ops.cross_entropy(logits, labels)
    assert abs(loss - losses.mean()) < 2e-7 * losses.mean()
    d = ops.cross_entropy_backward(cache)
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    expected[labels < 0] = 0
    expected[counted, labels[counted]] -= 1
    assert distance(d, expected / len(counted)) < 1e-6


def test_an_engines_loss_over_many_rows_keeps_its_digits(backend):
    config = toy.TransformerConfig(5, d_model=4, n_heads=1, d_ff=4, n_layers=1, context_length=50)
    t_batch = 2000
    recipe = realize(backend, config, t_seq=50, t_batch=t_batch)
    parameters = {name: 3 * array for name, array in loud_parameters(config).items()}
    recipe.load_parameters(parameters)
    ids, labels = batch(1, t_batch, 50, 5)
    model = toy.TransformerLM.from_config(
        config, ops=toy.switch.ops_for("numpy"), parameters=tree_of(config, parameters), dtype=np.float64
    )
    x = model.forward(ids)[0].reshape(-1, 5)
    losses = np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(x)), labels.ravel()]
    found = recipe.evaluate(ids, labels)
    assert losses.mean() > 1 and abs(found - losses.mean()) < 1e-6 * losses.mean()
    assert recipe.step(ids, None, labels, recipe.adamw(lr=0.0).hp_for_step(0), is_first=True) == found


def tree_of(config, parameters):
    from toy.models import ParameterTree

    tree = ParameterTree.zeros(model_for(config).parameter_shapes(config), np.float64)
    tree.load(parameters)
    return tree


# -- the start of a lens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("init_scale", [1.0, 3.0])
def test_a_lens_starts_as_it_says(untied, init_scale):
    """Variance 1/E, so that a row of the donor keeps its size; the way back is the transpose; every seed has its own."""
    width, config = (
        192,
        toy.LlamaConfig(V, d_model=64, n_heads=4, n_kv_heads=4, d_ff=64, n_layers=1, context_length=T, untied=untied),
    )
    donor = np.random.default_rng(3).normal(0, 0.7, (V, width)).astype(np.float32)
    starts = []
    for seed in range(4):
        recipe = toy.recipes.WarmStart("numpy")
        opts = toy.RecipeOptions(t_seq=T, seed=seed, init_scale=init_scale)
        recipe.realize({"token_embd.weight": donor}, config, opts, lens=True)
        starts.append(recipe.parameters())
        lens = starts[-1]["token_embd.lens"]
        assert lens.shape == (64, width)
        assert ("output.lens" in starts[-1]) == (not untied)
        if not untied:
            assert np.array_equal(starts[-1]["output.lens"], lens.T)
    numbers = np.stack([start["token_embd.lens"] for start in starts]) * width**0.5 / init_scale
    n = numbers.size
    assert abs(numbers.mean()) < 5 / n**0.5
    assert abs(numbers.var() - 1) < 5 * (2 / n) ** 0.5
    assert len({start["token_embd.lens"].tobytes() for start in starts}) == 4
    seen = donor @ starts[0]["token_embd.lens"].T / init_scale
    assert 0.8 < seen.std() / donor.std() < 1.25
