"""The subject after a change, from its layouts alone, and what a user sets to get there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from optgptq.layout import LinearLayout
from optgptq.targets.subject import Change, TargetSubject, Varied


def vary_layouts(subject: TargetSubject, change: Change) -> Varied | None:
    """Return `subject` as if quantized again with `change`; None where a linear cannot have what is asked."""
    dense = {*change.keep_dense, *([subject.head_name] if change.dense_head else [])}
    layouts = [_changed(layout, change, dense=layout.name in dense) for layout in subject.layouts]
    if change.drop_rules:
        layouts = _alike(layouts, subject)
    if not all(_possible(layout) for layout in layouts) or all(layout.bits is None for layout in layouts):
        return None
    changed = replace(
        subject,
        layouts=tuple(layouts),
        format=change.format or subject.format,
        act_order=False,
        words_version=0,
        loose_words=False,
    )
    return Varied(subject=changed, settings=settings_of(change))


def settings_of(change: Change) -> tuple[str, ...]:
    """Return `--set` texts for `change` of a recipe without rules."""
    settings = []
    if change.format is not None:
        settings.append(f"export.format={change.format}")
    if change.uniform:
        settings.append("weights.method=gptq")
    if change.bits is not None:
        settings.append(f"weights.bits={change.bits}")
    if change.group_size is not None:
        settings.append(f"weights.group_size={change.group_size}")
    if change.symmetric:
        settings.append("weights.symmetric=true")
    if change.dense_head:
        settings.append("head.bits=null")
    if change.drop_rules:
        settings += ["weights.rules=[]", "weights.keep_dense=[]"]
    if change.keep_dense:
        settings.append(f"weights.keep_dense={json.dumps(dense_patterns(change.keep_dense))}")
    return tuple(settings)


def dense_patterns(names: Sequence[str]) -> list[str]:
    """Return patterns for `weights.keep_dense` that match all of `names`: one for each last part of a name."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return [rf"\.{re.escape(leaf)}$" for leaf in leaves]


def _changed(layout: LinearLayout, change: Change, *, dense: bool) -> LinearLayout:
    if layout.bits is None:
        return layout
    if dense:
        return replace(layout, bits=None, symmetric=True, group_size=-1, coefficients=None, dense_reason="suggested")
    return replace(
        layout,
        bits=layout.bits if change.bits is None else max(layout.bits, change.bits),
        group_size=layout.group_size if change.group_size is None else change.group_size,
        symmetric=layout.symmetric or change.symmetric or (change.uniform and layout.coefficients is not None),
        coefficients=None if change.uniform else layout.coefficients,
    )


def _alike(layouts: Sequence[LinearLayout], subject: TargetSubject) -> list[LinearLayout]:
    """Return all linears of decoder layers with the commonest settings, those that were dense as well."""
    quantized = [layout for layout in layouts if layout.bits is not None]
    if not quantized:
        return list(layouts)
    keys = [(layout.bits, layout.group_size, layout.symmetric) for layout in quantized]
    common = max(dict.fromkeys(keys), key=keys.count)
    bits, group_size, symmetric = common
    coefficients = quantized[keys.index(common)].coefficients
    return [
        replace(layout, bits=bits, group_size=group_size, symmetric=symmetric, coefficients=coefficients)
        if subject.is_inner(layout)
        else layout
        for layout in layouts
    ]


def _possible(layout: LinearLayout) -> bool:
    return layout.bits is None or layout.group_size == -1 or layout.in_features % layout.group_size == 0
