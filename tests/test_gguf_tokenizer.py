"""Tokenizers out of GGUF files, and into them. The published test vectors of llama.cpp are used where they were fetched."""

import numpy as np
import pytest
from fetch_test_data import COMMAND, vocabularies
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_oracle import LlamaCppVocabulary

from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import load_tokenizer, tokenizer_from_json
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError
from toy.files import gguf_write
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import (
    BYTE,
    CHARACTER_OF_BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    tokenizer_metadata,
)

pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def bpe_metadata(**changes):
    """Every byte, a few merges, three special tokens and one user-defined."""
    merged = ["he", "ll", "hell", "hello", "Ġhello", "ĠĠ"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    tokens = [*special, *CHARACTER_OF_BYTE.values(), *merged]
    types = [CONTROL] * 3 + [USER_DEFINED] + [NORMAL] * (256 + len(merged))
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }
    return {name: value for name, value in (metadata | changes).items() if value is not None}


def sentencepiece_metadata(**changes):
    pieces = ["▁", "h", "e", "l", "o", "▁h", "he", "ll", "llo", "▁he", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * 259 + [-10.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return {name: value for name, value in (metadata | changes).items() if value is not None}


def key(name):
    return f"tokenizer.ggml.{name}"


def written(folder, metadata):
    """A GGUF file with this tokenizer and no tensors."""
    gguf_write._write(folder / "t.gguf", {"general.architecture": "llama", **metadata}, [])
    return folder / "t.gguf"


BPE = GGUFTokenizer(bpe_metadata())
SENTENCEPIECE = GGUFTokenizer(sentencepiece_metadata())


def words(tokenizer, ids):
    return [tokenizer.tokens[i] for i in ids]


# -- encoding and decoding ---------------------------------------------------------------------------------------------


def test_bpe_merges_inside_the_pieces_of_the_pre_tokenizer():
    assert words(BPE, BPE.encode("hello hello")) == ["hello", "Ġhello"]
    assert words(BPE, BPE.encode("hellohello")) == ["hello", "hello"]
    assert words(BPE, BPE.encode("42  é")) == ["4", "2", "Ġ", "Ġ", "Ã", "©"]  # digit by digit; "  é" is cut " ", " é"
    assert words(BPE, BPE.encode("   ")) == ["ĠĠ", "Ġ"]
    assert BPE.encode("").tolist() == [] and BPE.encode("x").dtype == np.int32


def test_sentencepiece_takes_the_best_pair_first():
    assert words(SENTENCEPIECE, SENTENCEPIECE.encode("hello")) == ["▁hello"]
    assert words(SENTENCEPIECE, SENTENCEPIECE.encode("hehe")) == ["▁he", "he"]
    assert words(SENTENCEPIECE, SENTENCEPIECE.encode("é")) == ["▁", "<0xC3>", "<0xA9>"]
    plain = GGUFTokenizer(sentencepiece_metadata(**{key("add_space_prefix"): False}))
    assert words(plain, plain.encode("hello")) == ["he", "llo"]


@given(st.text(st.sampled_from("hello \n\t0é…日😀'<|im_end|>") | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decoding_gives_the_text_back(text):
    for tokenizer in (BPE, SENTENCEPIECE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text
        if tokenizer is BPE:
            assert "".join(tokenizer.stream(ids)) == text


def test_special_tokens():
    text = "<|im_start|>hello<|im_end|><tool>"
    parsed = BPE.encode(text, parse_special=True)
    assert words(BPE, parsed) == ["<|im_start|>", "hello", "<|im_end|>", "<tool>"]
    assert BPE.decode(parsed) == "hello<tool>" and BPE.decode(parsed, special=True) == text
    plain = BPE.encode(text)
    assert not {1, 2} & set(plain.tolist()) and plain[-1] == 3  # a user-defined token is one however it is written
    assert BPE.decode(plain) == text
    assert BPE.stop_ids == {0, 2} and (BPE.bos_id, BPE.eos_id, BPE.unk_id) == (1, 2, None)
    eot = GGUFTokenizer(bpe_metadata(**{key("eot_token_id"): 261}))
    assert eot.stop_ids == {0, 2, 261}


def test_what_is_added_at_the_ends():
    assert BPE.encode("hello", add_special=True).tolist() == BPE.encode("hello").tolist()
    both = GGUFTokenizer(bpe_metadata(**{key("add_bos_token"): True, key("add_eos_token"): True}))
    assert words(both, both.encode("hello", add_special=True)) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert words(both, both.encode("hello")) == ["hello"]
    llama3 = GGUFTokenizer(bpe_metadata(**{key("pre"): "llama-bpe", key("add_bos_token"): None}))
    assert llama3.add_bos and SENTENCEPIECE.add_bos  # by default
    assert words(SENTENCEPIECE, SENTENCEPIECE.encode("hello", add_special=True)) == ["<s>", "▁hello"]
    no_bos = GGUFTokenizer(bpe_metadata(**{key("add_bos_token"): True, key("bos_token_id"): None}))
    assert words(no_bos, no_bos.encode("hello", add_special=True)) == ["hello"]


def test_a_character_comes_when_its_last_byte_does():
    ids = BPE.encode("aé😀")
    assert list(BPE.stream(ids)) == ["a", "é", "😀"] and len(ids) == 7
    assert list(BPE.stream(ids[:-1])) == ["a", "é", "\ufffd"]
    assert BPE.decode(ids[:-1]) == "aé\ufffd"
    pieces = BPE.stream(iter(ids))
    assert next(pieces) == "a"
    assert list(SENTENCEPIECE.stream(SENTENCEPIECE.encode("hello"))) == [" hello"]  # a continuation keeps its space


def test_what_cannot_be_encoded_or_decoded():
    with pytest.raises(UnknownCharacterError, match="the prompt is not valid Unicode at offset 1"):
        BPE.encode("a\ud800", "prompt")
    for wrong in (-1, BPE.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            BPE.decode([wrong])


@pytest.mark.parametrize(
    ("special", "stops"),
    [
        (["<|end|>"], {"<|end|>"}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),  # there <|end|> ends a message alone
        (["<|end|>", "<|calls|>", "<|flush|>"], {"<|calls|>", "<|flush|>"}),
        (["<|end|>", "<|return|>"], {"<|end|>", "<|return|>"}),
        (["</s>", "<|tool_response>"], {"<|tool_response>"}),
        (["</s>", "<eos>"], {"</s>", "<eos>"}),
        (["<|fim_pad|>", "<|fim_prefix|>", "<|file_sep|>"], {"<|fim_pad|>", "<|file_sep|>"}),
        (["[PAD]", "<PRE>", "plain"], {"[PAD]"}),
    ],
)
@pytest.mark.parametrize("kind", [CONTROL, NORMAL], ids=["marked", "not marked"])
def test_what_ends_an_answer_by_its_text(special, stops, kind):
    """As in llama.cpp, whether the file marks it or not."""
    metadata = bpe_metadata()
    types = np.concatenate([metadata[key("token_type")], np.full(len(special), kind, np.int32)])
    tokenizer = GGUFTokenizer(
        bpe_metadata(**{key("tokens"): metadata[key("tokens")] + special, key("token_type"): types})
    )
    known = {"<|endoftext|>", "<|im_end|>"}
    assert {tokenizer.tokens[i] for i in tokenizer.stop_ids} == stops | known
    for token in stops:
        assert tokenizer.token_bytes(tokenizer.tokens.index(token)) == b""
    assert metadata[key("token_type")] is not tokenizer.types


@pytest.mark.llama_cpp
def test_special_tokens_are_llama_cpp_s(tmp_path):
    """Which tokens are cut out of a text, parsed or plain, and what is left of them when they are decoded."""
    special = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "</s>", "<|fim_prefix|>", "[PAD]", "<x>", "<EOT>"]
    for kind in (CONTROL, NORMAL, USER_DEFINED):
        metadata = bpe_metadata()
        types = np.concatenate([metadata[key("token_type")], np.full(len(special), kind, np.int32)])
        metadata = bpe_metadata(**{key("tokens"): metadata[key("tokens")] + special, key("token_type"): types})
        tokenizer = GGUFTokenizer(metadata)
        text = "a" + "b".join([*special, "<|im_end|>", "<tool>"]) + "c"
        with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
            for parse_special in (False, True):
                ids = tokenizer.encode(text, parse_special=parse_special).tolist()
                assert ids == llama_cpp.encode(text, parse_special=parse_special), kind
            for i in range(261, tokenizer.vocab_size):  # the server writes special tokens out
                assert tokenizer.decode([i], special=True) == llama_cpp.decode([i])


def test_of_a_merge_that_is_there_twice_the_first_counts():
    metadata = bpe_metadata()
    types = np.append(metadata[key("token_type")], [NORMAL, NORMAL]).astype(np.int32)
    changes = {key("tokens"): [*metadata[key("tokens")], "ab", "bc"], key("token_type"): types}
    for merges, expected in ((["a b", "b c", "a b"], ["ab", "c"]), (["b c", "a b", "b c"], ["a", "bc"])):
        tokenizer = GGUFTokenizer(bpe_metadata(**changes, **{key("merges"): merges}))
        assert words(tokenizer, tokenizer.encode("abc")) == expected


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_template():
    messages = [{"role": "user", "content": "hello"}]
    text = BPE.apply_chat_template(messages)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert BPE.apply_chat_template(messages, add_generation_prompt=False).endswith("<|im_end|>\n")
    assert words(BPE, BPE.encode(text, parse_special=True)).count("<|im_start|>") == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for %}", "the chat template of this model failed"),
        ("{{ messages[5]['role'] + 1 }}", "the chat template of this model failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|failed"),
        ("{{ messages.append(1) }}", "unsafe|failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('only users') }}", "refuses these messages: only users"),
    ],
)
def test_templates_that_fail(template, message):
    tokenizer = GGUFTokenizer(bpe_metadata(**{"tokenizer.chat_template": template}))
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])


