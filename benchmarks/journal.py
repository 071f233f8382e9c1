"""What it costs to be able to go on after a kill, and how fast a killed job goes on.

Cost: the seconds that a whole job spends on writing its journal, forcing it to disk included, in its own process beside
all other work. Start: a job is killed after half of its decoder layers; the same command runs again, and the clock runs
from its start to its first new decoder layer, that layer's own seconds taken off. Both jobs must end in the same bytes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure.cases import story_llama
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.journal.store import Journal
from optgptq.quantize import quantize
from optgptq.recipe import load_recipe

RECIPES = ("gptq-w4", "attention-aware-w3", "gptqt-w3", "binary-w3", "kv4")
LARGEST_SHARE = 0.05
LATEST_START = 10.0
LAYER_LINE = re.compile(r"decoder layer (\d+)/(\d+),.*?, (\d+(?:\.\d+)?) s, peak")


def main() -> int:
    """Measure every recipe on the bundled model."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    settings = _settings(num_windows=8 if arguments.quick else 128)
    report = Report(
        name="journal",
        title="Journal of a job: what it costs, and how fast a killed job goes on",
        columns=("recipe", "job, s", "journal, s", "share, %", "start after a kill, s"),
        notes=[
            f"story-llama, {', '.join(settings)}; medians of {rounds} rounds with their spread. At most "
            f"{LARGEST_SHARE:.0%} and {LATEST_START:g} s are the aims. Killed jobs ended in the bytes of the others."
        ],
    )
    for recipe in arguments.recipes:
        _measure(recipe, settings, rounds, arguments.work / "journal", report)
    return finish(report, arguments)


def _measure(recipe: str, settings: tuple[str, ...], rounds: int, work: Path, report: Report) -> None:
    totals, kept, starts = [], [], []
    for number in range(rounds):
        output = work / f"{recipe}-{number}"
        _remove(output)
        work.mkdir(parents=True, exist_ok=True)
        with _journal_seconds() as seconds:
            began = time.perf_counter()
            quantize(story_llama().model, load_recipe(recipe, settings), output)
            totals.append(time.perf_counter() - began)
        kept.append(sum(seconds))
        expected = _digest(output)
        if recipe != "kv4":
            starts.append(_killed(recipe, settings, output, expected))
        _remove(output)
    shares = [part / whole for part, whole in zip(kept, totals, strict=True)]
    report.rows.append(
        [
            recipe,
            median_and_spread(totals),
            median_and_spread(kept, digits=3),
            median_and_spread([100 * share for share in shares]),
            median_and_spread(starts) if starts else "-",
        ]
    )
    report.details.append({"recipe": recipe, "seconds": totals, "journal": kept, "starts": starts})
    if statistics.median(shares) > LARGEST_SHARE:
        report.missed.append(f"{recipe}: the journal takes {statistics.median(shares):.1%} of the job.")
    if starts and statistics.median(starts) > LATEST_START:
        report.missed.append(f"{recipe}: a killed job takes {statistics.median(starts):.1f} s to go on.")


@contextmanager
def _journal_seconds() -> Iterator[list[float]]:
    """Collect the seconds of every call that writes into a journal."""
    seconds: list[float] = []
    originals = {name: Journal.__dict__[name] for name in ("put", "sync", "begin", "remove")}

    def timed(original):
        def call(*arguments, **named):
            began = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - began)

        return call

    for name, original in originals.items():
        setattr(Journal, name, timed(original))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(Journal, name, original)


def _killed(recipe: str, settings: tuple[str, ...], output: Path, expected: str) -> float:
    """Kill a job half-way, let it go on, and return the seconds to its first new decoder layer."""
    _remove(output)
    command = [str(Path(sys.executable).with_name("optgptq")), "quantize", str(story_llama().model), "-r", recipe]
    command += ["-o", str(output), *(word for setting in settings for word in ("--set", setting))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        for line in job.stderr:
            found = LAYER_LINE.search(line)
            if found and 2 * int(found[1]) >= int(found[2]):
                job.kill()
                break
    began = time.perf_counter()
    start = None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        for line in job.stderr:
            found = LAYER_LINE.search(line)
            if found and start is None:
                start = time.perf_counter() - began - float(found[3])
    if job.returncode != 0 or start is None:
        raise BenchmarkError(f"{recipe}: the job that was killed did not go on, exit code {job.returncode}")
    if _digest(output) != expected:
        raise BenchmarkError(f"{recipe}: the job that was killed made other bytes")
    return start


def _settings(*, num_windows: int) -> tuple[str, ...]:
    return (
        f"calibration.source={story_llama().calibration}",
        f"calibration.window_size={story_llama().window_size}",
        f"calibration.num_windows={num_windows}",
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _remove(output: Path) -> None:
    for path in output.parent.glob(f"*{output.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
