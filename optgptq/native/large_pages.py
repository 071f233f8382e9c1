"""Memory in large pages, for what is read from end to end at every token.

A processor finds an address through a table of pages. With pages of 4 KiB it meets a new one after each 64 reads, which
costs a core a quarter of the memory's speed; with pages of 2 MiB, after each 32,768.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch

_LARGE_PAGE = 2 << 20


def large_page_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor to be filled; in large pages where the system has them and it spans at least one.

    Only whole large pages inside of it become such: it takes no more memory than another tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LARGE_PAGE or sys.platform != "linux":
        return torch.empty(*shape, dtype=dtype)
    try:
        area = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Addresses in front of the first whole page are never touched, so no memory stands behind them.
        offset = -torch.frombuffer(area, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
        area.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes // _LARGE_PAGE * _LARGE_PAGE)
    except OSError:  # a kernel without them, or no memory, which torch then says in its own words
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(area, dtype=torch.uint8, count=num_bytes, offset=offset).view(dtype).view(*shape)
