"""One stage measured in both streams: the moment of its inputs, and how far its outputs have drifted.

Shapes: `B` windows of a batch, `S` positions, `I` input columns, `X` output rows or input columns.
"""

from __future__ import annotations

import torch

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.statistics import Drift, StageStatistics, output_drift
from optgptq.calibration.stream import ActivationStream, Batch, add_inputs
from optgptq.models.layer import DecoderLayer, LayerState
from optgptq.models.linear import Linear
from optgptq.models.spec import StageName


def measure_stage(
    streams: tuple[ActivationStream, ActivationStream],
    layers: tuple[DecoderLayer, DecoderLayer],
    stage: StageName,
    moment: InputMoment,
    *,
    reads: str,
    of_output: bool,
) -> StageStatistics:
    """Return the statistics of `stage`: those of the quantized stream, and its drift from the full-precision one.

    Inputs that are dear to compute are kept for `advance` where there is room.

    Args:
        streams: the quantized and the full-precision one, of the same windows in the same batches.
        layers: where each of them stands, the linears of the stage dense and the same in both.
        stage: stage that comes next.
        moment: to add to.
        reads: full name of a linear of the stage, for the message when a value is not finite.
        of_output: whether the drift of a stage that writes to the residual stream is that of its output.

    Raises:
        NumericalError: a value is not finite.
    """
    of_output &= stage in ("o", "down")
    num_columns = moment.sum_II.shape[0]
    num_rows = layers[0].spec.hidden_size if of_output else num_columns
    drift = Drift(of_output=of_output, sum_XI=moment.sum_II.new_zeros(num_rows, num_columns))
    for batch, reference in zip(streams[0].batches, streams[1].batches, strict=True):
        states = batch.state, reference.state
        inputs_BSI = layers[0].stage_input(stage, states[0], streams[0].context)
        reference_BSI = layers[1].stage_input(stage, states[1], streams[1].context)
        if stage == "down":
            streams[0].keep(batch, inputs_BSI)
            streams[1].keep(reference, reference_BSI)
        if not batch.held_out:
            add_inputs(moment, inputs_BSI, batch, reads=reads)
        inputs = (inputs_BSI, reference_BSI)
        drift_BSX = _output_drift(layers, stage, states, inputs) if of_output else reference_BSI - inputs_BSI
        pair = _valid(inputs_BSI, batch), _valid(drift_BSX, batch)
        if batch.held_out:
            drift.held_out.append(pair)
        else:
            drift.add(*pair)
    return StageStatistics(moment, drift)


def _output_drift(
    layers: tuple[DecoderLayer, DecoderLayer],
    stage: StageName,
    states: tuple[LayerState, LayerState],
    inputs: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    (name,) = layers[1].spec.stage(stage).linears
    linear = layers[1].linears[name]
    if not isinstance(linear, Linear):
        raise TypeError(f"{name} is not dense")
    found_BSM = layers[0].residual(stage, states[0])
    wanted_BSM = layers[1].residual(stage, states[1])
    residuals = None if found_BSM is None or wanted_BSM is None else (found_BSM, wanted_BSM)
    return output_drift(linear.weight_OI, *inputs, residuals)


def _valid(values_BSX: torch.Tensor, batch: Batch) -> torch.Tensor:
    return values_BSX.flatten(0, 1) if batch.valid_BS is None else values_BSX[batch.valid_BS]
