"""What a model writes: stop texts, prompts of every kind, several samples, JSON; llama.cpp's ids for the same prompts."""

import io
import json
import sys
from pathlib import Path

import pytest
from fetch_test_data import COMMAND, smollm2
from hypothesis import example, given
from hypothesis import strategies as st
from single_thread import single_thread  # noqa: F401 (autouse)

pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

import model_files
from test_gguf_tokenizer import bpe_metadata
from tokenizer_oracle import LlamaCppVocabulary

import toy
from toy.data import ByteTokenizer
from toy.files.gguf import GGUF
from toy.models.generation import generate
from toy.trained.generator import generator
from toy.trained.load import load_trained
from toy.trained.writing import Writing, stop_ids_of

GREEDY = ("--tokens=12", "--temperature=0")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "CONTEXT", 128)
    model_files.write_model(tmp_path / "llama.gguf", tokenizer=model_files.tokenizer())
    return tmp_path


@pytest.fixture
def write(files, toy_command):
    """toy generate --json -> its records."""

    def run(*arguments, model="llama.gguf"):
        code, out, err = toy_command("generate", model, *arguments, "--json")
        assert (code, err) == (0, ""), err
        records = [json.loads(line) for line in out.splitlines()]
        for record in records:  # how fast it was is another in every run
            timings = record.pop("timings")
            assert timings.pop("prompt_per_second") > 0
            speed = timings.pop("predicted_per_second")
            assert speed is None if len(record["ids"]) < 2 else speed > 0
            assert timings == {}
        return records

    return run


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# -- stop texts --------------------------------------------------------------------------------------------------------


def until(text, stops):
    """What stands before the stop text that is complete first (of those that are at the same place, the longest)."""
    ends = [
        (end, start)
        for stop in stops
        for end in range(len(stop), len(text) + 1)
        if text[(start := end - len(stop)) : end] == stop
    ]
    return text[: min(ends)[1]] if ends else text


@example("aabbé", ["é", "b"])  # both in one piece
@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_it_stops_before_the_first_stop_text_however_the_text_is_cut(text, stops):
    class InPieces(ByteTokenizer):
        def stream(self, ids, *, special=False):
            for i in ids:
                yield text[cuts[i] : cuts[i + 1]]

    for size in (1, 2, 5):
        cuts = [*range(0, len(text), size), len(text)]
        writing = Writing(InPieces(), range(len(cuts) - 1), stops)
        pieces = list(writing)
        assert "".join(pieces) == writing.text == until(text, stops)
        assert all(pieces)
        assert (writing.stopped_by is not None) == (until(text, stops) != text or any(s in text for s in stops))
        if writing.stopped_by is None:
            assert writing.ids == list(range(len(cuts) - 1))


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_text():
    seen = []
    ids = iter(b"xEN.END.more")
    for piece in Writing(ByteTokenizer(), ids, ["END"]):
        seen.append(piece)
    assert seen == ["x", "EN.", ""] or seen == ["x", "EN."]
    assert bytes(ids) == b".more"  # nothing is generated after it


def test_a_stop_text_ends_the_command_and_the_call_in_python(write, files):
    (free,) = write("--prompt=hello", *GREEDY)
    assert len(free["ids"]) == 12 and free["finish_reason"] == "length"
    stop = free["text"][4:7]
    assert stop.strip()
    (stopped,) = write("--prompt=hello", *GREEDY, "--stop=never said", f"--stop={stop}")
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish_reason"] == "stop" and stopped["ids"] == free["ids"][: len(stopped["ids"])]
    with toy.load("llama.gguf") as loaded:
        assert loaded.generate("hello", 12, temperature=0) == free["text"]
        assert loaded.generate("hello", 12, temperature=0, stop=[stop]) == stopped["text"]
        for wrong in ([""], "text"):
            with pytest.raises(ValueError, match="stop"):
                loaded.generate("hello", stop=wrong)


def test_a_special_token_as_stop_text_ends_a_text_too():
    """It writes nothing, so it would never be found in the text."""
    tokenizer = model_files.tokenizer()
    more = stop_ids_of(tokenizer, ["<|im_start|>", "hello", "a b"]) - tokenizer.stop_ids
    assert more == {tokenizer.tokens.index("<|im_start|>")}
    assert stop_ids_of(ByteTokenizer(), ["<|im_start|>", "\n"]) == frozenset()


