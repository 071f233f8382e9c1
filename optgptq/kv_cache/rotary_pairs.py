"""Which channels of a head the rotary embedding turns together: a scale that is moved into weights before it, or stored
behind it, must be the same for both.

Shapes: `K` key/value heads, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryPairs:
    """The pairs of a decoder layer.

    Attributes:
        rotary_dim: leading channels that are turned, even; the others are free.
        interleaved: channel `2 i` is turned with `2 i + 1`; else `i` with `i + rotary_dim / 2`.
    """

    rotary_dim: int
    interleaved: bool = False

    def partners(self, head_dim: int) -> torch.Tensor:
        """Return int64 `[D]`: the partner of each channel, itself where it is free."""
        partner_D = torch.arange(head_dim)
        turned = partner_D[: self.rotary_dim].clone()
        partner_D[: self.rotary_dim] = turned ^ 1 if self.interleaved else turned.roll(self.rotary_dim // 2)
        return partner_D


def untied_pair(scale_KD: torch.Tensor, pairs: RotaryPairs) -> tuple[int, int, int] | None:
    """Return head, channel and partner of the first pair whose scales differ at all; None where all pairs are tied."""
    partner_D = pairs.partners(scale_KD.shape[1])
    places = (scale_KD != scale_KD[:, partner_D]).nonzero()
    if not len(places):
        return None
    head, channel = (int(number) for number in places[0])
    return head, channel, int(partner_D[channel])
