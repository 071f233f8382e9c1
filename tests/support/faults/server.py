"""A process that has everything imported and forks one child for each command, which then starts in no time.

One JSON object per line comes in: `root`, `arguments`, `fault`, `at`, `log`, `told`, `modules` to import first, and
`signal` to send after `seconds`, 0 for none. One goes out: `exit`, negative for a process that a signal ended, and
`seconds`. The parent computes nothing itself, so no thread is lost in the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.faults.operations import Fault
from support.faults.watched import watch

from optgptq_cli.main import main


def _child(request: dict[str, Any]) -> None:
    told = os.open(request["told"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(told, 1)
    os.dup2(told, 2)
    code = 1
    disk = watch(Path(request["root"]), Fault(request["fault"]), request["at"])
    try:
        code = main(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if request["log"]:
            with open(request["log"], "wb") as stream:
                pickle.dump((disk.log, sorted(sys.modules)), stream)
        os._exit(code)


def serve() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        for name in request.get("modules", ()):
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # made by another module under a name of its own
        child = os.fork()
        if child == 0:
            _child(request)
        began = time.perf_counter()
        if request["signal"]:
            time.sleep(request["seconds"])
            os.kill(child, request["signal"])  # not waited for yet, so the number is still its own
        _, status = os.waitpid(child, 0)
        answer = {"exit": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
