"""From records to ids and labels: against renderings made here with jinja2 alone, and against llama.cpp on a real model."""

import json
import urllib.request

import jinja2
import numpy as np
import pytest
from fetch_test_data import COMMAND, smollm2, vocabularies
from hypothesis import given
from hypothesis import strategies as st
from test_gguf_tokenizer import bpe_metadata, sentencepiece_metadata

from toy.data import cutting
from toy.data.cutting import BlockEncoder
from toy.data.encoding import ChatTemplateError, Encoder
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import load_tokenizer
from toy.data.records import Completion, Conversation, Place
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError
from toy.files.gguf import GGUF

pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")

BOS, EOS = "<|im_start|>", "<|im_end|>"  # ids 1 and 2 of the small tokenizer
TWO_TURNS = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello <|im_end|> there"},
    {"role": "assistant", "content": "hell yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": " hello\nhello "},
)


def encoder(**changes):
    return Encoder(GGUFTokenizer(bpe_metadata(**changes)))


def with_template(template, **changes):
    return encoder(**{"tokenizer.chat_template": template}, **changes)


def asked(encoder, encoded):
    """The text that is to be said, one str for each stretch of it, special tokens written out."""
    ids, labels = encoded
    assert ids.dtype == labels.dtype == np.int32
    assert ids.shape == labels.shape
    assert all(label in (-1, following) for label, following in zip(labels, [*ids[1:], -1]))
    stretches, last = [], -2
    for i in np.flatnonzero(labels >= 0):
        if i != last + 1:
            stretches.append([])
        stretches[-1].append(labels[i])
        last = i
    return [encoder.tokenizer.decode(stretch, special=True) for stretch in stretches]


# ----------------------------------------------------------------------------------------------------------------------
# documents, completions, prompts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_documents_begin_and_end_as_the_model_wants(add_bos):
    e = encoder(**{"tokenizer.ggml.add_bos_token": add_bos})
    plain = e.tokenizer.encode("hello <|im_end|>")
    ids, labels = e.document("hello <|im_end|>")
    assert ids.tolist() == [1] * add_bos + plain.tolist() + [2]
    assert labels.tolist() == [*ids[1:].tolist(), -1]
    assert 2 not in plain  # special tokens in plain text stay text
    assert e.prompt("hello").tolist() == [1] * add_bos + e.tokenizer.encode("hello").tolist()
    assert e.prompt("hello <|im_end|>", special=True)[-1] == 2
    assert np.array_equal(ids[: len(e.prompt("hello"))], e.prompt("hello"))


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text("abcdef \n"), ByteTokenizer()], ids=["char", "bytes"])
def test_characters_and_bytes_have_no_special_tokens(tokenizer):
    e = Encoder(tokenizer)
    ids, labels = e.completion("abc ", "def\n")
    assert np.array_equal(ids, tokenizer.encode("abc def\n"))
    assert labels.tolist() == [-1, -1, -1, *ids[4:].tolist(), -1]
    assert e.completion("abc ", "def\n", "all").labels.tolist() == [*ids[1:].tolist(), -1]
    assert np.array_equal(e.document("abc").ids, tokenizer.encode("abc"))
    assert np.array_equal(e.prompt("abc", special=True), tokenizer.encode("abc"))
    with pytest.raises(ValueError, match=r"no chat template.*prompts and completions"):
        e.conversation(TWO_TURNS)
    with pytest.raises(ValueError, match="no chat template"):
        e.chat(TWO_TURNS[:2])


def test_a_completion_is_asked_for_with_its_end():
    e = encoder(**{"tokenizer.ggml.add_bos_token": True})
    encoded = e.completion("say ", " hello")
    assert np.array_equal(encoded.ids, np.concatenate([[1], e.tokenizer.encode("say  hello"), [2]]))
    assert asked(e, encoded) == [" hello<|im_end|>"]
    assert asked(e, e.completion("say ", " hello", "all")) == ["say  hello<|im_end|>"]
    assert asked(e, e.completion("", "hello")) == ["hello<|im_end|>"]


