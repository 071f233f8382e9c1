"""A fault at one operation of a command: the old result or the new one is there, and the next run finishes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from support.faults.cases import Case
from support.faults.model import DiskModel, Kept
from support.faults.operations import GROWING, Change, Fault

FAULTS = [fault for fault in Fault if fault not in (Fault.NONE, Fault.SHORT)]
# Points of each fault that every run of the tests tries; `make nightly` tries all.
POINTS = {"gptq": 3, "overwrite": 3, "resume": 1, "convert": 1, "gqa": 1, "kv4": 1}
CUTS = {"gptq": 12, "overwrite": 12, "resume": 6, "convert": 4, "gqa": 4, "kv4": 4}
HOW = [(names, data) for names in Kept for data in Kept if data is not Kept.FIRST]


def points(case: Case, fault: Fault) -> list[int]:
    """Return the operations at which a fault makes a difference."""
    match fault:
        case Fault.TORN:
            return [at for at, operation in enumerate(case.log) if operation.change is Change.WRITE]
        case Fault.FULL:
            return [at for at, operation in enumerate(case.log) if operation.change in GROWING]
        case _:
            return list(range(len(case.log)))


def spread(items: Sequence[int], count: int, *, seed: str) -> list[int]:
    """Return one item out of each of `count` equal parts."""
    generator = random.Random(seed)
    ends = [index * len(items) // count for index in range(count + 1)]
    return [items[generator.randrange(begin, end)] for begin, end in pairwise(ends)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", POINTS)
def test_a_fault(name: str, fault: Fault, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for at in spread(points(case, fault), POINTS[name], seed=f"{name} {fault}"):
        case.disturb(fault, at)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", POINTS)
def test_a_fault_at_every_operation(name: str, fault: Fault, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for at in points(case, fault):
        case.disturb(fault, at)


@pytest.mark.parametrize("name", ["gptq", "overwrite"])
def test_a_fault_where_the_output_appears(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    at = next(index for index, operation in enumerate(case.log) if "out" in (operation.path, operation.other))
    for fault in (Fault.BEFORE, Fault.AFTER, Fault.DENIED, Fault.INPUT_OUTPUT, Fault.TERMINATED):
        case.disturb(fault, at)
    case.disturb(Fault.INPUT_OUTPUT, at + 1)


@pytest.mark.parametrize("name", ["gptq", "convert"])
def test_writes_that_take_a_part(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    case.begin(case.before)
    ended = case.run(Fault.SHORT)
    assert ended.exit_code == 0, ended.told
    case.require_old_or_new("short writes")


def cut(case: Case, at: int, names: Kept, data: Kept, *, seed: int) -> None:
    """Cut the power after `at` operations, check what is there, and run again."""
    model = DiskModel(case.before)
    for operation in case.log[:at]:
        model.do(operation)
    case.begin(model.lasting(names=names, data=data, seed=seed))
    where = f"power cut after {at} of {len(case.log)} operations, {names.value} of the names, {data.value} of the bytes"
    case.require_old_or_new(where)
    case.require_finished(where)


@pytest.mark.parametrize("name", CUTS)
def test_a_power_cut(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for index, at in enumerate(spread(range(len(case.log) + 1), CUTS[name], seed=name)):
        cut(case, at, *HOW[index * 5 % len(HOW)], seed=index)


@pytest.mark.nightly
@pytest.mark.parametrize("how", HOW, ids=lambda how: f"{how[0]}-{how[1]}")
@pytest.mark.parametrize("name", CUTS)
def test_a_power_cut_after_every_operation(name: str, how: tuple[Kept, Kept], case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    for at in range(len(case.log) + 1):
        cut(case, at, *how, seed=at)
