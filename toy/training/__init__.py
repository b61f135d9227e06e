"""Training runs: the loop, and for every recipe its options and its start. `RECIPES` lists them."""

from toy.training import table
from toy.training.loop import DivergedError, Training
from toy.training.table import *  # noqa: F403

__all__ = ["DivergedError", "Training"]
__all__ += table.__all__
