"""Products with packed codes beside dense ones and other kernels on a GPU: microseconds, GB/s, share of a copy."""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from measure.gpu import ROTATED_BYTES, copied_bytes_per_us, graph_times
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.affine_weight import AffineWeight
from optgptq.kernels import choose_affine_matmul
from optgptq.kernels.packed_affine import PackedAffine, pack_affine

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BITS = (2, 3, 4, 8)
GROUP_SIZE = 128
# torch's kernel for 4 bits takes bfloat16 only.
DTYPE = torch.bfloat16
MOST_ERROR = 1e-2
LEAST_SHARE = 0.7
COLUMNS = ("rows x columns", "tokens", "kernel", "bits", "us", "GB/s", "share of copying", "times dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A kernel and the weights that it holds: `call(number)` multiplies with one of them, `nbytes` bytes long."""

    name: str
    bits: int
    call: Callable[[int], torch.Tensor]
    num_weights: int
    nbytes: int


def main() -> int:
    """Time every shape, width and kernel on the GPU."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 128])
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run this on a machine that has one")
    if find_spec("triton") is None:
        parser.error("triton is not installed: `pip install optgptq[triton]`")
    return finish(_measured(arguments, SHAPES[:1] if arguments.quick else SHAPES), arguments)


def _measured(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Report:
    copied = copied_bytes_per_us()
    title = f"Products with packed codes on {torch.cuda.get_device_name()}"
    report = Report(name="affine-matmul", title=title, columns=COLUMNS)
    report.notes.append(
        f"bfloat16, groups of {GROUP_SIZE}, zero points of their own, calls in one CUDA graph over weights of "
        f"{ROTATED_BYTES >> 20} MiB in turns. Bytes are those of the weight as it is held, inputs and outputs; a copy "
        f"moves {copied / 1e6:.2f} TB/s. At one token the aim of ours is {LEAST_SHARE:g} of that, and to be faster "
        "than every other of the same width."
    )
    for shape in shapes:
        for tokens in arguments.tokens:
            x = torch.randn(tokens, shape[1], dtype=DTYPE, device="cuda")
            dense = None
            for contender in _contenders(x, shape[0]):
                calls = [partial(contender.call, number) for number in range(contender.num_weights)]
                times = graph_times(calls, arguments.repetitions)
                dense = statistics.median(times) if dense is None else dense
                _row(report, contender, x, shape, times, copied=copied, dense=dense)
    _judge(report)
    return report


def _contenders(x: torch.Tensor, rows: int) -> Iterator[Contender]:
    """Yield the dense product and every kernel that is here, each when it has multiplied correctly."""
    yield _dense(x, rows)
    for bits in BITS:
        first = random_affine(rows, x.shape[1], bits, seed=0, device=x.device)
        expected = x.double() @ first.dequantize().double().T
        makers = [_ours]
        makers += [_of_torch] if bits == 4 and torch.version.hip is None else []
        makers += [_of_gemlite] if bits != 3 and find_spec("gemlite") is not None else []
        for make in makers:
            contender = make(x, first)
            _require_correct(contender, expected)
            yield contender


def _num_weights(nbytes: int) -> int:
    return max(2, ROTATED_BYTES // nbytes)


def _dense(x: torch.Tensor, rows: int) -> Contender:
    nbytes = rows * x.shape[1] * x.element_size()
    weights = [torch.randn(rows, x.shape[1], dtype=x.dtype, device=x.device) for _ in range(_num_weights(nbytes))]
    return Contender(
        name="torch, dense",
        bits=16,
        call=lambda number: torch.nn.functional.linear(x, weights[number]),
        num_weights=len(weights),
        nbytes=nbytes,
    )


def _ours(x: torch.Tensor, weight: AffineWeight) -> Contender:
    multiply, first = choose_affine_matmul(x.device, x.dtype).call, pack_affine(weight)
    # Stacked with nothing, a weight is the same numbers in memory of their own.
    weights = [first, *(PackedAffine.stacked([first]) for _ in range(1, _num_weights(first.nbytes)))]
    return Contender(
        name="optgptq",
        bits=weight.bits,
        call=lambda number: multiply(x, weights[number]),
        num_weights=len(weights),
        nbytes=first.nbytes,
    )


def _of_torch(x: torch.Tensor, weight: AffineWeight) -> Contender:
    """Two codes in a byte, the first above; a weight is `(code - 8) * scale + zero`."""
    codes_OI = weight.codes_OI
    packed = torch.ops.aten._convert_weight_to_int4pack(codes_OI[:, ::2] << 4 | codes_OI[:, 1::2], 8)
    scale_GO = weight.scale_OG.t().float()
    zero_GO = scale_GO * (8 - weight.zero_point_OG.t())
    scales = torch.stack([scale_GO, zero_GO], 2).to(x.dtype).contiguous()
    nbytes = packed.nbytes + scales.nbytes
    weights = [(packed.clone(), scales.clone()) for _ in range(_num_weights(nbytes))]
    return Contender(
        name="torch, _weight_int4pack_mm",
        bits=4,
        call=lambda number: torch.ops.aten._weight_int4pack_mm(x, weights[number][0], GROUP_SIZE, weights[number][1]),
        num_weights=len(weights),
        nbytes=nbytes,
    )


def _of_gemlite(x: torch.Tensor, weight: AffineWeight) -> Contender:
    core = importlib.import_module("gemlite.core")

    def linear() -> Callable[[torch.Tensor], torch.Tensor]:
        layer = core.GemLiteLinear(
            weight.bits,
            group_size=GROUP_SIZE,
            in_features=weight.in_features,
            out_features=weight.out_features,
            input_dtype=core.DType.BF16,
            output_dtype=core.DType.BF16,
        )
        scale, zero_point = (part.reshape(-1, 1).to(x.dtype) for part in (weight.scale_OG, weight.zero_point_OG))
        layer.pack(weight.codes_OI, scale, zero_point, None)
        return layer

    nbytes = weight.codes_OI.numel() * weight.bits // 8 + 4 * weight.scale_OG.numel()
    layers = [linear() for _ in range(_num_weights(nbytes))]
    return Contender(
        name="gemlite",
        bits=weight.bits,
        call=lambda number: layers[number](x),
        num_weights=len(layers),
        nbytes=nbytes,
    )


def random_affine(rows: int, columns: int, bits: int, *, seed: int, device: torch.device) -> AffineWeight:
    """Return random codes, scales that are exact in bfloat16, and zero points."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (rows, columns // GROUP_SIZE)
    options = {"device": device, "generator": generator}
    return AffineWeight(
        codes_OI=torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, **options),
        scale_OG=(torch.rand(shape, **options) + 0.5).to(torch.bfloat16),
        zero_point_OG=torch.randint(0, 2**bits, shape, dtype=torch.int32, **options),
        bits=bits,
        group_size=GROUP_SIZE,
        symmetric=False,
    )