def test_it_stops_at_such_a_token(files, write):
    (free,) = write("--prompt=hello", *GREEDY)
    tokens = list(bpe_metadata()["tokenizer.ggml.tokens"])
    tokens[1], tokens[free["ids"][4]] = tokens[free["ids"][4]], tokens[1]  # what it writes fifth is <|im_start|> now
    types = bpe_metadata()["tokenizer.ggml.token_type"].copy()
    types[1], types[free["ids"][4]] = types[free["ids"][4]], types[1]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 0}
    model_files.write_model(files / "other.gguf", tokenizer=model_files.tokenizer(**changes))
    for stop, n in (((), 12), (("--stop=<|im_start|>",), free["ids"].index(free["ids"][4]))):
        (record,) = write("--prompt=hello", *GREEDY, *stop, model="other.gguf")
        assert record["ids"] == free["ids"][:n]


# -- several samples, JSON ---------------------------------------------------------------------------------------------


def test_each_sample_is_that_of_its_own_seed(write, files, toy_command):
    many = write("--prompt=hello", "--tokens=9", "--num-samples=3", "--seed=5")
    assert [record["seed"] for record in many] == [5, 6, 7]
    assert len({record["text"] for record in many}) == 3
    assert many == [write("--prompt=hello", "--tokens=9", f"--seed={seed}")[0] for seed in (5, 6, 7)]
    code, out, err = toy_command(
        "generate", "llama.gguf", "--prompt=hello", "--tokens=9", "--num-samples=3", "--seed=5"
    )
    assert (code, err) == (0, "")
    shown = "".join(f"--- {i + 1}, seed {5 + i} ---\nhello{record['text']}\n" for i, record in enumerate(many))
    assert out == shown


def test_the_json_says_what_was_read_and_written(write):
    (record,) = write("--prompt=hello 12", *GREEDY)
    model, tokenizer, _ = load_trained("llama.gguf")
    ids = tokenizer.encode("hello 12").tolist()
    wanted = list(generate(model, ids, 12, 0, stop_ids=tokenizer.stop_ids))
    assert record == {
        "prompt": "hello 12", "text": "".join(tokenizer.stream(wanted)), "finish_reason": "length", "seed": 0,
        "prompt_ids": ids, "ids": wanted, "computed_by": generator(model).how,
    }  # fmt: skip
    (without,) = write("--tokens=2")
    assert without["prompt"] is None and without["prompt_ids"] == tokenizer.encode("\n").tolist()


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hello\nhello", "hello\nhello"),
        (b"hello\n", "hello"),
        (b"hello\r\n", "hello"),
        (b"hello\n\n", "hello\n"),
        (b"hello\r", "hello\r"),
        (b"\xef\xbb\xbfhello", "hello"),
        ("Größe €".encode(), "Größe €"),
    ],
)
def test_a_prompt_from_a_file_and_from_stdin(write, monkeypatch, data, text):
    Path("a prompt.txt").write_bytes(data)
    (wanted,) = write(f"--prompt={text}", *GREEDY)
    assert wanted["prompt"] == text
    assert write("--prompt=@a prompt.txt", *GREEDY) == [wanted]
    stdin(monkeypatch, data)
    assert write("--prompt=-", *GREEDY) == [wanted]
    stdin(monkeypatch, data)
    assert write("--prompt=hi", "--chat", "--system=-", *GREEDY) == write(
        "--prompt=hi", "--chat", f"--system={text}", *GREEDY
    )


def test_a_prompt_may_begin_with_the_sign_itself(write):
    assert [record["prompt"] for record in write("--prompt=@@you", "--tokens=1")] == ["@you"]
    assert [record["prompt"] for record in write("--prompt=--", "--tokens=1")] == ["--"]


