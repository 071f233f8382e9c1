"""Uniform grids: `level = scale * (code - zero_point)`, codes `0 .. max_code`.

Shapes: any that broadcast. Arithmetic is in the dtype of the weight.
"""

from __future__ import annotations

import torch

# Float16's smallest subnormal, and the largest number that bfloat16 and float16 share.
SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65280.0


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return the nearest scale that float16 and bfloat16 both hold exactly, in the dtype of the input.

    Engines keep scales in the dtype they serve in; a scale that only float16 holds would change when a model is
    served in bfloat16, after the codes were chosen for another one. Bfloat16 has the shorter mantissa and float16
    the smaller range, so rounding to the first and then to the second is exact in both. Zero and overflow are
    clamped to the smallest and largest such magnitude; the sign is kept (a negative scale turns the grid around).
    """
    rounded = scale.to(torch.bfloat16).to(torch.float32).clamp(-LARGEST_SCALE, LARGEST_SCALE)
    rounded = rounded.to(torch.float16).to(torch.float32)
    tiny = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE).to(torch.float32)
    return torch.where(rounded == 0, tiny, rounded).to(scale.dtype)


def round_(values: torch.Tensor) -> torch.Tensor:
    """Round in place to the nearest integer, halves to even, and return the tensor.

    Adding and taking away 1.5 * 2^23 (2^52 in float64) leaves no room for a fraction. Values beyond 2^22 (2^51) stay
    near themselves, so that a clamp after it is right for all. torch.round took ten times as long on the CPU.
    """
    if values.dtype not in _ROUNDING:
        return values.round_()
    return values.add_(_ROUNDING[values.dtype]).sub_(_ROUNDING[values.dtype])


_ROUNDING = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}


def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, max_code: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest codes (floats, in the grid) and the codes that would be nearest on an endless grid."""
    endless = round_(torch.div(weight, scale)).add_(zero_point)
    return endless.clamp(0, max_code), endless
