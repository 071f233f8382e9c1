"""Runs one command and writes its seconds, peak memory and exit status as JSON: `launch.py RESULT LOG COMMAND...`.

A process of its own, and a small one: Linux counts the memory of the process that starts a command into that command's
peak, so a benchmark that holds torch must not start the command itself.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> int:
    """Start the command, wait for it, write what it took."""
    result_path, log_path, *command = sys.argv[1:]
    with open(log_path, "wb") as log:
        streams = [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
        began = time.perf_counter()
        child = os.posix_spawnp(command[0], command, os.environ, file_actions=streams)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - began
    result = {
        "exit_status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }
    with open(result_path, "w", encoding="utf-8") as file:
        json.dump(result, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
