"""`optgptq convert`: a lossless change of layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .display import plain_log
from .options import JsonOption, ModelArgument, OverwriteOption, QuietOption, RevisionOption
from .output import write_json, write_note, write_result


def convert(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", help="Layout: gptq, gptq_v2, compressed-tensors, optgptq.", show_default=False)
    ],
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a quantized checkpoint in another layout; the decoded weights stay bit for bit the same."""
    from optgptq.checkpoint.hub import resolve_model
    from optgptq.convert import convert as convert_checkpoint

    with plain_log(quiet=quiet):
        result = convert_checkpoint(resolve_model(model, revision), output, to=to, overwrite=overwrite)
    if not as_json:
        for warning in result.warnings:
            write_note(f"warning: {warning}")
    if as_json:
        write_json({**dataclasses.asdict(result), "output": str(result.output)})
    elif not quiet:
        write_result(
            f"{result.output}: {result.num_quantized} linears from {result.source_format} to {result.format}, "
            "decoded weights bit-equal"
        )
