"""The first sections of a page: what was made of what, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optgptq.reports.blocks import Block, Facts, Listing, Note, Section, Table
from optgptq.reports.run_data import RunData
from optgptq.reports.wording import (
    clean,
    count,
    digits,
    duration,
    entries,
    num_bytes,
    number,
    percent,
    table_of,
    whole,
)


def summary_section(data: RunData) -> Section:
    """Return what the checkpoint is, its size, what it took, and the verdict of its gates."""
    return Section(identifier="summary", title="Summary", blocks=[verdict(data.gates), Facts(rows=summary_facts(data))])


def summary_facts(data: RunData) -> list[tuple[str, str]]:
    """Return the facts that tell runs apart; a comparison shows them side by side."""
    checkpoint, record = data.checkpoint, data.record
    recipe = table_of(data.manifest, "recipe")
    rows = [
        ("checkpoint", data.name),
        ("model", model_words(data)),
        ("recipe", clean(recipe.get("name") or "-", limit=200)),
        ("what it does", clean(recipe.get("description") or "-", limit=400)),
        ("layout", checkpoint.format),
        ("bits per weight", digits(checkpoint.bits_per_weight, precision=5)),
        ("quantized weights", f"{count(checkpoint.num_quantized_weights)} in {len(checkpoint.layers):,} linears"),
        ("size of all tensors", num_bytes(checkpoint.tensor_bytes)),
    ]
    before = source_bytes(data.manifest)
    if before:
        share = checkpoint.tensor_bytes / before
        rows.append(("size before", f"{num_bytes(before)}; now {percent(share)} of it"))
    if "seconds" in record:
        rows.append(("time", duration(record.get("seconds"))))
        rows.append(("peak memory", num_bytes(record.get("peak_memory_bytes"))))
    rows.append(("warnings", str(len(data.warnings))))
    made_by = checkpoint.made_by
    rows.append(("made by", f"optgptq {clean(made_by, limit=40)}" if made_by else "another tool"))
    if converted := table_of(data.manifest, "converted"):
        rows.append(("converted from", clean(converted.get("from"), limit=40)))
    return rows


def model_words(data: RunData) -> str:
    """Return architecture and sizes of the model in one line."""
    sizes = [
        f"{layers} decoder layers" if (layers := whole(data.config.get("num_hidden_layers"))) else "",
        f"width {width}" if (width := whole(data.config.get("hidden_size"))) else "",
    ]
    return ", ".join([clean(data.checkpoint.architecture or "unknown", limit=100), *filter(None, sizes)])


def source_bytes(manifest: Mapping[str, Any]) -> float:
    """Return the size of the source's weight files; 0 where nobody tells."""
    files = table_of(table_of(manifest, "model"), "files")
    sizes = [
        number(entry.get("bytes")) or 0.0
        for name, entry in files.items()
        if name.endswith(".safetensors") and isinstance(entry, dict)
    ]
    return sum(sizes)


def verdict(gates: list[dict[str, Any]]) -> Note:
    """Return in one line whether the quality gates were passed."""
    if not gates:
        return Note(text="No quality gate was set.", tone="plain")
    missed = [clean(gate.get("gate"), limit=60) for gate in gates if gate.get("passed") is not True]
    if not missed:
        return Note(text=f"All quality gates passed: {len(gates)} of {len(gates)}.", tone="good")
    return Note(text=f"Quality gates missed: {len(missed)} of {len(gates)} ({', '.join(missed)}).", tone="bad")


def quality_section(data: RunData) -> Section:
    """Return figures against the baseline, every gate with value and limit, and the sanity generation."""
    blocks: list[Block] = []
    if data.evaluation:
        blocks.append(Facts(rows=evaluation_facts(data.evaluation)))
    else:
        told = (
            "Quality was not measured: `optgptq eval OUT --baseline MODEL --text TEXT --json`, given with --eval, does."
        )
        blocks.append(Note(text=told))
    if data.gates:
        header = ("gate", "figure", "value", "limit", "verdict", "where")
        rows = [_gate_row(gate) for gate in data.gates]
        blocks.append(Table(caption="Quality gates", header=header, rows=rows))
    sample = table_of(data.record, "sample")
    if sample:
        text = clean(sample.get("text"), limit=4000)
        blocks.append(Listing(caption=f"Text written after: {clean(sample.get('prompt'), limit=400)}", text=text))
    return Section(identifier="quality", title="Quality", blocks=blocks)


def evaluation_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of an evaluation that are there."""
    candidate, baseline = number(evaluation.get("perplexity")), number(evaluation.get("baseline_perplexity"))
    rows = [("perplexity", digits(candidate, precision=6))]
    if baseline:
        rows.append(("perplexity of the baseline", digits(baseline, precision=6)))
        if candidate is not None:
            rows.append(("increase", f"{candidate / baseline - 1:+.2%}".replace("%", " %")))
    if number(evaluation.get("mean_kl")) is not None:
        rows.append(("mean KL, nats per token", digits(evaluation.get("mean_kl"))))
    if number(evaluation.get("top1_agreement")) is not None:
        rows.append(("top-1 agreement", percent(evaluation.get("top1_agreement"))))
    windows = f"{count(evaluation.get('num_windows'))} windows of {count(evaluation.get('window_size'))}"
    rows.append(("scored tokens", f"{count(evaluation.get('num_tokens'))} in {windows}"))
    if "tokens_sha256" in evaluation:
        rows.append(("hash of the tokens", clean(evaluation.get("tokens_sha256"), limit=80)))
    return rows


def _gate_row(gate: Mapping[str, Any]) -> tuple[str, ...]:
    excess, problem = number(gate.get("excess")), gate.get("problem")
    missed = f"missed by {digits(excess)}" if excess else "missed"
    if problem:
        missed = f"missed: {clean(problem, limit=300)}"
    return (
        clean(gate.get("gate"), limit=80),
        clean(gate.get("figure"), limit=200),
        digits(gate.get("value"), precision=6),
        digits(gate.get("limit"), precision=6),
        "passed" if gate.get("passed") is True else missed,
        clean(gate.get("where") or "-", limit=200),
    )


def heads_section(data: RunData) -> Section | None:
    """Return what merging key/value heads did; None where none were merged."""
    record = table_of(data.manifest, "gqa")
    if not record:
        return None
    before, after = number(record.get("perplexity_before")), number(record.get("perplexity_after"))
    kv_before, kv_after = (count(record.get(f"kv_bytes_per_token_{when}")) for when in ("before", "after"))
    heads = " to ".join(count(record.get(f"num_kv_heads_{when}")) for when in ("before", "after"))
    facts = [
        ("key/value heads", heads),
        ("keys and values, bytes per token", f"{kv_before} to {kv_after}"),
        ("perplexity of the dense model", f"{digits(before, precision=6)} to {digits(after, precision=6)}"),
        ("measured on", f"{clean(record.get('measured_on'), limit=200)}, {count(record.get('num_tokens'))} tokens"),
    ]
    rows = [
        (
            count(layer.get("index")),
            digits(layer.get("key_error")),
            digits(layer.get("value_error")),
            digits(layer.get("output_error")),
        )
        for layer in entries(record, "layers")
    ]
    header = ("layer", "error of keys", "error of values", "output error")
    table = Table(caption="Merged heads by layer", header=header, rows=rows, folded=True)
    return Section(identifier="heads", title="Merged key/value heads", blocks=[Facts(rows=facts), table])
