"""Print what `make demo` measured: a table from the JSON results of the commands before it, and the story.

    python benchmarks/demo.py FOLDER CHECKPOINT

FOLDER holds quantize.json, verify.json, inspect.json, inspect-dense.json, eval.json and generate.json. Every figure in
the table is read from them or from the two checkpoints' files; none is written here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from optgptq.bundled import bundled_path
from optgptq.checkpoint.folder import CheckpointFolder

DENSE_MODEL = "story-llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The JSON objects of the demo's commands, by command."""

    quantize: dict[str, Any]
    verify: dict[str, Any]
    inspect: dict[str, Any]
    inspect_dense: dict[str, Any]
    eval: dict[str, Any]
    generate: dict[str, Any]


def read_results(folder: Path) -> Results:
    """Return what the commands wrote; a missing or broken file is an error with its name."""
    return Results(
        quantize=_read(folder / "quantize.json"),
        verify=_read(folder / "verify.json"),
        inspect=_read(folder / "inspect.json"),
        inspect_dense=_read(folder / "inspect-dense.json"),
        eval=_read(folder / "eval.json"),
        generate=_read(folder / "generate.json"),
    )


def comparison(results: Results, dense: CheckpointFolder, quantized: CheckpointFolder) -> list[tuple[str, str, str]]:
    """Return the rows of the table: what, dense, quantized."""
    measured = results.eval
    dense_bytes, quantized_bytes = _weight_bytes(dense), _weight_bytes(quantized)
    num_weights = sum(prod(tensor.shape) for tensor in dense.tensors.values())
    increase = measured["perplexity"] / measured["baseline_perplexity"] - 1
    smaller = dense_bytes / quantized_bytes
    return [
        ("weight file, bytes", f"{dense_bytes:,}", f"{quantized_bytes:,} ({smaller:.2f} times smaller)"),
        ("bits per weight, linears", _dense_bits(dense, results), f"{results.inspect['bits_per_weight']:.3f}"),
        (
            "bits per weight, all tensors",
            f"{8 * results.inspect_dense['tensor_bytes'] / num_weights:.3f}",
            f"{8 * results.inspect['tensor_bytes'] / num_weights:.3f}",
        ),
        ("perplexity", f"{measured['baseline_perplexity']:.4f}", f"{measured['perplexity']:.4f} ({increase:+.2%})"),
        ("mean KL to dense, nats per token", "", f"{measured['mean_kl']:.5f}"),
        ("top-1 agreement with dense", "", f"{measured['top1_agreement']:.2%}"),
        ("seconds to quantize", "", f"{results.quantize['seconds']:.1f}"),
        ("peak memory to quantize, MiB", "", f"{results.quantize['peak_memory_bytes'] / 2**20:.0f}"),
        ("seconds to compare both", "", f"{measured['seconds']:.1f}"),
    ]


def main(arguments: Sequence[str]) -> None:
    """Print the story, the table and where the checkpoint is."""
    folder, checkpoint = map(Path, arguments)
    results = read_results(folder)
    if not results.verify["intact"]:
        sys.exit(f"{checkpoint}: verification found {len(results.verify['problems'])} problems")
    dense = CheckpointFolder.open(bundled_path(DENSE_MODEL))
    rows = comparison(results, dense, CheckpointFolder.open(checkpoint))
    console = Console(highlight=False)
    for story in results.generate["texts"]:
        console.rule("the quantized model writes")
        console.print(f"{story['prompt']}{story['text']}\n", markup=False)
    measured = results.eval
    table = Table(
        title=f"{DENSE_MODEL}, {results.inspect['format']} format, recipe {results.inspect['recipe']}",
        caption=f"{measured['num_tokens']:,} held-out tokens in {measured['num_windows']} windows of "
        f"{measured['window_size']}",
    )
    for heading, justify in (("", "left"), ("dense", "right"), ("quantized", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"checkpoint: {checkpoint} (verified, {results.verify['num_tensors']} tensors)", markup=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}. Run `make demo`, which makes it.")
    if not isinstance(content, dict):
        sys.exit(f"{path}: holds no JSON object. Run `make demo`, which makes it.")
    return content


def _weight_bytes(folder: CheckpointFolder) -> int:
    return sum((folder.path / name).stat().st_size for name in folder.weight_files)


def _dense_bits(dense: CheckpointFolder, results: Results) -> str:
    """Return the bits that the linears which were quantized take in the dense model."""
    tensors = [dense.tensors[f"{layer['name']}.weight"] for layer in results.inspect["layers"]]
    num_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    return f"{8 * num_bytes / sum(prod(tensor.shape) for tensor in tensors):.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
