"""Byte-pair encoding, to read: how a vocabulary of word parts is learned from a text, and how it cuts another text.

A token is a byte, or two tokens that often stand side by side. `toy.data.bpe_tokenizer` gives the same merges and ids much
faster. Source: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (2016); on bytes, as
here, Radford et al., "Language models are unsupervised multitask learners" (2019).
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections import Counter, defaultdict

# The ids of the 256 bytes, in GPT-2's order: first those that are printable characters in Latin-1
BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES += sorted(set(range(256)) - set(BYTES))
ID_OF_BYTE = {byte: i for i, byte in enumerate(BYTES)}
LONGEST_TOKEN = 256  # bytes: a line of dashes is no word


def train(text, vocab_size):
    """str -> merges, list of (left id, right id); merge k makes token 256 + k. Shorter when no pair stands there twice."""
    counts = Counter(cut(text))  # word -> how often; pairs are looked for inside words only
    words = [([ID_OF_BYTE[byte] for byte in word.encode()], n) for word, n in counts.items()]
    lengths = [1] * 256  # of the tokens, in bytes
    merges: list[tuple[int, int]] = []
    pairs: Counter[tuple[int, int]] = Counter()  # how often each pair is there
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # and in which words

    def count(w, sign):
        ids, n = words[w]
        for pair in itertools.pairwise(ids):
            if lengths[pair[0]] + lengths[pair[1]] <= LONGEST_TOKEN:
                pairs[pair] += sign * n
                where[pair].add(w)

    for w in range(len(words)):
        count(w, +1)
    while 256 + len(merges) < vocab_size:
        # the most frequent pair; of equal ones that of the lowest ids
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]), default=None)
        if best is None or pairs[best] < 2:
            break
        lengths.append(lengths[best[0]] + lengths[best[1]])
        for w in list(where[best]):
            count(w, -1)
            words[w] = merge(words[w][0], best, 256 + len(merges)), words[w][1]
            count(w, +1)
        merges.append(best)
    return merges


def encode(text, merges):
    """str -> list of ids: in each word the pair that was merged first in training is merged first, until none is left."""
    rank = {pair: k for k, pair in enumerate(merges)}
    ids: list[int] = []
    for word in cut(text):
        symbols = [ID_OF_BYTE[byte] for byte in word.encode()]
        while found := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
            first = min(found, key=rank.__getitem__)
            symbols = merge(symbols, first, 256 + rank[first])
        ids += symbols
    return ids


def decode(ids, merges):
    """list of ids -> str."""
    tokens = [bytes((byte,)) for byte in BYTES]  # id -> the bytes it stands for
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")


def merge(ids, pair, new):
    """The ids with `new` in place of each `pair`, from the left: in a a a only the first two."""
    merged, i = [], 0
    while i < len(ids):
        hit = tuple(ids[i : i + 2]) == pair
        merged.append(new if hit else ids[i])
        i += 2 if hit else 1
    return merged


def cut(text):
    """The words of a text, which together are the text: letters with what stands before them, one digit, signs, spaces."""
    return _words().findall(text)


@functools.cache
def _words():
    # "L": of all letters, "N": of all numbers, by the first letter of their Unicode category
    ranges: defaultdict[str, str] = defaultdict(str)
    for kind, group in itertools.groupby(map(chr, range(sys.maxunicode + 1)), lambda c: unicodedata.category(c)[0]):
        characters = list(group)
        ranges[kind] += f"{characters[0]}-{characters[-1]}"
    letter, number, space = ranges["L"], ranges["N"], r"\t-\r\x85" + ranges["Z"]
    return re.compile(
        rf"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n{letter}{number}]?[{letter}]+|[{number}]|"
        rf" ?[^{space}{letter}{number}]+[\r\n]*|[{space}]*[\r\n]+|[{space}]+(?![^{space}])|[{space}]+"
    )
