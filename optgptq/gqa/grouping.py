"""Which key/value heads are merged: neighbours, or heads whose activations are alike.

Two heads are as alike as the cosine of their activations becomes once one of them is turned by the best map that
attention allows: any rotation where positions do not turn keys, a rotation of each frequency plane where they do. Keys
and values count the same.

Source: activation-informed grouping after Opt-GPTQ, arXiv 2505.02351, and Chen et al., arXiv 2406.14963; alignment
before the comparison after Jin et al., arXiv 2412.20677.

Shapes: `K` key/value heads, `D` head dimension, `P` frequency planes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from optgptq.gqa.rotary import plane_moments
from optgptq.gqa.statistics import Groups

# Up to this number of ways to form groups all of them are compared: 10 heads in pairs, 9 in threes, 12 in sixes.
_EXACT_PARTITIONS = 1000


def adjacent_groups(num_heads: int, size: int) -> Groups:
    """Return groups of neighbours."""
    return tuple(tuple(range(first, first + size)) for first in range(0, num_heads, size))


def similar_groups(similarity_KK: torch.Tensor, size: int) -> Groups:
    """Return groups of `size` heads with a large sum of similarities within groups, the same for the same input.

    The largest sum where there are few ways to form groups. Else groups are grown one after the other from the most
    alike pair that is left, then heads are exchanged between groups as long as that helps.
    """
    num_heads = len(similarity_KK)
    table = similarity_KK.tolist()
    if _num_partitions(num_heads, size) <= _EXACT_PARTITIONS:
        found = max(_partitions(tuple(range(num_heads)), size), key=lambda groups: _total(table, groups))
    else:
        found = _exchanged(table, _grown(table, size))
    return tuple(sorted(tuple(sorted(group)) for group in found))


def head_similarity(key_KDKD: torch.Tensor, value_KDKD: torch.Tensor, *, rotary_dim: int) -> torch.Tensor:
    """Return `[K, K]` float64: the mean of the aligned cosines of keys and of values.

    `key_KDKD` and `value_KDKD` are moments of all heads with each other; the first `rotary_dim` features of a key turn.
    """
    still = key_KDKD[:, rotary_dim:, :, rotary_dim:]
    planes_PKK = plane_moments(key_KDKD, rotary_dim).abs()
    keys_KK = planes_PKK.sum(0) + _aligned_products(still)
    return (_cosines(keys_KK, key_KDKD) + _cosines(_aligned_products(value_KDKD), value_KDKD)) / 2


def _aligned_products(moment_KDKD: torch.Tensor) -> torch.Tensor:
    """Return `[K, K]`: the largest mean product of two heads over all rotations of one, the nuclear norm (Procrustes)."""
    if moment_KDKD.shape[1] == 0:
        return moment_KDKD.new_zeros(len(moment_KDKD), len(moment_KDKD))
    return torch.linalg.svdvals(moment_KDKD.transpose(1, 2)).sum(-1)


def _cosines(products_KK: torch.Tensor, moment_KDKD: torch.Tensor) -> torch.Tensor:
    energy_K = torch.einsum("kdkd->k", moment_KDKD).clamp(min=torch.finfo(torch.float64).tiny)
    return products_KK / (energy_K.unsqueeze(0) * energy_K.unsqueeze(1)).sqrt()


def _total(table: list[list[float]], groups: Groups) -> float:
    return math.fsum(table[first][second] for group in groups for first in group for second in group if first < second)


def _num_partitions(num_heads: int, size: int) -> int:
    groups = num_heads // size
    return math.factorial(num_heads) // (math.factorial(size) ** groups * math.factorial(groups))


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    if not heads:
        yield ()
        return
    for others in _choices(heads[1:], size - 1):
        rest = tuple(head for head in heads[1:] if head not in others)
        for groups in _partitions(rest, size):
            yield ((heads[0], *others), *groups)


def _choices(heads: tuple[int, ...], count: int) -> Iterator[tuple[int, ...]]:
    if count == 0:
        yield ()
        return
    for index, head in enumerate(heads):
        for others in _choices(heads[index + 1 :], count - 1):
            yield (head, *others)


def _grown(table: list[list[float]], size: int) -> Groups:
    free, groups = set(range(len(table))), []
    while free:
        ordered = sorted(free)
        pairs = [(first, second) for first in ordered for second in ordered if first < second]
        group = list(max(pairs, key=lambda pair: table[pair[0]][pair[1]]))[:size]
        while len(group) < size:
            left = [head for head in ordered if head not in group]
            group.append(max(left, key=lambda head: math.fsum(table[head][member] for member in group)))
        groups.append(tuple(group))
        free -= set(group)
    return tuple(groups)


def _exchanged(table: list[list[float]], groups: Groups) -> Groups:
    """Exchange pairs of heads as long as the sum grows; it cannot grow forever, so this ends."""
    found = [list(group) for group in groups]
    improved = True
    while improved:
        improved = False
        places = [(group, place) for group in range(len(found)) for place in range(len(found[group]))]
        for index, first in enumerate(places):
            for second in places[index + 1 :]:
                if first[0] != second[0] and _gain(table, found, first, second) > 1e-12:
                    one, other = found[first[0]][first[1]], found[second[0]][second[1]]
                    found[first[0]][first[1]], found[second[0]][second[1]] = other, one
                    improved = True
    return tuple(tuple(group) for group in found)


def _gain(table: list[list[float]], groups: list[list[int]], first: tuple[int, int], second: tuple[int, int]) -> float:
    one, other = groups[first[0]][first[1]], groups[second[0]][second[1]]
    beside_one = [head for head in groups[first[0]] if head != one]
    beside_other = [head for head in groups[second[0]] if head != other]
    gained = [table[other][head] - table[one][head] for head in beside_one]
    gained += [table[one][head] - table[other][head] for head in beside_other]
    return math.fsum(gained)
