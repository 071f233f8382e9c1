"""Drift against loops over tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.calibration.statistics import Drift, output_drift

OUTPUTS, INPUTS = 5, 7


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def empty(of_output: bool) -> Drift:
    rows = OUTPUTS if of_output else INPUTS
    return Drift(of_output=of_output, sum_XI=torch.zeros(rows, INPUTS, dtype=torch.float64))


def tokens(num_tokens: int, of_output: bool, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs `[T, I]` and their drift, of outputs `[T, O]` or of inputs `[T, I]`, which depends on them."""
    inputs_TI = random(num_tokens, INPUTS, seed=seed)
    mixing_IX = random(INPUTS, OUTPUTS if of_output else INPUTS, seed=99)
    drift_TX = 0.1 * inputs_TI @ mixing_IX + 0.1 * random(num_tokens, mixing_IX.shape[1], seed=seed + 50)
    return inputs_TI, drift_TX


def literal_gap(weight_OI: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor], of_output: bool) -> torch.Tensor:
    """Return the mean of (drift of the output) (input)^T, one token and one entry after the other."""
    gap_OI = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for input_I, drift_X in zip(*pairs, strict=True):
        drift_O = drift_X if of_output else weight_OI @ drift_X
        for output in range(OUTPUTS):
            for column in range(INPUTS):
                gap_OI[output, column] += drift_O[output] * input_I[column]
    return gap_OI / len(pairs[0])


def literal_error(
    weight_OI: torch.Tensor,
    direction_OI: torch.Tensor,
    strength: float,
    pairs: tuple[torch.Tensor, torch.Tensor],
    of_output: bool,
) -> float:
    """Return the squared distance between shifted output and wanted output, token by token."""
    error = 0.0
    for input_I, drift_X in zip(*pairs, strict=True):
        drift_O = drift_X if of_output else weight_OI @ drift_X
        error += float((strength * direction_OI @ input_I - drift_O).square().sum())
    return error


@pytest.mark.parametrize("of_output", [True, False])
@pytest.mark.parametrize("batches", [(11,), (3, 8), (1, 1, 9)])
def test_the_gap_is_that_of_single_tokens(of_output: bool, batches: tuple[int, ...]) -> None:
    weight_OI, pairs, drift = random(OUTPUTS, INPUTS), tokens(11, of_output), empty(of_output)
    for inputs_TI, drift_TX in zip(*(values.split(batches) for values in pairs), strict=True):
        drift.add(inputs_TI, drift_TX)
    assert drift.num_tokens == 11
    torch.testing.assert_close(drift.gap(weight_OI), literal_gap(weight_OI, pairs, of_output))


def test_many_tokens_at_once_are_all_counted() -> None:
    inputs_TI, drift_TX = tokens(20_001, True)
    drift = empty(True)
    drift.add(inputs_TI, drift_TX)
    torch.testing.assert_close(drift.gap(random(OUTPUTS, INPUTS)), drift_TX.T @ inputs_TI / 20_001)


def test_without_tokens_there_is_no_gap() -> None:
    assert torch.equal(empty(True).gap(random(OUTPUTS, INPUTS)), torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("of_output", [True, False])
def test_parts_merge_to_the_whole(of_output: bool) -> None:
    inputs_TI, drift_TX = tokens(12, of_output)
    whole, first, second = empty(of_output), empty(of_output), empty(of_output)
    whole.add(inputs_TI, drift_TX)
    first.add(inputs_TI[:5], drift_TX[:5])
    second.add(inputs_TI[5:], drift_TX[5:])
    held = [tokens(3, of_output, seed=seed) for seed in (7, 8)]
    first.held_out.append(held[0])
    second.held_out.append(held[1])
    whole.held_out += held
    first.merge(second)
    assert first.num_tokens == whole.num_tokens == 12
    weight_OI, direction_OI = random(OUTPUTS, INPUTS), 0.1 * random(OUTPUTS, INPUTS, seed=3)
    torch.testing.assert_close(first.gap(weight_OI), whole.gap(weight_OI))
    assert first.strength(weight_OI, direction_OI) == whole.strength(weight_OI, direction_OI)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), of_output=st.booleans(), size=st.sampled_from([0.05, 0.3, 2.0]))
