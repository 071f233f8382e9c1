"""Outcomes of gates as JUnit XML, which CI systems show beside their tests.

One `testsuite` with a `testcase` for each gate: a `failure` where the gate was missed, an `error` where there is no
figure. Without gates, and where the job itself failed, the case `job` tells how it ended: CI systems take an empty
suite for tests that did not run.
Source: the XML schema of JUnit reports that Jenkins publishes with its xUnit plugin.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import regex

from optgptq.checkpoint.disk import disk_error, force_to_disk
from optgptq.evaluation.gates import GateOutcome

_SUITE = "optgptq.gates"
_JOB = "job"
# Outside the characters that XML 1.0 allows (section 2.2), whatever way they are spelled.
_NOT_XML = regex.compile("[^\t\n\r\\u0020-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def junit_xml(
    outcomes: Sequence[GateOutcome],
    *,
    properties: Mapping[str, object],
    seconds: float,
    suite: str = _SUITE,
    problem: str = "",
) -> bytes:
    """Return a report of `outcomes` as UTF-8.

    Args:
        outcomes: one test case each.
        properties: names and values that stand in front of the cases, such as measured figures.
        seconds: what all of it took.
        suite: name of the suite, and the class of its cases.
        problem: what the job failed with before its gates could be judged.
    """
    tells_job = bool(problem) or not outcomes
    failures = sum(not outcome.passed and outcome.problem is None for outcome in outcomes)
    errors = sum(outcome.problem is not None for outcome in outcomes) + bool(problem)
    counts = {"tests": str(len(outcomes) + tells_job), "failures": str(failures), "errors": str(errors)}
    root = ElementTree.Element("testsuites", {"name": _text(suite), **counts, "time": _seconds(seconds)})
    attributes = {"name": _text(suite), **counts, "skipped": "0", "time": _seconds(seconds)}
    element = ElementTree.SubElement(root, "testsuite", attributes)
    shown = ElementTree.SubElement(element, "properties")
    for name, value in {**properties, **_figures(outcomes)}.items():
        ElementTree.SubElement(shown, "property", {"name": _text(name), "value": _text(value)})
    if tells_job:
        _add_job(element, problem, suite=suite, seconds=seconds)
    for outcome in outcomes:
        _add_case(element, outcome, suite)
    ElementTree.indent(root)
    document = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return bytes(document) + b"\n"


def write_junit(path: Path, document: bytes) -> None:
    """Write a report beside its final name first, then rename it: nobody ever reads half of one.

    Raises:
        CapacityError, OutputError: the file cannot be written; what was there before is as it was.
    """
    # One name for all processes: what one that was killed has left is written over by the next.
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(document)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        force_to_disk(path.parent)
    except OSError as error:
        # The next one writes over what cannot be removed.
        with suppress(OSError):
            partial.unlink()
        raise disk_error(path, error) from error


def _figures(outcomes: Sequence[GateOutcome]) -> dict[str, object]:
    """Return value, limit and place of each gate, by the gate's name."""
    figures: dict[str, object] = {}
    for outcome in outcomes:
        figures[f"{outcome.name}.value"] = outcome.value
        figures[f"{outcome.name}.limit"] = outcome.limit
        if outcome.unit:
            figures[f"{outcome.name}.unit"] = outcome.unit
        if outcome.where is not None:
            figures[f"{outcome.name}.where"] = outcome.where
    return figures


def _add_job(suite_element: ElementTree.Element, problem: str, *, suite: str, seconds: float) -> None:
    attributes = {"name": _JOB, "classname": _text(suite), "time": _seconds(seconds)}
    case = ElementTree.SubElement(suite_element, "testcase", attributes)
    if problem:
        _add_problem(case, "error", kind="JobError", message=problem, text=problem)
    else:
        ElementTree.SubElement(case, "system-out").text = "complete; no gate was asked for"


def _add_case(suite_element: ElementTree.Element, outcome: GateOutcome, suite: str) -> None:
    attributes = {"name": outcome.name, "classname": _text(suite), "time": _seconds(outcome.seconds)}
    case = ElementTree.SubElement(suite_element, "testcase", attributes)
    asked = f"{outcome.gate}: {outcome.figure} {outcome.bound} {outcome.limit:.6g}"
    if outcome.problem is not None:
        _add_problem(case, "error", kind="NoFigure", message=outcome.problem, text=f"{asked}\n{outcome.verdict}")
    elif not outcome.passed:
        message = f"{outcome.name} {outcome.verdict}"
        _add_problem(case, "failure", kind="GateError", message=message, text=f"{asked}\n{outcome.verdict}")
    else:
        ElementTree.SubElement(case, "system-out").text = _text(f"{asked}\n{outcome.verdict}")


def _add_problem(case: ElementTree.Element, tag: str, *, kind: str, message: str, text: str) -> None:
    element = ElementTree.SubElement(case, tag, {"type": _text(kind), "message": _text(message)})
    element.text = _text(text)


def _text(value: object) -> str:
    """Return a value as XML can hold it: characters that it cannot hold become their code in letters."""
    return "".join(f"\\x{ord(part):02x}" if _NOT_XML.match(part) else part for part in str(value))


def _seconds(value: float) -> str:
    return f"{value if math.isfinite(value) else 0.0:.3f}"
