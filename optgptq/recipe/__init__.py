"""What a job does, as frozen records read from YAML. Nothing here imports torch: `optgptq recipes` answers at once."""

from __future__ import annotations

from optgptq.recipe.loading import (
    ShippedRecipe,
    load_recipe,
    recipe_for_record,
    recipe_schema,
    recipe_to_yaml,
    shipped_recipes,
)
from optgptq.recipe.records import (
    CalibrationRecipe,
    ExportRecipe,
    KVCacheRecipe,
    Recipe,
    WeightRecipe,
    WeightRule,
)
from optgptq.recipe.rules import ResolvedWeight, check_rules, resolve_weight

__all__ = [
    "CalibrationRecipe",
    "ExportRecipe",
    "KVCacheRecipe",
    "Recipe",
    "ResolvedWeight",
    "ShippedRecipe",
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
