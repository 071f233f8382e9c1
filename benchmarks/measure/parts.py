"""The parts of the recipes that an ablation takes alone, leaves out and adds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from measure.tools import Grid
from optgptq.recipe.loading import load_recipe
from optgptq.recipe.records import Recipe

PLAIN = "plain GPTQ"
STACK = "the stack"

_ATTENTION = MappingProxyType({"weights.method": "attention_aware"})
# A recipe that turns to attention for one part must not get the others with it.
_BLIND = MappingProxyType({"attention.rows": "off", "attention.values": False, "attention.value_rows": False})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part.

    Attributes:
        name: in the table and for `--parts`.
        on: recipe fields that turn it on where everything else is off.
        off: recipe fields that take it out of the stack; empty where another part's do.
    """

    name: str
    on: Mapping[str, Any]
    off: Mapping[str, Any] = field(default_factory=dict)

    def is_in(self, recipe: Recipe) -> bool:
        """Say whether the recipe has the part."""
        return all(value_at(recipe, path) == value for path, value in self.on.items())


PARTS = (
    Part(name="target_shift", on={"weights.target_shift": "exact"}, off={"weights.target_shift": "off"}),
    Part(name="full_shift", on={"weights.target_shift": "exact", "weights.shift_strength": 1.0}),
    Part(name="scale_refit", on={"weights.scale_refit": True}, off={"weights.scale_refit": False}),
    Part(name="code_sweeps", on={"weights.code_sweeps": 2}, off={"weights.code_sweeps": 0}),
    Part(
        name="attention",
        on={**_ATTENTION, "attention.rows": "softmax", "attention.values": True, "attention.value_rows": True},
        off={"weights.method": "gptq"},
    ),
    Part(
        name="values",
        on={**_ATTENTION, "attention.values": True},
        off={"attention.values": False, "attention.value_rows": False},
    ),
    Part(name="rows_softmax", on={**_ATTENTION, "attention.rows": "softmax"}, off={"attention.rows": "off"}),
    Part(name="rows_pooled", on={**_ATTENTION, "attention.rows": "pooled"}, off={"attention.rows": "off"}),
    Part(
        name="value_rows",
        on={**_ATTENTION, "attention.values": True, "attention.value_rows": True},
        off={"attention.value_rows": False},
    ),
    Part(
        name="residual_rotation",
        on={"transform.residual_rotation": "hadamard"},
        off={"transform.residual_rotation": "none"},
    ),
    Part(name="value_rotation", on={"transform.value_rotation": "hadamard"}, off={"transform.value_rotation": "none"}),
    Part(name="norm_tweaking", on={"norm_tweaking.steps": 20}, off={"norm_tweaking.steps": 0}),
    Part(
        name="static_grids",
        on={"weights.group_grids": "static"},
        off={"weights.group_grids": "dynamic"},
    ),
    Part(name="activation_order", on={"weights.group_grids": "static", "weights.order": "activation"}),
    Part(name="min_pivot_order", on={"weights.group_grids": "static", "weights.order": "min_pivot"}),
    Part(name="pivot_search", on={"weights.grid_search": "pivot"}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the table.

    Attributes:
        name: what a reader sees.
        part: the part that makes it differ from plain GPTQ or from the stack; None for these two.
        alone: it is built on plain GPTQ; else on the stack.
        settings: recipe fields that differ from what it is built on.
    """

    name: str
    part: str | None
    alone: bool
    settings: Mapping[str, Any]


def variants(bits: int, names: Collection[str]) -> Iterator[Variant]:
    """Yield plain GPTQ, each part alone, the stack, and the stack without or with each part.

    The stack is the shipped recipe `attention-aware-wN`: what it has is left out, what it has not is added.
    """
    parts = [part for part in PARTS if part.name in names]
    yield Variant(name=PLAIN, part=None, alone=True, settings={})
    for part in parts:
        yield Variant(name=f"{part.name} alone", part=part.name, alone=True, settings=part.on)
    yield Variant(name=STACK, part=None, alone=False, settings={})
    stack = load_recipe(f"attention-aware-w{bits}")
    for part in parts:
        if not part.is_in(stack):
            yield Variant(name=f"the stack + {part.name}", part=part.name, alone=False, settings=part.on)
        elif part.off:
            yield Variant(name=f"the stack - {part.name}", part=part.name, alone=False, settings=part.off)


def variant_recipe(variant: Variant, grid: Grid, settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a variant; `settings` hold for all variants alike.

    Codes are written as gptq_v2, which holds every grid.
    """
    shipped = "gptq" if variant.alone else "attention-aware"
    fields = {
        "weights.bits": grid.bits,
        "weights.group_size": grid.group_size,
        "weights.symmetric": grid.symmetric,
        "export.format": "gptq_v2",
        **settings,
        **(_BLIND if variant.alone else {}),
        **variant.settings,
    }
    return load_recipe(f"{shipped}-w{grid.bits}", [f"{path}={_yaml(value)}" for path, value in fields.items()])


def value_at(recipe: Recipe, path: str) -> Any:
    """Return the value of a field named `section.field`."""
    section, name = path.split(".")
    return recipe.model_dump()[section][name]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
