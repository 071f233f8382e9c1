"""The output head, measured behind the last decoder layer and solved like any linear, some rows at a time.

Shapes: `V` vocabulary, the rows of the head; `E` its input columns; `B`, `S` windows of a batch and their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.calibration.layer import LayerSettings, SolvedLinear
from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import ActivationStream, add_inputs
from optgptq.models.ends import Head
from optgptq.models.linear import Linear
from optgptq.plan import LinearPlan
from optgptq.solvers import METHODS, LayerProblem, LayerSolution

# A vocabulary may have hundreds of thousands of rows; solvers hold several float copies of what they are given.
ROWS_PER_SOLVE = 16384


def solve_head(head: Head, plan: LinearPlan, stream: ActivationStream, settings: LayerSettings) -> SolvedLinear:
    """Return the head as `plan` quantizes it, its errors weighted by the second moment of what it reads.

    Args:
        head: norm and projection; its weight is dense.
        plan: of the head.
        stream: behind the last decoder layer.
        settings: of solvers and moments.

    Raises:
        NumericalError: activations are not finite, or the moment cannot be factored.
    """
    if plan.grid is None or not isinstance(head.project, Linear):
        raise TypeError(f"{plan.info.name} is not to be quantized, or not dense")
    moment = InputMoment(plan.info.in_features, dtype=settings.moment_dtype, device=stream.device)
    for batch in stream.batches:
        if not batch.held_out:
            inputs_BSE = head.project_input(batch.state.hidden_BSM)
            add_inputs(moment, inputs_BSE, batch, reads=plan.info.name)
    mean_EE = moment.take_mean()
    problem = LayerProblem(
        name=plan.info.name,
        weight_OI=head.project.weight_OI,
        input_moment_II=mean_EE,
        num_tokens=moment.num_tokens,
        grid=plan.grid,
        settings=settings.solver,
    )
    return SolvedLinear(plan, solve_in_parts(problem, method=plan.method), num_tokens=moment.num_tokens)


def solve_in_parts(problem: LayerProblem, *, method: str, num_rows: int = ROWS_PER_SOLVE) -> LayerSolution:
    """Return the solution of `problem`, `num_rows` rows at a time: rows do not influence each other.

    Grids are uniform and rows not coupled.
    """
    solver = METHODS[method].solver
    return _joined([solver(replace(problem, weight_OI=rows)) for rows in torch.split(problem.weight_OI, num_rows)])


def _joined(parts: Sequence[LayerSolution]) -> LayerSolution:
    weights = [part.weight for part in parts if isinstance(part.weight, AffineWeight)]
    if len(weights) < len(parts):
        raise TypeError("only uniform grids are joined here")
    return LayerSolution(
        weight=AffineWeight.stacked(weights),
        row_energy_O=torch.cat([part.row_energy_O for part in parts]),
        row_loss_O=torch.cat([part.row_loss_O for part in parts]),
        row_rtn_loss_O=torch.cat([part.row_rtn_loss_O for part in parts]),
        row_clipped_O=torch.cat([part.row_clipped_O for part in parts]),
        damp_ratio_used=max(part.damp_ratio_used for part in parts),
        num_dead_inputs=parts[0].num_dead_inputs,
        seconds=sum(part.seconds for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )
