"""Recipes that start from a model: LoRA, full fine-tuning, warm start; and LlamaSeqEngine's verbs. On every backend."""

import dataclasses

import numpy as np
import pytest

import toy
from toy.engines.adapters import TARGETS
from toy.files.gguf_write import write_gguf
from toy.models import model_for
from toy.models.lens import without_lens
from toy.models.parameters import ParameterTree, round_weights

V, T, B = 96, 16, 2
LLAMA = toy.LlamaConfig(V, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, n_layers=2, context_length=24)
GPT2 = toy.GPT2Config(V, d_model=64, n_heads=4, d_ff=96, n_layers=2, context_length=24)
F32_BAR = 2e-5


def random_parameters(config, seed=0):
    """Like a trained model: every number random, norm gains around 1."""
    rng = np.random.default_rng(seed)
    shapes = model_for(config).parameter_shapes(config)
    return {
        name: (rng.normal(1 if name.endswith("norm.weight") else 0, 0.3 / shape[-1] ** 0.5, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_gguf(folder, config=LLAMA, type="q8_0", seed=0):
    path = folder / f"{type}.gguf"
    write_gguf(path, config, random_parameters(config, seed), type=type)
    return toy.GGUF.open(path)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    with make_gguf(tmp_path_factory.mktemp("base")) as gguf:
        yield gguf


@pytest.fixture(scope="module")
def gpt2_gguf(tmp_path_factory):
    with make_gguf(tmp_path_factory.mktemp("gpt2"), GPT2, "f32") as gguf:
        yield gguf


def options(**changes):
    return toy.RecipeOptions(**{"t_seq": T, "t_batch": B, **changes})


def batch(seed=0):
    """Sequences that can be learnt: each token decides the next but for some noise."""
    rng = np.random.default_rng(seed)
    following = np.random.default_rng(99).permutation(V)
    ids = np.empty((B, T + 1), np.int64)
    ids[:, 0] = rng.integers(0, V, B)
    for t in range(T):
        ids[:, t + 1] = np.where(rng.random(B) < 0.1, rng.integers(0, V, B), following[ids[:, t]])
    return ids[:, :-1], ids[:, 1:]


def train(recipe, steps, lr=1e-2, same=False):
    """The losses; same: of the one batch again and again."""
    adamw, losses = recipe.adamw(lr=lr), []
    for k in range(steps):
        ids, labels = batch(0 if same else k)
        losses.append(recipe.step(ids, None, labels, adamw.hp_for_step(k), is_first=k == 0))
    return np.array(losses)


def base_logits(gguf, ids):
    config = gguf.config()
    tree = ParameterTree.zeros(model_for(config).parameter_shapes(config))
    tree.load(gguf.parameters())
    model = model_for(config).from_config(config, parameters=tree, ops=toy.switch.eager_ops("numpy"))
    return model.forward(ids)[0]


# ----------------------------------------------------------------------------------------------------------------------
# LoRA
# ----------------------------------------------------------------------------------------------------------------------


def realize_lora(backend, gguf, rank=4, targets=("q",), alpha=None, **changes):
    recipe = toy.recipes.LoRA(*backend)
    return recipe.realize(gguf, None, rank, options(**changes), targets=targets, alpha=alpha, keep_gradients=True)


def test_lora_begins_as_the_base_and_trains_the_adapters_alone(backend, gguf):
    recipe = realize_lora(backend, gguf, targets=("q", "down"))
    ids, _ = batch()
    assert np.allclose(recipe.logits(ids), base_logits(gguf, ids), atol=2e-5)
    before, start = gguf.path.read_bytes(), recipe.parameters()
    assert sorted({name.split(".", 2)[2] for name in start}) == [
        "attn_q.lora_a", "attn_q.lora_b", "ffn_down.lora_a", "ffn_down.lora_b",
    ]  # fmt: skip
    assert start["blk.1.ffn_down.lora_a"].shape == (4, 96) and start["blk.1.ffn_down.lora_b"].shape == (64, 4)
    assert recipe.hp_mode == toy.AdamW.MODE_LORA
    assert recipe.n_trained == 2 * (4 * 64 + 64 * 4 + 4 * 96 + 64 * 4)
    assert recipe.n_parameters == gguf.n_parameters + recipe.n_trained
    losses = train(recipe, 30, same=True)
    assert losses[-1] < losses[0] - 1
    after = recipe.parameters()
    assert all(not np.array_equal(after[name], start[name]) for name in start)
    assert gguf.path.read_bytes() == before


def test_lora_start_is_small_random_and_zero(gguf):
    stds = []
    for seed in range(5):
        start = realize_lora(("numpy", "cpu"), gguf, rank=8, targets=tuple(TARGETS), seed=seed).parameters()
        for name, array in start.items():
            if name.endswith("lora_b"):
                assert not array.any()
            else:
                assert abs(array.mean()) < 5 * array.std() / array.size**0.5
                stds.append(array.std() * (3 * array.shape[1]) ** 0.5)
    assert 0.97 < np.mean(stds) < 1.03
    first = realize_lora(("numpy", "cpu"), gguf, seed=0, init_scale=2.0).parameters()["blk.0.attn_q.lora_a"]
    second = realize_lora(("numpy", "cpu"), gguf, seed=0).parameters()["blk.0.attn_q.lora_a"]
    assert np.array_equal(first, 2 * second)


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0"])
def test_lora_gradients_of_every_target_are_torchs(backend, torch_models, tmp_path, type):
    with make_gguf(tmp_path, type=type) as gguf:
        alpha, rank = 6.0, 4
        recipe = realize_lora(backend, gguf, rank, tuple(TARGETS), alpha)
        rng = np.random.default_rng(3)
        adapters = {
            name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in recipe.parameters().items()
        }
        recipe.load_parameters(adapters)
        ids, labels = batch(5)
        loss = recipe.step(ids, None, labels, recipe.adamw(lr=1e-3).hp_for_step(0), is_first=True)
        scale = alpha / rank
        scaled = {name: a * (scale if name.endswith("lora_b") else 1.0) for name, a in adapters.items()}
        _, expected_loss, expected = torch_models.run_model("llama", gguf.parameters() | scaled, LLAMA, ids, labels)
        assert abs(loss - expected_loss) < 1e-5
        gradients = recipe.gradients()
        assert gradients.keys() == adapters.keys()
        for name, gradient in gradients.items():
            wanted = expected[name] * (scale if name.endswith("lora_b") else 1.0)
            assert np.linalg.norm(gradient - wanted) <= F32_BAR * np.linalg.norm(wanted), name


def test_lora_curves_of_all_backends_agree(backend, gguf):
    expected = train(realize_lora(("numpy", "cpu"), gguf, targets=("q", "v")), 100, lr=3e-3)
    given = train(realize_lora(backend, gguf, targets=("q", "v")), 100, lr=3e-3)
    assert np.abs(given - expected).max() < 1e-3
    assert np.array_equal(given, train(realize_lora(backend, gguf, targets=("q", "v")), 100, lr=3e-3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"targets": ()}, "targets must be some of q, k, v, o, gate, up, down: none"),
        ({"targets": ("q", "qkv")}, "'qkv' is not one"),
        ({"targets": 3}, "3 is not one"),
        ({"t_seq": 25}, "does not fit the context of 24"),
    ],
)
def test_lora_refuses(gguf, arguments, message):
    with pytest.raises(ValueError, match=message):
        realize_lora(("numpy", "cpu"), gguf, **arguments)


def test_lora_refuses_other_models(gguf, gpt2_gguf):
    lora = toy.recipes.LoRA("numpy")
    with pytest.raises(ValueError, match="targets must be some of qkv, o, up, down: 'q' is not one"):
        lora.realize(gpt2_gguf, None, 4, options(), targets=("q",))
    with pytest.raises(TypeError, match=r"toy\.GGUF"):
        lora.realize("model.gguf", None, 4, options())
    with pytest.raises(ValueError, match="d_ff 96, cfg says 97"):
        lora.realize(gguf, dataclasses.replace(LLAMA, d_ff=97), 4, options())
    with pytest.raises(ValueError, match="holds a LlamaConfig"):
        lora.realize(gguf, GPT2, 4, options())
    with pytest.raises(ValueError, match="context_length 24, cfg says 25"):
        lora.realize(gguf, dataclasses.replace(LLAMA, context_length=25), 4, options())
    shorter = lora.realize(gguf, dataclasses.replace(LLAMA, context_length=T), 4, options())
    assert shorter.engine.config.context_length == T


def test_lora_metal_needs_a_mac():
    for make in (toy.recipes.LoRAMetal, toy.engines.LlamaSeqEngineMetal):
        with pytest.raises((ValueError, toy.BackendUnavailableError), match=r"metal|ggml"):
            make()


# ----------------------------------------------------------------------------------------------------------------------
# full fine-tuning
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_full_finetune_trains_everything(backend, gguf, gpt2_gguf, arch):
    source = gguf if arch == "llama" else gpt2_gguf
    recipe = toy.recipes.FullFinetune(*backend).realize(source, None, options())
    ids, _ = batch()
    assert np.allclose(recipe.logits(ids), base_logits(source, ids), atol=2e-5)
    start = recipe.parameters()
    assert all(np.array_equal(start[name], array) for name, array in source.parameters().items())
    assert recipe.hp_mode == toy.AdamW.MODE_LORA
    losses = train(recipe, 20, lr=3e-3)
    assert losses[-5:].mean() < losses[:5].mean() - 0.2
    after = recipe.parameters()
    assert all(not np.array_equal(after[name], start[name]) for name in start)


def test_full_finetune_can_leave_the_embeddings(backend, gpt2_gguf):
    recipe = toy.recipes.FullFinetune(*backend)
    recipe.realize(gpt2_gguf, None, options(), freeze_embeddings=True, keep_gradients=True)
    start = recipe.parameters()
    train(recipe, 3)
    after, frozen = recipe.parameters(), {"token_embd.weight", "position_embd.weight"}
    assert {name for name in start if np.array_equal(after[name], start[name])} == frozen
    assert recipe.gradients().keys() == recipe.optimizer_state()["m"].keys() == start.keys() - frozen
    recipe.load_parameters(start)
    assert all(np.array_equal(array, start[name]) for name, array in recipe.parameters().items())


def test_full_finetune_curves_agree(backend, gguf):
    curves = [
        train(toy.recipes.FullFinetune(*which).realize(gguf, None, options(), freeze_embeddings=True), 30, lr=1e-3)
        for which in (("numpy", "cpu"), backend)
    ]
    assert np.abs(curves[0] - curves[1]).max() < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# warm start
# ----------------------------------------------------------------------------------------------------------------------


def test_warm_start_takes_what_it_is_told(backend, gguf):
    cfg = dataclasses.replace(LLAMA, n_layers=1)
    stored, fresh = gguf.parameters(), toy.recipes.FromScratch(*backend).realize(cfg, options()).parameters()
    for take in ("*", "blk.*", ["token_embd.*", "blk.0.ffn_*"]):
        recipe = toy.recipes.WarmStart(*backend).realize(gguf, cfg, options(), take=take)
        assert recipe.hp_mode == toy.AdamW.MODE_FROM_SCRATCH
        patterns = [take] if isinstance(take, str) else take
        for name, array in recipe.parameters().items():
            taken = any(name.startswith(pattern.rstrip("*")) for pattern in patterns)
            assert np.array_equal(array, (stored if taken else fresh)[name]), (take, name)
    losses = train(recipe, 20)
    assert losses[-5:].mean() < losses[:5].mean()


def test_warm_start_from_another_recipe(backend):
    config = toy.TransformerConfig(V, d_model=16, n_heads=2, d_ff=32, n_layers=1, context_length=T)
    first = toy.recipes.FromScratch(*backend).realize(config, options())
    train(first, 5)
    second = toy.recipes.WarmStart(*backend).realize(first.parameters(), config, options(seed=7))
    ids, labels = batch(50)
    assert second.evaluate(ids, labels) == first.evaluate(ids, labels)


def test_warm_start_refuses(gguf):
    def start(cfg=LLAMA, source=gguf, **arguments):
        return toy.recipes.WarmStart("numpy").realize(source, cfg, options(), **arguments)

    with pytest.raises(ValueError, match="no parameter of the model is called like layers"):
        start(take="layers.*")
    with pytest.raises(ValueError, match=r"has no blk.2.attn_k.weight.*starts random"):
        start(dataclasses.replace(LLAMA, n_layers=3))
    with pytest.raises(ValueError, match=r"shape .* the new model's is"):
        start(dataclasses.replace(LLAMA, d_ff=32))
    with pytest.raises(ValueError, match="an embedding of 96 tokens, the new model a vocabulary of 95"):
        start(dataclasses.replace(LLAMA, vocab_size=95), lens=True)
    with pytest.raises(ValueError, match="a lens belongs to a llama"):
        start(toy.TransformerConfig(V, 16, 2, 32, 1, T), lens=True)
    with pytest.raises(TypeError, match=r"toy\.GGUF"):
        start(source="model.gguf")


LENS_CONFIGS = {
    "llama": toy.LlamaConfig(V, d_model=24, n_heads=3, n_kv_heads=1, d_ff=40, n_layers=1, context_length=T),
    "llama-untied": toy.LlamaConfig(V, 24, 3, 1, 40, 1, context_length=T, untied=True),
}


@pytest.mark.parametrize("name", LENS_CONFIGS)
def test_a_donor_embedding_of_another_width_through_a_lens(backend, gguf, torch_models, name):
    config = LENS_CONFIGS[name]
    recipe = toy.recipes.WarmStart(*backend).realize(gguf, config, options(), lens=True, keep_gradients=True)
    start = recipe.parameters()
    assert "token_embd.weight" not in start and start["token_embd.lens"].shape == (24, 64)
    tied = "output.lens" in start
    assert tied == (name != "llama-untied")
    if tied:
        assert np.array_equal(start["output.lens"], start["token_embd.lens"].T)
    ids, labels = batch()
    loss = recipe.step(ids, None, labels, recipe.adamw(lr=1e-2).hp_for_step(0), is_first=True)
    donor = {"token_embd.weight": gguf.dequantize("token_embd.weight")}
    _, expected_loss, expected = torch_models.run_model(
        config.__class__.__name__[:-6].lower(), donor | start, config, ids, labels
    )
    assert abs(loss - expected_loss) < 1e-5
    for parameter, gradient in recipe.gradients().items():
        error = np.linalg.norm(gradient - expected[parameter])
        assert error <= F32_BAR * np.linalg.norm(expected[parameter]), parameter
    losses = train(recipe, 40, lr=3e-3)
    assert losses[-5:].mean() < losses[:5].mean() - 0.3
    plain_config, plain = without_lens(config, donor | recipe.parameters())
    plain_recipe = toy.recipes.WarmStart(*backend).realize(plain, plain_config, options())
    assert abs(plain_recipe.evaluate(ids, labels) - recipe.evaluate(ids, labels)) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# LlamaSeqEngine
# ----------------------------------------------------------------------------------------------------------------------


def test_llama_engine_from_scratch_is_the_recipe(backend):
    engine = toy.engines.LlamaSeqEngine(*backend)
    assert engine.realize_for_random_init(LLAMA, T, B, "f32", True, True, seed=3, init_scale=0.5) is engine
    t_loss, t_labels, t_hp = engine.build_training_step()
    assert (t_loss.shape, t_labels.shape, t_hp.shape) == ((), (B * T,), (1, 7))
    recipe = toy.recipes.FromScratch(*backend)
    recipe.realize(LLAMA, options(seed=3, init_scale=0.5, untied=True, qkv_bias=True))
    losses = train(engine, 5)
    assert np.array_equal(losses, train(recipe, 5))
    assert t_loss.value == losses[-1] and np.array_equal(t_labels.value, batch(4)[1])
    assert engine.hp_mode == toy.AdamW.MODE_FROM_SCRATCH
    assert "blk.0.attn_q.bias" in engine.parameters() and "output.weight" in engine.parameters()


def test_llama_engine_lora_is_the_recipe(backend, gguf):
    engine = toy.engines.LlamaSeqEngine(*backend)
    engine.enable_lora_q(4)
    engine.enable_lora_q_adamw()
    engine.realize_for_mmap(gguf, gguf.config(), T, False, False, t_batch=B)
    engine.upload_lora_q_init(seed=2, init_scale=1.0)
    engine.build_training_step()
    losses = train(engine, 4)
    assert np.array_equal(losses, train(realize_lora(backend, gguf, seed=2), 4))
    engine.upload_lora_q_init(seed=2)  # starts anew
    assert np.array_equal(losses, train(engine, 4))


def test_llama_engine_full_finetune_is_the_recipe(backend, gguf):
    engine = toy.engines.LlamaSeqEngine(*backend)
    engine.realize_for_mmap(gguf, None, T, t_batch=B)
    engine.enable_full_finetune()
    assert engine.logits(batch()[0]).shape == (B, T, V)  # builds what it needs
    assert engine.hp_mode == toy.AdamW.MODE_LORA
    recipe = toy.recipes.FullFinetune(*backend).realize(gguf, None, options())
    assert np.array_equal(train(engine, 3), train(recipe, 3))


def test_llama_engine_adapters_on_a_random_base(backend):
    engine = toy.engines.LlamaSeqEngine(*backend)
    engine.realize_for_random_init(LLAMA, T, B, seed=1).enable_lora_q(2).enable_lora_q_adamw().build_training_step()
    assert engine.parameters().keys() == {f"blk.{i}.attn_q.lora_{x}" for i in range(2) for x in "ab"}


def test_llama_engine_verbs_out_of_order(gguf, gpt2_gguf):
    def engine():
        return toy.engines.LlamaSeqEngine("numpy")

    with pytest.raises(RuntimeError, match=r"realize_for_random_init\(\) or realize_for_mmap\(\) first"):
        engine().build_training_step()
    with pytest.raises(RuntimeError, match="enable_lora_q"):
        engine().enable_lora_q_adamw()
    with pytest.raises(RuntimeError, match="enable_lora_q"):
        engine().upload_lora_q_init(0, 1.0)
    with pytest.raises(RuntimeError, match="enable_full_finetune"):
        engine().realize_for_mmap(gguf, None, T).build_training_step()
    with pytest.raises(RuntimeError, match="enable_lora_q_adamw"):
        engine().realize_for_mmap(gguf, None, T).enable_lora_q(2).build_training_step()
    with pytest.raises(RuntimeError, match="cannot do both"):
        engine().enable_lora_q(2).enable_full_finetune()
    with pytest.raises(RuntimeError, match="cannot do both"):
        engine().enable_full_finetune().enable_lora_q(2)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        engine().enable_lora_q(0)
    with pytest.raises(ValueError, match="expected llama"):
        engine().realize_for_mmap(gpt2_gguf, None, T)
    with pytest.raises(ValueError, match="not untied"):
        engine().realize_for_mmap(gguf, None, T, untied=True)
    with pytest.raises(RuntimeError, match=r"call realize\(\) first"):
        engine().parameters()
    built = engine().realize_for_random_init(LLAMA, T)
    built.build_training_step()
    with pytest.raises(RuntimeError, match="built already"):
        built.enable_lora_q(2)


# ----------------------------------------------------------------------------------------------------------------------
# what stays as it is, and what does not
# ----------------------------------------------------------------------------------------------------------------------


def test_weight_decay_reaches_what_is_trained_and_nothing_else(backend, gguf):
    after = []
    for decay in (0.0, 0.5):
        recipe = toy.recipes.FullFinetune(*backend).realize(gguf, None, options(), freeze_embeddings=True)
        start, (ids, labels) = recipe.parameters(), batch()
        recipe.step(ids, None, labels, recipe.adamw(lr=0.1, weight_decay=decay).hp_for_step(0), is_first=True)
        after.append(recipe.parameters())
    for name, array in start.items():
        shrunk = 0.0 if name == "token_embd.weight" or array.ndim < 2 else 0.1 * 0.5 * array
        assert np.allclose(after[0][name] - after[1][name], shrunk, atol=1e-5), name
    assert np.array_equal(after[1]["token_embd.weight"], start["token_embd.weight"])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "full-finetune"])
