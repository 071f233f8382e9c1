"""What a page is made of, before it is HTML: sections of facts, tables, pictures, notes and listings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names with a value each."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a header.

    Attributes:
        caption: what it shows; also the line to open it by where it is folded.
        header, rows: of equally many cells.
        folded: closed until a reader opens it.
        left_out: rows that were too many for a page.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture.

    Attributes:
        svg: SVG made by `figures`, put into the page as it is.
        label: what it shows, in words, for those who do not see it.
        caption: the line below it.
        narrow: two of them fit beside each other.
    """

    kind: ClassVar[str] = "picture"
    svg: str
    label: str
    caption: str
    narrow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A paragraph; `tone` colours its edge."""

    kind: ClassVar[str] = "note"
    text: str
    tone: Literal["plain", "good", "warning", "bad"] = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Text whose lines and spaces count."""

    kind: ClassVar[str] = "listing"
    caption: str
    text: str
    folded: bool = False


Block = Facts | Table | Picture | Note | Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is below it; `identifier` is its anchor."""

    identifier: str
    title: str
    blocks: Sequence[Block]


MAX_ROWS = 1000


def shown_rows(rows: Sequence[Sequence[str]], *, limit: int = MAX_ROWS) -> tuple[Sequence[Sequence[str]], int]:
    """Return the first rows, and how many more there are."""
    return rows[:limit], max(len(rows) - limit, 0)
