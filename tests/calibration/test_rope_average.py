"""The closed-form mean over positions against rotation matrices written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_layers import literal_rotation

from optgptq.calibration.rope_average import average_over_positions
from optgptq.models.spec import RopeSpec

DEFAULT = RopeSpec(kind="default", theta=100.0, rotary_dim=8)
ROPES = {
    "default": DEFAULT,
    "partial": replace(DEFAULT, rotary_dim=4),
    "one_pair": replace(DEFAULT, rotary_dim=2),
    "linear": replace(DEFAULT, kind="linear", factor=4.0),
    "dynamic": replace(DEFAULT, kind="dynamic", factor=3.0, max_position=9),
    "llama3": replace(
        DEFAULT, kind="llama3", factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position=32
    ),
    "yarn": replace(DEFAULT, kind="yarn", factor=4.0, original_max_position=64, attention_factor=1.14),
    "yarn_partial": replace(
        DEFAULT, kind="yarn", rotary_dim=6, factor=4.0, original_max_position=64, attention_factor=0.7
    ),
    "longrope_short": replace(
        DEFAULT,
        kind="longrope",
        short_factor=(1.0, 1.1, 1.3, 2.0),
        long_factor=(1.5, 2.0, 4.0, 8.0),
        original_max_position=64,
        attention_factor=1.2,
    ),
    "longrope_long": replace(
        DEFAULT,
        kind="longrope",
        short_factor=(1.0, 1.1, 1.3, 2.0),
        long_factor=(1.5, 2.0, 4.0, 8.0),
        original_max_position=8,
    ),
}


def random_moment(num_heads: int, head_dim: int, *, seed: int = 0, symmetric: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(num_heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    return root @ root.mT if symmetric else root


def literal_average(
    moment_KDD: torch.Tensor, rope: RopeSpec, num_positions: int, weight_S: torch.Tensor | None = None
) -> torch.Tensor:
    weight = torch.ones(num_positions, dtype=torch.float64) if weight_S is None else weight_S.double()
    total = torch.zeros_like(moment_KDD)
    for position in range(num_positions):
        matrix = literal_rotation(rope, position, num_positions=num_positions, head_dim=moment_KDD.shape[-1])
        total += weight[position] * (matrix.T @ moment_KDD @ matrix)
    return total / weight.sum()


@pytest.mark.parametrize("head_dim", [8, 11])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_mean_over_rotation_matrices(name: str, head_dim: int, symmetric: bool) -> None:
    moment_KDD = random_moment(3, head_dim, symmetric=symmetric)
    found = average_over_positions(moment_KDD, ROPES[name], 13)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, literal_average(moment_KDD, ROPES[name], 13), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    num_pairs=st.integers(1, 4),
    unrotated=st.integers(0, 3),
    num_positions=st.integers(1, 12),
    theta=st.floats(2.0, 1e6),
    seed=st.integers(0, 1000),
)
def test_keeps_trace_symmetry_and_sign(
    num_pairs: int, unrotated: int, num_positions: int, theta: float, seed: int
) -> None:
    rope = RopeSpec(kind="default", theta=theta, rotary_dim=2 * num_pairs)
    moment_KDD = random_moment(2, 2 * num_pairs + unrotated, seed=seed)
    found = average_over_positions(moment_KDD, rope, num_positions)
    torch.testing.assert_close(found, found.mT, rtol=1e-10, atol=1e-10)
    trace, expected = (each.diagonal(dim1=1, dim2=2).sum(dim=1) for each in (found, moment_KDD))
    # Cosines and sines of the table are rounded to float32.
    torch.testing.assert_close(trace, expected, rtol=1e-6, atol=1e-6)
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-9 * float(expected.max())


def test_weights_of_positions_are_counts_of_tokens() -> None:
    moment_KDD = random_moment(2, 10)
    weight_S = torch.tensor([3, 3, 0, 2, 1, 0, 0])
    found = average_over_positions(moment_KDD, DEFAULT, 7, weight_KS=weight_S)
    torch.testing.assert_close(found, literal_average(moment_KDD, DEFAULT, 7, weight_S), rtol=1e-6, atol=1e-6)
    per_head = average_over_positions(moment_KDD, DEFAULT, 7, weight_KS=torch.stack([weight_S, weight_S.flip(0)]))
    assert torch.equal(per_head[0], found[0])
    flipped = literal_average(moment_KDD[1:], DEFAULT, 7, weight_S.flip(0))
    torch.testing.assert_close(per_head[1:], flipped, rtol=1e-6, atol=1e-6)


def test_weights_of_nothing_give_zero() -> None:
    moment_KDD = random_moment(1, 8)
    found = average_over_positions(moment_KDD, DEFAULT, 3, weight_KS=torch.zeros(3))
    assert torch.equal(found, torch.zeros_like(found))


def test_the_interleaved_layout_is_a_permutation_away() -> None:
    """Features `2 i` and `2 i + 1` form a pair: permuted to halves, averaged and permuted back."""
    moment_KDD = random_moment(2, 8)
    frequencies = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.zeros_like(moment_KDD)
    for position in range(9):
        matrix = torch.zeros(8, 8, dtype=torch.float64)
        for pair, angle in enumerate(position * frequencies):
            block = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
            matrix[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = block
        expected += matrix.T @ moment_KDD @ matrix / 9
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = average_over_positions(moment_KDD[:, order][:, :, order], DEFAULT, 9)
    back = torch.argsort(order)
    torch.testing.assert_close(halves[:, back][:, :, back], expected, rtol=1e-6, atol=1e-6)


def test_the_input_is_left_as_it_is_and_float32_is_taken() -> None:
    moment_KDD = random_moment(1, 8).float()
    before = moment_KDD.clone()
    found = average_over_positions(moment_KDD, DEFAULT, 5)
    assert torch.equal(moment_KDD, before)
    assert found.dtype == torch.float64
