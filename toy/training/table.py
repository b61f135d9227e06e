"""The one table of recipes that can be run: name on the command line -> its `Start`."""

from toy.training.from_scratch import FromScratchStart
from toy.training.full_finetune import FullFinetuneStart
from toy.training.lora import LoRAStart
from toy.training.vit_tiny import ViTTinyStart
from toy.training.warm_start import WarmStartStart

RECIPES = {
    start.options_class.recipe: start
    for start in (FromScratchStart, LoRAStart, FullFinetuneStart, WarmStartStart, ViTTinyStart)
}
