"""The column rule of GPTAQ as published, to reproduce published tables; `optgptq.solvers.target_shift` does better.

GPTQ's update of the columns that are still free gets a second term, which makes up for the drift of the inputs. With
`H_damped^-1 = U^T U`, `D = E[(y - x) x^T]`, `x` the inputs of the quantized stream and `y` those of the full-precision
one, `w` a column when its turn comes and `e = (w - q) / U_ii`,

    W[:, i:] -= e U[i, i:] - w P[i, i:],     P = alpha triu(D U^T, 1) U

Two properties of the published rule are kept, since the tables were made with them: each step aligns to the column as
compensated so far, not to the dense one; and across blocks the published code takes `q` for `w`, because its buffer
holds `q` by then (`published_blocks`). Dynamic grids are read from weights that carry all compensation so far.
Source: GPTAQ (arXiv 2504.02692), algorithm 1.

Shapes: `O` rows, `I` columns in the walk's order, `G` groups, `L` columns of a group, `C` columns of a block.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids.affine import nearest_codes
from optgptq.solvers.factor import Factor, damping_notes, factor_problem
from optgptq.solvers.losses import row_losses
from optgptq.solvers.problem import LayerProblem, LayerSolution
from optgptq.solvers.rounding import error_price, find_group_grids
from optgptq.solvers.rtn import round_to_nearest

# As in the published code, where it decides which columns get `w` and which `q`.
PUBLISHED_BLOCK = 128


def solve(
    problem: LayerProblem,
    cross_moment_II: torch.Tensor,
    alpha: float,
    *,
    published_blocks: bool = True,
    block_size: int = PUBLISHED_BLOCK,
) -> LayerSolution:
    """Return the GPTAQ solution of one linear; its losses are against the dense weight.

    Args:
        problem: what `optgptq.solvers.gptq` takes. The search `walk` means `pivot` here.
        cross_moment_II: `D`, the mean of `(y - x) x^T`.
        alpha: share of the second term; 0 is GPTQ. The paper's formula has 1, its code 0.25.
        published_blocks: hand `q P` on across blocks, as the published code does; False: `w P`, as inside a block.
        block_size: columns of a block.

    Raises:
        NumericalError: the moment is not finite or cannot be factored.
    """
    started = time.perf_counter()
    grid, settings = problem.grid, problem.settings
    num_columns = problem.weight_OI.shape[1]
    group_size = problem.group_size
    nests = block_size % group_size == 0 or group_size % block_size == 0
    if grid.group_grids == "dynamic" and not nests and max(group_size, block_size) < num_columns:
        raise ValueError(f"groups of {group_size} columns and blocks of {block_size} do not nest: use static grids")
    factor = factor_problem(problem)
    walk = _Walk(problem, factor, group_size)
    walk.run(drift_factor(factor, cross_moment_II, alpha), block_size, published_blocks)
    weight = walk.weight()
    nearest, _ = round_to_nearest(
        problem.weight_OI.to(settings.dtype),
        weight.scale_OG.to(settings.dtype),
        weight.zero_point_OG.to(settings.dtype),
        bits=grid.bits,
        symmetric=grid.symmetric,
    )
    energy_O, loss_O, rtn_loss_O = row_losses(problem, weight, nearest)
    return LayerSolution(
        weight=weight,
        row_energy_O=energy_O,
        row_loss_O=loss_O,
        row_rtn_loss_O=rtn_loss_O,
        row_clipped_O=walk.clipped_O.to(torch.float64) / num_columns,
        damp_ratio_used=factor.damp_ratio_used,
        num_dead_inputs=int(factor.dead_I.sum()),
        seconds=time.perf_counter() - started,
        notes=damping_notes(factor, settings.damp_ratio),
    )


def inverse_factor(factor: Factor) -> torch.Tensor:
    """Return `U`, upper triangular `[I, I]`, with `H_damped^-1 = U^T U`, in the walk's order."""
    identity_II = torch.eye(len(factor.order_I), dtype=factor.upper_II.dtype, device=factor.upper_II.device)
    inverse_II: torch.Tensor = torch.linalg.solve_triangular(factor.upper_II, identity_II, upper=True)
    return inverse_II