def test_half_precision_computes_with_rounded_copies_of_the_own_weights(backend, gguf, kind, dtype):
    def realize(weight_dtype):
        if kind == "lora":
            return realize_lora(backend, gguf, weight_dtype=weight_dtype)
        recipe = toy.recipes.FullFinetune(*backend)
        return recipe.realize(gguf, None, options(weight_dtype=weight_dtype), freeze_embeddings=True)

    half, exact = realize(dtype), realize("f32")
    rng = np.random.default_rng(4)
    half.load_parameters({name: rng.normal(array, 0.1) for name, array in half.parameters().items()})
    ids, labels = batch()
    for k in range(3):
        present = half.parameters()
        rounded = {name: round_weights(array, dtype) for name, array in present.items()}
        exact.load_parameters(rounded)
        assert np.allclose(half.logits(ids), exact.logits(ids), atol=1e-5)
        exact.load_parameters(present)
        assert not np.allclose(half.logits(ids), exact.logits(ids), atol=1e-5)
        half.step(ids, None, labels, half.adamw(lr=1e-2).hp_for_step(k), is_first=k == 0)


def test_a_file_closed_or_gone_after_realize(backend, tmp_path):
    gguf = make_gguf(tmp_path)
    recipe, expected = realize_lora(backend, gguf), train(realize_lora(backend, gguf), 3)
    gguf.close()
    gguf.path.unlink()
    assert np.array_equal(train(recipe, 3), expected)
    for verb in (
        lambda: realize_lora(backend, gguf),
        lambda: toy.recipes.FullFinetune(*backend).realize(gguf, None, options()),
        lambda: toy.recipes.WarmStart(*backend).realize(gguf, LLAMA, options()),
    ):
        with pytest.raises(ValueError, match="is closed: open it again"):
            verb()