def test_a_token_across_the_seam_is_not_what_generation_would_go_on_from():
    e = encoder()
    assert len(e.tokenizer.encode("hello")) == 1
    encoded = e.completion("he", "llo")
    assert encoded.ids.tolist() == [*e.prompt("he").tolist(), *e.tokenizer.encode("llo").tolist(), 2]
    assert asked(e, encoded) == ["llo<|im_end|>"]


@given(
    st.text("helo <>|\n", max_size=12),
    st.text("helo <>|\n", max_size=12),
    st.sampled_from([bpe_metadata, sentencepiece_metadata]),
)
def test_any_completion_goes_on_from_the_ids_of_its_prompt(prompt, completion, metadata):
    e = Encoder(GGUFTokenizer(metadata()))
    ids, labels = e.completion(prompt, completion)
    begun = e.prompt(prompt)
    assert np.array_equal(ids[: len(begun)], begun)
    assert np.array_equal(labels[max(len(begun) - 1, 0) : -1], ids[max(len(begun), 1) :])
    assert (labels[: max(len(begun) - 1, 0)] == -1).all()
    assert e.tokenizer.decode(ids[:-1]) == prompt + completion or metadata is sentencepiece_metadata


def test_a_sentencepiece_completion_has_no_second_space():
    e = Encoder(GGUFTokenizer(sentencepiece_metadata()))
    assert e.tokenizer.decode(e.completion("he", "llo").ids) == "hello"
    assert e.tokenizer.decode(e.completion("he", " hello").ids) == "he hello"
    assert np.array_equal(e.completion("he", " hello").ids[1:-1], e.tokenizer.encode("he hello"))


# ----------------------------------------------------------------------------------------------------------------------
# conversations
# ----------------------------------------------------------------------------------------------------------------------

CHATML = bpe_metadata()["tokenizer.chat_template"]
TEMPLATES = {  # -> the answers that it shows of TWO_TURNS
    "chatml": (CHATML, ["hell yes", " hello\nhello "]),
    "strips": (CHATML.replace("message['content']", "message['content'] | trim"), ["hell yes", "hello\nhello"]),
    "ignores the generation prompt": (CHATML.partition("{% if add")[0], ["hell yes", " hello\nhello "]),
    "always adds a generation prompt": (
        CHATML.replace("{% if add_generation_prompt %}", "{% if true %}"),
        ["hell yes", " hello\nhello "],
    ),
    "names roles differently": (
        "{% for m in messages %}<|im_start|>{{ {'assistant': 'model'}.get(m.role, m.role) }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}",
        ["hell yes", " hello\nhello "],
    ),
    "treats the last turn differently": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["hell yes", " hello\nhello "],
    ),
    "no end after the last turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
        "{% endfor %}",
        ["hell yes<|im_end|>", " hello\nhello "],
    ),
    "system stands in the last question": (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }} [/INST]{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}",
        ["hell yes <|im_end|>", "hello\nhello <|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_on_every_answer_and_its_end(name):
    template, answers = TEMPLATES[name]
    e = with_template(template)
    encoded = e.conversation(TWO_TURNS)
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(messages=TWO_TURNS)
    assert e.tokenizer.decode(encoded.ids, special=True) == rendered
    assert np.array_equal(encoded.ids, e.tokenizer.encode(rendered, parse_special=True))
    answers = [answer if EOS in answer else answer + EOS * (name != "no end after the last turn") for answer in answers]
    assert [found.strip(" ") for found in asked(e, encoded)] == [answer.strip(" ") for answer in answers]


def test_all_of_a_conversation_may_be_asked_for():
    e = encoder()
    ids, labels = e.conversation(TWO_TURNS, train_on="all")
    assert labels.tolist() == [*ids[1:].tolist(), -1]
    with pytest.raises(ValueError, match="answers, all"):
        e.conversation(TWO_TURNS, train_on="answer")


def test_a_conversation_without_answers_asks_for_nothing():
    assert asked(encoder(), encoder().conversation(TWO_TURNS[:2])) == []


def test_an_empty_answer_is_its_end():
    messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": ""})
    assert asked(encoder(), encoder().conversation(messages)) == [EOS]


def test_special_tokens_written_in_an_answer_do_not_end_it():
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": f"he {EOS} llo"})
    assert asked(encoder(), encoder().conversation(messages)) == [f"he {EOS} llo{EOS}"]


def test_generation_begins_with_the_ids_that_training_saw():
    e = encoder()
    for turn in (2, 4):
        begun = e.chat(TWO_TURNS[:turn])
        ids, labels = e.conversation(TWO_TURNS[: turn + 1])
        assert np.array_equal(ids[: len(begun)], begun)
        assert labels[len(begun) - 1] >= 0
        assert labels[len(begun) - 2] == -1


@pytest.mark.parametrize("written", [False, True], ids=["added", "in the template"])
def test_there_is_one_beginning_token(written):
    e = with_template(
        ("{{ bos_token }}" if written else "") + "[{{ messages[-1].content }}<|im_end|>",
        **{"tokenizer.ggml.add_bos_token": True},
    )
    encoded = e.conversation(({"role": "assistant", "content": "hello"},))
    assert encoded.ids[0] == 1
    assert (encoded.ids == 1).sum() == 1
    assert asked(e, encoded) == [f"hello{EOS}"]


TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | length }} tools<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<tool>{{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = (
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "hell"}]},
    {"role": "tool", "content": "he"},
    {"role": "assistant", "content": "llo"},
)


