"""What a job does, as frozen records read from YAML. Nothing here imports torch: `optgptq recipes` answers at once."""

from __future__ import annotations

from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.gqa import GQARecipe
from optgptq.recipe.kv_cache import KVCacheRecipe, KVCacheRule
from optgptq.recipe.loading import (
    ShippedRecipe,
    load_recipe,
    recipe_for_record,
    recipe_schema,
    recipe_to_yaml,
    shipped_recipes,
)
from optgptq.recipe.records import AttentionRecipe, ExportRecipe, Recipe, TransformRecipe
from optgptq.recipe.rules import ResolvedWeight, check_rules, resolve_weight
from optgptq.recipe.weights import WeightRecipe, WeightRule

__all__ = [
    "AttentionRecipe",
    "CalibrationRecipe",
    "ExportRecipe",
    "GQARecipe",
    "KVCacheRecipe",
    "KVCacheRule",
    "Recipe",
    "ResolvedWeight",
    "ShippedRecipe",
    "TransformRecipe",
    "WeightRecipe",
    "WeightRule",
    "check_rules",
    "load_recipe",
    "recipe_for_record",
    "recipe_schema",
    "recipe_to_yaml",
    "resolve_weight",
    "shipped_recipes",
]
