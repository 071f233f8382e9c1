"""An output appears complete or not at all, and nothing old is lost."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import FrameType

import pytest

from optgptq.checkpoint import disk
from optgptq.checkpoint.exchange import exchange
from optgptq.checkpoint.publish import require_disk_space, staging_folder
from optgptq.errors import CapacityError, ExitCode, OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_old(output: Path) -> Path:
    output.mkdir()
    (output / "config.json").write_text("old")
    return output


def test_publish_makes_the_folder_appear(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staging_folder(output, overwrite=False) as staging:
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "file").write_text("new")
        assert staging.path.parent == tmp_path
        assert staging.path.name == ".out.partial"
        assert not output.exists()
        staging.publish()
    assert names(tmp_path) == ["out"]
    assert (output / "sub" / "file").read_text() == "new"


def test_published_folder_has_the_permissions_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staging_folder(tmp_path / "out", overwrite=False) as staging:
        staging.publish()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, None])
def test_nothing_is_left_without_publish(tmp_path: Path, error: type[BaseException] | None) -> None:
    def work() -> None:
        with staging_folder(tmp_path / "out", overwrite=False) as staging:
            (staging.path / "half").write_text("x")
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    make_old(tmp_path / "out")
    with (
        pytest.raises(OutputError, match="pass --overwrite") as caught,
        staging_folder(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("work began")
    assert caught.value.exit_code == ExitCode.INPUT
    assert names(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_one_until_the_new_one_is_complete(tmp_path: Path) -> None:
    output = make_old(tmp_path / "out")
    with staging_folder(output, overwrite=True) as staging:
        (staging.path / "config.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
        staging.publish()
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_failed_job_leaves_the_old_output(tmp_path: Path) -> None:
    output = make_old(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), staging_folder(output, overwrite=True):
        raise KeyboardInterrupt
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_old_output_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = make_old(tmp_path / "out")
    rename = os.rename

    def refuse_the_new_one(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise error
        rename(source, target)

    monkeypatch.setattr("optgptq.checkpoint.publish.exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", refuse_the_new_one)
    with (
        pytest.raises((OutputError, KeyboardInterrupt)),
        staging_folder(output, overwrite=True) as staging,
    ):
        staging.publish()
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_output_is_replaced_whether_or_not_the_system_can_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    output = make_old(tmp_path / "out")
    if not can_exchange:
        monkeypatch.setattr("optgptq.checkpoint.publish.exchange", lambda first, second: False)
    with staging_folder(output, overwrite=True) as staging:
        (staging.path / "config.json").write_text("new")
        staging.publish()
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_exchange_changes_two_names(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make_old(first)
    second.mkdir()
    if not exchange(first, second):
        pytest.skip("this file system cannot exchange two names")
    assert names(first) == []
    assert names(second) == ["config.json"]
    with pytest.raises(OSError, match="No such file"):
        exchange(first, tmp_path / "third")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("replaces", [True, False])
def test_a_request_to_stop_waits_for_the_publishing_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, replaces: bool
) -> None:
    output = tmp_path / "out"
    if replaces:
        make_old(output)
    place = "optgptq.checkpoint.publish.exchange" if replaces else "os.rename"
    real = exchange if replaces else os.rename
    seen: list[str] = []

    def stop(asked: int, frame: FrameType | None) -> None:
        del frame
        seen.append(signal.Signals(asked).name)
        raise KeyboardInterrupt

    def interrupted(first: Path, second: Path) -> bool | None:
        os.kill(os.getpid(), number)
        done = real(first, second)
        os.kill(os.getpid(), number)
        assert seen == []
        return done

    previous = signal.signal(number, stop)

    def make() -> None:
        with staging_folder(output, overwrite=True) as staging:
            (staging.path / "config.json").write_text("new")
            staging.publish()

    try:
        monkeypatch.setattr(place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
    finally:
        signal.signal(number, previous)
    assert seen == [number.name]
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_what_a_dead_process_left_is_put_right(tmp_path: Path) -> None:
    aside = make_old(tmp_path / ".out.replaced")
    make_old(tmp_path / ".out.partial")
    with (
        pytest.raises(OutputError, match="one that exists"),
        staging_folder(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("work began")
    assert not aside.exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    make_old(aside)
    with staging_folder(tmp_path / "out", overwrite=True) as staging:
        (staging.path / "config.json").write_text("new")
        staging.publish()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_one_process_works_on_an_output(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "out", overwrite=False):
        with (
            pytest.raises(OutputError, match="another one that is at work"),
            staging_folder(tmp_path / "out", overwrite=False),
        ):
            pytest.fail("work began")
        with staging_folder(tmp_path / "other", overwrite=False):
            pass
    assert names(tmp_path) == []


def test_output_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staging_folder(output, overwrite=False) as staging:
        make_old(output)
        with pytest.raises(OutputError, match="one that exists"):
            staging.publish()
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder of something else", "symlink"])
def test_only_checkpoints_are_overwritten(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    elif kind == "symlink":
        output.symlink_to(make_old(tmp_path / "target"))
    else:
        output.mkdir()
        (output / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="an older checkpoint"), staging_folder(output, overwrite=True):
        pytest.fail("work began")


def test_empty_folder_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staging_folder(tmp_path / "out", overwrite=True) as staging:
        (staging.path / "file").write_text("new")
        staging.publish()
    assert names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("output", ["model", "model/out", "."])
def test_source_and_output_must_lie_apart(tmp_path: Path, output: str) -> None:
    source = make_old(tmp_path / "model")
    with (
        pytest.raises(OutputError, match="apart from the source"),
        staging_folder(tmp_path / output, overwrite=True, source=source),
    ):
        pytest.fail("work began")
    assert names(source) == ["config.json"]


def test_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Create it first"), staging_folder(tmp_path / "a" / "b", overwrite=False):
        pytest.fail("work began")


def test_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"), staging_folder(tmp_path / "out", overwrite=False):
        pytest.fail("work began")


def test_full_disk_while_forcing_files_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError), staging_folder(tmp_path / "out", overwrite=False) as staging:
        staging.publish()
    assert names(tmp_path) == []


def test_disk_space_is_checked_beforehand(tmp_path: Path) -> None:
    require_disk_space(tmp_path, 1)
    with pytest.raises(CapacityError) as caught:
        require_disk_space(tmp_path, 10**18)
    assert caught.value.exit_code == ExitCode.CAPACITY
    assert caught.value.expected == "1,000,000,000,000.0 MB free for the output"


def test_every_kind_of_full_is_capacity(tmp_path: Path) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert isinstance(disk.disk_error(tmp_path, OSError(code, "full")), CapacityError)
    assert isinstance(disk.disk_error(tmp_path, OSError(errno.EROFS, "read-only")), OutputError)
