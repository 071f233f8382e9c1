"""Options that all benchmarks share, and what they print, write and keep."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure.cases import REPOSITORY
from measure.machine import commit, num_cores, our_versions, peer_versions, processor_name
from measure.tools import OURS, missing_peers, tool_names

DATED_REPORTS = REPOSITORY / "docs" / "benchmarks"
# What a shell shows of settings that change figures.
SHOWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
FOLDER_OPTIONS = ("--work", "--peers", "--shared", "--keep", "--llama-python")
FOLDER_ASSIGNMENTS = tuple(f"{option}=" for option in FOLDER_OPTIONS)


@dataclass(slots=True, kw_only=True)
class Report:
    """A finished benchmark.

    Attributes:
        name: of the benchmark; file names are made from it.
        title: one line.
        columns, rows: the table, as text.
        notes: what a reader must know to understand the table.
        missed: figures that are worse than what the project promises, one sentence each.
        details: everything that was measured; goes to the JSON file.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)


def _absolute(path: str) -> Path:
    """Commands are run in a folder of their own; links are kept, since an environment is found through its own path."""
    return Path(path).absolute()


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller jobs: shows that the benchmark works")
    parser.add_argument("--write", action="store_true", help="write a dated page into docs/benchmarks")
    parser.add_argument(
        "--work",
        type=_absolute,
        default=REPOSITORY / "benchmarks" / "results",
        help="folder for outputs, logs and the JSON result (git ignores the default)",
    )
    return parser


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks that run other tools."""
    parser.add_argument(
        "--peers",
        type=_absolute,
        default=REPOSITORY / "benchmarks" / "peers-env",
        help="folder with one environment per peer, made by benchmarks/peers/install.py",
    )
    parser.add_argument("--tools", nargs="+", help="run only these tools; default: ours and every installed peer")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="recipe override for our tool, to compare settings; repeatable",
    )


def chosen_tools(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Return the tools to run; says which are missing."""
    installed = tool_names(arguments.peers)
    for name in missing_peers(arguments.peers):
        print(f"{name} is not installed in {arguments.peers}: it is left out", file=sys.stderr)
    unknown = sorted(set(arguments.tools or ()) - set(installed))
    if unknown:
        parser.error(f"not installed: {', '.join(unknown)}; here are {', '.join(installed)}")
    return arguments.tools or installed


def add_peer_versions(report: Report, arguments: argparse.Namespace, tools: Sequence[str]) -> None:
    """Note which versions of the peers were run, and what our tool was told beyond its recipe."""
    report.notes += peer_versions(arguments.peers, [tool for tool in tools if tool != OURS])
    if arguments.settings:
        report.notes.append(f"optgptq ran with --set {' --set '.join(arguments.settings)}.")


def finish(report: Report, arguments: argparse.Namespace) -> int:
    """Print the report, keep its JSON, write the dated page where asked; return 1 where a figure is missed."""
    page = markdown(report)
    print(page)
    arguments.work.mkdir(parents=True, exist_ok=True)
    record = {
        "name": report.name,
        "fields": dict(_fields(report)),
        "notes": report.notes,
        "missed": report.missed,
        "details": report.details,
    }
    (arguments.work / f"{report.name}.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    if arguments.write:
        DATED_REPORTS.mkdir(parents=True, exist_ok=True)
        path = DATED_REPORTS / f"{_today()}-{report.name}.md"
        path.write_text(page, "utf-8")
        print(f"written: {path.relative_to(REPOSITORY)}", file=sys.stderr)
    return 1 if report.missed else 0


def markdown(report: Report) -> str:
    """Return the page: fixed fields, the table, notes, missed figures."""
    lines = [f"# {report.title}", ""]
    lines += [f"- {name}: {value}" for name, value in _fields(report)]
    lines += ["", *_table(report.columns, report.rows), ""]
    lines += [f"- {note}" for note in report.notes]
    if report.missed:
        lines += ["", "Missed:", "", *(f"- {sentence}" for sentence in report.missed)]
    return "\n".join(lines).rstrip() + "\n"


def median_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return `median (smallest to largest)`."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def _fields(report: Report) -> list[tuple[str, str]]:
    return [
        ("Date", _today()),
        ("Benchmark", report.name),
        ("Commit", commit()),
        ("Versions", our_versions()),
        ("Processor", processor_name()),
        ("Cores", str(num_cores())),
        ("Command", f"`{_command()}`"),
    ]


def _command() -> str:
    """Return the command line without the folders it names: where things lie is no part of a result."""
    words = [f"{name}={os.environ[name]}" for name in SHOWN_VARIABLES if name in os.environ]
    words += ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    given = iter(sys.argv[1:])
    for word in given:
        if word in FOLDER_OPTIONS:
            next(given, None)
        elif not word.startswith(FOLDER_ASSIGNMENTS):
            words.append(shlex.quote(word))
    return " ".join(words)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(columns), "| " + " | ".join("-" * width for width in widths) + " |", *(line(row) for row in rows)]


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
