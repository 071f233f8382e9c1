"""What kind of text a source names, decided from its spelling and from what exists on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import regex

from optgptq.bundled import PREFIX as BUNDLED_PREFIX

SourceKind = Literal["self", "bundled", "text", "jsonl", "parquet", "saved_dataset", "hub", "unknown"]
SUFFIX_KINDS: dict[str, SourceKind] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
HUB_ID = regex.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def source_kind(source: str) -> SourceKind:
    """Return the kind of a text source. A folder on disk wins over a hub id of the same spelling."""
    if source == "self":
        return "self"
    if source.startswith(BUNDLED_PREFIX):
        return "bundled"
    path = Path(source)
    # os.path takes a name that is too long for a file as one that is not there; Path raises.
    if os.path.isdir(path):
        return "saved_dataset"
    kind = SUFFIX_KINDS.get(path.suffix.lower())
    if kind is not None:
        return kind
    return "hub" if not os.path.exists(path) and HUB_ID.fullmatch(source) else "unknown"


def source_for_record(source: str) -> str:
    """Return the source as a record may name it: of a local path only the last part, else the source itself."""
    return source if source_kind(source) in ("self", "bundled", "hub") else Path(source).name