def _require_correct(contender: Contender, expected: torch.Tensor) -> None:
    output = contender.call(0).double()
    error = float((output - expected).abs().max() / expected.abs().max())
    if not error <= MOST_ERROR:
        raise BenchmarkError(f"relative error {error:.1e} of {contender.name} with {contender.bits} bits")


def _row(
    report: Report,
    contender: Contender,
    x: torch.Tensor,
    shape: tuple[int, int],
    times: list[float],
    *,
    copied: float,
    dense: float,
) -> None:
    middle, (rows, columns) = statistics.median(times), shape
    moved = contender.nbytes + x.nbytes + len(x) * rows * x.element_size()
    share = moved / copied / middle
    cells = [f"{rows} x {columns}", str(len(x)), contender.name, str(contender.bits), median_and_spread(times)]
    report.rows.append([*cells, f"{moved / middle / 1e3:.0f}", f"{share:.2f}", f"{dense / middle:.2f}"])
    report.details.append(
        {"rows": rows, "columns": columns, "tokens": len(x), "kernel": contender.name, "bits": contender.bits}
        | {"us": times, "bytes": moved, "share": share}
    )


def _judge(report: Report) -> None:
    """Note where ours misses its aim at one token."""
    for ours in (row for row in report.details if row["kernel"] == "optgptq" and row["tokens"] == 1):
        place = f"{ours['rows']} x {ours['columns']}, {ours['bits']} bits"
        if ours["share"] < LEAST_SHARE:
            report.missed.append(f"{place}: {ours['share']:.2f} of a copy's speed; the aim is {LEAST_SHARE:g}.")
        for other in report.details:
            same = all(other[key] == ours[key] for key in ("rows", "columns", "tokens", "bits"))
            ratio = statistics.median(ours["us"]) / statistics.median(other["us"])
            if same and ratio > 1:
                report.missed.append(f"{place}: {ratio:.2f} times as long as {other['kernel']}.")


if __name__ == "__main__":
    sys.exit(main())
