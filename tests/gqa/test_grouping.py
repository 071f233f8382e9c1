"""Groups: exact where all are compared, sound where they are grown, and found where heads were made alike."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optgptq.gqa.grouping import activation_cosines, adjacent_groups, head_similarity, similar_groups
from optgptq.gqa.keys import KeyRule
from optgptq.gqa.statistics import Groups, HeadMoments


def table(num_heads: int, seed: int) -> torch.Tensor:
    values = torch.rand(num_heads, num_heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + values.T) / 2


def total(similarity: torch.Tensor, groups: Groups) -> float:
    return sum(float(similarity[a, b]) for group in groups for a in group for b in group if a < b)


def test_adjacent_groups_are_neighbours() -> None:
    assert adjacent_groups(6, 2) == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize(("num_heads", "size"), [(4, 2), (6, 2), (6, 3), (4, 4), (6, 1)])
def test_few_heads_are_grouped_in_the_best_way(num_heads: int, size: int) -> None:
    similarity = table(num_heads, seed=num_heads * size)
    ways = {
        tuple(sorted(tuple(sorted(order[i : i + size])) for i in range(0, num_heads, size)))
        for order in permutations(range(num_heads))
    }
    best = max(total(similarity, groups) for groups in ways)
    assert total(similarity, similar_groups(similarity, size)) == pytest.approx(best)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(16, 2), (16, 4), (24, 8), (15, 3), (32, 2)]), st.integers(0, 50))
def test_many_heads_are_grouped_well_and_the_same_every_time(sizes: tuple[int, int], seed: int) -> None:
    num_heads, size = sizes
    similarity = table(num_heads, seed)
    groups = similar_groups(similarity, size)
    assert sorted(head for group in groups for head in group) == list(range(num_heads))
    assert {len(group) for group in groups} == {size}
    assert groups == similar_groups(similarity.clone(), size)
    assert total(similarity, groups) >= total(similarity, adjacent_groups(num_heads, size))


def moments_of(keys_TKD: torch.Tensor, values_TKD: torch.Tensor) -> HeadMoments:
    count, heads, size = keys_TKD.shape
    return HeadMoments(
        query_NDD=torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1),
        key_KDKD=torch.einsum("tkd,tge->kdge", keys_TKD, keys_TKD) / count,
        value_KDKD=torch.einsum("tkd,tge->kdge", values_TKD, values_TKD) / count,
        key_KD=keys_TKD.mean(0),
    )


@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_turned_copies_are_found_by_similarity_and_not_by_cosines(rotary_dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(500, 4, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(500, 4, 4, generator=generator, dtype=torch.float64)
    # A quarter turn of each plane: no cosine is left.
    turn = torch.zeros(4, 4, dtype=torch.float64)
    turn[:2, 2:], turn[2:, :2] = -torch.eye(2), torch.eye(2)
    keys[:, 2], keys[:, 3] = keys[:, 1] @ turn, keys[:, 0] @ turn
    values[:, 2], values[:, 3] = values[:, 1] @ turn, values[:, 0] @ turn
    moments = moments_of(keys, values)
    ones = torch.eye(4, dtype=torch.float64).repeat(4, 1, 1)
    rule = KeyRule(rotary_dim=rotary_dim, drops_mean=rotary_dim == 0)
    similarity = head_similarity((ones, ones), moments, rule)
    assert similar_groups(similarity, 2) == ((0, 3), (1, 2))
    assert float(similarity[0, 3]) == pytest.approx(1.0, abs=1e-6)
    assert float(similarity[0, 1]) < 0.75
    assert float(activation_cosines(moments)[0, 3]) == pytest.approx(0.0, abs=0.1)


def test_cosines_are_those_of_the_activations() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 50, 3, 5, generator=generator, dtype=torch.float64)
    found = activation_cosines(moments_of(keys, values))
    flat = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
    expected = sum(torch.nn.functional.cosine_similarity(x[0], x[2], dim=0) for x in flat) / 2
    assert float(found[0, 2]) == pytest.approx(float(expected))
