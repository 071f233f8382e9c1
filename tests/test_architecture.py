"""How the code is built: no cycles, no printing, no handlers that hide errors, small files and functions.

The order of the layers is checked by import-linter (`make check`); what it cannot see is checked here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pytest
from support.source_tree import ROOT, Source, imported_names, load_time_nodes, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SLOW_IMPORTS = ("torch", "transformers", "datasets")

PRODUCT = sources("optgptq", "cli", "configs")
EVERYTHING = PRODUCT + sources("tests", "benchmarks")

# Places where every exception must be caught, and why.
BROAD_HANDLERS = {
    ("cli/main.py", "main"): "the border of the program: every exception becomes an exit code",
    ("optgptq/gate_job.py", "recorded"): "the checkpoint is published: what fails now is told with the outcomes",
    ("optgptq/gate_job.py", "evaluate"): "the checkpoint is published: what fails now is told with the outcomes",
    ("optgptq/gate_job.py", "write_sample"): "the checkpoint is published: a text that fails is a warning",
    ("optgptq/data/tokenizer.py", "_read_native"): "the tokenizers library raises the bare class Exception",
    ("optgptq/runtime/engine.py", "_outcomes"): "the model may raise anything; `step` raises it again",
    ("optgptq/runtime/engine_thread.py", "_submit"): "a prompt's own code may raise anything; its asker hears of it",
    ("optgptq/runtime/engine_thread.py", "_work"): "the end of a thread: every request that waits hears of it",
    ("optgptq/runtime/logits_processors.py", "_apply"): "a user's own code may raise anything; only its request fails",
}


Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_modules_import_each_other_without_a_cycle() -> None:
    modules = {source.module for source in PRODUCT}
    graph = {source.module: {_module_of(name, modules) for name in imported_names(source)} for source in PRODUCT}
    try:
        TopologicalSorter({name: needed - {None, name} for name, needed in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def _module_of(name: str, modules: set[str]) -> str | None:
    """Return the module that `from a import b` loads: `a.b` where that is one, else `a`; None for other projects."""
    candidates = (name, name.rpartition(".")[0])
    return next((candidate for candidate in candidates if candidate in modules), None)


def test_files_are_small() -> None:
    assert {source.path: source.num_lines for source in EVERYTHING if source.num_lines > MAX_FILE_LINES} == {}


def test_functions_are_small() -> None:
    lines = {
        (source.path, function.name): _num_lines(function, source)
        for source in EVERYTHING
        for function in _functions(source)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def _functions(source: Source) -> list[Function]:
    return [node for node in ast.walk(source.tree) if isinstance(node, Function)]


def _num_lines(function: Function, source: Source) -> int:
    """Count a function with its signature, but for commands: there the signature is the table of options."""
    assert function.end_lineno is not None
    first = function.body[0].lineno if source.path.startswith("cli/") else function.lineno
    return function.end_lineno - first + 1


def test_the_library_does_not_print() -> None:
    assert {place: call for place, call in _calls(sources("optgptq")) if call.func.id == "print"} == {}


def test_nothing_is_found_out_by_probing_attributes() -> None:
    """`hasattr`, and `getattr` with a default, ask an object what it is: a record should say it."""
    probes = {
        place: call.func.id
        for place, call in _calls(PRODUCT)
        if call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) > 2)
    }
    assert probes == {}


def _calls(files: list[Source]) -> Iterator[tuple[str, Any]]:
    for source in files:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield f"{source.path}:{node.lineno}", node


def test_errors_are_not_hidden() -> None:
    """A handler of every exception must raise it again; the two that may not are listed above and must exist."""
    hiding = {
        (source.path, function.name)
        for source in PRODUCT
        for function in _functions(source)
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and _hides(node)
    }
    assert hiding == set(BROAD_HANDLERS)
    at_import = {
        f"{source.path}:{node.lineno}"
        for source in PRODUCT
        for node in load_time_nodes(source.tree)
        if isinstance(node, ast.ExceptHandler) and _hides(node)
    }
    assert at_import == set()


def _hides(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(item, ast.Name) and item.id in ("Exception", "BaseException") for item in caught)


def test_commands_and_recipes_import_nothing_slow_when_loaded() -> None:
    slow = {
        (source.path, name)
        for source in [*sources("cli"), *sources("optgptq/recipe")]
        for name in imported_names(source)
        if name.split(".")[0] in SLOW_IMPORTS
    }
    assert slow == set()


def test_the_command_tree_and_recipes_load_no_torch() -> None:
    code = (
        "import sys, optgptq_cli.main, optgptq.recipe, optgptq.errors\n"
        f"print(','.join(name for name in {SLOW_IMPORTS} if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


def test_every_shape_letter_is_in_the_legend() -> None:
    legend = (ROOT / "docs" / "dataflow.md").read_text(encoding="utf-8").partition("## Shape legend")[2]
    known = set(re.findall(r"^\| `([A-Z])` \|", legend, flags=re.MULTILINE))
    used = {letter for source in PRODUCT for name in _names(source.tree) for letter in _suffix(name)}
    assert used - known == set(), "add these letters to docs/dataflow.md"
    assert known - used == set(), "the legend explains letters that nothing uses"


def _names(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    variables = {node.id for node in nodes if isinstance(node, ast.Name)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return variables | attributes | {node.arg for node in nodes if isinstance(node, ast.arg)}


def _suffix(name: str) -> str:
    """Return the letters of a shape suffix: `weight_OI` gives `OI`; constants in capitals have none."""
    match = re.fullmatch(r"_?[a-z][a-z0-9_]*_([A-Z]+)[0-9]*", name)
    return match.group(1) if match else ""
