"""Products with packed codes on a processor beside dense ones and torch's int4: microseconds and share of reading."""

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

from optgptq.kernels.native_affine import NativeAffine, native_affine_matmul, pack_native_affine
from optgptq.kernels.packed_dense import pack_dense, packs
from optgptq.native.products import product_paths

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BITS = (2, 3, 4, 8)
# torch's kernel for 4 bits takes bfloat16 only, others fall to a path that is many times slower.
DTYPE = torch.bfloat16
DENSE, PACKED_DENSE, TORCH_CODES, READING = "torch, dense", "torch, dense, packed once", "torch, int4", "reading"
# Of the outputs' norm: rounding activations to 8 bits costs half a percent, bfloat16 outputs two thousandths.
MOST_ERROR = 1e-2
LARGE = 1 << 25
LEAST_SHARE = 0.8
LEAST_GAIN = {2: 1.5, 3: 1.2}
COLUMNS = ("rows x columns", "tokens", "kernel", "bits", "us", "GB/s", "share of reading", "times dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A kernel and weights that are the same numbers in memory of their own; `multiply(x, weight)` is one product."""

    name: str
    bits: int
    multiply: Callable[[torch.Tensor, object], torch.Tensor]
    weights: Sequence[object]
    nbytes: int
    expected_OI: torch.Tensor


def main() -> int:
    """Time every shape, number of tokens and kernel."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 5, 8, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=21, help="a third of them from 64 tokens on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not product_paths():
        parser.error("the compiled products are not there: install the package where there is a C++ compiler")
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        return finish(_measured(arguments, SHAPES[:1] if arguments.quick else SHAPES), arguments)


def _measured(arguments: argparse.Namespace, shapes: Sequence[tuple[int, int]]) -> Report:
    report = Report(name="cpu-products", title="Products with packed codes on a processor", columns=COLUMNS)
    report.notes.append(
        f"bfloat16, groups of {GROUP_SIZE}, zero points of their own, {arguments.threads} threads, path "
        f"{product_paths()[0]}, activations in 8 bits. All kernels in turns, {arguments.rounds} rounds (a third from "
        f"64 tokens on), over weights of {ROTATED_BYTES >> 20} MiB. Bytes are those of the weight as it is held; "
        "`reading` is torch's sum of memory in the same rounds. `times dense`, shares and aims are medians of "
        "quotients within a round."
    )
    for shape in shapes:
        contenders = _contenders(*shape)
        for tokens in arguments.tokens:
            x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(DTYPE)
            for contender in contenders:
                _require_correct(contender, x)
            rounds = arguments.rounds if tokens < 64 else max(arguments.rounds // 3, 3)
            calls = {_key(each): [partial(each.multiply, x, one) for one in each.weights] for each in contenders}
            times = times_in_turns({**calls, READING: reading_calls()}, rounds)
            for contender in contenders:
                _row(report, contender, shape, tokens, times)
            _judge(report, shape, tokens, times)
    return report


def _key(contender: Contender) -> str:
    return f"{contender.name}, {contender.bits} bits"


OURS = "optgptq, {} bits"
PEERS_16, PEER_4 = (f"{DENSE}, 16 bits", f"{PACKED_DENSE}, 16 bits"), f"{TORCH_CODES}, 4 bits"


def _contenders(rows: int, columns: int) -> list[Contender]:
    contenders = []
    for bits in BITS:
        weight = random_affine(rows, columns, bits, seed=0, device=torch.device("cpu"))
        first, dense_OI = pack_native_affine(weight), weight.dequantize()
        contenders.append(_ours(first, dense_OI))
        if bits == 4:
            contenders.append(_of_torch(weight.codes_OI, weight.scale_OG, weight.zero_point_OG, dense_OI))
    return [*contenders, *_dense(dense_OI)]


def _copies(nbytes: int) -> range:
    return range(max(2, ROTATED_BYTES // nbytes))


def _ours(first: NativeAffine, dense_OI: torch.Tensor) -> Contender:
    return Contender(
        name="optgptq",
        bits=first.tiles.bits,
        multiply=native_affine_matmul,
        # Stacked with nothing, a weight is the same numbers in memory of their own.
        weights=[NativeAffine.stacked([first]) for _ in _copies(first.nbytes)],
        nbytes=first.nbytes,
        expected_OI=dense_OI,
    )


def _of_torch(
    codes_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor, dense_OI: torch.Tensor
) -> Contender:
    """A weight is `(code - 8) * scale + zero`."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32), 1)
    scale_GO = scale_OG.t().float()
    scales = torch.stack([scale_GO, scale_GO * (8 - zero_OG.t())], 2).to(DTYPE).contiguous()
    nbytes = packed.nbytes + scales.nbytes
    return Contender(
        name=TORCH_CODES,
        bits=4,
        multiply=lambda x, one: torch.ops.aten._weight_int4pack_mm_for_cpu(x, one[0], GROUP_SIZE, one[1]),
        weights=[(packed.clone(), scales.clone()) for _ in _copies(nbytes)],
        nbytes=nbytes,
        expected_OI=dense_OI,
    )


def _dense(dense_OI: torch.Tensor) -> list[Contender]:
    weight_OI = dense_OI.to(DTYPE)
    common = {"bits": 16, "nbytes": weight_OI.nbytes, "expected_OI": weight_OI.float()}
    copies = _copies(weight_OI.nbytes)
    plain = [weight_OI.clone() for _ in copies]
    found = [Contender(name=DENSE, multiply=torch.nn.functional.linear, weights=plain, **common)]
    if packs(weight_OI.device, DTYPE):
        packed = [pack_dense(weight_OI, None) for _ in copies]
        found.append(Contender(name=PACKED_DENSE, multiply=lambda x, one: one(x), weights=packed, **common))
    return found


def _require_correct(contender: Contender, x: torch.Tensor) -> None:
    """Compare the first tokens and rows with a product in float64."""
    output = contender.multiply(x, contender.weights[0]).double()[:8]
    expected = x[:8].double() @ contender.expected_OI.double().T
    error = float((output - expected).norm() / expected.norm())
    if not error <= MOST_ERROR:
        raise BenchmarkError(f"relative error {error:.1e} of {_key(contender)} with {len(x)} tokens")


def _row(
    report: Report, contender: Contender, shape: tuple[int, int], tokens: int, times: dict[str, list[float]]
) -> None:
    own, (rows, columns) = times[_key(contender)], shape
    speed = contender.nbytes / statistics.median(own)
    share = contender.nbytes / ROTATED_BYTES * ratio(own, times[READING])
    cells = [f"{rows} x {columns}", str(tokens), contender.name, str(contender.bits), median_and_spread(own, 0)]
    times_dense = ratio(own, times[PEERS_16[0]])
    report.rows.append([*cells, f"{speed / 1e3:.1f}", f"{share:.2f}", f"{times_dense:.2f}"])
    report.details.append(
        {"rows": rows, "columns": columns, "tokens": tokens, "kernel": contender.name, "bits": contender.bits}
        | {"us": own, "bytes": contender.nbytes, "share": share, "reading_us": times[READING]}
    )


def _judge(report: Report, shape: tuple[int, int], tokens: int, times: dict[str, list[float]]) -> None:
    """Note where an aim is missed."""
    place = f"{shape[0]} x {shape[1]}, {tokens} tokens"
    four = times[OURS.format(4)]
    aims = [(f"4 bits beside {TORCH_CODES}", ratio(four, times[PEER_4]), 2.0)] if tokens in (1, 64) else []
    if tokens == 1 and shape[0] * shape[1] > LARGE:
        share = next(row["share"] for row in reversed(report.details) if (row["kernel"], row["bits"]) == ("optgptq", 4))
        aims.append(("4 bits, share of reading", share, LEAST_SHARE))
        aims += [
            (f"{bits} bits beside 4", ratio(times[OURS.format(bits)], four), gain) for bits, gain in LEAST_GAIN.items()
        ]
    if tokens >= 5:
        peers = [peer for peer in PEERS_16 if peer in times]
        aims += [
            (f"{bits} bits beside {peer}", ratio(times[OURS.format(bits)], times[peer]), 1.0)
            for bits in BITS
            for peer in peers
        ]
    report.missed += [f"{place}: {what}: {found:.2f}; the aim is {aim:g}." for what, found, aim in aims if found < aim]


if __name__ == "__main__":
    sys.exit(main())
