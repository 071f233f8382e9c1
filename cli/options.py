"""Options that several commands share, written once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder, `bundled:story-llama`, or a hub id.", show_default=False)
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Commit, tag or branch of a hub model.", show_default=False)
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors stay.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an output folder that exists, once the new one is complete."),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Of activations, keys and values; auto: float32 on a processor."),
]
WeightsOption = Annotated[
    Literal["auto", "dense", "quantized", "exact"],
    typer.Option(
        "--weights",
        help="Quantized weights: multiply with codes (on a processor with 8-bit activations); exact: with activations "
        "as they are; dense: decode once; auto: what is faster.",
    ),
]
EngineSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Setting of the engine: --set max_running=8. Repeatable.",
        show_default=False,
    ),
]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic", help="No text depends, to the bit, on what runs beside it; slower.")
]
KvCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="CACHE",
        help="Keys and values: checkpoint (as the model's folder says), 16 (plain), or 8, 4, 3, 2 bits, uncalibrated.",
        show_default=False,
    ),
]
PastOnlyOption = Annotated[
    str | None,
    typer.Option(
        "--past-only",
        metavar="MODE",
        help="Which keys of a quantized cache are read exactly: off, token, chunk, window:N.",
        show_default=False,
    ),
]
