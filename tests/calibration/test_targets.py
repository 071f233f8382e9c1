"""Shifted targets: what they gain on tokens that nobody measured, and that all ways to them lead to the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.calibration.statistics import Drift
from optgptq.calibration.targets import ShiftSettings, Target, shifted_by_moments, shifted_targets

OUTPUTS, INPUTS = 6, 9
HELD_OUT = ShiftSettings()


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(num_tokens: int, seed: int, *, drift: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs `[T, I]` of the quantized stream, and of the full-precision one.

    What is between them depends on the input, as errors of earlier layers do, and has a part that does not.
    """
    mixing_II, error_II = random(INPUTS, INPUTS, seed=1), random(INPUTS, INPUTS, seed=2)
    reference_TI = random(num_tokens, INPUTS, seed=seed) @ mixing_II
    noise_TI = random(num_tokens, INPUTS, seed=seed + 10_000)
    return reference_TI + drift * (0.3 * reference_TI @ error_II + noise_TI), reference_TI


def measured(train: tuple[torch.Tensor, torch.Tensor], held: tuple[torch.Tensor, torch.Tensor]) -> Drift:
    drift = Drift(of_output=False, sum_XI=torch.zeros(INPUTS, INPUTS, dtype=torch.float64))
    drift.add(train[0], train[1] - train[0])
    drift.held_out.append((held[0], held[1] - held[0]))
    return drift


def moment(inputs_TI: torch.Tensor) -> torch.Tensor:
    return inputs_TI.T @ inputs_TI / len(inputs_TI)


def objective(target_OI: torch.Tensor, weight_OI: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the mean over tokens of `|V x - W x'|^2`."""
    return float((pair[0] @ target_OI.T - pair[1] @ weight_OI.T).square().sum()) / len(pair[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), num_tokens=st.sampled_from([12, 40, 400]))
def test_the_objective_never_rises_on_the_tokens_held_out(seed: int, num_tokens: int) -> None:
    """However few tokens the shift was measured on."""
    weight_OI, train, held = random(OUTPUTS, INPUTS, seed=seed), streams(num_tokens, seed), streams(30, seed + 1)
    drift = measured(train, held)
    target = shifted_targets({"linear": weight_OI}, moment(train[0]), drift, HELD_OUT)["linear"]
    assert target.shift_strength is not None
    assert 0 <= target.shift_strength <= 1
    assert objective(target.weight_OI, weight_OI, held) <= objective(weight_OI, weight_OI, held) * (1 + 1e-12)


@pytest.mark.parametrize("of_output", [True, False])
def test_the_objective_falls_on_tokens_that_nothing_was_chosen_on(of_output: bool) -> None:
    weight_OI = random(OUTPUTS, INPUTS, seed=5)
    train, held, other = (streams(500, seed) for seed in (11, 12, 13))
    drift = measured(train, held)
    if of_output:
        drift = Drift(of_output=True, sum_XI=torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64))
        drift.add(train[0], (train[1] - train[0]) @ weight_OI.T)
        drift.held_out.append((held[0], (held[1] - held[0]) @ weight_OI.T))
    target = shifted_targets({"linear": weight_OI}, moment(train[0]), drift, HELD_OUT)["linear"]
    assert target.shift_strength is not None
    assert target.shift_strength > 0.5
    assert objective(target.weight_OI, weight_OI, other) < 0.7 * objective(weight_OI, weight_OI, other)


def test_with_few_tokens_a_chosen_strength_is_better_than_the_whole_shift() -> None:
    gains = []
    for seed in range(20):
        weight_OI = random(OUTPUTS, INPUTS, seed=seed)
        train, held, other = (streams(14, 100 * seed + part, drift=1.0) for part in (1, 2, 3))
        drift = measured(train, held)
        chosen, whole = (
            shifted_targets({"linear": weight_OI}, moment(train[0]), drift, ShiftSettings(strength=strength))["linear"]
            for strength in (None, 1.0)
        )
        dense = objective(weight_OI, weight_OI, other)
        gains.append([objective(target.weight_OI, weight_OI, other) / dense for target in (chosen, whole)])
    chosen_mean, whole_mean = torch.tensor(gains).mean(dim=0).tolist()
    assert chosen_mean < min(whole_mean, 1.0)


def test_linears_that_read_the_same_input_are_shifted_as_each_alone() -> None:
    train, held = streams(60, 1), streams(20, 2)
    dense = {"first": random(OUTPUTS, INPUTS, seed=3), "second": random(2, INPUTS, seed=4)}
    moment_II, drift = moment(train[0]), measured(train, held)
    together = shifted_targets(dense, moment_II, drift, HELD_OUT)
    assert list(together) == list(dense)
    for name, weight_OI in dense.items():
        alone = shifted_targets({name: weight_OI}, moment_II, drift, HELD_OUT)[name]
        torch.testing.assert_close(together[name].weight_OI, alone.weight_OI, rtol=1e-12, atol=1e-12)
        assert together[name].shift_strength == pytest.approx(alone.shift_strength, rel=1e-9)


@pytest.mark.parametrize("strength", [None, 0.0, 0.4, 1.0])
def test_moments_of_the_drift_lead_to_the_target_of_its_tokens(strength: float | None) -> None:
    weight_OI, train, held = random(OUTPUTS, INPUTS, seed=3), streams(60, 1), streams(20, 2)
    chosen = ShiftSettings(strength=strength, damp_ratio=0.05)
    by_tokens = shifted_targets({"linear": weight_OI}, moment(train[0]), measured(train, held), chosen)["linear"]
    cross_II, held_cross_II = ((pair[1] - pair[0]).T @ pair[0] / len(pair[0]) for pair in (train, held))
    by_moments = shifted_by_moments(
        weight_OI, moment(train[0]), cross_II, chosen, held_out=(moment(held[0]), held_cross_II), name="linear"
    )
    torch.testing.assert_close(by_moments.weight_OI, by_tokens.weight_OI, rtol=1e-10, atol=1e-12)
    assert by_moments.shift_strength == pytest.approx(by_tokens.shift_strength, rel=1e-9)
    if strength is not None:
        assert by_moments.shift_strength == strength


def test_a_strength_cannot_be_chosen_on_nothing() -> None:
    moment_II = torch.eye(INPUTS, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs windows held out"):
        shifted_by_moments(random(2, INPUTS, seed=1), moment_II, moment_II, HELD_OUT, held_out=None, name="linear")
    # Nothing held out and nothing to choose: the dense weight.
    drift = Drift(of_output=False, sum_XI=moment_II.clone(), num_tokens=1)
    weight_OI = random(2, INPUTS, seed=1)
    target = shifted_targets({"linear": weight_OI}, moment_II, drift, HELD_OUT)["linear"]
    assert target.shift_strength == 0.0
    assert torch.equal(target.weight_OI, weight_OI)


def test_weights_come_back_in_the_dtype_of_the_moment() -> None:
    train, held = streams(60, 1), streams(20, 2)
    weight_OI = random(OUTPUTS, INPUTS, seed=3).to(torch.bfloat16)
    target = shifted_targets({"linear": weight_OI}, moment(train[0]).double(), measured(train, held), HELD_OUT)
    assert target["linear"].weight_OI.dtype == torch.float64
    assert Target(weight_OI).shift_strength is None
