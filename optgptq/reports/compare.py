"""Two runs beside each other, as one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optgptq.reports.blocks import Block, Note, Section, Table, shown_rows
from optgptq.reports.findings import alike
from optgptq.reports.loss_charts import error_lines, measured_errors
from optgptq.reports.page import render_page
from optgptq.reports.run_data import Linear, RunData
from optgptq.reports.summary_sections import evaluation_facts, summary_facts, verdict
from optgptq.reports.wording import clean, digits, entries, flat, plain_value, table_of

_SAME_NAME = ("first", "second")


def compare_page(first: RunData, second: RunData) -> str:
    """Return the page of two runs: what differs in recipe, size, quality, losses and warnings."""
    names = run_names(first, second)
    sections = (
        _summary(first, second, names),
        _quality(first, second, names),
        _recipe(first, second, names),
        _losses(first, second, names),
        _warnings(first, second, names),
    )
    return render_page(f"Two quantizations: {names[0]} and {names[1]}", sections)


def run_names(first: RunData, second: RunData) -> tuple[str, str]:
    """Return what to call two runs, apart even where their folders have the same name."""
    if first.name != second.name:
        return first.name, second.name
    return f"{first.name} ({_SAME_NAME[0]})", f"{second.name} ({_SAME_NAME[1]})"


def recipe_differences(first: RunData, second: RunData) -> list[tuple[str, str, str]]:
    """Return the recipe fields that differ, dotted, with both values; `-` where a run has no such field."""
    left, right = (dict(flat(table_of(data.manifest, "recipe"))) for data in (first, second))
    names = [*left, *(name for name in right if name not in left)]
    return [
        (clean(name, limit=200), plain_value(left.get(name)), plain_value(right.get(name)))
        for name in names
        if name not in left or name not in right or left[name] != right[name]
    ]


def _beside(
    caption: str, names: tuple[str, str], left: Sequence[tuple[str, str]], right: Sequence[tuple[str, str]]
) -> Table:
    first, second = dict(left), dict(right)
    keys = [*first, *(key for key in second if key not in first)]
    rows = [(key, first.get(key, "-"), second.get(key, "-")) for key in keys]
    return Table(caption=caption, header=("", *names), rows=rows)


def _summary(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    blocks: list[Block] = [
        Note(text=f"{name}: {note}", tone="warning")
        for name, data in zip(names, (first, second), strict=True)
        for note in data.notes
    ]
    left, right = ([("gates", verdict(data.gates).text), *summary_facts(data)[1:]] for data in (first, second))
    return Section(identifier="summary", title="Summary", blocks=[_beside("Both runs", names, left, right), *blocks])


def _quality(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    if not first.evaluation and not second.evaluation:
        blocks: list[Block] = [Note(text="The quality of neither was measured.")]
        return Section(identifier="quality", title="Quality", blocks=blocks)
    facts = [evaluation_facts(data.evaluation) if data.evaluation else [] for data in (first, second)]
    blocks = [_beside("Against the baseline", names, *facts)]
    hashes = {clean(data.evaluation.get("tokens_sha256"), limit=80) for data in (first, second) if data.evaluation}
    if len(hashes) > 1:
        told = "The two were measured on different texts or windows: their figures do not compare."
        blocks.append(Note(text=told, tone="warning"))
    return Section(identifier="quality", title="Quality", blocks=blocks)


def _recipe(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    rows = recipe_differences(first, second)
    blocks: list[Block] = [Note(text="The recipes are the same.")]
    if rows:
        blocks = [Table(caption="Recipe fields that differ", header=("field", *names), rows=rows)]
    sources = [table_of(table_of(data.manifest, "model"), "files") for data in (first, second)]
    if sources[0] != sources[1]:
        blocks.append(Note(text="The two were made from different files.", tone="warning"))
    return Section(identifier="recipe", title="Recipe", blocks=blocks)


def _losses(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    blocks: list[Block] = []
    series = {
        name: measured_errors(entries(data.manifest, "decoder_layers"))
        for name, data in zip(names, (first, second), strict=True)
    }
    told = {name: points for name, points in series.items() if points}
    if told:
        blocks.append(error_lines(told, "compared-errors"))
    left, right = ({linear.name: linear for linear in data.linears} for data in (first, second))
    rows, left_out = shown_rows(_loss_rows(left, right))
    if rows:
        header = ("linear", f"bits, {names[0]}", f"bits, {names[1]}", f"loss, {names[0]}", f"loss, {names[1]}", "ratio")
        caption = "Losses of all linears, largest change first"
        blocks.append(Table(caption=caption, header=header, rows=rows, left_out=left_out, folded=len(rows) > 60))
    return Section(identifier="losses", title="Losses", blocks=blocks or [Note(text="Nobody tells a loss.")])


def _loss_rows(left: Mapping[str, Linear], right: Mapping[str, Linear]) -> list[tuple[str, ...]]:
    names = [*left, *(name for name in right if name not in left)]
    pairs = [(name, left.get(name), right.get(name)) for name in names]
    pairs.sort(key=lambda pair: -abs(math.log(_ratio(pair[1], pair[2]) or 1.0)))
    return [
        (
            name,
            "dense" if first is None else str(first.bits),
            "dense" if second is None else str(second.bits),
            digits(None if first is None else first.loss),
            digits(None if second is None else second.loss),
            digits(_ratio(first, second), precision=3),
        )
        for name, first, second in pairs
    ]


def _ratio(first: Linear | None, second: Linear | None) -> float | None:
    """Return the second loss over the first; None where one is missing or not positive."""
    if first is None or second is None or first.loss is None or second.loss is None:
        return None
    return second.loss / first.loss if first.loss > 0 and second.loss > 0 else None


def _warnings(first: RunData, second: RunData, names: tuple[str, str]) -> Section:
    blocks: list[Block] = []
    for name, own, others in ((names[0], first, second), (names[1], second, first)):
        known = {warning for warning, _ in alike(others.warnings)}
        rows, left_out = shown_rows(
            [(text, str(times)) for text, times in alike(own.warnings) if text not in known], limit=200
        )
        if rows:
            caption = f"Warnings of {name} only"
            blocks.append(Table(caption=caption, header=("warning", "times"), rows=rows, left_out=left_out))
    return Section(
        identifier="warnings",
        title="Warnings",
        blocks=blocks or [Note(text="Both have the same warnings.", tone="good")],
    )