def test_templates_know_the_special_tokens():
    tokenizer = GGUFTokenizer(
        bpe_metadata(**{"tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ tools }}"})
    )
    assert tokenizer.apply_chat_template([], tools="none") == "<|im_start|>|<|im_end|>|none"


# -- files -------------------------------------------------------------------------------------------------------------


def test_through_a_file_and_json(tmp_path):
    for metadata in (bpe_metadata(), sentencepiece_metadata()):
        with GGUF.open(written(tmp_path, metadata)) as gguf:
            tokenizer = load_tokenizer(gguf)
        assert tokenizer.tokens == metadata[key("tokens")]
        carried = tokenizer_metadata(tokenizer)
        assert carried.keys() == metadata.keys()
        again = tokenizer_from_json(tokenizer.to_json())
        assert again.encode("hello 12").tolist() == tokenizer.encode("hello 12").tolist()
        written(tmp_path, carried | {key("eos_token_id"): 0})
        with pytest.raises(BadFileError, match="is not the one that this run was trained with"):
            tokenizer_from_json(tokenizer.to_json())


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, ValueError, "there is no tokenizer in it"),
        ({key("model"): "bert"}, ValueError, "its tokenizer is of the kind 'bert'"),
        ({key("model"): 7}, BadFileError, "tokenizer.ggml.model is 7, expected str"),
        (
            bpe_metadata(**{key("pre"): "nonsense"}),
            ValueError,
            "the pre-tokenizer 'nonsense' is not supported; these are",
        ),
        (bpe_metadata(**{key("tokens"): None}), BadFileError, "has no tokens"),
        (bpe_metadata(**{key("tokens"): ["a", "a"]}), BadFileError, "has the token 'a' twice"),
        (bpe_metadata(**{key("tokens"): ["a" * 1025]}), BadFileError, "a token of 1025 characters"),
        (bpe_metadata(**{key("token_type"): np.ones(3, np.int32)}), BadFileError, "token types do not match"),
        (bpe_metadata(**{key("merges"): None}), BadFileError, "has no merges"),
        (bpe_metadata(**{key("merges"): ["he"]}), BadFileError, "has the merge 'he'"),
        (bpe_metadata(**{key("merges"): ["q u"]}), BadFileError, "its merges do not fit its tokens"),
        (bpe_metadata(**{key("bos_token_id"): "1"}), BadFileError, "bos_token_id is '1', expected int"),
        (sentencepiece_metadata(**{key("scores"): None}), BadFileError, "has no score for each"),
        (
            sentencepiece_metadata(**{key("scores"): np.full(270, np.nan, np.float32)}),
            BadFileError,
            "has no score for each",
        ),
    ],
)
def test_metadata_that_make_no_tokenizer(tmp_path, metadata, error, message):
    with GGUF.open(written(tmp_path, metadata)) as gguf, pytest.raises(error, match=message) as caught:
        load_tokenizer(gguf)
    assert type(caught.value) is error