def test_what_becomes_of_a_prompt_is_told(files, toy_command):
    _, out, err = toy_command("generate", "llama.gguf", "--prompt=" + 130 * "a", "--tokens=1", "--json")
    assert err == "note: the prompt has 130 tokens, the model reads the last 128: that is its context\n"
    assert len(json.loads(out)["prompt_ids"]) == 130
    begins = {"tokenizer.ggml.add_bos_token": True}
    model_files.write_model(files / "begins.gguf", tokenizer=model_files.tokenizer(**begins))
    arguments = ["generate", "begins.gguf", "--tokens=1", "--special", "--json"]
    assert toy_command(*arguments, "--prompt=hi")[2] == ""
    _, out, err = toy_command(*arguments, "--prompt=<|im_start|>hi")
    assert "beginning token stands there twice" in err
    assert json.loads(out)["prompt_ids"][:3] == [1, 1, *model_files.tokenizer().encode("h")]
    assert "all 2 texts are the same" in toy_command(*arguments, "--prompt=a", "--temperature=0", "--num-samples=2")[2]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompt=@nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt=@."], ".: Is a directory"),
        (["--prompt=@"], "--prompt @ names no file"),
        (["--prompt=@latin.txt"], "--prompt: latin.txt is not UTF-8 text: byte 0xf6 at offset 2"),
        (["--prompt=@empty.txt"], "prompt is empty"),
        (["--chat", "--prompt=a", "--system=@latin.txt"], "--system: latin.txt is not UTF-8"),
        (["--system=be kind", "--prompt=a"], "--system goes with --chat"),
        (["--chat", "--prompt=-", "--system=-"], "cannot both be read from stdin"),
        (["--special"], "--special is about special tokens in a prompt"),
        (["--special", "--chat", "--prompt=a"], "--chat parses those of the template alone"),
        (["--prompt=a", "--stop="], "a stop text is empty"),
        (["--num-samples=0"], "--num-samples"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(files, toy_command, arguments, problem):
    Path("latin.txt").write_bytes("Größe".encode("latin-1"))
    Path("empty.txt").touch()
    assert toy_command("generate", "llama.gguf", "--prompt=a", "--stop=b", "--tokens=1")[0] == 0
    code, out, err = toy_command("generate", "llama.gguf", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and problem in err, err


def test_a_model_without_special_tokens_or_a_template_says_so(files, toy_command):
    config = model_files.config("llama")
    recipe = toy.recipes.FromScratch(backend="numpy")
    recipe.realize(toy.TransformerConfig(256, 8, 2, 16, 1, 8), toy.RecipeOptions(t_seq=8))
    assert config and recipe.save("bytes.safetensors", tokenizer=ByteTokenizer()) is None
    assert toy_command("generate", "bytes.safetensors", "--prompt=a", "--tokens=1")[0] == 0
    for option, problem in (("--special", "(bytes) has no special tokens"), ("--chat", "no chat template")):
        code, out, err = toy_command("generate", "bytes.safetensors", "--prompt=a", option)
        assert (code, out) == (2, "") and problem in err


# -- llama.cpp ---------------------------------------------------------------------------------------------------------

SYSTEM, USER = "be kind", "hello 12 <|im_end|> and <tool>\n"


@pytest.mark.llama_cpp
@pytest.mark.parametrize("add_bos", [False, True])
def test_llama_cpp_reads_the_same_ids(files, write, add_bos):
    metadata = bpe_metadata(**{"tokenizer.ggml.add_bos_token": add_bos})
    tokenizer = model_files.tokenizer(**{"tokenizer.ggml.add_bos_token": add_bos})
    model_files.write_model(files / "model.gguf", tokenizer=tokenizer)
    with LlamaCppVocabulary(files, metadata) as judge:
        check_prompts(judge, lambda *arguments: write(*arguments, "--tokens=1", model="model.gguf")[0]["prompt_ids"])


def check_prompts(judge, ids_of):
    text = "To <|im_start|>user\nhello<|im_end|> <tool>"
    plain, special = ids_of(f"--prompt={text}"), ids_of(f"--prompt={text}", "--special")
    assert plain != special
    assert plain == judge.encode(text, add_special=True)
    assert special == judge.encode(text, add_special=True, parse_special=True)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    with_system, without = (
        ids_of(f"--prompt={USER}", "--chat", f"--system={SYSTEM}"),
        ids_of(f"--prompt={USER}", "--chat"),
    )
    for ids, conversation in ((with_system, messages), (without, messages[1:])):
        assert ids == judge.encode(judge.render(conversation), add_special=True, parse_special=True)
    assert with_system != without


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_llama_cpp_reads_the_same_ids_of_a_real_model(files, write):
    if smollm2() is None:
        pytest.skip(f"SmolLM2 was not fetched ({COMMAND})")
    with GGUF.open(smollm2()) as gguf:
        metadata = {key: value for key, value in gguf.metadata.items() if key.startswith("tokenizer.")}
    with LlamaCppVocabulary(files, metadata) as judge:
        check_prompts(judge, lambda *arguments: write(*arguments, "--tokens=1", model=smollm2())[0]["prompt_ids"])
