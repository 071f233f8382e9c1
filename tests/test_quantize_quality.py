"""A real model: compensation must pay in every one of its linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optgptq.bundled import bundled_path
from optgptq.quantize import quantize
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.records import Recipe
from optgptq.recipe.weights import WeightRecipe


@pytest.mark.parametrize("search", ["minmax", "walk"])
def test_gptq_loses_less_than_rounding_in_every_layer_of_the_bundled_model(search: Any, tmp_path: Path) -> None:
    source = bundled_path("story-llama")
    calibration = CalibrationRecipe(source="bundled:story-calibration", num_windows=8, window_size=128)
    results = {}
    for method in ("gptq", "rtn"):
        weights = WeightRecipe(method=method, bits=3, group_size=64, grid_search=search)
        result = quantize(source, Recipe(weights=weights, calibration=calibration), tmp_path / method)
        results[method] = result.record
    assert len(results["gptq"]["layers"]) == 42
    for ours, rounded in zip(results["gptq"]["layers"], results["rtn"]["layers"], strict=True):
        assert ours["name"] == rounded["name"]
        assert ours["loss"] <= ours["rtn_loss"]
    for key in ("loss", "output_error"):
        kind = "layers" if key == "loss" else "decoder_layers"
        mean = {method: sum(layer[key] for layer in record[kind]) for method, record in results.items()}
        assert mean["gptq"] < 0.8 * mean["rtn"]
