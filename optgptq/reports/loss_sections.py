"""Sections about what quantization lost: by decoder layer, by linear, and inside the worst linears."""

from __future__ import annotations

from collections.abc import Sequence

from optgptq.reports.blocks import Block, Note, Section, Table, shown_rows
from optgptq.reports.error_maps import WORST_MAPS
from optgptq.reports.loss_charts import error_map_picture, loss_maps, output_errors
from optgptq.reports.run_data import Linear, RunData
from optgptq.reports.wording import count, digits, entries, percent, table_of

_HEADER = ("linear", "shape", "method", "bits", "group", "loss", "rounding", "damping", "clipped", "tokens")


def loss_section(data: RunData) -> Section:
    """Return losses by layer and module, output errors along the depth, and a table of all linears, worst first."""
    linears = data.linears
    blocks: list[Block] = []
    maps = loss_maps(linears)
    if maps is not None:
        blocks.append(maps)
    layers = entries(data.manifest, "decoder_layers")
    errors = output_errors(layers)
    if errors is not None:
        blocks.append(errors)
        rows = [(count(layer.get("index")), digits(layer.get("output_error")), _tweak(layer)) for layer in layers]
        header = ("layer", "output error", "training of norms")
        shown, left_out = shown_rows(rows)
        blocks.append(Table(caption="Decoder layers", header=header, rows=shown, folded=True, left_out=left_out))
    if linears:
        shown, left_out = shown_rows([_row(linear) for linear in worst_first(linears)])
        caption = "All quantized linears, highest loss first"
        blocks.append(Table(caption=caption, header=_HEADER, rows=shown, folded=True, left_out=left_out))
    else:
        blocks.append(Note(text="No linear is quantized."))
    return Section(identifier="losses", title="Losses by layer and module", blocks=blocks)


def worst_first(linears: Sequence[Linear]) -> list[Linear]:
    """Return the linears by falling loss; those without a loss last."""
    return sorted(linears, key=lambda linear: (linear.loss is None, -(linear.loss or 0.0)))


def _row(linear: Linear) -> tuple[str, ...]:
    return (
        linear.name,
        f"{linear.out_features} x {linear.in_features}",
        linear.method or "-",
        str(linear.bits),
        "row" if linear.group_size == -1 else str(linear.group_size),
        digits(linear.loss),
        digits(linear.rtn_loss),
        digits(linear.damp_ratio, precision=3),
        percent(linear.clip_fraction),
        count(linear.num_tokens),
    )


def _tweak(layer: dict[str, object]) -> str:
    tweak = table_of(layer, "norm_tweaking")
    if not tweak:
        return "-"
    return (
        f"{digits(tweak.get('loss_before'))} to {digits(tweak.get('loss_after'))} in {count(tweak.get('steps'))} steps"
    )


def worst_section(data: RunData) -> Section | None:
    """Return weight and error heat maps of the linears with the highest loss; None where the record has none."""
    records = entries(data.record, "error_maps")[:WORST_MAPS]
    pictures = [error_map_picture(record, place) for place, record in enumerate(records)]
    blocks: list[Block] = [picture for picture in pictures if picture is not None]
    if not blocks:
        return None
    told = (
        "Root mean squares of blocks, bright is large; outputs from above, inputs from left; each map on its own scale."
    )
    return Section(identifier="worst", title="Worst linears", blocks=[Note(text=told), *blocks])
