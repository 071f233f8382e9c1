"""`optgptq gqa`: fewer key/value heads for a dense model, before anything is quantized."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .display import job_display
from .interrupts import tells_what_is_kept
from .options import DeviceOption, JsonOption, ModelArgument, OverwriteOption, QuietOption, RevisionOption
from .output import human_bytes, human_seconds, table, write_json, write_result

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from optgptq.group_heads import GroupResult


class StreamPlace(StrEnum):
    """Where activations of the calibration text are kept."""

    MEMORY = "memory"
    DISK = "disk"


def group(  # noqa: PLR0913 - the parameters of a command are its options
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    group: Annotated[
        int | None,
        typer.Option("--group", help="Key/value heads that become one; default: the recipe's.", show_default=False),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Recipe whose sections gqa and calibration count.")
    ] = "opt-gqa-w4",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a recipe field: --set gqa.grouping=adjacent."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Text for perplexity before and after; default: calibration windows held out.",
            show_default=False,
        ),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option("--max-perplexity-ratio", help="Gate: highest perplexity after over before.", show_default=False),
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = "cpu",
    activations: Annotated[
        StreamPlace, typer.Option("--activations", help="Where activations are kept.")
    ] = StreamPlace.MEMORY,
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an interrupted job has kept for this output, and begin anew.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge key/value heads of a dense model; tells perplexity before and after, and the memory saved."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.group_heads import group_model
    from optgptq.memory import keep_freed_memory
    from optgptq.recipe.loading import load_recipe

    keep_freed_memory()
    fields = {"group": group, "text": text, "max_perplexity_ratio": max_perplexity_ratio}
    asked = [f"gqa.{name}={value}" for name, value in fields.items() if value is not None]
    loaded_recipe = load_recipe(recipe, [*(overrides or ()), *asked])
    folder = resolve_model(model, revision)
    with job_display(quiet=quiet) as listener, tells_what_is_kept(output):
        result = group_model(
            folder,
            loaded_recipe,
            output,
            overwrite=overwrite,
            restart=restart,
            progress=listener,
            device=device,
            activations="disk" if activations == StreamPlace.DISK else "memory",
        )
    if as_json:
        write_json(
            {
                "output": str(result.output),
                "seconds": result.seconds,
                "peak_memory_bytes": result.peak_memory_bytes,
                **{name: value for name, value in result.record.items() if name != "layers"},
                "perplexity_ratio": result.record["perplexity_after"] / result.record["perplexity_before"],
                "warnings": list(result.warnings),
            }
        )
    else:
        write_result(_summary(result))


def heads_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of a summary about merged heads."""
    before, after = record["perplexity_before"], record["perplexity_after"]
    kv_before, kv_after = record["kv_bytes_per_token_before"], record["kv_bytes_per_token_after"]
    return [
        ("key/value heads", f"{record['num_kv_heads_before']} to {record['num_kv_heads_after']}"),
        ("keys and values, bytes per token", f"{kv_before:,} to {kv_after:,}"),
        ("dense perplexity", f"{before:.4f} to {after:.4f} ({after / before:.3f} times)"),
        ("measured on", f"{record['measured_on']}, {record['num_tokens']:,} tokens"),
    ]


def _summary(result: GroupResult) -> str:
    rows = [
        ("output", str(result.output)),
        *heads_rows(result.record),
        ("time", human_seconds(result.seconds)),
        ("peak memory", human_bytes(result.peak_memory_bytes)),
        ("warnings", str(len(result.warnings))),
    ]
    return table(rows)
