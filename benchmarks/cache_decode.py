"""Decode attention over a quantized KV cache on a GPU, by bits, beside the kernel over pages of 16 bits.

Each sequence has one new token, whose key and value are exact; all others are codes, in pages in random order. Before
the clock starts each kernel is compared with torch's, on two of the sequences.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from attention_decode import random_step
from measure.gpu import copied_bytes_per_us, graph_times
from measure.process import BenchmarkError
from measure.report import Report, finish, median_and_spread, new_parser

from optgptq.kernels import quantized_attention as plain
from optgptq.kernels.attention_choice import choose_attention
from optgptq.kernels.cache_choice import choose_cache_attention
from optgptq.kernels.paged_attention import PagedBatch, ScoreRule
from optgptq.kernels.quantized_attention import CacheBatch, CacheStorage
from optgptq.kv_cache.codec import SideCodec
from optgptq.kv_cache.page_layout import PageLayout
from optgptq.kv_cache.page_planes import SIDES, parameter_plane, side_scheme
from optgptq.kv_cache.scheme import LayerScheme, SideScheme
from optgptq.kv_cache.setup import SideParameters

COLUMNS = ("sequences", "context", "bits", "attention us", "tokens/s", "share of copying", "of 16 bits", "store us")
HEADS = (32, 8)
HEAD_DIM, PAGE_SIZE, DTYPE = 128, 16, torch.bfloat16
CASES = ((32, 16384), (1, 16384), (32, 2048))
SCHEMES = {
    "8": (8, HEAD_DIM),
    "4": (4, HEAD_DIM),
    "4, groups of 64": (4, 64),
    "3": (3, HEAD_DIM),
    "2": (2, HEAD_DIM),
    "2, groups of 32": (2, 32),
}
MOST_ERROR = 2e-2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodeStep:
    """Queries of one token for each sequence, its key and value, and the codes of what came before."""

    query_TND: torch.Tensor
    key_TKD: torch.Tensor
    value_TKD: torch.Tensor
    storage: CacheStorage
    batch: CacheBatch

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CacheStorage, CacheBatch]:
        """The arguments of attention before the rule."""
        return self.query_TND, self.key_TKD, self.value_TKD, self.storage, self.batch


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


def random_codes(scheme: LayerScheme, sequences: int, context: int, *, is_fitted: bool = False) -> CodeStep:
    """Return a step whose pages are all used, in random order; scales and minimums are those of normal numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "generator": generator}
    layout = PageLayout(
        num_kv_heads=HEADS[1], head_dim=HEAD_DIM, page_size=PAGE_SIZE, scheme=scheme, exact_bytes=DTYPE.itemsize
    )
    pages = -(-context // PAGE_SIZE)
    pages_ZB = torch.randint(256, (sequences * pages, layout.page_bytes), dtype=torch.uint8, **options)
    for side in SIDES:
        pairs = parameter_plane(pages_ZB, layout, side)
        pairs[..., 0] = torch.rand(pairs.shape[:-1], **options) * 6 / 2 ** side_scheme(layout, side).bits
        pairs[..., 1] = -3.0
    table = torch.randperm(sequences * pages, **options).view(sequences, pages)
    batch = PagedBatch(
        query_start_R1=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
        context_R=torch.full((sequences,), context, dtype=torch.int32, device="cuda"),
        page_table_RP=table.to(torch.int32),
        slot_T=table[:, -1] * PAGE_SIZE + (context - 1) % PAGE_SIZE,
        max_query=1,
        max_context=context,
    )
    return CodeStep(
        query_TND=torch.randn(sequences, HEADS[0], HEAD_DIM, dtype=DTYPE, **options),
        key_TKD=torch.randn(sequences, HEADS[1], HEAD_DIM, dtype=DTYPE, **options),
        value_TKD=torch.randn(sequences, HEADS[1], HEAD_DIM, dtype=DTYPE, **options),
        storage=CacheStorage(
            layout=layout,
            pages_ZB=pages_ZB,
            key_codec=_codec(scheme.keys, is_fitted),
            value_codec=_codec(scheme.values, is_fitted),
            exact_keys_ZKDY=None,
            exact_values_ZKYD=None,
        ),
        batch=CacheBatch(pages=batch, exact=None, first_exact_T=batch.context_R - 1, num_sinks=0),
    )


def _codec(scheme: SideScheme, is_fitted: bool) -> SideCodec:
    metric_KDD = torch.eye(HEAD_DIM).expand(HEADS[1], -1, -1).contiguous() if is_fitted else None
    return SideCodec.of(scheme, SideParameters(metric_KDD=metric_KDD), torch.device("cuda"))


def first_sequences(step: CodeStep, count: int) -> CodeStep:
    """Return a step of the first sequences; pages are shared."""
    pages = step.batch.pages
    fewer = PagedBatch(
        query_start_R1=pages.query_start_R1[: count + 1],
        context_R=pages.context_R[:count],
        page_table_RP=pages.page_table_RP[:count],
        slot_T=pages.slot_T[:count],
        max_query=pages.max_query,
        max_context=pages.max_context,
    )
    batch = CacheBatch(pages=fewer, exact=None, first_exact_T=step.batch.first_exact_T[:count], num_sinks=0)
    return CodeStep(
        query_TND=step.query_TND[:count],
        key_TKD=step.key_TKD[:count],
        value_TKD=step.value_TKD[:count],
        storage=step.storage,
        batch=batch,
    )


def _measured(arguments: argparse.Namespace) -> Report:
    copied = copied_bytes_per_us()
    report = Report(
        name="cache-decode",
        title=f"Decode attention over a quantized cache on {torch.cuda.get_device_name()}",
        columns=COLUMNS,
    )
    report.notes.append(
        f"bfloat16, {HEADS[0]}/{HEADS[1]} heads of {HEAD_DIM} features, pages of {PAGE_SIZE} tokens. Shares count the "
        f"bytes of the pages that are read; a copy moves {copied / 1e6:.2f} TB/s. The store writes one token of each "
        "sequence, rounded to the nearest; of fitted codes in the row that says so."
    )
    for sequences, context in CASES[:1] if arguments.quick else CASES:
        _compare(report, sequences, context, copied=copied, repetitions=arguments.repetitions)
    return report


def _compare(report: Report, sequences: int, context: int, *, copied: float, repetitions: int) -> None:
    rule = ScoreRule(scale=HEAD_DIM**-0.5)
    whole = random_step(*HEADS, sequences, context, seed=0)
    attend = choose_attention(torch.device("cuda"), DTYPE, HEAD_DIM).attend
    times = _times(lambda: attend(whole.query_TND, whole.keys_ZKDY, whole.values_ZKYD, whole.batch, rule), repetitions)
    sixteen = statistics.median(times)

    def add(bits: str, times: list[float], num_bytes: int, store: str) -> None:
        median = statistics.median(times)
        share, speed = num_bytes / median / copied, sequences / median * 1e6
        cells = [median_and_spread(times, digits=1), f"{speed:.0f}", f"{share:.2f}", f"{sixteen / median:.2f}", store]
        report.rows.append([str(sequences), str(context), bits, *cells])

    add("16", times, whole.nbytes, "")
    for name, (bits, group_size) in SCHEMES.items():
        side = SideScheme(bits=bits, group_size=group_size)
        scheme = LayerScheme(keys=side, values=side)
        for is_fitted in (False, True) if name == "4" else (False,):
            step = random_codes(scheme, sequences, context, is_fitted=is_fitted)
            choice = choose_cache_attention(torch.device("cuda"), DTYPE, HEAD_DIM, [scheme])
            some = first_sequences(step, min(2, sequences))
            _require_close(choice.attend(*some.arguments, rule), plain.attend(*some.arguments, rule))
            stored = _times(lambda step=step, choice=choice: choice.store(*step.arguments[1:]), repetitions)
            times = _times(lambda step=step, choice=choice: choice.attend(*step.arguments, rule), repetitions)
            num_bytes = sequences * context * step.storage.layout.page_bytes // PAGE_SIZE
            add(f"{name}, fitted" if is_fitted else name, times, num_bytes, median_and_spread(stored, digits=1))


def _times(call: Callable[[], Any], repetitions: int) -> list[float]:
    """Return microseconds of a call; two gigabytes of pages are in no cache."""
    return graph_times([call] * 3, repetitions)


def _require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= MOST_ERROR:
        raise BenchmarkError(f"relative error {error:.1e} beside torch's attention over codes")


if __name__ == "__main__":
    sys.exit(main())
