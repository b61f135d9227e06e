"""toy generate, eval and export as a user meets them, on GGUF files, adapters and LoRA runs (plain runs: test_cli.py)."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

import model_files

import toy
from toy.data import load_corpus
from toy.data.encoding import Encoder
from toy.files import read_events
from toy.files.gguf import GGUF
from toy.files.gguf_write import read_adapter
from toy.models.generation import generate
from toy.trained.evaluate import evaluate_text
from toy.trained.load import chat_prompt, load_trained

TEXT = "hello 12, hello. Größe 3 €\n" * 12


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return model_files.write_files(tmp_path)


@pytest.fixture
def lora_run(files, toy_command):
    sizes = ["--batch=2", "--context=8", "--eval-batches=1", "--sample-tokens=3", "--steps=3", "--lr=0.05", "--rank=4"]
    code, _, err = toy_command("train", "lora", "--model=llama.gguf", "--corpus=text.txt", *sizes, "--out=run")
    assert code == 0, err
    return Path("run")


def one_sentence(text):
    return text.startswith("toy: ") and text.count("\n") == 1 and "Traceback" not in text


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_from_a_gguf_file_with_and_without_an_adapter(files, toy_command):
    texts = []
    for adapter in ([], ["--adapter=adapter.gguf"]):
        code, out, err = toy_command(
            "generate", "llama.gguf", *adapter, "--prompt=hello", "--tokens=12", "--temperature=0"
        )
        assert (code, err) == (0, "")
        assert out.startswith("hello")
        trained = load_trained("llama.gguf", adapter[0].partition("=")[2] if adapter else None)
        ids = generate(trained.model, trained.tokenizer.encode("hello"), 12, 0, stop_ids=trained.tokenizer.stop_ids)
        assert out == "hello" + "".join(trained.tokenizer.stream(ids)) + "\n"
        texts.append(out)
    assert texts[0] != texts[1]


def test_generate_stops_at_the_end_token(files, toy_command):
    trained = load_trained("llama.gguf")
    ids = trained.tokenizer.encode("hello")
    free = list(generate(trained.model, ids, 12, 0))
    end = {"tokenizer.ggml.eos_token_id": free[4]}
    model_files.write_model(files / "ending.gguf", tokenizer=model_files.tokenizer(**end))
    _, out, _ = toy_command("generate", "ending.gguf", "--prompt=hello", "--tokens=12", "--temperature=0")
    assert out == "hello" + "".join(trained.tokenizer.stream(free[: free.index(free[4])])) + "\n"


def test_chat_answers_alone(files, toy_command):
    code, out, err = toy_command("generate", "llama.gguf", "--chat", "--prompt=hi", "--tokens=5", "--temperature=0")
    trained = load_trained("llama.gguf")
    ids = chat_prompt(trained.tokenizer, "hi", model_files.CONTEXT)
    answer = generate(trained.model, ids, 5, 0, stop_ids=trained.tokenizer.stop_ids)
    assert (code, out, err) == (0, "".join(trained.tokenizer.stream(answer)) + "\n", "")


def test_the_speed_is_told_on_a_terminal_only(files, toy_command, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    _, out, err = toy_command("generate", "llama.gguf", "--prompt=hello 12", "--tokens=6")
    assert re.search(r"prompt 4 tokens, \S+ tok/s; generated \d tokens", err), err
    assert "tok/s" not in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["llama.gguf", "--chat"], "--chat needs a message"),
        (["llama.gguf", "--chat", "--prompt=" + "long " * 30], "with the chat template, and the model's context is 24"),
        (["llama.gguf", "--prompt="], "prompt is empty"),
        (["llama.gguf", "--adapter=other.gguf"], "other.gguf is an adapter for another base"),
        (["llama.gguf", "--adapter=nowhere.gguf"], "nowhere.gguf"),
        (["gpt2.gguf", "--adapter=adapter.gguf"], "it is for a llama model, not gpt2"),
        (["mute.gguf"], "mute.gguf has no tokenizer"),
        (["adapter.gguf"], "is not a model"),
        (["damaged.gguf"], "is cut off"),
        (["smollm3"], "there is no run directory, checkpoint or GGUF file 'smollm3'"),
    ],
)
def test_generate_refuses_bad_input(files, toy_command, arguments, problem):
    code, out, err = toy_command("generate", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True), err
    assert problem in err


def test_a_sample_of_a_run_on_conversations_answers_its_prompt(files, toy_command):
    """The prompt is a message there, in a run on text it is text."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    talks = [[turn | {"content": turn["content"] + end} for turn in turns] for end in "ab"]
    Path("talk.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    sizes = ["--batch=1", "--context=24", "--eval-batches=1", "--sample-tokens=6", "--steps=1", "--rank=2"]
    for corpus, encode in (("talk.jsonl", lambda e: e.chat([turns[0]])), ("text.txt", lambda e: e.prompt("hi"))):
        options = [f"--corpus={corpus}", "--sample-prompt=hi", "--sample-temperature=0", f"--out=of-{corpus}"]
        code, _, err = toy_command("train", "lora", "--model=llama.gguf", *options, *sizes)
        assert code == 0, err
        model, tokenizer, _ = load_trained(f"of-{corpus}")
        ids = encode(Encoder(tokenizer))
        wanted = tokenizer.decode(list(generate(model, ids, 6, 0, stop_ids=tokenizer.stop_ids)))
        (sample,) = [event["text"] for event in read_events(f"of-{corpus}/events.jsonl") if event["kind"] == "sample"]
        assert sample == wanted


# -- eval --------------------------------------------------------------------------------------------------------------


def numbers(out):
    return {line.split("  ")[0]: float(line.split()[-1 if "byte" not in line else 3]) for line in out.splitlines()[:3]}


def test_eval_prints_what_the_evaluation_measured(files, toy_command):
    settings = ["--corpus=text.txt", "--context=16", "--stride=4", "--limit=90"]
    code, out, err = toy_command("eval", "llama.gguf", "--adapter=adapter.gguf", *settings)
    assert (code, err) == (0, "")
    trained = load_trained("llama.gguf", "adapter.gguf")
    wanted = evaluate_text(trained.model, trained.tokenizer, load_corpus("text.txt").text, 16, 4, 90)
    assert f"{wanted.loss:.4f} nats per token" in out
    assert f"perplexity     {math.exp(wanted.loss):.4g}\n" in out
    assert f"bits per byte  {wanted.bits_per_byte:.4f}\n" in out
    assert f"tokens         89 ({wanted.n_bytes} bytes)" in out
    assert wanted.n_bytes == len(trained.tokenizer.decode(wanted.token_ids).encode())


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_eval_writes_every_token(files, toy_command, suffix):
    path = Path(f"tokens.{suffix}")
    code, out, _ = toy_command("eval", "llama.gguf", "--corpus=text.txt", f"--tokens-out={path}")
    assert code == 0 and str(path) in out
    if suffix == "csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = [(int(row["token"]), row["text"], float(row["logprob"])) for row in csv.DictReader(file)]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [(row["token"], row["text"], row["logprob"]) for row in map(json.loads, lines)]
    trained = load_trained("llama.gguf")
    wanted = evaluate_text(trained.model, trained.tokenizer, load_corpus("text.txt").text)
    assert [row[0] for row in rows] == wanted.token_ids.tolist()
    assert "hello" in {row[1] for row in rows}
    np.testing.assert_allclose([row[2] for row in rows], wanted.log_probabilities, atol=1e-6)


def test_eval_says_when_the_run_was_trained_on_the_text(files, toy_command):
    Path("valid.txt").write_text("hello 13, hello. Größe 4 €\n" * 4)
    Path("copy.txt").write_bytes(Path("text.txt").read_bytes())
    Path("other.txt").write_text(TEXT + "more")
    sizes = ["--batch=2", "--context=8", "--d-model=8", "--layers=1", "--heads=2", "--eval-batches=1", "--steps=1"]
    for out, options in (("part", []), ("whole", ["--valid=valid.txt"])):
        train = ["train", "from-scratch", "--corpus=text.txt", "--tokenizer=bytes", f"--out={out}"]
        assert toy_command(*train, *sizes, *options)[0] == 0
    for run, text, words in (
        ("part", "copy.txt", "note: the run was trained on most of file copy.txt"),
        ("whole", "copy.txt", "note: the run was trained on all of file copy.txt"),
        ("part", "other.txt", ""),
        ("whole", "valid.txt", ""),
        ("llama.gguf", "text.txt", ""),
    ):
        code, out, err = toy_command("eval", run, f"--corpus={text}", "--json")
        assert code == 0 and json.loads(out)["n_tokens"] > 0
        assert words in err and (err == "") == (words == ""), err


def test_eval_like_llama_perplexity(files, toy_command):
    arguments = ["eval", "llama.gguf", "--corpus=text.txt", "--context=16", "--like=llama-perplexity"]
    code, out, err = toy_command(*arguments)
    with toy.load("llama.gguf") as loaded:
        wanted = loaded.evaluate(TEXT, 16, like="llama-perplexity")
    assert (code, err) == (0, "")
    assert f"perplexity     {wanted.perplexity:.4f} +/- {wanted.perplexity_error:.4f}\n" in out
    assert "windows        16 tokens, the second half of each counted, like llama-perplexity\n" in out
    record = json.loads(toy_command(*arguments, "--json", "--tokens-out=tokens.csv")[1])
    numbers = ("loss", "perplexity", "bits_per_byte", "n_tokens", "perplexity_error")
    assert record == {name: getattr(wanted, name) for name in numbers} | {
        "like": "llama-perplexity",
        "checkpoint": None,
    }
    rows = list(csv.reader(Path("tokens.csv").read_text(encoding="utf-8").splitlines(keepends=True)))
    assert len(rows) == 1 + wanted.n_tokens
    code, _, err = toy_command(*arguments, "--stride=4")
    assert code == 2 and one_sentence(err) and "windows side by side" in err


def test_eval_of_a_lora_run_without_a_text_is_of_its_validation_part(lora_run, toy_command):
    code, out, err = toy_command("eval", "run", "--json")
    assert (code, err) == (0, "")
    n_tokens = json.loads(Path("run/config.json").read_text())["corpus"]["validation_tokens"]
    assert n_tokens - 8 <= json.loads(out)["n_tokens"] <= n_tokens
    assert toy_command("eval", "run", "--corpus=text.txt", "--json")[2].startswith(
        "note: the run was trained on most of"
    )


def test_eval_of_a_lora_run_and_of_its_merged_export_agree(lora_run, toy_command):
    assert toy_command("export", "run", "--merge", "--type=f32", "--out=merged.gguf")[0] == 0
    outputs = [toy_command("eval", model, "--corpus=text.txt")[1] for model in ("run", "merged.gguf", "llama.gguf")]
    losses = [float(re.search(r"loss +(\S+)", out)[1]) for out in outputs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] < losses[2] - 0.01


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--corpus=nowhere"], "corpus 'nowhere' does not exist"),
        (["--corpus=empty.txt"], "corpus 'empty.txt' is empty"),
        (["--corpus=text.txt", "--context=25"], "context must lie between 1 and the model's 24, got 25"),
        (["--corpus=text.txt", "--stride=25"], "stride must lie"),
        (["--corpus=text.txt", "--limit=1"], "limit must be at least 2"),
        (["--corpus=text.txt", "--tokens-out=tokens.txt"], "--tokens-out must end with .csv or .jsonl"),
        (["--corpus=text.txt", "--tokens-out=nowhere/tokens.csv"], "nowhere is not a directory"),
    ],
)
def test_eval_refuses_bad_input(files, toy_command, arguments, problem):
    Path("empty.txt").touch()
    before = sorted(Path().iterdir())
    code, out, err = toy_command("eval", "llama.gguf", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True), err
    assert problem in err
    assert sorted(Path().iterdir()) == before


