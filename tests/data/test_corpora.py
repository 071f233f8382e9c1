from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.texts import shared_path

from optgptq.bundled import bundled_path
from optgptq.data.corpora import TextSource, load_documents, source_warnings
from optgptq.errors import OptGPTQError, TextError, UsageError
from optgptq.recipe import CalibrationRecipe

ROWS = [{"text": "one", "n": 1}, {"text": "", "n": 2}, {"text": "two\nlines", "n": 3}, {"text": None, "n": 4}]
CHAT = [{"role": "user", "content": "Hi"}]


def read(source: str | Path, **settings: Any) -> list[str]:
    return list(load_documents(TextSource(source=str(source), **settings)))


def failure(source: str | Path, **settings: Any) -> OptGPTQError:
    with pytest.raises(OptGPTQError) as caught:
        read(source, **settings)
    return caught.value


def joined_roles(messages: Any) -> str:
    return " ".join(message["role"] for message in messages)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def parquet_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from datasets import Dataset

    path = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


@pytest.fixture
def saved_splits(tmp_path: Path) -> Path:
    from datasets import Dataset, DatasetDict

    path = tmp_path / "splits"
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list([{"text": "held out", "n": 0}])}
    DatasetDict(splits).save_to_disk(str(path))
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "story.TXT"
    path.write_bytes("one\r\n<|endoftext|>\n caf\u00e9 ".encode())
    assert read(path) == ["one\r\n<|endoftext|>\n caf\u00e9 "]


def test_bundled_text() -> None:
    assert read("bundled:story-evaluation") == [bundled_path("story-evaluation").read_bytes().decode()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet_file", "saved", "saved_splits"])
def test_rows_become_documents_and_empty_ones_are_passed_over(kind: str, request: pytest.FixtureRequest) -> None:
    assert read(request.getfixturevalue(kind)) == ["one", "two\nlines"]


def test_another_split(saved_splits: Path) -> None:
    assert read(saved_splits, split="test") == ["held out"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet_file", "saved", "saved_splits"])
def test_a_missing_column_lists_those_that_are_there(kind: str, request: pytest.FixtureRequest) -> None:
    error = failure(request.getfixturevalue(kind), column="body")
    assert error.expected == "a column 'body'"
    assert error.found == "the columns text, n"
    assert error.action == "Set calibration.column to one of them (--column for eval)."


@pytest.mark.parametrize("kind", ["jsonl", "parquet_file", "saved"])
def test_a_column_without_text_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    error = failure(request.getfixturevalue(kind), column="n")
    assert error.where.endswith((" line 1, column n", " row 1, column n"))
    assert (error.expected, error.found) == ("text", "a int")


def test_chat_messages_are_rendered(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"messages": CHAT * 2}, {"messages": CHAT}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "chat"))
    for name in ("chat.jsonl", "chat.parquet", "chat"):
        source = TextSource(source=str(tmp_path / name), column="messages", chat_template=True)
        assert list(load_documents(source, render_chat=joined_roles)) == ["user user", "user"]


def test_plain_text_holds_no_messages() -> None:
    error = failure("bundled:story-calibration", chat_template=True)
    assert error.expected == "rows with chat messages: .jsonl, .parquet or a data set"


def test_a_missing_split_lists_those_that_are_there(saved_splits: Path) -> None:
    error = failure(saved_splits, split="validation")
    assert (error.expected, error.found) == ("a split 'validation'", "the splits train, test")


def test_a_line_that_is_not_json_is_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "ok"}\n\n{"text": \n')
    error = failure(path)
    assert error.where == f"text {path} line 3"
    assert error.expected == "one JSON object per line"
    path.write_text('{"text": "ok"}\n["text"]\n')
    assert (failure(path).where, failure(path).found) == (f"text {path} line 2", "a JSON list")


@pytest.mark.parametrize(("name", "prefix"), [("a.txt", b"abc"), ("a.jsonl", b'{"text": "ok"}\n{"text": "')])
def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, name: str, prefix: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(prefix + b'\xe9"}\n')
    error = failure(path)
    assert (error.where, error.expected) == (f"text {path}", "UTF-8")
    assert error.found == f"byte 0xe9 at offset {len(prefix)}"


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    error = failure(tmp_path / name)
    assert isinstance(error, TextError)
    assert error.where == f"text {tmp_path / name}"
    assert error.found == "no such file or directory"


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert failure(tmp_path / "a.txt").found == "permission denied"


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_text_that_holds_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    error = failure(path)
    assert (error.expected, error.found) == ("at least one document that is not empty", "no text")


def test_an_empty_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("")
    assert failure(path).found == "no text"


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no parquet")
    assert failure(path).expected == "a Parquet file"


def test_a_folder_that_datasets_did_not_save(tmp_path: Path) -> None:
    assert failure(tmp_path).expected == "a folder written by save_to_disk of the datasets library"


def test_what_is_no_source(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text\na\n")
    error = failure(path)
    assert isinstance(error, TextError)
    assert error.expected == (
        "bundled:story-calibration, a .txt, .jsonl or .parquet file, a folder saved by datasets, or a hub id owner/name"
    )
    assert isinstance(failure("self"), UsageError)


def test_a_source_takes_its_fields_from_a_recipe() -> None:
    recipe = CalibrationRecipe(
        source="o/n", config="c", split="s", column="m", revision="r", chat_template=True, num_windows=3
    )
    assert TextSource.of(recipe) == TextSource(
        source="o/n", config="c", split="s", column="m", revision="r", chat_template=True
    )


def test_a_hub_id_without_revision_is_warned_of() -> None:
    (warning,) = source_warnings(TextSource(source="owner/name"))
    assert "owner/name is read without a pinned revision" in warning
    assert source_warnings(TextSource(source="owner/name", revision="abc")) == ()
    assert source_warnings(TextSource(source="bundled:story-calibration")) == ()


def test_web_text() -> None:
    documents = read(shared_path("text/web.jsonl"))
    assert len(documents) > 100
    assert all(documents)
