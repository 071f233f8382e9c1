"""What is measured of the heads of one decoder layer before they are grouped, and once the groups are known.

Shapes: `B` windows of a batch, `S` positions, `T` tokens, `N` query heads, `K` key/value heads, `D` head dimension,
`G` groups, `C` heads of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from optgptq.calibration.moments import InputMoment
from optgptq.calibration.stream import ActivationStream, Batch, add_inputs
from optgptq.models.layer import DecoderLayer
from optgptq.numerics import exact_float32_products

Groups = tuple[tuple[int, ...], ...]
"""Key/value heads of each group, every head once."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadMoments:
    """Means over tokens, float64.

    Attributes:
        query_NDD: of each query head with itself.
        key_KDKD, value_KDKD: of all heads with each other.
        key_KD: mean keys.
    """

    query_NDD: torch.Tensor
    key_KDKD: torch.Tensor
    value_KDKD: torch.Tensor
    key_KD: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttendedValues:
    """Moments of what attention makes of the values of a whole group, float64.

    Each query head of a group weighs the values of all heads of the group; the moment is the mean over its query heads.

    Attributes:
        moment_GCDCD: by group, of the stacked values.
        mean_NCD: by query head in the old order.
    """

    moment_GCDCD: torch.Tensor
    mean_NCD: torch.Tensor


def measure_heads(stream: ActivationStream, layer: DecoderLayer, *, dtype: torch.dtype) -> HeadMoments:
    """Return the moments of the heads that `layer` makes of `stream`; windows that are held out are not in them.

    Raises:
        NumericalError: activations are not finite.
    """
    spec = layer.spec
    size, width = spec.head_dim, spec.num_kv_heads * spec.head_dim
    device = stream.device
    keys, values = (InputMoment(width, dtype=dtype, device=device) for _ in range(2))
    query_NDD = torch.zeros(spec.num_heads, size, size, dtype=torch.float64, device=device)
    key_sum = torch.zeros(width, dtype=torch.float64, device=device)
    reads = spec.linear_names(layer.index, "qkv")[0]
    for batch in (batch for batch in stream.batches if not batch.held_out):
        inputs_BSM = layer.stage_input("qkv", batch.state, stream.context)
        query_BNSD, key_BKSD, value_BKSD = layer.project_heads(inputs_BSM, stream.context)
        add_inputs(keys, key_BKSD.transpose(1, 2).flatten(2), batch, reads=reads)
        add_inputs(values, value_BKSD.transpose(1, 2).flatten(2), batch, reads=reads)
        key_sum += _valid(key_BKSD.transpose(1, 2).flatten(2), batch).sum(0, dtype=torch.float64)
        query_NTD = _valid(query_BNSD.transpose(1, 2), batch).to(dtype).transpose(0, 1)
        with exact_float32_products():
            query_NDD += query_NTD.mT @ query_NTD
    split = (spec.num_kv_heads, size, spec.num_kv_heads, size)
    return HeadMoments(
        query_NDD=query_NDD / keys.num_tokens,
        key_KDKD=keys.mean().double().view(split),
        value_KDKD=values.mean().double().view(split),
        key_KD=key_sum.view(spec.num_kv_heads, size) / keys.num_tokens,
    )


def measure_attended(
    stream: ActivationStream, layer: DecoderLayer, groups: Groups, *, dtype: torch.dtype
) -> AttendedValues:
    """Return the moments of the values of each group behind the attention of its query heads.

    Attention runs once for each head of a group: with the values of the group's heads shifted by one each time.
    """
    spec = layer.spec
    shared, count = spec.num_heads // spec.num_kv_heads, len(groups[0])
    width = count * spec.head_dim
    device = stream.device
    moments = [InputMoment(width, dtype=dtype, device=device) for _ in groups]
    sum_NI = torch.zeros(spec.num_heads, width, dtype=torch.float64, device=device)
    num_tokens = 0
    for batch in (batch for batch in stream.batches if not batch.held_out):
        stacked_NTI = _attended(stream, layer, batch, groups)
        sum_NI += stacked_NTI.sum(1, dtype=torch.float64)
        num_tokens += stacked_NTI.shape[1]
        for moment, members in zip(moments, groups, strict=True):
            heads = [head * shared + offset for head in members for offset in range(shared)]
            moment.add(stacked_NTI[heads].flatten(0, 1))
    split = (count, spec.head_dim, count, spec.head_dim)
    return AttendedValues(
        moment_GCDCD=torch.stack([moment.mean().double().view(split) for moment in moments]),
        mean_NCD=(sum_NI / num_tokens).view(spec.num_heads, count, spec.head_dim),
    )


def _attended(stream: ActivationStream, layer: DecoderLayer, batch: Batch, groups: Groups) -> torch.Tensor:
    """Return `[N, T, C D]`: for each query head, the values of all heads of its group as it weighs them."""
    spec = layer.spec
    inputs_BSM = layer.stage_input("qkv", batch.state, stream.context)
    query_BNSD, key_BKSD, value_BKSD = layer.project_heads(inputs_BSM, stream.context)
    places = {head: (members, place) for members in groups for place, head in enumerate(members)}
    count, shared = len(groups[0]), spec.num_heads // spec.num_kv_heads
    found = []
    for step in range(count):
        source = [_member(places[head], step) for head in range(spec.num_kv_heads)]
        found.append(stream.context.attend(layer.index, query_BNSD, key_BKSD, value_BKSD[:, source], spec))
    # Of query head n, shift `step` holds the value of the member `place + step`: put members in the group's order.
    by_head = []
    for head in range(spec.num_heads):
        place = places[head // shared][1]
        parts = [_valid(found[(member - place) % count][:, head], batch) for member in range(count)]
        by_head.append(torch.cat(parts, dim=-1))
    return torch.stack(by_head)


def _member(place: tuple[Sequence[int], int], step: int) -> int:
    members, own = place
    return members[(own + step) % len(members)]


def _valid(values_BSX: torch.Tensor, batch: Batch) -> torch.Tensor:
    return values_BSX.flatten(0, 1) if batch.valid_BS is None else values_BSX[batch.valid_BS]
