"""The search for binary codes against trying every code at every scale.

The rule for what the histogram prices: where all gaps between neighbouring levels are odd, no whole number lies in the
middle of two levels, and the price is the cost. Elsewhere a weight whose whole number is such a middle is priced at the
lower level: the price is never below the cost, and above it by at most the gap for each such weight.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import random_weight
from support.slow_binary import SlowCode, slow_codes, slow_midpoint_excess, slow_places, slow_price

from optgptq.grids import binary_search
from optgptq.grids.binary_search import price_codes, price_shapes, search_codes
from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.codebook import codebook

FACTORS = (1.0, 0.85, 0.6, 1.2)


def prices(num_columns: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_columns, generator=generator, dtype=torch.float64) + 0.1


def columns(num_columns: int, num_rows: int, *, seed: int = 0) -> torch.Tensor:
    return random_weight(num_rows, num_columns, seed=seed).T.contiguous()


def code_of(bits: int, intermediate_bits: int, index: int) -> SlowCode:
    codes = codebook(bits, intermediate_bits)
    return SlowCode(int(codes.offset_C[index]), tuple(codes.steps_SP[codes.shape_C[index]].flip(0).tolist()))


@pytest.mark.parametrize(("bits", "intermediate_bits"), [(1, 3), (2, 3), (2, 4), (3, 4)])
@pytest.mark.parametrize("factor", FACTORS)
def test_the_price_of_every_code(bits: int, intermediate_bits: int, factor: float) -> None:
    columns_LO, price_L = columns(8, 3), prices(8)
    cost_OC, scale_O, zero_O = price_codes(columns_LO, price_L, codebook(bits, intermediate_bits), factor)
    num_exact = 0
    for row, weight_L in enumerate(columns_LO.T):
        scale, zero, places = slow_places(weight_L, factor, intermediate_bits)
        assert float(scale_O[row]) == pytest.approx(scale, rel=1e-12)
        assert float(zero_O[row]) == zero
        for index, price in enumerate(cost_OC[row].tolist()):
            code = code_of(bits, intermediate_bits, index)
            cost = slow_price(places, price_L, code.levels, scale)
            if code.is_exactly_priced():
                assert price == pytest.approx(cost, abs=1e-9)
                num_exact += 1
            excess = slow_midpoint_excess(places, price_L, code, scale)
            assert cost - 1e-9 <= price <= cost + excess + 1e-9
    assert num_exact > 0


@pytest.mark.parametrize(("bits", "intermediate_bits"), [(1, 4), (2, 4), (3, 4)])
def test_the_cheapest_code_against_trying_all(bits: int, intermediate_bits: int) -> None:
    columns_LO, price_L = columns(8, 6, seed=bits), prices(8, seed=bits)
    found = search_codes(columns_LO, price_L, codebook(bits, intermediate_bits), FACTORS)
    slow = slow_codes(bits, intermediate_bits)
    for row, weight_L in enumerate(columns_LO.T):
        costs, exact = [], []
        for factor in FACTORS:
            scale, _, places = slow_places(weight_L, factor, intermediate_bits)
            for code in slow:
                costs.append(slow_price(places, price_L, code.levels, scale))
                exact += [costs[-1]] * code.is_exactly_priced()
        assert min(costs) - 1e-9 <= float(found.cost_O[row]) <= min(exact) + 1e-9
        scale, zero = float(found.scale_O[row]), float(found.zero_O[row])
        places = [weight / scale + zero for weight in weight_L.tolist()]
        own = slow_price(places, price_L, code_of(bits, intermediate_bits, int(found.index_O[row])).levels, scale)
        assert own <= float(found.cost_O[row]) + 1e-9


@pytest.mark.parametrize(("bits", "intermediate_bits"), [(2, 4), (2, 5), (3, 4), (3, 5)])
def test_a_uniform_grid_at_the_same_scales_is_never_cheaper(bits: int, intermediate_bits: int) -> None:
    """At odd steps never; at even steps never by more than what the histogram may be off for that grid."""
    columns_LO, price_L = columns(37, 5, seed=bits), prices(37)
    factors = BinarySettings().factors
    found = search_codes(columns_LO, price_L, codebook(bits, intermediate_bits), factors)
    largest, num_steps = 2**intermediate_bits - 1, 2**bits - 1
    for row, weight_L in enumerate(columns_LO.T):
        for factor in factors[::4]:
            scale, _, places = slow_places(weight_L, factor, intermediate_bits)
            for step in range(1, largest // num_steps + 1):
                steps = tuple(step * 2**plane for plane in range(bits))
                for offset in range(largest - step * num_steps + 1):
                    code = SlowCode(offset, steps)
                    cost = slow_price(places, price_L, code.levels, scale)
                    excess = slow_midpoint_excess(places, price_L, code, scale)
                    assert step % 2 == 0 or excess == 0
                    assert float(found.cost_O[row]) <= cost + excess + 1e-9


@pytest.mark.parametrize(("bits", "intermediate_bits"), [(2, 4), (3, 5)])
def test_coefficients_give_the_levels_of_the_found_code(bits: int, intermediate_bits: int) -> None:
    codes = codebook(bits, intermediate_bits)
    found = search_codes(columns(24, 7), prices(24), codes, FACTORS)
    alpha_PO, offset_O = found.coefficients(codes)
    assert bool((alpha_PO.diff(dim=0) <= 0).all())
    assert torch.equal(offset_O, found.centre(codes))
    for row in range(7):
        levels = torch.tensor(code_of(bits, intermediate_bits, int(found.index_O[row])).levels, dtype=torch.float64)
        expected_K = (levels - found.zero_O[row]) * found.scale_O[row]
        signs_KP = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits)
        level_K = (signs_KP @ alpha_PO[:, row] + offset_O[row]).sort().values
        torch.testing.assert_close(level_K, expected_K, rtol=1e-12, atol=1e-12)


def test_a_given_shape_is_kept() -> None:
    codes = codebook(2, 4)
    columns_LO, price_L = columns(24, 9), prices(24)
    free = search_codes(columns_LO, price_L, codes, FACTORS)
    own = search_codes(columns_LO, price_L, codes, FACTORS, shape_O=codes.shape_C[free.index_O])
    assert torch.equal(own.index_O, free.index_O)
    assert torch.equal(own.scale_O, free.scale_O)
    other_O = (codes.shape_C[free.index_O] + 1) % len(codes.steps_SP)
    forced = search_codes(columns_LO, price_L, codes, FACTORS, shape_O=other_O)
    assert torch.equal(codes.shape_C[forced.index_O], other_O)
    assert bool((forced.cost_O >= free.cost_O).all())


def test_what_every_shape_costs() -> None:
    codes, columns_LO, price_L = codebook(2, 4), columns(12, 5), prices(12)
    cost_SO = price_shapes(columns_LO, price_L, codes, FACTORS)
    assert cost_SO.shape == (len(codes.steps_SP), 5)
    for shape, cost_O in enumerate(cost_SO):
        given_O = torch.full((5,), shape)
        found = search_codes(columns_LO, price_L, codes, FACTORS, shape_O=given_O)
        torch.testing.assert_close(cost_O, found.cost_O, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(1e-3, 1e3), num_columns=st.integers(1, 20))
def test_a_row_of_another_size_has_the_same_code(seed: int, size: float, num_columns: int) -> None:
    codes, columns_LO = codebook(2, 4), columns(num_columns, 2, seed=seed)
    price_L = prices(num_columns, seed=seed)
    # A power of two, so that nothing is rounded differently.
    size = 2.0 ** round(torch.tensor(size).log2().item())
    found = search_codes(columns_LO, price_L, codes, FACTORS)
    scaled = search_codes(columns_LO * size, price_L, codes, FACTORS)
    assert torch.equal(scaled.index_O, found.index_O)
    assert torch.equal(scaled.zero_O, found.zero_O)
    assert torch.equal(scaled.scale_O, found.scale_O * size)


def test_both_ends_of_the_range_move() -> None:
    """Few large weights on both sides: the search gives up both ends, which no range that begins at the lowest can."""
    generator = torch.Generator().manual_seed(0)
    columns_LO = torch.randn(126, 1, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5)
    columns_LO = torch.cat([columns_LO, torch.tensor([[-6.0], [6.0]], dtype=torch.float64)])
    price_L, codes = torch.ones(128, dtype=torch.float64), codebook(3, 4)
    price_L[-2:] = 1e-3
    found = search_codes(columns_LO, price_L, codes, BinarySettings().factors)
    alpha_PO, offset_O = found.coefficients(codes)
    lowest, highest = float(offset_O - alpha_PO.sum(dim=0)), float(offset_O + alpha_PO.sum(dim=0))
    assert float(found.scale_O) < 0.65 * 12 / 15
    assert -2.5 < lowest < 0 < highest < 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_of_zeros_and_constants(dtype: torch.dtype) -> None:
    codes, price_L = codebook(2, 4), prices(16).to(dtype)
    for value in (0.0, 0.37, -0.37, 1e-7, -1e5):
        found = search_codes(torch.full((16, 1), value, dtype=dtype), price_L, codes, BinarySettings().factors)
        alpha_PO, offset_O = found.coefficients(codes)
        signs_KP = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=dtype)] * 2)
        levels_K = signs_KP @ alpha_PO[:, 0] + offset_O[0]
        assert bool(torch.isfinite(levels_K).all())
        # A scale of float16's size is as fine as it gets.
        assert float((levels_K - value).abs().min()) <= max(abs(value) * 1e-5, 2.0**-24)
        # Coefficients of a group of zeros must not set the unit of a row's bytes.
        assert float(alpha_PO.max()) <= max(abs(value), 2.0**-20)


@pytest.mark.parametrize("num_at_once", [1, 3, 1000])
def test_chunks_of_rows_do_not_change_the_result(num_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, columns_LO, price_L = codebook(2, 4), columns(16, 8), prices(16)
    whole = search_codes(columns_LO, price_L, codes, FACTORS)
    monkeypatch.setattr(binary_search, "_ROWS", num_at_once)
    chunked = search_codes(columns_LO, price_L, codes, FACTORS)
    assert torch.equal(chunked.index_O, whole.index_O)
    assert torch.equal(chunked.scale_O, whole.scale_O)


def test_the_full_range_is_tried_first() -> None:
    factors = BinarySettings(scales=(0.5, 1.5, 0.25)).factors
    assert factors == (1.0, 0.75, 1.25, 0.5, 1.5)
    assert BinarySettings(scales=(1.0, 1.0, 0.1)).factors == (1.0,)
    assert len(BinarySettings().factors) == 21
