"""Which documents are for validation: a share of them spread over the text, equal ones on one side.

The choice is a function of the sizes of the documents in bytes, of which are equal, of the share and of the seed. It does
not depend on the tokenizer, so a vocabulary can be made of the training part alone.
"""

import hashlib
import json
from typing import Any

import numpy as np

_SPLIT = 3  # a random stream of its own (toy.data.batches has the others)
_STRATA = 10  # parts of the text that each give their share
_LONG = 1.25  # times the whole validation part: a longer document is cut into pieces instead
_PIECES = 10  # of a long document that are for validation, unless they would be shorter than a few windows


def validation_documents(sizes, hashes, fraction, seed):
    """sizes, hashes: (n,) -> (validation, long): bool (n,). Long documents are on neither side as a whole."""
    sizes = np.asarray(sizes, np.float64)
    long = sizes > _LONG * fraction * sizes.sum()
    chosen = np.zeros(len(sizes), bool)
    if long.all():
        return chosen, long
    # equal documents count as one, at the place of the first
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    total = np.bincount(group, np.where(long, 0, sizes))  # of each group
    place = (np.cumsum(np.where(long, 0, sizes)) - np.where(long, 0, sizes))[first]
    wanted_in_all = fraction * total.sum()
    stratum = np.minimum((place / max(total.sum(), 1) * _STRATA).astype(int), _STRATA - 1)
    shuffled = np.random.default_rng([seed, _SPLIT]).permutation(len(total))
    taken, wanted, have = np.zeros(len(total), bool), 0.0, 0.0
    for s in range(_STRATA):
        wanted += fraction * total[stratum == s].sum()
        for g in shuffled[(stratum[shuffled] == s) & (total[shuffled] > 0)]:
            if have + total[g] / 2 > wanted:
                break  # not the next smaller one instead: short documents would be preferred
            taken[g] = True
            have += total[g]
    if not taken.any() and (total > 0).sum() > 1:  # few and of unlike sizes
        candidates = [g for g in shuffled if total[g] > 0]
        taken[min(candidates, key=lambda g: abs(total[g] - wanted_in_all))] = True
    chosen = taken[group] & ~long
    return chosen, long


def validation_pieces(n, fraction, least, seed):
    """Where the validation pieces of a long document lie: begin and end (n_pieces, 2), of n tokens (or bytes).

    least: how short a piece may be. The pieces have together the share `fraction`, at least one piece; one lies in each of
    as many equal parts of the document, in a place that is random.
    """
    wanted = min(max(round(n * fraction), least), n - least)
    n_pieces = max(1, min(_PIECES, wanted // (4 * least), (n - wanted) // (2 * least)))
    length, part = wanted // n_pieces, n // n_pieces
    room = part - length
    offsets = (np.random.default_rng([seed, _SPLIT, 1]).random(n_pieces) * (room + 1)).astype(np.int64)
    offsets[offsets < least] = 0  # what is before it would be too short for a window
    offsets[room - offsets < least] = room
    begins = np.arange(n_pieces) * part + offsets
    return np.stack([begins, np.minimum(begins + length, n)], axis=1)


class Fingerprints:
    """The size and a hash of each document or example, as they are read. sizes, hashes: (n,) int64 and uint64."""

    def __init__(self):
        self._sizes, self._hashes = bytearray(), bytearray()
        self._hash: Any = None  # of the document that is being read

    def begin(self):
        """A document begins; the one before it ends."""
        self.finish()
        self._size, self._hash = 0, hashlib.blake2b(digest_size=8)

    def feed(self, data, size=None):
        """data: the next bytes of the document. size: what they count, None: their number."""
        self._size += len(data) if size is None else size
        self._hash.update(data)

    def example(self, record):
        """All of an example at once."""
        self.begin()
        self.feed(json.dumps(record._replace(where=None), ensure_ascii=False, default=str).encode())

    def finish(self):
        """Nothing comes any more."""
        if self._hash is not None:
            self._sizes += np.int64(self._size).tobytes()
            self._hashes += self._hash.digest()
            self._hash = None

    @property
    def sizes(self):
        return np.frombuffer(self._sizes, np.int64)

    @property
    def hashes(self):
        return np.frombuffer(self._hashes, np.uint64)
