"""Decode attention over pages on a GPU: microseconds, GB/s, share of a copy, and what ALiBi costs.

Each sequence has one new token. The keys and values of a call lie in pages in random order. torch's fused attention on
keys and values that lie together already, gathered before the clock starts, is the comparison.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from measure.gpu import ROTATED_BYTES, copied_bytes_per_us, graph_times
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.kernels.attention_choice import choose_attention
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule

COLUMNS = ("heads", "sequences", "context", "kernel", "us", "GB/s", "share of copying")
# Query heads and key/value heads of Llama 3.1 8B and of BLOOM 7B1.
HEADS = ((32, 8), (32, 32))
CASES = ((1, 2048), (1, 16384), (8, 4096), (32, 2048), (32, 16384))
HEAD_DIM, PAGE_SIZE, DTYPE = 128, 16, torch.bfloat16
MOST_ERROR = 2e-2
# At 16k tokens and more.
LONG_CONTEXT, LEAST_SHARE, MOST_ALIBI_COST = 16384, 0.85, 1.03


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DecodeStep:
    """Queries of one token for each sequence, and the pages of what came before."""

    query_TND: torch.Tensor
    keys_ZKDY: torch.Tensor
    values_ZKYD: torch.Tensor
    batch: PagedBatch

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are read."""
        return self.keys_ZKDY.nbytes + self.values_ZKYD.nbytes


def main() -> int:
    """Time every case on the GPU."""
    parser = new_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here: run this on a machine that has one")
    if find_spec("triton") is None:
        parser.error("triton is not installed: `pip install optgptq[triton]`")
    return finish(_measured(arguments), arguments)


def random_step(num_heads: int, num_kv_heads: int, sequences: int, context: int, *, seed: int) -> DecodeStep:
    """Return a step whose pages are all used, in random order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pages = -(-context // PAGE_SIZE)
    shape = (sequences * pages, num_kv_heads)
    options = {"dtype": DTYPE, "device": "cuda", "generator": generator}
    table = torch.randperm(sequences * pages, device="cuda", generator=generator).view(sequences, pages)
    return DecodeStep(
        query_TND=torch.randn(sequences, num_heads, HEAD_DIM, **options),
        keys_ZKDY=torch.randn(*shape, HEAD_DIM, PAGE_SIZE, **options),
        values_ZKYD=torch.randn(*shape, PAGE_SIZE, HEAD_DIM, **options),
        batch=PagedBatch(
            query_start_R1=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
            context_R=torch.full((sequences,), context, dtype=torch.int32, device="cuda"),
            page_table_RP=table.to(torch.int32),
            slot_T=torch.zeros(sequences, dtype=torch.int64, device="cuda"),
            max_query=1,
            max_context=context,
        ),
    )


def gathered(step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values `[sequences, K, context, D]` that lie together."""
    table = step.batch.page_table_RP.long()
    keys_RPKDY, values_RPKYD = step.keys_ZKDY[table], step.values_ZKYD[table]
    context = step.batch.max_context
    keys = keys_RPKDY.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :context].contiguous()
    values = values_RPKYD.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :context].contiguous()
    return keys, values


def _measured(arguments: argparse.Namespace) -> Report:
    copied = copied_bytes_per_us()
    report = Report(
        name="attention-decode", title=f"Decode attention over pages on {torch.cuda.get_device_name()}", columns=COLUMNS
    )
    report.notes.append(
        f"bfloat16, head dimension {HEAD_DIM}, pages of {PAGE_SIZE} tokens; calls in one CUDA graph over "
        f"{ROTATED_BYTES >> 20} MiB of pages in turns. Bytes are keys and values; a copy moves {copied / 1e6:.2f} TB/s."
    )
    for heads in HEADS:
        for sequences, context in CASES[:1] if arguments.quick else CASES:
            _compare(report, heads, sequences, context, copied=copied, repetitions=arguments.repetitions)
    return report


def _compare(
    report: Report, heads: tuple[int, int], sequences: int, context: int, *, copied: float, repetitions: int
) -> None:
    first = random_step(*heads, sequences, context, seed=0)
    count = max(2, min(8, ROTATED_BYTES // first.nbytes))
    steps = [first, *(random_step(*heads, sequences, context, seed=seed) for seed in range(1, count))]
    attend = choose_attention(torch.device("cuda"), DTYPE, HEAD_DIM).attend
    plain = ScoreRule(scale=HEAD_DIM**-0.5)
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads[0]) for head in range(heads[0])], device="cuda")
    alibi = replace(plain, slopes_N=slopes)

    def ours(step: DecodeStep, rule: ScoreRule) -> torch.Tensor:
        return attend(step.query_TND, step.keys_ZKDY, step.values_ZKYD, step.batch, rule)

    together = [gathered(step) for step in steps]

    def fused(number: int) -> torch.Tensor:
        keys, values = together[number]
        query = steps[number].query_TND.unsqueeze(2)
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return output.squeeze(2)

    _require_close(ours(first, plain), fused(0))
    kernels: dict[str, list[Callable[[], torch.Tensor]]] = {
        "torch, keys together": [lambda number=number: fused(number) for number in range(count)],
        "optgptq": [lambda step=step: ours(step, plain) for step in steps],
        "optgptq, ALiBi": [lambda step=step: ours(step, alibi) for step in steps],
    }
    medians = {}
    for kernel, calls in kernels.items():
        times = graph_times(calls, repetitions)
        medians[kernel] = statistics.median(times)
        speed = first.nbytes / medians[kernel]
        cells = [median_and_spread(times, digits=1), f"{speed / 1e3:.0f}", f"{speed / copied:.2f}"]
        report.rows.append([f"{heads[0]}/{heads[1]}", str(sequences), str(context), kernel, *cells])
    where = f"{heads[0]}/{heads[1]} heads, {sequences} x {context}"
    share, cost = first.nbytes / medians["optgptq"] / copied, medians["optgptq, ALiBi"] / medians["optgptq"]
    if context >= LONG_CONTEXT and share < LEAST_SHARE:
        report.missed.append(f"{where}: {share:.2f} of copying, aim {LEAST_SHARE}")
    if context >= LONG_CONTEXT and cost > MOST_ALIBI_COST:
        report.missed.append(f"{where}: ALiBi costs {cost:.3f}, aim {MOST_ALIBI_COST}")


def _require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= MOST_ERROR:
        raise BenchmarkError(f"relative error {error:.1e} beside torch's attention")


if __name__ == "__main__":
    sys.exit(main())
