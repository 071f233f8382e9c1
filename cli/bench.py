"""`optgptq bench`: how fast the engine is with a model on this machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import plain_log, step_display
from .options import (
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    EngineSetOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    RevisionOption,
    WeightsOption,
)
from .output import human_bytes, table, write_json, write_result

if TYPE_CHECKING:
    from optgptq.evaluation.bench_report import BenchReport, Spread


def bench(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    requests: Annotated[int, typer.Option("--requests", help="Texts that are served together.")] = 16,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="A:B", help="Smallest and largest number of tokens of a prompt.")
    ] = "64:256",
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens that are written after each prompt.")] = 64,
    shared_prefix: Annotated[
        int, typer.Option("--shared-prefix", help="Tokens that all prompts of a round begin with.")
    ] = 0,
    rounds: Annotated[int, typer.Option("--rounds", help="How often everything is measured.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the prompts, which are random tokens.")] = 0,
    skip_check: Annotated[
        bool, typer.Option("--skip-check", help="Do not compare with full forwards of the model first.")
    ] = False,
    engine_set: EngineSetOption = None,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that the engine writes what the model says, then measure its speed and memory."""
    from optgptq.evaluation.bench import run_bench
    from optgptq.evaluation.bench_report import BenchSettings
    from optgptq.runtime.field_values import SETTING_FIELDS, engine_settings, field_values
    from optgptq.runtime.llm import LLM

    settings = BenchSettings(
        num_requests=requests,
        prompt_sizes=_sizes(prompt_tokens),
        num_new_tokens=new_tokens,
        num_shared=shared_prefix,
        rounds=rounds,
        seed=seed,
        check=not skip_check,
    )
    values = {"deterministic": deterministic, **field_values(engine_set or (), SETTING_FIELDS, option="--set")}
    checked = engine_settings(values)
    with plain_log(quiet=quiet):
        llm = LLM(model, device=device, dtype=dtype, weights=weights, revision=revision, settings=checked)
        with step_display("rounds", quiet=quiet) as progress:
            report = run_bench(llm.engine, settings, progress=progress)
    if as_json:
        write_json(
            {
                "model": model,
                "device": str(llm.engine.decoder.device),
                "dtype": str(llm.engine.decoder.dtype).removeprefix("torch."),
                "settings": dataclasses.asdict(settings),
                **_record(report),
            }
        )
    else:
        write_result(_page(report, num_requests=requests))


def _sizes(text: str) -> tuple[int, int]:
    """Return the two numbers of `A:B`; of a single one, twice this.

    Raises:
        UsageError: neither.
    """
    from optgptq.errors import UsageError

    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()) or text.endswith(":"):
        raise UsageError(
            "--prompt-tokens", expected="A:B or one number", found=repr(text), action="Write --prompt-tokens 64:256."
        )
    return int(low), int(high or low)


def _record(report: BenchReport) -> dict[str, Any]:
    record = dataclasses.asdict(report)
    record["bytes_per_token"]["total"] = report.bytes_per_token.total
    return record


def _page(report: BenchReport, *, num_requests: int) -> str:
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
    rows = [
        ("check", compared),
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
    return table(rows) + "\n\nMedian of the rounds, in brackets the lowest and the highest."


def _speed(spread: Spread) -> str:
    return f"{spread.median:,.1f} ({spread.low:,.1f} to {spread.high:,.1f})"


def _time(spread: Spread) -> str:
    return f"{1000 * spread.median:.2f} ms ({1000 * spread.low:.2f} to {1000 * spread.high:.2f})"