def test_eval_of_a_character_model_names_a_character_it_never_saw(files, toy_command):
    Path("abc.txt").write_text("abc abd " * 30)
    sizes = ["--batch=2", "--context=8", "--d-model=8", "--layers=1", "--heads=2", "--eval-batches=1", "--steps=1"]
    sizes.append("--arch=transformer")
    assert toy_command("train", "from-scratch", "--corpus=abc.txt", *sizes, "--out=chars")[0] == 0
    code, _, err = toy_command("eval", "chars", "--corpus=text.txt")
    assert code == 2 and one_sentence(err) and "the text has the character 'h' (U+0068) at offset 0" in err
    assert "leave such characters out with --unknown skip" in err
    Path("more.txt").write_text("abc abd " * 30 + "xyyz")
    code, out, err = toy_command("eval", "chars", "--corpus=more.txt", "--unknown=skip", "--json")
    kept = json.loads(toy_command("eval", "chars", "--corpus=abc.txt", "--json", "--context=8")[1])
    assert err.startswith("note: 4 characters that the model has no token for are left out: 'y' (U+0079) 2 times, 'x'")
    assert code == 0 and json.loads(out) == {**kept, "n_skipped": 4}
    code, _, err = toy_command("export", "chars")
    assert code == 2 and one_sentence(err) and "have no architecture for a TransformerConfig" in err


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_of_a_lora_run_is_its_adapter(lora_run, toy_command):
    code, out, err = toy_command("export", "run", "--adapter")
    assert (code, err) == (0, "")
    assert toy_command("export", "run", "--out=default.gguf")[0] == 0
    assert Path("default.gguf").read_bytes() == Path("run-adapter.gguf").read_bytes()
    size, command = out.splitlines()
    assert re.fullmatch(r"run-adapter\.gguf \(\d+\.\d MB\)", size)
    assert re.fullmatch(r"llama-cli -m \S+llama\.gguf --lora run-adapter\.gguf", command)
    with GGUF.open("llama.gguf") as base:
        adapter = read_adapter("run-adapter.gguf", base.config(), base)
    assert adapter.rank == 4
    stored = load_trained("run").model.parameters
    assert all(np.array_equal(stored[name], array) for name, array in adapter.parameters.items())


