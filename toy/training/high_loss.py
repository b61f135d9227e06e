"""A loss that is finite and says that nothing is learned.

A uniform guess has the loss ln(V). A training whose loss is ten times that for 50 steps in a row is far worse than no
training at all: it has diverged, although no number overflowed. It is told once, and the run goes on, because a learning
rate that still falls can bring a loss back, and because whoever asked for so many steps is to get them. A run whose last 50
steps are so high does not end well: it ends as diverged, with its weights saved, so that a script does not take them for a
model.
"""

import math
from collections.abc import Iterable

FACTOR = 10
STEPS = 50


class HighLoss:
    """Looks at the losses of a run, step by step. n_classes: V. before: the losses of the steps that are done."""

    def __init__(self, n_classes: int, before: Iterable[float] = ()) -> None:
        self.limit = FACTOR * math.log(n_classes)
        self._in_a_row, self._told = 0, False
        for loss in before:
            self.see(loss)

    @property
    def lasts(self) -> bool:
        """Whether the last `STEPS` losses were all too high."""
        return self._in_a_row >= STEPS

    def see(self, loss: float) -> bool:
        """Look at the next loss. -> whether that is now to be told, which happens once."""
        self._in_a_row = self._in_a_row + 1 if loss > self.limit else 0
        tell = self.lasts and not self._told
        self._told = self._told or tell
        return tell

    def words(self) -> str:
        """What is to be told."""
        return (
            f"the loss was above {self.limit:.4g}, {FACTOR} times that of a uniform guess, for {self._in_a_row} steps"
        )
