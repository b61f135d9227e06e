"""The front door in Python: toy.load of everything that holds a model, recipe.save, and what objects say of themselves."""

import copy
import gc
import inspect
import math
import pickle
import pydoc
import re
import weakref

import numpy as np
import pytest
from fetch_test_data import COMMAND, smollm2
from image_files import CLASSES, stripes, write_idx
from single_thread import single_thread  # noqa: F401 (autouse)
from threadpoolctl import threadpool_info

import toy
from toy import switch
from toy.data import ByteTokenizer
from toy.data.images import Normalisation, load_images
from toy.files import BadFileError
from toy.files.gguf_write import write_gguf
from toy.models import model_for
from toy.models.parameters import ParameterTree
from toy.trained import Loaded, LoadedClassifier
from toy.training import FromScratchOptions, LoRAOptions, Training
from toy.training.vit_tiny import ViTTinyOptions

pytest.importorskip("scipy.ndimage")  # brings a BLAS of its own: loaded before thread counts are compared
pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

import model_files

T, B = 7, 2
V = model_files.tokenizer().vocab_size
SIZES = {"d_model": 12, "n_heads": 3, "d_ff": 20, "n_layers": 2, "context_length": 10}
OPTIONS = toy.RecipeOptions(t_seq=T, t_batch=B, seed=1)
VIT = toy.ViTConfig(6, 1, 3, 8, 2, 12, 1, len(CLASSES))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return model_files.write_files(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Training, "_draw", lambda training: None)


def batch(vocab_size=V):
    ids = np.random.default_rng(0).integers(0, vocab_size, (B, T + 1))
    return ids[:, :-1], ids[:, 1:]


def train(recipe, inputs, labels, steps=3):
    adamw = recipe.adamw(lr=0.02)
    for k in range(steps):
        recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
    return recipe


def assert_close(given, wanted):
    assert given.dtype == np.float32 and given.shape == wanted.shape
    assert wanted.std() > 0.01  # not a model that predicts nothing, with which anything would agree
    np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


# ----------------------------------------------------------------------------------------------------------------------
# recipe.save, and toy.load of it
# ----------------------------------------------------------------------------------------------------------------------


def from_scratch(backend, gguf, config):
    return toy.recipes.FromScratch(*backend).realize(config, OPTIONS)


def warm_start(backend, gguf, **more):
    config = toy.LlamaConfig(V, 32, 4, 2, 64, 2, 24)
    return toy.recipes.WarmStart(*backend).realize(gguf, config, OPTIONS, **more)


def lens(backend, gguf):
    config = toy.LlamaConfig(V, 16, 2, 1, 24, 1, 12)
    return toy.recipes.WarmStart(*backend).realize(gguf, config, OPTIONS, lens=True)


def llama_engine(backend, gguf):
    engine = toy.engines.LlamaSeqEngine(*backend).realize_for_mmap(gguf, t_seq=T, t_batch=B)
    return engine.enable_lora_q(2).enable_lora_q_adamw().upload_lora_q_init(seed=3)


def llama_engine_finetuned(backend, gguf):
    return toy.engines.LlamaSeqEngine(*backend).realize_for_mmap(gguf, t_seq=T, t_batch=B).enable_full_finetune()


