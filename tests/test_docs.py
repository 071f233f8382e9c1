"""Pages link to what exists, and say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.source_tree import ROOT

from optgptq.errors import ExitCode

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_table_of_exit_codes_is_complete() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)] == [int(c) for c in ExitCode]


EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_runtime_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[number], f"docs/runtime.md example {number + 1}", "exec"), {"__name__": "example"})
    assert len(capsys.readouterr().out) > 50


def test_the_index_lists_every_decision() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [path.name for path in (ROOT / "docs" / "decisions").glob("*.md")]
    assert [name for name in pages if f"(decisions/{name})" not in index] == []
