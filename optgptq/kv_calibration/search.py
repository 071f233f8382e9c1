"""The search for the parameters of one decoder layer: candidates, a short list, and the cross-block score.

Shapes: `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from optgptq.kv_cache.rotary_pairs import RotaryPairs
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import LayerParameters, SideParameters
from optgptq.kv_calibration.attend import LayerQuantizer, SideQuantizer
from optgptq.kv_calibration.candidates import Candidate, SideStatistics, plain_candidate, side_candidates
from optgptq.kv_calibration.score import BlockScore
from optgptq.kv_calibration.settings import CacheCalibrationSettings, Transform
from optgptq.kv_calibration.statistics import LayerStatistics
from optgptq.models.spec import DecoderSpec

# Candidates of a side that are judged by the cross-block score, the best ones at the output of attention.
_NUM_JUDGED = 3
# A shift must gain so much to be taken. Where it gains less on the calibration text it lost up to three times the KL on
# another kind of text, whose mean is elsewhere.
_SHIFT_MARGIN = 1.25


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FoundLayer:
    """What the search chose for one decoder layer.

    Attributes:
        keys, values: the candidates; None for a side that is exact.
        quantizer: of both.
        score: cross-block score of the choice.
        plain_score: of plain rounding.
    """

    keys: Candidate | None
    values: Candidate | None
    quantizer: LayerQuantizer
    score: float
    plain_score: float

    @property
    def parameters(self) -> LayerParameters:
        """For the set-up of the cache."""
        nothing = SideParameters()
        return LayerParameters(
            keys=nothing if self.keys is None else self.keys.parameters,
            values=nothing if self.values is None else self.values.parameters,
        )

    def record(self, scheme: LayerScheme) -> dict[str, Any]:
        """Return the choice as plain values."""
        return {
            "key_bits": scheme.keys.bits,
            "value_bits": scheme.values.bits,
            "keys": None if self.keys is None else self.keys.name,
            "values": None if self.values is None else self.values.name,
            "score": self.score,
            "plain_score": self.plain_score,
        }


def search_layer(
    judge: BlockScore, statistics: LayerStatistics, scheme: LayerScheme, settings: CacheCalibrationSettings
) -> FoundLayer:
    """Return the best parameters of a layer that is not exact.

    Keys are chosen first, beside the values that look best at the output of attention; then values beside them.
    """
    spec = judge.layers[0].spec
    device = statistics.key_KTD.device
    keys, values = candidates_of(statistics, scheme, settings, spec=spec, layer_index=judge.layers[0].index)
    keys = _shortened(judge, keys, [quantizer_of(scheme, each, None, device) for each in keys])
    values = _shortened(judge, values, [quantizer_of(scheme, None, each, device) for each in values])
    chosen = _Choice(judge=judge, scheme=scheme, device=device)
    first_value = values[0]
    best_key = min(keys, key=lambda candidate: chosen.score(candidate, first_value) * _margin(candidate))
    best_value = min(values, key=lambda candidate: chosen.score(best_key, candidate) * _margin(candidate))
    plain = _plain(scheme.keys), _plain(scheme.values)
    best = (best_key, best_value)
    if chosen.score(*plain) < chosen.score(*best):
        best = plain
    return FoundLayer(
        keys=best[0],
        values=best[1],
        quantizer=chosen.quantizer(*best),
        score=chosen.score(*best),
        plain_score=chosen.score(*plain),
    )


def candidates_of(
    statistics: LayerStatistics,
    scheme: LayerScheme,
    settings: CacheCalibrationSettings,
    *,
    spec: DecoderSpec,
    layer_index: int,
) -> tuple[list[Candidate | None], list[Candidate | None]]:
    """Return the candidates of both sides; one None for an exact side."""
    keys = _side_candidates(key_side(statistics, spec, layer_index), scheme.keys, settings.key_transform, settings)
    values = _side_candidates(value_side(statistics), scheme.values, settings.value_transform, settings)
    return keys, values


def _side_candidates(
    side: SideStatistics, scheme: SideScheme, transform: Transform, settings: CacheCalibrationSettings
) -> list[Candidate | None]:
    if scheme.is_exact:
        return [None]
    rounding, max_ranges = settings.rounding, settings.max_ranges
    return [*side_candidates(side, scheme, transform, rounding=rounding, max_ranges=max_ranges)]


def key_side(statistics: LayerStatistics, spec: DecoderSpec, layer_index: int) -> SideStatistics:
    """Return what is known of keys. Rotary pairs are tied; a soft-cap on scores does not let a shift drop out."""
    rope = spec.layers[layer_index].rope
    pairs = RotaryPairs(rotary_dim=0 if rope is None else rope.rotary_dim)
    return SideStatistics(
        x_KTD=statistics.key_KTD,
        mass_KT=statistics.key_mass_KT,
        metric_KDD=statistics.key_metric_KDD,
        mean_KD=statistics.key_mean_KD,
        partner_D=pairs.partners(spec.head_dim).to(statistics.key_KTD.device),
        can_shift=spec.attention_softcap is None,
    )


def value_side(statistics: LayerStatistics) -> SideStatistics:
    """Return what is known of values: channels are free."""
    head_dim = statistics.value_KTD.shape[2]
    return SideStatistics(
        x_KTD=statistics.value_KTD,
        mass_KT=statistics.value_mass_KT,
        metric_KDD=statistics.value_metric_KDD,
        mean_KD=statistics.value_mean_KD,
        partner_D=torch.arange(head_dim, device=statistics.value_KTD.device),
        can_shift=True,
    )


def quantizer_of(
    scheme: LayerScheme, keys: Candidate | None, values: Candidate | None, device: torch.device
) -> LayerQuantizer:
    """Return the quantizer of a pair of candidates; a side without one is exact."""
    return LayerQuantizer(
        keys=None if keys is None else SideQuantizer.of(scheme.keys, keys.parameters, device),
        values=None if values is None else SideQuantizer.of(scheme.values, values.parameters, device),
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Choice:
    """Cross-block scores of pairs of candidates, each computed once."""

    judge: BlockScore
    scheme: LayerScheme
    device: torch.device
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    def score(self, keys: Candidate | None, values: Candidate | None) -> float:
        names = ("" if keys is None else keys.name, "" if values is None else values.name)
        if names not in self.known:
            self.known[names] = self.judge.cross_block(self.quantizer(keys, values))
        return self.known[names]

    def quantizer(self, keys: Candidate | None, values: Candidate | None) -> LayerQuantizer:
        return quantizer_of(self.scheme, keys, values, self.device)


def _shortened(
    judge: BlockScore, candidates: Sequence[Candidate | None], quantizers: Sequence[LayerQuantizer]
) -> list[Candidate | None]:
    """Return the candidates whose quantizers do best at the output of attention, best first."""
    if len(candidates) == 1:
        return list(candidates)
    errors = judge.attention_errors(quantizers)
    order = sorted(range(len(candidates)), key=lambda index: errors[index] * _margin(candidates[index]))
    return [candidates[index] for index in order[:_NUM_JUDGED]]


def _margin(candidate: Candidate | None) -> float:
    """Return what a score counts times: a mean of the calibration text may be wrong for another one."""
    return _SHIFT_MARGIN if candidate is not None and candidate.parameters.shift_KD is not None else 1.0


def _plain(scheme: SideScheme) -> Candidate | None:
    return None if scheme.is_exact else plain_candidate()
