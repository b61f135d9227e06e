"""The one table of recipes that can be run: name on the command line -> its `Start`. `toy.training` has all its names."""

from toy.training.from_scratch import FromScratchOptions, FromScratchStart
from toy.training.full_finetune import FullFinetuneOptions, FullFinetuneStart
from toy.training.lora import LoRAOptions, LoRAStart
from toy.training.start import Start
from toy.training.vit_tiny import ViTTinyOptions, ViTTinyStart
from toy.training.warm_start import WarmStartOptions, WarmStartStart

__all__ = [
    "RECIPES",
    "FromScratchOptions",
    "FullFinetuneOptions",
    "LoRAOptions",
    "ViTTinyOptions",
    "WarmStartOptions",
]

RECIPES: dict[str, type[Start]] = {
    start.options_class.recipe: start
    for start in (FromScratchStart, LoRAStart, FullFinetuneStart, WarmStartStart, ViTTinyStart)
}
