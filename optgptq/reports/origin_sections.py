"""Sections about what is dense, the KV cache, and everything that the result came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optgptq.reports.blocks import Block, Facts, Listing, Note, Section, Table, shown_rows
from optgptq.reports.kv_cache import CacheReport, CacheSideReport
from optgptq.reports.run_data import RunData
from optgptq.reports.wording import clean, digits, entries, flat, num_bytes, number, plain_value, table_of, texts, whole

_MAX_RECIPE = 100_000
_BYTES_SUFFIX = "_bytes"


def dense_section(data: RunData) -> Section:
    """Return the linears that stay dense, and why."""
    dense = data.checkpoint.dense
    if not dense:
        told = "Every linear of the decoder layers is quantized." if data.checkpoint.layers else "Everything is dense."
        return Section(identifier="dense", title="Left dense", blocks=[Note(text=told)])
    rows = [(clean(entry["name"], limit=200), clean(entry["reason"] or "not told", limit=300)) for entry in dense]
    shown, left_out = shown_rows(rows)
    table = Table(
        caption=f"Linears left dense: {len(rows):,}",
        header=("linear", "reason"),
        rows=shown,
        folded=len(rows) > 20,
        left_out=left_out,
    )
    return Section(identifier="dense", title="Left dense", blocks=[table])


def loading_section(data: RunData) -> Section | None:
    """Return which engines load the checkpoint; None where nobody was asked."""
    if not data.loading:
        return None
    rows = [(answer.title, "loads" if answer.loads else "refuses", answer.told or "-") for answer in data.loading]
    header = ("engine", "answer", "what to know")
    caption = f"{sum(answer.loads for answer in data.loading)} of {len(rows)} load it"
    table = Table(caption=caption, header=header, rows=rows)
    return Section(identifier="engines", title="Who can load it", blocks=[table])


def cache_section(data: RunData) -> Section | None:
    """Return how keys and values are stored; None where the checkpoint asks for nothing of the kind."""
    cache, fp8 = data.checkpoint.kv_cache, data.checkpoint.fp8_cache
    blocks: list[Block] = []
    if cache is not None:
        blocks += _cache_blocks(cache, table_of(data.manifest, "kv_cache"))
    if fp8 is not None:
        strategy = fp8.strategy or "no scheme says how they are meant"
        blocks.append(Facts(rows=[("fp8 scales for other engines", f"{fp8.num_layers} layers, {strategy}")]))
    return Section(identifier="kv-cache", title="KV cache", blocks=blocks) if blocks else None


def _cache_blocks(cache: CacheReport, record: Mapping[str, Any]) -> list[Block]:
    found = table_of(record, "calibration")
    bits = f"keys {digits(cache.key_bits_per_value)}, values {digits(cache.value_bits_per_value)}"
    saved = cache.bytes_per_token / cache.exact_bytes_per_token if cache.exact_bytes_per_token else 1.0
    facts = [
        ("bits per number", bits),
        ("bytes per token", f"{cache.bytes_per_token:,.1f}, {saved:.1%} of 16 bits".replace("%", " %")),
        ("keys read exactly", f"{cache.past_only}, first {cache.sink_tokens}, last {cache.recent_tokens}"),
        ("folded into weights", plain_value(", ".join(map(str, cache.folded)) or "nothing")),
    ]
    if number(found.get("held_out_kl")) is not None:
        facts.append(("KL on held-out windows", digits(found.get("held_out_kl"))))
        facts.append(("the same, rounded to the nearest", digits(found.get("held_out_kl_plain"))))
    scores = {whole(entry.get("index")): entry for entry in entries(found, "layers")}
    rows = [
        (
            str(layer.index),
            _side(layer.keys),
            _side(layer.values),
            f"{layer.bytes_per_token:,.1f}",
            digits(scores.get(layer.index, {}).get("score")),
            digits(scores.get(layer.index, {}).get("plain_score")),
        )
        for layer in cache.layers
    ]
    header = ("layer", "keys", "values", "bytes per token", "error", "rounding")
    notes: list[Block] = [Note(text=note, tone="warning") for note in texts(record, "notes")]
    return [Facts(rows=facts), *notes, Table(caption="KV cache by layer", header=header, rows=rows, folded=True)]


def _side(side: CacheSideReport) -> str:
    if not side.group_size:
        return f"{side.bits} bits"
    groups = "channels" if side.axis == "channel" else "tokens"
    rounding = "fitted" if side.fitted else "nearest"
    return f"{side.bits} bits, {side.group_size} {groups}, {side.transform}, {rounding}"


def environment_section(data: RunData) -> Section:
    """Return versions and machine, and the calibration text."""
    environment = table_of(data.record, "environment")
    if environment:
        rows = [_fact(str(name), value) for name, value in environment.items()]
    else:
        versions = table_of(data.manifest, "versions")
        rows = [("optgptq", plain_value(data.manifest.get("optgptq")))] if data.manifest else []
        rows += [(clean(name, limit=60), plain_value(value)) for name, value in versions.items()]
        rows += [("device", plain_value(data.manifest.get("device")))] if data.manifest else []
    blocks: list[Block] = [Facts(rows=rows)] if rows else [Note(text="Not known: the checkpoint has no manifest.")]
    calibration = table_of(data.manifest, "calibration")
    if calibration:
        told = [(clean(name, limit=60), plain_value(value)) for name, value in flat(calibration)]
        blocks.append(Table(caption="Calibration text", header=("field", "value"), rows=told, folded=True))
    return Section(identifier="environment", title="Environment", blocks=blocks)


def _fact(name: str, value: object) -> tuple[str, str]:
    shown = num_bytes(value) if name.endswith(_BYTES_SUFFIX) else plain_value(value)
    return clean(name.removesuffix(_BYTES_SUFFIX).replace("_", " "), limit=60), shown


def recipe_section(data: RunData) -> Section:
    """Return the whole recipe as it was used."""
    recipe = table_of(data.manifest, "recipe")
    if not recipe:
        return Section(identifier="recipe", title="Recipe", blocks=[Note(text="Not known.")])
    text = clean(json.dumps(recipe, indent=2, ensure_ascii=False), limit=_MAX_RECIPE)
    caption = f"All fields of {clean(recipe.get('name') or 'the recipe', limit=100)}"
    return Section(identifier="recipe", title="Recipe", blocks=[Listing(caption=caption, text=text, folded=True)])


def files_section(data: RunData) -> Section:
    """Return size and hash of every file of source and checkpoint."""
    groups = (
        ("Files of the source", table_of(table_of(data.manifest, "model"), "files")),
        ("Files of the source before conversion", table_of(table_of(data.manifest, "converted"), "files")),
        ("Files of the checkpoint", table_of(data.manifest, "files")),
    )
    blocks: list[Block] = []
    for caption, files in groups:
        if not files:
            continue
        rows = [
            (clean(name, limit=200), num_bytes(entry.get("bytes")), clean(entry.get("sha256"), limit=80))
            for name, entry in files.items()
            if isinstance(entry, dict)
        ]
        shown, left_out = shown_rows(rows)
        header = ("file", "size", "SHA-256")
        blocks.append(Table(caption=caption, header=header, rows=shown, folded=True, left_out=left_out))
    if not blocks:
        blocks.append(Note(text="Not known: the checkpoint has no manifest."))
    return Section(identifier="files", title="Files and hashes", blocks=blocks)
