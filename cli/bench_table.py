"""What `optgptq bench` shows people: a column of figures for each cache that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .output import human_bytes, table

if TYPE_CHECKING:
    from optgptq.evaluation.bench_report import BenchReport, CacheFigures, Spread


_NOTES = """bits: of a number of keys and of values, with its share of scale and minimum. exact: pages of tokens that
are kept as they were computed besides. peak: most pages that were held. Speeds are medians of the rounds, measured in
turns; --json has all figures."""


def bench_page(reports: Sequence[BenchReport], *, num_requests: int) -> str:
    """Return all figures of one report; of several, what tells them apart, a line each."""
    if len(reports) == 1:
        rows: list[tuple[str, ...]] = list(_rows(reports[0], num_requests=num_requests))
        return table(rows) + "\n\nMedian of the rounds, in brackets the lowest and the highest."
    memory = ("bits", "bytes/token", "tokens that fit", "exact", "peak")
    speeds = ("reading, tok/s", "one text, ms", f"{num_requests} texts, tok/s", "first token, ms")
    header = ("KV cache", "past-only", *memory, *speeds)
    lines = table([_line(report) for report in reports], header=header)
    return f"{lines}\n\n{_NOTES}"


def _line(report: BenchReport) -> tuple[str, ...]:
    cache, speeds = report.cache, report.speeds
    return (
        cache.choice,
        cache.past_only or "-",
        f"{cache.key_bits:.2f}, {cache.value_bits:.2f}",
        f"{cache.bytes_per_token:,.1f}",
        f"{cache.num_tokens:,}",
        human_bytes(cache.exact_bytes),
        human_bytes(report.pages.peak_bytes),
        f"{speeds.prefill.median:,.1f}",
        f"{1000 * speeds.token_p50.median:.2f}",
        f"{speeds.new_tokens.median:,.1f}",
        f"{1000 * speeds.first_token_p50.median:.2f}",
    )


def _rows(report: BenchReport, *, num_requests: int) -> list[tuple[str, str]]:
    speeds, needed, pages, check = report.speeds, report.bytes_per_token, report.pages, report.check
    compared = "skipped"
    if check is not None:
        compared = f"{check.num_tokens} tokens of {check.num_prompts} texts as by full forwards"
        compared += f", {check.num_ties} of them in a tie" if check.num_ties else ""
    parts = f"linears {human_bytes(needed.linears)}, head {human_bytes(needed.head)}"
    parts += f", keys and values {human_bytes(needed.cache)} of {needed.context} tokens"
    memory = human_bytes(report.peak_memory_bytes)
    if report.peak_device_bytes is not None:
        memory += f", on the GPU {human_bytes(report.peak_device_bytes)}"
    return [
        ("check", compared),
        *_cache_rows(report.cache),
        ("reading a prompt", f"{_speed(speeds.prefill)} tokens/s"),
        ("one text, a token", f"{_time(speeds.token_p50)}, p99 {_time(speeds.token_p99)}"),
        ("it must read", f"{human_bytes(needed.total)}: {parts}"),
        ("memory moves", f"{human_bytes(report.bandwidth.bytes_per_second)}/s: {report.bandwidth.method}"),
        ("so it is at", f"{report.floor_share:.1%} of what that allows"),
        (f"{num_requests} texts, new tokens", f"{_speed(speeds.new_tokens)} tokens/s"),
        (f"{num_requests} texts, all tokens", f"{_speed(speeds.all_tokens)} tokens/s"),
        ("first token", f"{_time(speeds.first_token_p50)}, p99 {_time(speeds.first_token_p99)}"),
        ("between tokens", f"{_time(speeds.gap_p50)}, p99 {_time(speeds.gap_p99)}"),
        ("peak memory", memory),
        ("pages", f"{human_bytes(pages.peak_bytes)} of {human_bytes(pages.total_bytes)} at most"),
        ("slots unused", f"{pages.waste_ratio:.2%} of those that were held"),
        ("preemptions", str(pages.num_preemptions)),
        ("prefix hits", f"{pages.prefix_hit_tokens:,} of {pages.prompt_tokens:,} tokens of prompts"),
    ]


def _cache_rows(cache: CacheFigures) -> list[tuple[str, str]]:
    mode = "" if cache.past_only is None else f", past-only {cache.past_only}"
    exact = f", {human_bytes(cache.exact_bytes)} of the pages for exact tokens" if cache.exact_bytes else ""
    return [
        ("bits per number", f"keys {cache.key_bits:.2f}, values {cache.value_bits:.2f}{mode}"),
        ("bytes per token", f"{cache.bytes_per_token:,.1f}"),
        ("tokens that fit", f"{cache.num_tokens:,}{exact}"),
    ]


def _speed(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f} to {spread.high:,.1f})"


def _time(spread: Spread) -> str:
    return f"{1000 * spread.median:.2f} ms ({1000 * spread.low:.2f} to {1000 * spread.high:.2f})"