@pytest.mark.parametrize("alpha", [1e300, 1e-300, "much"])
def test_lora_refuses_a_scale_that_float32_has_not(gguf, alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        realize_lora(("numpy", "cpu"), gguf, alpha=alpha)


@pytest.mark.parametrize("option", ["untied", "qkv_bias"])
def test_options_that_the_file_does_not_have(gguf, option):
    for recipe in (lambda o: toy.recipes.LoRA("numpy").realize(gguf, None, 4, o),
                   lambda o: toy.recipes.FullFinetune("numpy").realize(gguf, None, o)):  # fmt: skip
        with pytest.raises(ValueError, match=f"a model that is not {option}: leave {option} False"):
            recipe(options(**{option: True}))


def test_a_row_of_the_other_convention_is_refused(backend, gguf):
    recipe, (ids, labels) = realize_lora(backend, gguf), batch()
    start = recipe.parameters()
    with pytest.raises(ValueError, match="reads the lora convention"):
        recipe.step(ids, None, labels, toy.AdamW.for_from_scratch().hp_for_step(0), is_first=True)
    assert all(np.array_equal(array, start[name]) for name, array in recipe.parameters().items())


def test_moments_are_checked_before_they_are_taken(backend, gguf):
    recipe = realize_lora(backend, gguf)
    train(recipe, 2)
    state = recipe.optimizer_state()
    negative = {name: array - 1 for name, array in state["v"].items()}
    for wrong, message in (
        ({}, "the optimizer state must be"),
        (None, "the optimizer state must be"),
        ({"m": state["m"], "v": {}}, "optimizer state v: the names do not match"),
        ({"m": {name: array + 1 for name, array in state["m"].items()}, "v": negative}, "holds negative numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.load_optimizer_state(wrong)
        now = recipe.optimizer_state()
        assert all(np.array_equal(now[slot][name], array) for slot in "mv" for name, array in state[slot].items())
