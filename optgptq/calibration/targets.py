"""The weights that solvers aim at: the dense ones, shifted so that they make up for errors made before them.

Shapes: `O` output rows, `I` input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from optgptq.calibration.statistics import Drift
from optgptq.solvers.target_shift import shift_direction


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What a linear is quantized to be.

    Attributes:
        weight_OI: `[O, I]`.
        shift_strength: share of the full shift that is in it; None where no shift was asked.
        notes: what a user must hear, in plain sentences.
    """

    weight_OI: torch.Tensor
    shift_strength: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftSettings:
    """How far targets are shifted.

    Attributes:
        rule: `exact`, or `gptaq`: no target is shifted, but the solver follows the published column rule
            (`optgptq.solvers.gptaq`), which needs a strength.
        strength: share of the shift; None: of each linear what is best on the windows held out.
        damp_ratio: share of the mean diagonal that is added to the moment.
    """

    rule: Literal["exact", "gptaq"] = "exact"
    strength: float | None = None
    damp_ratio: float = 0.01


def shifted_targets(
    dense: Mapping[str, torch.Tensor], moment_II: torch.Tensor, drift: Drift, settings: ShiftSettings
) -> dict[str, Target]:
    """Return the targets of linears that read the same input, by name; one factorization serves all.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    weights = {name: weight_OI.to(moment_II.dtype) for name, weight_OI in dense.items()}
    gap_OI = torch.cat([drift.gap(weight_OI) for weight_OI in weights.values()])
    shift = shift_direction(gap_OI, moment_II, damp_ratio=settings.damp_ratio, name=" + ".join(dense))
    directions = torch.split(shift.direction_OI, [len(weight_OI) for weight_OI in weights.values()])
    targets = {}
    for (name, weight_OI), direction_OI in zip(weights.items(), directions, strict=True):
        strength = drift.strength(weight_OI, direction_OI) if settings.strength is None else settings.strength
        targets[name] = Target(weight_OI + strength * direction_OI, strength, shift.notes)
    return targets


def shifted_by_moments(
    dense_OI: torch.Tensor,
    moment_II: torch.Tensor,
    cross_II: torch.Tensor,
    settings: ShiftSettings,
    *,
    held_out: tuple[torch.Tensor, torch.Tensor] | None,
    name: str,
) -> Target:
    """Return the target where the drift is known as moments: `cross_II` is the mean of `(y' - y) y^T`.

    `held_out` are moment and cross moment of the windows held out; needed where the settings name no strength.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    weight_OI = dense_OI.to(moment_II.dtype)
    shift = shift_direction(weight_OI @ cross_II, moment_II, damp_ratio=settings.damp_ratio, name=name)
    strength = settings.strength
    if strength is None:
        if held_out is None:
            raise ValueError("a strength that is chosen needs windows held out")
        held_moment_II, held_cross_II = held_out
        along = float((shift.direction_OI * (weight_OI @ held_cross_II)).sum(dtype=torch.float64))
        energy = float(((shift.direction_OI @ held_moment_II) * shift.direction_OI).sum(dtype=torch.float64))
        strength = min(max(along / energy, 0.0), 1.0) if energy > 0 else 0.0
    return Target(weight_OI + strength * shift.direction_OI, strength, shift.notes)
