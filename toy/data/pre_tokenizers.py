"""Where byte-level BPE cuts a text before it merges: the rules that GGUF files name in `tokenizer.ggml.pre`.

A rule is a list of patterns applied one after the other, each to the pieces that the earlier ones left. They are those of the
models' own tokenizers in the form in which llama.cpp applies them (llama-vocab.cpp and unicode.cpp of ggml-org/llama.cpp),
written for Oniguruma, which the `tokenizers` library uses. `tests/test_pre_tokenizers.py` compares every one with llama.cpp.

No pattern here takes more than linear time: none has to look at a run of characters again from each of its characters.
"""

import functools
import itertools
import re
from typing import NamedTuple

from toy.optional import optional_package

# Code points that Unicode 16 added (2024): Oniguruma knows them as letters, numbers, ...; llama.cpp's tables do not.
_UNKNOWN = (
    "897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D8F 10EC2-10EFC 11380-113E2 "
    "116D0-116E3 11BC0-11BF9 11F5A 13460-143FA 16100-16139 16D40-16D79 18CFF 1CC00-1CEB3 1E5D0-1E5FF 1F8B2-1F8C1 1FA89-1FA8F "
    "1FABE 1FAC6 1FADC-1FADF 1FAE9 1FBCB-1FBEF"
)
# Chinese characters, without U+30000 and above (llama.cpp's unicode_cpt_is_han)
_HAN = "3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2EBEF 2F800-2FA1F"
# deepseek-llm's own list of letters that have two cases
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 "
    "3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 "
    "1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 "
    "213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
    "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 "
    "118A0-118DF 1E900-1E943"
)
# East Asian scripts of afmoe: Chinese, kana, Thai, Lao, Khmer, Myanmar, Hangul; llama.cpp takes all of U+8C48 to U+FAFF
_EAST_ASIAN = (
    "E40-E7F E80-EFF 1000-109F 1100-11FF 1780-17FF 2F00-2FDF 3040-309F 30A0-30FF 3400-4DBF 4E00-FAFF FF65-FF9F"
)


def _class(ranges):
    """The inside of a character class: "41-5A B5" -> \\x{41}-\\x{5A}\\x{B5}."""
    return re.sub(r"([0-9A-F]+)", r"\\x{\1}", ranges).replace(" ", "")


# -- the parts that most rules share ------------------------------------------------------------------------------------

_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # one character that may stand before a word and belongs to it: a space, a bracket, ...
_WORD = _BEFORE + r"\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_ASCII_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_CHINESE_KANA = _class("4E00-9FA5 3040-309F 30A0-30FF")
_HANGUL, _BOPOMOFO = _class("AC00-D7A3 3131-318E"), _class("3105-312F")
_EAST_ASIAN_SIGNS = _class("2014 2018-2019 201C-201D 2026 3001-303F FE30-FE4F FF01 FF0C FF1A-FF1B")
_CJK_AND_MORE = "[" + _class("800-9FA5 AC00-D7FF") + r"&&[^\s]]+"  # deepseek: U+2028 is in the range, but white space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}"
_BLOOM = r" ?[^(\s|.,!?" + _class("60C 6D4 964 2026 3001 3002 FF0C") + ")]+"


def _words_by_case(letters, ending):
    """Words that end where a lower-case ASCII letter is followed by an upper-case one: HelloWorld -> Hello, World."""
    upper, lower = rf"[[{letters}]&&[^a-z]]", rf"[[{letters}]&&[^A-Z]]"
    return rf"{_BEFORE}{upper}*{lower}+{ending}|{_BEFORE}{upper}+{lower}*{ending}"