def test_calls_of_tools_are_answers():
    e = with_template(TOOLS)
    encoded = e.conversation(CALL, [{"name": "hell"}])
    assert asked(e, encoded) == [f"<tool>hell{EOS}", f"llo{EOS}"]
    assert "1 tools" in e.tokenizer.decode(encoded.ids)
    assert "tools" not in e.tokenizer.decode(e.conversation(CALL).ids)
    assert "1 tools" in e.tokenizer.decode(e.chat(CALL[:1], [{}]))


def test_an_answer_that_the_template_takes_apart_is_what_follows_the_generation_prompt():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}<think>"
        "{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}</think>{{ m.content.split('</think>')[-1] | trim }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "<think> he </think> llo"})
    e = with_template(template)
    assert asked(e, e.conversation(messages)) == [f"<think>he</think>llo{EOS}"]


BROKEN = {
    "no end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no end token after"),
    "left out": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "left out",
    ),
    "repeated": ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "repeated"),
    "depends": (
        "{% for m in messages %}{{ m.content | length }}:{{ m.content }}<|im_end|>{% endfor %}",
        r"message 3 \(assistant\) is left out, repeated, or changes",
    ),
    "something between": (
        "{% for m in messages %}{{ m.content | tojson }}<|im_end|>{% endfor %}",
        "no end token after",
    ),
    "only the last": ("{{ messages[-1].content }}<|im_end|>", r"message 3 \(assistant\)"),
    "upper": ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "message 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_templates_that_do_not_show_where_answers_are_are_refused(name):
    template, message = BROKEN[name]
    e = with_template(template)
    with pytest.raises(ChatTemplateError, match=message) as error:
        e.conversation(TWO_TURNS)
    assert "chat template of this model" in str(error.value)
    assert e.conversation(TWO_TURNS, train_on="all").labels[0] >= 0  # the whole of it can be trained on


def test_a_template_that_refuses_says_so():
    with pytest.raises(ValueError, match="only once"):
        with_template("{{ raise_exception('only once') }}").conversation(TWO_TURNS)


def test_a_sentencepiece_model_adds_a_space_that_is_no_answer():
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
    e = Encoder(GGUFTokenizer(sentencepiece_metadata(**{"tokenizer.chat_template": template})))
    encoded = e.conversation(({"role": "user", "content": "he"}, {"role": "assistant", "content": "hello\nhe"}))
    assert encoded.ids[0] == 1  # this kind wants a beginning token
    assert asked(e, encoded) == ["hello\nhe</s>"]


MESSAGES = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text("helo \n<|im_end|>é😀", max_size=10)),
    min_size=1,
    max_size=5,
)


