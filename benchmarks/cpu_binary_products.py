"""Products with sign planes on a processor beside codes of 4 bits and dense ones: microseconds, share of reading."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from affine_matmul import GROUP_SIZE, random_affine
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser
from measure.turns import ROTATED_BYTES, ratio, reading_calls, times_in_turns

from optgptq.binary_weight import BinaryWeight
from optgptq.coefficients import FloatCoefficients
from optgptq.kernels.native_affine import NativeAffine, native_affine_matmul, pack_native_affine
from optgptq.kernels.native_binary import NativeBinary, native_binary_matmul, pack_native_binary
from optgptq.native.products import product_paths

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
PLANES = (1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CODES, DENSE, READING = "codes, 4 bits", "torch, dense", "reading"
# Of the outputs' norm: rounding activations to 8 bits costs half a percent, bfloat16 outputs two thousandths.
MOST_ERROR = 1e-2
# At one token: of reading memory with 2 and 3 planes, and times codes of 4 bits with 4 planes.
LEAST_SHARE, MOST_TIMES_CODES = 0.8, 1.5
COLUMNS = (
    "rows x columns",
    "dtype",
    "tokens",
    "kernel",
    "us",
    "GB/s",
    "share of reading",
    "times codes",
    "times dense",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A kernel and weights that are the same numbers in memory of their own; `multiply(x, weight)` is one product."""

    name: str
    multiply: Callable[[torch.Tensor, object], torch.Tensor]
    weights: Sequence[object]
    nbytes: int


def main() -> int:
    """Time every shape, dtype, number of tokens and kernel."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 5, 8, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15, help="a third of them from 64 tokens on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not product_paths():
        parser.error("the compiled products are not there: install the package where there is a C++ compiler")
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        return finish(_measured(arguments, SHAPES[:1] if arguments.quick else SHAPES), arguments)


def _measured(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Report:
    report = Report(name="cpu-binary-products", title="Products with sign planes on a processor", columns=COLUMNS)
    report.notes.append(
        f"Groups of {GROUP_SIZE}, coefficients in float16, {arguments.threads} threads, path {product_paths()[0]}, "
        f"activations in 8 bits. All kernels in turns, {arguments.rounds} rounds (a third from 64 tokens on), over "
        f"weights of {ROTATED_BYTES >> 20} MiB. Bytes are those of the weight as it is held; `reading` is torch's sum "
        "of memory in the same rounds. Quotients are medians of those within a round."
    )
    for shape in shapes:
        ours = [_codes(*shape), *(_planes(*shape, planes) for planes in PLANES)]
        for name in arguments.dtypes:
            contenders = [*ours, _dense(*shape, DTYPES[name])]
            for tokens in arguments.tokens:
                x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(DTYPES[name])
                rounds = arguments.rounds if tokens < 64 else max(arguments.rounds // 3, 3)
                calls = {each.name: [partial(each.multiply, x, one) for one in each.weights] for each in contenders}
                times = times_in_turns({**calls, READING: reading_calls()}, rounds)
                for contender in contenders:
                    _row(report, contender, (f"{shape[0]} x {shape[1]}", name, str(tokens)), times)
                _judge(report, f"{shape[0]} x {shape[1]}, {name}, {tokens} tokens", tokens, contenders, times)
    return report


def _copies(nbytes: int) -> range:
    return range(max(2, ROTATED_BYTES // nbytes))


def _codes(rows: int, columns: int) -> Contender:
    first = pack_native_affine(random_affine(rows, columns, 4, seed=0, device=torch.device("cpu")))
    weights = [NativeAffine.stacked([first]) for _ in _copies(first.nbytes)]
    return Contender(name=CODES, multiply=native_affine_matmul, weights=weights, nbytes=first.nbytes)


def _planes(rows: int, columns: int, planes: int) -> Contender:
    generator = torch.Generator().manual_seed(planes)
    groups = columns // GROUP_SIZE
    alpha_OGP = torch.rand(rows, groups, planes, generator=generator).half()
    coefficients = FloatCoefficients(alpha_OGP, torch.randn(rows, groups, generator=generator).half())
    codes_OI = torch.randint(0, 1 << planes, (rows, columns), dtype=torch.uint8, generator=generator)
    weight = BinaryWeight(codes_OI=codes_OI, coefficients=coefficients, bits=planes, group_size=GROUP_SIZE)
    first = pack_native_binary(weight)
    _require_correct(weight, first)
    # Stacked with nothing, a weight is the same numbers in memory of their own.
    weights = [NativeBinary.stacked([first]) for _ in _copies(first.nbytes)]
    return Contender(name=f"{planes} planes", multiply=native_binary_matmul, weights=weights, nbytes=first.nbytes)


def _dense(rows: int, columns: int, dtype: torch.dtype) -> Contender:
    first = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [first.clone() for _ in _copies(first.nbytes)]
    return Contender(name=DENSE, multiply=torch.nn.functional.linear, weights=weights, nbytes=first.nbytes)


def _require_correct(weight: BinaryWeight, held: NativeBinary) -> None:
    """Compare few and many tokens with the product in float64."""
    x = torch.randn(9, weight.in_features, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ weight.dequantize().double().T
    for tokens in (1, 4, 9):
        output = native_binary_matmul(x[:tokens], held).double()
        error = float((output - expected[:tokens]).norm() / expected[:tokens].norm())
        if not error <= MOST_ERROR:
            raise BenchmarkError(f"relative error {error:.1e} of {weight.bits} planes with {tokens} tokens")


def _row(report: Report, contender: Contender, place: tuple[str, str, str], times: dict[str, list[float]]) -> None:
    own = times[contender.name]
    speed = contender.nbytes / statistics.median(own) / 1e3
    share = contender.nbytes / ROTATED_BYTES * ratio(own, times[READING])
    quotients = (share, 1 / ratio(own, times[CODES]), 1 / ratio(own, times[DENSE]))
    figures = [f"{speed:.1f}", *(f"{quotient:.2f}" for quotient in quotients)]
    report.rows.append([*place, contender.name, median_and_spread(own, 0), *figures])
    report.details.append({"place": place, "kernel": contender.name, "us": own, "bytes": contender.nbytes})


def _judge(
    report: Report, place: str, tokens: int, contenders: Sequence[Contender], times: dict[str, list[float]]
) -> None:
    """Note where an aim is missed."""
    for contender in contenders[1:-1]:
        own, what = times[contender.name], f"{place}: {contender.name}"
        share = contender.nbytes / ROTATED_BYTES * ratio(own, times[READING])
        if tokens == 1 and contender.name in ("2 planes", "3 planes") and share < LEAST_SHARE:
            report.missed.append(f"{what}: {share:.2f} of reading; the aim is {LEAST_SHARE:g}.")
        slower = 1 / ratio(own, times[CODES])
        if tokens == 1 and contender.name == "4 planes" and slower > MOST_TIMES_CODES:
            report.missed.append(f"{what}: {slower:.2f} times codes of 4 bits; the aim is {MOST_TIMES_CODES:g}.")
        times_dense = 1 / ratio(own, times[DENSE])
        if times_dense > 1:
            report.missed.append(f"{what}: {times_dense:.2f} times the dense product; the aim is 1.")


if __name__ == "__main__":
    sys.exit(main())
