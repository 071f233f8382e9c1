"""The run record: what is in it, that it is whole, and that one of another run is told and left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optgptq.checkpoint.manifest import MANIFEST_FILE, sha256_file, write_manifest
from optgptq.errors import FormatError, ModelError, OutputError
from optgptq.reports.run_record import (
    build_run_record,
    environment_record,
    read_run_record,
    record_path,
    write_run_record,
)

KEYS = {
    "run_record",
    "output",
    "manifest_sha256",
    "timings",
    "seconds",
    "peak_memory_bytes",
    "sessions",
    "phases",
    "decoder_layer_costs",
    "error_maps",
    "plan",
    "gates",
    "evaluation",
    "sample",
    "environment",
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    write_manifest(folder, {"optgptq": "0.1.0", "device": "cpu", "warnings": ["one"]})
    return folder


def test_a_record_holds_manifest_and_facts(output: Path) -> None:
    record = build_run_record(output, {"seconds": 3.5, "warnings": ["one", "two"], "gates": [{"value": float("nan")}]})
    assert set(record) >= KEYS
    assert record["run_record"] == 1
    assert record["output"] == "out"
    assert record["optgptq"] == "0.1.0"
    assert record["files"]["config.json"]["bytes"] == 2
    assert record["manifest_sha256"] == sha256_file(output / MANIFEST_FILE)
    assert (record["seconds"], record["warnings"]) == (3.5, ["one", "two"])
    assert record["gates"] == [{"value": None}]
    assert record["sessions"] == []
    assert str(output.parent) not in json.dumps(record)


def test_a_record_that_was_written_is_read_back(output: Path) -> None:
    record = build_run_record(output, {"seconds": 1.0})
    assert record_path(output) == output.with_name("out.run.json")
    write_run_record(record_path(output), record)
    assert read_run_record(output).content == record
    assert read_run_record(output, record_path(output)).content == record
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.run.json"]


def test_no_record_is_no_problem(output: Path) -> None:
    found = read_run_record(output)
    assert (dict(found.content), found.problem) == ({}, "")


def test_a_record_of_another_run_is_told_and_left_out(output: Path) -> None:
    write_run_record(record_path(output), build_run_record(output, {}))
    (output / MANIFEST_FILE).unlink()
    write_manifest(output, {"optgptq": "0.1.0", "device": "cpu", "warnings": []})
    for path in (None, record_path(output)):
        found = read_run_record(output, path)
        assert not found.content
        assert (
            found.problem
            == "out.run.json is of another run than this checkpoint (their manifests differ): it is left out."
        )


def test_a_record_without_a_hash_is_compared_by_what_both_say(output: Path) -> None:
    old = {"optgptq": "0.1.0", "device": "cpu", "warnings": ["one"], "seconds": 9.0}
    record_path(output).write_text(json.dumps(old), encoding="utf-8")
    assert read_run_record(output).content == old
    record_path(output).write_text(json.dumps({**old, "device": "cuda"}), encoding="utf-8")
    assert read_run_record(output).problem


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_record_is_told_or_refused(output: Path, content: bytes) -> None:
    record_path(output).write_bytes(content)
    found = read_run_record(output)
    assert not found.content
    assert found.problem.startswith("out.run.json cannot be read (")
    with pytest.raises(FormatError, match="a run record: a JSON object"):
        read_run_record(output, record_path(output))


def test_a_named_record_that_is_missing_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.json"):
        read_run_record(output, tmp_path / "none.json")


def test_a_checkpoint_without_manifest_has_no_record(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=MANIFEST_FILE):
        build_run_record(tmp_path, {})
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    assert read_run_record(tmp_path, tmp_path / "x.json").problem


def test_a_record_that_cannot_be_written_leaves_the_old_one(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = record_path(output)
    write_run_record(place, {"a": 1})

    def fail(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        write_run_record(place, {"a": 2})
    assert json.loads(place.read_text(encoding="utf-8")) == {"a": 1}
    assert [path.name for path in output.parent.iterdir() if "partial" in path.name] == []


def test_text_that_utf8_does_not_have_is_written(tmp_path: Path) -> None:
    write_run_record(tmp_path / "r.json", {"name": "a\ud800b"})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"name": "a?b"}


def test_the_environment_names_no_path() -> None:
    record = environment_record("cpu")
    assert set(record) == {
        "python",
        "torch",
        "transformers",
        "optgptq",
        "platform",
        "processor",
        "threads",
        "memory_bytes",
        "device",
    }
    assert all(value for value in record.values())
    assert not any("/" in str(value) for key, value in record.items() if key != "processor")
