"""The target shift: its identities, what it minimises, and what it does where the moment is poor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import problem, random_weight

from optgptq.errors import NumericalError
from optgptq.solvers import gptq
from optgptq.solvers.target_shift import shift_direction, shifted_target

ROWS, COLUMNS, TOKENS = 5, 13, 400


def streams(seed: int = 0, *, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of the quantized and of the full-precision stream, float64 `[I, T]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    full_IT = mixing_II @ torch.randn(COLUMNS, TOKENS, generator=generator, dtype=torch.float64)
    return full_IT + noise * mixing_II.T @ torch.randn(
        COLUMNS, TOKENS, generator=generator, dtype=torch.float64
    ), full_IT


def moments(quantized_IT: torch.Tensor, full_IT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens = quantized_IT.shape[1]
    return quantized_IT @ quantized_IT.T / num_tokens, (full_IT - quantized_IT) @ quantized_IT.T / num_tokens


@given(seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_loss_of_two_streams_is_that_of_one_with_the_shifted_target(seed: int) -> None:
    """`|G(Q x - W y)|^2 = |G(Q - V) x|^2 + const`, whatever `Q` and `G`."""
    quantized_IT, full_IT = streams(seed)
    generator = torch.Generator().manual_seed(seed)
    weight_OI = random_weight(ROWS, COLUMNS, seed=seed)
    target_OI = shifted_target(weight_OI, *moments(quantized_IT, full_IT), alpha=1.0, damp_ratio=0.0)
    mixing_OO = torch.randn(ROWS, ROWS, generator=generator, dtype=torch.float64)
    constants = []
    for _ in range(3):
        candidate_OI = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        of_two = (mixing_OO @ (candidate_OI @ quantized_IT - weight_OI @ full_IT)).square().sum()
        of_one = (mixing_OO @ (candidate_OI - target_OI) @ quantized_IT).square().sum()
        constants.append(of_two - of_one)
    torch.testing.assert_close(constants[1], constants[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(constants[2], constants[0], rtol=1e-8, atol=0)


def test_the_formula_with_damping() -> None:
    moment_II, cross_II = moments(*streams())
    weight_OI = random_weight(ROWS, COLUMNS)
    damped_II = moment_II + 0.05 * moment_II.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    expected_OI = weight_OI @ (torch.eye(COLUMNS, dtype=torch.float64) + 0.5 * cross_II @ torch.linalg.inv(damped_II))
    shifted_OI = shifted_target(weight_OI, moment_II, cross_II, alpha=0.5, damp_ratio=0.05)
    torch.testing.assert_close(shifted_OI, expected_OI)
    single_OI = shifted_target(weight_OI.float(), moment_II.float(), cross_II.float(), alpha=0.5, damp_ratio=0.05)
    assert single_OI.dtype == torch.float32
    torch.testing.assert_close(single_OI.double(), expected_OI, rtol=1e-4, atol=1e-4)


def test_streams_that_agree_leave_the_weight() -> None:
    moment_II, _ = moments(*streams())
    weight_OI = random_weight(ROWS, COLUMNS)
    shifted_OI = shifted_target(weight_OI, moment_II, torch.zeros_like(moment_II), alpha=1.0, damp_ratio=0.01)
    assert torch.equal(shifted_OI, weight_OI)


@pytest.mark.parametrize("factor", [0.5, 1.25, -2.0])
def test_a_stream_that_is_only_scaled_is_scaled_back(factor: float) -> None:
    _, full_IT = streams()
    weight_OI = random_weight(ROWS, COLUMNS)
    shifted_OI = shifted_target(weight_OI, *moments(factor * full_IT, full_IT), alpha=1.0, damp_ratio=0.0)
    torch.testing.assert_close(shifted_OI, weight_OI / factor)


def test_the_shift_is_linear_in_alpha() -> None:
    moment_II, cross_II = moments(*streams())
    weight_OI = random_weight(ROWS, COLUMNS)
    none_OI, half_OI, whole_OI = (
        shifted_target(weight_OI, moment_II, cross_II, alpha=alpha, damp_ratio=0.01) for alpha in (0.0, 0.5, 1.0)
    )
    assert torch.equal(none_OI, weight_OI)
    torch.testing.assert_close(half_OI, (none_OI + whole_OI) / 2)
    direction_OI = shift_direction(weight_OI @ cross_II, moment_II, damp_ratio=0.01).direction_OI
    torch.testing.assert_close(whole_OI - none_OI, direction_OI)


def test_with_many_bits_the_solution_is_the_shifted_target() -> None:
    quantized_IT, full_IT = streams()
    moment_II, cross_II = moments(quantized_IT, full_IT)
    weight_OI = random_weight(ROWS, COLUMNS)
    target_OI = shifted_target(weight_OI, moment_II, cross_II, alpha=1.0, damp_ratio=0.0)

    def output_error(solved_OI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        solution = gptq.solve(problem(solved_OI, moment_II, bits=bits, damp_ratio=1e-6)).weight.dequantize(
            torch.float64
        )
        return solution, (solution @ quantized_IT - weight_OI @ full_IT).square().sum()

    fine_OI, fine = output_error(target_OI, 8)
    step_O = 2 * target_OI.abs().amax(dim=1) / 255
    assert float(((fine_OI - target_OI).abs() / step_O[:, None]).median()) < 1
    least = (target_OI @ quantized_IT - weight_OI @ full_IT).square().sum()
    assert float(fine) < 1.05 * float(least)
    for bits in (2, 3, 4, 8):
        assert float(output_error(target_OI, bits)[1]) < float(output_error(weight_OI, bits)[1])


def test_inputs_that_were_not_seen_do_not_change() -> None:
    quantized_IT, full_IT = streams()
    quantized_IT[3] = 0
    moment_II, cross_II = moments(quantized_IT, full_IT)
    weight_OI = random_weight(ROWS, COLUMNS)
    shift = shift_direction(weight_OI @ cross_II, moment_II, damp_ratio=0.01)
    assert torch.equal(shift.direction_OI[:, 3], torch.zeros(ROWS, dtype=torch.float64))
    assert float(shift.direction_OI.abs().sum()) > 0
    assert shift.notes == ()


def test_raised_damping_is_told() -> None:
    direction_I = torch.ones(COLUMNS, dtype=torch.float64)
    direction_I[0] = -1
    moment_II = torch.outer(direction_I, direction_I)
    moment_II.diagonal()[1:] -= 1e-3
    shift = shift_direction(torch.ones(ROWS, COLUMNS, dtype=torch.float64), moment_II, damp_ratio=0.0)
    assert shift.damp_ratio_used == 0.01
    assert shift.notes == (
        "damping was raised from 0 to 0.01 of the mean diagonal, because the input moment could not be factored",
    )


def test_a_moment_that_is_not_finite_is_refused() -> None:
    moment_II, cross_II = moments(*streams())
    moment_II[1, 1] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.3\.up: input moment"):
        shift_direction(cross_II, moment_II, damp_ratio=0.01, name="layers.3.up")
