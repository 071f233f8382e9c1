"""What paged memory, the prefix cache and shared key/value heads each do for an ALiBi model, in one table.

The job is sixteen requests that begin with the same 256 tokens, go on with 64 to 512 of their own, and get 128 new
ones. Each number of key/value heads is run with a contiguous cache, with pages, and with pages and the prefix cache, in
turns. The three must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from optgptq.environment import limit_spinning

limit_spinning()

from measure.process import BenchmarkError  # noqa: E402 - torch must be loaded after the line above
from measure.random_mpt import random_mpt  # noqa: E402
from measure.report import Report, finish, median_and_spread, new_parser  # noqa: E402
from measure.serving import LONGEST_PROMPT, NEW_TOKENS, Outcome, engine_run, mixed_job  # noqa: E402
from measure.story_mpt import STEPS, story_mpt  # noqa: E402

from optgptq.runtime.engine_settings import EngineSettings  # noqa: E402

COLUMNS = ("model", "heads a group", "memory", "tokens/s", "to contiguous", "peak KV MiB", "hits", "perplexity")
SHARED_PREFIX, VOCABULARY, PAGE_SIZE = 256, 1000, 16
GROUPS = (1, 2, 4)
# Contiguous room for the longest request, a multiple of a page.
LONGEST = SHARED_PREFIX + LONGEST_PROMPT + NEW_TOKENS
MEBIBYTE = 2**20
LEAST_EQUAL = 15 / 16


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="median and spread are shown")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the random MPT of width 1024")
    arguments = parser.parse_args()
    report = Report(name="paging", title="Pages, prefix cache and shared key/value heads, ALiBi", columns=COLUMNS)
    models = arguments.work / "models"
    steps = 20 if arguments.quick else STEPS
    _measure(report, "story-mpt", story_mpt(models, steps=steps), arguments)
    _measure(report, "random-mpt", random_mpt(models, num_layers=arguments.layers), arguments)
    report.notes.append(
        "16 requests with 256 tokens in common and 64 to 512 of their own, 128 new tokens each; float32; the memory "
        "settings of one model in turns in one process. Perplexity: held-out stories (bundled:story-evaluation), dense "
        "weights, before and after the conversion; story-mpt was trained for this page, random-mpt knows nothing."
    )
    return finish(report, arguments)


def _measure(report: Report, name: str, path: Path, arguments: argparse.Namespace) -> None:
    for group in GROUPS:
        grouped, perplexity = _grouped(path, group, arguments)
        for row in _rows(report, name, grouped, group, arguments):
            report.rows.append([*row, perplexity if name == "story-mpt" else "-"])


def _grouped(path: Path, group: int, arguments: argparse.Namespace) -> tuple[Path, str]:
    """Return the model with so many query heads for each key/value head, and its perplexity before and after."""
    if group == 1:
        return path, "-"
    output = arguments.work / f"{path.name}-gqa-{group}"
    command = [
        *(sys.executable, "-m", "optgptq_cli", "gqa", str(path), "-o", str(output), "--group", str(group)),
        *("--overwrite", "--json", "--text", "bundled:story-evaluation", "--set", "calibration.num_windows=32"),
        *("--set", "calibration.source=bundled:story-calibration", "--set", "calibration.window_size=256"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"optgptq gqa ended with {done.returncode}: {done.stderr[-2000:]}")
    record = json.loads(done.stdout)
    return output, f"{record['perplexity_before']:.3f} to {record['perplexity_after']:.3f}"


def _rows(report: Report, name: str, path: Path, group: int, arguments: argparse.Namespace) -> list[list[str]]:
    job = mixed_job(num_requests=16, vocabulary=VOCABULARY, seed=0, shared_prefix=SHARED_PREFIX)
    runs = {
        "contiguous": engine_run(path, EngineSettings(prefix_cache=False, page_size=LONGEST, max_length=LONGEST)),
        "pages": engine_run(path, EngineSettings(prefix_cache=False, page_size=PAGE_SIZE, max_length=LONGEST)),
        "pages, prefix cache": engine_run(path, EngineSettings(page_size=PAGE_SIZE, max_length=LONGEST)),
    }
    outcomes: dict[str, list[Outcome]] = {memory: [] for memory in runs}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for memory, run in runs.items():
            outcomes[memory].append(run(job))
    expected = outcomes["contiguous"][0]
    rows = []
    for memory, several in outcomes.items():
        equal = min(sum(a == b for a, b in zip(one.tokens, expected.tokens, strict=True)) for one in several)
        if equal < LEAST_EQUAL * len(expected.tokens):
            raise BenchmarkError(f"{name}, group {group}, {memory}: only {equal} requests have the same tokens")
        figures = several[0].figures
        ratios = [one.seconds / two.seconds for one, two in zip(outcomes["contiguous"], several, strict=True)]
        rows.append(
            [
                name,
                str(group),
                memory,
                median_and_spread([job.num_new / one.seconds for one in several], digits=0),
                median_and_spread(ratios),
                f"{figures['peak_bytes'] / MEBIBYTE:.1f}",
                str(figures["prefix_hit_tokens"]),
            ]
        )
        report.details.append({"model": name, "group": group, "memory": memory, **figures})
    return rows


if __name__ == "__main__":
    sys.exit(main())
