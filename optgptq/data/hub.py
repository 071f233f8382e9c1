"""Rows of data sets, through the `datasets` library: folders it saved, and data sets of the hub.

This file imports a library that takes seconds to load; import it inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from optgptq.data.rows import NumberedRow
from optgptq.environment import read_environment
from optgptq.errors import TextError


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _numbered(name: str, dataset: Iterable[Any]) -> Iterator[NumberedRow]:
    for number, row in enumerate(dataset, start=1):
        yield f"text {name} row {number}", row


def read_saved(folder: Path, *, split: str) -> Iterator[NumberedRow]:
    """Yield the rows of a folder written by `save_to_disk`; `split` matters only where it holds several.

    Raises:
        TextError: not such a folder, or no such split.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise TextError(
            f"text {folder}",
            expected="a folder written by save_to_disk of the datasets library",
            found=_first_line(error),
            action="Name a .txt, .jsonl or .parquet file, or save the data set again.",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise TextError(
                f"text {folder}",
                expected=f"a split {split!r}",
                found=f"the splits {', '.join(loaded)}",
                action="Set calibration.split to one of them (--split for eval).",
            )
        loaded = loaded[split]
    yield from _numbered(str(folder), loaded)


def read_hub(name: str, *, config: str | None, split: str, revision: str | None) -> Iterator[NumberedRow]:
    """Yield the rows of a hub data set in stored order, fetching only what is consumed.

    Offline (docs/environment.md) the copy in the cache is read whole instead, in the same order.

    Raises:
        TextError: no such data set, configuration, split or revision, or no way to reach it.
    """
    offline = read_environment().offline
    try:
        loaded = datasets.load_dataset(name, name=config, split=split, revision=revision, streaming=not offline)
        yield from _numbered(name, loaded)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        advice = "Nothing is fetched while HF_HUB_OFFLINE is set; unset it, or name a local file."
        online_advice = "Check the id, config, split, revision and the network, or name a local file or folder."
        raise TextError(
            f"text {name}",
            expected=f"a data set of the hub with split {split!r}, or a local file of this name",
            found=_first_line(error),
            action=advice if offline else online_advice,
        ) from error
