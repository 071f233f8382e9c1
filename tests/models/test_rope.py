"""Rotary tables against complex numbers in float64, and the rotation in place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.models.rope import inverse_frequencies, rope_table, rotate_in_place
from optgptq.models.spec import RopeSpec


@settings(max_examples=30, deadline=None)
@given(num_pairs=st.integers(1, 5), unrotated=st.integers(0, 3), start=st.integers(0, 50), theta=st.floats(10.0, 1e6))
def test_rotation_is_a_complex_product(num_pairs: int, unrotated: int, start: int, theta: float) -> None:
    rope = RopeSpec(kind="default", theta=theta, rotary_dim=2 * num_pairs)
    positions = torch.arange(start, start + 6)
    heads = torch.randn(2, 6, 3, 2 * num_pairs + unrotated, generator=torch.Generator().manual_seed(start))
    expected = heads.double().clone()
    for pair in range(num_pairs):
        angle = positions.double() * theta ** (-pair / num_pairs)
        turned = torch.complex(expected[..., pair], expected[..., pair + num_pairs]) * torch.polar(
            torch.ones_like(angle), angle
        ).unsqueeze(-1)
        expected[..., pair], expected[..., pair + num_pairs] = turned.real, turned.imag
    rotate_in_place(heads, rope_table(rope, positions, dtype=torch.float32))
    torch.testing.assert_close(heads.double(), expected, rtol=0, atol=5e-5)


def test_positions_may_differ_between_sequences() -> None:
    rope = RopeSpec(kind="default", theta=100.0, rotary_dim=4)
    heads = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    together = heads.clone()
    rotate_in_place(together, rope_table(rope, torch.tensor([[0, 1, 2], [7, 8, 9]]), dtype=torch.float32))
    for row, start in enumerate((0, 7)):
        alone = heads[row : row + 1].clone()
        rotate_in_place(alone, rope_table(rope, torch.arange(start, start + 3), dtype=torch.float32))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=0)


def test_dynamic_frequencies_change_only_beyond_the_promised_positions() -> None:
    rope = RopeSpec(kind="dynamic", theta=10_000.0, rotary_dim=8, factor=2.0, max_position=16)
    plain = inverse_frequencies(RopeSpec(kind="default", theta=10_000.0, rotary_dim=8), num_positions=1)
    torch.testing.assert_close(inverse_frequencies(rope, num_positions=16), plain)
    longer = inverse_frequencies(rope, num_positions=40)
    assert longer[0] == plain[0]
    assert bool((longer[1:] < plain[1:]).all())


def test_longrope_picks_factors_by_length() -> None:
    rope = RopeSpec(
        kind="longrope",
        theta=100.0,
        rotary_dim=4,
        original_max_position=8,
        attention_factor=1.25,
        short_factor=(1.0, 2.0),
        long_factor=(4.0, 8.0),
    )
    torch.testing.assert_close(inverse_frequencies(rope, num_positions=8), torch.tensor([1.0, 0.05]))
    torch.testing.assert_close(inverse_frequencies(rope, num_positions=9), torch.tensor([0.25, 0.0125]))
    assert float(rope_table(rope, torch.tensor([0]), dtype=torch.float32).cosine[0, 0, 0]) == 1.25
