"""What two jobs differ in is found and named; files are known again by size, time and inode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.quantizable import wide_llama, write_model

from optgptq import job_key
from optgptq.checkpoint.folder import CheckpointFolder
from optgptq.errors import ModelError, OutputError
from optgptq.job_key import begin_or_go_on, describe_source, differences, require_unchanged
from optgptq.journal.store import open_journal

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_there_is_a_difference_exactly_where_two_values_differ(first: Any, second: Any) -> None:
    assert bool(list(differences(first, second))) == (first != second)
    assert list(differences(first, first)) == []


def test_differences_have_places() -> None:
    older = {"recipe": {"weights": {"bits": 4, "rules": [{"bits": 2}]}, "gone": 1}, "torch": "2.12"}
    newer = {"recipe": {"weights": {"bits": 3, "rules": [{"bits": 8}]}, "new": 1}, "torch": "2.13"}
    assert list(differences(older, newer)) == [
        "recipe.gone is gone",
        "recipe.new is new",
        "recipe.weights.bits was 4, is 3",
        "recipe.weights.rules.0.bits was 2, is 8",
        "torch was 2.12, is 2.13",
    ]


def test_at_most_five_differences_are_told(tmp_path: Path) -> None:
    files = {"config.json": {"sha256": "x", "bytes": 1, "mtime_ns": 1, "inode": 1}}
    settings: dict[str, Any] = {"num_layers": 2, "restart": False, "is_done": False}
    with open_journal(tmp_path / "work") as journal:
        begin_or_go_on(journal, {"values": list(range(8))}, files, **settings)
        journal.put("layer-00000", {}, {})
        with pytest.raises(OutputError, match=r"values\.4 was 4, is 5; and 3 more") as caught:
            begin_or_go_on(journal, {"values": list(range(1, 9))}, files, **settings)
        assert "pass --restart to drop its finished decoder layer" in caught.value.action
        begin_or_go_on(journal, {"values": []}, files, **{**settings, "is_done": True})
        assert journal.is_empty


def test_files_that_are_known_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(wide_llama(), tmp_path / "model")
    hashed: list[str] = []
    real = job_key.sha256_file

    def hashing(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(job_key, "sha256_file", hashing)
    folder = CheckpointFolder.open(model)
    with open_journal(tmp_path / "work") as journal:
        files = describe_source(folder, journal)
        assert sorted(hashed) == sorted(files)
        begin_or_go_on(journal, {"a": 1}, files, num_layers=2, restart=False, is_done=False)
        hashed.clear()
        assert describe_source(folder, journal) == files
        assert hashed == []
        os.utime(model / "config.json", ns=(5, 5))
        again = describe_source(folder, journal)
        assert hashed == ["config.json"]
        assert again["config.json"]["sha256"] == files["config.json"]["sha256"]
        journal.put("step", {}, {})
        begin_or_go_on(journal, {"a": 1}, again, num_layers=2, restart=False, is_done=False)
        hashed.clear()
        assert describe_source(folder, journal) == again
        assert hashed == []
        assert journal.get("step") is not None
        require_unchanged(folder, again)
        require_unchanged(folder, files)
        (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")
        with pytest.raises(ModelError, match=r"config\.json"):
            require_unchanged(folder, files)
