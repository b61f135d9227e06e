"""Tokenizers from strangers, and texts that are hard on them: bounded time and memory, or one sentence that names the file.

What is to be bounded runs in a process of its own, with a limit on its processor time (not on the clock: a busy machine
breaks no test) and its memory.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_gguf_tokenizer import bpe_metadata, key, sentencepiece_metadata, written
from test_pre_tokenizers import FIRST
from test_tokenizer_json import BYTE_LEVEL, SP, changed
from test_tokenizer_json import written as written_json

from toy.data import gguf_tokenizer
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import load_tokenizer, open_tokenizer
from toy.data.pre_tokenizers import PRE_TOKENIZERS
from toy.data.special_tokens import SpecialTokens
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
pytestmark = pytest.mark.slow

BEGIN = """
import resource, sys
import numpy as np
from toy.data.open_tokenizer import load_tokenizer, open_tokenizer
from toy.files.gguf import GGUF
import tokenizers
page = resource.getpagesize()
used = int(open("/proc/self/statm").read().split()[0]) * page
resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes} * 2**20,) * 2)
spent = resource.getrusage(resource.RUSAGE_SELF)
resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + {seconds} + 1,) * 2)
"""


def bounded(code, *arguments, seconds=20, megabytes=300):
    """What the code prints, run with so much processor time and so much memory beyond that of its imports."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not bound the memory of a process")
    code = BEGIN.format(seconds=seconds, megabytes=megabytes) + code
    root = str(Path(gguf_tokenizer.__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"ended with {ended.returncode}: {ended.stderr[-500:]}"
    return ended.stdout


def nested(letters, longest=1024):
    """SentencePiece metadata: a, aa, aaa, ... for each letter."""
    pieces = ["▁", *(letter * n for letter in letters for n in range(1, longest + 1))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * 259 + [-float(n) for n in range(len(pieces))]
    return sentencepiece_metadata(
        **{
            key("tokens"): tokens,
            key("token_type"): np.array(types, np.int32),
            key("scores"): np.array(scores, np.float32),
        }
    )


def with_special(tokens, kind=CONTROL):
    """Byte-level metadata with further special tokens."""
    metadata = bpe_metadata()
    types = np.concatenate([metadata[key("token_type")], np.full(len(tokens), kind, np.int32)])
    return bpe_metadata(**{key("tokens"): metadata[key("tokens")] + tokens, key("token_type"): types})


# -- files that take much ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", ["a", "abcde"], ids=["512 kB", "2.5 MB"])
def test_nested_sentencepiece_tokens(tmp_path, letters):
    path = written(tmp_path, nested(letters))
    told = bounded(
        "with GGUF.open(sys.argv[1]) as gguf: tokenizer = load_tokenizer(gguf)\n"
        "for text in ('a' * 60_000, 'ab' * 30_000, 'a' * 1023 + 'b'):\n"
        "    ids = tokenizer.encode(text)\n"
        "    assert tokenizer.decode(ids) == text\n"
        "    print(len(ids))",
        path,
        megabytes=100,
    )
    runs, alternating, almost = (int(n) for n in told.split())
    assert runs < 100 and alternating >= 60_000 and almost < 20


def test_many_special_tokens_and_a_long_prompt(tmp_path):
    path = written(tmp_path, with_special([f"<c{n}>" for n in range(200_000)]))
    told = bounded(
        "with GGUF.open(sys.argv[1]) as gguf: tokenizer = load_tokenizer(gguf)\n"
        "for text in ('hello <c17> ' * 5000, '<c' * 30_000, '<c199999>' * 6600, 'x' * 60_000):\n"
        "    ids = tokenizer.encode(text, parse_special=True)\n"
        "    assert tokenizer.decode(ids, special=True) == text\n"
        "    print(len(ids))",
        path,
    )
    assert [int(n) for n in told.split()] == [15_001, 60_000, 6600, 60_000]


@pytest.mark.parametrize("ending", ["", "b"], ids=["that match", "that nearly match"])
def test_nested_special_tokens(tmp_path, ending):
    path = written(tmp_path, with_special(["a" * n + ending for n in range(2, 122)]))
    told = bounded(
        "with GGUF.open(sys.argv[1]) as gguf: tokenizer = load_tokenizer(gguf)\n"
        "print(len(tokenizer.encode('a' * 60_000, parse_special=True)))",
        path,
    )
    assert int(told) == (60_000 if ending else -(-60_000 // 121))


@pytest.mark.parametrize(
    ("longest", "message"), [(500, "does not merge"), (1000, "has tokens that are longer than any tokenizer's")]
)
def test_nested_tokens_in_a_tokenizer_json(tmp_path, longest, message):
    pieces = ["▁" * n for n in range(1, longest + 1)]
    ids = {token: i for i, token in enumerate([*list(SP["model"]["vocab"])[:259], *pieces])}
    merges = [["▁" * k, "▁" * (n - k)] for n in range(2, 201) for k in range(1, n)]
    path = written_json(tmp_path, changed(SP, model__vocab=ids, model__merges=merges))
    told = bounded(
        "try: open_tokenizer(sys.argv[1])\nexcept ValueError as error: print(error)", path, megabytes=300, seconds=60
    )
    assert str(path) in told and message in told  # 201 of them have no merge


def test_a_vocabulary_as_large_as_a_file_can_hold(tmp_path):
    """Memory grows with the file, not with its square."""
    metadata = bpe_metadata()
    characters = metadata[key("tokens")][4:260]
    pairs = [f"{a} {b}" for a in characters for b in characters]
    pairs += [f"{a}{b} {c}" for a in characters[:41] for b in characters[:41] for c in characters]
    tokens = characters + [pair.replace(" ", "") for pair in pairs]
    path = written(
        tmp_path,
        bpe_metadata(
            **{
                key("tokens"): tokens,
                key("token_type"): np.full(len(tokens), NORMAL, np.int32),
                key("merges"): pairs,
            }
        ),
    )
    assert path.stat().st_size > 13 * 2**20
    told = bounded(
        "with GGUF.open(sys.argv[1]) as gguf: print(load_tokenizer(gguf).vocab_size)", path, megabytes=700, seconds=60
    )
    assert int(told) == len(tokens)


# -- what is refused, and how ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (["<" + "x" * 255], ["<" + "x" * 256], "has a special token of 257 bytes, longer than any tokenizer's"),
        (["é" * 128], ["é" * 129], "has a special token of 258 bytes"),
        (
            ["a" * n for n in range(14, 130)],
            ["a" * n for n in range(14, 150)],
            "has special tokens of 140 different lengths, more than any",
        ),
    ],
    ids=["long", "long in bytes", "lengths"],
)
def test_special_tokens_that_no_tokenizer_has(tmp_path, good, bad, message, kind):
    for tokens, wrong in ((good, False), (bad, True)):
        path = written(tmp_path, with_special(tokens, kind))
        with GGUF.open(path) as gguf:
            if not wrong:
                assert load_tokenizer(gguf).vocab_size == 266 + len(tokens)
                continue
            with pytest.raises(BadFileError, match=message) as caught:
                load_tokenizer(gguf)
        assert caught.value.path == path and "\n" not in str(caught.value)


def test_what_a_file_says_is_shown_without_what_a_terminal_acts_on(tmp_path):
    for changes, kind in (
        ({key("pre"): "\x1b[2J\x07"}, ValueError),
        ({key("tokens"): ["\x1b[31mred", "\x1b[31mred"]}, BadFileError),
        ({key("merges"): ["\x1b]0;title\x07"]}, BadFileError),
        ({key("merges"): ["\x1b \x9b"]}, BadFileError),
        ({key("model"): "\x1b[2J"}, ValueError),
    ):
        with GGUF.open(written(tmp_path, bpe_metadata(**changes))) as gguf, pytest.raises(kind) as caught:
            load_tokenizer(gguf)
        assert not {"\x1b", "\x07", "\x9b"} & set(str(caught.value))


def test_a_tokenizer_json_with_a_pattern_of_its_own_is_never_run(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(\\p{L}+)+$"}, "behavior": "Isolated", "invert": False}
    pre_tokenizers = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    data = changed(BYTE_LEVEL, pre_tokenizer={"type": "Sequence", "pretokenizers": pre_tokenizers})
    with pytest.raises(ValueError, match=r"cuts words by .* has no name for"):
        open_tokenizer(written_json(tmp_path, data))


# -- texts -------------------------------------------------------------------------------------------------------------

RUNS = """
from toy.data.pre_tokenizers import PRE_TOKENIZERS, digit_groups, split_and_encode_bytes
n = 100_000
texts = {
    "spaces, then a sign": " " * n + "\\U0001f600", "lines and spaces": ("\\n" + " " * 99) * (n // 100) + "\\U0001f600",
    "white space": "\\u3000" * n + "x", "returns": (" " * 999 + "\\r") * (n // 1000) + "x", "digits": "1" * n + "x",
    "capitals": "A" * n + "1", "words": "a " * (n // 2), "marks": "a\\u0301" * (n // 2), "signs": "./\\n" * (n // 3),
    "quotes": "'r" * (n // 2), "chinese": "\\u65e5" * n, "emoji": "\\U0001f600\\u200d" * (n // 2),
}
rule = PRE_TOKENIZERS[sys.argv[1]]
cut = split_and_encode_bytes(rule)
for name, text in texts.items():
    pieces = digit_groups(text, rule.digits) if rule.digits else [text]
    print(name, sum(len(cut.pre_tokenize_str(piece)) for piece in pieces[:2000] + pieces[-1:]))
"""


@pytest.mark.parametrize("pre", FIRST)
def test_no_pattern_takes_more_than_linear_time(pre):
    """Long runs of one kind, which patterns that look at a run again from each of its characters take minutes for."""
    told = bounded(RUNS, pre, seconds=20, megabytes=2000)
    assert len(told.splitlines()) == 12


def test_a_stretch_without_an_end_is_refused_and_a_shorter_one_encoded(monkeypatch):
    """Beyond some million characters Oniguruma gives up, and memory grows by some hundred bytes for each."""
    assert gguf_tokenizer._LONGEST_STRETCH == 2**20
    monkeypatch.setattr(gguf_tokenizer, "_LONGEST_STRETCH", 100_000)
    byte_level, sentencepiece = GGUFTokenizer(bpe_metadata()), GGUFTokenizer(sentencepiece_metadata())
    for tokenizer in (byte_level, sentencepiece):
        for letter in "x日":
            assert tokenizer.decode(tokenizer.encode(letter * 100_000)) == letter * 100_000
            with pytest.raises(ValueError, match=r"the prompt has a stretch of 100,00[12] characters"):
                tokenizer.encode(letter * 100_001, "prompt")
        text = "x" * 90_000 + "日 " + "y" * 90_000
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", ["gpt-4o", "qwen2", "exaone-moe", "kimi-k2"])  # jais-2 passes too, in half a minute
def test_the_longest_stretch_is_cut(pre):
    """As long as it may be: the library's search does not give up."""
    told = bounded(
        "from toy.data.pre_tokenizers import PRE_TOKENIZERS, split_and_encode_bytes\n"
        "from toy.data.gguf_tokenizer import _LONGEST_STRETCH as n\n"
        "cut = split_and_encode_bytes(PRE_TOKENIZERS[sys.argv[1]])\n"
        "for text in ('A' * n, ' ' * (n - 1) + 'x', 'Aé' * (n // 2)): print(len(cut.pre_tokenize_str(text)) > 0)",
        pre,
        seconds=60,
        megabytes=3000,
    )
    assert told.split() == ["True"] * 3


def test_a_long_text_takes_the_memory_of_a_block():
    """16 MB: 64 MB of ids, and some 2 GB more if it were encoded at once."""
    told = bounded(
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_gguf_tokenizer as t\n"
        "from toy.data.gguf_tokenizer import GGUFTokenizer\n"
        "line = 'some words of a line, and 12 numbers\\n'\n"
        "for metadata in (t.bpe_metadata(), t.sentencepiece_metadata()):\n"
        "    tokenizer = GGUFTokenizer(metadata)\n"
        "    print(len(tokenizer.encode(line * (16_000_000 // len(line)))) > 10_000_000)",
        Path(__file__).parent,
        seconds=120,
        megabytes=400,
    )
    assert told.split() == ["True"] * 2


# -- the search for special tokens -------------------------------------------------------------------------------------


def plainly(ids, text):
    """llama.cpp's rule, word for word: each token in turn, the longest first, out of what is still text."""
    parts = [(text, None)]
    for token in sorted(ids, key=lambda token: len(token.encode()), reverse=True):
        cut = []
        for part, i in parts:
            if i is not None:
                cut.append((part, i))
                continue
            pieces = part.split(token)
            for n, piece in enumerate(pieces):
                cut += [(token, ids[token])] * (n > 0) + [(piece, None)] * bool(piece)
        parts = cut
    return parts


def test_special_tokens_are_found_as_by_trying_each_in_turn():
    generator = np.random.default_rng(0)
    for _ in range(300):
        lengths = generator.choice(12, size=generator.integers(0, 6), replace=False) + 1  # all different: no ties
        tokens = ["".join(generator.choice(list("aabé<"), n)) for n in lengths.tolist()]
        tokens = {len(token.encode()): token for token in tokens}.values()
        ids = {token: i for i, token in enumerate(tokens)}
        text = "".join(generator.choice(list("aabé< "), 80)) + "".join(tokens)
        assert list(SpecialTokens(ids).split(text)) == plainly(ids, text), (ids, text)
    assert list(SpecialTokens({"éa": 0, "éabc": 1}).split("éabéa")) == [
        ("éa", 0),
        ("b", None),
        ("éa", 0),
    ]  # one cut short
    assert list(SpecialTokens({}).split("")) == [] and list(SpecialTokens({"a": 0}).split("")) == []


def test_the_table_of_rules_has_no_stray_names():
    assert len(PRE_TOKENIZERS) == 88 and all(name == name.strip() and name for name in PRE_TOKENIZERS)
