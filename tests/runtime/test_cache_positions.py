"""First exact keys of all tokens at once, beside the rule for one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optgptq.kv_cache.scheme import PastRule
from optgptq.runtime.cache_positions import first_exact_keys

RULES = st.builds(
    PastRule,
    mode=st.sampled_from(["off", "token", "chunk", "window"]),
    window=st.integers(0, 40),
    sink_tokens=st.integers(0, 5),
    recent_tokens=st.integers(0, 30),
    granule=st.sampled_from([1, 3, 16]),
)


@given(past=RULES, parts=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=4))
def test_all_at_once_is_one_by_one(past, parts) -> None:
    positions = np.concatenate([np.arange(begin, begin + size) for begin, size in parts])
    begins = np.concatenate([np.full(size, begin) for begin, size in parts])
    expected = [past.first_exact(int(place), int(begin)) for place, begin in zip(positions, begins, strict=True)]
    assert first_exact_keys(past, positions, begins).tolist() == expected