@given(MESSAGES, st.sampled_from(["chatml", "strips", "treats the last turn differently"]))
def test_any_answers_are_found(pairs, name):
    """The labels against ids that are put together here from the pieces of a ChatML conversation."""
    e = with_template(TEMPLATES[name][0])
    messages = [{"role": role, "content": content} for role, content in pairs]
    ids, labels = e.conversation(messages)
    wanted = []
    for i, (role, content) in enumerate(pairs):
        content = content.strip() if name == "strips" else content
        think = "<think>\n\n</think>\n\n" if name.startswith("treats") and i == len(pairs) - 1 else ""
        if role == "assistant":
            wanted.append(content + EOS)
        assert f"{BOS}{role}\n{think}{content}{EOS}\n" in e.tokenizer.decode(ids, special=True)
    # a token may lie across the beginning of an answer ("\n" and the line ends before it)
    found = "".join(asked(e, (ids, labels)))
    assert found.replace("\n", "") == "".join(wanted).replace("\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# a real model, and llama.cpp
# ----------------------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Name a prime number: 2, 3 or 4?"},
    {"role": "assistant", "content": "Both 2 and 3 are prime.\n\n- 2 is even\n- 3 is odd 🙂"},
    {"role": "user", "content": "And 12345678?  It's <|im_end|> even"},
    {"role": "assistant", "content": "No.\n"},
]
PAIR = ("Translate to French: cheese\n", "fromage 🧀")
TEXT = "It's a day;  12,345 things\n\n\tdef f(x):\n        return x  # naïve <|im_start|>\n"


@pytest.fixture(scope="module")
def real():
    if smollm2() is None:
        pytest.skip(f"SmolLM2 was not fetched ({COMMAND})")
    return Encoder(load_tokenizer(GGUF.open(smollm2())))


def test_a_real_template_against_a_rendering_of_our_own(real):
    ids, labels = real.conversation(CHAT)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    plain = real.tokenizer.encode
    start, end, newline = (plain(text, parse_special=True).tolist() for text in (BOS, EOS, "\n"))
    wanted_ids, wanted = [], []
    for message in [{"role": "system", "content": system}, *CHAT]:
        head = [*start, *plain(message["role"]).tolist(), *newline]
        body = [*plain(message["content"], parse_special=True).tolist(), *end]
        say = message["role"] == "assistant"
        wanted_ids += [*head, *body, *newline]
        wanted += [-1] * len(head) + (body if say else [-1] * len(body)) + [-1]
    assert ids.tolist() == wanted_ids
    assert labels.tolist() == [*wanted[1:], -1]
    template = jinja2.Environment().from_string(real.tokenizer.chat_template)
    assert np.array_equal(ids, plain(template.render(messages=CHAT), parse_special=True))


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_same_ids(real):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    settings = llama.CommonParams()
    settings.model.path = str(smollm2())
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params, settings.verbosity = (
        128,
        1,
        False,
        False,
        -1,
    )
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = llama.Server(settings)

    def post(path, **content):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(text, special):
        return post("/tokenize", content=text, add_special=True, parse_special=special)["tokens"]

    asking = post("/apply-template", messages=CHAT[:3])["prompt"]
    assert real.chat(CHAT[:3]).tolist() == tokens(asking, True)
    ids, _ = real.conversation(CHAT)
    whole = asking + CHAT[3]["content"] + EOS + "\n"
    assert ids.tolist() == tokens(whole, True)
    assert real.prompt(asking, special=True).tolist() == tokens(asking, True)
    assert real.prompt(TEXT).tolist() == tokens(TEXT, False)
    assert real.document(TEXT).ids.tolist() == [*tokens(TEXT, False), 2]
    assert real.completion(*PAIR).ids.tolist() == [*tokens("".join(PAIR), False), 2]
    assert asked(real, real.completion(*PAIR)) == [PAIR[1] + EOS]


# ----------------------------------------------------------------------------------------------------------------------
# long texts in blocks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 600)
    monkeypatch.setattr(cutting, "_LAST", 250)
    monkeypatch.setattr(cutting, "LONGEST", 6000)


ALPHABET = [
    *"abc hello DE09'.,!\n\r\t-_()",
    "  ",
    "\n\n",
    " \n",
    "'s",
    "é",
    "日本",
    "。\n",
    "😀",
    "hello hello",
    "ΑΒΓ ",
    " ",
    "\u2028",
]


