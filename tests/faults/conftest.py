"""One server of commands, one tiny model and the cases that are disturbed, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faults.cases import OUTPUT, Case, comparable, make_case, write_recipe, write_tiny_model
from support.faults.model import Tree, read_tree
from support.faults.operations import Change, Fault
from support.faults.runner import CommandRunner, command_runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandRunner]:
    with command_runner(tmp_path_factory.mktemp("runner")) as started:
        yield started


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def case_of(runner: CommandRunner, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Return a function from a name to a case, which is made when it is first asked for."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = _make(name, get, runner, model, tmp_path_factory.mktemp("case"))
        return made[name]

    return get


def _make(name: str, case_of: Callable[[str], Case], runner: CommandRunner, model: Path, folder: Path) -> Case:
    root = folder / "root"
    output = ("-o", str(root / OUTPUT), "--quiet")
    match name:
        case "resume":
            whole = case_of("gptq")
            return Case(runner, whole.arguments, whole.root, *_half_done(whole))
        case "overwrite":
            recipe = write_recipe("gptq", folder)
            arguments = ("quantize", str(model), "-r", str(recipe), *output, "--overwrite")
            return make_case(runner, arguments, root, case_of("rtn").after)
        case "convert":
            quantized = case_of("gptq")
            quantized.begin(quantized.after)
            source = folder / "source"
            (quantized.root / OUTPUT).rename(source)
            arguments = ("convert", str(source), "--to", "compressed-tensors", *output, "--overwrite")
            return make_case(runner, arguments, root, case_of("rtn").after)
        case "gqa":
            recipe = write_recipe("heads", folder)
            return make_case(runner, ("gqa", str(model), "-r", str(recipe), *output), root, {})
        case _:
            recipe = write_recipe(name, folder)
            return make_case(runner, ("quantize", str(model), "-r", str(recipe), *output), root, {})


def _half_done(whole: Case) -> tuple[Tree, Tree, tuple]:  # type: ignore[type-arg]
    """Return what a job leaves that was killed in its second decoder layer, and what comes of it with which log."""
    at = next(
        index
        for index, operation in enumerate(whole.log)
        if operation.change is Change.RENAME and "layer-00001.gate_up" in operation.path
    )
    whole.begin({})
    whole.run(Fault.BEFORE, at=at)
    before = read_tree(whole.root)
    ended = whole.runner.run(whole.arguments, whole.root, logged=True)
    assert ended.exit_code == 0, ended.told
    return before, comparable(read_tree(whole.root)), ended.log
