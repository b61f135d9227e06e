"""Recipes: what is trained and what is frozen."""

from toy.recipes.from_scratch import FromScratch

__all__ = ["FromScratch"]
