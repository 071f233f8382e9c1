"""ALiBi slopes. The families agree for powers of two and differ in which slopes other numbers of heads get.

Source: Press et al., ALiBi, arXiv 2108.12409, section 3, and the authors' `get_slopes` for other head counts.
"""

from __future__ import annotations

import struct


def interpolated_slopes(num_heads: int) -> tuple[float, ...]:
    """Return the slopes of BLOOM and Falcon: those of the next smaller power of two, then every other of the larger."""
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(whole, range(1, whole + 1))
    return slopes + _geometric(2 * whole, range(1, 2 * (num_heads - whole) + 1, 2))


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """Return the slopes of MPT: every other slope of the next larger power of two first, then the rest."""
    whole = 1 << (num_heads - 1).bit_length()
    slopes = tuple(2.0 ** (-8.0 * power / whole) for power in range(1, whole + 1))
    return slopes if whole == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]


def _geometric(num_heads: int, powers: range) -> tuple[float, ...]:
    # The base is rounded to float32 before it is raised, as the models were trained.
    (base,) = struct.unpack("f", struct.pack("f", 2.0 ** (-8.0 / num_heads)))
    return tuple(base**power for power in powers)
