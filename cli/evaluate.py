"""`optgptq eval`: perplexity, and how far a checkpoint has drifted from the model it was made from."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import plain_log, step_display
from .options import (
    DeviceOption,
    JsonOption,
    KvCacheOption,
    ModelArgument,
    PastOnlyOption,
    QuietOption,
    RevisionOption,
)
from .output import human_seconds, table, write_json, write_note, write_result

if TYPE_CHECKING:
    from optgptq.evaluation.decoding import CacheFacts, CacheOptions
    from optgptq.evaluation.gates import GateOutcome
    from optgptq.evaluation.run import EvaluationReport


def evaluate(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Model to compare with, usually the dense one.", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="bundled:story-evaluation, a .txt, .jsonl or .parquet file, a saved data set, or a hub id.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Configuration of a hub data set.", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a data set.")] = "test",
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    text_revision: Annotated[
        str | None, typer.Option("--text-revision", help="Commit of a hub data set.", show_default=False)
    ] = None,
    window_size: Annotated[
        int | None,
        typer.Option(
            "--window-size", help="Tokens per window; default 2048, or the model's positions.", show_default=False
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Tokens between window starts; default: no overlap.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Use the first tokens of the text only.", show_default=False)
    ] = None,
    max_ppl: Annotated[
        float | None, typer.Option("--max-ppl", help="Gate: highest perplexity.", show_default=False)
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option("--max-ppl-increase", help="Gate: highest relative increase, 0.02 for 2%.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Gate: highest mean KL, nats per token.", show_default=False)
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option("--min-top1", help="Gate: lowest top-1 agreement, 0 to 1.", show_default=False)
    ] = None,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Score as the model writes: keys and values are read out of the KV cache."),
    ] = False,
    kv_cache: KvCacheOption = None,
    past_only: PastOnlyOption = None,
    baseline_cache: Annotated[
        bool,
        typer.Option("--baseline-cache", help="With --decode: compare with the same weights and a plain KV cache."),
    ] = False,
    revision: RevisionOption = None,
    baseline_revision: Annotated[
        str | None, typer.Option("--baseline-revision", help="Commit of a hub baseline.", show_default=False)
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity, mean KL to a baseline, and top-1 agreement; gates end with exit code 7."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.data.corpora import TextSource
    from optgptq.evaluation.gates import Gates, judge, require_baseline, require_passed
    from optgptq.evaluation.run import EvaluationSettings, evaluate_folders
    from optgptq.runtime.device import require_device

    gates = Gates(max_ppl=max_ppl, max_ppl_increase=max_ppl_increase, max_kl=max_kl, min_top1=min_top1)
    require_baseline(gates, has_baseline=baseline is not None or baseline_cache)
    source = TextSource(source=_require_text(text), config=config, split=split, column=column, revision=text_revision)
    settings = EvaluationSettings(
        source=source,
        window_size=window_size,
        stride=stride,
        max_tokens=max_tokens,
        decoding=_cache_options(decode, kv_cache, past_only),
        against_plain_cache=baseline_cache,
    )
    began = time.perf_counter()
    with plain_log(quiet=quiet), step_display("windows", quiet=quiet) as progress:
        report = evaluate_folders(
            resolve_model(model, revision),
            settings,
            baseline=None if baseline is None else resolve_model(baseline, baseline_revision),
            device=require_device(device),
            progress=progress,
        )
    seconds = time.perf_counter() - began
    outcomes = judge(report.result, gates)
    _tell(report, quiet=quiet)
    if as_json:
        write_json(_record(report, outcomes, seconds=seconds))
    elif not quiet:
        write_result(_page(report, outcomes, seconds=seconds))
    require_passed(outcomes)


def _cache_options(decode: bool, kv_cache: str | None, past_only: str | None) -> CacheOptions | None:
    from optgptq.errors import UsageError
    from optgptq.evaluation.decoding import CacheOptions

    given = {"kv_cache": kv_cache, "past_only": past_only}
    known = {name: value for name, value in given.items() if value is not None}
    if decode:
        return CacheOptions(**known)
    if known:
        raise UsageError(
            "--" + next(iter(known)).replace("_", "-"),
            expected="--decode beside it",
            found="full forwards, which read no KV cache",
            action="Add --decode.",
        )
    return None


def _require_text(text: str | None) -> str:
    from optgptq.errors import UsageError

    if text is None:
        raise UsageError(
            "--text",
            expected="a text to evaluate on",
            found="none",
            action="Add --text bundled:story-evaluation for the bundled stories, or --text FILE for a text of yours.",
        )
    return text


def _tell(report: EvaluationReport, *, quiet: bool) -> None:
    for warning in report.warnings:
        write_note(f"warning: {warning}")
    for note in () if quiet else report.notes:
        write_note(note)


def _record(report: EvaluationReport, outcomes: tuple[GateOutcome, ...], *, seconds: float) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report.result),
        "window_size": report.window_size,
        "num_windows": report.num_windows,
        "remainder_tokens": report.remainder_tokens,
        "tokens_sha256": report.tokens_sha256,
        "seconds": seconds,
        "gates": [dataclasses.asdict(outcome) for outcome in outcomes],
        "warnings": list(report.warnings),
        **({} if report.cache is None else {"decode": True, "kv_cache": _cache_record(report.cache)}),
    }


def _cache_record(cache: CacheFacts) -> dict[str, Any]:
    return {"bits": cache.bits, **dataclasses.asdict(cache)}


def _page(report: EvaluationReport, outcomes: tuple[GateOutcome, ...], *, seconds: float) -> str:
    result = report.result
    rows = [("perplexity", f"{result.perplexity:.4f}")]
    if result.baseline_perplexity is not None:
        increase = result.perplexity / result.baseline_perplexity - 1
        rows.append(("baseline perplexity", f"{result.baseline_perplexity:.4f}"))
        rows.append(("increase", f"{increase:+.2%}"))
    if result.mean_kl is not None:
        rows.append(("mean KL, nats per token", f"{result.mean_kl:.6f}"))
    if result.top1_agreement is not None:
        rows.append(("top-1 agreement", f"{result.top1_agreement:.2%}"))
    if report.cache is not None:
        rows.append(("KV cache", f"{report.cache.bits:.2f} bits, {report.cache.bytes_per_token:,.0f} bytes per token"))
        rows.append(("past-only mode", report.cache.mode))
    rows.append(("scored tokens", f"{result.num_tokens:,} in {report.num_windows} windows of {report.window_size}"))
    rows.append(("time", human_seconds(seconds)))
    rows += [(f"gate {outcome.gate}", _verdict(outcome)) for outcome in outcomes]
    return table(rows)


def _verdict(outcome: GateOutcome) -> str:
    if outcome.passed:
        return f"passed: {outcome.value:.6g} against {outcome.limit:.6g}"
    return f"missed by {outcome.excess:.6g}: {outcome.value:.6g} against {outcome.limit:.6g}"
