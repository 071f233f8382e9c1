"""Which keys each token of a step reads exactly, for all tokens at once.

Shapes: `T` tokens of the step.
"""

from __future__ import annotations

import numpy as np

from optgptq.kv_cache.scheme import PastRule

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


def first_exact_keys(past: PastRule, position_T: Numbers, begin_T: Numbers) -> Numbers:
    """Return `past.first_exact` of each token at `position_T` whose part of the step begins at `begin_T`."""
    if past.mode == "off":
        first_T = position_T + 1
    elif past.mode == "chunk":
        first_T = begin_T
    elif past.mode == "window" and past.window:
        first_T = position_T - position_T % past.window
    else:
        first_T = position_T
    if past.recent_tokens:
        first_T = np.minimum(first_T, np.maximum(position_T - past.recent_tokens + 1, 0))
    return first_T - first_T % past.granule
