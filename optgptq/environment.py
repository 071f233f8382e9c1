"""Every environment variable the toolkit reads, parsed in one place. `docs/environment.md` is the table for people.

`HF_HOME`, `HF_TOKEN` and the other variables of huggingface_hub are read by that library and by nobody here.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optgptq.errors import UsageError
from optgptq.processors import Processors, find_processors

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment asks for.

    Attributes:
        offline: nothing may be fetched: any of `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` is true.
        no_color: `NO_COLOR` is set to anything but nothing (https://no-color.org).
        continuous_integration: `CI` is set to anything but a word for no; some services put their own name there.
    """

    offline: bool = False
    no_color: bool = False
    continuous_integration: bool = False


def _flag(name: str, value: str) -> bool:
    word = value.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise UsageError(
        f"environment variable {name}",
        expected="1, true, yes or on; 0, false, no, off or nothing",
        found=f"{value!r}",
        action=f"Set {name} to 1 or 0, or unset it.",
    )


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Return what the environment asks for.

    Raises:
        UsageError: an offline flag holds a word that is neither yes nor no.
    """
    offline_flags = [_flag(name, variables[name]) for name in OFFLINE_VARIABLES if name in variables]
    return Environment(
        offline=any(offline_flags),
        no_color=variables.get("NO_COLOR", "") != "",
        continuous_integration=variables.get("CI", "").strip().lower() not in FALSE_WORDS,
    )


def cache_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """Return the user's cache folder of this tool, in `XDG_CACHE_HOME` where that is an absolute path."""
    base = variables.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "optgptq"


def limit_spinning() -> None:
    """Let threads that wait for each other soon sleep instead of spin, unless the user has chosen; before torch loads.

    With two threads on two cores that something else uses too, spinning as long as libgomp does by itself made a job
    four times as long; never spinning costs an idle machine a tenth (docs/log.md, 2026-11-22). This is between.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@contextmanager
def loading_modules() -> Iterator[None]:
    """Import torch and what needs it without the collector of reference cycles, and keep it from them ever after.

    Modules last as long as the process, and searching the million objects of torch again and again for what nobody
    needs took as long as a third of loading them. Where torch is there already, nothing happens.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def limit_threads() -> None:
    """Let torch use no more threads than the control group grants processors, unless the user has chosen.

    It must be called before torch loads, which counts the cores of the affinity mask. In a container with a quota most
    of so many threads wait for their turn, and each operation waits for the last of them.
    """
    threads = find_processors().threads
    if threads is not None and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ["OMP_NUM_THREADS"] = str(threads)


def explain_threads(processors: Processors, variables: Mapping[str, str] = os.environ) -> str:
    """Return where the number of threads comes from, for people."""
    asked = [f"{name}={variables[name]}" for name in THREAD_VARIABLES if name in variables]
    quota = f"the control group grants {processors.quota:g} processors" if processors.quota is not None else ""
    if asked == [f"OMP_NUM_THREADS={processors.threads}"]:
        return f"{asked[0]}, as {quota}"
    if asked:
        return ", ".join([f"as {' and '.join(asked)} asks", *([f"though {quota}"] if processors.threads else [])])
    return quota or "one for each core that this process may use"
