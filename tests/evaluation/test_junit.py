"""JUnit reports: what CI systems read, and text that no XML can hold."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optgptq.errors import CapacityError, InputError, OutputError
from optgptq.evaluation.gates import Figure, Gate, judge
from optgptq.evaluation.junit import junit_xml, write_junit
from optgptq.recipe.gates import GATES

# What the schema allows: attributes, then children in their order.
SCHEMA = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, ["testsuite"]),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time"}, ["properties", "testcase"]),
    "properties": (set(), ["property"]),
    "property": ({"name", "value"}, []),
    "testcase": ({"name", "classname", "time"}, ["error", "failure", "system-out"]),
    "failure": ({"type", "message"}, []),
    "error": ({"type", "message"}, []),
    "system-out": (set(), []),
}


def gate(name: str, limit: float = 0.5) -> Gate:
    return Gate(kind=GATES[name], limit=limit, asked_as=f"--gate {name}")


def outcomes(**figures: Figure | Exception):
    return judge([gate(name) for name in figures], figures)


def parsed(document: bytes) -> ElementTree.Element:
    root = ElementTree.fromstring(document)
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        assert set(element.attrib) == attributes
        places = [children.index(child.tag) for child in element]
        assert places == sorted(places)
        if "time" in attributes:
            assert float(element.attrib["time"]) >= 0
    suite = root.find("testsuite")
    assert suite is not None
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    assert int(suite.attrib["errors"]) == len(suite.findall("testcase/error"))
    return root


def test_a_report_has_a_case_for_each_gate():
    error = InputError("record", expected="a figure", found="none", action="Do it again.")
    found = outcomes(
        max_kl=Figure(value=0.25, seconds=1.5), max_linear_loss=Figure(value=0.75, where="x<y>"), max_damp_ratio=error
    )
    root = parsed(junit_xml(found, properties={"perplexity": 5.25, "note": "a & b"}, seconds=3.0))
    cases = {case.attrib["name"]: case for case in root.iter("testcase")}
    assert list(cases) == ["max_kl", "max_linear_loss", "max_damp_ratio"]
    assert {case.attrib["classname"] for case in cases.values()} == {"optgptq.gates"}
    assert cases["max_kl"].attrib["time"] == "1.500"
    assert cases["max_kl"].find("failure") is None
    failure = cases["max_linear_loss"].find("failure")
    assert failure is not None
    assert failure.attrib["message"] == "max_linear_loss missed by 0.25: 0.75 against 0.5 (x<y>)"
    assert "--gate max_linear_loss: loss of a linear at most 0.5" in (failure.text or "")
    problem = cases["max_damp_ratio"].find("error")
    assert problem is not None
    assert problem.attrib["message"] == str(error)
    properties = {each.attrib["name"]: each.attrib["value"] for each in root.iter("property")}
    assert properties["perplexity"] == "5.25"
    assert properties["note"] == "a & b"
    assert (properties["max_kl.value"], properties["max_kl.limit"]) == ("0.25", "0.5")
    assert properties["max_linear_loss.where"] == "x<y>"


def test_a_report_without_gates_and_with_broken_times():
    parsed(junit_xml((), properties={}, seconds=math.nan))
    parsed(junit_xml(outcomes(max_kl=Figure(value=math.nan, seconds=math.inf)), properties={}, seconds=math.inf))


def test_characters_that_xml_cannot_hold_are_spelled_out():
    found = outcomes(max_linear_loss=Figure(value=2.0, where="a\x00\x1b[31m\ud800\uffff"))
    root = parsed(junit_xml(found, properties={"x\x08": "\x0c"}, seconds=0.0))
    properties = {each.attrib["name"]: each.attrib["value"] for each in root.iter("property")}
    assert properties["max_linear_loss.where"] == r"a\x00\x1b[31m\xd800\xffff"
    assert properties[r"x\x08"] == r"\x0c"


@given(st.text(), st.text(), st.floats())
def test_any_text_and_figure_gives_a_report_that_parses(where: str, note: str, value: float):
    found = outcomes(max_linear_loss=Figure(value=value, where=where, seconds=abs(value)))
    parsed(junit_xml(found, properties={note: note}, seconds=abs(value)))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "gates.xml"
    write_junit(path, b"<first/>")

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(CapacityError, match=r"gates\.xml"):
            write_junit(path, b"<second/>")
    assert path.read_bytes() == b"<first/>"
    assert [each.name for each in tmp_path.iterdir()] == ["gates.xml"]
    write_junit(path, b"<third/>")
    assert path.read_bytes() == b"<third/>"
    with pytest.raises(OutputError):
        write_junit(tmp_path / "missing" / "gates.xml", b"")


def test_a_job_without_gates_is_a_case_that_passed() -> None:
    root = parsed(junit_xml((), properties={}, seconds=2.0))
    (case,) = root.iter("testcase")
    assert (case.get("name"), [child.tag for child in case]) == ("job", ["system-out"])
    assert (root.get("tests"), root.get("errors")) == ("1", "0")


def test_a_job_that_failed_is_an_error() -> None:
    root = parsed(junit_xml((), properties={}, seconds=2.0, problem="layer 3: no number"))
    (case,) = root.iter("testcase")
    (error,) = case
    assert (error.tag, error.get("message")) == ("error", "layer 3: no number")
    assert (root.get("tests"), root.get("errors"), root.get("failures")) == ("1", "1", "0")
