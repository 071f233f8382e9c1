"""Peak memory of the attention-aware recipe beside plain GPTQ: one decoder layer, width 4096, 8 key/value heads."""

from __future__ import annotations

import dataclasses
import statistics
import sys

from measure.process import Measurement, run_measured
from measure.random_llama import WIDTH_4096, random_llama
from measure.report import Report, finish, median_and_spread, new_parser
from measure.tools import OFFLINE, optgptq_command

TARGET_RATIO = 1.5
RECIPES = ("gptq-w4", "attention-aware-w4")
MEBIBYTE = 2**20


def main() -> int:
    """Quantize the layer by both recipes and compare their peaks."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()
    model = random_llama(arguments.work / "models", num_layers=1, shape=WIDTH_4096)
    runs: dict[str, list[Measurement]] = {recipe: [] for recipe in RECIPES}
    for _ in range(arguments.repetitions):
        for recipe in RECIPES:
            output = arguments.work / "attention-memory" / recipe
            settings = {
                "calibration.source": "bundled:story-calibration",
                "calibration.num_windows": str(4 if arguments.quick else arguments.windows),
                "calibration.window_size": "512",
            }
            command = [*optgptq_command(), "quantize", str(model), "-r", recipe, "-o", str(output), "--overwrite"]
            for name, value in settings.items():
                command += ["--set", f"{name}={value}"]
            output.parent.mkdir(parents=True, exist_ok=True)
            runs[recipe].append(run_measured(command, output.with_suffix(".log"), environment=OFFLINE))
    return finish(_report(runs, arguments.windows), arguments)


def _report(runs: dict[str, list[Measurement]], num_windows: int) -> Report:
    report = Report(
        name="attention-memory",
        title="Peak memory of attention-aware quantization",
        columns=("recipe", "peak MiB", "to the first row", "seconds"),
        notes=[
            "One random-weight decoder layer: width 4096, feed-forward 14336, 32 query and 8 key/value heads; "
            f"{num_windows} windows of 512. At most {TARGET_RATIO} is the aim. Both outputs were read back."
        ],
    )
    peaks = {recipe: statistics.median(run.peak_bytes for run in each) for recipe, each in runs.items()}
    first = peaks[RECIPES[0]]
    for recipe, each in runs.items():
        report.rows.append(
            [
                recipe,
                median_and_spread([run.peak_bytes / MEBIBYTE for run in each], digits=0),
                f"{peaks[recipe] / first:.3f}",
                median_and_spread([run.seconds for run in each]),
            ]
        )
        report.details.append({"recipe": recipe, "runs": [dataclasses.asdict(run) for run in each]})
    if peaks[RECIPES[1]] / first > TARGET_RATIO:
        report.missed.append(f"{RECIPES[1]} takes {peaks[RECIPES[1]] / first:.3f} times the memory of {RECIPES[0]}.")
    return report


if __name__ == "__main__":
    sys.exit(main())
