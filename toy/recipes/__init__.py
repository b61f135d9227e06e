"""Recipes: what is trained and what is frozen."""

from toy.recipes.from_scratch import FromScratch
from toy.recipes.full_finetune import FullFinetune
from toy.recipes.lora import LoRA, LoRAMetal
from toy.recipes.vit_tiny import ViTTiny
from toy.recipes.warm_start import WarmStart

__all__ = ["FromScratch", "FullFinetune", "LoRA", "LoRAMetal", "ViTTiny", "WarmStart"]
