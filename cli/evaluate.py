"""`optgptq eval`: perplexity, and how far a checkpoint has drifted from the model it was made from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import plain_log, step_display
from .gates import gate_rows, require_gates, write_gate_report
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
    from optgptq.evaluation.decoding import CacheOptions
    from optgptq.evaluation.gates import Figure, Gate, GateOutcome
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
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="NAME=VALUE",
            help="Gate by its name in a recipe: --gate max_layer_error=0.05. Repeatable; docs/gates.md lists them.",
            show_default=False,
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", help="Also write the gates as JUnit XML to this file.", show_default=False),
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
    from optgptq.errors import OptGPTQError
    from optgptq.evaluation.gates import gates_of_options, judge, require_baseline
    from optgptq.evaluation.run import EvaluationSettings, evaluate_folders
    from optgptq.runtime.device import require_device

    from .record import require_writable

    limits = {"max_perplexity": max_ppl, "max_perplexity_increase": max_ppl_increase, "max_kl": max_kl}
    gates = gates_of_options(gate or (), {**limits, "min_top1": min_top1})
    require_baseline(gates, has_baseline=baseline is not None or baseline_cache)
    decoding = _cache_options(decode, kv_cache, past_only)
    settings = None
    if _needs_text(gates) or text is not None or baseline is not None or decode or baseline_cache:
        settings = EvaluationSettings(
            source=TextSource(
                source=_require_text(text), config=config, split=split, column=column, revision=text_revision
            ),
            window_size=window_size,
            stride=stride,
            max_tokens=max_tokens,
            decoding=decoding,
            against_plain_cache=baseline_cache,
        )
    if junit is not None:
        require_writable(junit, option="--junit")
    began = time.perf_counter()
    try:
        with plain_log(quiet=quiet), step_display("windows", quiet=quiet) as progress:
            folder = resolve_model(model, revision)
            figures = _recorded(folder, gates)
            dense = None if baseline is None else resolve_model(baseline, baseline_revision)
            report = None
            if settings is not None:
                report = evaluate_folders(
                    folder, settings, baseline=dense, device=require_device(device), progress=progress
                )
    except OptGPTQError as error:
        failed = judge(gates, {each.kind.name: error for each in gates})
        write_gate_report(junit, failed, {"error": str(error)}, seconds=time.perf_counter() - began)
        raise
    seconds = time.perf_counter() - began
    outcomes = judge(gates, {**figures, **_measured(report, gates, seconds=seconds)})
    _tell(report, outcomes, seconds=seconds, as_json=as_json, quiet=quiet, junit=junit)


def _needs_text(gates: tuple[Gate, ...]) -> bool:
    """Say whether models must be scored: without any gate that is what the command is for."""
    return not gates or any(gate.kind.is_measured for gate in gates)


def _recorded(folder: Path, gates: tuple[Gate, ...]) -> Mapping[str, Figure | Exception]:
    """Return the figures of gates that need no model to run."""
    from optgptq.checkpoint.folder import CheckpointFolder
    from optgptq.checkpoint.manifest import read_manifest
    from optgptq.evaluation.record_gates import recorded_figures, require_figures, stored_linears

    if all(gate.kind.is_measured for gate in gates):
        return {}
    figures = recorded_figures(gates, read_manifest(folder) or {}, stored_linears(CheckpointFolder.open(folder)))
    require_figures(figures)
    return figures


def _measured(report: EvaluationReport | None, gates: tuple[Gate, ...], *, seconds: float) -> Mapping[str, Figure]:
    from optgptq.evaluation.gates import measured_figures

    if report is None:
        return {}
    num_measured = sum(gate.kind.is_measured for gate in gates)
    return measured_figures(report.result, seconds=seconds / max(num_measured, 1))


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


def _tell(
    report: EvaluationReport | None,
    outcomes: tuple[GateOutcome, ...],
    *,
    seconds: float,
    as_json: bool,
    quiet: bool,
    junit: Path | None,
) -> None:
    """Write the result wherever it is wanted, then end the command where a gate was missed."""
    record = _record(report, outcomes, seconds=seconds)
    problem = write_gate_report(junit, outcomes, record, seconds=seconds)
    if report is not None:
        for warning in report.warnings:
            write_note(f"warning: {warning}")
        for note in () if quiet else report.notes:
            write_note(note)
    if as_json:
        write_json(record)
    elif not quiet:
        write_result(_page(report, outcomes, seconds=seconds))
    require_gates(outcomes, problem=problem)


def _record(report: EvaluationReport | None, outcomes: tuple[GateOutcome, ...], *, seconds: float) -> dict[str, Any]:
    from optgptq.evaluation.report_record import evaluation_record

    return {
        **({"warnings": []} if report is None else evaluation_record(report)),
        "seconds": seconds,
        "gates": [outcome.record() for outcome in outcomes],
    }


def _page(report: EvaluationReport | None, outcomes: tuple[GateOutcome, ...], *, seconds: float) -> str:
    rows = [] if report is None else _figure_rows(report)
    return table([*rows, ("time", human_seconds(seconds)), *gate_rows(outcomes)])


def _figure_rows(report: EvaluationReport) -> list[tuple[str, str]]:
    result = report.result
    rows = [("perplexity", f"{result.perplexity:.4f}")]
    if result.baseline_perplexity is not None:
        increase = (result.perplexity - result.baseline_perplexity) / result.baseline_perplexity
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
    return rows
