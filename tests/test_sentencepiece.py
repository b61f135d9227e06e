"""SentencePiece vocabularies: joined by score, the leftmost of equal ones. Judges: the rule written out, and llama.cpp."""

import itertools
import random

import numpy as np
import pytest
from tokenizer_oracle import LlamaCppVocabulary, hard_texts

from toy.data import gguf_tokenizer
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.tokenizers import UnknownCharacterError
from toy.files.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

LETTERS = "ab▁\n"


def vocabulary(pieces, scores, **changes):
    """GGUF metadata: the unknown token, two control tokens, all bytes, and these pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(scores), np.float32),
    }
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def random_vocabulary(seed, n=60, n_scores=4, letters=LETTERS):
    """Pieces of few letters, and so few scores that most of them tie."""
    generator = random.Random(seed)
    pieces = {"".join(generator.choices(letters, k=generator.choice((2, 2, 2, 3, 3, 4, 5)))) for _ in range(n)}
    pieces = sorted(pieces | {"▁", generator.choice(letters)})
    return vocabulary(pieces, [-float(generator.randint(1, n_scores)) for _ in pieces], add_space_prefix=seed % 2 == 0)


def plainly(metadata, text):
    """The rule, word for word: join the two neighbours whose token has the best score, the leftmost of equal ones."""
    tokens, types, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    known = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    symbols = list(((" " if metadata["tokenizer.ggml.add_space_prefix"] else "") + text).replace(" ", "▁"))
    while True:
        found = [(-scores[known[a + b]], k) for k, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in known]
        if not found:
            break
        k = min(found)[1]
        symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    ids = []
    for symbol in symbols:
        ids += [known[symbol]] if symbol in known else [3 + byte for byte in symbol.encode()]
    return ids


@pytest.mark.parametrize("seed", range(12))
def test_the_leftmost_of_the_best_is_joined_first(seed):
    metadata = random_vocabulary(seed)
    tokenizer, generator = GGUFTokenizer(metadata), random.Random(seed)
    for _ in range(150):
        text = "".join(generator.choices("aab b\né", k=generator.randint(1, 30)))
        assert tokenizer.encode(text).tolist() == plainly(metadata, text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_order_of_ties():
    metadata = vocabulary(["a", "b", "ab", "ba", "aba"], [-9.0, -9.0, -1.0, -1.0, -2.0], add_space_prefix=False)
    tokenizer = GGUFTokenizer(metadata)
    assert [tokenizer.tokens[i] for i in tokenizer.encode("aba")] == ["aba"]
    assert [tokenizer.tokens[i] for i in tokenizer.encode("bab")] == ["ba", "b"]  # not b, ab: the leftmost
    metadata["tokenizer.ggml.scores"][-2] = -3  # now ba is worse than ab
    assert [tokenizer.tokens[i] for i in GGUFTokenizer(metadata).encode("bab")] == ["b", "ab"]
    runs = vocabulary(["a", "aa", "aaa"], [-9.0, -1.0, -1.0], add_space_prefix=False)
    assert [tokenizer.tokens[i] for tokenizer in [GGUFTokenizer(runs)] for i in tokenizer.encode("aaaaa")] == [
        "aaa",
        "aa",
    ]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("seed", range(6))
def test_llama_cpp_joins_the_same(tmp_path, seed):
    metadata = random_vocabulary(seed, n=40 + 20 * seed, n_scores=1 + seed)
    tokenizer, generator = GGUFTokenizer(metadata), random.Random(seed)
    texts = ["".join(generator.choices("aab b\né", k=generator.randint(1, 60))) for _ in range(200)]
    with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
        for text in [*texts, *hard_texts(20), "a" * 3000, "ab" * 1500]:
            assert tokenizer.encode(text).tolist() == llama_cpp.encode(text), text


@pytest.mark.llama_cpp
def test_special_tokens_and_defaults_are_llama_cpp_s(tmp_path):
    """Ids that the file does not name, tokens of every type, overlapping ones, and where spaces are put."""
    pieces = ["a", "b", "▁", "ab", "<x>", "<xy>", "y><x", "<|im_end|>", "[unused]", "bab"]
    metadata = vocabulary(pieces, [-float(k) for k in range(len(pieces))])
    for piece, kind in (("<x>", USER_DEFINED), ("<xy>", CONTROL), ("y><x", USER_DEFINED), ("[unused]", UNUSED)):
        metadata["tokenizer.ggml.token_type"][metadata["tokenizer.ggml.tokens"].index(piece)] = kind
    tokenizer = GGUFTokenizer(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert {tokenizer.tokens[i] for i in tokenizer.stop_ids} == {"</s>", "<|im_end|>"}
    texts = ["ab", "", "<x>ab", "a<xy><x>b", "<xy><x", "<s>a</s>b", "a b<|im_end|> b", "<unk>", "a<x> b", "<0x41>"]
    with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
        for text in texts:
            for options in (
                {},
                {"parse_special": True},
                {"add_special": True},
                {"add_special": True, "parse_special": True},
            ):
                assert tokenizer.encode(text, **options).tolist() == llama_cpp.encode(text, **options), (text, options)


def test_blocks_give_the_ids_of_the_whole(monkeypatch):
    """With tokens that reach over words, over lines, and over neither."""
    text = "".join(random.Random(1).choices(["ab ba", " a", "b", "\n", "\nab", "<x>", "cd", "dc \n"], k=5000))
    for letters, n_blocks in (("ab▁\n", 1), ("abcd▁", 50), ("b▁", 100)):
        metadata = random_vocabulary(2, n=40, letters=letters)
        metadata["tokenizer.ggml.tokens"][1] = "<x>"
        metadata["tokenizer.ggml.token_type"][1] = USER_DEFINED
        tokenizer = GGUFTokenizer(metadata)
        whole = tokenizer.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(gguf_tokenizer, "_BLOCK", 50)
            assert np.array_equal(tokenizer.encode(text), whole)
            blocks = list(gguf_tokenizer.blocks_of(text.replace("<x>", ""), tokenizer._starts, tokenizer._stretch))
        assert len(blocks) >= n_blocks and (len(blocks) == 1) is (n_blocks == 1)


def test_characters_without_a_token():
    pieces = ["a", "▁"]
    metadata = vocabulary(pieces, [-1.0, -2.0])
    tokens = metadata["tokenizer.ggml.tokens"]
    with_bytes = GGUFTokenizer(metadata)
    assert [with_bytes.tokens[i] for i in with_bytes.encode("aé")] == ["▁", "a", "<0xC3>", "<0xA9>"]
    tokens[3:259] = [f"[{k}]" for k in range(256)]
    unknown = GGUFTokenizer(metadata)
    assert [unknown.tokens[i] for i in unknown.encode("aéé日a")] == ["▁", "a", "<unk>", "a"]  # one for those in a row
    assert [unknown.tokens[i] for i in unknown.encode("aé\né")] == ["▁", "a", "<unk>"]  # in several pieces, too
    tokens[0], metadata["tokenizer.ggml.unknown_token_id"] = "[x]", 5
    metadata["tokenizer.ggml.token_type"][0] = NORMAL
    assert GGUFTokenizer(metadata).encode("é").tolist()[-1] == 5


def test_no_special_token_is_joined_from_characters():
    """Written out in a plain text it stays text, even where all its parts are tokens; in real vocabularies they are not."""
    metadata = vocabulary(["<s", "s>", "</s", "<0", "<0x", "<0x4", "<0x41", "x"], [-1.0] * 8, add_space_prefix=False)
    tokenizer = GGUFTokenizer(metadata)
    for text in ("<s>", "</s>", "x<s>x", "<0x41>", "<unk>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids.tolist()) and len(ids) > 1
    assert tokenizer.encode("<s>", parse_special=True).tolist() == [1]


def test_a_vocabulary_with_neither_bytes_nor_an_unknown_token():
    tokens = ["a", "▁"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL, NORMAL], np.int32),
        "tokenizer.ggml.scores": np.array([-1.0, -2.0], np.float32),
    }
    tokenizer = GGUFTokenizer(metadata)
    tokenizer._encoder._unknown_id = None  # by default it is token 0
    assert tokenizer.encode("a a").tolist() == [1, 0, 1, 0]
    with pytest.raises(
        UnknownCharacterError, match="the prompt has characters that this tokenizer has neither a token"
    ):
        tokenizer.encode("aé", "prompt")
