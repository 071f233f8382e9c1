"""One holder at a time, also where the folder goes and comes meanwhile."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from optgptq.checkpoint.holder import HOLDER_FILE
from optgptq.checkpoint.lock import LOCK_FILE, hold_lock, work_folder
from optgptq.errors import OutputError
from optgptq.journal.store import open_journal


def test_the_folder_comes_and_goes_with_the_lock(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    assert folder == tmp_path / ".out.work"
    with hold_lock(folder):
        assert folder.is_dir()
    assert not folder.exists()
    with hold_lock(folder):
        (folder / "kept").write_text("x")
    assert (folder / "kept").exists()


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "work"), pytest.raises(OutputError, match="another one"), hold_lock(tmp_path / "work"):
        pytest.fail("two holders")
    with hold_lock(tmp_path / "work"):
        pass


def test_many_threads_never_hold_it_together(tmp_path: Path) -> None:
    assert_never_together(tmp_path / "work")


def assert_never_together(folder: Path) -> None:
    """Assert that of four threads that try it again and again one at most has the lock."""
    holders = 0
    most = 0
    done = 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal holders, most, done
        for _ in range(60):
            try:
                with hold_lock(folder):
                    with guard:
                        holders += 1
                        most = max(most, holders)
                    with guard:
                        holders -= 1
                        done += 1
            except OutputError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert done > 0
    assert not folder.exists()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)


@pytest.mark.usefixtures("without_locks")
class TestWithoutLocks:
    """A file says who holds the lock."""

    def test_it_comes_and_goes(self, tmp_path: Path) -> None:
        with hold_lock(tmp_path / "work"):
            held = json.loads((tmp_path / "work" / HOLDER_FILE).read_bytes())
            assert held["pid"] == os.getpid()
        assert not (tmp_path / "work").exists()
        with hold_lock(tmp_path / "work"):
            (tmp_path / "work" / "kept").write_text("x")
        assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["kept", LOCK_FILE]

    def test_a_second_holder_is_refused(self, tmp_path: Path) -> None:
        with hold_lock(tmp_path / "work"):
            with pytest.raises(OutputError, match="another one that is at work"), hold_lock(tmp_path / "work"):
                pytest.fail("two holders")
            assert (tmp_path / "work" / HOLDER_FILE).exists()

    def test_a_journal_leaves_it_alone(self, tmp_path: Path) -> None:
        with open_journal(tmp_path / "work") as journal:
            journal.begin({})
            assert (tmp_path / "work" / HOLDER_FILE).exists()
        with open_journal(tmp_path / "work"):
            pass
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        "change",
        [{"boot": "another boot"}, {"pid": 2**22 + 1}, {"started": "0"}],
        ids=["other boot", "no such process", "another process of that number"],
    )
    def test_one_that_a_dead_process_left_is_taken(self, change: dict[str, Any], tmp_path: Path) -> None:
        leave(tmp_path / "work", change)
        with hold_lock(tmp_path / "work"):
            assert json.loads((tmp_path / "work" / HOLDER_FILE).read_bytes())["pid"] == os.getpid()
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"host": "elsewhere"}, "on machine elsewhere"),
            ({"host": "elsewhere", "boot": "another boot"}, "on machine elsewhere"),
            ({"namespace": "pid:[1]"}, "another container"),
            ({"pid": None}, "another container"),
        ],
    )
    def test_one_of_which_nothing_can_be_known_is_refused(
        self, change: dict[str, Any], told: str, tmp_path: Path
    ) -> None:
        leave(tmp_path / "work", change)
        with pytest.raises(OutputError, match=told) as caught, hold_lock(tmp_path / "work"):
            pytest.fail("two holders")
        assert f"remove {tmp_path / 'work' / HOLDER_FILE}" in caught.value.action
        (tmp_path / "work" / HOLDER_FILE).unlink()
        with hold_lock(tmp_path / "work"):
            pass

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
    def test_a_torn_one_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / HOLDER_FILE).write_bytes(content)
        with pytest.raises(OutputError, match="does not say whose"), hold_lock(tmp_path / "work"):
            pytest.fail("nothing is known")

    def test_many_threads_never_hold_it_together(self, tmp_path: Path) -> None:
        assert_never_together(tmp_path / "work")


def leave(folder: Path, change: dict[str, Any]) -> None:
    """Leave the file that this process would have written, but for `change`."""
    with hold_lock(folder):
        held = json.loads((folder / HOLDER_FILE).read_bytes())
    folder.mkdir()
    (folder / HOLDER_FILE).write_text(json.dumps({**held, **change}))


def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), hold_lock(tmp_path / "absent" / "work"):
        pytest.fail("no lock is possible")
