"""Pictures of what a job took: seconds and memory along the decoder layers, seconds by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optgptq.reports.blocks import Picture
from optgptq.reports.figures import INK, SERIES, axis_label, drawing, floats, new_figure, svg_of, whole_ticks
from optgptq.reports.wording import clean, drawable, duration, num_bytes

_GIB = float(2**30)
_MAX_PHASES = 20


def layer_costs(costs: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> Picture | None:
    """Return seconds, and memory where it is told, of each decoder layer; None where nothing is told.

    Args:
        costs: `index`, `seconds`, `resident_bytes`, `peak_bytes`.
        starts: first decoder layer of each session but the first.
    """
    told = [
        cost for cost in costs if drawable(cost.get("index")) is not None and drawable(cost.get("seconds")) is not None
    ]
    if not told:
        return None
    indices = floats([drawable(cost.get("index")) for cost in told])
    memory = {
        "in use after the layer": floats([drawable(cost.get("resident_bytes")) for cost in told]) / _GIB,
        "highest so far": floats([drawable(cost.get("peak_bytes")) for cost in told]) / _GIB,
    }
    memory = {name: values for name, values in memory.items() if (values > 0).any()}
    with drawing("costs"):
        figure = new_figure(height=3.6 if memory else 2.1)
        rows = figure.subplots(2 if memory else 1, 1, sharex=True, squeeze=False)[:, 0]
        rows[0].bar(indices, floats([drawable(cost.get("seconds")) for cost in told]), color=SERIES[0], width=0.8)
        rows[0].set_ylabel("seconds")
        for (name, values), color in zip(memory.items(), SERIES[1:], strict=False):
            rows[1].plot(indices, values, color=color, marker="o", markersize=2.5, label=name)
        if memory:
            rows[1].set_ylim(bottom=0)
            rows[1].set_ylabel("GiB")
            rows[1].legend()
        for axes in rows:
            for start in starts:
                axes.axvline(start - 0.5, color=INK, linestyle=":", linewidth=1)
        rows[-1].set_xlabel("decoder layer")
        whole_ticks(rows[-1])
        svg = svg_of(figure)
    return Picture(svg=svg, label=_label(told, starts), caption=_caption(starts, has_memory=bool(memory)))


def _label(costs: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> str:
    seconds = [drawable(cost.get("seconds")) or 0.0 for cost in costs]
    peaks = [found for cost in costs if (found := drawable(cost.get("peak_bytes"))) is not None]
    words = f"Bars of the seconds of {len(costs)} decoder layers, {duration(min(seconds))} to {duration(max(seconds))}"
    words += f"; lines of memory, at most {num_bytes(max(peaks))}" if peaks else ""
    return words + (f"; the job went on after an interruption at {_joined(starts)}." if starts else ".")


def _caption(starts: Sequence[int], *, has_memory: bool) -> str:
    words = "Time of each decoder layer" + (", and memory of the process." if has_memory else ".")
    return words + (f" Dotted: a new session, at {_joined(starts)}." if starts else "")


def _joined(starts: Sequence[int]) -> str:
    return f"decoder layer{'s' if len(starts) > 1 else ''} {', '.join(map(str, starts))}"


def phase_bars(seconds_by_phase: Sequence[tuple[str, float]]) -> Picture | None:
    """Return a bar for each phase, longest first; None where there are fewer than two."""
    drawn = [(name, seconds) for name, seconds in seconds_by_phase if drawable(seconds) is not None]
    if len(drawn) < 2:
        return None
    shown = sorted(drawn, key=lambda phase: -phase[1])[:_MAX_PHASES]
    with drawing("phases"):
        figure = new_figure(height=0.7 + 0.24 * len(shown))
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(places, [seconds for _, seconds in shown], color=SERIES[0], height=0.65)
        for place, (_, seconds) in zip(places, shown, strict=True):
            end = (seconds, place)
            axes.annotate(duration(seconds), end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(places, [axis_label(name) for name, _ in shown])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.margins(x=0.12)
        axes.set_xlabel("seconds")
        svg = svg_of(figure)
    words = "; ".join(f"{clean(name, limit=60)} {duration(seconds)}" for name, seconds in shown)
    return Picture(svg=svg, label=f"Bars of the time of each phase: {words}.", caption="Time by phase of the job.")
