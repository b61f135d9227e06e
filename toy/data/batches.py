"""Batches of token ids, drawn from (seed, step) alone: windows of a text, or rows that hold one example each.

Nothing here has a state: the batch of step 1000 is the same whether or not steps 0 to 999 were drawn before it. That is
what makes a resumed run exact.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

_TRAIN, _VALIDATION, _EPOCH = 0, 1, 2  # keep the random streams of one seed apart
_GROUPS = 64  # batches' worth of rows that are sorted by length together


class Split(NamedTuple):
    train: np.ndarray  # (n_train,) int32
    validation: np.ndarray  # (n_validation,) int32


class Batch(NamedTuple):
    token_ids: np.ndarray  # (B, T) int32
    labels: np.ndarray  # (B, T) int32, the id that follows each token; -1: not asked for


def split(ids, val_fraction, context):
    """The first part of the text for training, the last `val_fraction` of it for validation.

    Each side gets at least context + 1 tokens, one window. Raises ValueError for a shorter text and for a fraction
    outside (0, 1).
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    least = context + 1
    if len(ids) < 2 * least:
        raise ValueError(
            f"the corpus has {len(ids):,} tokens, but a context of {context} needs at least {2 * least:,} "
            f"({least:,} to train on, {least:,} to validate): give a longer text or a smaller context"
        )
    n_validation = min(max(round(len(ids) * val_fraction), least), len(ids) - least)
    return Split(ids[: len(ids) - n_validation], ids[len(ids) - n_validation :])


def training_batch(ids, batch, context, seed, step):
    """The windows of one training step, a function of (seed, step). Windows may overlap, like nanoGPT's."""
    starts = _generator(seed, _TRAIN, step).integers(0, len(ids) - context, size=batch)
    return _windows(ids, starts, context)


def validation_batches(ids, batch, context, n_batches, seed):
    """The same `n_batches` batches at every evaluation, a function of the seed. No window twice while there are others."""
    n_starts = len(ids) - context
    wanted = n_batches * batch
    starts = _generator(seed, _VALIDATION, 0).choice(n_starts, size=wanted, replace=n_starts < wanted)
    return [_windows(ids, chunk, context) for chunk in starts.reshape(n_batches, batch)]


def _generator(seed, stream, step):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, step))))


def _windows(ids, starts, context):
    rows = ids[starts[:, None] + np.arange(context + 1)]  # (B, T+1)
    return Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:]))


def micro_batches(batch, n):
    """The same rows as `n` batches, of B / n rows each: what a step that accumulates gradients computes one by one."""
    if n < 1 or len(batch.token_ids) % n:
        raise ValueError(f"a batch of {len(batch.token_ids)} rows cannot be cut into {n} equal ones")
    return [Batch(*arrays) for arrays in zip(np.split(batch.token_ids, n), np.split(batch.labels, n))]


class Windows:
    """Windows of `context` + 1 tokens out of a text, or out of what the split left of it.

    ids: what indexing with an int array gives ids of, int32. runs: list of int arrays (n_segments, 2), begin and end of the
    segments of `ids` that are read one after the other as if they were one text; no window crosses from run to run.
    begin, end: the ids that documents begin and end with: after an end nobody is to say a beginning.
    """

    def __init__(self, ids, runs, context, begin=None, end=None):
        self.ids, self.context, self._frame = ids, context, (begin, end)
        self.runs = [_Run(segments) for segments in runs if _length(segments) > context]
        self.n_tokens = sum(_length(segments) for segments in runs)
        n_starts = [run.n - context for run in self.runs]
        self._first = np.cumsum([0, *n_starts])  # the first start of each run, and how many there are

    def __len__(self):
        """In how many places a window can begin."""
        return int(self._first[-1])

    def tokens(self):
        """All ids in the order in which they are read, run after run, int32 (n_tokens,)."""
        parts = [self.ids[run.places(np.arange(run.n))] for run in self.runs]
        return np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.zeros(0, np.int32)

    def training_batch(self, batch, seed, step):
        """As the function `training_batch`, and the same windows for a text in one piece."""
        return self._batch(_generator(seed, _TRAIN, step).integers(0, len(self), size=batch))

    def validation_batches(self, batch, n_batches, seed):
        """As the function `validation_batches`, and the same windows for a text in one piece."""
        wanted = n_batches * batch
        starts = _generator(seed, _VALIDATION, 0).choice(len(self), size=wanted, replace=len(self) < wanted)
        return [self._batch(chunk) for chunk in starts.reshape(n_batches, batch)]

    def all_batches(self, batch):
        """Yield batches that ask for every token once but the first of each run; what is left over at the end is -1."""
        windows = [(run, p) for run in self.runs for p in range(0, run.n - 1, self.context)]
        for i in range(0, len(windows), batch):
            token_ids = np.zeros((batch, self.context), np.int32)
            labels = np.full((batch, self.context), -1, np.int32)
            for row, (run, p) in enumerate(windows[i : i + batch]):
                ids = self.ids[run.places(np.arange(p, min(p + self.context + 1, run.n)))]
                token_ids[row, : len(ids) - 1], labels[row, : len(ids) - 1] = ids[:-1], ids[1:]
            yield self._without_beginnings(Batch(token_ids, labels))

    def _batch(self, starts):
        """starts: (B,) numbers of places where a window can begin."""
        run = np.searchsorted(self._first, starts, side="right") - 1
        within = (starts - self._first[run])[:, None] + np.arange(self.context + 1)  # (B, T+1)
        places = np.stack([self.runs[r].places(row) for r, row in zip(run, within)])
        rows = self.ids[places]
        return self._without_beginnings(Batch(np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])))

    def _without_beginnings(self, batch):
        begin, end = self._frame
        if begin is not None and end is not None:
            batch.labels[(batch.token_ids == end) & (batch.labels == begin)] = -1
        return batch


