"""Pictures of losses: by decoder layer and module, along the depth, and inside single linears."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from optgptq.reports.blocks import Picture
from optgptq.reports.figures import (
    NARROW_INCHES,
    SERIES,
    axis_label,
    draw_map,
    drawing,
    floats,
    logarithmic,
    logarithmic_ticks,
    new_figure,
    svg_of,
    whole_ticks,
)
from optgptq.reports.run_data import Linear
from optgptq.reports.wording import clean, digits, drawable, number

_MAX_MODULES = 24
_MAX_CELLS = 64
Matrix = np.ndarray[Any, Any]


def loss_maps(linears: Sequence[Linear]) -> Picture | None:
    """Return losses by decoder layer and module, those of rounding below; None where no loss is told.

    Experts of a layer share a row, which shows the worst of them.
    """
    told = [linear for linear in linears if linear.layer is not None and drawable(linear.loss) is not None]
    if not told:
        return None
    modules = list(dict.fromkeys(linear.module for linear in told))[:_MAX_MODULES]
    layers = sorted({linear.layer for linear in told if linear.layer is not None})
    solved = _matrix(told, modules, layers, [linear.loss for linear in told])
    rounded = _matrix(told, modules, layers, [drawable(linear.rtn_loss) for linear in told])
    has_rounding = bool(np.isfinite(rounded).any())
    shown = [("loss", solved), ("loss of rounding to nearest", rounded)] if has_rounding else [("loss", solved)]
    scale = logarithmic(np.concatenate([values.ravel() for _, values in shown]))
    with drawing("losses"):
        figure = new_figure(height=len(shown) * (0.55 + 0.21 * len(modules)) + 0.3)
        rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
        for axes, (title, values) in zip(rows[:, 0], shown, strict=True):
            image = draw_map(axes, values, scale)
            axes.set_title(title)
            axes.set_yticks(range(len(modules)), [axis_label(module) for module in modules])
            _name_columns(axes, layers)
        rows[-1, 0].set_xlabel("decoder layer")
        bar = figure.colorbar(image, ax=rows[:, 0].tolist(), pad=0.01, fraction=0.03)
        logarithmic_ticks(bar.ax.yaxis, float(scale.vmin or 0), float(scale.vmax or 0))
        svg = svg_of(figure)
    worst = max(told, key=lambda linear: linear.loss or 0.0)
    label = (
        f"Heat map of the loss of {len(told)} linears in {len(layers)} decoder layers, from "
        f"{digits(min(linear.loss or 0.0 for linear in told), precision=3)} to {digits(worst.loss, precision=3)}; "
        f"the highest is that of {worst.name}."
    )
    return Picture(svg=svg, label=label, caption="Share of each linear's output energy that is lost, on one scale.")


def _matrix(
    linears: Sequence[Linear], modules: Sequence[str], layers: Sequence[int], values: Sequence[float | None]
) -> Matrix:
    """Return the highest value by module (rows) and decoder layer (columns), NaN where there is none."""
    row_of = {module: row for row, module in enumerate(modules)}
    column_of = {layer: column for column, layer in enumerate(layers)}
    found = np.full((len(modules), len(layers)), math.nan)
    for linear, value in zip(linears, values, strict=True):
        if value is not None and linear.module in row_of and linear.layer is not None:
            place = row_of[linear.module], column_of[linear.layer]
            found[place] = np.fmax(found[place], value)
    return found


def _name_columns(axes: Axes, layers: Sequence[int]) -> None:
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def output_errors(decoder_layers: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Return the error of each decoder layer's output along the depth; None where nobody measured it."""
    told = measured_errors(decoder_layers)
    return None if not told else error_lines({"output error": told}, "output-errors")


def error_lines(series: Mapping[str, Sequence[tuple[float, float]]], name: str) -> Picture:
    """Return errors along the depth, one line for each of several runs."""
    with drawing(name):
        figure = new_figure(height=2.5)
        axes = figure.subplots()
        for (title, points), color in zip(series.items(), SERIES, strict=False):
            indices, errors = zip(*points, strict=True)
            axes.plot(indices, errors, color=color, marker="o", markersize=3, label=axis_label(title, limit=60))
        errors_seen = [error for points in series.values() for _, error in points]
        low, high = min(errors_seen), max(errors_seen)
        if low > 0:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.3, high * 1.3)
            logarithmic_ticks(axes.yaxis, low / 1.3, high * 1.3)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("relative error")
        whole_ticks(axes)
        if len(series) > 1:
            axes.legend()
        svg = svg_of(figure)
    parts = [_in_words(clean(title, limit=100), points) for title, points in series.items()]
    caption = "Error of each decoder layer's output against full precision, everything before it quantized."
    return Picture(svg=svg, label="Lines along the depth. " + " ".join(parts), caption=caption)


def measured_errors(decoder_layers: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return index and output error of the decoder layers that have both."""
    pairs = [(drawable(layer.get("index")), drawable(layer.get("output_error"))) for layer in decoder_layers]
    return [(index, error) for index, error in pairs if index is not None and error is not None]


def _in_words(title: str, points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0], points[-1]
    highest = max(points, key=lambda point: point[1])
    return (
        f"{title}: {digits(first[1], precision=3)} in layer {first[0]:.0f}, {digits(last[1], precision=3)} in layer "
        f"{last[0]:.0f}, at most {digits(highest[1], precision=3)} in layer {highest[0]:.0f}."
    )


def error_map_picture(record: Mapping[str, Any], place: int) -> Picture | None:
    """Return where a linear's weights are large and where they moved; None where the record is damaged."""
    weight, error = _cells(record.get("weight")), _cells(record.get("error"))
    if weight is None or error is None:
        return None
    name = clean(record.get("name"), limit=200)
    with drawing(f"error-map-{place}"):
        figure = new_figure(height=1.75, width=NARROW_INCHES, arranged=False)
        places = ((0.005, 0.13, 0.485, 0.75), (0.51, 0.13, 0.485, 0.75))
        maps = (("weight", weight, "viridis"), ("error", error, "magma"))
        for place_of_map, (title, values, colors) in zip(places, maps, strict=True):
            axes = figure.add_axes(place_of_map)
            scale = logarithmic(values)
            draw_map(axes, values, scale, color_map=colors)
            axes.set_title(title, pad=3)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel(f"{digits(scale.vmin, precision=2)} to {digits(scale.vmax, precision=2)}", labelpad=3)
        svg = svg_of(figure)
    shape = f"{clean(record.get('rows'), limit=12)} x {clean(record.get('columns'), limit=12)}"
    largest = np.unravel_index(int(np.nanargmax(error)), error.shape)
    label = (
        f"Two heat maps of {name}, {shape}: root mean squares of its weights, and of their errors. The largest error "
        f"is in block {largest[0] + 1} of {error.shape[0]} from above, {largest[1] + 1} of {error.shape[1]} from left."
    )
    loss = f", loss {digits(record.get('loss'), precision=3)}" if number(record.get("loss")) is not None else ""
    return Picture(svg=svg, label=label, caption=f"{name}, {shape}{loss}", narrow=True)


def _cells(value: object) -> Matrix | None:
    """Return a matrix of finite numbers of a record; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_CELLS:
        return None
    rows = [row for row in value if isinstance(row, list) and 0 < len(row) <= _MAX_CELLS]
    if len(rows) != len(value) or len({len(row) for row in rows}) != 1:
        return None
    found = np.stack([floats([drawable(cell) for cell in row]) for row in rows])
    return found if np.isfinite(found).any() else None
