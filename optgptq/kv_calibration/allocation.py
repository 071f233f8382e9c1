"""Bits for each layer and side under a budget of bytes: where they lower the cross-block score most per byte.

Errors of different places are taken to be independent, so squares of scores add up. Each is measured alone, in the
full-precision model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from optgptq.journal.store import Steps
from optgptq.kv_cache.page_layout import PAGE_MULTIPLE, PageLayout
from optgptq.kv_cache.scheme import CODE_BITS, LayerScheme, SideScheme
from optgptq.kv_calibration.attend import LayerQuantizer
from optgptq.kv_calibration.chains import Chains
from optgptq.kv_calibration.score import BlockScore
from optgptq.kv_calibration.search import candidates_of, quantizer_of
from optgptq.kv_calibration.settings import CacheCalibrationSettings
from optgptq.kv_calibration.statistics import LayerStatistics, measure_layer
from optgptq.models.spec import DecoderSpec

Side = Literal["keys", "values"]
SIDES: tuple[Side, ...] = ("keys", "values")
Place = tuple[int, Side]
"""Decoder layer and side."""

# Layouts count bytes of exact numbers; none of them is exact here.
_EXACT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One number of bits for one place.

    Attributes:
        bits: of a code.
        num_bytes: per token.
        cost: what it adds to the sum that is made small.
    """

    bits: int
    num_bytes: float
    cost: float


def greedy_bits(options: Mapping[Place, Sequence[Option]], budget_bytes: float) -> dict[Place, int]:
    """Return the bits of each place: from the smallest on, always the step that lowers the cost most per byte.

    A step may skip bits, and costs that grow with bits are never paid for. The sum of bytes never exceeds the budget
    unless the smallest options already do.
    """
    chosen = {place: min(each, key=lambda option: (option.num_bytes, option.cost)) for place, each in options.items()}
    left = budget_bytes - sum(option.num_bytes for option in chosen.values())
    while True:
        steps = [
            ((chosen[place].cost - option.cost) / (option.num_bytes - chosen[place].num_bytes), place, option)
            for place, each in options.items()
            for option in each
            if chosen[place].num_bytes < option.num_bytes <= chosen[place].num_bytes + left + 1e-9
            and option.cost < chosen[place].cost
        ]
        if not steps:
            return {place: option.bits for place, option in chosen.items()}
        _, place, option = max(steps, key=lambda step: (step[0], step[1]))
        left -= option.num_bytes - chosen[place].num_bytes
        chosen[place] = option


def allocate_bits(
    chains: Chains,
    spec: DecoderSpec,
    settings: CacheCalibrationSettings,
    *,
    steps: Steps,
    layer_started: Callable[[int], None],
) -> tuple[tuple[LayerScheme, ...], dict[str, Any]]:
    """Return schemes with bits chosen under `settings.budget_bits`, and what was measured.

    Costs that are in `steps` are not measured again; `chains` runs on as far as one has to be.

    Raises:
        NumericalError: activations are not finite.
        CapacityError, OutputError: a step cannot be written.
    """
    assert settings.budget_bits is not None
    known = _walk(chains, settings, steps=steps, layer_started=layer_started)
    options: dict[Place, list[Option]] = {}
    budget = 0.0
    for index, found in sorted(known.items()):
        options |= found
        scheme = settings.schemes[index]
        budget += sum(_bytes_at(_side(scheme, side), settings.budget_bits, spec) for _, side in found)
    bits = greedy_bits(options, budget)
    schemes = tuple(_with_bits(index, scheme, bits) for index, scheme in enumerate(settings.schemes))
    record = {
        "budget_bits": settings.budget_bits,
        "budget_bytes_per_token": budget,
        "costs": {
            f"{index} {side}": {str(option.bits): option.cost for option in each}
            for (index, side), each in options.items()
        },
    }
    return schemes, record


