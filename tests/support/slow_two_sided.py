"""Two-sided GPTQ as dense GPTQ on the Kronecker product of each head's two moments: the reference, in float64.

Nothing of `optgptq.solvers` is used. Source: BoA (arXiv 2406.13474): rows and columns meet as `kron(B, H)`.

Shapes: `N` heads, `D` rows of a head, `I` columns, `O = N * D`, `V = D * I` weights of a head, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.problems import random_moment


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SlowTwoSided:
    """Codes in the model's order, and the damped loss that the walk paid: the sum of its squared errors."""

    codes_OI: torch.Tensor
    paid: float


def output_moments(num_heads: int, head_size: int, *, seed: int = 0, num_tokens: int | None = None) -> torch.Tensor:
    """Return random coupled output moments `[N, D, D]`."""
    seeds = range(50 + 10 * seed, 50 + 10 * seed + num_heads)
    return torch.stack([random_moment(head_size, seed=one, num_tokens=num_tokens) for one in seeds])


def damped(moment: torch.Tensor, damp_ratio: float = 0.01) -> torch.Tensor:
    """Return the moment with its share of the mean diagonal of live entries; dead ones get the mean diagonal first."""
    diagonal = moment.double().diagonal()
    mean = float(diagonal[diagonal > 0].mean())
    alive = moment.double().clone()
    alive.diagonal()[diagonal <= 0] = mean
    return alive + damp_ratio * mean * torch.eye(len(moment), dtype=torch.float64)


def descending(moment: torch.Tensor) -> list[int]:
    """Return the places of the diagonal, largest first."""
    diagonal = damped(moment).diagonal().tolist()
    return sorted(range(len(diagonal)), key=lambda place: -diagonal[place])


def slow_two_sided(
    weight_OI: torch.Tensor,
    input_moment_II: torch.Tensor,
    output_moment_NDD: torch.Tensor,
    *,
    bits: int,
    columns: list[int],
    rows: list[list[int]],
    grids: tuple[torch.Tensor, torch.Tensor],
) -> SlowTwoSided:
    """Walk every head on given grids (scale and zero point `[O, I]`), columns and each head's rows in these orders."""
    head_size, num_columns = output_moment_NDD.shape[1], len(columns)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8)
    paid = 0.0
    input_II = damped(input_moment_II)[columns][:, columns]
    for head, output_DD in enumerate(output_moment_NDD):
        places = torch.tensor([head * head_size + row for row in rows[head]])
        product_VV = torch.kron(damped(output_DD)[rows[head]][:, rows[head]], input_II)
        upper_VV = torch.linalg.cholesky(torch.linalg.inv(product_VV), upper=True)
        current_V, scale_V, zero_point_V = (
            values[places][:, columns].double().reshape(-1) for values in (weight_OI, *grids)
        )
        codes_V = torch.empty_like(current_V)
        for place in range(len(current_V)):
            code = (current_V[place] / scale_V[place]).round() + zero_point_V[place]
            codes_V[place] = code.clamp(0, 2**bits - 1)
            error = current_V[place] - scale_V[place] * (codes_V[place] - zero_point_V[place])
            error = error / upper_VV[place, place]
            current_V[place:] -= error * upper_VV[place, place:]
            paid += float(error) ** 2
        codes_DI = torch.empty(head_size, num_columns, dtype=torch.uint8)
        codes_DI[:, columns] = codes_V.reshape(head_size, num_columns).to(torch.uint8)
        codes_OI[places] = codes_DI
    return SlowTwoSided(codes_OI=codes_OI, paid=paid)


def two_sided_loss(error_OI: torch.Tensor, input_moment_II: torch.Tensor, output_moment_NDD: torch.Tensor) -> float:
    """Return `sum_heads tr(B X H X^T)`, product by product."""
    total = 0.0
    for head, output_DD in enumerate(output_moment_NDD.double()):
        error_DI = error_OI[head * len(output_DD) : (head + 1) * len(output_DD)].double()
        total += float(torch.trace(output_DD @ error_DI @ input_moment_II.double() @ error_DI.T))
    return total
