"""Mean KL, perplexity and bits of ours beside the peers: same model, same calibration tokens, one evaluator.

Our tool runs as a user runs it, by its command, and cuts its own windows; that it calibrated on the tokens that the
peers were given is checked by their hash.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from measure.cases import NUM_WINDOWS, REPOSITORY, Case, chosen_cases
from measure.process import BenchmarkError
from measure.report import Report, add_peer_options, add_peer_versions, chosen_tools, finish, new_parser
from measure.score import Score, score
from measure.tools import OURS, Grid, Job, quantize
from measure.windows import require_same_windows, write_windows

from optgptq.data.windows import WindowSettings

COLUMNS = ("model", "grid", "tool", "bits per weight", "mean KL", "perplexity", "top-1", "KL to best peer")
QUICK_WINDOWS = 8
QUICK_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All seeds of one tool on one model and grid."""

    case: str
    grid: Grid
    tool: str
    scores: tuple[Score, ...]

    @property
    def mean_kl(self) -> float:
        return statistics.fmean(score.mean_kl for score in self.scores)

    @property
    def perplexity(self) -> float:
        return statistics.fmean(score.perplexity for score in self.scores)

    @property
    def top1_agreement(self) -> float:
        return statistics.fmean(score.top1_agreement for score in self.scores)


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = new_parser(__doc__)
    add_peer_options(parser)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="folder of further models")
    parser.add_argument("--models", nargs="+", help="names of models; default: all that are present")
    parser.add_argument("--grids", nargs="+", choices=("symmetric", "asymmetric"), default=["symmetric", "asymmetric"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[4, 3, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the choice of windows")
    parser.add_argument("--reuse-peers", action="store_true", help="keep what peers made from the same windows before")
    arguments = parser.parse_args()
    tools = chosen_tools(arguments, parser)
    report = Report(name="quality", title="Quality beside the peers", columns=COLUMNS)
    cells = [
        _run_cell(case, grid, tool, arguments)
        for case in chosen_cases(arguments, parser, report.notes)
        for grid in _grids(case, arguments)
        for tool in tools
    ]
    _fill(report, cells)
    report.notes.append(
        f"{QUICK_WINDOWS if arguments.quick else NUM_WINDOWS} calibration windows (fewer where the text ends first), "
        f"seeds {', '.join(map(str, arguments.seeds))}; KL in nats per token over the first "
        f"{QUICK_TOKENS if arguments.quick else 20_000:,} tokens of bundled:story-evaluation. "
        "Bits count codes, scales, and zero points of asymmetric grids, alike for every tool."
    )
    add_peer_versions(report, arguments, tools)
    return finish(report, arguments)


def _grids(case: Case, arguments: argparse.Namespace) -> list[Grid]:
    return [
        Grid(bits=bits, group_size=group_size, symmetric=kind == "symmetric")
        for kind in arguments.grids
        for bits, group_size in case.codes
        if bits in arguments.bits
    ]


def _run_cell(case: Case, grid: Grid, tool: str, arguments: argparse.Namespace) -> Cell:
    scores = []
    for seed in arguments.seeds:
        job = _job(case, grid, seed, arguments)
        output = arguments.work / "quality" / case.name / f"{tool}-{grid.label.replace(' ', '-')}-seed-{seed}"
        if not (arguments.reuse_peers and tool != OURS and _is_from(output, job)):
            _marker(output).unlink(missing_ok=True)
            quantize(tool, job, output, peers_folder=arguments.peers, settings=tuple(arguments.settings))
            _marker(output).write_text(json.dumps(job.windows_sha256), "utf-8")
        if tool == OURS:
            require_same_windows(output, job.windows_sha256)
        max_tokens = {"max_tokens": QUICK_TOKENS} if arguments.quick else {}
        found = score(output, case.model, text=case.evaluation, window_size=case.window_size, **max_tokens)
        print(f"{case.name}, {grid.label}, seed {seed}, {tool}: KL {found.mean_kl:.5f}", file=sys.stderr, flush=True)
        scores.append(found)
    return Cell(case=case.name, grid=grid, tool=tool, scores=tuple(scores))


def _job(case: Case, grid: Grid, seed: int, arguments: argparse.Namespace) -> Job:
    num_windows = QUICK_WINDOWS if arguments.quick else NUM_WINDOWS
    settings = WindowSettings(window_size=case.window_size, num_windows=num_windows, seed=seed)
    windows_file, sha256 = write_windows(case.model, case.calibration, settings, arguments.work / "windows")
    return Job(
        model=case.model,
        text=case.calibration,
        num_windows=num_windows,
        window_size=case.window_size,
        seed=seed,
        windows_file=windows_file,
        windows_sha256=sha256,
        grid=grid,
    )


def _marker(output: Path) -> Path:
    """Return the file beside an output that tells which windows it was made from."""
    return output.with_suffix(".windows.json")


def _is_from(output: Path, job: Job) -> bool:
    marker = _marker(output)
    return output.is_dir() and marker.is_file() and json.loads(marker.read_text("utf-8")) == job.windows_sha256


def _fill(report: Report, cells: list[Cell]) -> None:
    for cell in cells:
        rivals = [other for other in cells if (other.case, other.grid) == (cell.case, cell.grid) and other.tool != OURS]
        best = min((rival.mean_kl for rival in rivals), default=None)
        report.rows.append(
            [
                cell.case,
                cell.grid.label,
                cell.tool,
                f"{cell.scores[0].bits_per_weight:.4f}",
                f"{cell.mean_kl:.5f}",
                f"{cell.perplexity:.4f}",
                f"{cell.top1_agreement:.2%}",
                "" if best is None else f"{cell.mean_kl / best:.3f}",
            ]
        )
        report.details.append(dataclasses.asdict(cell))
        _require_same_weights(cell, rivals)
        if cell.tool == OURS and best is not None and cell.mean_kl > best:
            report.missed.append(f"{cell.case}, {cell.grid.label}: KL {cell.mean_kl:.5f}, best peer {best:.5f}.")
    report.notes += sorted(
        {f"Dense perplexity of {cell.case}: {cell.scores[0].dense_perplexity:.4f}." for cell in cells}
    )


def _require_same_weights(cell: Cell, rivals: list[Cell]) -> None:
    counts = {other.scores[0].num_quantized_weights for other in (cell, *rivals)}
    if len(counts) > 1:
        raise BenchmarkError(f"{cell.case}, {cell.grid.label}: the tools quantized different weights: {counts}")


if __name__ == "__main__":
    sys.exit(main())
