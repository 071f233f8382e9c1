"""Two runs of the same job in two processes must give byte-identical folders."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from measure.process import run_measured
from measure.report import Report, finish, new_parser
from measure.tools import OFFLINE, optgptq_command

from optgptq.checkpoint.manifest import sha256_file

RECIPES = ("gptq-w4", "gptq-w3", "gptq-w2")
SOURCES = ("bundled:story-calibration", "self")


def main() -> int:
    """Run each job twice and compare every file."""
    arguments = new_parser(__doc__).parse_args()
    report = Report(
        name="determinism", title="Two runs, the same bytes", columns=("recipe", "calibration text", "files", "result")
    )
    for recipe in RECIPES[:1] if arguments.quick else RECIPES:
        for source in SOURCES:
            first, second = (_quantize(recipe, source, run, arguments) for run in ("first", "second"))
            differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
            result = f"different: {', '.join(differing)}" if differing else "identical"
            report.rows.append([recipe, source, str(len(first)), result])
            report.details.append({"recipe": recipe, "source": source, "first": first, "second": second})
            if differing:
                report.missed.append(f"{recipe}, {source}: {', '.join(differing)} differ between two runs.")
    return finish(report, arguments)


def _quantize(recipe: str, source: str, run: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the SHA-256 of every file that a run wrote."""
    output: Path = arguments.work / "determinism" / f"{recipe}-{source.replace(':', '-')}-{run}"
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*optgptq_command(), "quantize", "bundled:story-llama", "--recipe", recipe, "--output", str(output)]
    command += ["--set", f"calibration.source={source}", "--set", "calibration.window_size=512"]
    if arguments.quick:
        command += ["--set", "calibration.num_windows=16"]
    run_measured(command, output.with_suffix(".log"), environment=OFFLINE)
    files = (path for path in sorted(output.rglob("*")) if path.is_file())
    return {str(path.relative_to(output)): sha256_file(path) for path in files}


if __name__ == "__main__":
    sys.exit(main())
