"""Peak memory and seconds of the attention-aware recipe beside plain GPTQ.

One decoder layer of random weights, width 4096, 8 key/value heads.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from measure.process import Measurement, run_measured
from measure.random_llama import WIDTH_4096, random_llama
from measure.report import Report, finish, median_and_spread, new_parser
from measure.tools import OFFLINE, optgptq_command

MEBIBYTE = 2**20
PEAK_AIM = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A recipe with settings of its own; `seconds_aim`: how many times the first job's wall time it may take."""

    name: str
    recipe: str
    seconds_aim: float
    settings: Mapping[str, str] = field(default_factory=dict)


JOBS = (
    _Job(name="gptq-w4", recipe="gptq-w4", seconds_aim=1.0),
    _Job(
        name="attention-aware-w4, values off",
        recipe="attention-aware-w4",
        settings={"attention.values": "false", "attention.value_rows": "false"},
        seconds_aim=3.0,
    ),
    _Job(name="attention-aware-w4", recipe="attention-aware-w4", seconds_aim=5.0),
)


def main() -> int:
    """Quantize the layer by each job and compare peaks and seconds with the first one's."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    model = random_llama(arguments.work / "models", num_layers=1, shape=WIDTH_4096)
    num_windows = 4 if arguments.quick else arguments.windows
    runs: dict[str, list[Measurement]] = {job.name: [] for job in JOBS}
    for _ in range(arguments.repetitions):
        for number, job in enumerate(JOBS):
            output = arguments.work / "attention-memory" / f"{number}-{job.recipe}"
            settings = {
                "calibration.source": "bundled:story-calibration",
                "calibration.num_windows": str(num_windows),
                "calibration.window_size": "512",
                **job.settings,
            }
            command = [*optgptq_command(), "quantize", str(model), "-r", job.recipe, "-o", str(output), "--overwrite"]
            for name, value in settings.items():
                command += ["--set", f"{name}={value}"]
            output.parent.mkdir(parents=True, exist_ok=True)
            runs[job.name].append(run_measured(command, output.with_suffix(".log"), environment=OFFLINE))
    return finish(_report(runs, num_windows), arguments)


def _report(runs: Mapping[str, Sequence[Measurement]], num_windows: int) -> Report:
    report = Report(
        name="attention-memory",
        title="Peak memory and seconds of attention-aware quantization",
        columns=("recipe", "peak MiB", "peak to the first row", "seconds", "seconds to the first row"),
        notes=[
            "One random-weight decoder layer: width 4096, feed-forward 14336, 32 query and 8 key/value heads; "
            f"{num_windows} windows of 512. Aims: at most {PEAK_AIM} times the memory; {JOBS[1].seconds_aim:g} times "
            f"the seconds without values, {JOBS[2].seconds_aim:g} with. Every output was read back."
        ],
    )
    first = runs[JOBS[0].name]
    for job in JOBS:
        each = runs[job.name]
        peak = _ratio([run.peak_bytes for run in each], [run.peak_bytes for run in first])
        seconds = _ratio([run.seconds for run in each], [run.seconds for run in first])
        report.rows.append(
            [
                job.name,
                median_and_spread([run.peak_bytes / MEBIBYTE for run in each], digits=0),
                f"{peak:.3f}",
                median_and_spread([run.seconds for run in each], digits=1),
                f"{seconds:.2f}",
            ]
        )
        report.details.append({"recipe": job.name, "runs": [dataclasses.asdict(run) for run in each]})
        if peak > PEAK_AIM:
            report.missed.append(f"{job.name} takes {peak:.3f} times the memory of {JOBS[0].name}; aim {PEAK_AIM}.")
        if seconds > job.seconds_aim:
            aim = f"aim {job.seconds_aim:g}"
            report.missed.append(f"{job.name} takes {seconds:.2f} times the seconds of {JOBS[0].name}; {aim}.")
    return report


def _ratio(values: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(values) / statistics.median(to)


if __name__ == "__main__":
    sys.exit(main())
