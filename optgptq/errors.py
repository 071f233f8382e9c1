"""Every error the toolkit raises on purpose, and the exit code each one ends a command with.

    OptGPTQError
    ├── UsageError            2   a command line that cannot be obeyed
    │   └── RecipeError       2   a recipe, or a recipe that does not fit the model
    ├── InputError            3   something the user gave is bad
    │   ├── ModelError        3   model folder, config or weights
    │   ├── TextError         3   calibration or evaluation text, tokenizer
    │   ├── FormatError       3   a quantized checkpoint
    │   └── OutputError       3   the output folder exists or cannot be written
    ├── TargetError           4   the wanted layout or engine cannot hold the result
    ├── CapacityError         5   memory or disk exhausted
    ├── NumericalError        6   non-finite values, a factorization that fails
    ├── GateError             7   a quality gate missed
    └── Interrupted          75   stopped on request at a safe point

A message has four parts: where, expected, found, and what to do. No error holds a trace of another library:
`raise ... from error` keeps it for those who want it.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every `optgptq` command; `docs/exit-codes.md` is the table for people."""

    DONE = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    TARGET = 4
    CAPACITY = 5
    NUMERICAL = 6
    GATE = 7
    INTERRUPTED = 75


class OptGPTQError(Exception):
    """Base of all errors; `where`, `expected`, `found` and `action` are the four parts of its message."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, where: str, *, expected: str, found: str, action: str) -> None:
        self.where = where
        self.expected = expected
        # What stands in a file can be empty or blank, and a message must not end in the middle.
        self.found = found if found.strip() else f"the empty text {found!r}"
        self.action = action
        super().__init__(f"{where}: expected {expected}, found {self.found}. {action}")


class UsageError(OptGPTQError):
    """A command line that cannot be obeyed."""

    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    """A recipe that is not valid, or does not fit the model."""


class InputError(OptGPTQError):
    """Something the user gave is bad."""

    exit_code = ExitCode.INPUT


class ModelError(InputError):
    """The model folder, its config or its weights are bad, or the architecture is not known."""


class TextError(InputError):
    """Text or tokenizer cannot be used."""


class FormatError(InputError):
    """A quantized checkpoint does not hold what its layout promises."""


class OutputError(InputError):
    """The output folder exists or cannot be written."""


class TargetError(OptGPTQError):
    """The wanted layout or engine cannot hold the result."""

    exit_code = ExitCode.TARGET


class CapacityError(OptGPTQError):
    """Memory or disk ran out."""

    exit_code = ExitCode.CAPACITY


class NumericalError(OptGPTQError):
    """Non-finite values, or a factorization that fails at every damping."""

    exit_code = ExitCode.NUMERICAL


class GateError(OptGPTQError):
    """A quality gate was missed."""

    exit_code = ExitCode.GATE


class Interrupted(OptGPTQError):  # noqa: N818 - a request, not a fault
    """Stopped on request; nothing half-written is left."""

    exit_code = ExitCode.INTERRUPTED
