"""Work shared out among threads: torch's own team, or threads of the library; in forks, at once, and when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from optgptq.native.library import Library, load_library
from optgptq.native.team import torch_team

pytestmark = pytest.mark.skipif(load_library() is None, reason="the native library was not built")

TEAMS = [pytest.param(True, id="torch"), pytest.param(False, id="own")]


@pytest.fixture(params=TEAMS)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library, working with torch's threads or with its own, where torch has three."""
    library = load_library()
    assert library is not None
    if request.param and not library.shares_threads:
        pytest.skip("torch's threads were not found")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    library.shared.optgptq_use_team(torch_team() if request.param else None)
    yield library
    library.shared.optgptq_use_team(torch_team() if library.shares_threads else None)
    torch.set_num_threads(before)


def share_out(library: Library, num_items: int, num_threads: int, failing: int = -1) -> tuple[list[int], int]:
    places = torch.zeros(max(num_items, 1), dtype=torch.int64)
    num_workers = library.shared.optgptq_try_threads(places.data_ptr(), num_items, num_threads, failing)
    return places[:num_items].tolist(), num_workers


def test_torch_on_linux_has_a_team() -> None:
    library = load_library()
    assert library is not None
    if library.shares_threads:
        assert torch_team() is not None
    if sys.platform == "linux" and (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists():
        assert torch_team() is not None


@pytest.mark.parametrize("num_items", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 50])
def test_each_item_is_done_once(library: Library, num_items: int, num_threads: int) -> None:
    for _ in range(5):
        places, num_workers = share_out(library, num_items, num_threads)
        assert places == list(range(num_items))
        assert num_workers <= min(num_threads, max(num_items, 0))


def test_an_error_in_a_thread_is_raised_where_the_work_was_asked_for(library: Library) -> None:
    for failing in (0, 1, 500, 999):
        assert share_out(library, 1000, 3, failing)[1] == -1
        assert share_out(library, 1000, 3)[0] == list(range(1000))


def test_several_python_threads_may_work_at_once(library: Library) -> None:
    wrong: list[int] = []

    def many() -> None:
        torch.set_num_threads(3)
        wrong.extend(1 for _ in range(40) if share_out(library, 100, 3)[0] != list(range(100)))

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.parametrize("with_torch", TEAMS)
def test_the_child_of_a_fork_has_threads_of_its_own(with_torch: bool) -> None:
    """The threads of the parent are not there; waiting for them would take for ever."""
    code = f"""
import os, signal, torch
from optgptq.native.library import load_library
library = load_library()
torch.set_num_threads(3)
if not {with_torch}:
    library.shared.optgptq_use_team(None)
def work():
    places = torch.zeros(100, dtype=torch.int64)
    return library.shared.optgptq_try_threads(places.data_ptr(), 100, 3, -1) >= 1 and places[99].item() == 99
assert work()
child = os.fork()
if child == 0:
    signal.alarm(30)
    right = all(work() for _ in range(20))
    grandchild = os.fork()
    if grandchild == 0:
        signal.alarm(30)
        os._exit(0 if work() else 1)
    os._exit(0 if right and os.waitpid(grandchild, 0)[1] == 0 else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(work() for _ in range(20))
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=120)


def test_the_process_ends_while_threads_wait() -> None:
    code = """
import torch
from optgptq.native.library import load_library
library = load_library()
library.shared.optgptq_use_team(None)
places = torch.zeros(9, dtype=torch.int64)
assert library.shared.optgptq_try_threads(places.data_ptr(), 9, 3, -1) >= 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