def drift_factor(factor: Factor, cross_moment_II: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return `P = alpha triu(D U^T, 1) U`, zero on and below the diagonal, `[I, I]`, in the walk's order.

    Row `i` is `alpha D[i, i+1:]` times the inverse of the trailing block of the damped moment.
    """
    inverse_II = inverse_factor(factor)
    cross_II = cross_moment_II.to(inverse_II.dtype).index_select(0, factor.order_I).index_select(1, factor.order_I)
    above_II = torch.triu(cross_II @ inverse_II.T, diagonal=1)
    drift_II: torch.Tensor = alpha * (above_II @ inverse_II)
    return drift_II


class _Walk:
    """The columns of a weight in the walk's order; `current_IO` changes as errors are handed on."""

    def __init__(self, problem: LayerProblem, factor: Factor, group_size: int) -> None:
        self.problem = problem
        self.factor = factor
        self.group_size = group_size
        self.inverse_II = inverse_factor(factor)
        self.group_of_column = (factor.order_I // group_size).tolist()
        self.current_IO = problem.weight_OI.to(factor.upper_II.dtype).T[factor.order_I].contiguous()
        self.codes_IO = torch.empty_like(self.current_IO, dtype=torch.uint8)
        self.clipped_O = torch.zeros(self.current_IO.shape[1], dtype=torch.int64, device=self.current_IO.device)
        num_groups = len(self.current_IO) // group_size
        self.scale_GO = self.current_IO.new_empty(num_groups, self.current_IO.shape[1])
        self.zero_point_GO = torch.empty_like(self.scale_GO)

    def run(self, drift_II: torch.Tensor, block_size: int, published_blocks: bool) -> None:
        """Round all columns."""
        num_columns = len(self.current_IO)
        if self.problem.grid.group_grids == "static":
            groups_I = torch.tensor(self.group_of_column, device=self.current_IO.device)
            for group in range(len(self.scale_GO)):
                self._find_grids(group, (groups_I == group).nonzero().squeeze(1))
        for begin in range(0, num_columns, block_size):
            end = min(begin + block_size, num_columns)
            error_CO, before_CO = self._run_block(begin, end, drift_II)
            # By now the block holds its levels.
            source_CO = self.current_IO[begin:end] if published_blocks else before_CO
            self.current_IO[end:] -= self.inverse_II[begin:end, end:].T @ error_CO
            self.current_IO[end:] += drift_II[begin:end, end:].T @ source_CO

    def _run_block(self, begin: int, end: int, drift_II: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round columns `begin .. end`; return their errors `e`, and the columns as they were when rounded."""
        error_CO = torch.empty_like(self.current_IO[begin:end])
        before_CO = torch.empty_like(error_CO)
        for column in range(begin, end):
            if self.problem.grid.group_grids == "dynamic" and column % self.group_size == 0:
                columns_L = torch.arange(column, column + self.group_size, device=self.current_IO.device)
                self._find_grids(self.group_of_column[column], columns_L)
            weight_O = before_CO[column - begin] = self.current_IO[column].clone()
            error_O = (weight_O - self._round(column, weight_O)) / self.inverse_II[column, column]
            error_CO[column - begin] = error_O
            self.current_IO[column:end].addr_(self.inverse_II[column, column:end], error_O, alpha=-1)
            self.current_IO[column:end].addr_(drift_II[column, column:end], weight_O)
        return error_CO, before_CO

    def weight(self) -> AffineWeight:
        """Return the result in the model's column order."""
        codes_IO = torch.empty_like(self.codes_IO)
        codes_IO[self.factor.order_I] = self.codes_IO
        return AffineWeight(
            codes_OI=codes_IO.T.contiguous(),
            scale_OG=self.scale_GO.T.to(torch.float32).contiguous(),
            zero_point_OG=self.zero_point_GO.T.to(torch.int32).contiguous(),
            bits=self.problem.grid.bits,
            group_size=self.group_size,
            symmetric=self.problem.grid.symmetric,
        )

    def _find_grids(self, group: int, columns_L: torch.Tensor) -> None:
        price = error_price(self.factor.upper_II[columns_L][:, columns_L])
        self.scale_GO[group], self.zero_point_GO[group] = find_group_grids(
            self.current_IO[columns_L], price, self.problem.grid, backend=self.problem.settings.backend
        )

    def _round(self, column: int, weight_O: torch.Tensor) -> torch.Tensor:
        """Note the codes of a column and return its levels."""
        group = self.group_of_column[column]
        scale_O, zero_point_O = self.scale_GO[group], self.zero_point_GO[group]
        codes_O, endless_O = nearest_codes(weight_O, scale_O, zero_point_O, self.problem.grid.max_code)
        self.codes_IO[column] = codes_O.to(torch.uint8)
        self.clipped_O += codes_O != endless_O
        return (codes_O - zero_point_O) * scale_O
