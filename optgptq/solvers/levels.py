"""Levels of binary codes as linear functions of their coefficients, and fitting the coefficients to codes.

A level is `sum_b table[k, b] * coefficient[b]`. Where each group has levels of its own, the table holds the signs of
the planes and a one for the offset; where a row has one shape, it holds the shape and a one. The one comes last.

Shapes: `K` levels, `B` coefficients, `O` rows, `L` columns. Arithmetic is in the dtype of what is passed in.
"""

from __future__ import annotations

import torch

from optgptq.native import binary as native
from optgptq.native.group import path_for
from optgptq.native.library import Backend

# A coefficient that the others explain to all but this share of its energy stays as it is.
_LEAST_PIVOT = 1e-4
LARGEST_HALF = 65504.0


def sign_table(bits: int, like: torch.Tensor) -> torch.Tensor:
    """Return `[K, B, 1]`: the signs of `bits` planes, and a one; bit `p` of `k` is plane `p`."""
    codes_K = torch.arange(1 << bits, device=like.device)
    signs = [(codes_K >> plane & 1) * 2 - 1 for plane in range(bits)]
    return torch.stack([*signs, torch.ones_like(codes_K)], dim=1).to(like.dtype)[:, :, None]


def shape_table(steps_PO: torch.Tensor) -> torch.Tensor:
    """Return `[K, 2, O]`: half the signed sum of a row's steps for each code, and a one."""
    signs_KP1 = sign_table(len(steps_PO), steps_PO)[:, :-1]
    shape_KO = (signs_KP1 * steps_PO).sum(dim=1) / 2
    return torch.stack([shape_KO, torch.ones_like(shape_KO)], dim=1)


def levels_of(table_KBO: torch.Tensor, coefficient_BO: torch.Tensor) -> torch.Tensor:
    """Return levels `[K, O]`, summed in the order of the coefficients."""
    level_KO = table_KBO[:, 0] * coefficient_BO[0]
    for index in range(1, len(coefficient_BO)):
        level_KO = level_KO + table_KBO[:, index] * coefficient_BO[index]
    return level_KO


def columns_of(table_KBO: torch.Tensor, codes_LO: torch.Tensor) -> torch.Tensor:
    """Return the table's entries for codes, `[B, L, O]`."""
    expanded_KBO = table_KBO.expand(-1, -1, codes_LO.shape[1])
    return torch.stack([expanded_KBO[:, index].gather(0, codes_LO.long()) for index in range(table_KBO.shape[1])])


def nearest_level(value_R: torch.Tensor, level_KR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the level nearest to each value, and its code as uint8; of two equally near the smaller code."""
    best_R, level_R = (value_R - level_KR[0]).abs(), level_KR[0]
    code_R = torch.zeros(best_R.shape, dtype=torch.uint8, device=value_R.device)
    for code in range(1, len(level_KR)):
        distance_R = (value_R - level_KR[code]).abs()
        is_nearer_R = distance_R < best_R
        best_R = torch.where(is_nearer_R, distance_R, best_R)
        level_R = torch.where(is_nearer_R, level_KR[code], level_R)
        code_R = torch.where(is_nearer_R, code, code_R)
    return level_R, code_R


def nearest_error(weight_LO: torch.Tensor, level_KO: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Return each weight minus the nearest level of its row; `torch` is the definition of the other backends."""
    path = path_for(backend, weight_LO, level_KO)
    if path is not None:
        return native.nearest_error(path, weight_LO, level_KO)
    return weight_LO - nearest_level(weight_LO, level_KO[:, None])[0]


def uniform_coefficients(scale_O: torch.Tensor, zero_point_O: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the coefficients `[B, O]` of uniform grids: planes from the largest, then the offset."""
    planes = [scale_O * 2.0 ** (plane - 1) for plane in reversed(range(bits))]
    return torch.stack([*planes, scale_O * (((1 << bits) - 1) / 2 - zero_point_O)])


def best_change(normal_BBO: torch.Tensor, slope_BO: torch.Tensor) -> torch.Tensor:
    """Return `normal^-1 slope` of each row, `[B, O]`, the change that lowers `c^T normal c - 2 c^T slope` most.

    By elimination with a diagonal scaled to one. What the coefficients before it explain stays: two planes that agree
    in every column are one direction.
    """
    num = len(slope_BO)
    diagonal_BO = normal_BBO.diagonal().T
    scale_BO = torch.where(diagonal_BO > 0, diagonal_BO.rsqrt(), 0.0)
    left = normal_BBO * scale_BO[:, None] * scale_BO[None]
    change_BO = slope_BO * scale_BO
    inverse: list[torch.Tensor] = []
    for pivot in range(num):
        size_O = left[pivot, pivot]
        inverse.append(torch.where(size_O > _LEAST_PIVOT, size_O.reciprocal(), 0.0))
        for row in range(pivot + 1, num):
            share_O = left[row, pivot] * inverse[pivot]
            left[row, pivot + 1 :] -= share_O * left[pivot, pivot + 1 :]
            change_BO[row] -= share_O * change_BO[pivot]
    for pivot in reversed(range(num)):
        later_O = (left[pivot, pivot + 1 :] * change_BO[pivot + 1 :]).sum(dim=0)
        change_BO[pivot] = (change_BO[pivot] - later_O) * inverse[pivot]
    return change_BO * scale_BO


def half_precision(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest values that float16 holds, in the dtype of the input; what is too large is clamped."""
    bounded = values.to(torch.float32).clamp(-LARGEST_HALF, LARGEST_HALF)
    return bounded.to(torch.float16).to(values.dtype)