def _walk(
    chains: Chains, settings: CacheCalibrationSettings, *, steps: Steps, layer_started: Callable[[int], None]
) -> dict[int, dict[Place, list[Option]]]:
    """Return the options of every layer whose bits are to be chosen."""
    asked = [
        index
        for index, scheme in enumerate(settings.schemes)
        if index not in settings.fixed_layers and not scheme.is_exact
    ]
    entries = {index: steps.get(_name(index)) for index in asked}
    known = {index: _told(index, entry.facts) for index, entry in entries.items() if entry is not None}
    exact = LayerQuantizer(keys=None, values=None)
    for index in range(max(set(asked) - known.keys(), default=-1) + 1):
        layer_started(index)
        if index in asked and index not in known:
            known[index] = _measured(chains, settings)
            steps.put(_name(index), {}, _facts(known[index]))
            steps.sync()
        chains.advance(exact, exact)
    return known


def _name(index: int) -> str:
    return f"allocation-{index:05d}"


def _facts(options: Mapping[Place, Sequence[Option]]) -> dict[str, Any]:
    """Return the options of one layer as plain values."""
    return {
        side: [{"bits": each.bits, "num_bytes": each.num_bytes, "cost": each.cost} for each in found]
        for (_, side), found in options.items()
    }


def _told(index: int, facts: Mapping[str, Any]) -> dict[Place, list[Option]]:
    return {(index, side): [Option(**each) for each in facts[side]] for side in SIDES if side in facts}


def _measured(chains: Chains, settings: CacheCalibrationSettings) -> dict[Place, list[Option]]:
    """Return the options of the layer before which `chains` stands."""
    judge = chains.judge()
    statistics = measure_layer(
        chains.stream,
        chains.layer(),
        settings.past,
        reservoir_tokens=settings.reservoir_tokens,
        seed=settings.seed,
    )
    return _layer_options(judge, statistics, settings.schemes[chains.index], settings)


def _layer_options(
    judge: BlockScore, statistics: LayerStatistics, scheme: LayerScheme, settings: CacheCalibrationSettings
) -> dict[Place, list[Option]]:
    """Return the options of the sides of a layer that are not exact, each measured beside an exact other side."""
    index, spec = judge.layers[0].index, judge.layers[0].spec
    options: dict[Place, list[Option]] = {}
    for side in SIDES:
        own = _side(scheme, side)
        if own.is_exact:
            continue
        options[index, side] = []
        for bits in sorted(settings.allowed_bits):
            alone = _alone(side, replace(own, bits=bits))
            keys, values = candidates_of(statistics, alone, settings, spec=spec, layer_index=index)
            quantizers = [
                quantizer_of(alone, key, value, statistics.key_KTD.device) for key in keys for value in values
            ]
            errors = judge.attention_errors(quantizers)
            best = quantizers[min(range(len(errors)), key=errors.__getitem__)]
            num_bytes = _bytes_at(own, bits, spec)
            options[index, side].append(Option(bits=bits, num_bytes=num_bytes, cost=judge.cross_block(best) ** 2))
    return options


def _side(scheme: LayerScheme, side: Side) -> SideScheme:
    return scheme.keys if side == "keys" else scheme.values


def _alone(side: Side, scheme: SideScheme) -> LayerScheme:
    exact = SideScheme()
    return LayerScheme(keys=scheme, values=exact) if side == "keys" else LayerScheme(keys=exact, values=scheme)


def _with_bits(index: int, scheme: LayerScheme, bits: Mapping[Place, int]) -> LayerScheme:
    keys, values = (
        replace(own, bits=bits.get((index, side), own.bits))
        for side, own in zip(SIDES, (scheme.keys, scheme.values), strict=True)
    )
    return LayerScheme(keys=keys, values=values)


def _bytes_at(side: SideScheme, bits: float, spec: DecoderSpec) -> float:
    """Return the bytes per token of a side; between two widths of codes on the line between them."""
    below = max((width for width in CODE_BITS if width <= bits), default=CODE_BITS[0])
    above = min((width for width in CODE_BITS if width >= bits), default=CODE_BITS[-1])
    low, high = (_side_bytes(replace(side, bits=width), spec) for width in (below, above))
    return low if below == above else low + (high - low) * (bits - below) / (above - below)


def _side_bytes(side: SideScheme, spec: DecoderSpec) -> float:
    page_size = math.lcm(PAGE_MULTIPLE, side.group_size if side.axis == "token" else 1)
    layout = PageLayout(
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=page_size,
        scheme=LayerScheme(keys=side, values=side),
        exact_bytes=_EXACT_BYTES,
    )
    return layout.bytes_per_token / 2
