"""Settings of a scheduler: what is refused, and what follows from them."""

from __future__ import annotations

import pytest
from support.scheduled import Group, settings

from optgptq.errors import UsageError
from optgptq.scheduling.settings import PageGroup


@pytest.mark.parametrize(
    ("changes", "field", "expected", "found"),
    [
        ({"page_size": 0}, "page_size", "1 or more", "0"),
        ({"groups": ()}, "number of groups", "1 or more", "0"),
        ({"max_length": 1}, "max_length", "2 or more", "1"),
        ({"max_running": 0}, "max_running", "1 or more", "0"),
        ({"max_waiting": 0}, "max_waiting", "1 or more", "0"),
        ({"aging_steps": 0}, "aging_steps", "1 or more", "0"),
        ({"max_running": 9, "max_step_tokens": 8}, "max_step_tokens", "max_running = 9 or more", "8"),
        ({"watermark_ratio": 1.0}, "watermark_ratio", "0 to below 1", "1.0"),
        ({"watermark_ratio": -0.1}, "watermark_ratio", "0 to below 1", "-0.1"),
        ({"groups": (PageGroup(num_pages=1, window=None),)}, "num_pages", "2 or more", "1"),
        ({"groups": (PageGroup(num_pages=2, window=0),)}, "window", "1 or more", "0"),
        ({"groups": (PageGroup(num_pages=2, window=-1, num_sinks=4),)}, "window", "0 or more", "-1"),
        ({"groups": (PageGroup(num_pages=2, window=3, num_sinks=-1),)}, "num_sinks", "0 or more", "-1"),
        (
            {"groups": (PageGroup(num_pages=2, window=None, num_sinks=4),)},
            "num_sinks",
            "0 where there is no window",
            "4",
        ),
        ({"restart_lengths": (8, 8)}, "restart_lengths", "ascending lengths of 1 or more", "(8, 8)"),
        ({"restart_lengths": (0,)}, "restart_lengths", "ascending lengths of 1 or more", "(0,)"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object], field: str, expected: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(**changes)
    assert str(caught.value) == (
        f"scheduler setting {field}: expected {expected}, found {found}. Correct this setting of the engine."
    )


@pytest.mark.parametrize(
    ("groups", "longest"),
    [
        (((3, None),), 13),
        (((30, None),), 64),
        (((3, None), (5, None)), 13),
        (((2, 5),), 64),
        (((1, 5),), 5),
        (((2, 6),), 9),
        (((3, 6),), 64),
        (((1, 1), (2, None)), 9),
        (((1, 0, 4),), 64),
        (((1, 0, 5),), 5),
        (((2, 0, 5),), 64),
        (((2, 5, 4),), 9),
        (((3, 5, 4),), 64),
    ],
)
def test_the_longest_sequence_is_what_the_smallest_group_holds(groups: tuple[Group, ...], longest: int) -> None:
    assert settings(*groups).longest == longest


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9])
def test_the_most_visible_pages_are_those_of_the_worst_position(window: int) -> None:
    group = PageGroup(num_pages=9, window=window)
    most = max(position // 4 - group.first_visible_page(position, 4) + 1 for position in range(40))
    assert group.most_visible_pages(4) == most
    assert PageGroup(num_pages=9, window=None).most_visible_pages(4) is None


@pytest.mark.parametrize("window", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("num_sinks", [1, 4, 5])
def test_sinks_are_visible_besides(window: int, num_sinks: int) -> None:
    group = PageGroup(num_pages=9, window=window, num_sinks=num_sinks)
    seen = [
        {key // 4 for key in range(query + 1) if key < num_sinks or (window and key > query - window)}
        for query in range(40)
    ]
    assert group.most_visible_pages(4) == max(map(len, seen))


def test_the_restart_level_counts_the_lengths_that_are_exceeded() -> None:
    limits = settings(restart_lengths=(8, 20))
    assert [limits.restart_level(length) for length in (8, 9, 20, 21)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("groups", "chunk"),
    [(((9, None),), 64), (((5, 6),), 8), (((5, 6, 4),), 4), (((3, 0, 9),), 64), (((9, None), (1, 0, 4)), 64)],
)
def test_a_first_chunk_is_bounded_by_windows_alone(groups: tuple[Group, ...], chunk: int) -> None:
    assert settings(*groups).largest_first_chunk == chunk
