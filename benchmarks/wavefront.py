"""Seconds of the two-sided solver beside those of the one-sided one, on the same random matrices.

`rows`: every row on grids of its own, row after row. `wavefront`: grids of a group of columns found for whole heads at
once, then anti-diagonals. Both must lose less than the one-sided solver under the moments that they were given, and
agree with each other code for code on the same grids, before a time counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.grids.settings import GridSettings
from optgptq.solvers import LayerProblem, LayerSolution, SolverSettings, gptq, two_sided

TARGET_RATIO = 4.0
SIZES = ((64, 1024), (128, 1024), (64, 4096), (128, 4096))
QUICK_SIZES = ((32, 256),)
COLUMNS = ("d_h", "C", "group", "solver", "seconds", "to one-sided", "coupled loss")


def main() -> int:
    """Time all sizes in turns."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds; median and spread are shown")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--head-size", type=int, nargs="+", help="default: 64 and 128")
    parser.add_argument("--columns", type=int, nargs="+", help="default: 1024 and 4096")
    parser.add_argument("--backend", default="auto", help="who runs the inner loops")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    report = Report(
        name="wavefront",
        title="The two-sided solver beside the one-sided one",
        columns=COLUMNS,
        notes=[
            f"Square matrices of C/d_h heads, {arguments.bits} bits, {torch.get_num_threads()} threads, "
            f"backend {arguments.backend}, device {arguments.device}. "
            f"At most {TARGET_RATIO:g} times the one-sided time is the aim."
        ],
    )
    sizes = QUICK_SIZES if arguments.quick else SIZES
    for head_size, num_columns in sizes:
        if head_size in (arguments.head_size or [head_size]) and num_columns in (arguments.columns or [num_columns]):
            _measure(report, head_size, num_columns, arguments)
    return finish(report, arguments)


def _measure(report: Report, head_size: int, num_columns: int, arguments: argparse.Namespace) -> None:
    case = _problem(head_size, num_columns, arguments)
    _require_same_codes(case)
    cases = {
        "one-sided": replace(case, output_moment_NDD=None),
        "two-sided, rows": case,
        "two-sided, wavefront": replace(case, settings=replace(case.settings, row_mode="wavefront", row_block=-1)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    losses: dict[str, float] = {}
    for _ in range(1 if arguments.quick else arguments.repetitions):
        for name, one in cases.items():
            _finished(arguments.device)
            began = time.perf_counter()
            solution = gptq.solve(one) if one.output_moment_NDD is None else two_sided.solve(one)
            _finished(arguments.device)
            seconds[name].append(time.perf_counter() - began)
            losses[name] = _coupled_loss(case, solution)
    baseline = statistics.median(seconds["one-sided"])
    for name, taken in seconds.items():
        if name != "one-sided" and not losses[name] < losses["one-sided"]:
            raise BenchmarkError(f"{name}: loss {losses[name]:.5f}, one-sided {losses['one-sided']:.5f}")
        ratio = statistics.median(taken) / baseline
        group = "row" if arguments.group_size == -1 else str(arguments.group_size)
        report.rows.append(
            [
                str(head_size),
                str(num_columns),
                group,
                name,
                median_and_spread(taken, digits=3),
                f"{ratio:.2f}",
                f"{losses[name]:.5f}",
            ]
        )
        report.details.append(
            {"head_size": head_size, "columns": num_columns, "solver": name, "seconds": taken, "loss": losses[name]}
        )
        if ratio > TARGET_RATIO and not arguments.quick:
            report.missed.append(f"d_h {head_size}, C {num_columns}, {name}: {ratio:.2f} times; aim {TARGET_RATIO:g}.")


def _problem(head_size: int, num_columns: int, arguments: argparse.Namespace) -> LayerProblem:
    generator = torch.Generator().manual_seed(head_size + num_columns)
    group_size = min(arguments.group_size, num_columns)
    return LayerProblem(
        name="random",
        weight_OI=torch.randn(num_columns, num_columns, generator=generator).to(arguments.device),
        input_moment_II=_moments(1, num_columns, generator)[0].to(arguments.device),
        num_tokens=2 * num_columns,
        grid=GridSettings(bits=arguments.bits, symmetric=False, group_size=group_size),
        settings=SolverSettings(backend=arguments.backend),
        output_moment_NDD=_moments(num_columns // head_size, head_size, generator).to(arguments.device),
    )


def _moments(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Return moments of inputs that share a few directions and differ in size."""
    shared = torch.randn(count, size // 4, size, generator=generator)
    inputs = torch.randn(count, 2 * size, size // 4, generator=generator) @ shared / (size // 4) ** 0.5
    inputs += torch.randn(count, 2 * size, size, generator=generator)
    inputs *= torch.exp(0.5 * torch.randn(count, 1, size, generator=generator))
    return inputs.transpose(1, 2) @ inputs / (2 * size)


def _require_same_codes(case: LayerProblem) -> None:
    """Compare both ways of walking in float64 on two heads and 256 columns; BenchmarkError where a code differs."""
    assert case.output_moment_NDD is not None
    num_rows, num_columns = 2 * case.output_moment_NDD.shape[1], min(256, case.weight_OI.shape[1])
    settings = replace(case.settings, dtype=torch.float64, row_block=-1)
    part = replace(
        case,
        weight_OI=case.weight_OI[:num_rows, :num_columns],
        input_moment_II=case.input_moment_II[:num_columns, :num_columns],
        output_moment_NDD=case.output_moment_NDD[:2],
        grid=replace(case.grid, group_size=min(case.grid.group_size, num_columns)),
        settings=settings,
    )
    rows = two_sided.solve(part).weight
    wave = two_sided.solve(replace(part, settings=replace(settings, row_mode="wavefront"))).weight
    if not torch.equal(rows.codes_OI, wave.codes_OI):
        raise BenchmarkError("row after row and in anti-diagonals the codes are not the same")


def _coupled_loss(case: LayerProblem, solution: LayerSolution) -> float:
    """Return the share of the coupled energy that the decoded weight loses."""
    assert case.output_moment_NDD is not None
    num_heads, head_size, _ = case.output_moment_NDD.shape
    error_OI = case.weight_OI - solution.weight.dequantize()
    parts = []
    for dense_OI in (error_OI, case.weight_OI):
        dense_NDI = dense_OI.view(num_heads, head_size, -1)
        weighted_NDI = (dense_OI @ case.input_moment_II).view_as(dense_NDI)
        parts.append(float(((case.output_moment_NDD @ dense_NDI) * weighted_NDI).sum(dtype=torch.float64)))
    return parts[0] / parts[1]


def _finished(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    sys.exit(main())
