"""What one stage of a decoder layer is solved from: moments of its inputs, and how far its outputs have drifted.

The drift is what a target shift corrects (`optgptq.solvers.target_shift`). With `x` the input in the quantized stream
and `x'` the one in the full-precision stream, the outputs of a linear with weight `W` are behind by `W (x' - x)`.
Where a linear writes to the residual stream (`o` and `down`), it can also make up for what the stream itself has lost
up to here, `r' - r`: then the drift is `W (x' - x) + r' - r`.

Shapes: `B` windows of a batch, `S` positions, `T` tokens, `I` input columns, `O` output rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.calibration.moments import InputMoment, add_sum
from optgptq.numerics import exact_float32_products


@dataclass(slots=True, eq=False, kw_only=True)
class Drift:
    """Sum of `drift x^T` over tokens, and the tokens of windows that were held out of it.

    For linears that write to the residual stream the drift is that of their output, else that of their input: the
    smaller of the two, and the residual stream needs the former.

    Attributes:
        of_output: the drift is one of outputs, `[O]`; else of inputs, `[I]`.
        sum_XI: `[O, I]` or `[I, I]`.
        num_tokens: tokens in the sum.
        held_out: pairs of inputs `[T, I]` and drift `[T, O]` or `[T, I]` of the windows held out.
    """

    of_output: bool
    sum_XI: torch.Tensor
    num_tokens: int = 0
    held_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, inputs_TI: torch.Tensor, drift_TX: torch.Tensor) -> None:
        """Add tokens."""
        add_sum(drift_TX, inputs_TI, self.sum_XI)
        self.num_tokens += len(inputs_TI)

    def merge(self, other: Drift) -> None:
        """Add what another part of the calibration set measured."""
        self.sum_XI += other.sum_XI.to(self.sum_XI.device)
        self.num_tokens += other.num_tokens
        self.held_out += other.held_out

    def mean(self) -> torch.Tensor:
        """Return the mean of `drift x^T`."""
        return self.sum_XI / max(self.num_tokens, 1)

    def gap(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the mean of `drift of the output * x^T`, `[O, I]`, in the dtype of the sum."""
        mean_XI = self.mean()
        if self.of_output:
            return mean_XI
        with exact_float32_products():
            return weight_OI.to(mean_XI.dtype) @ mean_XI

    def strength(self, weight_OI: torch.Tensor, direction_OI: torch.Tensor) -> float:
        """Return the share of a shift of the weight that is best on the windows held out, between 0 and 1.

        With `S` the direction, the error on them is `|a S x - drift|^2`, least at `a = <S x, drift> / |S x|^2`.
        """
        along = energy = 0.0
        for inputs_TI, drift_TX in self.held_out:
            step_TO = inputs_TI.to(direction_OI.dtype) @ direction_OI.T
            drift_TX = drift_TX.to(direction_OI.dtype)
            drift_TO = drift_TX if self.of_output else drift_TX @ weight_OI.to(direction_OI.dtype).T
            along += float((step_TO * drift_TO).sum(dtype=torch.float64))
            energy += float(step_TO.square().sum(dtype=torch.float64))
        return min(max(along / energy, 0.0), 1.0) if energy > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class StageStatistics:
    """What was measured before one stage; `drift` is None where no target shift is asked."""

    moment: InputMoment
    drift: Drift | None = None


def output_drift(
    weight_OI: torch.Tensor,
    inputs_BSI: torch.Tensor,
    reference_BSI: torch.Tensor,
    residuals: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Return `W (x' - x) + r' - r`, float32; `residuals` are `r` and `r'`, or None where they do not count."""
    drift_BSO = F.linear(reference_BSI - inputs_BSI, weight_OI).float()
    if residuals is not None:
        drift_BSO += residuals[1].float() - residuals[0].float()
    return drift_BSO