RECIPES = {  # functions of (backend, the open llama.gguf) that give a realized recipe
    "transformer": lambda b, g: from_scratch(b, g, toy.TransformerConfig(V, **SIZES)),
    "gpt2": lambda b, g: from_scratch(b, g, toy.GPT2Config(V, **SIZES)),
    "llama": lambda b, g: from_scratch(b, g, toy.LlamaConfig(V, n_kv_heads=1, **SIZES)),
    "llama-untied": lambda b, g: from_scratch(b, g, toy.LlamaConfig(V, n_kv_heads=3, **SIZES, untied=True, qkv_bias=True)),
    "lora": lambda b, g: toy.recipes.LoRA(*b).realize(g, None, 3, OPTIONS, alpha=6.0, targets=("q", "down")),
    "full-finetune": lambda b, g: toy.recipes.FullFinetune(*b).realize(g, None, OPTIONS),
    "frozen-embeddings": lambda b, g: toy.recipes.FullFinetune(*b).realize(g, None, OPTIONS, freeze_embeddings=True),
    "warm-start": warm_start,
    "warm-start-of-some": lambda b, g: warm_start(b, g, take="blk.*"),
    "lens": lens,
    "gpt2-engine": lambda b, g: toy.engines.GPT2SeqEngine(*b).realize(V, 12, 3, 20, 2, 10, t_seq=T, t_batch=B),
    "llama-engine": llama_engine,
    "llama-engine-finetuned": llama_engine_finetuned,
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_what_a_recipe_saves_is_loaded_as_what_it_was(files, backend, tmp_path, kind):
    ids, labels = batch()
    with toy.GGUF.open(files / "llama.gguf") as gguf:
        recipe = train(RECIPES[kind](backend, gguf), ids, labels)
    wanted = recipe.logits(ids)
    path = tmp_path / "model.safetensors"
    recipe.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with toy.load(path, backend=backend.name) as loaded:
        assert isinstance(loaded, Loaded) and type(loaded.config) is type(recipe.config)
        assert loaded.path == path and loaded.config == loaded.model.config
        assert_close(loaded.logits(ids), wanted)
        assert_close(loaded.logits(ids[0]), wanted[0])
        inherits = kind in ("lora", "llama-engine")  # it needs its base, which has a tokenizer
        assert (loaded.tokenizer is not None) == inherits
        if not inherits:
            for use in (lambda: loaded.generate("hello", 3), lambda: loaded.evaluate("hello")):
                with pytest.raises(ValueError, match=r"model\.safetensors has no tokenizer"):
                    use()
    with toy.GGUF.open(files / "llama.gguf") as gguf:  # the training can be gone on with
        again = RECIPES[kind](backend, gguf)
        again.load_parameters(recipe.parameters())
        assert np.array_equal(again.logits(ids), wanted)


def test_a_saved_model_reads_and_writes_with_its_tokenizer(files, tmp_path):
    recipe = from_scratch(("numpy", "cpu"), None, toy.GPT2Config(256, **SIZES))
    recipe.save(tmp_path / "bytes.safetensors", tokenizer=ByteTokenizer())
    with toy.load(tmp_path / "bytes.safetensors") as loaded:
        assert len(loaded.generate("ab", 5)) >= 1 and math.isfinite(loaded.evaluate("hello there").loss)
    with toy.GGUF.open(files / "llama.gguf") as gguf:
        recipe = RECIPES["full-finetune"](("numpy", "cpu"), gguf)
        loaded_tokenizer = toy.load(files / "llama.gguf").tokenizer
        recipe.save(tmp_path / "tuned.safetensors", tokenizer=loaded_tokenizer)
    with toy.load(tmp_path / "tuned.safetensors") as loaded:
        assert loaded.tokenizer.encode("hello 12").tolist() == loaded_tokenizer.encode("hello 12").tolist()
        assert isinstance(loaded.generate("hello", 4), str)


def test_adapters_on_a_base_without_a_tokenizer(tmp_path):
    config = toy.LlamaConfig(256, n_kv_heads=1, **SIZES)
    write_gguf(tmp_path / "base.gguf", config, toy.Llama(config, init_scale=9.0).parameters)
    ids, labels = batch(256)
    with toy.GGUF.open(tmp_path / "base.gguf") as gguf:
        recipe = train(toy.recipes.LoRA("numpy").realize(gguf, None, 2, OPTIONS), ids, labels)
    for tokenizer in (None, ByteTokenizer()):
        recipe.save(tmp_path / "adapters", tokenizer=tokenizer)
        with toy.load(tmp_path / "adapters", backend="numpy") as loaded:
            assert type(loaded.tokenizer) is type(tokenizer)
            assert_close(loaded.logits(ids), recipe.logits(ids))
            if tokenizer is not None:
                assert len(loaded.generate("ab", 3, temperature=0)) >= 1


def test_saving_refuses_what_could_not_be_opened_again(files, tmp_path):
    recipe = from_scratch(("numpy", "cpu"), None, toy.GPT2Config(V, **SIZES))
    with pytest.raises(RuntimeError, match="call realize"):
        toy.recipes.FromScratch("numpy").save(tmp_path / "a")
    with pytest.raises(ValueError, match="the tokenizer has 256 ids and the model 266: they do not fit"):
        recipe.save(tmp_path / "a", tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match=r"a\.gguf: what is written is no GGUF file"):
        recipe.save(tmp_path / "a.gguf")
    with pytest.raises(OSError, match="nowhere"):
        recipe.save(tmp_path / "nowhere" / "a")
    donor = {"token_embd.weight": np.random.default_rng(0).normal(size=(V, 9)).astype(np.float32)}
    looking = toy.recipes.WarmStart("numpy").realize(donor, toy.LlamaConfig(V, 16, 2, 1, 24, 1, 12), OPTIONS, lens=True)
    with pytest.raises(ValueError, match="weights that are in no file"):
        looking.save(tmp_path / "a")
    adapters = toy.engines.LlamaSeqEngine("numpy").realize_for_random_init(toy.LlamaConfig(V, n_kv_heads=1, **SIZES), T)
    with pytest.raises(ValueError, match="weights that are in no file"):
        adapters.enable_lora_q(2).enable_lora_q_adamw().save(tmp_path / "a")
    vit = toy.recipes.FromScratch("numpy").realize(VIT, toy.RecipeOptions(VIT.n_tokens))
    with pytest.raises(ValueError, match="a vit reads no text"):
        vit.save(tmp_path / "a", tokenizer=ByteTokenizer())
    assert not list(tmp_path.iterdir())
    recipe.save(tmp_path / "a")
    recipe.save(tmp_path / "a")  # over the older one
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- an image model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures():
    images, labels = stripes(12)
    return images[..., None].astype(np.float32) / 255, labels


def test_a_saved_vision_transformer(backend, tmp_path, pictures, monkeypatch):
    images, labels = pictures
    normalise = Normalisation.of(images)
    recipe = toy.recipes.ViTTiny(*backend).realize(VIT, t_batch=12)
    train(recipe, normalise(images), labels, steps=30)
    wanted = recipe.logits(normalise(images))
    recipe.save(tmp_path / "named", classes=CLASSES, normalisation=normalise)
    with toy.load(tmp_path / "named", backend=backend.name) as loaded:
        assert isinstance(loaded, LoadedClassifier)
        assert loaded.classes == CLASSES and loaded.tokenizer is None and loaded.config == VIT
        assert_close(loaded.logits(images), wanted)
        with pytest.raises(ValueError, match="is of no run, so it has no test part of its own"):
            loaded.evaluate()
        folder = write_idx(tmp_path / "idx")
        with pytest.raises(ValueError, match="has the classes 0, 1, 2, the model diagonal, down, across"):
            loaded.evaluate(folder)
    recipe.save(tmp_path / "plain")  # numbered classes, pixels as they are
    with toy.load(tmp_path / "plain", backend=backend.name) as loaded:
        assert loaded.classes == ("0", "1", "2")
        assert_close(loaded.logits(images), recipe.logits(images))
        data = load_images(folder)
        found = loaded.evaluate(folder)
        right = (loaded.logits(data.images).argmax(axis=1) == data.labels).mean()
        assert found.n_images == 33 and found.accuracy == right
    engine = toy.engines.ViTTinyEngine(*backend).realize(6, 1, 3, 8, 2, 12, 1, 3, t_batch=12)
    engine.load_parameters(recipe.parameters())
    engine.save(tmp_path / "engine")
    assert_close(toy.load(tmp_path / "engine", backend=backend.name).logits(images), recipe.logits(images))


def test_a_vision_transformer_is_saved_with_the_right_names_only(tmp_path):
    recipe = toy.recipes.ViTTiny("numpy").realize(VIT)
    for wrong, message in (
        ({"classes": ("a", "b")}, "there are 2 names, the model has 3 classes"),
        ({"normalisation": (0.0, 0.0)}, "a standard deviation above 0, got 0.0"),
        ({"normalisation": (math.nan, 1.0)}, "normalisation must be a mean"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.save(tmp_path / "a", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_image_run_is_loaded(tmp_path):
    pytest.importorskip("PIL", reason="pillow is not installed (pip install pillow)")
    from image_files import write_images

    folder = write_images(tmp_path / "pictures")
    options = ViTTinyOptions(data=str(folder), d_model=8, heads=2, layers=1, steps=3, batch=8, backend="numpy")
    training = Training(options, out=tmp_path / "run")
    *_, evaluation, _ = training.run()
    loaded = toy.load(tmp_path / "run")
    assert loaded.step == 3 and loaded.classes == tuple(sorted(CLASSES))
    found = loaded.evaluate()
    assert (found.accuracy, found.n_images) == (evaluation.accuracy, len(training.start.test))
    assert found.loss == pytest.approx(evaluation.loss, abs=1e-5)
    path = folder / "down" / "001.png"
    assert loaded.predict([path])[0].name in CLASSES
    model = weakref.ref(loaded.model)
    loaded.close()
    gc.collect()
    assert model() is None
    for use in (lambda: loaded.predict([path]), lambda: loaded.evaluate(), lambda: loaded.logits(np.zeros((1, 6, 6)))):
        with pytest.raises(RuntimeError, match=r"closed: toy\.load it again"):
            use()


# ----------------------------------------------------------------------------------------------------------------------
# toy.load of what else there is
# ----------------------------------------------------------------------------------------------------------------------

IDS = np.array([5, 77, 200, 3, 41, 9])


@pytest.fixture
def run_folder(tmp_path):
    """A run from scratch and its Training."""
    text = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    options = FromScratchOptions(
        corpus=str(tmp_path / "text.txt"), d_model=16, layers=1, heads=2, context=16, batch=4, steps=30, lr=0.01,
        eval_batches=1, sample_tokens=5, backend="numpy",
    )  # fmt: skip
    training = Training(options, out=tmp_path / "run")
    for _ in training.run():
        pass
    return training, tmp_path / "run"


def test_a_run_and_its_checkpoint(run_folder):
    training, folder = run_folder
    checkpoint = folder / "weights" / (folder / "weights" / "latest").read_text().strip()
    ids = np.arange(12).reshape(2, 6)
    for path in (folder, str(folder), checkpoint):
        loaded = toy.load(path, backend="numpy")
        assert loaded.step == 30 and loaded.config == training.config
        assert loaded.tokenizer.encode("12").tolist() == training.tokenizer.encode("12").tolist()
        assert_close(loaded.logits(ids), training.model().forward(ids)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gguf_file(files, backend, name):
    from toy.engines import model_from

    with toy.GGUF.open(files / f"{name}.gguf") as gguf:
        dense = model_from(gguf.config(), gguf.parameters(), "numpy")
    with toy.load(files / f"{name}.gguf", backend=backend.name) as loaded:
        assert loaded.step is None and loaded.model.arch == name
        assert_close(loaded.logits(IDS), dense.forward(IDS)[0])
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello 12")) == "hello 12"


def test_an_adapter(files, backend):
    with (
        toy.load(files / "llama.gguf", backend=backend.name) as plain,
        toy.load(files / "llama.gguf", adapter=files / "adapter.gguf", backend=backend.name) as adapted,
    ):
        assert adapted.model.lora_scale == model_files.ALPHA / model_files.RANK
        assert np.abs(adapted.logits(IDS) - plain.logits(IDS)).max() > 0.1
        tree = dict(plain.model.parameters.items()) | model_files.adapters()
        scale = model_files.ALPHA / model_files.RANK
        wanted = toy.Llama(plain.config, ops=plain.model.ops, parameters=ParameterTree(tree), lora_scale=scale)
        assert_close(adapted.logits(IDS), wanted.forward(IDS)[0])


def test_a_lora_run(files, tmp_path):
    (tmp_path / "text.txt").write_text("hello 12 hello, hello. " * 60)
    options = LoRAOptions(
        model=str(files / "llama.gguf"), corpus=str(tmp_path / "text.txt"), batch=2, context=8, steps=3, eval_batches=1,
        lr=0.05, rank=2, backend="numpy",
    )  # fmt: skip
    training = Training(options, out=tmp_path / "run")
    for _ in training.run():
        pass
    with toy.load(tmp_path / "run", backend="numpy") as loaded:
        assert_close(loaded.logits(IDS), training.model().forward(IDS)[0])
        assert isinstance(loaded.generate("hello", 3), str)
    with pytest.raises(ValueError, match="has an adapter of its own already"):
        toy.load(tmp_path / "run", adapter=files / "adapter.gguf")


def test_the_name_of_a_fetched_model():
    if smollm2() is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    if switch._describe("cython").available is False:
        pytest.skip("numpy would dequantise the whole model")
    with toy.load("smollm2-135m") as loaded:
        ids = loaded.tokenizer.encode("The capital of France is")
        assert loaded.logits(ids).shape == (len(ids), loaded.config.vocab_size)
        assert loaded.generate("The capital of France is", 1, temperature=0) == " Paris"


def test_logits_evaluate_and_generate_agree(run_folder):
    _, folder = run_folder
    with toy.load(folder, backend="numpy") as loaded:
        text = "7 squared is 49"
        ids = loaded.tokenizer.encode(text)
        logits = loaded.logits(ids[:-1]).astype(np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        found = loaded.evaluate(text)
        assert found.n_tokens == len(ids) - 1
        assert found.loss == pytest.approx(losses.mean(), abs=1e-5)
        assert found.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / (len(text) - 1), abs=1e-5)
        assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert loaded.evaluate(text, limit=5).n_tokens == 4

        greedy = loaded.generate("7 squared", 5, temperature=0)
        written = list(loaded.tokenizer.encode("7 squared"))
        for _ in range(5):
            written.append(int(loaded.logits(written)[-1].argmax()))
        assert greedy == loaded.tokenizer.decode(written[-5:])  # without the prompt
        drawn = {seed: loaded.generate("7", 30, temperature=2.0, seed=seed) for seed in (0, 1)}
        assert drawn[0] != drawn[1] and drawn[0] == loaded.generate("7", 30, temperature=2.0, seed=0)
        assert loaded.generate("7", 9, temperature=3.0, top_k=1) == loaded.generate("7", 9, temperature=0)
        assert len(loaded.generate(n_tokens=7)) == 7  # of characters, after a new line
        assert loaded.generate("7", 0) == ""
        with pytest.raises(ValueError, match="n_tokens must be at least 0"):
            loaded.generate("7", -1)
        with pytest.raises(ValueError, match="prompt"):
            loaded.generate("éé")  # not in the text it was trained on
        with pytest.raises(ValueError, match="nothing to predict"):
            loaded.evaluate("7")
        with pytest.raises(ValueError, match=r"token_ids must lie in"):
            loaded.logits([loaded.config.vocab_size])


def test_a_text_ends_where_the_model_ends_it(files, monkeypatch):
    with toy.load(files / "gpt2.gguf", backend="numpy") as loaded:
        free = loaded.generate("hello", 6, temperature=0)
        first = int(loaded.logits(loaded.tokenizer.encode("hello"))[-1].argmax())
        monkeypatch.setattr(loaded.tokenizer, "stop_ids", frozenset([first]))
        assert loaded.generate("hello", 6, temperature=0) == "" != free


def test_a_closed_model_is_let_go_of(files):
    loaded = toy.load(files / "llama.gguf")
    model = weakref.ref(loaded.model)
    assert loaded.logits(IDS).shape == (6, V)
    loaded.close()
    loaded.close()
    gc.collect()
    assert model() is None
    for use in (lambda: loaded.logits(IDS), lambda: loaded.generate("hello", 1), lambda: loaded.evaluate("hello")):
        with pytest.raises(RuntimeError, match=r"closed: toy\.load it again"):
            use()
    assert "closed" in repr(loaded)
    with pytest.raises(ZeroDivisionError), toy.load(files / "llama.gguf") as other:
        1 / 0  # noqa: B018 (the error is the point)
    assert other.model is None


@pytest.mark.parametrize(
    ("model", "adapter", "error", "message"),
    [
        ("nowhere.gguf", None, FileNotFoundError, r"no run directory, checkpoint or GGUF file .*nowhere\.gguf"),
        ("damaged.gguf", None, BadFileError, r"damaged\.gguf.*is cut off"),
        ("adapter.gguf", None, ValueError, "is not a model: its general.type is 'adapter'"),
        ("", None, ValueError, "is not a run directory"),
        ("llama.gguf", "other.gguf", ValueError, r"other\.gguf is an adapter for another base"),
        ("gpt2.gguf", "adapter.gguf", ValueError, "it is for a llama model, not gpt2"),
        ("llama.gguf", "nowhere.gguf", FileNotFoundError, r"nowhere\.gguf"),
    ],
)
def test_what_cannot_be_loaded_is_named(files, model, adapter, error, message):
    with pytest.raises(error, match=message):
        toy.load(files / model, None if adapter is None else files / adapter)


def test_what_was_saved_and_is_damaged_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    from_scratch(("numpy", "cpu"), None, toy.GPT2Config(V, **SIZES)).save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)
    with pytest.raises(BadFileError, match=r"model\.safetensors: the checksum does not match"):
        toy.load(path)


def test_an_unknown_backend_is_told_first(files):
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        toy.load(files / "nowhere.gguf", backend="cuda")


# ----------------------------------------------------------------------------------------------------------------------
# what objects say of themselves
# ----------------------------------------------------------------------------------------------------------------------

CONFIGS = [
    toy.TransformerConfig(V, **SIZES),
    toy.GPT2Config(V, **SIZES),
    toy.LlamaConfig(V, n_kv_heads=1, **SIZES),
    VIT,
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_the_repr_of_a_model_is_a_tree_of_names_shapes_and_counts(config):
    model = model_for(config)(config)
    total = sum(array.size for _, array in model.parameters.items())
    text = repr(model)
    assert text.startswith(f"{type(model).__name__}({config}")
    assert f"{total:,} parameters" in text
    rows = {}  # of the lines that end with a shape and a count
    for line in text.splitlines():
        *name, count = line.split()
        if "x" in name or (len(name) >= 2 and name[-1].isdigit()):
            rows[name[0]] = (" ".join(name[1:]), int(count.replace(",", "")))
    last = config.n_layers - 1
    for name, array in model.parameters.items():
        inner = re.sub(r"^\w+\.\d+\.", "", name)  # inside of a block
        assert rows[inner] == (" x ".join(map(str, array.shape)), array.size), name
    each = f"blk.0 to blk.{last}, each" if last and "blk" in text else f"blocks.0 to blocks.{last}, each"
    assert each in text or last == 0
    for tree in (model.parameters, model.new_gradients()):
        assert repr(tree).splitlines()[1:] == model.parameters.summary().splitlines()[1:]
        assert repr(tree).startswith(type(tree).__name__) and f"{total:,} parameters" in repr(tree)


def test_the_repr_shows_a_block_that_is_another(files):
    tree = ParameterTree(
        {"a.0.w": np.zeros((2, 3)), "a.1.w": np.zeros((2, 3)), "a.2.w": np.zeros((2, 4)), "b": np.zeros(5)}
    )
    lines = [" ".join(line.split()) for line in repr(tree).splitlines()]
    assert lines == [
        "ParameterTree: 25 parameters",
        "b 5 5",
        "a.0 to a.1, each: 6", "w 2 x 3 6",
        "a.2: 8", "w 2 x 4 8",
    ]  # fmt: skip
    with toy.load(files / "llama.gguf", adapter=files / "adapter.gguf") as loaded:
        text = repr(loaded)
        assert text.startswith("toy.load('") and "llama.gguf" in text and "LlamaConfig" in text
        assert "attn_q.lora_a" in text and "ffn_gate.weight" in text  # quantised ones too
    assert "GPT2" in repr(toy.load(files / "gpt2.gguf"))


def test_a_transformer_is_made_of_a_config_or_of_its_sizes():
    config = toy.TransformerConfig(V, **SIZES)
    made = toy.TransformerLM(config, seed=3)
    by_size = toy.TransformerLM(V, 12, 20, 3, 2, 10, seed=3)
    by_keyword = toy.TransformerLM(vocab_size=V, d_model=12, d_ff=20, n_heads=3, n_layers=2, context_length=10, seed=3)
    for other in (by_size, by_keyword, toy.TransformerLM.from_config(config, seed=3)):
        assert other.config == config == made.config
        assert all(np.array_equal(array, other.parameters[name]) for name, array in made.parameters.items())
    assert toy.TransformerLM(config, dtype=np.float64).parameters.dtype == np.float64
    with pytest.raises(TypeError, match="a config or the sizes, not both"):
        toy.TransformerLM(config, 12)
    with pytest.raises(TypeError, match="TransformerLM takes a TransformerConfig, got a GPT2Config"):
        toy.TransformerLM(toy.GPT2Config(V, **SIZES))
    with pytest.raises(ValueError, match="n_heads must divide"):
        toy.TransformerLM(V, 12, 20, 5, 2, 10)


# -- AdamW -------------------------------------------------------------------------------------------------------------


def test_the_two_conventions_have_plain_names():
    for plain, by_recipe, mode in (
        (toy.AdamW.bias_corrected, toy.AdamW.for_lora, toy.AdamW.MODE_LORA),
        (toy.AdamW.constant_slots, toy.AdamW.for_from_scratch, toy.AdamW.MODE_FROM_SCRATCH),
    ):
        assert plain() == by_recipe() and plain().mode == mode
        given = {"lr": 0.25, "beta1": 0.5, "beta2": 0.75, "eps": 1e-3, "weight_decay": 0.125}
        assert plain(**given) == by_recipe(**given) == toy.AdamW(**given, bias_correct=plain().bias_correct, mode=mode)
    corrected = toy.AdamW.bias_corrected(beta1=0.5, beta2=0.75)
    assert corrected.hp_for_step(1)[0, 5:].tolist() == pytest.approx([1 / (1 - 0.5**2), 1 / (1 - 0.75**2)])
    assert toy.AdamW.constant_slots(beta1=0.5, beta2=0.75).hp_for_step(1)[0, 5:].tolist() == [0.5, 0.75]
    assert toy.AdamW.bias_corrected().beta2 == 0.999 and toy.AdamW.constant_slots().beta2 == 0.95
    formula = ["m = beta1*m + (1-beta1)*g", "v = beta2*v + (1-beta2)*g*g", "lr * (m*s5) / (sqrt(v*s6) + eps)"]
    assert all(line in toy.AdamW.__doc__ for line in formula)


@pytest.mark.parametrize("make", [toy.AdamW.bias_corrected, toy.AdamW.constant_slots])
def test_a_row_keeps_its_mode(make):
    row = make(lr=0.5).hp_for_step(2)
    copies = {f"pickle {p}": pickle.loads(pickle.dumps(row, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    copies |= {"copy": copy.copy(row), "deepcopy": copy.deepcopy(row), "method": row.copy(), "view": row[:]}
    for name, other in copies.items():
        assert type(other) is type(row) and other.mode == row.mode, name
        assert np.array_equal(other, row) and other.dtype == np.float32 and other.shape == (1, 7), name
    assert not hasattr(np.array(row), "mode")  # a plain array is taken as it is
    recipe = from_scratch(("numpy", "cpu"), None, toy.GPT2Config(V, **SIZES))  # reads the bias-corrected one
    ids, labels = batch()
    for other in copies.values():
        if make.__name__ == "bias_corrected":
            recipe.step(ids, labels=labels, hp=other, is_first=True)
        else:
            with pytest.raises(ValueError, match="slots 5 and 6"):
                recipe.step(ids, labels=labels, hp=other, is_first=True)


# -- recipes and engines -----------------------------------------------------------------------------------------------

HANDLES = [
    *(getattr(toy.recipes, name) for name in toy.recipes.__all__),
    *(cls for name in toy.engines.__all__ if inspect.isclass(cls := getattr(toy.engines, name))),
]
METHODS = (
    "step", "evaluate", "logits", "adamw", "parameters", "load_parameters", "gradients", "optimizer_state",
    "load_optimizer_state", "save", "model_copy", "explain", "close",
)  # fmt: skip
PROPERTIES = ("config", "options", "arch", "model_class", "hp_mode", "n_parameters", "n_trained", "grad_norm")


@pytest.mark.parametrize("kind", HANDLES, ids=lambda kind: kind.__name__)
def test_what_a_recipe_can_do_is_there_to_be_read(kind):
    assert not hasattr(kind, "__getattr__")
    for name in METHODS:
        method = getattr(kind, name)
        assert inspect.isfunction(method) and inspect.getdoc(method), name
        assert f" {name}(" in pydoc.render_doc(kind, renderer=pydoc.plaintext)  # what help() shows
    for name in PROPERTIES:
        assert isinstance(inspect.getattr_static(kind, name), property) and inspect.getdoc(getattr(kind, name)), name
    assert [*inspect.signature(kind.step).parameters] == ["self", "token_ids", "positions", "labels", "hp", "is_first"]
    assert "ONE training step" in inspect.getdoc(kind.step)


def test_looking_at_an_engine_builds_nothing(monkeypatch):
    engine = toy.engines.LlamaSeqEngine("numpy").realize_for_random_init(toy.LlamaConfig(V, n_kv_heads=1, **SIZES), T)
    assert not hasattr(engine, "foo") and engine.engine is None
    with pytest.raises(AttributeError, match="foo"):
        engine.foo  # noqa: B018 (looking is the point)
    assert "step" in dir(engine) and engine.engine is None
    assert repr(engine) and callable(engine.step) and engine.engine is None
    assert engine.n_parameters > 0 and engine.engine is not None  # this needs the model


@pytest.mark.parametrize("kind", ["transformer", "lora"])
def test_an_engine_is_closed_at_the_end_of_its_block(files, backend, kind):
    ids, labels = batch()
    with toy.GGUF.open(files / "llama.gguf") as gguf:
        recipe = RECIPES[kind](backend, gguf)
    with recipe as entered:
        assert entered is recipe
        train(recipe, ids, labels, steps=1)
        assert str(recipe.explain())
    recipe.close()
    if backend.name == "ggml":
        with pytest.raises(RuntimeError, match="closed"):
            recipe.step(ids, labels=labels, hp=recipe.adamw().hp_for_step(1))


# -- threads -----------------------------------------------------------------------------------------------------------


def thread_counts():
    blas = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    return switch.num_threads(), {row.name: row.threads for row in switch.backends()}, blas


def test_making_a_training_changes_no_thread_count(tmp_path, backend, monkeypatch):
    folder = write_idx(tmp_path / "idx")
    before = thread_counts()
    assert set(before[2].values()) == {1}
    seen = []
    realize = toy.recipes.ViTTiny.realize
    monkeypatch.setattr(
        toy.recipes.ViTTiny, "realize", lambda *a, **k: seen.append(thread_counts()) or realize(*a, **k)
    )
    options = ViTTinyOptions(
        data=str(folder), d_model=8, heads=2, layers=1, steps=2, batch=4, threads=2, backend=backend.name,
        device=backend.device,
    )  # fmt: skip
    training = Training(options)
    assert thread_counts() == before
    assert seen[0][0] == 2 and seen[0][1]["numpy"] == 2  # the count was there while it was needed
    counts = [thread_counts()[0] for _ in training.run()]
    assert set(counts) == {2} and thread_counts() == before
    with pytest.raises(ValueError, match="n_heads must divide"):
        Training(ViTTinyOptions(data=str(folder), d_model=8, heads=3, threads=2, backend=backend.name))
    assert thread_counts() == before
    training = Training(options)
    for _ in training.run():
        break  # left in the middle
    gc.collect()
    assert thread_counts() == before