_MAYBE_CONTRACTION = f"(?:{_CONTRACTION})?"
_GPT4O = _words_by_case(r"\p{L}", _MAYBE_CONTRACTION) + rf"|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}"
_MARKED_WORD = rf"{_BEFORE}[\p{{L}}\p{{M}}]+{_MAYBE_CONTRACTION}"
_AFTER_DIGITS = (  # deepseek-v3 and its relatives
    _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_HALVING_SPACES = "|".join(rf"\s{{{2**k}}}(?!\S)" for k in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s"


# Where a line, or a word, begins so plainly that every rule cuts there, whatever stands around
LINE_STARTS = r"(?<=\S\n)(?=[A-Za-z])"
WORD_STARTS = LINE_STARTS + r"|(?<=[A-Za-z])(?= [A-Za-z])"


class PreTokenizer(NamedTuple):
    """One rule. digits: how `digit_groups` cuts before the patterns do. whole_pieces: a piece that is a token is that token,
    whatever the merges say. adds_bos: a text begins with the beginning token unless the file says otherwise.

    blocks: a pattern (for `re`) of places across which nothing is merged, so that a long text can be encoded in blocks; None:
    there are none. stretch: a pattern of the longest stretches that may be one piece.
    """

    patterns: tuple
    digits: str | None = None
    whole_pieces: bool = False
    adds_bos: bool = False
    blocks: str | None = WORD_STARTS
    stretch: str = r"\s+|\S+"


def _table():
    llama3 = PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}",))
    gpt2, gpt4o, qwen2 = PreTokenizer((_GPT2,)), PreTokenizer((_GPT4O,)), PreTokenizer((_QWEN2,))
    digit_by_digit = PreTokenizer((r"\p{N}", _GPT2))
    bloom = PreTokenizer((_BLOOM,))
    deepseek3 = PreTokenizer((r"\p{N}{1,3}", f"[{_CHINESE_KANA}]+", rf"{_AFTER_DIGITS}[\r\n]*|{_SPACES}"))
    bailing = PreTokenizer(
        (
            rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        )
    )
    tiny_aya = PreTokenizer((rf"{_MARKED_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}",), digits="any")
    rules = {
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code "
        "roberta-bpe gigachat a.x-4.0 mellum modern-bert exaone4": gpt2,
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": digit_by_digit,
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": llama3._replace(
            whole_pieces=True, adds_bos=True
        ),
        "glm4 glm5": llama3._replace(whole_pieces=True),
        "chatglm-bpe dbrx smaug-bpe": llama3,
        "jais-2": PreTokenizer(
            (rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_HALVING_SPACES}",)
        ),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": qwen2,
        "laguna": PreTokenizer((r"\n+", _QWEN2)),
        "ufakzeka": PreTokenizer((rf"{_WORD}|\p{{N}}|{_SYMBOLS}",)),
        "seed-coder": PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
        "qwen35": PreTokenizer(
            (rf"{_CONTRACTION}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
        ),
        "k2-horizon": PreTokenizer(
            (rf"{_CONTRACTION}|{_BEFORE}[\p{{L}}\p{{M}}\x{{200C}}\x{{200D}}]+|\p{{N}}{{1,3}}|{_SYMBOLS}",)
        ),
        "minicpm5": PreTokenizer((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}"), whole_pieces=True),
        "exaone-moe": PreTokenizer(
            (
                rf"{_CONTRACTION}|{_BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            ),
            blocks=LINE_STARTS,
            stretch=r"[^\n]+|\n+",  # a piece may have several words
        ),
        "bailingmoe bailingmoe2 llada-moe": bailing,
        "poro-chat bloom gpt3-finnish": bloom,
        "viking": PreTokenizer((_BLOOM, r"\p{N}")),
        "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
        "tekken": PreTokenizer(
            (_words_by_case(r"\p{L}", "") + rf"|\p{{N}}|{_SYMBOLS_SLASH}",), whole_pieces=True, adds_bos=True
        ),
        "gpt-4o llama4 kanana2 talkie minimax-m2": gpt4o,
        "granite-embed-multi-97m": PreTokenizer(
            (_words_by_case(r"\p{L}\p{M}", _MAYBE_CONTRACTION) + rf"|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}",),
            whole_pieces=True,
        ),
        "tiny_aya cohere2moe": tiny_aya,
        "kimi-k2": PreTokenizer(
            (
                rf"[{_class(_HAN)}]+|{_BEFORE}[\p{{L}}&&[^{_class(_HAN)}]]+{_MAYBE_CONTRACTION}|\p{{N}}{{1,3}}|{_SYMBOLS}",
            )
        ),
        "youtu": PreTokenizer(
            (
                f"[{_HANGUL}]+|[{_EAST_ASIAN_SIGNS}]+|[{_BOPOMOFO}]+|[{_CHINESE_KANA}]+",
                rf"{_MARKED_WORD}|\p{{N}}|{_SYMBOLS_SLASH}",
            ),
            whole_pieces=True,
        ),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": deepseek3,
        "spark2_5": PreTokenizer(
            (r"\p{N}{1,3}", f"[{_CHINESE_KANA}]+", rf"{_AFTER_DIGITS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")
        ),
        "afmoe": PreTokenizer((f"[{_class(_EAST_ASIAN)}]+", rf"{_AFTER_DIGITS}[\r\n]*|{_SPACES}"), digits="any"),
        "superbpe": PreTokenizer((r"\p{N}+",), digits="ascii", blocks=None, stretch="(?s:.+)"),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_MORE, r"\p{N}")),
        "deepseek-llm": PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_class(_CASED)}]+",
                r"\s?[!-/:-~" + _class("2018-201F 3001-3002 FF01-FF0F FF1A-FF5E") + "]+",
                r"(?<!\s)\s+\z",  # with the look behind it is tried once in a run of spaces, not from each of them
                _CJK_AND_MORE,
                r"\p{N}+",
            )
        ),
        "chameleon": PreTokenizer(
            (
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
    }
    return {name: rule for names, rule in rules.items() for name in names.split()}


PRE_TOKENIZERS = _table()


def split_and_encode_bytes(rule):
    """The rule's patterns as a pre-tokenizer of the `tokenizers` library, which then writes bytes as GPT-2's characters."""
    library = optional_package("tokenizers", "byte-level BPE")
    cut = [library.pre_tokenizers.Split(regex(pattern), "isolated") for pattern in rule.patterns]
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.pre_tokenizers.Sequence([*cut, to_bytes])


@functools.cache
def regex(pattern):
    r"""The pattern compiled by the `tokenizers` library, with \p{...} meaning what it means in llama.cpp's Unicode tables."""
    library = optional_package("tokenizers", "byte-level BPE")
    known = f"&&[^{_class(_UNKNOWN)}]]"
    return library.Regex(re.sub(r"\\p\{\w+\}", lambda match: f"[{match[0]}{known}", pattern))


def digit_groups(text, kind):
    """Cut a text between the groups of three, counted from the right, of its numbers: "a1234567b" -> a1, 234, 567, b.

    kind "any" cuts behind each group of each run of numbers, "ascii" around each run and before each group of 0-9 in it. A
    pattern for this would look ahead to the end of the number from each of its digits.
    """
    library = optional_package("tokenizers", "byte-level BPE")
    numbers = library.pre_tokenizers.Split(regex(r"\p{N}+"), "isolated").pre_tokenize_str(text)
    others = {piece for piece, _ in library.pre_tokenizers.Split(regex(r"\p{N}+"), "removed").pre_tokenize_str(text)}
    cuts = {0, len(text)}
    for piece, (start, stop) in numbers:
        if piece in others:
            continue
        if kind == "any":
            cuts.update(range(start + (len(piece) % 3 or 3), stop + 1, 3))
            continue
        cuts |= {start, stop}
        for run in re.finditer("[0-9]+", piece):
            cuts.update(range(start + run.start() + len(run[0]) % 3, start + run.end(), 3))
    return [text[a:b] for a, b in itertools.pairwise(sorted(cuts))]
