"""Whole-process seconds and peak memory of ours beside the peers, in turns, on two jobs.

Every round runs each tool once on each job, so that a change of the machine's load falls on all of them. What a tool
wrote must pass our `verify` and stay close to the dense model: a fast wrong answer gives no figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from measure.cases import NUM_WINDOWS, story_llama
from measure.process import BenchmarkError, Measurement, run_measured
from measure.random_llama import random_llama
from measure.report import (
    Report,
    add_peer_options,
    add_peer_versions,
    chosen_tools,
    finish,
    median_and_spread,
    new_parser,
)
from measure.score import score
from measure.tools import OURS, Grid, Job, optgptq_command, quantize
from measure.windows import require_same_windows, write_windows

from optgptq.data.windows import WindowSettings

COLUMNS = ("job", "tool", "seconds", "to ours", "processor seconds", "peak MiB", "mean KL")
TARGET_RATIO = 3.0
GRID = Grid(bits=4, group_size=128, symmetric=True)
WINDOW_SIZE = 512
RANDOM_LLAMA_LAYERS = 6
RANDOM_LLAMA_WINDOWS = 32
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedJob:
    """A job with its correctness gate: the largest mean KL of a sound result over `gate_tokens` tokens."""

    name: str
    job: Job
    max_kl: float
    gate_tokens: int


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = new_parser(__doc__)
    add_peer_options(parser)
    parser.add_argument("--repetitions", type=int, default=3, help="rounds; median and spread are shown")
    parser.add_argument("--jobs", nargs="+", choices=("story-llama", "random-llama"), help="default: both")
    arguments = parser.parse_args()
    tools = chosen_tools(arguments, parser)
    jobs = [job for job in _jobs(arguments) if job.name in (arguments.jobs or job.name)]
    rounds = 1 if arguments.quick else arguments.repetitions
    measured: dict[tuple[str, str], list[Measurement]] = {}
    divergence: dict[tuple[str, str], float] = {}
    for number in range(rounds):
        for job in jobs:
            for tool in tools:
                output = arguments.work / "speed" / f"{job.name}-{tool}"
                taken = quantize(
                    tool, job.job, output, peers_folder=arguments.peers, settings=tuple(arguments.settings)
                )
                measured.setdefault((job.name, tool), []).append(taken)
                print(f"round {number + 1}, {job.name}, {tool}: {taken.seconds:.2f} s", file=sys.stderr, flush=True)
                if number == 0:
                    divergence[job.name, tool] = _require_sound(job, tool, output)
    report = _report(jobs, tools, measured, divergence, quick=arguments.quick)
    report.notes.append(f"{rounds} rounds; median (smallest to largest). Peak memory is that of the largest process.")
    add_peer_versions(report, arguments, tools)
    return finish(report, arguments)


def _jobs(arguments: argparse.Namespace) -> list[SpeedJob]:
    story = story_llama()
    num_windows = 8 if arguments.quick else NUM_WINDOWS
    random_windows = 4 if arguments.quick else RANDOM_LLAMA_WINDOWS
    random_model = random_llama(arguments.work / "models", num_layers=RANDOM_LLAMA_LAYERS)
    return [
        SpeedJob(
            name="story-llama",
            job=_job(story.model, num_windows, arguments.work),
            max_kl=0.03,
            gate_tokens=20_000,
        ),
        # Few tokens: random weights give no tool a reason to be good, only a reason not to be broken.
        SpeedJob(
            name="random-llama",
            job=_job(random_model, random_windows, arguments.work),
            max_kl=0.1,
            gate_tokens=1024,
        ),
    ]


def _job(model: Path, num_windows: int, work: Path) -> Job:
    text = story_llama().calibration
    settings = WindowSettings(window_size=WINDOW_SIZE, num_windows=num_windows, seed=0)
    windows_file, sha256 = write_windows(model, text, settings, work / "windows")
    return Job(
        model=model,
        text=text,
        num_windows=num_windows,
        window_size=WINDOW_SIZE,
        seed=0,
        windows_file=windows_file,
        windows_sha256=sha256,
        grid=GRID,
    )


def _require_sound(job: SpeedJob, tool: str, output: Path) -> float:
    """Return the mean KL of what was written; BenchmarkError where it does not verify or is far from the model."""
    run_measured([*optgptq_command(), "verify", str(output)], output.with_suffix(".verify.log"))
    if tool == OURS:
        require_same_windows(output, job.job.windows_sha256)
    found = score(
        output,
        job.job.model,
        text=story_llama().evaluation,
        window_size=WINDOW_SIZE,
        max_tokens=job.gate_tokens,
    )
    if found.mean_kl > job.max_kl:
        raise BenchmarkError(f"{job.name}, {tool}: mean KL {found.mean_kl:.4f} is above {job.max_kl}")
    return found.mean_kl


def _report(
    jobs: list[SpeedJob],
    tools: list[str],
    measured: dict[tuple[str, str], list[Measurement]],
    divergence: dict[tuple[str, str], float],
    *,
    quick: bool,
) -> Report:
    report = Report(name="speed", title="Time and memory beside the peers", columns=COLUMNS)
    for job in jobs:
        ours = measured.get((job.name, OURS))
        for tool in tools:
            runs = measured[job.name, tool]
            seconds = [run.seconds for run in runs]
            ratio = statistics.median(seconds) / statistics.median(run.seconds for run in ours) if ours else None
            report.rows.append(
                [
                    f"{job.name}, {GRID.label}, {job.job.num_windows} windows of {WINDOW_SIZE}",
                    tool,
                    median_and_spread(seconds),
                    "" if ratio is None else f"{ratio:.2f}",
                    median_and_spread([run.processor_seconds for run in runs]),
                    median_and_spread([run.peak_bytes / MEBIBYTE for run in runs], digits=0),
                    f"{divergence[job.name, tool]:.5f}",
                ]
            )
            report.details.append(
                {"job": job.name, "tool": tool, "ratio": ratio, "runs": [dataclasses.asdict(run) for run in runs]}
            )
            if ratio is not None and tool != OURS and ratio < TARGET_RATIO and not quick:
                report.missed.append(f"{job.name}: {tool} takes {ratio:.2f} times our time; the aim is {TARGET_RATIO}.")
    return report


if __name__ == "__main__":
    sys.exit(main())
