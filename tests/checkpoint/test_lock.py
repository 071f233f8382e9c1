"""One holder at a time, also where the folder goes and comes meanwhile."""

from __future__ import annotations

import errno
import fcntl
import logging
import threading
from pathlib import Path

import pytest

from optgptq.checkpoint.lock import hold_lock, work_folder
from optgptq.errors import OutputError


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
    holders = 0
    most = 0
    done = 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal holders, most, done
        for _ in range(60):
            try:
                with hold_lock(tmp_path / "work"):
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
    assert not (tmp_path / "work").exists()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING), hold_lock(tmp_path / "work"):
        pass
    assert "the file system has no locks" in caplog.text


def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError), hold_lock(tmp_path / "absent" / "work"):
        pytest.fail("no lock is possible")