def test_an_exported_adapter_gives_the_text_of_the_run(lora_run, toy_command):
    assert toy_command("export", "run", "--out=a.gguf")[0] == 0
    assert toy_command("export", "run", "--merge", "--out=m.gguf")[0] == 0
    assert toy_command("export", "llama.gguf", "--lora=a.gguf", "--out=n.gguf")[0] == 0
    assert Path("n.gguf").read_bytes() == Path("m.gguf").read_bytes()
    models = (["run"], ["llama.gguf", "--adapter=a.gguf"], ["m.gguf"], ["llama.gguf"])
    # in float32: beside weights of other numbers the activations would be rounded to others
    exact = ["--prompt=hello", "--tokens=15", "--temperature=3", "--precision=f32"]
    texts = [toy_command("generate", *model, *exact)[1] for model in models]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != texts[3]


@pytest.mark.parametrize(("kind", "types"), [("f32", {"F32"}), ("f16", {"F32", "F16"}), ("q8_0", {"F32", "Q8_0"})])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_gguf_file_in_another_type(files, toy_command, model, kind, types):
    code, out, err = toy_command("export", f"{model}.gguf", f"--type={kind}")
    assert (code, err) == (0, "")
    path = Path(f"{model}-{kind}.gguf")
    assert out.startswith(f"{path} (") and f"llama-cli -m {path}\n" in out
    with GGUF.open(path) as after, GGUF.open(f"{model}.gguf") as before:
        assert {record.type for record in after.tensors.values()} == types
        assert after.metadata["general.name"] == "Small"
        assert after.metadata["tokenizer.chat_template"] == before.metadata["tokenizer.chat_template"]
        for name, array in before.parameters().items():
            # Q8_0 may move a number by half of 1/127 of the largest in its block, f16 by 2^-11 of itself
            np.testing.assert_allclose(after.dequantize(name), array, atol=np.abs(array).max() / 200)


