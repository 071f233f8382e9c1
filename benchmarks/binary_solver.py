"""Seconds of the solver for binary codes beside those of plain GPTQ, on the same random matrices.

Both walk one group of columns after the other, with the searches that the recipes use. Before a time counts, compiled
loops must give the codes of the torch code that defines them (float64, a part of the matrix), lose what it loses in
float32, and the binary codes must lose less than the uniform grid.

The second ratio is to the column loop of plain GPTQ alone: its time without that of factoring the moment and of the two
energies it reports, which are timed by themselves on the same matrix in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.grids.binary_settings import BinarySettings
from optgptq.grids.settings import GridSettings
from optgptq.layout import CoefficientStorage
from optgptq.solvers import LayerProblem, LayerSolution, SolverSettings, binary, gptq
from optgptq.solvers.factor import factor_problem
from optgptq.solvers.losses import factored_energy

TARGET_RATIO = 10.0
SIZES = (1024, 4096)
QUICK_SIZES = (256,)
# Bits of the code and of the whole numbers among which it is searched, and how coefficients are stored.
CODES: tuple[tuple[int, int, CoefficientStorage], ...] = (
    (2, 4, "int8"),
    (2, 4, "steps"),
    (3, 4, "int8"),
    (3, 5, "int8"),
    (3, 5, "float"),
    (3, 5, "steps"),
    (4, 5, "int8"),
    (4, 5, "steps"),
)
COLUMNS = (
    "matrix",
    "bits",
    "intermediate bits",
    "coefficients",
    "GPTQ, s",
    "binary, s",
    "ratio",
    "ratio to loop",
    "loss, GPTQ",
    "loss, binary",
)
# Rows and columns of the part that torch solves too.
CHECKED = (48, 256)
LARGEST_LOSS_DIFFERENCE = 0.01


def main() -> int:
    """Time all sizes and codes in turns."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds; median and spread are shown")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--columns", type=int, nargs="+", help=f"default: {' and '.join(map(str, SIZES))}")
    arguments = parser.parse_args()
    report = Report(
        name="binary-solver",
        title="The solver for binary codes beside plain GPTQ",
        columns=COLUMNS,
        notes=[
            f"Square matrices, groups of {arguments.group_size}, {torch.get_num_threads()} threads, other settings by "
            f"default. Ratios are medians over rounds. At most {TARGET_RATIO:g} is the aim for the first one.",
            "The ratio to the loop leaves out of GPTQ's seconds what factoring the moment and the two energies that it "
            "reports take on the same matrix, timed by themselves; the binary solver's seconds are whole.",
        ],
    )
    for num_columns in arguments.columns or (QUICK_SIZES if arguments.quick else SIZES):
        problem = _problem(num_columns, arguments.group_size)
        for bits, intermediate_bits, coefficients in CODES:
            grid = replace(problem.grid, bits=bits)
            settings = BinarySettings(intermediate_bits=intermediate_bits, coefficients=coefficients)
            _measure(report, replace(problem, grid=grid, binary=settings), arguments)
    return finish(report, arguments)


