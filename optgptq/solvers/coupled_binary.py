"""Binary codes where the rows of a head meet: each row makes up for the errors of those before it.

With `B = P P^T`, a head loses `tr(B X H X^T)` for an error `X`. Row `i` of `P^T X` is
`P_ii (w_i - q_i + sum_{i'<i} P_i'i / P_ii X_i')`, so that one row after another is solved by itself for the target

    w_i + sum_{i'<i} P_i'i / P_ii X_i'

all heads at once: the two-sided solver of `optgptq.solvers.two_sided`, with columns inside rows instead of rows inside
groups of columns. Source: BoA (arXiv 2406.13474), section 3; docs/math/two-sided.md.

Shapes: `O` rows, `I` columns, `N` heads, `D` rows of a head in the walk's order.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from optgptq.binary_weight import BinaryWeight
from optgptq.solvers import binary
from optgptq.solvers.binary import SolvedRows
from optgptq.solvers.binary_store import nearest_levels, overflow_notes
from optgptq.solvers.coupled_losses import row_shares
from optgptq.solvers.coupling import OutputFactors, factor_outputs
from optgptq.solvers.factor import damping_notes, factor_problem
from optgptq.solvers.problem import CoupledLosses, LayerProblem, LayerSolution


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the solution of one linear in binary codes, one-sided where no head couples its rows.

    Raises:
        NumericalError: a moment is not finite or cannot be factored.
        ValueError: the order visits columns of different groups in turn.
    """
    started = time.perf_counter()
    if problem.output_moment_NDD is None:
        return binary.solve(problem)
    outputs = factor_outputs(problem, problem.output_moment_NDD)
    if not bool(outputs.is_coupled_N.any()):
        solution = binary.solve(problem)
        return replace(solution, notes=(*solution.notes, *outputs.notes), seconds=time.perf_counter() - started)
    factor = factor_problem(problem)
    moment_II = problem.input_moment_II.to(problem.settings.dtype)
    ordered_II = binary.ordered_moment(problem, factor)
    num_heads, head_size = outputs.order_ND.shape
    weight_NDI = _ordered(problem.weight_OI.to(problem.settings.dtype).view(num_heads, head_size, -1), outputs)
    error_NDI = torch.zeros_like(weight_NDI)
    parts: list[SolvedRows] = []
    for place in range(head_size):
        share_ND = outputs.upper_NDD[:, :place, place] / outputs.upper_NDD[:, place, place, None]
        received_NI = torch.bmm(share_ND[:, None], error_NDI[:, :place])[:, 0]
        part = binary.solve_rows(problem, weight_NDI[:, place] + received_NI, factor, ordered_II)
        error_NDI[:, place] = weight_NDI[:, place] - part.weight.dequantize(weight_NDI.dtype)
        parts.append(part)
    place_O = _places(outputs)
    weight = BinaryWeight.stacked([part.weight for part in parts]).select(place_O)
    dense_OI = weight_NDI.transpose(0, 1).flatten(0, 1)[place_O]
    nearest_OI = nearest_levels(weight, dense_OI) - dense_OI
    nearest_NDI = _ordered(nearest_OI.view_as(weight_NDI), outputs)
    grams = [_gram(values_NDI, moment_II) for values_NDI in (weight_NDI, error_NDI, nearest_NDI)]
    own = [part_NDD.diagonal(dim1=1, dim2=2).T.flatten()[place_O] for part_NDD in grams]
    coupled = [row_shares(part_NDD, outputs.moment_NDD).T.flatten()[place_O] for part_NDD in grams]
    return LayerSolution(
        weight=weight,
        row_energy_O=own[0],
        row_loss_O=own[1],
        row_rtn_loss_O=own[2],
        row_clipped_O=torch.cat([part.clipped_O for part in parts])[place_O],
        damp_ratio_used=factor.damp_ratio_used,
        num_dead_inputs=int(factor.dead_I.sum()),
        seconds=time.perf_counter() - started,
        coupled=CoupledLosses(energy_O=coupled[0], loss_O=coupled[1], rtn_loss_O=coupled[2]),
        notes=(*damping_notes(factor, problem.settings.damp_ratio), *outputs.notes, *overflow_notes(weight)),
    )


def _ordered(values_NDI: torch.Tensor, outputs: OutputFactors) -> torch.Tensor:
    return values_NDI.gather(1, outputs.order_ND[:, :, None].expand_as(values_NDI))


def _gram(values_NDI: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    """Return `X H X^T` of each head, float64 `[N, D, D]`."""
    return (values_NDI @ moment_II).to(torch.float64) @ values_NDI.to(torch.float64).transpose(1, 2)


def _places(outputs: OutputFactors) -> torch.Tensor:
    """Return for every row of the weight where it stands in the rows `[D, N]`, which were solved one after another."""
    num_heads = len(outputs.order_ND)
    place_ND = outputs.order_ND.argsort(dim=1)
    return (place_ND * num_heads + torch.arange(num_heads, device=place_ND.device)[:, None]).flatten()
