"""Bits under a budget of bytes: never too many bytes, and much of what they can gain."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.kv_calibration.allocation import Option, Place, greedy_bits

PLACES: list[Place] = [(0, "keys"), (0, "values"), (1, "keys"), (1, "values")]


def options_of(costs: list[float]) -> dict[Place, list[Option]]:
    """Return costs that fall by a factor of four with each bit, as those of uniform rounding do."""
    return {
        place: [Option(bits=bits, num_bytes=4.0 + 2 * bits, cost=cost * 4.0**-bits) for bits in (2, 3, 4, 8)]
        for place, cost in zip(PLACES, costs, strict=True)
    }


def total(options: dict[Place, list[Option]], bits: dict[Place, int]) -> tuple[float, float]:
    chosen = [next(option for option in options[place] if option.bits == bits[place]) for place in options]
    return sum(option.num_bytes for option in chosen), sum(option.cost for option in chosen)


def test_bits_go_where_they_count() -> None:
    bits = greedy_bits(options_of([100.0, 1.0, 100.0, 1.0]), 4 * 10.0)
    assert bits == {(0, "keys"): 4, (0, "values"): 2, (1, "keys"): 4, (1, "values"): 2}


def test_the_smallest_bits_remain_where_nothing_is_left() -> None:
    assert set(greedy_bits(options_of([1.0, 2.0, 3.0, 4.0]), 0.0).values()) == {2}


def test_costs_that_grow_with_bits_are_not_paid_for() -> None:
    options = {PLACES[0]: [Option(bits=2, num_bytes=8, cost=1.0), Option(bits=4, num_bytes=12, cost=1.5)]}
    assert greedy_bits(options, 100.0) == {PLACES[0]: 2}


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.floats(0.01, 100), min_size=4, max_size=4), budget=st.floats(32, 80))
def test_the_budget_holds_and_a_third_of_the_best_gain_is_reached(costs: list[float], budget: float) -> None:
    options = options_of(costs)
    num_bytes, cost = total(options, greedy_bits(options, budget))
    assert num_bytes <= budget + 1e-6
    everything = [total(options, dict(zip(PLACES, bits, strict=True))) for bits in product((2, 3, 4, 8), repeat=4)]
    best = min(each for size, each in everything if size <= budget + 1e-6)
    lowest = total(options, dict.fromkeys(PLACES, 2))[1]
    assert lowest - cost >= (lowest - best) / 3


def test_equal_bytes_are_free() -> None:
    """Rows are filled up to four bytes: in small heads, 3 bits take as much as 4."""
    options = {PLACES[0]: [Option(bits=bits, num_bytes=8, cost=1.0 / bits) for bits in (3, 4)]}
    assert greedy_bits(options, 8.0) == {PLACES[0]: 4}
