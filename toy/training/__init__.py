"""Training runs: the loop, and for every recipe its options and its start."""

from toy.training.loop import DivergedError, Training
from toy.training.options import OPTIONS, FullFinetuneOptions, LoRAOptions, TrainingOptions, WarmStartOptions

__all__ = [
    "OPTIONS",
    "DivergedError",
    "FullFinetuneOptions",
    "LoRAOptions",
    "Training",
    "TrainingOptions",
    "WarmStartOptions",
]