class _Run:
    """Segments read one after the other. n: their tokens."""

    def __init__(self, segments):
        self._begin = segments[:, 0]
        self._cumulative = np.concatenate([[0], np.cumsum(segments[:, 1] - segments[:, 0])])
        self.n = int(self._cumulative[-1])

    def places(self, positions):
        """Positions in the run -> indices of the ids, in the shape of positions."""
        segment = np.searchsorted(self._cumulative, positions, side="right") - 1
        return positions - self._cumulative[segment] + self._begin[segment]


def _length(segments):
    return int((segments[:, 1] - segments[:, 0]).sum())


class Rows:
    """One example a row, never cut across, cut at the context when it is longer, padded with id 0 and label -1.

    ids, asked: what slices are taken of; starts: (n + 1,) of the examples in them; rows: which of them, int array.
    widths: the numbers of tokens that a batch may have; the smallest is taken that holds its rows.
    """

    def __init__(self, ids, asked, starts, rows, widths):
        self.ids, self.asked, self.rows, self.widths = ids, asked, rows, np.asarray(widths)
        self.starts = starts[:-1][rows]
        self.lengths = np.minimum(np.diff(starts)[rows] - 1, self.widths[-1])  # tokens that something follows
        self._order = lru_cache(maxsize=2)(self._order)  # type: ignore[method-assign]

    def __len__(self):
        return len(self.rows)

    def training_batch(self, batch, seed, step):
        """The rows of one training step. An epoch sees every row once, in an order that is a function of (seed, epoch)."""
        return self._batch(self.rows_of_step(batch, seed, step), batch)

    def rows_of_step(self, batch, seed, step):
        """Which rows those are, (B,), as positions in `rows`."""
        n, chosen = len(self), []
        at, end = step * batch, (step + 1) * batch
        while at < end:
            epoch, begin = divmod(at, n)
            part = self._order(batch, seed, epoch)[begin : begin + end - at]
            chosen.append(part)
            at += len(part)
        return np.concatenate(chosen)

    def validation_batches(self, batch, n_batches, seed):
        """The same rows at every evaluation, none twice while there are others."""
        wanted = n_batches * batch
        chosen = _generator(seed, _VALIDATION, 0).choice(len(self), size=wanted, replace=len(self) < wanted)
        chosen = chosen[np.argsort(self.lengths[chosen], kind="stable")]
        return [self._batch(part, batch) for part in chosen.reshape(n_batches, batch)]

    def all_batches(self, batch):
        """Yield batches with every row once, short ones first; what is left over at the end is -1."""
        order = np.argsort(self.lengths, kind="stable")
        for i in range(0, len(order), batch):
            yield self._batch(order[i : i + batch], batch)

    def padding(self, batch, seed):
        """Which share of the tokens of the first epoch's batches is padding."""
        n_steps = -(-len(self) // batch)
        rows = [self.rows_of_step(batch, seed, step) for step in range(n_steps)]
        used = sum(int(self.lengths[row].sum()) for row in rows)
        return 1 - used / sum(batch * self._width(row) for row in rows)

    def _order(self, batch, seed, epoch):
        """A permutation of the rows. Rows of about the same length stand together in what will be one batch; an epoch may
        begin and end within a batch, and these rows are not sorted."""
        n = len(self)
        order = _generator(seed, _EPOCH, epoch).permutation(n)
        head = min(-epoch * n % batch, n)
        n_whole = (n - head) // batch
        middle = order[head : head + n_whole * batch]
        bounds = range(0, len(middle) + _GROUPS * batch, _GROUPS * batch)
        parts = [middle[a:b] for a, b in pairwise(bounds)]
        grouped = [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        whole = np.concatenate([*grouped, middle[:0]]).reshape(n_whole, batch)
        whole = whole[_generator(seed, _EPOCH, epoch).permutation(n_whole)]
        return np.concatenate([order[:head], whole.reshape(-1), order[head + n_whole * batch :]])

    def _width(self, rows):
        return int(self.widths[np.searchsorted(self.widths, self.lengths[rows].max())])

    def _batch(self, rows, batch):
        width = self._width(rows)
        token_ids, labels = np.zeros((batch, width), np.int32), np.full((batch, width), -1, np.int32)
        for i, row in enumerate(rows):
            start, n = self.starts[row], self.lengths[row]
            ids, asked = self.ids[start : start + n + 1], self.asked[start + 1 : start + n + 1]
            token_ids[i, :n] = ids[:-1]
            labels[i, :n] = np.where(asked, ids[1:], -1)
        return Batch(token_ids, labels)
