"""Recipes: what to build, how the parts of a run are assembled from it, and the recipes that ship."""

from dougong.core.table import Table

RECIPES = Table("recipe", {
    "first": "dougong.recipes.shipped.first:first",
    "shakespeare_char": "dougong.recipes.shipped.shakespeare:shakespeare_char",
    "shakespeare_char_cpu": "dougong.recipes.shipped.shakespeare:shakespeare_char_cpu",
    "distil": "dougong.recipes.shipped.distil:distil",
    "gpt2_124m": "dougong.recipes.shipped.large:gpt2_124m",
    "qwen3_1b": "dougong.recipes.shipped.large:qwen3_1b",
    "linear_regression": "dougong.recipes.shipped.small:linear_regression",
    "digits_cnn": "dougong.recipes.shipped.small:digits_cnn",
    "digits_gan": "dougong.recipes.shipped.small:digits_gan",
})

__all__ = ["RECIPES"]
