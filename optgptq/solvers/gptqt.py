"""GPTQT as published, the method that binary codes are measured against.

Each row, or group, is quantized linearly to a few more bits; the whole numbers are then put on a binary code, and the
scale is explored again for it. The search weighs all weights alike, and nothing is fitted afterwards.
Source: GPTQT (arXiv 2407.02891), as far as its abstract tells; the rest is reconstructed (docs/math/binary-codes.md).
"""

from __future__ import annotations

from dataclasses import replace

from optgptq.grids.binary_settings import BinarySettings


def as_published(settings: BinarySettings) -> BinarySettings:
    """Return the settings of the published method; the width of the whole numbers is the caller's."""
    return replace(settings, weighting="none", uniform_start=False, refits=0, sweeps=0, coefficients="float")
