"""`optgptq quantize`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .display import job_display
from .gqa import heads_rows
from .options import DeviceOption, JsonOption, ModelArgument, OverwriteOption, QuietOption, RevisionOption
from .output import human_bytes, human_seconds, table, write_json, write_result

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from optgptq.quantize import QuantizeResult


def quantize(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name of a shipped recipe (`optgptq recipes`), or a YAML file.")
    ] = "gptq-w4",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe field: --set weights.bits=3. Repeatable."),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Also write the run record, timings included, to this file.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a model by a recipe and write a checkpoint that is checked before it appears."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.memory import keep_freed_memory
    from optgptq.quantize import quantize as quantize_model
    from optgptq.recipe.loading import load_recipe

    from .record import require_writable, write_record

    if record is not None:
        require_writable(record)
    keep_freed_memory()
    loaded_recipe = load_recipe(recipe, overrides or ())
    folder = resolve_model(model, revision)
    with job_display(quiet=quiet) as listener:
        result = quantize_model(folder, loaded_recipe, output, overwrite=overwrite, progress=listener, device=device)
    if record is not None:
        write_record(record, result)
    if as_json:
        write_json(
            {
                "output": str(result.output),
                "seconds": result.seconds,
                "peak_memory_bytes": result.peak_memory_bytes,
                "bits_per_weight": result.bits_per_weight,
                **({"kv_cache": result.record["kv_cache"]} if "kv_cache" in result.record else {}),
                "warnings": list(result.warnings),
            }
        )
    elif not quiet:
        write_result(_summary(result))


def _summary(result: QuantizeResult) -> str:
    rows = [
        ("output", str(result.output)),
        ("bits per weight", f"{result.bits_per_weight:.4f}" if result.bits_per_weight else "as they were"),
        *(heads_rows(result.record["gqa"]) if "gqa" in result.record else ()),
        *(_cache_rows(result.record["kv_cache"]) if "kv_cache" in result.record else ()),
        ("time", human_seconds(result.seconds)),
        ("peak memory", human_bytes(result.peak_memory_bytes)),
        ("warnings", str(len(result.warnings))),
    ]
    return table(rows)


def _cache_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = record["calibration"]
    rows = [
        ("KV cache, bits per key and value", f"{record['bits_per_key']:.3f}, {record['bits_per_value']:.3f}"),
        (
            "KV cache, bytes per token",
            f"{record['bytes_per_token']:,.0f}, {record['exact_bytes_per_token']:,.0f} in 16 bits",
        ),
        (
            "exact keys",
            f"{record['past_only']}, first {record['sink_tokens']}, last {record['recent_tokens']}",
        ),
    ]
    if "held_out_kl" in found:
        plain = f"{found['held_out_kl_plain']:.5f} rounded to the nearest"
        figures = plain if found["is_plain"] else f"{found['held_out_kl']:.5f}, {plain}"
        rows.append(("KL on held-out windows", figures))
    return rows
