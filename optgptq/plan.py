"""What will be done with each linear of a model: its layout and settings, decided before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optgptq.errors import RecipeError
from optgptq.formats.base import CheckpointFormat
from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.settings import GridSettings
from optgptq.layout import LinearLayout
from optgptq.models.inventory import LinearInfo, head_linear, model_linears, outer_linears
from optgptq.models.spec import DecoderSpec
from optgptq.recipe.records import Recipe
from optgptq.recipe.rules import ResolvedWeight, check_rules, resolve_weight
from optgptq.recipe.weights import BinaryRecipe
from optgptq.solvers import METHODS


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """One linear of the model and what the recipe asks of it.

    Attributes:
        info: where it is and how large.
        layout: how it will be stored.
        method: name of its solver.
        grid: its grid; None when it stays dense.
        binary: how its levels are found where they are sums of signs; None where grids are uniform.
        reason: what in the recipe makes it differ from the defaults; None where nothing does.
    """

    info: LinearInfo
    layout: LinearLayout
    method: str
    grid: GridSettings | None
    binary: BinarySettings | None
    reason: str | None


def plan_linears(spec: DecoderSpec, recipe: Recipe, form: CheckpointFormat) -> tuple[LinearPlan, ...]:
    """Return the plan of every linear of every decoder layer, in the order of the walk.

    With the method `none` all of them stay dense.

    Raises:
        RecipeError: a rule matches nothing, a group size does not divide, a rule splits linears that engines fuse,
            or nothing is left to quantize.
    """
    linears = model_linears(spec)
    check_rules(recipe.weights, [linear.name for linear in linears])
    plans = tuple(_plan(linear, resolve_weight(recipe.weights, linear.name), recipe, form) for linear in linears)
    _check_groups(plans)
    _check_fused(plans)
    if recipe.weights.method != "none" and all(plan.layout.bits is None for plan in plans):
        raise RecipeError(
            "weights.keep_dense and weights.rules",
            expected="at least one linear to quantize",
            found=f"all {len(plans)} kept dense",
            action="Remove a pattern.",
        )
    return plans


def plan_head(spec: DecoderSpec, recipe: Recipe, form: CheckpointFormat) -> LinearPlan | None:
    """Return the plan of the output head; None where it stays as it is.

    Raises:
        RecipeError: the group size does not divide its columns.
    """
    head, weights = recipe.head, recipe.weights
    if head.bits is None:
        return None
    settings = ResolvedWeight(
        method=head.method,
        bits=head.bits,
        group_size=weights.group_size if head.group_size is None else head.group_size,
        symmetric=head.symmetric,
        grid_search=weights.grid_search,
    )
    plan = _plan(head_linear(spec), settings, recipe, form)
    size = settings.group_size
    if size != -1 and plan.info.in_features % size:
        raise RecipeError(
            "head.group_size",
            expected=f"-1, or a divisor of the {plan.info.in_features} columns of {plan.info.name}",
            found=f"{size}" if head.group_size is not None else f"{size}, which is weights.group_size",
            action="Set head.group_size to one that divides them, or to -1.",
        )
    return plan


def outer_layouts(spec: DecoderSpec, head: LinearPlan | None = None) -> tuple[LinearLayout, ...]:
    """Return the linears outside the decoder layers, which stay dense but for a `head` that is planned.

    Formats must name them to their readers.
    """
    return tuple(
        head.layout
        if head is not None and head.layout.name == name
        else LinearLayout(
            name=name,
            out_features=out_features,
            in_features=in_features,
            bits=None,
            fused_names=(name,),
            fused_name=name,
            dense_reason="outside the decoder layers",
        )
        for name, (out_features, in_features) in outer_linears(spec).items()
    )


def _plan(linear: LinearInfo, settings: ResolvedWeight, recipe: Recipe, form: CheckpointFormat) -> LinearPlan:
    dense = settings.keep_dense
    binary = None if dense else _binary(settings, recipe.binary)
    layout = LinearLayout(
        name=linear.name,
        out_features=linear.out_features,
        in_features=linear.in_features,
        bits=None if dense else settings.bits,
        group_size=settings.group_size,
        symmetric=settings.symmetric and binary is None,
        coefficients=None if binary is None else binary.coefficients,
        stored_transposed=linear.stored_transposed,
        fused_names=linear.fused_names,
        fused_name=linear.fused_name,
        dense_reason=settings.reason if dense else None,
    )
    grid = GridSettings(
        bits=settings.bits,
        symmetric=settings.symmetric,
        group_size=settings.group_size,
        search=settings.grid_search,
        group_grids=recipe.weights.group_grids,
        smallest_zero_point=form.smallest_zero_point,
    )
    return LinearPlan(
        info=linear,
        layout=layout,
        method=settings.method,
        grid=None if dense else grid,
        binary=binary,
        reason=settings.reason,
    )


def _binary(settings: ResolvedWeight, recipe: BinaryRecipe) -> BinarySettings | None:
    of_method = METHODS[settings.method].binary
    if of_method is None:
        return None
    intermediate = recipe.intermediate_bits
    return of_method(
        BinarySettings(
            intermediate_bits=min(settings.bits + 2, 5) if intermediate is None else intermediate,
            weighting=recipe.weighting,
            uniform_start=recipe.uniform_start,
            refits=recipe.refits,
            sweeps=recipe.sweeps,
            coefficients=recipe.coefficients,
        )
    )


def _check_groups(plans: Sequence[LinearPlan]) -> None:
    wrong = [
        plan
        for plan in plans
        if plan.grid is not None and plan.grid.group_size != -1 and plan.info.in_features % plan.grid.group_size
    ]
    if not wrong:
        return
    first = wrong[0]
    common = math.gcd(*(plan.info.in_features for plan in plans if plan.grid is not None))
    fitting = [size for size in (1024, 512, 256, 128, 64, 32, 16) if common % size == 0]
    advice = (
        f"Set weights.group_size={fitting[0]}, which divides every linear" if fitting else "Use -1 (one group a row)"
    )
    raise RecipeError(
        f"weights.group_size for {first.info.name}",
        expected=f"a divisor of its {first.info.in_features} input columns",
        found=f"{first.layout.group_size} (the same for {len(wrong) - 1} other linears)",
        action=f"{advice}, or give such linears a rule of their own or keep them dense.",
    )


def _check_fused(plans: Sequence[LinearPlan]) -> None:
    by_name = {plan.info.name: plan for plan in plans}
    for plan in plans:
        for name in plan.info.fused_names:
            mine, other = _stored_alike(plan), _stored_alike(by_name[name])
            if mine != other:
                raise RecipeError(
                    f"weights.rules: {plan.info.name} and {name}",
                    expected=f"the same bits, group_size and grids, as engines load both as {plan.info.fused_name}",
                    found=f"{mine} and {other}",
                    action=f"Let the pattern match all of {', '.join(plan.info.fused_names)}, or none.",
                )


def _stored_alike(plan: LinearPlan) -> str:
    layout = plan.layout
    if layout.bits is None:
        return "dense"
    kind = f"symmetric {layout.symmetric}" if layout.coefficients is None else f"coefficients {layout.coefficients}"
    return f"{layout.bits} bits, group_size {layout.group_size}, {kind}"
