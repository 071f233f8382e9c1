"""Names of full pages: a digest of everything that the keys and values in them depend on.

The digest of a page covers its tokens and, through its parent, all tokens before, so equal digests mean equal contents.
SHA-256, because whoever finds two texts with one digest could read or replace the pages of somebody else.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

# Different first bytes: no salt can be made to look like a page.
_ROOT = b"\0"
_PAGE = b"\1"


def root_digest(salt: bytes, restart_level: int) -> bytes:
    """Return the parent of a first page; the restart level decides the rotary frequencies of all its keys."""
    return sha256(_ROOT + restart_level.to_bytes(8, "little") + salt).digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of a full page with these tokens after the page called `parent`."""
    return sha256(_PAGE + parent + array("q", token_ids).tobytes()).digest()
