"""The only contract of a solver: `solve(problem: LayerProblem) -> LayerSolution`.

A solver is pure. It knows no module class, file, device manager or logger, and changes none of its inputs.
Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `N` heads, `D` rows of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.settings import GridSettings
from optgptq.native.library import Backend
from optgptq.quantized_weight import QuantizedWeight

ColumnOrder = Literal["natural", "activation", "group_aware", "min_pivot"]
RowOrder = Literal["natural", "activation"]
RowMode = Literal["rows", "wavefront"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverSettings:
    """How the columns are walked.

    Attributes:
        order: order in which columns are quantized; stored groups stay contiguous whatever it is.
        damp_ratio: share of the mean diagonal of the input moment that is added to its diagonal.
        column_block: columns that update each other one by one; wider ranges are updated by products.
        dtype: arithmetic of the solve; float64 in tests that compare codes.
        backend: who runs the inner loops; `torch` is the definition of the others.
        row_order: order in which the rows of a head are quantized where they are coupled: as they stand, or by
            descending output moment.
        row_block: coupled rows of a head whose grids are found together, before the first of them is quantized; -1 for
            the whole head. It chooses grids and nothing else.
        row_mode: how coupled rows with known grids are walked: one after the other, or in anti-diagonals. The codes
            are the same; anti-diagonals take far fewer steps, which counts where each step is a kernel launch.
        scale_refit: scales are fitted once more to the codes (`optgptq.solvers.refine`).
        code_sweeps: sweeps of coordinate descent over the codes; 0 for none.
    """

    order: ColumnOrder = "group_aware"
    damp_ratio: float = 0.01
    column_block: int = 16
    dtype: torch.dtype = torch.float32
    backend: Backend = "auto"
    row_order: RowOrder = "activation"
    row_block: int = 1
    row_mode: RowMode = "rows"
    scale_refit: bool = False
    code_sweeps: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerProblem:
    """One linear to quantize, or several that read the same input, their rows one below the other.

    Without an output moment rows do not influence each other, so a stacked problem has the solution of its parts.

    Attributes:
        name: full module name, for messages only.
        weight_OI: dense weight `[O, I]`, any float dtype.
        input_moment_II: mean of `x x^T` over calibration tokens, `[I, I]`, float32 or float64.
        num_tokens: tokens behind the moment.
        grid: grid settings.
        settings: solver settings.
        output_moment_NDD: how errors of the rows of a head meet, `[N, D, D]`, float32 or float64; rows of the weight
            are head by head, `O = N * D`. None: they do not meet. Solvers of single rows ignore it.
    """

    name: str
    weight_OI: torch.Tensor
    input_moment_II: torch.Tensor
    num_tokens: int
    grid: GridSettings
    settings: SolverSettings
    output_moment_NDD: torch.Tensor | None = None
    binary: BinarySettings = field(default_factory=BinarySettings)

    @property
    def group_size(self) -> int:
        """Columns that share a grid: all of them where there is one group per row."""
        return self.weight_OI.shape[1] if self.grid.group_size == -1 else self.grid.group_size


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CoupledLosses:
    """Each row's part of a head's `tr(B X H X^T)`, with the undamped output moment `B` and input moment `H`.

    The sum over a head is what the head loses. Errors of two rows may cancel, so one row's part may be negative.

    Attributes:
        energy_O: float64 `[O]`, for the dense weight.
        loss_O: float64 `[O]`, for the error of this solution.
        rtn_loss_O: the same for rounding the dense weight to nearest on the same grids.
    """

    energy_O: torch.Tensor
    loss_O: torch.Tensor
    rtn_loss_O: torch.Tensor

    @property
    def loss(self) -> float:
        """Share of the energy that quantization loses."""
        return _share(self.loss_O, self.energy_O)

    @property
    def rtn_loss(self) -> float:
        """The same share for rounding to nearest."""
        return _share(self.rtn_loss_O, self.energy_O)

    def rows(self, begin: int, end: int) -> CoupledLosses:
        """Return the losses of rows `begin .. end`."""
        return CoupledLosses(
            energy_O=self.energy_O[begin:end], loss_O=self.loss_O[begin:end], rtn_loss_O=self.rtn_loss_O[begin:end]
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerSolution:
    """A quantized linear and the numbers that describe it.

    Attributes:
        weight: codes and what they stand for, in the model's own column order.
        row_energy_O: float64 `[O]`, `w H w^T` of each row with the undamped moment `H`.
        row_loss_O: float64 `[O]`, `dw H dw^T` of each row of this solution.
        row_rtn_loss_O: the same for rounding the dense weight to nearest on the same grids.
        row_clipped_O: float64 `[O]`, share of the row that lay outside its grid when it was rounded.
        damp_ratio_used: the damping with which the factorization succeeded; 0 where none was needed.
        num_dead_inputs: input columns whose moment was zero.
        seconds: wall time of the solve.
        coupled: the losses under the output moment, where the solver used one. The row losses above leave it out, so
            that they can be compared with those of any other solver.
        notes: everything that a user must hear about, in plain sentences; empty when all went as asked.
    """

    weight: QuantizedWeight
    row_energy_O: torch.Tensor
    row_loss_O: torch.Tensor
    row_rtn_loss_O: torch.Tensor
    row_clipped_O: torch.Tensor
    damp_ratio_used: float
    num_dead_inputs: int
    seconds: float
    coupled: CoupledLosses | None = None
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Share of the output's energy that quantization loses: `tr(dW H dW^T) / tr(W H W^T)`."""
        return _share(self.row_loss_O, self.row_energy_O)

    @property
    def rtn_loss(self) -> float:
        """The same share for rounding to nearest."""
        return _share(self.row_rtn_loss_O, self.row_energy_O)

    @property
    def clip_fraction(self) -> float:
        """Share of all weights that lay outside their grid when they were rounded."""
        return float(self.row_clipped_O.mean())

    def rows(self, begin: int, end: int) -> LayerSolution:
        """Return the solution of rows `begin .. end`; the time is shared out by rows."""
        return LayerSolution(
            weight=self.weight.rows(begin, end),
            row_energy_O=self.row_energy_O[begin:end],
            row_loss_O=self.row_loss_O[begin:end],
            row_rtn_loss_O=self.row_rtn_loss_O[begin:end],
            row_clipped_O=self.row_clipped_O[begin:end],
            damp_ratio_used=self.damp_ratio_used,
            num_dead_inputs=self.num_dead_inputs,
            seconds=self.seconds * (end - begin) / self.weight.out_features,
            coupled=None if self.coupled is None else self.coupled.rows(begin, end),
            notes=self.notes,
        )


class Solver(Protocol):
    """Every solver has this signature; it raises NumericalError and nothing else on purpose."""

    def __call__(self, problem: LayerProblem) -> LayerSolution: ...


def _share(part_O: torch.Tensor, whole_O: torch.Tensor) -> float:
    whole = float(whole_O.sum())
    return float(part_O.sum()) / whole if whole > 0 else 0.0
