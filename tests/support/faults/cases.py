"""Commands that make something under a name, and what must hold after a fault in one of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.faults.model import Tree, read_tree, write_tree
from support.faults.operations import KILLED, KILLS, Fault, Operation
from support.faults.runner import CommandRunner, Ended
from support.quantizable import wide_llama, write_model

OUTPUT = "out"
RECORD_SUFFIX = ".run.json"
_OF_A_RUN = frozenset(
    {
        "timings",
        "seconds",
        "peak_memory_bytes",
        "sessions",
        "phases",
        "decoder_layer_costs",
        "plan",
        "evaluation",
        "environment",
        "gates",
    }
)
_FOUR_PARTS = re.compile(
    r"^(?:error|interrupted): \S.*\n  expected: \S.*\n  found:    \S.*\n  to do:    \S.*\.\n\Z", re.MULTILINE
)
_TEXT = {"num_windows": 4, "window_size": 12, "full_precision_windows": 0}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"weights": {"method": "gptq", "group_size": -1}},
    "rtn": {"weights": {"method": "rtn", "group_size": -1}},
    "attention_aware": {"weights": {"method": "attention_aware", "group_size": -1}},
    "gptqt": {"weights": {"method": "gptqt", "bits": 3, "group_size": 32}, "export": {"format": "optgptq"}},
    "binary": {"weights": {"method": "binary", "bits": 2, "group_size": 32}, "export": {"format": "optgptq"}},
    "kv4": {
        "weights": {"method": "rtn", "group_size": -1},
        "kv_cache": {"bits": 4, "num_windows": 2, "recent_tokens": 2, "sink_tokens": 0},
    },
    "heads": {"gqa": {"group": 2}},
}


def write_recipe(name: str, folder: Path, **calibration: Any) -> Path:
    """Write a recipe for a tiny model, and its text, as files."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"{number} is the square of {number * number}." for number in range(20)))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RECIPES[name], "calibration": {"source": str(text), **_TEXT, **calibration}}))
    return path


def write_tiny_model(folder: Path) -> Path:
    """Write a Llama of two decoder layers whose widths are multiples of 32."""
    return write_model(wide_llama(hidden_size=32, intermediate_size=64, num_key_value_heads=2), folder)


@dataclass(frozen=True, slots=True)
class Case:
    """A command that writes below `root`, which begins as `before`, and what it does there undisturbed.

    Attributes:
        arguments: of the command.
        root: the folder in which its output appears.
        before: what is in it before.
        after: what an undisturbed run leaves; see `comparable`.
        log: operations of an undisturbed run.
    """

    runner: CommandRunner
    arguments: tuple[str, ...]
    root: Path
    before: Tree
    after: Tree
    log: tuple[Operation, ...]

    def run(self, fault: Fault = Fault.NONE, *, at: int = 0) -> Ended:
        """Run the command on what is there."""
        return self.runner.run(self.arguments, self.root, fault, at=at)

    def begin(self, tree: Tree) -> None:
        """Put `tree` in the place of everything that is there."""
        shutil.rmtree(self.root)
        write_tree(self.root, tree)

    def require_old_or_new(self, where: str) -> None:
        """Check that every name that people see has its old content or the complete new one."""
        found, before = self.found(), comparable(self.before)
        for name in {path.split("/")[0] for path in (*found, *before, *self.after)}:
            if name.startswith("."):
                continue
            here = _below(found, name)
            is_whole = here == _below(before, name) or _are_the_same(here, _below(self.after, name))
            assert is_whole, f"{where}: {name} is neither"

    def require_finished(self, where: str) -> None:
        """Run the command once more and check that everything is as after an undisturbed run."""
        is_there = self._is_there()
        ended = self.run()
        if is_there and ended.exit_code == 3 and "found:    one that exists" in ended.told:
            # It had finished all but its own removal: the same as a finished command that is run again.
            assert self._is_there(), where
            assert not [path for path in self.found() if path.startswith(".")], where
            return
        assert ended.exit_code == 0, f"{where}, run again: {ended.exit_code}\n{ended.told}"
        found = self.found()
        assert sorted(found) == sorted(self.after), where
        other = [path for path, content in found.items() if content != self.after[path]]
        assert not other, f"{where}: other bytes in {other}"

    def disturb(self, fault: Fault, at: int) -> None:
        """Run with a fault and check how it ended, what is there, and that the next run finishes."""
        where = f"{fault.value} at operation {at} of {len(self.log)}, {describe(self.log, at)}"
        self.begin(self.before)
        ended = self.run(fault, at=at)
        require_end(ended, fault, where)
        self.require_old_or_new(where)
        if ended.exit_code == 0:
            # What could not be removed may be left, under a hidden name.
            assert self._is_there(), f"{where}: told that it is done, and it is not"
        else:
            self.require_finished(where)

    def found(self) -> Tree:
        """Return what is there now; see `comparable`."""
        return comparable(read_tree(self.root))

    def _is_there(self) -> bool:
        return _are_the_same(_seen(self.found()), _seen(self.after))


