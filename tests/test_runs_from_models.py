"""Runs that begin with a model: toy train lora, full-finetune and warm-start. Events, files, exact resume, bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.data import make_tokenizer
from toy.engines.adapters import TARGETS
from toy.files import BadFileError, checkpoints, read_checkpoint, read_events
from toy.files.gguf_write import read_adapter, write_gguf
from toy.models import model_for
from toy.trained import load_trained, read_trained
from toy.trained.export import export_model
from toy.training import RECIPES, FromScratchOptions, FullFinetuneOptions, LoRAOptions, Training, WarmStartOptions

pytest.importorskip("gguf", reason="quantised files need the gguf package")

TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SMALL = {"batch": 2, "context": 16, "eval_batches": 2, "sample_tokens": 5, "lr": 0.01, "warmup": 2, "steps": 20}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Training, "_draw", lambda training: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text, a small llama and a small gpt2 with a character tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = make_tokenizer("char", TEXT)
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 64,
        "n_layers": 2,
        "context_length": 24,
    }
    for config in (toy.LlamaConfig(**sizes, n_kv_heads=2), toy.GPT2Config(**sizes)):
        model = model_for(config)(config, seed=1)
        name = model.arch
        write_gguf(
            folder / f"{name}.gguf", config, model.parameters, tokenizer, type="q8_0" if name == "llama" else "f32"
        )
    return folder


@pytest.fixture
def make(files, backend):
    def make(kind, **changes):
        own = {"corpus": str(files / "text.txt"), "backend": backend.name, "device": backend.device}
        return kind(**{**SMALL, **own, "model": str(files / "llama.gguf"), **changes})

    return make


KINDS = {
    "lora": (LoRAOptions, {"rank": 3, "targets": ("q", "up")}),
    "lora with dropout": (
        LoRAOptions,
        {
            "rank": 3,
            "targets": ("attention", "down"),
            "dropout": 0.2,
            "rslora": True,
            "last_layers": 1,
            "accumulate": 2,
        },
    ),
    "full": (FullFinetuneOptions, {"freeze_embeddings": True}),
    "warm": (WarmStartOptions, {"take": ("blk.*",), "tokenizer": "bytes"}),
    "lens": (WarmStartOptions, {"lens": True, "d_model": 16, "layers": 1, "heads": 2}),
}


def run(options, folder, stop_after=None):
    training = Training(options, out=folder)
    for event in training.run():
        if event.kind == "step" and event.step == stop_after:
            break
    return training


def state(folder):
    checkpoint = read_checkpoint(folder / "weights" / (folder / "weights" / "latest").read_text().strip())
    arrays = {"p": checkpoint.parameters, **checkpoint.moments}
    return checkpoint.step, {(kind, n): a.tobytes() for kind, some in arrays.items() for n, a in some.items()}


def losses(folder):
    return [(e["step"], e["loss"]) for e in read_events(folder / "events.jsonl") if e["kind"] == "step"]


@pytest.mark.parametrize("kind", KINDS)
def test_ten_and_ten_steps_are_twenty(make, tmp_path, kind):
    options = make(KINDS[kind][0], **KINDS[kind][1])
    run(options, tmp_path / "whole")
    run(options, tmp_path / "parts", stop_after=10)
    assert state(tmp_path / "parts")[0] == 10
    for _ in Training.resume(tmp_path / "parts").run():
        pass
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    curve = np.array(losses(tmp_path / "whole"))[:, 1]
    assert curve[-5:].mean() < curve[:5].mean()
    names = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
    assert {"latest", "step_20.safetensors", "step_20.gguf"} <= names


def test_lora_run_leaves_an_adapter(make, files, tmp_path):
    training = run(make(LoRAOptions, rank=3, alpha=6.0, targets=tuple(TARGETS)), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["recipe"], config["arch"]) == ("lora", "llama")
    assert config["lora"] == {"rank": 3, "alpha": 6.0, "targets": list(TARGETS)}
    assert config["base"]["path"] == str(files / "llama.gguf")
    with toy.GGUF.open(files / "llama.gguf") as base:
        adapter = read_adapter(tmp_path / "run" / "weights" / "step_20.gguf", base.config(), base=base)
    assert (adapter.rank, adapter.alpha) == (3, 6.0)
    for name, array in training.recipe.parameters().items():
        assert np.array_equal(adapter.parameters[name], array)
    # what the run's own model says is what the opened run says
    ids = training.tokenizer.encode(TEXT[:16])
    expected = training.model().forward(ids)[0]
    for opened in (
        load_trained(tmp_path / "run", backend="numpy"),
        load_trained(files / "llama.gguf", adapter=tmp_path / "run" / "weights" / "step_20.gguf", backend="numpy"),
    ):
        assert np.abs(opened.model.forward(ids)[0] - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["full", "warm", "lens"])
def test_other_runs_leave_a_whole_model(make, tmp_path, kind):
    training = run(make(KINDS[kind][0], **KINDS[kind][1]), tmp_path / "run")
    ids = training.tokenizer.encode(TEXT[:16])
    expected = training.model().forward(ids)[0]
    for path in (tmp_path / "run", tmp_path / "run" / "weights" / "step_20.gguf"):
        opened = load_trained(path, backend="numpy")
        assert np.abs(opened.model.forward(ids)[0] - expected).max() < 1e-4
        assert opened.tokenizer.decode(opened.tokenizer.encode(TEXT[:50])) == TEXT[:50]


def test_old_gguf_files_go_with_their_checkpoints(files, tmp_path):
    options = LoRAOptions(
        model=str(files / "llama.gguf"), corpus=str(files / "text.txt"), backend="numpy", keep=1, **SMALL
    )
    run(options, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "weights").iterdir()} == {
        "latest", "best", "step_20.safetensors", "step_20.gguf",
    }  # fmt: skip


def test_a_moved_base_is_named_on_resume(files, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(files / "llama.gguf", base)
    options = LoRAOptions(model=str(base), corpus=str(files / "text.txt"), backend="numpy", **SMALL)
    run(options, tmp_path / "run", stop_after=5)
    base.unlink()
    with pytest.raises(FileNotFoundError, match="base"):
        Training.resume(tmp_path / "run")
    with pytest.raises((ValueError, BadFileError)):
        Training.resume(tmp_path / "run", model=str(files / "gpt2.gguf"))
    resumed = Training.resume(tmp_path / "run", model=str(files / "llama.gguf"))
    assert resumed.step == 5


def test_resume_knows_the_kind_of_run(files, tmp_path):
    options = LoRAOptions(model=str(files / "llama.gguf"), corpus=str(files / "text.txt"), backend="numpy", **SMALL)
    run(options, tmp_path / "run", stop_after=5)
    with pytest.raises(ValueError, match="toy train lora --resume"):
        Training.resume(tmp_path / "run", recipe="from-scratch")
    with pytest.raises(ValueError, match="was begun with rank 8"):
        Training.resume(tmp_path / "run", rank=4)


def test_warm_start_of_a_run(files, tmp_path):
    text = str(files / "text.txt")
    first = FromScratchOptions(corpus=text, backend="numpy", d_model=16, layers=1, heads=2, **SMALL)
    run(first, tmp_path / "first")
    second = Training(WarmStartOptions(model=str(tmp_path / "first"), corpus=text, backend="numpy", **SMALL))
    assert second.config == Training(first).config
    start = second.recipe.parameters()
    stored = read_checkpoint(tmp_path / "first" / "weights" / "step_20.safetensors").parameters
    assert all(np.array_equal(start[name], stored[name]) for name in start)


@pytest.mark.parametrize("kind", ["lora", "lens"])
def test_warm_start_of_a_run_that_began_with_a_model(files, tmp_path, kind):
    """Its adapters count, and what it sees through a lens."""
    text, model = str(files / "text.txt"), str(files / "llama.gguf")
    options = KINDS[kind][0](model=model, corpus=text, backend="numpy", **SMALL, **KINDS[kind][1])
    first = run(options, tmp_path / "first")
    second = Training(WarmStartOptions(model=str(tmp_path / "first"), corpus=text, backend="numpy", **SMALL))
    ids = first.tokenizer.encode(TEXT[:16])
    difference = second.model().forward(ids)[0] - first.model().forward(ids)[0]
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_is_on_the_command_line(toy_command, recipe):
    _, out, _ = toy_command("train", recipe, "--help")
    for field in dataclasses.fields(RECIPES[recipe].options_class):
        assert f"--{field.name.replace('_', '-')} " in out


def test_lora_on_the_command_line(toy_command, files, tmp_path):
    common = ["--backend", "numpy", "--steps", 4, "--context", 16, "--eval-batches", 2, "--sample-tokens", 4]
    model, text = ["--model", files / "llama.gguf"], ["--corpus", files / "text.txt"]
    code, out, err = toy_command("train", "lora", *model, *text, *common, "--targets", "q,v", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "rank 8, alpha 8 (on q, v)" in out and "of them are trained" in out and "Q8_0" in out
    code, out, err = toy_command("train", "lora", "--resume", tmp_path / "run", "--steps", 6)
    assert (code, err) == (0, "") and "after step 4" in out


BAD = {
    "no model": ([], "model is missing"),
    "missing model": (["--model", "nowhere.gguf"], "nowhere.gguf"),
    "not fetched": (["--model", "smollm3"], "smollm2-135m"),
    "no matrix of gpt2": (
        ["--model", "{files}/gpt2.gguf", "--targets", "q"],
        "some of qkv, o, up, down: 'q' is not one",
    ),
    "not a model": (["--model", "{files}/text.txt"], "not a GGUF file"),
    "rank": (["--model", "{files}/llama.gguf", "--rank", "0"], "rank must be at least 1"),
    "alpha": (["--model", "{files}/llama.gguf", "--alpha", "-1"], "alpha must be a positive number"),
    "targets": (["--model", "{files}/llama.gguf", "--targets", "q,x"], "'x' is not one"),
    "context": (["--model", "{files}/llama.gguf", "--context", "25"], "context of 25 is too long"),
    "corpus": (["--model", "{files}/llama.gguf", "--context", "16", "--corpus", "nowhere.txt"], "nowhere.txt"),
    "characters": (["--model", "{files}/llama.gguf", "--context", "16"], "character"),  # of the default corpus
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(toy_command, files, tmp_path, monkeypatch, case):
    monkeypatch.setenv("TOY_CACHE", str(tmp_path / "cache"))
    arguments, words = BAD[case]
    arguments = [argument.format(files=files) for argument in arguments]
    code, out, err = toy_command("train", "lora", "--backend", "numpy", *arguments, "--out", tmp_path / "run")
    assert (code, out) == (2, "") and words in err
    assert err.startswith("toy: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_warm_start_refuses_on_the_command_line(toy_command, files, tmp_path):
    for arguments, words in (
        (["--take", "nothing.*"], "no parameter of the model is called like"),
        (["--d-model", "48"], "shape"),
        (["--tokenizer", "bytes"], "token_embd.weight"),
        (["--context", "99"], "too long"),
    ):
        code, _, err = toy_command(
            "train", "warm-start", "--backend", "numpy", "--model", files / "llama.gguf", "--corpus", files / "text.txt",
            *arguments, "--out", tmp_path / "run",
        )  # fmt: skip
        assert code == 2 and words in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_the_donors_tokenizer_is_used_where_it_has_one(files, tmp_path):
    def vocabulary(**changes):
        options = WarmStartOptions(
            **{
                **SMALL,
                "model": str(files / "llama.gguf"),
                "corpus": str(files / "text.txt"),
                "backend": "numpy",
                **changes,
            }
        )
        return next(choice for choice in Training(options).choices() if choice.name == "vocabulary")

    n_characters = len(set(TEXT))
    assert vocabulary()[1:3] == (str(n_characters), "the donor's tokenizer")
    with toy.GGUF.open(files / "llama.gguf") as gguf:
        write_gguf(tmp_path / "bare.gguf", gguf.config(), gguf.parameters(), type="f32")
    bare = {"model": str(tmp_path / "bare.gguf"), "take": ("blk.*",)}
    with pytest.raises(ValueError, match=r"bare.gguf has no tokenizer: choose one with tokenizer char or bytes"):
        vocabulary(**bare)
    assert vocabulary(**bare, tokenizer="char")[1] == str(n_characters)
    assert "donor" not in vocabulary(**bare, tokenizer="bytes")[2]


# ----------------------------------------------------------------------------------------------------------------------
# the model that a run is based on
# ----------------------------------------------------------------------------------------------------------------------


def llama_with(files, path, type="q8_0", change=lambda parameters: None):
    """The llama of `files` as another file: of another type, or with other numbers and the same norm gains."""
    with toy.GGUF.open(files / "llama.gguf") as gguf:
        parameters = gguf.parameters()
        change(parameters)
        write_gguf(path, gguf.config(), parameters, make_tokenizer("char", TEXT), type=type)
    return str(path)


OTHER_BASES = {
    "another type": {"type": "f32"},
    "other numbers": {"change": lambda parameters: parameters["token_embd.weight"].__imul__(1.5)},
}


@pytest.mark.parametrize("other", OTHER_BASES)
@pytest.mark.parametrize("kind", ["lora", "lens"])
def test_a_run_goes_on_with_the_very_weights_it_began_with(files, tmp_path, kind, other):
    base = tmp_path / "base.gguf"
    shutil.copy(files / "llama.gguf", base)
    recipe, changes = KINDS[kind]
    options = recipe(model=str(base), corpus=str(files / "text.txt"), backend="numpy", **SMALL, **changes)
    run(options, tmp_path / "run", stop_after=5)
    stranger = llama_with(files, tmp_path / "stranger.gguf", **OTHER_BASES[other])
    with pytest.raises(ValueError, match="is not the model that the run in"):
        Training.resume(tmp_path / "run", model=stranger)
    shutil.copy(base, tmp_path / "copy.gguf")
    assert Training.resume(tmp_path / "run", model=str(tmp_path / "copy.gguf")).step == 5
    shutil.move(stranger, base)
    with pytest.raises(BadFileError, match="is not the base model that"):
        load_trained(tmp_path / "run")


def test_a_lens_on_a_run_with_a_lens(files, tmp_path):
    common = {"corpus": str(files / "text.txt"), "backend": "numpy", **SMALL, "steps": 3, **KINDS["lens"][1]}
    run(WarmStartOptions(model=str(files / "llama.gguf"), **common), tmp_path / "first")
    training = run(WarmStartOptions(model=str(tmp_path / "first"), **common | {"d_model": 24}), tmp_path / "second")
    ids = training.tokenizer.encode(TEXT[:16])
    expected = training.model().forward(ids)[0]
    for path in (tmp_path / "second", tmp_path / "second" / "weights" / "step_3.gguf"):
        assert np.abs(load_trained(path, backend="numpy").model.forward(ids)[0] - expected).max() < 1e-4


def test_the_merged_export_of_a_run_is_its_model(files, tmp_path):
    own = {"model": str(files / "llama.gguf"), "corpus": str(files / "text.txt"), "backend": "numpy", **SMALL}
    training = run(LoRAOptions(rank=2, alpha=7.0, **own | {"lr": 0.05}), tmp_path / "run")
    export_model(read_trained(tmp_path / "run"), tmp_path / "merged.gguf")
    ids = training.tokenizer.encode(TEXT[:16])
    expected, base = training.model().forward(ids)[0], load_trained(files / "llama.gguf").model.forward(ids)[0]
    assert np.abs(expected - base).max() > 1e-2
    assert np.abs(load_trained(tmp_path / "merged.gguf").model.forward(ids)[0] - expected).max() < 1e-4


def test_a_gguf_file_without_its_checkpoint_goes_on_resume(files, tmp_path, monkeypatch):
    """As a kill, or a full disk, between the two leaves it."""
    own = {"model": str(files / "llama.gguf"), "corpus": str(files / "text.txt"), "backend": "numpy", **SMALL}
    training = Training(LoRAOptions(save_every=5, keep=9, **own | {"eval_every": 100}), out=tmp_path / "run")
    write = checkpoints.write_checkpoint

    def full(path, checkpoint):
        if checkpoint.step == 10:
            raise OSError("No space left on device")
        write(path, checkpoint)

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        list(training.run())
    weights = tmp_path / "run" / "weights"
    assert {path.name for path in weights.glob("step_*")} == {"step_5.safetensors", "step_5.gguf", "step_10.gguf"}
    resumed = Training.resume(tmp_path / "run", save_every=15)
    for event in resumed.run():
        if event.kind == "step":
            assert not (weights / "step_10.gguf").exists()
    assert read_checkpoint(weights / "step_20.safetensors").step == 20


def test_resume_takes_the_same_value_in_other_words(files, tmp_path):
    own = {"model": str(files / "llama.gguf"), "corpus": str(files / "text.txt"), "backend": "numpy", **SMALL}
    run(LoRAOptions(targets=("q", "v"), **own), tmp_path / "run", stop_after=5)
    assert Training.resume(tmp_path / "run", targets=["v", "q"], alpha=8, rank=np.int64(8)).step == 5
    with pytest.raises(ValueError, match="was begun with targets"):
        Training.resume(tmp_path / "run", targets="v")


@pytest.mark.parametrize("recipe", ["lora", "full-finetune"])
def test_a_directory_as_the_model(toy_command, files, tmp_path, recipe):
    code, _, err = toy_command("train", recipe, "--model", files, "--out", tmp_path / "run")
    assert code == 2 and "is a directory" in err and "toy export" in err


def test_a_run_decays_what_it_trains(files, tmp_path):
    own = {
        "model": str(files / "llama.gguf"),
        "corpus": str(files / "text.txt"),
        "backend": "numpy",
        **SMALL,
        "steps": 3,
    }
    norms = []
    for decay in (0.0, 5.0):
        training = run(FullFinetuneOptions(weight_decay=decay, **own), tmp_path / str(decay))
        norms.append({name: np.linalg.norm(array) for name, array in training.recipe.parameters().items()})
    decayed = training.recipe.decayed
    assert all((norms[1][name] < 0.95 * norm) == (name in decayed) for name, norm in norms[0].items())


@pytest.mark.parametrize("recipe", [LoRAOptions, FullFinetuneOptions])
def test_a_run_on_a_file_needs_a_context(recipe):
    with pytest.raises(ValueError, match="context must be a whole number, got None"):
        recipe(model="model.gguf", context=None)
