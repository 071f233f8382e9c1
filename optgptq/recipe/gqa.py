"""The section of a recipe about key/value heads that are merged before anything is quantized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr

from optgptq.recipe.section import PositiveInt, Section

HeadGrouping = Literal["auto", "similarity", "cosine", "adjacent"]


class GQARecipe(Section):
    """Fewer key/value heads: the model changes, and so do its outputs."""

    group: PositiveInt = Field(default=1, description="key/value heads that become one; 1: off")
    grouping: HeadGrouping = Field(
        default="auto",
        description="which heads become one: similarity (those that lose least), cosine (of their activations, as "
        "published), adjacent, or auto: adjacent with ALiBi, which ties each head to its slope, else similarity",
    )
    refit_queries: StrictBool = Field(
        default=True, description="fit the query projections to the original scores, where held-out windows approve"
    )
    refit_output: StrictBool = Field(
        default=True, description="fit the output projection to the original attention, where held-out windows approve"
    )
    text: Annotated[StrictStr, Field(min_length=1)] | None = Field(
        default=None,
        description="text on which perplexity is measured before and after; null: held-out calibration windows",
    )
    max_perplexity_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="gate: highest perplexity after, as a multiple of that before; null: none"
    )
