"""`optgptq bench`: how fast the engine is with a model on this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench_table import bench_page
from .display import plain_log, step_display
from .options import (
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    EngineSetOption,
    JsonOption,
    ModelArgument,
    PastOnlyOption,
    QuietOption,
    RevisionOption,
    WeightsOption,
)
from .output import write_json, write_result

if TYPE_CHECKING:
    from optgptq.evaluation.bench_report import BenchReport


KvCachesOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="CACHE,...",
        help="Keys and values: checkpoint, 16, 8, 4, 3 or 2 bits; several are measured in turns, in equal memory.",
        show_default=False,
    ),
]


def bench(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    requests: Annotated[int, typer.Option("--requests", help="Texts that are served together.")] = 16,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens",
            metavar="A:B",
            help="Smallest and largest number of tokens of a prompt; 64:256, or less where the model takes less.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens", help="Tokens that are written after each prompt; 64, or less.", show_default=False
        ),
    ] = None,
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
    kv_cache: KvCachesOption = None,
    past_only: PastOnlyOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check that the engine writes what the model says, then measure its speed and memory."""
    from optgptq.evaluation.bench import run_benches
    from optgptq.evaluation.bench_caches import cache_engines, parse_caches
    from optgptq.evaluation.bench_report import BenchSettings
    from optgptq.runtime.engine_settings import CACHE_OF_CHECKPOINT
    from optgptq.runtime.field_values import SETTING_FIELDS, engine_settings, field_values
    from optgptq.runtime.llm import load_for_engine

    settings = BenchSettings(
        num_requests=requests,
        prompt_sizes=_sizes(prompt_tokens or "64:256"),
        num_new_tokens=64 if new_tokens is None else new_tokens,
        num_shared=shared_prefix,
        rounds=rounds,
        seed=seed,
        check=not skip_check,
    )
    values = {"deterministic": deterministic, **field_values(engine_set or (), SETTING_FIELDS, option="--set")}
    checked = engine_settings(values if past_only is None else {**values, "past_only": past_only})
    choices = (checked.kv_cache,) if kv_cache is None else parse_caches(kv_cache)
    reading = replace(checked, kv_cache=CACHE_OF_CHECKPOINT if CACHE_OF_CHECKPOINT in choices else choices[0])
    with plain_log(quiet=quiet):
        loaded = load_for_engine(
            model, device=device, dtype=dtype, weights=weights, revision=revision, settings=reading
        )
        engines = cache_engines(loaded, checked, choices)
        longest = min(engine.max_length for engine in engines)
        settings = settings.cut(longest, prompts=prompt_tokens is None, new_tokens=new_tokens is None)
        with step_display("rounds", quiet=quiet) as progress:
            reports = run_benches(engines, settings, progress=progress)
    if not as_json:
        write_result(bench_page(reports, num_requests=requests))
        return
    record = {
        "model": model,
        "device": str(engines[0].decoder.device),
        "dtype": str(engines[0].decoder.dtype).removeprefix("torch."),
        "settings": asdict(settings),
    }
    runs = [_record(report) for report in reports]
    write_json({**record, **runs[0]} if len(runs) == 1 else {**record, "runs": runs})


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
    record = asdict(report)
    record["bytes_per_token"]["total"] = report.bytes_per_token.total
    return record
