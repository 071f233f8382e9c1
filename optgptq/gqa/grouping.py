"""Which key/value heads are merged: neighbours, or heads whose activations are alike.

Source: grouping by the cosine of activations after Opt-GPTQ, arXiv 2505.02351, and Chen et al., arXiv 2406.14963;
alignment before the comparison after Jin et al., arXiv 2412.20677.

Shapes: `K` key/value heads, `D` head dimension, `P` frequency planes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import torch

from optgptq.gqa.keys import KeyRule, centred_keys
from optgptq.gqa.rotary import plane_moments, plane_weights
from optgptq.gqa.statistics import Groups, HeadMoments
from optgptq.gqa.subspace import weighted_moment

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


def head_similarity(weights: tuple[torch.Tensor, torch.Tensor], moments: HeadMoments, rule: KeyRule) -> torch.Tensor:
    """Return `[K, K]` float64: the share of energy that two heads keep when they are merged, mean of keys and values.

    It is a cosine of their activations after the best alignment that attention allows, in the measure of the error that
    counts: 1 where two heads span the same subspace, 1/2 where one tells nothing of the other.

    Args:
        weights: `[K, D, D]` each: what an error of a key costs, and of a value.
        moments: of the heads.
        rule: of the layer.
    """
    keys_KDKD, turning = centred_keys(moments, rule), rule.rotary_dim
    planes_KP = plane_weights(weights[0], turning)
    roots_PKK = planes_KP.T.sqrt().unsqueeze(2) * planes_KP.T.sqrt().unsqueeze(1)
    planes_PKK = roots_PKK * plane_moments(keys_KDKD, turning) / 2
    still_KDKD = weighted_moment(weights[0][:, turning:, turning:], keys_KDKD[:, turning:, :, turning:])
    values_KDKD = weighted_moment(weights[1], moments.value_KDKD)
    found_KK = torch.eye(len(keys_KDKD), dtype=torch.float64)
    for first, second in combinations(range(len(keys_KDKD)), 2):
        pair = [first, second]
        kept_planes, planes = _kept(planes_PKK[:, pair][:, :, pair].unsqueeze(2).unsqueeze(4))
        kept_still, still = _kept(still_KDKD[pair][:, :, pair].unsqueeze(0))
        kept_values, values = _kept(values_KDKD[pair][:, :, pair].unsqueeze(0))
        keys = _share(kept_planes + kept_still, planes + still)
        found_KK[first, second] = found_KK[second, first] = (keys + _share(kept_values, values)) / 2
    return found_KK


def activation_cosines(moments: HeadMoments) -> torch.Tensor:
    """Return `[K, K]` float64: cosines of the activations as they are, mean of keys and values, as published."""
    found = []
    for moment_KDKD in (moments.key_KDKD, moments.value_KDKD):
        products_KK = torch.einsum("kdgd->kg", moment_KDKD)
        energy_K = products_KK.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        found.append(products_KK / (energy_K.unsqueeze(0) * energy_K.unsqueeze(1)).sqrt())
    return (found[0] + found[1]) / 2


def _kept(pairs: torch.Tensor) -> tuple[float, float]:
    """Return the energy that one head keeps of two, and that of both, for weighted moments `[..., 2, D, 2, D]`."""
    size = pairs.shape[-1]
    if size == 0 or pairs.shape[0] == 0:
        return 0.0, 0.0
    values = torch.linalg.eigvalsh(pairs.reshape(-1, 2 * size, 2 * size))
    return float(values[:, size:].sum()), float(values.sum())


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 1.0


def _total(table: list[list[float]], groups: Groups) -> float:
    return math.fsum(table[first][second] for group in groups for first in group for second in group if first < second)


def _num_partitions(num_heads: int, size: int) -> int:
    choices = [math.comb(left - 1, size - 1) for left in range(num_heads, 0, -size)]
    return math.prod(choices)


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    if not heads:
        yield ()
        return
    for others in combinations(heads[1:], size - 1):
        rest = tuple(head for head in heads[1:] if head not in others)
        for groups in _partitions(rest, size):
            yield ((heads[0], *others), *groups)


def _grown(table: list[list[float]], size: int) -> Groups:
    free = list(range(len(table)))
    groups: list[tuple[int, ...]] = []
    while free:
        pairs = [(table[first][second], -first, -second) for first, second in combinations(free, 2)]
        _, first, second = max(pairs)
        group = [-first, -second]
        while len(group) < size:
            left = [(math.fsum(table[head][member] for member in group), -head) for head in free if head not in group]
            group.append(-max(left)[1])
        groups.append(tuple(group))
        free = [head for head in free if head not in group]
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
