"""Products with sign planes beside dense ones: microseconds, GB/s and the bounds of bytes and of integer operations."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from measure.gpu import ROTATED_BYTES, copied_bytes_per_us, graph_times
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.kernels import choose_binary_matmul
from optgptq.kernels.binary import binary_matmul
from optgptq.kernels.packed_binary import PackedBinary

SHAPES = ((4096, 4096), (14336, 4096))
BITS = (2, 3)
GROUP_SIZE = 128
# Instructions for each weight and plane in the machine code for sm_90, and integer lanes of a multiprocessor.
OPERATIONS_PER_SIGN = 1.0
LANES = 64
MOST_ERROR = 2e-3
LEAST_SHARE = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the bounds of a product depend on: bytes and integer operations per microsecond."""

    bytes_per_us: float
    operations_per_us: float


def main() -> int:
    """Time every shape and number of planes on one device."""
    parser = new_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda is a HIP device too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--clock-mhz", type=float, default=1980.0, help="of the device under load; for the model")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run this on a machine that has one, or with --device cpu")
    if arguments.device == "cuda" and find_spec("triton") is None:
        parser.error("triton is not installed: `pip install optgptq[triton]`, or run with --device cpu")
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    report = _on_gpu(arguments, shapes) if arguments.device == "cuda" else _on_processor(arguments, shapes)
    return finish(report, arguments)


