"""Long texts encoded in blocks: the ids of the whole, without ever holding the whole.

A text may be cut where the tokenizer cuts it for certain. For characters and bytes that is everywhere. A subword tokenizer
shows it: pre-tokenizers end a word before a space or a line end and begin one after a line end, and where no token of the
vocabulary holds the two characters of such a place, no token can lie across it. What is left to chance (a tokenizer of a
kind that nobody thought of) is tried on the text around each cut.
"""

import re

import numpy as np

from toy.data.records import Place
from toy.data.tokenizers import UnknownCharacterError, not_among

BLOCK = 2**18  # characters encoded at a time: the tokenizers library takes some hundred bytes for each
LONGEST = 2**21  # characters: a text without a certain place for so long is cut all the same, and that is told
_CANDIDATES = re.compile(r"(?<=[A-Za-z])(?=[ \n][A-Za-z])|(?<=[^\s]\n)(?=[^\W\d_])")
_LAST = 2**14  # characters at the end of a block in which a place is looked for first
_AROUND = 200  # characters on either side that are encoded to try a place
_TRIES = 50  # places that are tried at a time
_PAIRS = re.compile(rb"(?=([A-Za-z][ \n]|\n[^\s]))")


class BlockEncoder:
    """Encodes texts that come in pieces. n_forced: how often a text had to be cut where a token may lie."""

    def __init__(self, encoder):
        self.encoder, self.n_forced = encoder, 0
        self._everywhere = not encoder.has_special
        self._inside = None if self._everywhere else _pairs_inside_tokens(encoder.tokenizer)

    def encode(self, pieces, where=None):
        """pieces: the str of one text, in order. Yield arrays of ids (n,) int32: together, the ids of the whole text."""
        self.begin(where)
        for piece in pieces:
            yield from self.feed(piece)
        yield from self.finish()

    def begin(self, where=None):
        """A new text begins. where: a `Place` to name in errors."""
        self._where, self._text, self._before, self._offset = where or Place("the text"), "", "", 0

    def feed(self, piece):
        """Take the next piece of the text; yield the ids of what is certain by now.

        Raises UnknownCharacterError as the tokenizer does, with the offset in the whole text.
        """
        self._text += piece
        while len(self._text) > BLOCK and (cut := self._place(self._text)):
            yield self._block(self._text[:cut])
            self._before, self._text, self._offset = self._text[cut - 1], self._text[cut:], self._offset + cut

    def finish(self):
        """Yield the ids of the rest."""
        if self._text:
            yield self._block(self._text)
        self._text = ""

    def _block(self, text):
        try:
            if self._everywhere or not self._before:
                return self.encoder.plain(text)
            return self.encoder.continuing(text, self._before)
        except UnknownCharacterError as error:
            known = set(getattr(self.encoder.tokenizer, "characters", ""))
            at = next((i for i, character in enumerate(text) if character not in known), None)
            if not known or at is None:
                raise
            raise not_among(len(known), self._where, text[at], self._offset + at) from error

    def _place(self, text):
        """Where to cut the text, 0 to wait for more of it."""
        if self._everywhere:
            return BLOCK
        end = min(len(text), 2 * BLOCK) - _AROUND
        if (place := self._last_certain(text, max(1, end - _LAST), end)) or len(text) < LONGEST:
            return place
        if place := self._last_certain(text, 1, LONGEST - _AROUND):
            return place
        self.n_forced += 1
        return BLOCK

    def _last_certain(self, text, begin, end):
        """The last place between two offsets where the tokenizer certainly cuts, 0 when there is none."""
        places = [match.start() for match in _CANDIDATES.finditer(text, begin, end)]
        return next((place for place in places[:-_TRIES:-1] if self._is_certain(text, place)), 0)

    def _is_certain(self, text, place):
        pair = text[place - 1].encode() + text[place].encode()[:1]
        if pair in (self._inside or ()):
            return False
        left, right = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        both = self.encoder.plain(left + right)
        head = self.encoder.plain(left)
        tail = self.encoder.continuing(right, left[-1])
        return np.array_equal(both, np.concatenate([head, tail]))


def _pairs_inside_tokens(tokenizer):
    """The pairs of bytes, of the places where a text might be cut, that lie inside some token."""
    found = set()
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(i, special=True)
        if b" " in piece[1:] or b"\n" in piece:
            found.update(_PAIRS.findall(piece))
    return found
