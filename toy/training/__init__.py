"""Training runs: the loop, and for every recipe its options and its start. `RECIPES` lists them."""

from toy.training.from_scratch import FromScratchOptions
from toy.training.full_finetune import FullFinetuneOptions
from toy.training.loop import DivergedError, Training
from toy.training.lora import LoRAOptions
from toy.training.table import RECIPES
from toy.training.vit_tiny import ViTTinyOptions
from toy.training.warm_start import WarmStartOptions

__all__ = [
    "RECIPES",
    "DivergedError",
    "FromScratchOptions",
    "FullFinetuneOptions",
    "LoRAOptions",
    "Training",
    "ViTTinyOptions",
    "WarmStartOptions",
]
