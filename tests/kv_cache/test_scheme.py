"""Which keys a query reads exactly, by definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.errors import UsageError
from optgptq.kv_cache.scheme import CacheScheme, LayerScheme, PastMode, PastRule, SideScheme, parse_past_mode


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (PastRule(mode="off"), 51),
        (PastRule(mode="token"), 50),
        (PastRule(mode="chunk"), 43),
        (PastRule(mode="window", window=16), 48),
        (PastRule(mode="window", window=64), 0),
        (PastRule(mode="token", recent_tokens=11), 40),
        (PastRule(mode="off", recent_tokens=1), 50),
        (PastRule(mode="off", recent_tokens=90), 0),
        (PastRule(mode="chunk", recent_tokens=3), 43),
        (PastRule(mode="chunk", granule=16), 32),
        (PastRule(mode="off", granule=17), 51),
        (PastRule(mode="off", granule=16), 48),
    ],
)
def test_the_query_at_50_of_a_step_from_43(rule: PastRule, expected: int) -> None:
    assert rule.first_exact(50, 43) == expected


@given(
    mode=st.sampled_from(["off", "token", "chunk", "window"]),
    window=st.integers(1, 40),
    recent=st.integers(0, 40),
    granule=st.sampled_from([1, 4, 16]),
    begin=st.integers(0, 100),
    ahead=st.integers(0, 60),
)
def test_what_a_query_reads_exactly(
    mode: PastMode, window: int, recent: int, granule: int, begin: int, ahead: int
) -> None:
    rule = PastRule(
        mode=mode, window=window if mode == "window" else 0, recent_tokens=recent, granule=granule, sink_tokens=3
    )
    position = begin + ahead
    first = rule.first_exact(position, begin)
    assert 0 <= first <= position + 1
    assert first % granule == 0
    assert all(first <= place for place in range(max(0, position - recent + 1), position + 1))
    # What is exact and not of this step lies in the kept window of the first query.
    assert all(place > begin - rule.kept_window for place in range(first, begin))
    if not rule.depends_on_steps:
        assert first == rule.first_exact(position, position)
    # An earlier query of the same step reads no later key from codes than this one.
    assert rule.first_exact(max(position - 1, begin), begin) <= first


def test_what_needs_no_exact_pages() -> None:
    assert [PastRule(mode=mode).kept_window for mode in ("off", "token", "chunk")] == [0, 0, 0]
    assert PastRule(mode="window", window=64).kept_window == 64
    assert PastRule(mode="chunk", granule=16).kept_window == 16


def test_names() -> None:
    assert parse_past_mode("chunk") == ("chunk", 0)
    mode, window = parse_past_mode("window:64")
    assert PastRule(mode=mode, window=window).name == "window:64"
    assert PastRule(mode="off").name == "off"


@pytest.mark.parametrize("text", ["", "all", "window", "window:0", "window:-3", "token:2", "chunk:"])
def test_other_modes_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_past_mode(text)
    assert error.value.where == "past_only"
    assert error.value.expected == "off, token, chunk or window:N with N of 1 or more"
    assert error.value.found == repr(text)
    assert error.value.action == "Correct the mode of the KV cache."


def test_a_scheme_is_exact_where_all_layers_are() -> None:
    exact = LayerScheme(keys=SideScheme(), values=SideScheme())
    half = LayerScheme(keys=SideScheme(bits=4, group_size=8), values=SideScheme())
    assert CacheScheme(layers=(exact, exact)).is_exact
    assert not CacheScheme(layers=(exact, half)).is_exact