def make_case(runner: CommandRunner, arguments: tuple[str, ...], root: Path, before: Tree) -> Case:
    """Run a command undisturbed and return it as a case."""
    write_tree(root, before)
    ended = runner.run(arguments, root, logged=True)
    assert ended.exit_code == 0, ended.told
    return Case(runner, arguments, root, before, comparable(read_tree(root)), ended.log)


def comparable(tree: Tree) -> Tree:
    """Return a tree whose run records are without what two runs of one job differ in."""
    return {
        path: _without_times(content) if path.endswith(RECORD_SUFFIX) and content is not None else content
        for path, content in tree.items()
    }


def _without_times(content: bytes) -> bytes:
    try:
        record = json.loads(content)
    except ValueError:
        return b"no whole record"
    return json.dumps({name: value for name, value in record.items() if name not in _OF_A_RUN}).encode()


def _are_the_same(found: Tree, expected: Tree) -> bool:
    return found.keys() == expected.keys() and all(
        content == expected[path] or _tells_what_it_lacks(content, expected[path]) for path, content in found.items()
    )


def _tells_what_it_lacks(found: bytes | None, expected: bytes | None) -> bool:
    """Say whether two run records differ in nothing but error maps, which a job may lose if its record says so."""
    if not (found or b"").startswith(b"{") or not (expected or b"").startswith(b"{"):
        return False
    record, whole = json.loads(found or b""), json.loads(expected or b"")
    told = [warning for warning in record.get("warnings", ()) if warning.startswith("the run record has no error maps")]
    return bool(told) and record == {**whole, "error_maps": [], "warnings": [*whole["warnings"], *told]}


def describe(log: tuple[Operation, ...], at: int) -> str:
    """Return an operation in words."""
    return f"{log[at].change.value} of {log[at].path or 'the folder'}" if at < len(log) else "the end"


def require_end(ended: Ended, fault: Fault, where: str) -> None:
    """Check the exit code, and that the message has four parts."""
    told = f"{where}: exit {ended.exit_code}\n{ended.told}"
    if fault in KILLS:
        assert ended.exit_code in (KILLED, 0), told
        return
    if fault in (Fault.TERMINATED, Fault.INTERRUPTED):
        assert ended.exit_code in (0, 75), told
    else:
        assert ended.exit_code in (0, 3, 5), told
    if fault is Fault.FULL:
        assert ended.exit_code in (0, 5), told
    if ended.exit_code != 0:
        assert _FOUR_PARTS.search(ended.told), told
    assert "Traceback" not in ended.told, told


def _seen(tree: Tree) -> Tree:
    return {path: content for path, content in tree.items() if not path.startswith(".")}


def _below(tree: Tree, name: str) -> Tree:
    return {path: content for path, content in tree.items() if path == name or path.startswith(f"{name}/")}
