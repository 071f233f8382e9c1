"""What the calibration of a quantized KV cache is asked to do. Whoever makes the record has checked the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from optgptq.kv_cache.scheme import CODE_BITS, LayerScheme, PastRule

Transform = Literal["auto", "none", "shift_scale", "hadamard", "covariance"]
Rounding = Literal["fitted", "nearest"]
Refine = Literal["off", "gradient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCalibrationSettings:
    """How the parameters of a cache are found.

    Attributes:
        schemes: what is stored of each decoder layer. With `budget_bits`, groups and axis are kept and the bits of
            sides that are not exact are chosen anew, but for the layers in `fixed_layers`.
        past: which keys are read exactly. `chunk` is scored as `token`: what decoding reads.
        key_transform, value_transform: `auto` lets the score choose; the others name the one transform beside which
            only plain rounding is tried.
        rounding: `fitted` gives codes that are fitted to what an error costs; `nearest` needs no metric at run time.
        budget_bits: mean bits of a code, over all layers and sides that are not exact and not fixed, that a greedy
            allocation may spend; None keeps the bits of `schemes`.
        fixed_layers: their bits stay as they are.
        allowed_bits: to allocate from.
        held_out_share: share of the windows, the last ones, that choose among candidates and are in no statistic.
        reservoir_tokens: vectors per head that scales and ranges are found on.
        max_ranges: candidates for the range of a group that a side may keep.
        refine: `gradient` moves shift and scale by gradients through the following layers, for comparison.
        seed: of the choice of tokens.
    """

    schemes: tuple[LayerScheme, ...]
    past: PastRule
    key_transform: Transform = "auto"
    value_transform: Transform = "auto"
    rounding: Rounding = "fitted"
    budget_bits: float | None = None
    fixed_layers: frozenset[int] = frozenset()
    allowed_bits: tuple[int, ...] = CODE_BITS
    held_out_share: float = 0.25
    reservoir_tokens: int = 4096
    max_ranges: int = 8
    refine: Refine = "off"
    seed: int = 0
