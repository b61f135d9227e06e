"""toy chat: the ids of a conversation, what the key/value cache reads again, and the terminal."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from fetch_test_data import COMMAND, smollm2
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.data.encoding import Encoder
from toy.files.gguf_write import write_gguf
from toy.models import model_for
from toy.models.generation import generate, go_on
from toy.trained.chat import Chat

pytest.importorskip("gguf", reason="quantised files need the gguf package")
pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

import model_files

CONTEXT = 400


@pytest.fixture(scope="module")
def tokenizer():
    return model_files.tokenizer()


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(model_files.config("llama"), context_length=CONTEXT, n_layers=2)
    return model_for(config)(config, seed=3, init_scale=4.0)


class Watched:
    """A model that counts the tokens it reads."""

    def __init__(self, model):
        self.model, self.config, self.read = model, model.config, []

    def new_kv_cache(self):
        return self.model.new_kv_cache()

    def forward(self, token_ids, **options):
        self.read.append(len(token_ids))
        return self.model.forward(token_ids, **options)


def talk(chat, *messages):
    return ["".join(chat.answer(message)) for message in messages]


# -- going on with a cache ---------------------------------------------------------------------------------------------


def test_going_on_is_generating(model):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = list(generate(model, prompt, 12, temperature=0.7, seed=4))
    for n in (0, 1, 7):
        cache, ids = model.new_kv_cache(), list(prompt)
        if n:
            model.forward(np.array(prompt[:n]), kv_cache=cache)
        found = list(go_on(model, ids, cache, 12, temperature=0.7, rng=np.random.default_rng(4)))
        assert found == expected and ids == prompt + expected
        assert cache.length == len(ids) - 1
    with pytest.raises(ValueError, match="cannot be gone on from"):
        list(go_on(model, ids[: cache.length], cache, 1))
    with pytest.raises(ValueError, match="cannot be gone on from"):
        list(go_on(model, [1] * (CONTEXT + 1), model.new_kv_cache(), 1))


# -- the conversation --------------------------------------------------------------------------------------------------


def test_no_token_is_read_twice(model, tokenizer):
    watched = Watched(model)
    chat = Chat(watched, tokenizer, "be short", n_tokens=9, seed=1)
    answers = talk(chat, "hi", "and then?", "why")
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert [message["content"] for message in chat.messages[2::2]] == answers and all(answers)
    # the prompts and the answers, each once; the last token of the last answer has not been read
    assert sum(watched.read) == chat.n_read == len(chat._ids) - 1
    assert chat.n_read == chat._cache.length


def test_the_answers_are_those_of_a_conversation_read_anew(model, tokenizer):
    """What the cache holds is what a fresh cache would: greedy answers, turn by turn, from nothing but the ids."""
    chat = Chat(model, tokenizer, n_tokens=9, temperature=0)
    encoder = Encoder(tokenizer)
    for message in ("hi", "and then?", "why"):
        before = list(chat._ids)
        answer = "".join(chat.answer(message))
        prompt = chat._ids[: len(chat._ids) - 9] if len(chat._ids) >= 9 else chat._ids
        expected = list(generate(model, prompt, 9, temperature=0, stop_ids=tokenizer.stop_ids))
        assert tokenizer.decode(expected) == answer
        assert chat._ids[: len(before)] == before
        assert encoder.chat_text(chat.messages[:-1]).startswith(tokenizer.decode(prompt, special=True)[:20])


def test_the_ids_of_the_first_prompt_are_the_templates(model, tokenizer):
    chat = Chat(model, tokenizer, "be short", n_tokens=1)
    talk(chat, "hello you")
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello you"}]
    expected = Encoder(tokenizer).chat(messages).tolist()
    assert chat._ids[: len(expected)] == expected


def test_undo_takes_back_and_reads_only_what_is_new(model, tokenizer):
    watched = Watched(model)
    chat = Chat(watched, tokenizer, n_tokens=5, temperature=0)
    first, second = talk(chat, "one", "two")
    assert chat.undo() and len(chat.messages) == 2
    watched.read.clear()
    assert talk(chat, "two") == [second]
    assert sum(watched.read) <= 5 + 12  # not the first turn again
    assert chat.undo() and chat.undo() and not chat.undo()
    assert talk(chat, "one") == [first]


def test_a_system_message_survives_clear_and_undo(model, tokenizer):
    chat = Chat(model, tokenizer, "be short", n_tokens=3)
    talk(chat, "one", "two")
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "be short"}]
    assert not chat.undo() and len(chat.messages) == 1


def test_an_answer_that_is_ended_early_stays_as_far_as_it_came(model, tokenizer):
    chat = Chat(model, tokenizer, n_tokens=50)
    pieces = chat.answer("hi")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": heard}
    assert talk(chat, "go on")[0]


def test_the_oldest_turns_are_left_out_when_the_context_is_full(model, tokenizer):
    chat = Chat(model, tokenizer, "S", n_tokens=30)
    message, forgotten = "word " * 12, []
    for _ in range(12):
        assert talk(chat, message)[0]
        assert len(chat._ids) <= CONTEXT
        forgotten.append(chat.forgotten)
    assert forgotten[0] == 0 < forgotten[-1] and forgotten == sorted(forgotten)
    assert len(chat.messages) == 1 + 2 * 12  # the history is whole
    assert tokenizer.decode(chat._ids, special=True).count("S") >= 1
    before = list(chat.messages)
    with pytest.raises(ValueError, match="with the chat template, and the model's context is 400"):
        chat.answer("word " * 500)
    assert chat.messages == before


def test_what_cannot_chat(model, tokenizer):
    from toy.data import ByteTokenizer

    with pytest.raises(ValueError, match="no chat template"):
        Chat(model, ByteTokenizer())
    with pytest.raises(ValueError, match="temperature must be"):
        Chat(model, tokenizer, temperature=-1)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(model.config, context_length=100)
    write_gguf(folder / "llama.gguf", config, model.parameters, tokenizer)
    return folder


def run(files, lines, *arguments):
    command = [
        sys.executable,
        "-m",
        "toy",
        "chat",
        str(files / "llama.gguf"),
        "--tokens=4",
        "--backend=numpy",
        *arguments,
    ]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, cwd=files, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_every_line_is_a_message(files, tmp_path):
    saved = tmp_path / "talk.jsonl"
    code, out, err = run(files, f"a\\\nb\n/undo\nc\n/save {saved}\n\n/help\n/quit\nd\n", "--seed=2")
    assert code == 0, err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["c"]
    assert out.splitlines()[1] == messages[1]["content"] or messages[1]["content"] in out
    assert "/undo" in out and "taken back" in err and f"appended to {saved}" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/undo\n", "there is nothing to take back"),
        ("/save x.jsonl\n", "there is nothing to save yet"),
        ("/save\n", "/save needs the name of a file"),
        ("a\n/save nowhere/x.jsonl\n", "nowhere/x.jsonl cannot be written: No such file"),
        ("/jump\n", "there is no /jump; /help shows what there is"),
        ("word " * 100 + "\n", "the model's context is 100"),
    ],
)
def test_what_is_refused_is_one_sentence_and_the_conversation_goes_on(files, lines, message):
    code, out, err = run(files, lines + "b\n")
    assert code == 2 and message in err and "Traceback" not in err
    assert out.strip()


def test_a_model_without_a_template(files):
    done = subprocess.run(
        [sys.executable, "-m", "toy", "chat", "nowhere"], input="", capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(files):
    import os
    import pty
    import select

    leader, follower = pty.openpty()
    code = (
        "import time, sys\n"
        "from toy.models import generation\n"
        "draw = generation.sample\n"
        "def slow(*a, **k):\n"
        "    time.sleep(0.2)\n"
        "    return draw(*a, **k)\n"
        "generation.sample = slow\n"
        "from toy.cli import main\n"
        f"main(['chat', {str(files / 'llama.gguf')!r}, '--tokens=12', '--backend=numpy'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=follower, cwd=files
    )
    os.close(follower)
    seen = b""

    def until(what):
        nonlocal seen
        begin = len(seen)
        while what not in seen[begin:]:
            assert select.select([leader], [], [], 300)[0], seen
            seen += os.read(leader, 4096)

    until(b"> ")
    os.write(leader, b"hi\n")
    until(b"hi\r\n")
    assert select.select([leader], [], [], 300)[0]  # the answer has begun
    process.send_signal(signal.SIGINT)
    until(b"> ")
    os.write(leader, b"/quit\n")
    assert process.wait(timeout=300) == 0, seen
    os.close(leader)


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_two_turns_of_smollm2_are_llama_cpps(tmp_path):
    """Greedy answers of an F32 file, turn by turn, through llama.cpp's own reading of the template."""
    test_llama_cpp = pytest.importorskip("test_llama_cpp")
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    from toy.data.open_tokenizer import load_tokenizer
    from toy.engines import model_from
    from toy.files.gguf import GGUF

    with GGUF.open(path) as gguf:
        config, tokenizer, parameters = gguf.config(), load_tokenizer(gguf), gguf.parameters()
    write_gguf(tmp_path / "smollm2.gguf", config, parameters, tokenizer)
    judge = test_llama_cpp.LlamaCpp(tmp_path / "smollm2.gguf")
    chat = Chat(model_from(config, parameters), tokenizer, n_tokens=10, temperature=0)
    for message in ("Name a colour.", "And another one."):
        answer = "".join(chat.answer(message))
        request = {"messages": chat.messages[:-1], "max_tokens": 10, "temperature": 0}
        theirs = judge._server.handle_chat_completions(request)["choices"][0]["message"]["content"]
        assert answer == theirs
