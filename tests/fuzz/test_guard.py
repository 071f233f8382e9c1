"""The guard sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.fuzzing import guard
from support.fuzzing.case import CaseFolder
from support.fuzzing.guard import Watch, memory_limit, run_guarded, start_watch

from optgptq.errors import GateError, ModelError


@pytest.fixture(scope="module")
def watch() -> Watch:
    return start_watch()


@pytest.fixture
def folder(tmp_path: Path) -> CaseFolder:
    (tmp_path / "secret.txt").write_text("outside")
    return CaseFolder(tmp_path / "given", {"a.txt": b"one", "sub/b.txt": b"two"})


def refuse(error: type[ModelError] | type[GateError], found: str) -> None:
    raise error("a place", expected="something", found=found, action="Do it.")


def test_a_refusal_has_an_exit_code_and_four_parts(folder, watch):
    def outcome(error: type[ModelError] | type[GateError], found: str) -> guard.Outcome:
        return run_guarded(lambda: refuse(error, found), folder.path, watch)

    assert outcome(ModelError, "nothing") == guard.Outcome(kind="refused", detail="3")
    assert outcome(GateError, "nothing").kind == "bad message"
    assert outcome(ModelError, "x" * 30_000).kind == "bad message"
    assert not outcome(ModelError, " ").is_fault  # the error itself finds words for what is blank


def test_other_exceptions_hangs_and_panics_are_faults(folder, watch, monkeypatch):
    assert run_guarded(lambda: 1 / 0, folder.path, watch).kind == "crash"

    def leave() -> None:
        raise SystemExit(3)

    assert run_guarded(leave, folder.path, watch).detail == "SystemExit: 3"
    monkeypatch.setattr(guard, "SECONDS_PER_INPUT", 0.05)

    def loop() -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - the limit must pass such a handler
                continue

    assert run_guarded(loop, folder.path, watch).kind == "hang"


def test_files_outside_are_seen_and_those_of_the_folder_are_not(folder, watch):
    inside = folder.path / "a.txt"
    (folder.path / "link").symlink_to("../secret.txt")
    calls = {
        "read": lambda: (folder.path.parent / "secret.txt").read_text(),
        "through a link": lambda: (folder.path / "link").read_text(),
        "with dots": lambda: (folder.path / "sub" / ".." / ".." / "secret.txt").read_text(),
        "write": lambda: (folder.path.parent / "new").write_text("x"),
        "list": lambda: os.listdir(folder.path.parent),
        "command": lambda: subprocess.run(["true"], check=True),
    }
    for name, call in calls.items():
        assert run_guarded(call, folder.path, watch).kind == "outside", name
    for call in (inside.read_text, lambda: os.listdir(folder.path), lambda: inside.write_text("x")):
        assert run_guarded(call, folder.path, watch).kind == "done"
    assert not watch.is_on


def test_memory_is_limited_and_the_limit_goes_away(folder, watch):
    with memory_limit(1 << 28):
        outcome = run_guarded(lambda: torch.empty(1 << 31, dtype=torch.uint8), folder.path, watch)
    assert outcome.kind == "crash"
    assert run_guarded(lambda: torch.empty(1 << 31, dtype=torch.uint8), folder.path, watch).kind == "done"


def test_a_folder_is_mended(folder):
    folder.put("a.txt", b"other")
    folder.put("new.txt", b"new")
    folder.drop("sub/b.txt")
    folder.mend()
    files = sorted(path for path in folder.path.rglob("*") if path.is_file())
    assert {path.name: path.read_bytes() for path in files} == {"a.txt": b"one", "b.txt": b"two"}
