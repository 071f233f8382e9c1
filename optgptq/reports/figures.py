"""Pictures as SVG that lives inside a page: its colours follow the page's, light or dark, and it loads nothing.

matplotlib draws with colours that stand for variables of the page; they are replaced in what it writes. Text stays text
in the page's own font. No name from outside is read as mathematics.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from optgptq.reports.wording import clean

INK = "#0a0b0c"
FAINT = "#0a0b0d"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_VARIABLES = {
    INK: "currentColor",
    FAINT: "var(--line)",
    **{color: f"var(--series-{place})" for place, color in enumerate(SERIES, start=1)},
}
WIDE_INCHES = 5.2
NARROW_INCHES = 3.4
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "image.interpolation": "none",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
_DROPPED = (
    (re.compile(r"^.*?(?=<svg)", re.DOTALL), ""),
    (re.compile(r"<metadata>.*?</metadata>", re.DOTALL), ""),
    (re.compile(r"<style.*?</style>", re.DOTALL), ""),
    (re.compile(r"<defs>\s*</defs>"), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r' xmlns(:xlink)?="[^"]*"'), ""),
    # Identifiers of groups are the same in each picture, and nothing refers to them.
    (re.compile(r'<g id="[^"]*"'), "<g"),
    (re.compile(r"xlink:href="), "href="),
    (re.compile(r'(<svg[^>]*?) width="[^"]*"'), r"\1"),
    (re.compile(r'(<svg[^>]*?) height="[^"]*"'), r"\1"),
    (re.compile(r"font: ([\d.]+)px [^;\"]*"), r"font-size: \1px"),
    (re.compile(r"\s*\n\s*"), "\n"),
)


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw in the page's style, whatever the user's own settings are; `name` keeps identifiers of pictures apart."""
    with matplotlib.rc_context():
        matplotlib.style.use("default")
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        yield


def new_figure(*, height: float, width: float = WIDE_INCHES, arranged: bool = True) -> Figure:
    """Return an empty figure of a size in inches; `arranged` makes room for the words around its axes."""
    return Figure(figsize=(width, height), layout="constrained" if arranged else None)


def svg_of(figure: Figure) -> str:
    """Return the figure as an element `<svg>` for a page; the same figure gives the same text."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    for pattern, replacement in _DROPPED:
        text = pattern.sub(replacement, text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def axis_label(name: object, *, limit: int = 28) -> str:
    """Return a name that every font has: ASCII, not too long."""
    plain = clean(name, limit=400).encode("ascii", errors="replace").decode()
    return plain if len(plain) <= limit else f"...{plain[3 - limit :]}"


def logarithmic(values: np.ndarray[Any, Any]) -> LogNorm:
    """Return the scale of colours for positive values; one that works where all are equal or none is positive."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return LogNorm(0.1, 1)
    low, high = float(positive.min()), float(positive.max())
    return LogNorm(low, high) if high > low * 1.001 else LogNorm(low / 1.5, low * 1.5)


def draw_map(axes: Axes, values: np.ndarray[Any, Any], scale: LogNorm, *, color_map: str = "viridis") -> Any:
    """Draw a matrix as cells; what is zero or no number stays empty."""
    shown = np.ma.masked_where(~np.isfinite(values) | (values <= 0), values)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes.imshow(shown, norm=scale, cmap=color_map, aspect="auto", interpolation="none")


def logarithmic_ticks(axis: Axis, low: float, high: float) -> None:
    """Mark a logarithmic axis from `low` to `high` with plain numbers, more of them where the range is short."""
    decades = math.log10(high / low) if high > low > 0 else 0.0
    steps = range(1, 10) if decades < 0.7 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=tuple(map(float, steps))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_ticks(axes: Axes) -> None:
    """Put the marks of the x axis on whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def floats(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    """Return numbers as an array, NaN for None."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
