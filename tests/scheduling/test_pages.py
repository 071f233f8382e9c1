"""The pages of one group against a list, a dictionary and no cleverness."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optgptq.scheduling.pages import PageAllocator

NUM_PAGES = 6
NAMES = [b"a", b"b", b"c"]


class SlowPages:
    """Who holds what as a list of holds, and the free pages in the order in which they go."""

    def __init__(self) -> None:
        self.holds: list[int] = []
        self.names: dict[int, bytes] = {}
        self.free = list(range(1, NUM_PAGES))

    def allocate(self) -> int:
        page = self.free.pop(0)
        self.names.pop(page, None)
        self.holds.append(page)
        return page

    def hold(self, page: int) -> None:
        if page in self.free:
            self.free.remove(page)
        self.holds.append(page)

    def release(self, page: int) -> None:
        self.holds.remove(page)
        if page not in self.holds:
            self.free.insert(len(self.free) if page in self.names else 0, page)

    def commit(self, page: int, name: bytes) -> None:
        if name not in self.names.values():
            self.names[page] = name

    def find(self, name: bytes) -> int | None:
        return next((page for page, other in self.names.items() if other == name), None)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "release", "commit", "find and hold"]), st.integers(0, 20)), max_size=60
)


@given(ACTIONS)
def test_the_allocator_does_what_the_slow_one_does(actions: list[tuple[str, int]]) -> None:
    fast, slow = PageAllocator(NUM_PAGES), SlowPages()
    for action, number in actions:
        name = NAMES[number % len(NAMES)]
        if action == "allocate" and slow.free:
            assert fast.allocate() == slow.allocate()
        elif action == "find and hold":
            page = fast.find(name)
            assert page == slow.find(name)
            if page is not None:
                fast.hold(page)
                slow.hold(page)
        elif slow.holds:
            page = slow.holds[number % len(slow.holds)]
            if action == "release":
                fast.release(page)
                slow.release(page)
            elif action == "commit" and page not in slow.names:
                fast.commit(page, name)
                slow.commit(page, name)
        assert fast.num_free == len(slow.free)
        assert fast.num_used == len(set(slow.holds))
        assert [fast.num_references(page) for page in range(NUM_PAGES)] == [
            slow.holds.count(page) for page in range(NUM_PAGES)
        ]
        assert [fast.find(name) for name in NAMES] == [slow.find(name) for name in NAMES]


def test_the_page_left_longest_ago_goes_first_and_one_without_a_name_before_all() -> None:
    pages = PageAllocator(4)
    first, second, third = (pages.allocate() for _ in range(3))
    pages.commit(first, b"first")
    pages.commit(second, b"second")
    for page in (second, first, third):
        pages.release(page)
    assert [pages.allocate() for _ in range(3)] == [third, second, first]
    assert pages.find(b"first") is None


def test_page_0_is_never_handed_out() -> None:
    pages = PageAllocator(3)
    assert {pages.allocate(), pages.allocate()} == {1, 2}
    assert pages.num_free == 0


def test_filled_slots_count_while_somebody_holds_the_page() -> None:
    pages = PageAllocator(3)
    page = pages.allocate()
    pages.commit(page, b"name")
    pages.fill(page, 3)
    pages.fill(page, 4)
    pages.hold(page)
    assert pages.num_filled_slots == 4
    pages.release(page)
    pages.release(page)
    assert (pages.num_filled_slots, pages.peak_filled_slots, pages.peak_used) == (0, 4, 1)
    pages.hold(page)
    assert pages.num_filled_slots == 4
