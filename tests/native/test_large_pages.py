"""Memory in large pages is memory like any other: its size, its numbers and its end."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from optgptq.native import large_pages
from optgptq.native.large_pages import large_page_empty
from optgptq.native.row_tiles import pack_row_tiles, stack_row_tiles

LARGE = 2 << 20
SMAPS = Path("/proc/self/smaps_rollup")


class Refusing(mmap.mmap):
    """Memory of a kernel without large pages."""

    def madvise(self, *_: int) -> None:
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("num_bytes", [0, 1, LARGE - 4, LARGE, LARGE + 4, 3 * LARGE - 4, 5 * LARGE])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_it_has_the_shape_and_keeps_numbers(num_bytes: int, dtype: torch.dtype) -> None:
    size = num_bytes // dtype.itemsize
    tensor, other = (large_page_empty((1, size), dtype) for _ in range(2))
    assert tensor.shape == (1, size)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    tensor.fill_(3)
    other.fill_(5)
    assert bool((tensor == 3).all())
    assert bool((other == 5).all())


def test_it_begins_with_a_large_page() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux is asked for large pages")
    assert large_page_empty((LARGE,), torch.uint8).data_ptr() % LARGE == 0


@pytest.mark.skipif(not SMAPS.exists(), reason="needs the memory map of the process")
def test_only_what_is_used_takes_memory_and_all_of_it_is_given_back() -> None:
    before = resident_kilobytes()
    tensor = large_page_empty((9 * LARGE + LARGE // 2,), torch.uint8).fill_(1)
    assert resident_kilobytes() - before < 10 * LARGE // 1024
    del tensor
    assert resident_kilobytes() - before < LARGE // 1024


def resident_kilobytes() -> int:
    lines = SMAPS.read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_a_part_keeps_the_memory() -> None:
    part = large_page_empty((2, LARGE), torch.uint8).fill_(7)[1, -4:]
    assert part.tolist() == [7, 7, 7, 7]


def no_memory(*_: object, **__: object) -> mmap.mmap:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("memory", [Refusing, no_memory])
def test_where_large_pages_are_refused_others_are_given(memory: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages.mmap, "mmap", memory)
    assert large_page_empty((LARGE,), torch.uint8).fill_(1).sum() == LARGE


@pytest.mark.parametrize("rows", [(16,), (16, 48, 32), (4096, 1024, 4096)])
def test_stacked_tiles_are_one_below_the_other(rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(16, (count, 1024), generator=generator, dtype=torch.uint8) for count in rows]
    stacked = stack_row_tiles([pack_row_tiles(part, 4) for part in parts])
    assert torch.equal(stacked, pack_row_tiles(torch.cat(parts), 4))
