"""What in a run was not as asked: warnings, fall-backs, raised damping, linears that lost more than by rounding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from optgptq.reports.blocks import Block, Note, Section, Table, shown_rows
from optgptq.reports.run_data import Linear, RunData
from optgptq.reports.wording import clean, digits, table_of

_NUMBER = re.compile(r"\d+")
_MAX_KINDS = 200
_EXAMPLES = 3


def findings_section(data: RunData) -> Section:
    """Return every warning of the run, like ones together, and every linear that was not solved as asked."""
    blocks: list[Block] = [Note(text=note, tone="warning") for note in data.notes]
    groups = alike(data.warnings)
    if groups:
        rows, left_out = shown_rows([(clean(first), str(times)) for first, times in groups], limit=_MAX_KINDS)
        caption = "Warnings (numbers of layers aside, like ones are told once)"
        blocks.append(Table(caption=caption, header=("warning", "times"), rows=rows, left_out=left_out))
    fallbacks = fallback_rows(data)
    if fallbacks:
        rows, left_out = shown_rows(fallbacks)
        header = ("linear", "what happened")
        caption = "Linears that were not solved as asked"
        blocks.append(Table(caption=caption, header=header, rows=rows, folded=len(rows) > 12, left_out=left_out))
    if not groups and not fallbacks and data.manifest:
        blocks.append(
            Note(text="No warning, and no linear fell back to anything else than what was asked.", tone="good")
        )
    return Section(identifier="findings", title="Warnings and fall-backs", blocks=blocks)


def alike(warnings: Iterable[str]) -> list[tuple[str, int]]:
    """Return the first of all warnings that differ in numbers only, and how many there are, in their order."""
    found: dict[str, tuple[str, int]] = {}
    for warning in warnings:
        key = _NUMBER.sub("#", warning)
        first, times = found.get(key, (warning, 0))
        found[key] = (first, times + 1)
    return list(found.values())


def fallback_rows(data: RunData) -> list[tuple[str, str]]:
    """Return linear and reason for each of them that did not get what the recipe asked for, or notes of its solver."""
    asked = table_of(table_of(data.manifest, "recipe"), "weights").get("method")
    return [
        (linear.name, "; ".join(reasons)) for linear in data.linears if (reasons := _reasons(linear, str(asked or "")))
    ]


def _reasons(linear: Linear, asked: str) -> Sequence[str]:
    reasons = list(linear.notes[:_EXAMPLES])
    if linear.method == "rtn" and asked not in ("rtn", ""):
        reasons.append(f"rounded to nearest where the recipe asks for {clean(asked, limit=40)}")
    used, wanted = linear.damp_ratio, linear.damp_ratio_asked
    if used is not None and wanted is not None and used > wanted * 1.0001:
        reasons.append(f"damping raised from {digits(wanted)} to {digits(used)}")
    if linear.loss is not None and linear.rtn_loss is not None and linear.loss > linear.rtn_loss * 1.0001:
        reasons.append(f"loss {digits(linear.loss)}, above {digits(linear.rtn_loss)} of rounding to nearest")
    return reasons
