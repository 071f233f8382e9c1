"""What `optgptq plan` says about memory and time beside what `optgptq quantize` then takes; whole processes."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure.process import Measurement, run_measured
from measure.random_llama import WIDTH_1024, LlamaShape, random_llama
from measure.report import Report, finish, median_and_spread, new_parser
from measure.tools import optgptq_command

WIDTH_2048 = LlamaShape(width=2048, feed_forward=5632, num_heads=16, num_kv_heads=8)
RECIPES = ("gptq-w4", "rtn-w4", "attention-aware-w3", "gptqt-w3", "binary-w3")
LARGEST_MEMORY_ERROR, LARGEST_TIME_ERROR = 0.15, 0.40
TEXT = "bundled:story-calibration"
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job: a model, a recipe, and the size of the text."""

    model: Path
    recipe: str
    num_windows: int
    window_size: int

    @property
    def settings(self) -> list[str]:
        """What is set beside the recipe."""
        values = {
            "calibration.source": TEXT,
            "calibration.num_windows": self.num_windows,
            "calibration.window_size": self.window_size,
            **({"weights.group_size": 32} if self._is_narrow else {}),
        }
        return [word for field, value in values.items() for word in ("--set", f"{field}={value}")]

    @property
    def _is_narrow(self) -> bool:
        """Groups of 128 do not divide its linears; one code per row does."""
        config = json.loads((self.model / "config.json").read_text("utf-8"))
        return config["intermediate_size"] % 128 != 0 and self.recipe != "gptqt-w3"


def main() -> int:
    """Plan and run every case in turns and compare."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="folders beside the random models")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the random models")
    parser.add_argument("--without-2048", action="store_true", help="the random model of width 1024 alone")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="compare with processor seconds: with OMP_NUM_THREADS=1 this says something on a busy machine too",
    )
    arguments = parser.parse_args()
    report = Report(
        name="planning",
        title="The plan of a job beside the job",
        columns=("model", "recipe", "planned MiB", "peak MiB", "ratio", "planned s", "seconds", "ratio"),
        notes=[
            f"Median (smallest to largest). Memory within {LARGEST_MEMORY_ERROR:.0%} and time within "
            f"{LARGEST_TIME_ERROR:.0%} are the aims; time counts the whole command, from start to exit."
        ],
    )
    if arguments.processor_time:
        report.notes.append("Seconds are those of the processor, all threads together.")
    for case in _cases(arguments):
        _measure(case, arguments, report)
    return finish(report, arguments)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    shapes = [WIDTH_1024] if arguments.without_2048 or arguments.quick else [WIDTH_1024, WIDTH_2048]
    folder = arguments.work / "models"
    models = [random_llama(folder, num_layers=arguments.layers, shape=shape) for shape in shapes]
    windows = (4, 256) if arguments.quick else (32, 512)
    cases = [
        Case(model=model, recipe=recipe, num_windows=windows[0], window_size=windows[1])
        for model in models
        for recipe in arguments.recipes
    ]
    cases += [
        Case(model=model.absolute(), recipe=recipe, num_windows=128, window_size=256)
        for model in arguments.models
        for recipe in arguments.recipes
    ]
    return cases


def _measure(case: Case, arguments: argparse.Namespace, report: Report) -> None:
    runs: list[Measurement] = []
    plans: list[dict[str, Any]] = []
    output = arguments.work / "planning" / "out"
    for _ in range(arguments.repetitions):
        plans.append(_plan(case, output))
        shutil.rmtree(output, ignore_errors=True)
        command = [
            *optgptq_command(),
            "quantize",
            str(case.model),
            "-r",
            case.recipe,
            "-o",
            str(output),
            *case.settings,
        ]
        runs.append(run_measured([*command, "--quiet"], arguments.work / "planning" / "quantize.log"))
    shutil.rmtree(output, ignore_errors=True)
    seconds = [run.processor_seconds if arguments.processor_time else run.seconds for run in runs]
    peaks = [run.peak_bytes / MEBIBYTE for run in runs]
    planned_peak = statistics.median(plan["peak_memory_bytes"] for plan in plans) / MEBIBYTE
    planned_seconds = statistics.median(plan["seconds"] for plan in plans)
    ratios = planned_peak / statistics.median(peaks), planned_seconds / statistics.median(seconds)
    report.rows.append(
        [
            case.model.name,
            case.recipe,
            f"{planned_peak:.0f}",
            median_and_spread(peaks, digits=0),
            f"{ratios[0]:.2f}",
            f"{planned_seconds:.1f}",
            median_and_spread(seconds),
            f"{ratios[1]:.2f}",
        ]
    )
    print(" | ".join(report.rows[-1]), file=sys.stderr, flush=True)
    report.details.append({"model": case.model.name, "recipe": case.recipe, "plans": plans, "seconds": seconds})
    for name, ratio, most in (("memory", ratios[0], LARGEST_MEMORY_ERROR), ("time", ratios[1], LARGEST_TIME_ERROR)):
        if not 1 - most <= ratio <= 1 + most:
            report.missed.append(f"{case.model.name}, {case.recipe}: planned {name} is {ratio:.2f} of what was taken.")


def _plan(case: Case, output: Path) -> dict[str, Any]:
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*optgptq_command(), "plan", str(case.model), "-r", case.recipe, "-o", str(output), "--measure-again"]
    done = subprocess.run([*command, "--json", *case.settings], check=True, capture_output=True, text=True)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


if __name__ == "__main__":
    sys.exit(main())
