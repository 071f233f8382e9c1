"""Peak memory of `optgptq quantize` on 24 decoder layers beside 6 of the same width: it must not grow with depth."""

from __future__ import annotations

import dataclasses
import statistics
import sys

from measure.process import Measurement
from measure.random_llama import random_llama
from measure.report import Report, finish, median_and_spread, new_parser
from measure.tools import OURS, Grid, Job, quantize
from measure.windows import require_same_windows, write_windows

from optgptq.data.windows import WindowSettings

TARGET_RATIO = 1.15
SHALLOW, DEEP, QUICK_DEEP = 6, 24, 8
GRID = Grid(bits=4, group_size=128, symmetric=True)
TEXT = "bundled:story-calibration"
MEBIBYTE = 2**20


def main() -> int:
    """Quantize both models and compare their peaks."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=1)
    arguments = parser.parse_args()
    depths = (SHALLOW, QUICK_DEEP if arguments.quick else DEEP)
    settings = WindowSettings(window_size=512, num_windows=4 if arguments.quick else 32, seed=0)
    runs: dict[int, list[Measurement]] = {depth: [] for depth in depths}
    for _ in range(arguments.repetitions):
        for depth in depths:
            model = random_llama(arguments.work / "models", num_layers=depth)
            windows_file, sha256 = write_windows(model, TEXT, settings, arguments.work / "windows")
            job = Job(
                model=model,
                text=TEXT,
                num_windows=settings.num_windows,
                window_size=settings.window_size,
                seed=0,
                windows_file=windows_file,
                windows_sha256=sha256,
                grid=GRID,
            )
            output = arguments.work / "memory" / f"{depth}-layers"
            runs[depth].append(quantize(OURS, job, output, peers_folder=arguments.work))
            require_same_windows(output, sha256)
    return finish(_report(runs, settings), arguments)


def _report(runs: dict[int, list[Measurement]], settings: WindowSettings) -> Report:
    report = Report(
        name="memory",
        title="Peak memory against depth",
        columns=("decoder layers", "peak MiB", "to the first row", "seconds"),
        notes=[
            f"Random-weight Llama of width 1024, {GRID.label}, {settings.num_windows} windows of "
            f"{settings.window_size}; activations included. At most {TARGET_RATIO} is the aim."
        ],
    )
    peaks = {depth: statistics.median(run.peak_bytes for run in depth_runs) for depth, depth_runs in runs.items()}
    first = next(iter(peaks.values()))
    for depth, depth_runs in runs.items():
        report.rows.append(
            [
                str(depth),
                median_and_spread([run.peak_bytes / MEBIBYTE for run in depth_runs], digits=0),
                f"{peaks[depth] / first:.3f}",
                median_and_spread([run.seconds for run in depth_runs]),
            ]
        )
        report.details.append({"depth": depth, "runs": [dataclasses.asdict(run) for run in depth_runs]})
        if peaks[depth] / first > TARGET_RATIO:
            report.missed.append(f"{depth} decoder layers take {peaks[depth] / first:.3f} times the memory.")
    return report


if __name__ == "__main__":
    sys.exit(main())
