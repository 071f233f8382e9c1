"""A quantized cache ready to be used: its scheme and the numbers that calibration found.

Shapes: `K` key/value heads, `D` head dimension, `C` candidate ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from optgptq.kv_cache.scheme import CacheScheme


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SideParameters:
    """What is done to the keys, or values, of one decoder layer at run time; all tensors float32, None for nothing.

    A vector `x` is stored as `((x - shift) / scale) @ rotation`, rounded to codes. A shift of keys is never added back:
    softmax lets it drop out. That of values is.

    Attributes:
        shift_KD: subtracted.
        scale_KD: divided by; positive. Equal for the two channels of a rotary pair where these are keys.
        rotation_KDD: orthogonal.
        metric_KDD: what an error of a stored vector costs, `error @ metric @ error`: symmetric, positive semidefinite.
            Codes are fitted to it; without it each number is rounded to the nearest.
        ranges_C2: candidates for the range of a group: how far its smallest and its largest number are from its middle,
            as shares; None: the range is that of the numbers.
    """

    shift_KD: torch.Tensor | None = None
    scale_KD: torch.Tensor | None = None
    rotation_KDD: torch.Tensor | None = None
    metric_KDD: torch.Tensor | None = None
    ranges_C2: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by the name of its field."""
        parts = {
            "shift_KD": self.shift_KD,
            "scale_KD": self.scale_KD,
            "rotation_KDD": self.rotation_KDD,
            "metric_KDD": self.metric_KDD,
            "ranges_C2": self.ranges_C2,
        }
        return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerParameters:
    """One decoder layer."""

    keys: SideParameters
    values: SideParameters

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is of both sides, as `keys.shift_KD`."""
        sides = {"keys": self.keys, "values": self.values}
        return {f"{side}.{name}": part for side, own in sides.items() for name, part in own.tensors.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return the parameters whose `tensors` these are."""
        sides = {
            side: {name.removeprefix(f"{side}."): part for name, part in tensors.items() if name.startswith(f"{side}.")}
            for side in ("keys", "values")
        }
        return cls(keys=SideParameters(**sides["keys"]), values=SideParameters(**sides["values"]))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CacheSetup:
    """Everything that decides the codes.

    Attributes:
        scheme: what is stored.
        layers: parameters of each decoder layer.
        fingerprint: SHA-256 of configuration and parameters; pages of other caches never pass for pages of this one.
        source: where it comes from, for the log.
    """

    scheme: CacheScheme
    layers: tuple[LayerParameters, ...]
    fingerprint: bytes
    source: str
