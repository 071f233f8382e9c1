"""Seconds to pack and unpack 100 million codes on one core."""

from __future__ import annotations

import sys
import time

import torch
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.packing.words import pack_rows, unpack_rows

TARGET_SECONDS = 2.0
TARGET_BITS = 4
COLUMNS = 10_000
ROWS, QUICK_ROWS = 10_000, 500


def main() -> int:
    """Time all widths; the aim is for 4 bits."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_rows = QUICK_ROWS if arguments.quick else ROWS
    report = Report(
        name="packing",
        title=f"Packing {num_rows * COLUMNS // 10**6} million codes on one core",
        columns=("bits", "pack s", "unpack s", "pack GB/s", "unpack GB/s"),
        notes=[
            f"uint8 codes [{num_rows}, {COLUMNS}]; GB/s counts codes read and words written, or the reverse. "
            f"Pack and unpack of {TARGET_BITS} bits together under {TARGET_SECONDS:g} s is the aim for 100 million."
        ],
    )
    for bits in (2, 3, 4, 8):
        _measure(report, bits, num_rows, arguments.repetitions)
    return finish(report, arguments)


def _measure(report: Report, bits: int, num_rows: int, repetitions: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes_OI = torch.randint(0, 2**bits, (num_rows, COLUMNS), dtype=torch.uint8, generator=generator)
    packing, unpacking = [], []
    for _ in range(repetitions):
        began = time.perf_counter()
        words_OW = pack_rows(codes_OI, bits)
        packed = time.perf_counter()
        back_OI = unpack_rows(words_OW, bits, COLUMNS)
        unpacking.append(time.perf_counter() - packed)
        packing.append(packed - began)
        if not torch.equal(back_OI, codes_OI):
            raise BenchmarkError(f"{bits} bits: the codes that came back are not those that were packed")
    gigabytes = (codes_OI.nbytes + words_OW.nbytes) / 1e9
    report.rows.append(
        [
            str(bits),
            median_and_spread(packing, digits=3),
            median_and_spread(unpacking, digits=3),
            f"{gigabytes / min(packing):.2f}",
            f"{gigabytes / min(unpacking):.2f}",
        ]
    )
    report.details.append({"bits": bits, "pack_seconds": packing, "unpack_seconds": unpacking})
    slowest = max(pack + unpack for pack, unpack in zip(packing, unpacking, strict=True))
    if bits == TARGET_BITS and slowest > TARGET_SECONDS:
        report.missed.append(f"{bits} bits: {slowest:.2f} s to pack and unpack; the aim is {TARGET_SECONDS:g} s.")


if __name__ == "__main__":
    sys.exit(main())
