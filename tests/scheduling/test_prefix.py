"""Names of pages: equal for equal beginnings only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optgptq.scheduling.prefix import page_digest, root_digest


def test_the_name_depends_on_salt_level_tokens_and_everything_before() -> None:
    root = root_digest(b"", 0)
    names = [
        page_digest(root, [1, 2]),
        page_digest(root, [2, 1]),
        page_digest(root, [1, 2, 0]),
        page_digest(root_digest(b"salt", 0), [1, 2]),
        page_digest(root_digest(b"", 1), [1, 2]),
        page_digest(page_digest(root, [1, 2]), [1, 2]),
    ]
    assert len({root, *names}) == 7
    assert all(len(name) == 32 for name in names)
    assert page_digest(root_digest(b"", 0), (1, 2)) == names[0]


@given(st.binary(max_size=80), st.lists(st.integers(0, 2**40), max_size=8))
def test_no_salt_looks_like_a_page(salt: bytes, tokens: list[int]) -> None:
    assert root_digest(salt, 0) != page_digest(salt[:32].ljust(32, b"\0"), tokens)
