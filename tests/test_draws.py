"""What is drawn at random: windows of text, and tokens at the very edge of a nucleus."""

import numpy as np
import pytest

from toy.data import training_batch, validation_batches
from toy.models.generation import sample

CONTEXT = 4


def starts(batches):
    """Where the windows begin, of a text whose ids count up."""
    return [int(row[0]) for batch in batches for row in batch.token_ids]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("batch", "n_batches"), [(6, 4), (1, 24), (24, 1), (3, 7)])
def test_validation_windows_do_not_repeat_while_there_are_others(seed, batch, n_batches):
    """Exactly as many as there are: each of them once. One fewer: still none twice. More than there are: as many as asked."""
    wanted = batch * n_batches
    for n_windows in (wanted, wanted + 1):
        ids = np.arange(n_windows + CONTEXT, dtype=np.int32)
        drawn = starts(validation_batches(ids, batch, CONTEXT, n_batches, seed))
        assert len(set(drawn)) == len(drawn) == wanted and set(drawn) <= set(range(n_windows))
    ids = np.arange(wanted - 1 + CONTEXT, dtype=np.int32)
    batches = validation_batches(ids, batch, CONTEXT, n_batches, seed)
    assert [b.token_ids.shape for b in batches] == [(batch, CONTEXT)] * n_batches
    assert set(starts(batches)) <= set(range(wanted - 1))


def test_validation_and_training_windows_of_one_seed_are_drawn_independently():
    """From one text, with one seed and one size: no training step draws the windows of the validation, nor any of their
    places more often than chance does."""
    ids = np.arange(100_000, dtype=np.int32)
    n, steps = 64, 200
    for seed in range(3):
        (validation,) = validation_batches(ids, n, CONTEXT, 1, seed)
        same_place = 0
        for step in range(steps):
            training = training_batch(ids, n, CONTEXT, seed, step).token_ids
            assert not np.array_equal(training, validation.token_ids)
            same_place += int((training[:, 0] == validation.token_ids[:, 0]).sum())
            assert len(set(training[:, 0]) & set(validation.token_ids[:, 0])) < 5
        assert same_place < 5  # chance: 0.13


class Always:
    """A generator whose draw lands where it is told: at a share of the probabilities in their order."""

    def __init__(self, share):
        self.share = share

    def choice(self, n, p):
        self.p = np.array(p)
        return int(np.searchsorted(np.cumsum(p), self.share, side="right"))


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([2, 1, 1], 0.5, {0}),  # the first alone reaches p: at equality no further one is needed
        ([2, 1, 1], np.nextafter(0.5, 1), {0, 1}),
        ([2, 1, 1], 0.75, {0, 1}),
        ([1, 2, 4, 1], 0.5, {2}),
        ([1, 2, 4, 1], 0.75, {1, 2}),
        ([1, 1, 1, 1], 0.25, {0}),  # of equal ones the first
        ([1, 1, 1, 1], 0.5, {0, 1}),
        ([1], 0.5, {0}),
    ],
)
def test_the_nucleus_ends_with_the_token_that_reaches_p(weights, top_p, kept):
    """Powers of two, so that every share and every sum of shares is exact."""
    generator = Always(0.0)
    sample(np.log2(weights) * np.log(2), generator, top_p=top_p)
    found = generator.p
    assert set(np.flatnonzero(found)) == kept
    expected = np.array([w if i in kept else 0 for i, w in enumerate(weights)])
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
