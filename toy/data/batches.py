"""Batches of token ids: the split into training and validation text, and windows drawn from (seed, step) alone.

Nothing here has a state: the batch of step 1000 is the same whether or not steps 0 to 999 were drawn before it. That is
what makes a resumed run exact.
"""

from typing import NamedTuple

import numpy as np

_TRAIN, _VALIDATION = 0, 1  # keep the two random streams of one seed apart


class Split(NamedTuple):
    train: np.ndarray  # (n_train,) int32
    validation: np.ndarray  # (n_validation,) int32


class Batch(NamedTuple):
    token_ids: np.ndarray  # (B, T) int32
    labels: np.ndarray  # (B, T) int32, the id that follows each token


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
