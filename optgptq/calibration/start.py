"""What a recipe asks of the calibration, and the two streams before the first decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from optgptq.calibration.attention_stage import AttentionSettings
from optgptq.calibration.layer import LayerCalibration, LayerSettings
from optgptq.calibration.norm_tweaking import NormTweakSettings
from optgptq.calibration.states import ActivationStore
from optgptq.calibration.stream import embed
from optgptq.calibration.targets import ShiftSettings
from optgptq.checkpoint.source import TensorSource
from optgptq.data.windows import Windows
from optgptq.errors import RecipeError
from optgptq.models.attention import attention_context
from optgptq.models.loading import load_embedding
from optgptq.models.spec import DecoderSpec, StageName
from optgptq.recipe.records import NormTweakingRecipe, Recipe
from optgptq.recipe.weights import WeightRecipe
from optgptq.solvers import SolverSettings

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def layer_settings(recipe: Recipe, source: TensorSource) -> LayerSettings:
    """Return what the recipe says about the decoder layers of `source`."""
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
        norm_tweaking=_norm_tweaking(recipe.norm_tweaking, source),
    )


def check_norm_tweaking(spec: DecoderSpec, recipe: Recipe) -> None:
    """Raise RecipeError where norms shall be trained and the model's have nothing to train."""
    if recipe.norm_tweaking.steps and not spec.norm.has_weight:
        raise RecipeError(
            "norm_tweaking.steps",
            expected="0 for this model, whose norms have no weights",
            found=f"{recipe.norm_tweaking.steps}",
            action="Set norm_tweaking.steps=0.",
        )


def num_held_out(recipe: Recipe, num_windows: int) -> int:
    """Return how many windows choose the strength of the target shift or judge trained norms: at most a quarter of all.

    Raises:
        RecipeError: fewer than four windows.
    """
    shifts = recipe.weights.target_shift != "off" and recipe.weights.shift_strength == "held_out"
    if not shifts and not recipe.norm_tweaking.steps:
        return 0
    if num_windows < 4:
        switch = "weights.shift_strength to a number" if shifts else "norm_tweaking.steps to 0"
        raise RecipeError(
            "weights.shift_strength" if shifts else "norm_tweaking.steps",
            expected="at least 4 calibration windows, of which one is held out",
            found=f"{num_windows}",
            action=f"Use more text, a smaller calibration.window_size, or set {switch}.",
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
    store: ActivationStore | None = None,
) -> LayerCalibration:
    """Return the calibration before the first decoder layer.

    `store` keeps the activations of all windows, None for memory; the same numbers come of every store.

    Raises:
        RecipeError: too few windows for what is asked.
        ModelError: windows longer than the model allows, or wrong tensors.
    """
    calibration, settings = recipe.calibration, layer_settings(recipe, source)
    stream = partial(
        embed,
        embedding=load_embedding(source, spec, dtype=dtype, device=device),
        context=attention_context(spec, windows.window_size, dtype=dtype, device=device),
        windows_per_batch=calibration.windows_per_batch,
        num_held_out=num_held_out(recipe, windows.num_windows),
        store=store,
    )
    needs_all = settings.shift is not None or settings.norm_tweaking is not None
    if needs_all or settings.measure_full_precision:
        return LayerCalibration(stream(windows), stream(windows), settings, stage_started=stage_started)
    asked = calibration.full_precision_windows
    num_reference = max(windows.num_windows // 32, 1) if asked is None else asked
    full_precision = stream(windows.first(num_reference)) if num_reference else None
    return LayerCalibration(stream(windows), full_precision, settings, stage_started=stage_started)


def _shift(weights: WeightRecipe) -> ShiftSettings | None:
    if weights.target_shift == "off":
        return None
    strength = None if weights.shift_strength == "held_out" else weights.shift_strength
    return ShiftSettings(rule=weights.target_shift, strength=strength, damp_ratio=weights.damp_ratio)


def _norm_tweaking(norms: NormTweakingRecipe, source: TensorSource) -> NormTweakSettings | None:
    if not norms.steps:
        return None
    return NormTweakSettings(
        steps=norms.steps,
        learning_rate=norms.learning_rate,
        stored_dtype=lambda name: source.info(name).torch_dtype,
    )
