"""Random weights on uniform grids of any size, and their product in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.checkpoints import random_weight

from optgptq.affine_weight import AffineWeight
from optgptq.layout import LinearLayout


def affine_weight(
    rows: int,
    columns: int,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = False,
    seed: int = 0,
    shuffled: bool = False,
    negative: bool = False,
) -> AffineWeight:
    """Return a weight with float16 scales; the last group may be shorter.

    With `shuffled` the columns are in the order of an act-order checkpoint; with `negative` every other scale is below
    zero.
    """
    weight = random_weight(
        LinearLayout(
            name="linear", out_features=rows, in_features=columns, bits=bits, group_size=group_size, symmetric=symmetric
        ),
        seed=seed,
    )
    if negative:
        signs_OG = 1 - 2 * (torch.arange(weight.scale_OG.numel()) % 2).view(weight.scale_OG.shape)
        weight = replace(weight, scale_OG=weight.scale_OG * signs_OG)
    if shuffled:
        order_I = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        group_index_I = order_I.to(torch.int32) // weight.group_size
        weight = replace(weight, group_index_I=group_index_I.to(torch.int32))
    return weight


def slow_product(x: torch.Tensor, weight: AffineWeight) -> torch.Tensor:
    """Return `x @ weight.T` in float64, by the definition of the weight."""
    groups_I = weight.group_index_I
    if groups_I is None:
        groups_I = torch.arange(weight.in_features) // weight.group_size
    steps_OI = weight.codes_OI.double() - weight.zero_point_OG.double()[:, groups_I.long()]
    return x.double() @ (weight.scale_OG.double()[:, groups_I.long()] * steps_OI).T
