"""What a recipe asks of the calibration, and the two streams before the first decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from optgptq.calibration.attention_stage import AttentionSettings
from optgptq.calibration.layer import LayerCalibration, LayerSettings
from optgptq.calibration.stream import embed
from optgptq.calibration.targets import ShiftSettings
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.models.attention import attention_context
from optgptq.models.loading import load_embedding
from optgptq.models.spec import DecoderSpec, StageName
from optgptq.recipe.records import Recipe, WeightRecipe
from optgptq.solvers import SolverSettings

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def layer_settings(recipe: Recipe) -> LayerSettings:
    """Return what the recipe says about decoder layers."""
    weights, attention, calibration = recipe.weights, recipe.attention, recipe.calibration
    solver = SolverSettings(
        order=weights.order,
        damp_ratio=weights.damp_ratio,
        column_block=weights.column_block,
        dtype=_DTYPES[weights.solver_dtype],
        row_order=attention.row_order,
        row_block=attention.row_block,
        scale_refit=weights.scale_refit,
        code_sweeps=weights.code_sweeps,
    )
    return LayerSettings(
        solver=solver,
        moment_dtype=_DTYPES[calibration.moment_dtype],
        true_sequential=weights.true_sequential,
        measure_full_precision=calibration.moment_stream == "full_precision",
        shift=_shift(weights),
        attention=AttentionSettings(
            rows=attention.rows,
            row_windows=attention.row_windows,
            values=attention.values,
            value_rows=attention.value_rows,
            value_share=attention.value_share,
            seed=calibration.seed,
        ),
    )


def num_held_out(recipe: Recipe, num_windows: int) -> int:
    """Return how many windows choose the strength of the target shift: at most a quarter of all.

    Raises:
        RecipeError: fewer than four windows.
    """
    if recipe.weights.target_shift == "off" or recipe.weights.shift_strength != "held_out":
        return 0
    if num_windows < 4:
        raise RecipeError(
            "weights.shift_strength",
            expected="at least 4 calibration windows, of which one is held out",
            found=f"{num_windows}",
            action="Use more text, a smaller calibration.window_size, or set weights.shift_strength to a number.",
        )
    return min(recipe.calibration.held_out_windows, num_windows // 4)


def start_calibration(
    source: TensorSource,
    spec: DecoderSpec,
    recipe: Recipe,
    windows: Windows,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stage_started: Callable[[int, StageName], None],
) -> LayerCalibration:
    """Return the calibration before the first decoder layer.

    Raises:
        RecipeError: too few windows for what is asked.
        ModelError: windows longer than the model allows, or wrong tensors.
    """
    calibration, settings = recipe.calibration, layer_settings(recipe)
    stream = partial(
        embed,
        embedding=load_embedding(source, spec, dtype=dtype, device=device),
        context=attention_context(spec, windows.window_size, dtype=dtype, device=device),
        windows_per_batch=calibration.windows_per_batch,
        num_held_out=num_held_out(recipe, windows.num_windows),
    )
    if settings.shift is not None or settings.measure_full_precision:
        return LayerCalibration(stream(windows), stream(windows), settings, stage_started=stage_started)
    reference = windows.first(calibration.full_precision_windows)
    full_precision = stream(reference) if calibration.full_precision_windows else None
    return LayerCalibration(stream(windows), full_precision, settings, stage_started=stage_started)


def _shift(weights: WeightRecipe) -> ShiftSettings | None:
    if weights.target_shift == "off":
        return None
    strength = None if weights.shift_strength == "held_out" else weights.shift_strength
    return ShiftSettings(strength=strength, damp_ratio=weights.damp_ratio)
