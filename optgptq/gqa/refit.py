"""The output projection fitted once more, to what the original attention wrote: a ridge regression in closed form.

With `z` the outputs of the new heads and `y` what attention should add to the residual stream, the change `S` of the
projection `W` minimizes the mean of `|y - (W + S) z|^2` plus a ridge `damp * mean(diag) * |S|^2`. `y` is the output of
the original attention in the original model, plus what the residual stream itself has lost up to here. A bias, where
there is one, is part of the regression and of no ridge. Only a change that lowers the error on windows that are in no
sum is taken.

Shapes: `B` windows of a batch, `T` tokens, `I` inputs of the projection, `M` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from optgptq.calibration.moments import InputMoment, add_sum
from optgptq.calibration.stream import ActivationStream, add_inputs
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear

# Strengths of the ridge that are tried; the error on held-out windows chooses.
_DAMP_RATIOS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OutputRefit:
    """What a refit brought.

    Attributes:
        linear: the new projection, float64; None where none was better.
        error_before, error_after: on held-out windows, as a share of the wanted energy.
        damp_ratio: the ridge that was best; None where none was better.
    """

    linear: Linear | None
    error_before: float
    error_after: float
    damp_ratio: float | None


@dataclass(slots=True, eq=False, kw_only=True)
class Regression:
    """Sums over tokens of the inputs `x` and of what the output lacks, `e`.

    Attributes:
        moment: of the inputs.
        cross_MI: sum of `e x^T`.
        input_I, error_M: plain sums, float64.
    """

    moment: InputMoment
    cross_MI: torch.Tensor
    input_I: torch.Tensor
    error_M: torch.Tensor

    def solve(self, damp_ratio: float, *, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the best change of the weight `[M, I]` and of the bias `[M]`, float64."""
        count = max(self.moment.num_tokens, 1)
        moment_II, cross_MI = self.moment.mean().double(), self.cross_MI.double() / count
        input_I, error_M = self.input_I / count, self.error_M / count
        if with_bias:
            moment_II = moment_II - torch.outer(input_I, input_I)
            cross_MI = cross_MI - torch.outer(error_M, input_I)
        ridge = damp_ratio * float(moment_II.diagonal().mean())
        moment_II.diagonal().add_(ridge if ridge > 0 else 1.0)
        change_MI = torch.linalg.solve(moment_II, cross_MI, left=False)
        return change_MI, error_M - change_MI @ input_I if with_bias else None


def refit_output(
    streams: tuple[ActivationStream, ActivationStream],
    layers: tuple[DecoderLayer, DecoderLayer],
    *,
    dtype: torch.dtype,
) -> OutputRefit:
    """Return the best output projection of the new layer.

    Args:
        streams: the new and the original one, both before stage `o`, of the same windows in the same batches.
        layers: where they stand.
        dtype: of the sums.

    Raises:
        NumericalError: activations are not finite.
    """
    linear = _projection(layers[0])
    sums = _regression(streams, layers, dtype=dtype)
    changes = [(ratio, sums.solve(ratio, with_bias=linear.bias_O is not None)) for ratio in _DAMP_RATIOS]
    wanted, before, after = _held_out_errors(streams, layers, [change for _, change in changes])
    scale = 1 / wanted if wanted > 0 else 0.0
    best = min(range(len(changes)), key=lambda index: after[index])
    if not after[best] < before:
        return OutputRefit(linear=None, error_before=before * scale, error_after=before * scale, damp_ratio=None)
    ratio, (change_MI, change_M) = changes[best]
    bias_M = None if linear.bias_O is None or change_M is None else linear.bias_O.double() + change_M
    return OutputRefit(
        linear=Linear(linear.weight_OI.double() + change_MI, bias_M),
        error_before=before * scale,
        error_after=after[best] * scale,
        damp_ratio=ratio,
    )


def _regression(
    streams: tuple[ActivationStream, ActivationStream], layers: tuple[DecoderLayer, DecoderLayer], *, dtype: torch.dtype
) -> Regression:
    weight_OI = _projection(layers[0]).weight_OI
    num_rows, num_columns = weight_OI.shape
    sums = Regression(
        moment=InputMoment(num_columns, dtype=dtype, device=weight_OI.device),
        cross_MI=weight_OI.new_zeros(num_rows, num_columns, dtype=dtype),
        input_I=weight_OI.new_zeros(num_columns, dtype=torch.float64),
        error_M=weight_OI.new_zeros(num_rows, dtype=torch.float64),
    )
    (name,) = layers[0].spec.linear_names(layers[0].index, "o")
    for index, batch in enumerate(streams[0].batches):
        if batch.held_out:
            continue
        add_inputs(sums.moment, layers[0].stage_input("o", batch.state, streams[0].context), batch, reads=name)
        inputs_TI, lacking_TM, _ = _tokens(streams, layers, index)
        add_sum(lacking_TM, inputs_TI, sums.cross_MI)
        sums.input_I += inputs_TI.sum(0, dtype=torch.float64)
        sums.error_M += lacking_TM.sum(0, dtype=torch.float64)
    return sums


def _held_out_errors(
    streams: tuple[ActivationStream, ActivationStream],
    layers: tuple[DecoderLayer, DecoderLayer],
    changes: list[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[float, float, list[float]]:
    """Return, on held-out windows, the wanted energy, the error as it is, and the error after each change."""
    wanted = before = 0.0
    after = [0.0] * len(changes)
    for index, batch in enumerate(streams[0].batches):
        if not batch.held_out:
            continue
        inputs_TI, lacking_TM, wanted_TM = _tokens(streams, layers, index)
        wanted += _energy(wanted_TM)
        before += _energy(lacking_TM)
        for place, (change_MI, change_M) in enumerate(changes):
            bias_M = None if change_M is None else change_M.to(inputs_TI.dtype)
            after[place] += _energy(lacking_TM - F.linear(inputs_TI, change_MI.to(inputs_TI.dtype), bias_M))
    return wanted, before, after


def _tokens(
    streams: tuple[ActivationStream, ActivationStream], layers: tuple[DecoderLayer, DecoderLayer], index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return of one batch the inputs `[T, I]`, what the output lacks and what it should be, `[T, M]`."""
    batch, reference = streams[0].batches[index], streams[1].batches[index]
    states = batch.state, reference.state
    inputs_BSI = layers[0].stage_input("o", states[0], streams[0].context)
    exact = torch.promote_types(inputs_BSI.dtype, torch.float32)
    found_BSM = _projection(layers[0])(inputs_BSI).to(exact)
    wanted_BSM = _projection(layers[1])(layers[1].stage_input("o", states[1], streams[1].context)).to(exact)
    residuals = layers[0].residual("o", states[0]), layers[1].residual("o", states[1])
    if residuals[0] is not None and residuals[1] is not None:
        wanted_BSM = wanted_BSM + (residuals[1].to(exact) - residuals[0].to(exact))
    parts = (inputs_BSI.to(exact), wanted_BSM - found_BSM, wanted_BSM)
    if batch.valid_BS is None:
        inputs_TI, lacking_TM, wanted_TM = (part.flatten(0, 1) for part in parts)
    else:
        inputs_TI, lacking_TM, wanted_TM = (part[batch.valid_BS] for part in parts)
    return inputs_TI, lacking_TM, wanted_TM


def _projection(layer: DecoderLayer) -> Linear:
    (name,) = layer.spec.stage("o").linears
    linear = layer.linears[name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{name} is not dense")
    return linear


def _energy(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