def test_ids_outside_the_vocabulary_are_as_if_they_were_not_there():
    tokenizer = GGUFTokenizer(bpe_metadata(**{key("eos_token_id"): 2**32 - 1}))
    assert tokenizer.eos_id is None and tokenizer.stop_ids == {0, 2}


# -- our own vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "model"),
    [
        (ByteTokenizer(), "rwkv"),
        (CharTokenizer("\t\n\r !\\abc~\x7f\x00"), "rwkv"),
        (CharTokenizer("\n aé~日😀"), "gpt2"),
        (CharTokenizer("ŝ"), "gpt2"),
    ],
)
def test_character_and_byte_vocabularies_come_back(tmp_path, tokenizer, model):
    metadata = tokenizer_metadata(tokenizer)
    assert metadata[key("model")] == model and len(set(metadata[key("tokens")])) == tokenizer.vocab_size
    with GGUF.open(written(tmp_path, metadata)) as gguf:
        assert load_tokenizer(gguf).to_json() == tokenizer.to_json()


def test_ascii_needs_no_end_token_and_other_characters_take_the_least_useful():
    assert key("eos_token_id") not in tokenizer_metadata(CharTokenizer("ab~"))
    assert tokenizer_metadata(CharTokenizer("ab~é"))[key("eos_token_id")] == 2
    assert tokenizer_metadata(CharTokenizer("#@abé"))[key("eos_token_id")] == 1  # @ before #
    assert tokenizer_metadata(CharTokenizer("abé日"))[key("eos_token_id")] == 3


