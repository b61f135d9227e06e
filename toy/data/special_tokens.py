"""Finding the special tokens that are written out in a text, such as <|im_start|>."""

import re
from typing import Any


class SpecialTokens:
    """A set of token texts that are cut out of a text before anything else is done with it.

    As in llama.cpp the longest (in bytes) is looked for first in the whole text, then the next in what is left. The time is
    linear in the text, and does not depend on how many tokens there are, only on how many lengths they have.
    """

    def __init__(self, ids, eats_space_before=()):
        """ids: dict of token texts to ids. eats_space_before: the ids of those that take the white space before them away."""
        self._ids = {text.encode(): i for text, i in ids.items()}
        self._eats_space_before = frozenset(eats_space_before)
        # by the two bytes that a token begins with, or its only one: the lengths there are
        self._lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            self._lengths.setdefault(token[:2], set()).add(len(token))
        self.n_lengths = len({len(token) for token in self._ids})
        self._beginning = _beginning_of_any(self._lengths)

    def split(self, text):
        """Yield (part of the text, None) and (token, its id), in the order of the text."""
        places = self._places(data := text.encode()) if self._beginning is not None else ()
        position = 0
        for start, stop in places:
            i = self._ids[data[start:stop]]
            before = data[position:start]
            if i in self._eats_space_before:
                before = before.rstrip(b" \t\n\v\f\r")
            if before:
                yield before.decode(), None
            yield data[start:stop].decode(), i
            position = stop
        if not position:
            yield from [(text, None)] if text else []
        elif position < len(data):
            yield data[position:].decode(), None

    def _places(self, data):
        """list of (start, stop) of the tokens in these UTF-8 bytes, in order."""
        candidates: dict[Any, Any] = {}  # where a token may begin, by what it begins with
        for match in self._beginning.finditer(data):
            start = match.start()
            for beginning in (data[start : start + 2], data[start : start + 1]):
                if beginning in self._lengths:
                    candidates.setdefault(beginning, set()).add(start)
        lengths = sorted({length for beginning in candidates for length in self._lengths[beginning]}, reverse=True)
        taken, places = bytearray(len(data)), []
        for length in lengths:
            begins = [starts for beginning, starts in candidates.items() if length in self._lengths[beginning]]
            for start in sorted(set().union(*begins)):
                stop = start + length
                free = stop <= len(data) and not taken[start]
                if free and data[start:stop] in self._ids and taken.find(1, start, stop) < 0:
                    taken[start:stop] = b"\1" * length
                    places.append((start, stop))
        return sorted(places)


def _beginning_of_any(beginnings):
    """A pattern that matches, with no width, where one of these (of one or two bytes) stands; None when there are none."""
    if not beginnings:
        return None
    seconds: dict[Any, Any] = {}
    for beginning in beginnings:
        seconds.setdefault(beginning[:1], set()).add(beginning[1:])
    ways = []
    for first, following in seconds.items():
        after = b"" if b"" in following else b"[" + b"".join(map(re.escape, sorted(following))) + b"]"
        ways.append(re.escape(first) + after)
    return re.compile(b"(?=" + b"|".join(ways) + b")")
