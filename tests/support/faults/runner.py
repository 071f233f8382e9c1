"""Commands run with a fault, each in a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.faults.operations import Fault, Operation

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CI": "1", "NO_COLOR": "1"}
_TESTS = str(Path(__file__).resolve().parents[2])


def environment() -> dict[str, str]:
    """Return the environment of a command: one thread, and no terminal."""
    path = os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": path}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: its exit code; 137 for a process that died at a fault, negative for one that a signal ended.
        told: what it wrote to stdout and stderr.
        seconds: how long it ran.
        log: operations that it did, where they were asked for.
    """

    exit_code: int
    told: str
    seconds: float
    log: tuple[Operation, ...]


@dataclass(slots=True)
class CommandRunner:
    """Runs commands one after the other in forks of `server`; files of its own lie in `folder`."""

    server: subprocess.Popen[str]
    folder: Path
    modules: list[str] = field(default_factory=list)

    def run(
        self, arguments: Sequence[str], root: Path, fault: Fault = Fault.NONE, *, at: int = 0, logged: bool = False
    ) -> Ended:
        """Run a command with a fault at operation `at` of those below `root`."""
        log = self.folder / "log"
        answer, told = self._ask(arguments, root, fault=fault, at=at, log=str(log) if logged else "")
        operations: tuple[Operation, ...] = ()
        if logged:
            found, self.modules = pickle.loads(log.read_bytes())
            operations = tuple(found)
        return Ended(answer["exit"], told, answer["seconds"], operations)

    def run_signalled(self, arguments: Sequence[str], root: Path, number: int, *, seconds: float) -> Ended:
        """Run a command that gets a signal after some seconds, if it is still there."""
        answer, told = self._ask(arguments, root, signal=int(number), seconds=seconds)
        return Ended(answer["exit"], told, answer["seconds"], ())

    def _ask(self, arguments: Sequence[str], root: Path, **values: Any) -> tuple[dict[str, Any], str]:
        told = self.folder / "told"
        request: dict[str, Any] = {
            "root": str(root),
            "arguments": list(arguments),
            "fault": Fault.NONE,
            "at": 0,
            "told": str(told),
            "log": "",
            "modules": self.modules,
            "signal": 0,
            "seconds": 0.0,
            **values,
        }
        self.modules = []
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of commands has died"
        return json.loads(answer), told.read_text(errors="replace")


@contextmanager
def command_runner(folder: Path) -> Iterator[CommandRunner]:
    """Start a server of commands that ends with the block."""
    command = [sys.executable, "-m", "support.faults.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as server:
        yield CommandRunner(server, folder)