def test_merges_build_each_character_from_its_bytes():
    metadata = tokenizer_metadata(CharTokenizer("a…日本"))
    assert metadata[key("merges")] == ["â Ģ", "âĢ ¦", "æ Ĺ", "æĹ ¥", "æ ľ", "æľ ¬"]
    assert metadata[key("tokens")] == ["a", "âĢ¦", "æĹ¥", "æľ¬"]


def test_vocabularies_that_gguf_has_no_form_for():
    assert tokenizer_metadata(None) == {key("model"): "none"}
    with pytest.raises(ValueError, match=r"U\+D800, which is half a character"):
        tokenizer_metadata(CharTokenizer("a\ud800"))
    with pytest.raises(ValueError, match="no form for a str"):
        tokenizer_metadata("abc")


# -- llama.cpp's test vectors ------------------------------------------------------------------------------------------

# the vocabularies of the kinds that are read, each with 46 texts and the ids they must give (qwen35: 50)
VOCABULARIES = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2",
    "qwen35", "refact", "starcoder",
)  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vectors(name):
    folder = vocabularies()
    if folder is None:
        pytest.skip(f"llama.cpp's tokenizer test vectors are not in the cache ({COMMAND})")
    path = folder / f"ggml-vocab-{name}.gguf"
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    texts, lines = texts[:-1], lines[: len(texts) - 1]  # both files end with an empty one
    assert len(texts) == len(lines) >= 46
    with GGUF.open(path) as gguf:
        tokenizer = load_tokenizer(gguf)
    for text, line in zip(texts, lines):
        ids = tokenizer.encode(text)
        assert ids.tolist() == [int(i) for i in line.split()], text
        assert tokenizer.decode(ids) == text
