"""Which settings one linear gets: the recipe's defaults, its `keep_dense` patterns, then its rules in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import regex

from optgptq.errors import RecipeError
from optgptq.recipe.weights import GridSearch, Method, WeightRecipe, WeightRule

# A match on a module name takes microseconds; a pattern that takes this long backtracks without end.
MATCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedWeight:
    """The settings of one linear.

    Attributes:
        keep_dense: the linear stays as it is; the other fields then mean nothing.
        reason: what in the recipe made this linear differ from the defaults; None where nothing did.
    """

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    grid_search: GridSearch
    keep_dense: bool = False
    reason: str | None = None


def _matches(pattern: str, linear_name: str, where: str) -> bool:
    try:
        return regex.search(pattern, linear_name, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise RecipeError(
            where,
            expected=f"a pattern that is matched in under {MATCH_SECONDS} seconds",
            found=f"{pattern!r} still undecided on {linear_name!r}",
            action="Remove nested repetitions such as (a+)+ from the pattern.",
        ) from error


def _changed(settings: ResolvedWeight, rule: WeightRule, reason: str) -> ResolvedWeight:
    return replace(
        settings,
        method=settings.method if rule.method is None else rule.method,
        bits=settings.bits if rule.bits is None else rule.bits,
        group_size=settings.group_size if rule.group_size is None else rule.group_size,
        symmetric=settings.symmetric if rule.symmetric is None else rule.symmetric,
        grid_search=settings.grid_search if rule.grid_search is None else rule.grid_search,
        keep_dense=settings.keep_dense if rule.keep_dense is None else rule.keep_dense,
        reason=reason,
    )


def resolve_weight(weights: WeightRecipe, linear_name: str) -> ResolvedWeight:
    """Return the settings of the linear with this full module name.

    Patterns are searched anywhere in the name: anchor with `^` and `$` where that matters. `keep_dense` patterns come
    first, then all rules in order; each rule that matches changes the fields it names, so the last one wins.

    Raises:
        RecipeError: a pattern backtracks without end.
    """
    is_none = weights.method == "none"
    settings = ResolvedWeight(
        method="rtn" if weights.method == "none" else weights.method,
        bits=weights.bits,
        group_size=weights.group_size,
        symmetric=weights.symmetric,
        grid_search=weights.grid_search,
        keep_dense=is_none,
        reason="weights.method none" if is_none else None,
    )
    for index, pattern in enumerate(weights.keep_dense):
        if _matches(pattern, linear_name, f"weights.keep_dense.{index}"):
            settings = replace(
                settings, keep_dense=True, reason=f"kept dense by weights.keep_dense.{index} {pattern!r}"
            )
            break
    for index, rule in enumerate(weights.rules):
        if _matches(rule.match, linear_name, f"weights.rules.{index}.match"):
            explanation = f": {rule.description}" if rule.description else ""
            settings = _changed(settings, rule, f"weights.rules.{index} {rule.match!r}{explanation}")
    return settings


def check_rules(weights: WeightRecipe, linear_names: Sequence[str]) -> None:
    """Check that every `keep_dense` pattern and every rule matches a linear of the model.

    Raises:
        RecipeError: one matches none, so the recipe would silently do less than it says.
    """
    patterns = [(f"weights.keep_dense.{index}", pattern) for index, pattern in enumerate(weights.keep_dense)]
    patterns += [(f"weights.rules.{index}.match", rule.match) for index, rule in enumerate(weights.rules)]
    for where, pattern in patterns:
        if not any(_matches(pattern, name, where) for name in linear_names):
            examples = " or ".join(repr(name) for name in linear_names[:2])
            raise RecipeError(
                where,
                expected=f"a pattern found in the name of a linear of this model, such as {examples}",
                found=f"{pattern!r}, which is in none of {len(linear_names)} names",
                action="Correct the pattern or remove it; it is a regular expression searched in the full name.",
            )
