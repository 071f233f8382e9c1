"""The manifest names every file with its hash, finds every change, and is the same for the same job."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from optgptq.checkpoint.manifest import (
    MANIFEST_FILE,
    Problem,
    check_manifest,
    describe_files,
    read_manifest,
    sha256_file,
    write_manifest,
)
from optgptq.errors import CapacityError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "text").write_text("text")
    (path / ".hidden").write_text("hidden")
    write_manifest(path, {"optgptq": "0.1.0", "layers": [{"loss": 0.25}]})
    return path


def found(folder: Path) -> list[Problem]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return check_manifest(folder, manifest)


def test_content_and_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert list(manifest) == ["optgptq", "layers", "files"]
    digest = hashlib.sha256(b"text").hexdigest()
    assert manifest["files"]["sub/text"] == {"sha256": digest, "bytes": 4}
    assert set(manifest["files"]) == {"config.json", "sub/text"}
    assert sha256_file(folder / "sub" / "text") == digest
    assert describe_files(folder, ["sub/text"]) == {"sub/text": {"sha256": digest, "bytes": 4}}
    assert found(folder) == []


def test_same_job_gives_the_same_bytes_without_paths(folder: Path, tmp_path: Path) -> None:
    first = (folder / MANIFEST_FILE).read_bytes()
    write_manifest(folder, {"optgptq": "0.1.0", "layers": [{"loss": 0.25}]})
    assert (folder / MANIFEST_FILE).read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_changed_missing_and_added_files_are_found(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    (folder / "sub" / "text").unlink()
    (folder / "added").write_text("x")
    problems = {problem.where: problem for problem in found(folder)}
    assert problems["added"].expected == "a file listed in the manifest"
    assert problems["config.json"].found == hashlib.sha256(b"[]").hexdigest()
    assert problems["sub/text"].found == "no such file"
    assert len(problems) == 3


def test_no_manifest_and_bad_ones(folder: Path) -> None:
    assert check_manifest(folder, {"files": 3})[0].where == MANIFEST_FILE
    (folder / MANIFEST_FILE).write_text("[]")
    with pytest.raises(ModelError, match="a JSON object"):
        read_manifest(folder)
    (folder / MANIFEST_FILE).unlink()
    assert read_manifest(folder) is None


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CapacityError):
        write_manifest(folder, {})
