"""Where texts are cut before byte-level BPE: every rule against llama.cpp, character by character."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracle import LlamaCppVocabulary, differing, every_character, hard_texts

from toy.data import gguf_tokenizer
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.pre_tokenizers import PRE_TOKENIZERS, digit_groups
from toy.files.gguf_vocabulary import CHARACTER_OF_BYTE, NORMAL

pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")

# The rules that are the first of their kind; the others differ from one of them by name alone
FIRST = {(rule.patterns, rule.digits): name for name, rule in reversed(PRE_TOKENIZERS.items())}.values()
# What llama.cpp knows and this library refuses: they are not byte-level
REFUSED = ("gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe", "whitespace")


def every_pair(pre):
    """A vocabulary of all bytes and all pairs of them, merged in no order: nearly every cut shows in the ids."""
    characters = list(CHARACTER_OF_BYTE.values())
    pairs = [(left, right) for left in characters for right in characters]
    random.Random(0).shuffle(pairs)
    tokens = characters + [left + right for left, right in pairs]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.full(len(tokens), NORMAL, np.int32),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def bytes_alone(pre):
    """The bytes, and one merge for each two letters: enough to see what stands together."""
    metadata = every_pair(pre)
    letters = [f"{a} {b}" for a in "ĠabcAB01" for b in "abcAB01"]
    tokens = metadata["tokenizer.ggml.tokens"][:256] + [merge.replace(" ", "") for merge in letters]
    return metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.full(len(tokens), NORMAL, np.int32),
        "tokenizer.ggml.merges": letters,
    }


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_cuts_at_the_same_places(tmp_path, pre):
    metadata = every_pair(pre)
    tokenizer = GGUFTokenizer(metadata)
    thorough = settings.default.max_examples > 100  # --hypothesis-profile=thorough: every character there is
    step = (1 if thorough else 25) if pre in FIRST else 400
    texts = hard_texts(600 if pre in FIRST else 100) + every_character(step)
    with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
        for k in range(0, len(texts), 500):
            wrong = differing(texts[k : k + 500], lambda text: tokenizer.encode(text).tolist(), llama_cpp.encode)
            assert not wrong, wrong[:5]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "chameleon", "qwen2", "glm4", "gpt-4o", "deepseek-v3"])
def test_llama_cpp_has_the_same_defaults(tmp_path, pre):
    """Whether a beginning is added, and whether a piece that is a token is built from merges, where the file says nothing."""
    metadata = bytes_alone(pre)
    metadata["tokenizer.ggml.tokens"] += ["hello", "ing"]  # tokens without merges
    metadata["tokenizer.ggml.token_type"] = np.full(len(metadata["tokenizer.ggml.tokens"]), NORMAL, np.int32)
    del metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]
    tokenizer = GGUFTokenizer(metadata)
    with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
        for text in ("hello", "hello hello1ing ing", ""):
            assert tokenizer.encode(text, add_special=True).tolist() == llama_cpp.encode(text, add_special=True)


@pytest.mark.parametrize("pre", REFUSED)
def test_rules_that_are_not_byte_level_are_refused(pre):
    with pytest.raises(ValueError, match=f"the pre-tokenizer '{pre}'.* is not supported; these are: .*qwen2"):
        GGUFTokenizer(every_pair(pre))


@pytest.mark.parametrize("pre", FIRST)
def test_nothing_is_merged_across_the_places_where_blocks_end(pre):
    """A long text is encoded in blocks: wherever one may end, the ids are those of the whole."""
    rule = PRE_TOKENIZERS[pre]
    tokenizer = GGUFTokenizer(every_pair(pre))
    if rule.blocks is None:
        assert pre == "superbpe"
        return
    generator, n_places = random.Random(2), 0
    for text in [*hard_texts(300, seed=3, length=60), "x\nabc a b c'll d. e\nF\r\ng 12 h\n\ni  j"]:
        text = "".join(c + generator.choice(("", "\na", " b", "z y")) for c in text)
        whole = tokenizer.encode(text).tolist()
        places = [match.start() for match in re.finditer(rule.blocks, text)]
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]
        assert [i for part in parts for i in tokenizer.encode(part).tolist()] == whole, text
        n_places += len(places)
    assert n_places > 1000


def test_blocks_give_the_ids_of_the_whole(monkeypatch):
    tokenizer = GGUFTokenizer(every_pair("qwen2"))
    text = "\n".join(hard_texts(2000, seed=4)) + " some words\nand Lines at the end\n" * 50
    blocks = list(gguf_tokenizer.blocks_of(text, tokenizer._starts, tokenizer._stretch))
    assert len(blocks) == 1 and blocks[0] == text
    whole = tokenizer.encode(text)
    monkeypatch.setattr(gguf_tokenizer, "_BLOCK", 100)
    blocks = list(gguf_tokenizer.blocks_of(text, tokenizer._starts, tokenizer._stretch))
    assert len(blocks) > 50 and "".join(blocks) == text
    assert np.array_equal(tokenizer.encode(text), whole)


@given(st.text(st.sampled_from("0123456789٣²a \n") | st.characters(exclude_categories=["Cs"]), max_size=40))
def test_numbers_are_grouped_from_the_right(text):
    for kind in ("any", "ascii"):
        assert "".join(digit_groups(text, kind)) == text


def test_how_numbers_are_grouped():
    assert digit_groups("a1234567b", "any") == ["a1", "234", "567", "b"]
    assert digit_groups("a1234567b", "ascii") == ["a", "1", "234", "567", "b"]
    assert digit_groups("123 12", "any") == ["123", " 12"]
    assert digit_groups("1234٣", "ascii") == ["1", "234٣"]
