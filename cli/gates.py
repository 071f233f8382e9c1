"""How outcomes of gates are shown, and their JUnit report; shared by the commands that judge gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .output import write_note

if TYPE_CHECKING:
    from typing import Any

    from optgptq.errors import OptGPTQError
    from optgptq.evaluation.gates import GateOutcome


def gate_rows(outcomes: Sequence[GateOutcome]) -> list[tuple[str, str]]:
    """Return a row for each gate: how it was asked for, and what came of it."""
    return [(f"gate {outcome.gate}", outcome.verdict) for outcome in outcomes]


def write_gate_report(
    path: Path | None,
    outcomes: Sequence[GateOutcome],
    figures: Mapping[str, Any],
    *,
    seconds: float,
    failure: Exception | None = None,
) -> OptGPTQError | None:
    """Write the JUnit report, where one is wanted, and return what kept it from being written.

    It is not raised: the outcome of the gates must be told first.

    Args:
        path: the file; None for none.
        outcomes: one test case each.
        figures: a record, of which plain values become properties of the suite.
        seconds: what all of it took.
        failure: what the evaluation ended with; where there are no outcomes, nothing else tells of it.
    """
    from optgptq.errors import OptGPTQError
    from optgptq.evaluation.junit import junit_xml, write_junit

    if path is None:
        return None
    properties = {name: value for name, value in figures.items() if isinstance(value, str | int | float)}
    problem = str(failure) if failure is not None and not outcomes else ""
    try:
        write_junit(path, junit_xml(outcomes, properties=properties, seconds=seconds, problem=problem))
    except OptGPTQError as error:
        return error
    return None


@contextmanager
def told_in_report(path: Path | None) -> Iterator[None]:
    """Write a JUnit report of what the job fails with, where one is wanted; a request to stop is no failure.

    Raises:
        OptGPTQError: what the job raised.
    """
    from optgptq.errors import Interrupted, OptGPTQError
    from optgptq.evaluation.junit import junit_xml, write_junit

    try:
        yield
    except Interrupted:
        raise
    except OptGPTQError as error:
        if path is not None:
            try:
                write_junit(path, junit_xml((), properties={}, seconds=0.0, problem=str(error)))
            except OptGPTQError as unwritten:
                write_note(f"warning: {unwritten}")
        raise


def require_gates(outcomes: Sequence[GateOutcome], *, problem: OptGPTQError | None) -> None:
    """End the command where a gate was missed, or else where its report could not be written.

    Raises:
        GateError: a gate was missed; `problem` is then a note.
        OptGPTQError: `problem`.
    """
    from optgptq.evaluation.gates import require_passed

    if problem is not None and not all(outcome.passed for outcome in outcomes):
        write_note(f"warning: {problem}")
    require_passed(outcomes)
    if problem is not None:
        raise problem
