"""Rounding to codes: bounds, borders, what is not finite, and the choice of a range; nearest rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.kv_cache.codec import Codes, SideCodec, decode, encode
from optgptq.kv_cache.scheme import CODE_BITS, Axis, SideScheme
from optgptq.kv_cache.setup import SideParameters

CPU = torch.device("cpu")


def codec_of(
    bits: int, group_size: int, *, axis: Axis = "channel", ranges: list[list[float]] | None = None
) -> SideCodec:
    scheme = SideScheme(bits=bits, group_size=group_size, axis=axis)
    ranges_C2 = None if ranges is None else torch.tensor(ranges)
    return SideCodec.of(scheme, SideParameters(ranges_C2=ranges_C2), CPU)


def both(x_TKD: torch.Tensor, codec: SideCodec) -> tuple[Codes, torch.Tensor]:
    codes = encode(x_TKD, codec)
    return codes, decode(codes, codec.scheme)


def literal_group(numbers: list[float], bits: int) -> tuple[list[int], float, float]:
    """Return codes, scale and minimum of one group: float16 ends first, then codes; Python rounds halves to even."""
    low, high = min(numbers), max(numbers)
    scale = float(torch.tensor((high - low) / (2**bits - 1), dtype=torch.float64).float().half())
    minimum = float(torch.tensor(low).half())
    if scale == 0:
        return [0] * len(numbers), scale, minimum
    return [min(max(round((number - minimum) / scale), 0), 2**bits - 1) for number in numbers], scale, minimum


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("group_size", [8, 24])
def test_codes_by_definition(bits: int, group_size: int) -> None:
    x_TKD = torch.randn(7, 3, 24, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    codes, decoded_TKD = both(x_TKD, codec_of(bits, group_size))
    assert (codes.code_TKD.dtype, codes.scale_TKG.dtype, codes.minimum_TKG.dtype) == (
        torch.uint8,
        torch.float16,
        torch.float16,
    )
    for token, head, group in torch.cartesian_prod(torch.arange(7), torch.arange(3), torch.arange(24 // group_size)):
        part = slice(int(group) * group_size, (int(group) + 1) * group_size)
        expected, scale, minimum = literal_group(x_TKD[token, head, part].tolist(), bits)
        assert codes.code_TKD[token, head, part].tolist() == expected
        assert (codes.scale_TKG[token, head, group], codes.minimum_TKG[token, head, group]) == (scale, minimum)
        torch.testing.assert_close(decoded_TKD[token, head, part], torch.tensor(expected) * scale + minimum)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_groups_along_tokens_are_groups_of_the_transposed(bits: int) -> None:
    x_TKD = torch.randn(24, 2, 16, generator=torch.Generator().manual_seed(1))
    codes, decoded_TKD = both(x_TKD, codec_of(bits, 8, axis="token"))
    turned, expected_DKT = both(x_TKD.permute(2, 1, 0).contiguous(), codec_of(bits, 8))
    assert torch.equal(codes.code_TKD, turned.code_TKD.permute(2, 1, 0))
    assert torch.equal(codes.scale_TKG, turned.scale_TKG.permute(2, 1, 0))
    assert torch.equal(decoded_TKD, expected_DKT.permute(2, 1, 0))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(CODE_BITS),
    numbers=st.lists(st.floats(-60000, 60000, width=32), min_size=8, max_size=8),
)
def test_errors_are_at_most_half_a_step(bits: int, numbers: list[float]) -> None:
    x_TKD = torch.tensor(numbers).view(1, 1, 8)
    codes, decoded_TKD = both(x_TKD, codec_of(bits, 8))
    scale, minimum, limit = float(codes.scale_TKG), float(codes.minimum_TKG), 2**bits - 1
    # The ends, as float16: half a unit in their last place, absolutely below the normal numbers.
    ends = (abs(minimum) + limit * scale) * 2**-11 + (1 + limit) * 2**-25
    rounding = (abs(minimum) + limit * scale) * 2**-22
    assert float((decoded_TKD - x_TKD).abs().max()) <= scale / 2 + ends + rounding
    assert int(codes.code_TKD.max()) <= limit


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -1024.0, 65504.0])
def test_a_constant_group_is_exact_with_codes_0(bits: int, value: float) -> None:
    codes, decoded_TKD = both(torch.full((2, 1, 8), value), codec_of(bits, 8))
    assert not codes.code_TKD.any()
    assert torch.equal(decoded_TKD, torch.full((2, 1, 8), value))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_groups_of_one_sign_use_all_codes(bits: int, shift: float) -> None:
    x_TKD = shift + torch.linspace(-4, 4, 16).view(1, 1, 16)
    codes, _ = both(x_TKD, codec_of(bits, 16))
    assert (int(codes.code_TKD.min()), int(codes.code_TKD.max())) == (0, 2**bits - 1)


def test_one_large_number_takes_the_range() -> None:
    x_TKD = torch.linspace(-1, 1, 16).view(1, 1, 16).clone()
    x_TKD[0, 0, 3] = 1e4
    codes, decoded_TKD = both(x_TKD, codec_of(4, 16))
    assert codes.code_TKD.flatten().tolist() == [15 if place == 3 else 0 for place in range(16)]
    assert abs(float(decoded_TKD[0, 0, 3]) - 1e4) <= 1e4 * 2**-10


def test_the_smallest_numbers() -> None:
    # Below float16 altogether: zero. A range below it: the minimum.
    assert not both(torch.full((1, 1, 8), 1e-9), codec_of(4, 8))[1].any()
    x_TKD = torch.tensor([1.0, 1.0 + 2**-23] * 4).view(1, 1, 8)
    codes, decoded_TKD = both(x_TKD, codec_of(4, 8))
    assert not codes.code_TKD.any()
    assert torch.equal(decoded_TKD, torch.ones(1, 1, 8))
    # Subnormal scale: still within half a step of what float16 holds.
    x_TKD = torch.linspace(0, 15 * 2.0**-24, 16).view(1, 1, 16)
    assert torch.equal(both(x_TKD, codec_of(4, 16))[1], x_TKD)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_what_is_not_finite_is_seen_and_stays_in_its_group(bits: int, bad: float) -> None:
    x_TKD = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    clean = encode(x_TKD, codec_of(bits, 8))
    x_TKD[1, 0, 9] = bad
    codes, decoded_TKD = both(x_TKD, codec_of(bits, 8))
    assert not codes.code_TKD[1, 0, 8:].any()
    assert bool(codes.minimum_TKG[1, 0, 1].isnan())
    is_bad = torch.zeros(3, 2, 16, dtype=torch.bool)
    is_bad[1, 0, 8:] = True
    assert torch.equal(decoded_TKD.isnan(), is_bad)
    assert torch.equal(codes.code_TKD[~is_bad], clean.code_TKD[~is_bad])


def test_numbers_beyond_float16_count_as_its_largest() -> None:
    x_TKD = torch.tensor([1e9, -1e9, 0.0, 1.0] * 2).view(1, 1, 8)
    codes, decoded_TKD = both(x_TKD, codec_of(8, 8))
    assert torch.equal(codes.code_TKD, encode(x_TKD.clamp(-65504, 65504), codec_of(8, 8)).code_TKD)
    assert bool(decoded_TKD.isfinite().all())


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(CODE_BITS), seed=st.integers(0, 10_000), spread=st.floats(0.01, 100))
def test_what_codes_stand_for_has_the_same_codes(bits: int, seed: int, spread: float) -> None:
    x_TKD = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(seed)) * spread
    codes, decoded_TKD = both(x_TKD, codec_of(bits, 16))
    # Both ends of the range must be taken, else the range of what is decoded is another.
    whole = (codes.code_TKD.amin(-1) == 0) & (codes.code_TKD.amax(-1) == 2**bits - 1)
    again = encode(decoded_TKD, codec_of(bits, 16))
    assert torch.equal(again.code_TKD[whole], codes.code_TKD[whole])
    assert torch.equal(again.scale_TKG[whole], codes.scale_TKG[whole])


@pytest.mark.parametrize("bits", CODE_BITS)
def test_of_several_ranges_the_best_is_taken(bits: int) -> None:
    x_TKD = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(4)) ** 3
    ranges = [[1.0, 1.0], [0.8, 0.8], [0.6, 0.9], [1.0, 0.5]]

    def losses(rows: list[list[float]]) -> torch.Tensor:
        return (both(x_TKD, codec_of(bits, 16, ranges=rows))[1] - x_TKD).square().view(50, 2, 2, 16).sum(-1)

    alone = torch.stack([losses([row]) for row in ranges]).amin(0)
    torch.testing.assert_close(losses(ranges), alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses([[1.0, 1.0]]), losses([[1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("group_size", [8, 24])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_products_need_no_numbers(bits: int, group_size: int) -> None:
    """Scores and outputs from codes, then scale and minimum of each group: what kernels compute."""
    generator = torch.Generator().manual_seed(bits)
    x_TKD = torch.randn(40, 1, 24, generator=generator)
    codes, decoded_TKD = both(x_TKD, codec_of(bits, group_size))
    decoded_TD = decoded_TKD[:, 0].double()
    code_TGL = codes.code_TKD[:, 0].double().view(40, -1, group_size)
    scale_TG, minimum_TG = codes.scale_TKG[:, 0].double(), codes.minimum_TKG[:, 0].double()
    query_D, weight_T = torch.randn(24, generator=generator).double(), torch.rand(40, generator=generator).double()
    query_GL = query_D.view(-1, group_size)
    scores_T = ((code_TGL * query_GL).sum(-1) * scale_TG + query_GL.sum(-1) * minimum_TG).sum(-1)
    output_GL = ((weight_T[:, None] * scale_TG)[..., None] * code_TGL).sum(0)
    output_GL = output_GL + (weight_T @ minimum_TG)[:, None]
    # Decoding rounds each number to float32.
    torch.testing.assert_close(scores_T, decoded_TD @ query_D, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(output_GL.flatten(), weight_T @ decoded_TD, rtol=1e-6, atol=2e-6)