def _measure(report: Report, problem: LayerProblem, arguments: argparse.Namespace) -> None:
    _require_the_definition(problem)
    seconds: dict[str, list[float]] = {"gptq": [], "binary": [], "gptq, outside the loop": []}
    losses: dict[str, float] = {}
    for _ in range(1 if arguments.quick else arguments.repetitions):
        for name, solve in (("gptq", gptq.solve), ("binary", binary.solve)):
            taken, losses[name] = _timed(solve, problem)
            seconds[name].append(taken)
        seconds["gptq, outside the loop"].append(_seconds_outside_the_loop(problem))
    if not losses["binary"] < losses["gptq"]:
        raise BenchmarkError(f"binary codes lose {losses['binary']:.5f}, uniform grids {losses['gptq']:.5f}")
    ratios = [slow / fast for slow, fast in zip(seconds["binary"], seconds["gptq"], strict=True)]
    loop_ratios = [slow / (fast - outside) for slow, fast, outside in zip(*_by_round(seconds), strict=True)]
    ratio, size, code = statistics.median(ratios), len(problem.weight_OI), problem.binary.intermediate_bits
    times = [median_and_spread(seconds[name]) for name in ("gptq", "binary")]
    shown = [f"{losses[name]:.5f}" for name in ("gptq", "binary")]
    kind = problem.binary.coefficients
    both_ratios = [median_and_spread(ratios), median_and_spread(loop_ratios)]
    report.rows.append([f"{size} x {size}", str(problem.grid.bits), str(code), kind, *times, *both_ratios, *shown])
    what = {"size": size, "bits": problem.grid.bits, "intermediate_bits": code, "coefficients": kind}
    report.details.append({**what, "seconds": seconds, "loss": losses})
    if ratio > TARGET_RATIO and not arguments.quick:
        what_missed = f"{size} x {size}, {problem.grid.bits} bits among {code}, {kind}"
        report.missed.append(f"{what_missed}: {ratio:.2f} times; aim {TARGET_RATIO:g}.")


def _by_round(seconds: dict[str, list[float]]) -> tuple[list[float], ...]:
    return tuple(seconds[name] for name in ("binary", "gptq", "gptq, outside the loop"))


def _seconds_outside_the_loop(problem: LayerProblem) -> float:
    """Return what factoring the moment and two energies take."""
    began = time.perf_counter()
    factor = factor_problem(problem)
    columns_IO = problem.weight_OI.to(problem.settings.dtype).T[factor.order_I].contiguous()
    for _ in range(2):
        factored_energy(columns_IO, factor.upper_II, factor.added_I)
    return time.perf_counter() - began


def _timed(solve: Callable[[LayerProblem], LayerSolution], problem: LayerProblem) -> tuple[float, float]:
    began = time.perf_counter()
    loss = solve(problem).loss
    return time.perf_counter() - began, loss


def _problem(num_columns: int, group_size: int) -> LayerProblem:
    generator = torch.Generator().manual_seed(num_columns)
    shared = torch.randn(num_columns // 4, num_columns, generator=generator) / (num_columns // 4) ** 0.5
    inputs_TI = torch.randn(2 * num_columns, num_columns // 4, generator=generator) @ shared
    inputs_TI += torch.randn(2 * num_columns, num_columns, generator=generator)
    inputs_TI *= torch.exp(0.5 * torch.randn(1, num_columns, generator=generator))
    return LayerProblem(
        name="random",
        weight_OI=torch.randn(num_columns, num_columns, generator=generator),
        input_moment_II=inputs_TI.T @ inputs_TI / (2 * num_columns),
        num_tokens=2 * num_columns,
        grid=GridSettings(bits=2, symmetric=False, group_size=group_size),
        settings=SolverSettings(),
    )


def _require_the_definition(problem: LayerProblem) -> None:
    """Compare the compiled loops with torch on a part; BenchmarkError where they differ."""
    num_rows, num_columns = CHECKED
    part = replace(
        problem,
        weight_OI=problem.weight_OI[:num_rows, :num_columns],
        input_moment_II=problem.input_moment_II[:num_columns, :num_columns],
    )
    for dtype in (torch.float64, torch.float32):
        settings = replace(part.settings, dtype=dtype)
        found = binary.solve(replace(part, settings=settings))
        expected = binary.solve(replace(part, settings=replace(settings, backend="torch")))
        if dtype == torch.float64 and not torch.equal(found.weight.dequantize(), expected.weight.dequantize()):
            raise BenchmarkError("the compiled loops do not give the weight of torch in float64")
        if abs(found.loss / expected.loss - 1) > LARGEST_LOSS_DIFFERENCE:
            raise BenchmarkError(f"{dtype}: the compiled loops lose {found.loss:.5f}, torch {expected.loss:.5f}")


if __name__ == "__main__":
    sys.exit(main())
