"""Many requests at once on a processor: our engine beside transformers, paged beside contiguous memory.

Sixteen requests of 64 to 512 tokens in and 128 out, greedy, float32, all tools in turns in one process. Every tool must
write the tokens that transformers' `generate` writes for each request alone, but for near ties: a request counts as
equal if its tokens are; fewer than 15 of 16 fail the benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from optgptq.environment import limit_spinning

# Both tools use the threads of torch; with other work on the machine, threads that spin would measure that.
limit_spinning()

from measure.process import BenchmarkError  # noqa: E402 - torch must be loaded after the line above
from measure.random_llama import WIDTH_1024, random_llama  # noqa: E402
from measure.report import Report, finish, median_and_spread, new_parser  # noqa: E402
from measure.serving import (  # noqa: E402
    LONGEST_PROMPT,
    NEW_TOKENS,
    Outcome,
    Run,
    ServingJob,
    bytes_for_slots,
    engine_run,
    mixed_job,
    transformers_batched,
    transformers_model,
    transformers_one_by_one,
)

from optgptq.bundled import bundled_path  # noqa: E402
from optgptq.runtime.engine_settings import EngineSettings  # noqa: E402

COLUMNS = ("model", "tool", "seconds", "tokens/s", "times generate", "peak KV MiB", "to contiguous", "waste", "equal")
VOCABULARY = 1000
PAGE_SIZE = 16
ONE_BY_ONE, BATCHED = "transformers generate", "transformers generate_batch"
PAGED, BOUNDED, CONTIGUOUS = "optgptq", "optgptq, 0.59 of the memory", "optgptq, contiguous"
BOUND = 0.59
LEAST_TO_GENERATE, LEAST_TO_BATCHED, MOST_MEMORY, MOST_WASTE = 4.0, 1.5, 0.6, 0.04
LEAST_EQUAL = 15 / 16
MEBIBYTE = 2**20


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="median and spread are shown")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the random Llama of width 1024")
    parser.add_argument("--models", nargs="+", choices=("story-llama", "random-llama"), help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = Report(name="serving", title="Many requests at once on a processor", columns=COLUMNS)
    for name in arguments.models or ("story-llama", "random-llama"):
        _compare(report, name, _path_of(name, arguments), arguments)
    report.notes.append(
        "16 requests of 64 to 512 random tokens, 128 new tokens each; float32; rounds in turns in one process. "
        f"Contiguous: one page of {LONGEST_PROMPT + NEW_TOKENS} tokens for each request. Peak KV counts pages that "
        "requests hold; waste is the mean share of their slots without a token."
    )
    return finish(report, arguments)


def _path_of(name: str, arguments: argparse.Namespace) -> Path:
    if name == "story-llama":
        return bundled_path("bundled:story-llama")
    return random_llama(arguments.work / "models", num_layers=arguments.layers, shape=WIDTH_1024)


def _compare(report: Report, name: str, path: Path, arguments: argparse.Namespace) -> None:
    job = mixed_job(num_requests=4 if arguments.quick else 16, vocabulary=VOCABULARY, seed=arguments.seed)
    model = transformers_model(path)
    bound = bytes_for_slots(path, int(BOUND * job.contiguous_slots), page_size=PAGE_SIZE)
    longest = LONGEST_PROMPT + NEW_TOKENS
    tools: dict[str, Run] = {
        ONE_BY_ONE: transformers_one_by_one(model),
        BATCHED: transformers_batched(model),
        PAGED: engine_run(path, EngineSettings(prefix_cache=False)),
        BOUNDED: engine_run(path, EngineSettings(prefix_cache=False, kv_cache_bytes=bound)),
        CONTIGUOUS: engine_run(path, EngineSettings(prefix_cache=False, page_size=longest, max_length=longest)),
    }
    outcomes: dict[str, list[Outcome]] = {tool: [] for tool in tools}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for tool, run in tools.items():
            outcomes[tool].append(run(job))
            print(f"{name}, {tool}: {outcomes[tool][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    expected = outcomes[ONE_BY_ONE][0].tokens
    for tool, runs in outcomes.items():
        _add_row(report, name, tool, runs, job, expected, [run.seconds for run in outcomes[ONE_BY_ONE]])
    _check(report, name, outcomes, job)


def _add_row(
    report: Report,
    name: str,
    tool: str,
    runs: list[Outcome],
    job: ServingJob,
    expected: list[list[int]],
    reference_seconds: list[float],
) -> None:
    equal = [sum(a == b for a, b in zip(run.tokens, expected, strict=True)) for run in runs]
    if min(equal) < LEAST_EQUAL * len(expected):
        raise BenchmarkError(f"{name}, {tool}: only {min(equal)} of {len(expected)} requests have the right tokens")
    ratios = [reference / run.seconds for reference, run in zip(reference_seconds, runs, strict=True)]
    figures = runs[0].figures
    has_pages = "peak_slots" in figures
    report.rows.append(
        [
            name,
            tool,
            median_and_spread([run.seconds for run in runs]),
            median_and_spread([job.num_new / run.seconds for run in runs], digits=0),
            median_and_spread(ratios, digits=1),
            f"{figures['peak_bytes'] / MEBIBYTE:.1f}" if has_pages else "-",
            f"{figures['peak_slots'] / job.contiguous_slots:.3f}" if has_pages else "-",
            f"{figures['waste']:.3f}" if has_pages else "-",
            f"{min(equal)}/{len(expected)}",
        ]
    )
    report.details.append({"model": name, "tool": tool, "seconds": [run.seconds for run in runs], **figures})


def _check(report: Report, name: str, outcomes: Mapping[str, list[Outcome]], job: ServingJob) -> None:
    def ratio(slow: str, fast: str) -> float:
        pairs = zip(outcomes[slow], outcomes[fast], strict=True)
        ratios = sorted(one.seconds / two.seconds for one, two in pairs)
        return ratios[len(ratios) // 2]

    memory = outcomes[BOUNDED][0].figures["peak_slots"] / job.contiguous_slots
    waste = outcomes[BOUNDED][0].figures["waste"]
    for holds, sentence in (
        (ratio(ONE_BY_ONE, BOUNDED) >= LEAST_TO_GENERATE, f"{ratio(ONE_BY_ONE, BOUNDED):.1f} times generate, aim 4"),
        (ratio(BATCHED, BOUNDED) >= LEAST_TO_BATCHED, f"{ratio(BATCHED, BOUNDED):.1f} times generate_batch, aim 1.5"),
        (memory <= MOST_MEMORY, f"{memory:.3f} of a contiguous cache, aim 0.6"),
        (waste < MOST_WASTE, f"{waste:.3f} of the slots wasted, aim below 0.04"),
    ):
        if not holds:
            report.missed.append(f"{name}: {sentence}")


if __name__ == "__main__":
    sys.exit(main())
