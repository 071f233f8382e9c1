"""A stage measured in both streams against loops over tokens, in float64, for every kind of residual."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.quantizable import padded_windows, tiny_model
from support.tiny_models import random_tokens, reference_model, save_reference

from optgptq.calibration.measure import measure_stage
from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import ActivationStream, embed
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import NumericalError
from optgptq.models.attention import attention_context
from optgptq.models.layer import DecoderLayer
from optgptq.models.linear import Linear
from optgptq.models.loading import load_embedding, load_layer
from optgptq.models.registry import model_spec
from optgptq.models.spec import STAGE_NAMES, StageName

POSITIONS = 7
# The last two windows are held out; padding in both kinds.
LENGTHS = (7, 4, 7, 6, 7, 3)
NUM_HELD_OUT = 2
KINDS = (
    "llama-grouped_query",
    "gptneox-parallel",
    "gptneox-sequential",
    "falcon-multi_query",
    "falcon-grouped",
    "opt-pre_norm",
    "opt-post_norm_projected",
    "bloom-residual_after_norm",
    "mpt-alibi",
    "gemma2-softcaps",
)


class Place(NamedTuple):
    """Both streams before one decoder layer, and the layer as each has it."""

    streams: tuple[ActivationStream, ActivationStream]
    layers: tuple[DecoderLayer, DecoderLayer]

    def advance(self, stage: StageName) -> None:
        for stream, layer in zip(self.streams, self.layers, strict=True):
            stream.advance(layer, stage)


def noisy(layer: DecoderLayer, stages: tuple[StageName, ...]) -> DecoderLayer:
    """Return the layer with the linears of some stages changed, as if they had been quantized."""
    changed, generator = layer.copy(), torch.Generator().manual_seed(layer.index)
    for stage in stages:
        for name in layer.spec.stage(stage).linears:
            linear = layer.linears[name]
            assert isinstance(linear, Linear)
            noise_OI = torch.randn(linear.weight_OI.shape, generator=generator, dtype=torch.float64)
            changed.linears[name] = Linear(linear.weight_OI + 0.02 * noise_OI, linear.bias_O)
    return changed


def place(name: str, folder: Path, *, num_held_out: int = NUM_HELD_OUT) -> Place:
    """Return both streams before the second decoder layer; they differ by what was done to the first."""
    source = CheckpointFolder.open(save_reference(reference_model(tiny_model(name)).double(), folder))
    spec = model_spec(source)
    windows = padded_windows(random_tokens(len(LENGTHS), POSITIONS), LENGTHS)
    embedding = load_embedding(source, spec, dtype=torch.float64)
    context = attention_context(spec, POSITIONS, dtype=torch.float64)
    streams = [
        embed(windows, embedding, context, windows_per_batch=3, num_held_out=num_held_out)
        for _ in ("quantized", "full")
    ]
    first, second = (load_layer(source, spec, index, dtype=torch.float64) for index in (0, 1))
    before = Place((streams[0], streams[1]), (noisy(first, STAGE_NAMES), first))
    for stage in STAGE_NAMES:
        before.advance(stage)
    return Place(before.streams, (second, second))


def measured_tokens(place: Place, *, held_out: bool) -> list[tuple[int, int, int]]:
    """Return batch, row and position of every token that is no padding."""
    return [
        (index, row, position)
        for index, batch in enumerate(place.streams[0].batches)
        if batch.held_out == held_out
        for row in range(batch.state.hidden_BSM.shape[0])
        for position in range(LENGTHS[batch.first_window + row])
    ]


def literal_drifts(
    place: Place, stage: StageName, *, of_output: bool = True
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Return inputs and drift of every batch, `[B, S, .]`: the drift of what the stage adds to, or of its inputs.

    The residual is what a forward pass makes of the stage less the output of its linear.
    """
    found = []
    for batches in zip(*(stream.batches for stream in place.streams), strict=True):
        inputs, sums = [], []
        for stream, layer, batch in zip(place.streams, place.layers, batches, strict=True):
            inputs_BSI = layer.stage_input(stage, batch.state, stream.context)
            inputs.append(inputs_BSI.clone())
            if of_output and stage in ("o", "down"):
                # Both streams with the dense linear of the full-precision layer.
                (name,) = layer.spec.stage(stage).linears
                linear = place.layers[1].linears[name]
                assert isinstance(linear, Linear)
                output_BSM = inputs_BSI @ linear.weight_OI.T
                residual_BSM = layer.residual(stage, batch.state)
                sums.append(output_BSM if residual_BSM is None else output_BSM + residual_BSM)
        values = sums or inputs
        found.append((inputs, [values[1] - values[0]]))
    return found