def test_no_other_strength_is_better_on_the_windows_held_out(seed: int, of_output: bool, size: float) -> None:
    weight_OI = random(OUTPUTS, INPUTS, seed=seed)
    pairs = tokens(9, of_output, seed=seed)
    drift = empty(of_output)
    # Two windows of different lengths.
    drift.held_out += [(pairs[0][:4], pairs[1][:4]), (pairs[0][4:], pairs[1][4:])]
    direction_OI = size * (literal_gap(weight_OI, pairs, of_output) + 0.1 * random(OUTPUTS, INPUTS, seed=seed + 1))
    strength = drift.strength(weight_OI, direction_OI)
    assert 0 <= strength <= 1
    least = literal_error(weight_OI, direction_OI, strength, pairs, of_output)
    for other in (0.0, 0.25, 0.5, 0.75, 1.0, strength + 1e-3, strength - 1e-3):
        if 0 <= other <= 1:
            assert least <= literal_error(weight_OI, direction_OI, other, pairs, of_output) * (1 + 1e-12)


def test_a_strength_inside_the_range_is_the_ratio_of_the_formula() -> None:
    """`<S x, drift> / |S x|^2`, entry by entry."""
    weight_OI, pairs = random(OUTPUTS, INPUTS), tokens(9, True)
    direction_OI = 2 * literal_gap(weight_OI, pairs, True)
    along = energy = 0.0
    for input_I, drift_O in zip(*pairs, strict=True):
        for output in range(OUTPUTS):
            step = sum(float(direction_OI[output, column] * input_I[column]) for column in range(INPUTS))
            along += step * float(drift_O[output])
            energy += step * step
    drift = empty(True)
    drift.held_out.append(pairs)
    assert 0 < along / energy < 1
    assert drift.strength(weight_OI, direction_OI) == pytest.approx(along / energy, rel=1e-12)


def test_strengths_at_the_ends() -> None:
    weight_OI, pairs = random(OUTPUTS, INPUTS), tokens(9, True)
    gap_OI = literal_gap(weight_OI, pairs, True)
    drift = empty(True)
    assert drift.strength(weight_OI, gap_OI) == 0.0
    drift.held_out.append(pairs)
    assert drift.strength(weight_OI, -gap_OI) == 0.0
    assert drift.strength(weight_OI, 1e-6 * gap_OI) == 1.0
    assert drift.strength(weight_OI, torch.zeros_like(gap_OI)) == 0.0


def test_the_drift_of_an_output_counts_inputs_and_residuals() -> None:
    weight_OI = random(OUTPUTS, INPUTS)
    inputs_BSI, reference_BSI = random(2, 3, INPUTS, seed=1), random(2, 3, INPUTS, seed=2)
    found_BSO, wanted_BSO = random(2, 3, OUTPUTS, seed=3), random(2, 3, OUTPUTS, seed=4)
    alone = output_drift(weight_OI, inputs_BSI, reference_BSI, None)
    both = output_drift(weight_OI, inputs_BSI, reference_BSI, (found_BSO, wanted_BSO))
    assert alone.dtype == both.dtype == torch.float32
    for window in range(2):
        for position in range(3):
            place = window, position
            of_inputs_O = weight_OI @ reference_BSI[place] - weight_OI @ inputs_BSI[place]
            whole_O = of_inputs_O + wanted_BSO[place] - found_BSO[place]
            torch.testing.assert_close(alone[place], of_inputs_O.float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(both[place], whole_O.float(), rtol=1e-4, atol=1e-5)
