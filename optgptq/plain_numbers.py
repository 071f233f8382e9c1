"""What counts as a number in a file that anybody can edit."""

from __future__ import annotations

import sys
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Say whether `value` is a number that a float holds: not a boolean, NaN, infinite or a longer whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN and for whole numbers that no float holds
