"""Random numbers as a function of their place: the published values, and that they look random in every direction."""

from __future__ import annotations

import numpy as np
import pytest

from optgptq.runtime.counter_random import philox, uniforms

COUNT = 20_000


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_published_values(counter, key, expected):
    words = philox([np.array([word], np.uint64) for word in counter], [np.array([word], np.uint64) for word in key])
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


PLACES = {
    "numbers": ([7] * COUNT, [0] * COUNT, list(range(COUNT))),
    "forks": ([7] * COUNT, list(range(COUNT)), [3] * COUNT),
    "seeds": (list(range(COUNT)), [0] * COUNT, [0] * COUNT),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_numbers_are_evenly_spread_and_not_correlated(places):
    values = uniforms(*places)
    assert values.dtype == np.float64
    assert values.min() >= 0
    assert values.max() < 1
    # Kolmogorov-Smirnov: above 1.95 / sqrt(n) with probability 0.001.
    distance = np.abs(np.sort(values) - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 1.95 / COUNT**0.5
    for lag in (1, 2, 3):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 4 / COUNT**0.5
    # Pairs fill the square: chi-squared with 99 degrees of freedom is above 149 with probability 0.001.
    cells = np.histogram2d(values[::2], values[1::2], bins=10, range=[[0, 1], [0, 1]])[0]
    expected = COUNT / 2 / 100
    assert ((cells - expected) ** 2 / expected).sum() < 149


def test_a_number_depends_on_its_own_place_only():
    seeds, forks, numbers = [1, 2, 2, 2, 2**62 + 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 2**40]
    together = uniforms(seeds, forks, numbers)
    alone = [uniforms([seeds[i]], [forks[i]], [numbers[i]])[0] for i in range(5)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5


def test_all_bits_of_seed_fork_and_number_matter():
    base = uniforms([0], [0], [0])[0]
    values = {uniforms([1 << bit], [0], [0])[0] for bit in range(63)}
    values |= {uniforms([0], [1 << bit], [0])[0] for bit in range(63)}
    values |= {uniforms([0], [0], [1 << bit])[0] for bit in range(63)}
    assert len(values | {base}) == 3 * 63 + 1