@pytest.mark.parametrize("of_output", [True, False])
@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_moment_and_drift_are_those_of_single_tokens(
    name: str, stage: StageName, of_output: bool, tmp_path: Path
) -> None:
    here = place(name, tmp_path / "model")
    for before in STAGE_NAMES[: STAGE_NAMES.index(stage)]:
        here = Place(here.streams, (noisy(here.layers[0], (before,)), here.layers[1]))
        here.advance(before)
    literal = literal_drifts(here, stage, of_output=of_output)
    num_columns = literal[0][0][0].shape[-1]
    moment = InputMoment(num_columns, dtype=torch.float64)
    statistics = measure_stage(here.streams, here.layers, stage, moment, reads="linear", of_output=of_output)
    drift = statistics.drift
    assert statistics.moment is moment
    assert drift is not None
    assert drift.of_output == (of_output and stage in ("o", "down"))
    moment_II, sum_XI = torch.zeros(num_columns, num_columns, dtype=torch.float64), torch.zeros_like(drift.sum_XI)
    places = measured_tokens(here, held_out=False)
    for batch, row, position in places:
        inputs, (drift_BSX,) = literal[batch]
        moment_II += torch.outer(inputs[0][row, position], inputs[0][row, position])
        sum_XI += torch.outer(drift_BSX[row, position], inputs[0][row, position])
    assert moment.num_tokens == drift.num_tokens == len(places) == 7 + 4 + 7 + 6
    torch.testing.assert_close(moment.sum_II, moment_II)
    # Drifts of outputs are kept in float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(sum_XI.abs().max())} if drift.of_output else {}
    torch.testing.assert_close(drift.sum_XI, sum_XI, **tolerance)
    held = measured_tokens(here, held_out=True)
    inputs_TI, drift_TX = (torch.cat(parts) for parts in zip(*drift.held_out, strict=True))
    assert len(held) == len(inputs_TI) == len(drift_TX) == 7 + 3
    for index, (batch, row, position) in enumerate(held):
        inputs, (drift_BSX,) = literal[batch]
        torch.testing.assert_close(inputs_TI[index], inputs[0][row, position])
        expected_X = drift_BSX[row, position].to(drift_TX.dtype)
        torch.testing.assert_close(drift_TX[index], expected_X, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_residual_is_what_the_output_of_a_stage_is_added_to(name: str, tmp_path: Path) -> None:
    here = place(name, tmp_path / "model")
    stream, layer = here.streams[0], here.layers[0]
    spec, norms = layer.spec, layer.norms
    for batch in stream.batches:
        state = batch.state
        for stage in STAGE_NAMES:
            output_BSM, residual_BSM = None, None
            if stage in ("o", "down"):
                (linear,) = spec.stage(stage).linears
                output_BSM = layer.linears[linear](layer.stage_input(stage, state, stream.context))
                residual_BSM = layer.residual(stage, state)
                assert (residual_BSM is None) == name.startswith("gemma2")
            else:
                assert layer.residual(stage, state) is None
            state = layer.advance(stage, state, stream.context)
            if output_BSM is None or residual_BSM is None:
                continue
            sum_BSM = output_BSM + residual_BSM
            if spec.norm_after:
                norm = norms.attention if stage == "o" else norms.mlp
                assert norm is not None
                sum_BSM = norm(sum_BSM)
            after_BSM = state.hidden_BSM
            if stage == "o" and spec.residual != "sequential":
                # The sum is made at the end of the layer, with the feed-forward part.
                assert state.attention_BSM is not None
                after_BSM = after_BSM + state.attention_BSM
            torch.testing.assert_close(sum_BSM, after_BSM)


@pytest.mark.parametrize("name", ["llama-grouped_query", "gptneox-parallel", "bloom-residual_after_norm"])
def test_a_linear_that_makes_up_for_the_whole_drift_brings_the_streams_together(name: str, tmp_path: Path) -> None:
    """With the drift added to the output of a stage, the residual stream is that of full precision again."""
    here = place(name, tmp_path / "model")
    for stage in STAGE_NAMES[:3]:
        here.advance(stage)
    literal = literal_drifts(here, "down")
    (linear,) = here.layers[0].spec.stage("down").linears
    for (stream, reference), (_, (drift_BSM,)) in zip(
        zip(*(stream.batches for stream in here.streams), strict=True), literal, strict=True
    ):
        layer, context = here.layers[0], here.streams[0].context
        inputs_BSI = layer.stage_input("down", stream.state, context)
        corrected = layer.copy()
        output_BSM = layer.linears[linear](inputs_BSI) + drift_BSM
        corrected.linears[linear] = lambda inputs, output_BSM=output_BSM: output_BSM
        found = corrected.advance("down", stream.state, context)
        wanted = layer.advance("down", reference.state, context)
        torch.testing.assert_close(found.hidden_BSM, wanted.hidden_BSM)


def test_inputs_that_are_dear_are_kept_for_both_streams(tmp_path: Path) -> None:
    here = place("llama-grouped_query", tmp_path / "model")
    for stage in STAGE_NAMES:
        moment = InputMoment(38 if stage == "down" else 24, dtype=torch.float64)
        measure_stage(here.streams, here.layers, stage, moment, reads="linear", of_output=True)
        for stream in here.streams:
            assert all((batch.kept_input_BSI is not None) == (stage == "down") for batch in stream.batches)
        here.advance(stage)
        assert all(batch.kept_input_BSI is None for stream in here.streams for batch in stream.batches)


def test_streams_that_agree_have_no_drift(tmp_path: Path) -> None:
    here = place("llama-grouped_query", tmp_path / "model", num_held_out=0)
    same = Place((here.streams[1], here.streams[1]), here.layers)
    for stage in STAGE_NAMES:
        moment = InputMoment(38 if stage == "down" else 24, dtype=torch.float64)
        drift = measure_stage(same.streams, same.layers, stage, moment, reads="linear", of_output=True).drift
        assert drift is not None
        assert not drift.sum_XI.any()
        assert drift.held_out == []
        assert drift.num_tokens == sum(LENGTHS)
        here.streams[1].advance(here.layers[1], stage)


def test_a_value_that_is_not_finite_names_its_window(tmp_path: Path) -> None:
    here = place("llama-grouped_query", tmp_path / "model")
    # The second batch holds the fourth window alone.
    here.streams[0].batches[1].state.hidden_BSM[0, 2, 1] = float("nan")
    moment = InputMoment(24, dtype=torch.float64)
    with pytest.raises(NumericalError) as caught:
        measure_stage(here.streams, here.layers, "qkv", moment, reads="layers.1.q", of_output=True)
    assert caught.value.where == "input of layers.1.q, calibration window 3"
