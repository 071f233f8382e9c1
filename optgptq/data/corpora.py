"""Named text sources to documents: bundled and local files, folders saved by `datasets`, data sets of the hub.

A `.txt` file is one document and reaches the tokenizer byte for byte; `.jsonl`, `.parquet` and data sets give one
document per row. Rows with empty text are passed over. No module of `datasets` is imported unless one is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optgptq.bundled import bundled_path
from optgptq.data import rows
from optgptq.errors import TextError, UsageError
from optgptq.recipe.calibration import CalibrationRecipe
from optgptq.recipe.sources import source_kind

RenderChat = Callable[[Sequence[Mapping[str, Any]]], str]
KNOWN_SOURCES = (
    "bundled:story-calibration, a .txt, .jsonl or .parquet file, a folder saved by datasets, or a hub id owner/name"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where text comes from; the fields mean what they mean in `CalibrationRecipe`."""

    source: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    chat_template: bool = False

    @classmethod
    def of(cls, calibration: CalibrationRecipe) -> TextSource:
        """Return the source that a recipe names."""
        return cls(
            source=calibration.source,
            config=calibration.config,
            split=calibration.split,
            column=calibration.column,
            revision=calibration.revision,
            chat_template=calibration.chat_template,
        )


def source_warnings(source: TextSource) -> tuple[str, ...]:
    """Return what a user must know about a source before it is read, in plain sentences."""
    if source_kind(source.source) == "hub" and source.revision is None:
        return (
            f"The data set {source.source} is read without a pinned revision: its text can change between runs. "
            "Set calibration.revision to a commit (--text-revision for eval).",
        )
    return ()


def load_documents(source: TextSource, *, render_chat: RenderChat | None = None) -> Iterator[str]:
    """Yield the documents of `source`, in order, none of them empty.

    Args:
        source: what to read.
        render_chat: turns chat messages into text (`Tokenizer.render_chat`); needed when `source.chat_template` is set.

    Raises:
        TextError: nothing there, not readable, not UTF-8, a row without the column, no text at all.
        UsageError: the source is `self`, which is no text that can be read.
    """
    num_documents = 0
    for document in _documents(source, render_chat):
        if document:
            num_documents += 1
            yield document
    if num_documents == 0:
        raise TextError(
            f"text {source.source}",
            expected="at least one document that is not empty",
            found="no text",
            action="Name a text that holds something, or another column of it.",
        )


def _documents(source: TextSource, render_chat: RenderChat | None) -> Iterator[str]:
    kind = source_kind(source.source)
    if kind == "self":
        raise UsageError(
            "text self",
            expected=KNOWN_SOURCES,
            found="self, the text a model writes for its own calibration",
            action="Name a text that exists.",
        )
    if kind == "unknown":
        raise TextError(
            f"text {source.source}",
            expected=KNOWN_SOURCES,
            found="none of these",
            action="Check the spelling of the path.",
        )
    path = bundled_path(source.source) if kind == "bundled" else Path(source.source)
    if kind in ("bundled", "text"):
        if source.chat_template:
            raise _needs_rows(source)
        yield rows.read_text(path)
        return
    yield from _column(_rows(kind, path, source), source, render_chat)


def _needs_rows(source: TextSource) -> TextError:
    return TextError(
        f"text {source.source}",
        expected="rows with chat messages: .jsonl, .parquet or a data set",
        found="a plain text file",
        action="Set calibration.chat_template=false, or name a source with messages.",
    )


def _rows(kind: str, path: Path, source: TextSource) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if kind == "jsonl":
        return rows.read_jsonl(path)
    if kind == "parquet":
        return rows.read_parquet(path, source.column)
    from optgptq.data import hub  # imports `datasets`, which takes seconds

    if kind == "saved_dataset":
        return hub.read_saved(path, split=source.split)
    return hub.read_hub(source.source, config=source.config, split=source.split, revision=source.revision)


def _column(
    numbered_rows: Iterable[tuple[str, Mapping[str, Any]]], source: TextSource, render_chat: RenderChat | None
) -> Iterator[str]:
    for where, row in numbered_rows:
        if source.column not in row:
            raise rows.missing_column(where, source.column, list(row))
        value = row[source.column]
        if value is None:
            continue
        if source.chat_template:
            if render_chat is None:
                raise ValueError("a source with chat messages needs render_chat")
            yield render_chat(value)
        elif isinstance(value, str):
            yield value
        else:
            raise TextError(
                f"{where}, column {source.column}",
                expected="text",
                found=f"a {type(value).__name__}",
                action="Name a column of text, or set calibration.chat_template=true if it holds chat messages.",
            )
