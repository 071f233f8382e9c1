"""The normal form of binary coding: no negative coefficient, and the largest first.

Turning a sign plane around negates its coefficient, and planes may be in any order, so one weight has many codes.

Shapes: `O` output rows, `I` input columns, `G` groups along `I`, `P` planes.
"""

from __future__ import annotations

import torch


def normal_form(
    codes_OI: torch.Tensor, alpha_OGP: torch.Tensor, *, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and coefficients of the same weight, the coefficients not negative and descending along `P`.

    Signs change without rounding. Where planes change places, sums in float32 may round in another order.

    Args:
        codes_OI: uint8, not changed; bit `p` of a code is the sign of plane `p`.
        alpha_OGP: coefficients of any dtype and sign.
        group_size: columns in a group; the last group may be shorter.
    """
    bits = alpha_OGP.shape[2]
    magnitude_OGP, place_OGP = alpha_OGP.abs().sort(dim=2, descending=True, stable=True)
    turned_OGP = (alpha_OGP < 0).gather(2, place_OGP)
    codes_C = torch.arange(1 << bits, device=codes_OI.device)
    # For each code of a group, the code that stands for the same sum now.
    table_OGC = torch.zeros(*alpha_OGP.shape[:2], 1 << bits, dtype=torch.uint8, device=codes_OI.device)
    for plane in range(bits):
        bit_OGC = (codes_C >> place_OGP[:, :, plane, None] & 1) ^ turned_OGP[:, :, plane, None].long()
        table_OGC |= (bit_OGC << plane).to(torch.uint8)
    normal_OI = torch.empty_like(codes_OI)
    for group in range(alpha_OGP.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        normal_OI[:, columns] = table_OGC[:, group].gather(1, codes_OI[:, columns].long())
    return normal_OI, magnitude_OGP
