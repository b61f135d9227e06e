"""Subword vocabularies made from a text: the page that shows how, the library that does it, and llama.cpp that reads them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_oracle import LlamaCppVocabulary, differing, hard_texts

from toy.data import bpe, make_tokenizer, tokenizer_from_json
from toy.data.bpe_tokenizer import BPETokenizer
from toy.data.corpora import python_documentation
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import load_tokenizer, open_tokenizer
from toy.data.tokenizers import UnknownCharacterError
from toy.files import gguf_write
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import CHARACTER_OF_BYTE, tokenizer_metadata

pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")

DOCUMENTATION = python_documentation().text
TEXT = DOCUMENTATION[:60_000] + "\n".join(hard_texts(500))
BPE = BPETokenizer.train(TEXT, 700)
ANY_TEXT = st.text(
    st.sampled_from("the \n\t0é…日😀'<|endoftext|>") | st.characters(exclude_categories=["Cs"]), max_size=60
)


def merges_of(tokenizer):
    """As `toy.data.bpe` writes them: pairs of ids."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    return [tuple(ids[part] for part in merge.split(" ")) for merge in tokenizer.metadata["tokenizer.ggml.merges"]]


# -- the page and the library ------------------------------------------------------------------------------------------

TEXTS = {
    "documentation": DOCUMENTATION[:40_000],
    "hard": "\n".join(hard_texts(300, seed=5)) * 2,
    "ties": "ab cd ef gh ab cd ef gh ba dc fe hg ba dc fe hg " * 2,
    "overlaps": "aaaa aaa aaaaa abab ababa aaaa aaa aaaaa abab ababa",
    "long": ("=" * 700 + "\n" + "ab" * 300 + "\n") * 2,  # tokens would grow without end
    "scripts": "".join(chr(code) for code in range(0x20, 0x900)) * 2,
    "low": "low low low low low lower lower newest newest newest newest newest newest widest widest widest",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_page_gives_the_library_s_merges_and_ids(name):
    text = TEXTS[name]
    merges = bpe.train(text, 600)
    assert len(merges) >= 5
    tokenizer = BPETokenizer.train(text, 256 + len(merges) + 1)
    assert merges_of(tokenizer) == merges
    if 256 + len(merges) < 600:  # there are no more pairs
        with pytest.raises(ValueError, match=f"make one of {256 + len(merges) + 1}; ask for at most so many"):
            BPETokenizer.train(text, 256 + len(merges) + 2)
    for other in (text, DOCUMENTATION[40_000:45_000], *hard_texts(100, seed=6)):
        ids = tokenizer.encode(other).tolist()
        assert bpe.encode(other, merges) == ids
        assert bpe.decode(ids, merges) == other


def test_a_pair_must_stand_there_twice_and_no_token_is_longer_than_a_word_can_be():
    assert bpe.train("ab", 300) == []
    assert [bpe.BYTES[i] for i in bpe.train("ab ab", 257)[0]] == [ord("a"), ord("b")]
    tokenizer = BPETokenizer.train(TEXTS["long"], 256 + len(bpe.train(TEXTS["long"], 600)) + 1)
    assert max(map(len, tokenizer.tokens)) == bpe.LONGEST_TOKEN


@given(ANY_TEXT)
def test_words_are_the_text(text):
    assert "".join(bpe.cut(text)) == text


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_decoding_gives_any_text_back(text):
    ids = BPE.encode(text)
    assert ids.dtype == np.int32 and (not len(ids) or 0 <= ids.min() <= ids.max() < BPE.vocab_size - 1)
    assert BPE.decode(ids) == text == "".join(BPE.stream(ids))
    assert b"".join(BPE.token_bytes(i) for i in ids) == text.encode()


def test_it_is_laid_out_as_gpt2():
    assert BPE.vocab_size == len(BPE.tokens) == 700
    assert BPE.tokens[:256] == sorted(CHARACTER_OF_BYTE.values()) and BPE.tokens[0] == "!"
    assert BPE.tokens[-1] == "<|endoftext|>"
    assert BPE.bos_id == BPE.eos_id == 699 and BPE.stop_ids == {699}
    assert not BPE.add_bos and not BPE.add_eos
    assert BPE.encode("the", add_special=True).tolist() == BPE.encode("the").tolist()


def test_the_end_of_a_text_is_a_token_where_special_tokens_are_parsed():
    text = "one<|endoftext|>two"
    assert BPE.encode(text, parse_special=True).tolist().count(699) == 1
    assert 699 not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode(BPE.encode(text, parse_special=True)) == "onetwo"
    assert BPE.decode(BPE.encode(text, parse_special=True), special=True) == text


def test_a_better_vocabulary_is_a_larger_one():
    sizes = [len(BPETokenizer.train(TEXT, size).encode(DOCUMENTATION[60_000:90_000])) for size in (257, 300, 700, 2000)]
    assert sizes[0] == len(DOCUMENTATION[60_000:90_000].encode())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * sizes[0]


def test_training_is_the_same_every_time_and_takes_texts_one_by_one():
    again = BPETokenizer.train(TEXT, 700)
    assert again.to_json() == BPE.to_json()
    lines = TEXT.splitlines(keepends=True)
    assert BPETokenizer.train(iter(lines), 400).vocab_size == 400
    one_by_one = BPETokenizer.train((f"word{n % 7} " for n in range(1000)), 260)
    assert one_by_one.tokens[256:259] == ["or", "wor", "word"]


def test_half_a_character_is_refused():
    with pytest.raises(UnknownCharacterError, match="the prompt is not valid Unicode at offset 1"):
        BPE.encode("a\ud800", "prompt")
    with pytest.raises(UnknownCharacterError, match="not valid Unicode at offset 2"):
        BPETokenizer.train("ab\udfff", 300)


def test_through_json():
    data = json.loads(json.dumps(BPE.to_json()))
    again = tokenizer_from_json(data)
    assert type(again) is BPETokenizer and again.metadata.keys() == BPE.metadata.keys()
    assert again.encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    assert again.sha256 == BPE.sha256


@pytest.mark.parametrize(
    "merges",
    [["ab c"], ["a b", "a b"], ["a b", "b c", "ab c", "a bc"], ["ab"], [""], ["a  b"], [" ab"], [1], "a b", None],
)
def test_merges_that_make_no_vocabulary_are_refused(merges):
    assert tokenizer_from_json({"kind": "bpe", "merges": ["a b", "ab c"]}).vocab_size == 259
    with pytest.raises(ValueError, match=r"tokenizer|does not make a new token|list of merges"):
        tokenizer_from_json({"kind": "bpe", "merges": merges})


@pytest.mark.parametrize("size", [0, 256, 2**18 + 1, 300.0, "300", True])
def test_a_vocabulary_size_out_of_range_is_refused(size):
    assert BPETokenizer.train("", 257).vocab_size == 257
    with pytest.raises(ValueError, match=r"must have from 257 .* to 262144 tokens, got"):
        BPETokenizer.train(TEXT, size)


def test_a_text_too_short_for_the_vocabulary_is_told_with_the_size_it_can_have():
    with pytest.raises(
        ValueError, match=r"too short for a vocabulary of 500 tokens.* make one of 268; ask for at most"
    ):
        BPETokenizer.train("abab baba abba abab baba abba aabb aabb " * 2, 500)
    assert BPETokenizer.train("abab baba abba abab baba abba aabb aabb " * 2, 268).vocab_size == 268


def test_made_by_name():
    tokenizer = make_tokenizer("bpe", TEXT, 300)
    assert type(tokenizer) is BPETokenizer and tokenizer.vocab_size == 300
    assert make_tokenizer("bpe", DOCUMENTATION).vocab_size == 2048
    assert make_tokenizer("char", iter(["ab", "bc"])).characters == "abc"
    for kind in ("char", "bytes"):
        with pytest.raises(ValueError, match=f"for the tokenizer bpe alone, not for {kind}"):
            make_tokenizer(kind, TEXT, 300)


def test_without_the_library_it_says_what_to_install():
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from toy.data import make_tokenizer\n"
        "try: make_tokenizer('bpe', 'some text', 300)\n"
        "except RuntimeError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == "the tokenizer bpe: this needs the package tokenizers; install it with: pip install tokenizers\n"


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_same_ids(tmp_path):
    metadata = tokenizer_metadata(BPE)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    gguf_write._write(tmp_path / "t.gguf", {"general.architecture": "llama", **metadata}, [])
    with GGUF.open(tmp_path / "t.gguf") as gguf:
        read = load_tokenizer(gguf)
    assert type(read) is GGUFTokenizer and read.stop_ids == BPE.stop_ids
    assert read.encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    whole = open_tokenizer(tmp_path / "t.gguf")
    (tmp_path / "t.gguf").unlink()
    again = tokenizer_from_json(json.loads(json.dumps(whole.to_json())))
    assert again.encode(TEXT).tolist() == BPE.encode(TEXT).tolist()
    assert again.sha256 == read.sha256


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_llama_cpp_gives_the_same_ids_on_a_megabyte(tmp_path):
    """Python's documentation, emoji, digits, white space, and every script there is."""
    tokenizer = BPETokenizer.train(DOCUMENTATION + TEXT, 4000)
    characters = "".join(chr(c) for c in [*range(1, 0xD800), *range(0xE000, 0x20000)])
    scripts = [f"{characters[k : k + 40]} {characters[k : k + 7]}\n" for k in range(0, len(characters), 40)]
    texts = [DOCUMENTATION[k : k + 2000] for k in range(0, len(DOCUMENTATION), 2000)]
    texts += hard_texts(3000, seed=7) + scripts
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    with LlamaCppVocabulary(tmp_path, tokenizer_metadata(tokenizer)) as llama_cpp:
        wrong = differing(texts, lambda text: tokenizer.encode(text).tolist(), llama_cpp.encode, joint="")
        assert not wrong, wrong[:5]
        text = "one<|endoftext|>two" + "".join(texts[:5])
        assert tokenizer.encode(text, parse_special=True).tolist() == llama_cpp.encode(text, parse_special=True)
        assert llama_cpp.decode(tokenizer.encode(texts[0] + texts[300])) == texts[0] + texts[300]