def test_export_overwrites_only_when_told(files, toy_command):
    Path("there.gguf").write_text("mine")
    code, out, err = toy_command("export", "llama.gguf", "--out=there.gguf")
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert "there.gguf is there already" in err and Path("there.gguf").read_text() == "mine"
    assert toy_command("export", "llama.gguf", "--out=there.gguf", "--force")[0] == 0
    assert toy_command("generate", "there.gguf", "--tokens=1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["llama.gguf", "--merge"], "llama.gguf has no adapter of its own: leave out --merge"),
        (["llama.gguf", "--adapter"], "llama.gguf has no adapter of its own: leave out --adapter"),
        (["run", "--adapter", "--merge"], "choose one"),
        (["llama.gguf", "--type=q4_9"], "'q4_9' is not one of"),
        (["llama.gguf", "--out=nowhere/a.gguf"], "nowhere is not a directory"),
        (["llama.gguf", "--out=.", "--force"], "it is a directory"),
        (["llama.gguf", "--lora=other.gguf"], "an adapter for another base"),
        (["run", "--type=f16"], "an adapter is always written as f32: add --merge"),
        (["run", "--lora=adapter.gguf"], "has an adapter of its own already"),
        (["nowhere"], "there is no run directory"),
    ],
)
def test_export_refuses_bad_input(lora_run, toy_command, arguments, problem):
    before = sorted(Path().iterdir())
    code, out, err = toy_command("export", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True), err
    assert problem in err
    assert sorted(Path().iterdir()) == before
