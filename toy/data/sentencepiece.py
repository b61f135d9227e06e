"""SentencePiece's byte-pair encoding (Kudo and Richardson 2018), from tokens and their scores alone."""

import heapq
import re

from toy.data.pre_tokenizers import LINE_STARTS, WORD_STARTS

SPACE = "\u2581"  # how a space is written in tokens
_MOST_PIECES = 2**16  # that are remembered
_LONGEST_PIECE = 64  # characters of a piece that is remembered


class Merger:
    """Joins the characters of a text into tokens: again and again the two neighbours that make the token of the best score,
    the leftmost of equal ones, as llama.cpp does. There is no list of merges, whose length may grow with the square of a
    token's: the tokens themselves say what can be joined.

    A character that is no token becomes the byte tokens of its UTF-8 bytes, or else the unknown token.
    """

    def __init__(self, scores, byte_ids, unknown_id):
        """scores: dict of tokens to (score, id), spaces written as SPACE. byte_ids: dict of bytes (int) to ids. unknown_id:
        of the unknown token, or None."""
        self._scores, self._byte_ids, self._unknown_id = scores, byte_ids, unknown_id
        # nothing is joined across the beginning of a word, unless some token has such a place inside, nor across the end of
        # a line, unless there is a token with one
        self._inside = {token[k - 1] for token in scores for k in _word_starts(token)}
        line = "" if any("\n" in token for token in scores) else "\n"
        self._piece = re.compile(rf"{SPACE}*[^{SPACE}{line}]+|{SPACE}+" + "|\n" * bool(line))
        self._pieces = {}
        # as `toy.data.pre_tokenizers.PreTokenizer.blocks`, in texts with spaces for SPACE
        if any(re.search(r"\n[A-Za-z]", token) for token in scores):
            self.blocks = None
        else:
            self.blocks = LINE_STARTS if self._inside else WORD_STARTS

    def encode(self, text):
        """str with SPACE for spaces -> list of ids; None in it stands for a character that nothing can be made of."""
        ids: list[int | None] = []
        for piece in self._cut(text):
            found = self._pieces.get(piece)
            if found is None:
                found = self._ids_of(self._merge(piece))
                if len(piece) <= _LONGEST_PIECE:
                    if len(self._pieces) >= _MOST_PIECES:
                        self._pieces.clear()
                    self._pieces[piece] = found
            if found and ids and found[0] == ids[-1] == self._unknown_id is not None:
                found = found[1:]  # one unknown token for all characters in a row
            ids += found
        return ids

    def _cut(self, text):
        """The text in pieces across which nothing is joined: words, usually."""
        if not self._inside:
            return (match[0] for match in self._piece.finditer(text))
        starts = [k for k in _word_starts(text) if text[k - 1] not in self._inside]
        return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)])]

    def _merge(self, text):
        """str -> list of str: tokens, and characters that are none."""
        symbols, scores = list(text), self._scores  # of two joined the left one holds both, the right one nothing
        following, preceding = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        # (-score, left, right, length): the best first, of equal ones the leftmost
        queue: list[tuple[float, int, int, int]] = []

        def consider(left, right):
            if left >= 0 and right < len(symbols):
                joined = symbols[left] + symbols[right]
                if (found := scores.get(joined)) is not None:
                    heapq.heappush(queue, (-found[0], left, right, len(joined)))

        for k in range(len(symbols) - 1):
            consider(k, k + 1)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of them was joined with another in the meantime
            symbols[left] += symbols[right]
            symbols[right] = ""
            following[left] = following[right]
            if following[left] < len(symbols):
                preceding[following[left]] = left
            consider(preceding[left], left)
            consider(left, following[left])
        return [symbol for symbol in symbols if symbol]

    def _ids_of(self, symbols):
        ids = []
        for symbol in symbols:
            if (found := self._scores.get(symbol)) is not None:
                ids.append(found[1])
            elif self._byte_ids.keys() >= {*symbol.encode()}:
                ids += [self._byte_ids[byte] for byte in symbol.encode()]
            elif self._unknown_id is None or not ids or ids[-1] != self._unknown_id:
                ids.append(self._unknown_id)
        return ids


def _word_starts(text):
    """Where a SPACE follows something else."""
    return [match.start() for match in re.finditer(f"(?<=[^{SPACE}]){SPACE}", text)]
