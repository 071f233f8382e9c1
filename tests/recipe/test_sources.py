from __future__ import annotations

from pathlib import Path

import pytest

from optgptq.recipe.sources import source_for_record, source_kind


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("self", "self"),
        ("bundled:story-calibration", "bundled"),
        ("text.txt", "text"),
        ("some/where/TEXT.TXT", "text"),
        ("chat.jsonl", "jsonl"),
        ("owner/rows.parquet", "parquet"),
        ("owner/name", "hub"),
        ("owner/name.v1-x_y", "hub"),
        ("wikitext", "unknown"),
        ("/absent/folder", "unknown"),
        ("a/b/c", "unknown"),
        ("../text", "unknown"),
        ("text.csv", "unknown"),
    ],
)
def test_kinds_by_spelling(source: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_kind(source) == kind


def test_what_exists_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    (tmp_path / "owner" / "file").write_text("")
    assert source_kind("owner/folder") == "saved_dataset"
    assert source_kind("owner/file") == "unknown"


def test_records_name_no_local_folder(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    assert source_for_record(str(tmp_path / "saved")) == "saved"
    assert source_for_record("/home/someone/text.txt") == "text.txt"
    assert source_for_record("/home/someone/absent") == "absent"
    for source in ("self", "bundled:story-calibration", "owner/name"):
        assert source_for_record(source) == source
