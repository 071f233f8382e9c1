"""One scale per channel that makes the noise of rounding cheap, found without gradients.

A vector is divided by the scale, rounded with a step that is proportional to the range of its group, and multiplied
again: the noise of channel `c` costs `w_c s_c^2` times the squared step. So up to a constant

    J(s) = sum over groups of [ sum_c w_c s_c^2 ] * mean_t [ a_t R_t(s)^2 ],  R_t(s) = max_c (x_tc / s_c) - min_c

where `w` is what channels cost and `a` what tokens cost. `log J` is convex in `log s` for centred numbers, and at its
minimum each channel's share of the noise is its share of responsibility for the ranges; `fixed_point_scale` moves
shares towards each other. Derivation: `docs/math/kv-cache-calibration.md`.

Shapes: `K` heads, `T` vectors, `D` head dimension, `G` groups of a head, `L` channels of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Added to both shares of a channel: channels that are always zero keep a finite scale.
_SHARE_FLOOR = 1e-4
_ITERATIONS = 60
_STEP = 0.5
_STEP_DECAY = 0.05
# Exponents of the channels' largest numbers that are tried as scales; 0 is no scale at all.
ALPHAS = (0.0, 0.5, 0.7, 1.0)
_SMALLEST_RATIO = 1e-4


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RangeProblem:
    """What a scale is found for.

    Attributes:
        x_KTD: float, the vectors without their shift.
        weight_KD: what a squared error of each channel costs, not negative.
        mass_KT: what an error of each vector costs.
        group_size: channels that share a range.
        partner_D: int64, the channel whose scale must be equal; itself where there is none.
    """

    x_KTD: torch.Tensor
    weight_KD: torch.Tensor
    mass_KT: torch.Tensor
    group_size: int
    partner_D: torch.Tensor


def range_objective(problem: RangeProblem, scale_KD: torch.Tensor) -> torch.Tensor:
    """Return `J` of each head `[K]`; multiplying a head's scale by a number leaves it as it is."""
    noise_KG, spread_KG, *_ = _parts(problem, scale_KD)
    return (noise_KG * spread_KG).sum(1)


def alpha_scale(problem: RangeProblem, alpha: float) -> torch.Tensor:
    """Return the largest absolute number of each channel (of its pair) to the power of `alpha`, mean logarithm 0."""
    largest_KD = problem.x_KTD.abs().amax(1)
    largest_KD = torch.maximum(largest_KD, largest_KD[:, problem.partner_D])
    floor_K1 = largest_KD.amax(1, keepdim=True) * _SMALLEST_RATIO
    floor_K1 = torch.where(floor_K1 > 0, floor_K1, 1.0)
    return _normalized(torch.maximum(largest_KD, floor_K1) ** alpha)


def fixed_point_scale(problem: RangeProblem) -> torch.Tensor:
    """Return the scale `[K, D]` with the smallest `J` seen, never a larger one than any scale of `ALPHAS` has.

    Source: the quantization noise model in the docstring of this file; 60 damped steps from the square root of maxima.
    """
    starts = [alpha_scale(problem, alpha) for alpha in ALPHAS]
    best_KD, best_K = starts[0], range_objective(problem, starts[0])
    for start_KD in starts[1:]:
        best_KD, best_K = _better(best_KD, best_K, start_KD, range_objective(problem, start_KD))
    scale_KD = alpha_scale(problem, 0.5)
    for iteration in range(_ITERATIONS + 1):
        noise_KG, spread_KG, share_noise_KD, share_range_KD = _parts(problem, scale_KD)
        best_KD, best_K = _better(best_KD, best_K, scale_KD, (noise_KG * spread_KG).sum(1))
        step = _STEP / (1 + _STEP_DECAY * iteration)
        ratio_KD = (share_range_KD + _SHARE_FLOOR) / (share_noise_KD + _SHARE_FLOOR)
        scale_KD = _normalized(scale_KD * ratio_KD ** (step / 2))
    return torch.maximum(best_KD, best_KD[:, problem.partner_D])


def _parts(
    problem: RangeProblem, scale_KD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both factors of `J` `[K, G]`, and each channel's share of the noise and of the ranges `[K, D]`.

    Shares are means over the two channels of a pair; over all channels they sum to one.
    """
    num_heads, num_vectors, head_dim = problem.x_KTD.shape
    y_KTGL = (problem.x_KTD / scale_KD.unsqueeze(1)).view(num_heads, num_vectors, -1, problem.group_size)
    (low_KTG, low_place), (high_KTG, high_place) = y_KTGL.min(-1), y_KTGL.max(-1)
    range_KTG = high_KTG - low_KTG
    mass_KT1 = problem.mass_KT.unsqueeze(2) / num_vectors
    spread_KG = (mass_KT1 * range_KTG.square()).sum(1)
    power_KGL = (problem.weight_KD * scale_KD.square()).view(num_heads, -1, problem.group_size)
    noise_KG = power_KGL.sum(2)
    blame = torch.zeros_like(y_KTGL[:, 0]).unsqueeze(1).expand(-1, num_vectors, -1, -1).clone()
    blame.scatter_add_(3, high_place.unsqueeze(3), (mass_KT1 * range_KTG * high_KTG).unsqueeze(3))
    blame.scatter_add_(3, low_place.unsqueeze(3), (-mass_KT1 * range_KTG * low_KTG).unsqueeze(3))
    blame_KGL = blame.sum(1).clamp_min(0)
    total_K1 = (noise_KG * spread_KG).sum(1, keepdim=True).clamp_min(torch.finfo(scale_KD.dtype).tiny)
    share_noise_KD = (power_KGL * spread_KG.unsqueeze(2)).view(num_heads, head_dim) / total_K1
    share_range_KD = (blame_KGL * noise_KG.unsqueeze(2)).view(num_heads, head_dim) / total_K1
    partner_D = problem.partner_D
    return (
        noise_KG,
        spread_KG,
        (share_noise_KD + share_noise_KD[:, partner_D]) / 2,
        (share_range_KD + share_range_KD[:, partner_D]) / 2,
    )


def _better(
    best_KD: torch.Tensor, best_K: torch.Tensor, scale_KD: torch.Tensor, objective_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    is_better = objective_K < best_K
    return torch.where(is_better.unsqueeze(1), scale_KD, best_KD), torch.where(is_better, objective_K, best_K)


def _normalized(scale_KD: torch.Tensor) -> torch.Tensor:
    """Return the scale with a geometric mean of 1: a factor common to a head changes nothing."""
    return scale_KD / scale_KD.log().mean(1, keepdim=True).exp()
