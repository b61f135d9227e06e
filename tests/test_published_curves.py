"""Loss curves that another implementation of these recipes published: an outside oracle, on every backend.

Its generators are part of the recipes, odd as they are (one gives negative weights only, the other every second weight zero),
and stand here alone. Published are six digits; the last of them is the bar's reason.
"""

import math

import numpy as np
import pytest

import toy


def congruential(seed):
    """x -> (1103515245 x + 12345) mod 2^31, of which the upper 23 bits become a number in [-0.02, 0)."""
    while True:
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        yield ((seed >> 8) / 2**23 - 1) * 0.02


def gpt2_parameters(config, seed):
    """Drawn in the order token table, position table, then of each block: q, k and v of each head, output, up, down."""
    numbers = congruential(seed)

    def draw(*shape):
        return np.array([next(numbers) for _ in range(math.prod(shape))], np.float32).reshape(shape)

    d, f, heads = config.d_model, config.d_ff, config.n_heads
    shapes = toy.GPT2.parameter_shapes(config)
    parameters = {
        name: (np.ones if name.endswith("norm.weight") else np.zeros)(shape, np.float32)
        for name, shape in shapes.items()
    }
    parameters["token_embd.weight"] = draw(config.vocab_size, d)
    parameters["position_embd.weight"] = draw(config.context_length, d)
    for layer in range(config.n_layers):
        qkv = [[draw(d // heads, d) for _ in range(3)] for _ in range(heads)]
        parameters[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(
            [qkv[h][part] for part in range(3) for h in range(heads)]
        )
        parameters[f"blk.{layer}.attn_output.weight"] = draw(d, d)
        parameters[f"blk.{layer}.ffn_up.weight"] = draw(f, d)
        parameters[f"blk.{layer}.ffn_down.weight"] = draw(d, f)
    return parameters


def curve(recipe, ids, steps, adamw):
    """The losses when each id is to be followed by the next one, and the last one by itself."""
    ids = np.array(ids)
    labels = np.append(ids[1:], ids[-1])
    return [recipe.step(ids, None, labels, adamw.hp_for_step(k), is_first=k == 0) for k in range(steps)]


SENTENCE = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 7, 13, 14, 15, 16, 17, 7, 18, 19, 20, 21, 22, 23, 24, 7, 13, 25, 26, 3,
]  # fmt: skip


def test_a_tiny_gpt2_of_80_steps(backend):
    published = {
        1: 3.464811, 2: 3.313561, 3: 3.117971, 4: 2.944362, 5: 2.764107, 10: 2.032203, 20: 0.959038, 30: 0.297292,
        40: 0.074168, 50: 0.026121, 60: 0.013697, 70: 0.009319, 80: 0.007272,
    }  # fmt: skip
    config = toy.GPT2Config(vocab_size=32, d_model=16, n_heads=4, d_ff=32, n_layers=2, context_length=8)
    recipe = toy.recipes.FromScratch(*backend).realize(config, toy.RecipeOptions(t_seq=8))
    recipe.load_parameters(gpt2_parameters(config, 1234))
    losses = curve(recipe, [(7 * t + 3) % 32 for t in range(8)], 80, toy.AdamW.for_lora(lr=0.01))
    np.testing.assert_allclose([losses[step - 1] for step in published], list(published.values()), rtol=0, atol=2e-5)


def test_gpt2_seq_engine_10_steps(backend):
    published = [6.436956, 6.259016, 6.145824, 6.043459, 5.943637, 5.850023, 5.754021, 5.655431, 5.556338, 5.457271]
    engine = toy.engines.GPT2SeqEngine(*backend).realize(627, 64, 4, 128, 2, 32)
    engine.load_parameters(gpt2_parameters(toy.GPT2Config(627, 64, 4, 128, 2, 32), 0))
    losses = curve(engine, SENTENCE, 10, toy.AdamW.for_lora(lr=1e-3))
    np.testing.assert_allclose(losses, published, rtol=0, atol=2e-5)


def test_a_llama_reads_a_frozen_donor_embedding_through_a_lens_for_5_steps(backend):
    published = [6.440948, 6.390329, 6.321598, 6.240767, 6.151133]
    vocab, width, d, f = 627, 128, 64, 128
    config = toy.LlamaConfig(vocab, d, 4, 4, f, 2, 32, untied=True)

    def degenerate(shape, std):
        """Pairs of (largest, 0): what a Box-Muller transform makes of two draws that are always 0, kept from log 0."""
        pairs = np.zeros((math.prod(shape) // 2, 2), np.float32)
        pairs[:, 0] = math.sqrt(-2 * math.log(1e-300)) * std
        return pairs.reshape(shape)

    def std(name):
        if name in ("token_embd.weight", "output.weight"):
            return 0.02
        return {"token_embd.lens": width**-0.5}.get(name, f**-0.5 if "ffn_down" in name else d**-0.5)

    donor = degenerate((vocab, width), std("token_embd.weight"))
    recipe = toy.recipes.WarmStart(*backend)
    recipe.realize({"token_embd.weight": donor}, config, toy.RecipeOptions(t_seq=32, untied=True), lens=True)
    start = {
        name: np.ones_like(array) if name.endswith("norm.weight") else degenerate(array.shape, std(name))
        for name, array in recipe.parameters().items()
    }
    recipe.load_parameters(start)
    losses = curve(recipe, SENTENCE, 5, toy.AdamW.for_from_scratch(lr=1e-3))
    np.testing.assert_allclose(losses, published, rtol=0, atol=5e-5)
    assert "token_embd.weight" not in recipe.parameters()


@pytest.mark.parametrize("change", ["mode", "generator"])
def test_the_curves_would_notice(change):
    """What differs by a convention alone is far outside the bars."""
    config = toy.GPT2Config(vocab_size=32, d_model=16, n_heads=4, d_ff=32, n_layers=2, context_length=8)
    recipe = toy.recipes.FromScratch("numpy").realize(config, toy.RecipeOptions(t_seq=8))
    recipe.load_parameters(gpt2_parameters(config, 1234 if change == "mode" else 1235))
    adamw = toy.AdamW.for_lora(lr=0.01)
    rows = [adamw.hp_for_step(k) for k in range(5)]
    if change == "mode":
        rows = [np.array(toy.AdamW.for_from_scratch(lr=0.01).hp_for_step(k)) for k in range(5)]
    ids = np.array([(7 * t + 3) % 32 for t in range(8)])
    losses = [recipe.step(ids, None, np.append(ids[1:], ids[-1]), row, k == 0) for k, row in enumerate(rows)]
    assert abs(losses[4] - 2.764107) > 2e-5
