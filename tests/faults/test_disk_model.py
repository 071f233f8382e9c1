"""The model of the disk: what it keeps, what it may lose, and that the watched operations are all that there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.faults.cases import Case, comparable
from support.faults.model import DiskModel, Kept
from support.faults.operations import Change, Operation


def model_after(*operations: Operation, **files: bytes) -> DiskModel:
    model = DiskModel(files)
    for operation in operations:
        model.do(operation)
    return model


def written(path: str, data: bytes = b"new") -> tuple[Operation, Operation]:
    return Operation(Change.CREATE, path), Operation(Change.WRITE, path, data=data)


def test_what_was_not_synchronized_is_lost() -> None:
    model = model_after(*written("a"), *written("b"), Operation(Change.FSYNC, "a"), old=b"old")
    assert model.lasting(names=Kept.NONE, data=Kept.NONE) == {"old": b"old"}


def test_names_without_bytes() -> None:
    model = model_after(*written("a"), Operation(Change.RENAME, "a", "old"), old=b"old")
    assert model.lasting(names=Kept.ALL, data=Kept.NONE) == {"old": b""}


def test_synchronized_in_the_right_order() -> None:
    operations = (*written("a"), Operation(Change.FSYNC, "a"), Operation(Change.RENAME, "a", "old"))
    assert model_after(*operations, old=b"old").lasting(names=Kept.NONE, data=Kept.NONE) == {"old": b"old"}
    model = model_after(*operations, Operation(Change.FSYNC, ""), old=b"old")
    assert model.lasting(names=Kept.NONE, data=Kept.NONE) == {"old": b"new"}


def test_folders_change_places() -> None:
    def model() -> DiskModel:
        made = DiskModel({"a": None, "a/x": b"1", "b": None, "b/y": b"2"})
        made.do(Operation(Change.EXCHANGE, "a", "b"))
        made.do(Operation(Change.UNLINK, "a/y"))
        return made

    assert model().lasting(names=Kept.ALL, data=Kept.ALL) == {"a": None, "b": None, "b/x": b"1"}
    assert model().lasting(names=Kept.NONE, data=Kept.ALL) == {"a": None, "a/x": b"1", "b": None, "b/y": b"2"}


def test_torn_writes_are_among_what_may_be_there() -> None:
    operations = (
        Operation(Change.CREATE, "a"),
        Operation(Change.FSYNC, ""),
        Operation(Change.WRITE, "a", data=b"1234"),
    )
    found = {model_after(*operations).lasting(names=Kept.ALL, data=Kept.SOME, seed=seed)["a"] for seed in range(40)}
    assert found == {b"", b"12", b"1234"}


def test_truncated_and_lengthened() -> None:
    operations = (Operation(Change.TRUNCATE, "a", offset=2), Operation(Change.WRITE, "a", offset=4, data=b"5"))
    assert model_after(*operations, a=b"1234").lasting(names=Kept.ALL, data=Kept.ALL) == {"a": b"12\0\x005"}


@pytest.mark.parametrize("name", ["gptq", "overwrite", "resume", "convert", "gqa", "kv4"])
def test_the_log_misses_nothing(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    model = DiskModel(case.before)
    for operation in case.log:
        model.do(operation)
    assert comparable(model.lasting(names=Kept.ALL, data=Kept.ALL)) == case.after