def random_text(rng, n, words):
    """Line ends, spaces, digits and scripts in every order; sometimes words of a language."""
    parts = [
        words[i] + " " if i < len(words) else ALPHABET[i % len(ALPHABET)] for i in rng.integers(0, 2 * len(words), n)
    ]
    return "".join(parts)


def blocks_of(encoder, text, piece):
    blocks = BlockEncoder(encoder)
    found = list(blocks.encode(text[i : i + piece] for i in range(0, len(text), piece)))
    return found, blocks.n_forced


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.from_text("aé日")], ids=["bytes", "char"])
def test_characters_and_bytes_are_cut_anywhere(tokenizer, small_blocks):
    text = "aé日" * 700
    found, forced = blocks_of(Encoder(tokenizer), text, 100)
    assert np.array_equal(np.concatenate(found), tokenizer.encode(text))
    assert len(found) > 2
    assert forced == 0


def test_an_unknown_character_is_named_with_its_offset_in_the_whole(small_blocks):
    blocks = BlockEncoder(Encoder(CharTokenizer.from_text("ab")))
    with pytest.raises(
        UnknownCharacterError, match=r"x\.txt has the character 'c' \(U\+0063\) at offset 5000, .* 2 char"
    ):
        list(blocks.encode(["ab" * 2500 + "c"], Place("x.txt")))


def names_of_vocabularies():
    folder = vocabularies()
    return [path.name for path in sorted(folder.glob("*.gguf"))] if folder else []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "small-bpe", "small-spm", *names_of_vocabularies()])
def test_a_text_in_blocks_has_the_ids_of_the_whole(name, small_blocks, request):
    if name == "smollm2":
        e = request.getfixturevalue("real")
    elif name.startswith("small"):
        e = Encoder(GGUFTokenizer(bpe_metadata() if name == "small-bpe" else sentencepiece_metadata()))
    else:
        try:
            e = Encoder(load_tokenizer(GGUF.open(vocabularies() / name)))
        except ValueError:
            pytest.skip("a tokenizer of another kind")
    rng = np.random.default_rng(0)
    pieces = (e.tokenizer.token_bytes(i).decode(errors="ignore") for i in range(300, e.tokenizer.vocab_size, 97))
    words = [piece for piece in pieces if piece]
    words += ["hello", "he", "The", "day"]
    n_blocks = 0
    for case in range(15):
        text = random_text(rng, 800, words if case % 3 else words[-4:])
        found, forced = blocks_of(e, text, int(rng.integers(50, 900)))
        n_blocks += len(found)
        assert forced == 0
        assert np.array_equal(np.concatenate(found), e.plain(text))
    assert n_blocks > 40


def test_a_text_without_words_is_cut_by_force_and_that_is_counted(small_blocks):
    e = encoder()
    text = "(0)" * 5000
    found, forced = blocks_of(e, text, 1000)
    assert forced > 3
    assert e.tokenizer.decode(np.concatenate(found)) == text
    assert max(map(len, found)) <= 6000


def test_a_token_across_a_space_forbids_the_cut(small_blocks):
    """A vocabulary whose tokens hold several words, without a pre-tokenizer that would cut before each."""
    pieces = ["a", "b", "▁", "▁b", "a▁", "a▁b"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-9.0, -9.0, -9.0, -3.0, -2.0, -1.0], np.float32),
    }
    e = Encoder(GGUFTokenizer(sentencepiece_metadata(**changes)))
    text = "a b " * 400 + "b b " * 100
    found, forced = blocks_of(e, text, 300)
    assert forced == 0
    assert np.array_equal(np.concatenate(found), e.plain(text))
    assert b"a " in BlockEncoder(e)._inside


def test_records_are_encoded_by_their_kind():
    e, where = encoder(), Place("x")
    assert np.array_equal(e.encode(Completion("he", "llo", where)).ids, e.completion("he", "llo").ids)
    assert np.array_equal(
        e.encode(Conversation(TWO_TURNS, None, where), "all").labels, e.conversation(TWO_TURNS, None, "all").labels
    )