def _on_gpu(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Report:
    machine = _machine(arguments.clock_mhz)
    title = f"Products with sign planes on {torch.cuda.get_device_name()}"
    columns = (
        "rows x columns",
        "tokens",
        "planes",
        "us",
        "fp16 us",
        "speed-up",
        "GB/s",
        "bytes us",
        "integers us",
        "share",
    )
    report = Report(name="binary-matmul", title=title, columns=columns)
    report.notes.append(
        f"float16, groups of {GROUP_SIZE}, calls in one CUDA graph over weights of {ROTATED_BYTES >> 20} MiB in turns. "
        f"Bounds: {machine.bytes_per_us / 1e6:.2f} TB/s, measured by copying; {OPERATIONS_PER_SIGN:g} integer "
        f"operation for each weight and plane at {machine.operations_per_us / 1e6:.1f} T/s "
        f"({arguments.clock_mhz:g} MHz). `share` is the larger bound over the median; at one token the aim is at least "
        f"{LEAST_SHARE:g}, and a speed-up."
    )
    for rows, columns_in in shapes:
        for tokens in arguments.tokens:
            x = torch.randn(tokens, columns_in, dtype=torch.float16, device="cuda")
            dense = _dense_times(x, rows, arguments.repetitions)
            for bits in BITS:
                _gpu_row(report, machine, x, (rows, bits), dense, arguments.repetitions)
    return report


def _gpu_row(
    report: Report, machine: Machine, x: torch.Tensor, size: tuple[int, int], dense: list[float], repetitions: int
) -> None:
    (tokens, columns), (rows, bits) = x.shape, size
    first = random_packed(rows, columns, bits, "cuda", seed=0)
    num_weights = max(2, ROTATED_BYTES // first.nbytes)
    weights = [first, *(random_packed(rows, columns, bits, "cuda", seed=seed) for seed in range(1, num_weights))]
    call = choose_binary_matmul(x.device, x.dtype).call
    error = _require_correct(call(x, first), x, first)
    times = graph_times([lambda weight=weight: call(x, weight) for weight in weights], repetitions)
    middle = statistics.median(times)
    moved = first.nbytes + x.nbytes + tokens * rows * 2
    bounds = (moved / machine.bytes_per_us, rows * columns * bits * OPERATIONS_PER_SIGN / machine.operations_per_us)
    share, speed_up = max(bounds) / middle, statistics.median(dense) / middle
    cells = [f"{rows} x {columns}", str(tokens), str(bits), median_and_spread(times), median_and_spread(dense)]
    figures = [f"{speed_up:.2f}", f"{moved / middle / 1e3:.0f}", *(f"{bound:.2f}" for bound in bounds), f"{share:.2f}"]
    report.rows.append([*cells, *figures])
    report.details.append(
        {"rows": rows, "columns": columns, "tokens": tokens, "bits": bits, "us": times, "dense_us": dense}
        | {"bytes": moved, "bounds_us": bounds, "error": error}
    )
    place = f"{rows} x {columns}, {bits} planes"
    if tokens == 1 and speed_up < 1:
        report.missed.append(f"{place}: {speed_up:.2f} times the speed of float16.")
    if tokens == 1 and share < LEAST_SHARE:
        report.missed.append(f"{place}: {share:.2f} of the model's bound; the aim is {LEAST_SHARE:g}.")


def _dense_times(x: torch.Tensor, rows: int, repetitions: int) -> list[float]:
    num_weights = max(2, ROTATED_BYTES // (rows * x.shape[1] * 2))
    weights = [torch.randn(rows, x.shape[1], dtype=x.dtype, device=x.device) for _ in range(num_weights)]
    return graph_times([lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights], repetitions)


def _machine(clock_mhz: float) -> Machine:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return Machine(bytes_per_us=copied_bytes_per_us(), operations_per_us=processors * LANES * clock_mhz)


def _on_processor(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Report:
    report = Report(
        name="binary-matmul-cpu",
        title="Products with sign planes on a processor, in plain torch",
        columns=("rows x columns", "tokens", "planes", "ms", "dense ms", "times as long"),
        notes=[
            f"float32, groups of {GROUP_SIZE}, {torch.get_num_threads()} threads; the path for tests and small models."
        ],
    )
    for rows, columns in shapes:
        dense_OI = torch.randn(rows, columns)
        for tokens in arguments.tokens:
            x = torch.randn(tokens, columns)
            dense = _wall_times(
                lambda x=x, weight=dense_OI: torch.nn.functional.linear(x, weight), arguments.repetitions
            )
            for bits in BITS:
                packed = random_packed(rows, columns, bits, "cpu", seed=bits)
                call = choose_binary_matmul(x.device, x.dtype).call
                _require_correct(call(x, packed), x, packed)
                times = _wall_times(lambda x=x, packed=packed, call=call: call(x, packed), arguments.repetitions)
                ratio = statistics.median(times) / statistics.median(dense)
                cells = [f"{rows} x {columns}", str(tokens), str(bits), median_and_spread(times)]
                report.rows.append([*cells, median_and_spread(dense), f"{ratio:.1f}"])
                report.details.append({"rows": rows, "columns": columns, "tokens": tokens, "bits": bits, "ms": times})
    return report


def _wall_times(call: Callable[[], torch.Tensor], repetitions: int) -> list[float]:
    """Return milliseconds."""
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return times[1:]


def random_packed(rows: int, columns: int, bits: int, device: str, *, seed: int) -> PackedBinary:
    """Return random planes with float16 coefficients."""
    generator = torch.Generator(device).manual_seed(seed)
    limits, shape = (-(1 << 31), 1 << 31), (columns // 32, bits, rows)
    num_groups = columns // GROUP_SIZE
    return PackedBinary(
        planes_WPO=torch.randint(*limits, shape, dtype=torch.int32, device=device, generator=generator),
        alpha_GPO=torch.rand(num_groups, bits, rows, device=device, generator=generator).half(),
        offset_GO=torch.randn(num_groups, rows, device=device, generator=generator).half(),
        in_features=columns,
        group_size=GROUP_SIZE,
    )


def _require_correct(output: torch.Tensor, x: torch.Tensor, weight: PackedBinary) -> float:
    """Return the largest error beside the largest output, both in float64; it must be small."""
    expected = binary_matmul(x.double(), weight)
    error = float((output.double() - expected).abs().max() / expected.abs().max())
    if not error <= MOST_ERROR:
        raise BenchmarkError(f"relative error {error:.1e} of {list(output.shape)} with {weight.bits} planes")
    return error


if __name__ == "__main__":
    sys.exit(main())
