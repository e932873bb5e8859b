"""A figure of lines, markers and bars as charts for a browser: the same data, with values where the pointer is.

A chart is its title and what Plotly takes: `{"title": text, "data": [traces], "layout": {...}}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

__all__ = ["CHARTS", "Chart", "charts_of"]

CHARTS = ".charts.json"
"""Ending of the file of a figure's charts, beside its PNG."""
Chart = dict[str, object]
DASHES = {"-": "solid", "--": "dash", ":": "dot", "None": "solid"}
MARKERS = {
    "o": "circle",
    ".": "circle",
    "s": "square",
    "*": "star",
    "^": "triangle-up",
    "D": "diamond",
    "|": "line-ns-open",
}


def charts_of(figure: Figure) -> list[Chart]:
    """Return a chart for each panel of a figure; none where a panel has an image, such as a map of colours."""
    if any(axes.images or axes.collections for axes in figure.axes):
        return []
    return [_chart(axes) for axes in figure.axes if axes.lines or axes.containers]


def _chart(axes: Axes) -> Chart:
    from matplotlib.container import BarContainer

    legend = axes.get_legend()
    named = {} if legend is None else {text.get_text() for text in legend.get_texts()}
    shared = [other for other in axes.get_shared_x_axes().get_siblings(axes) if other.get_xlabel()]
    across = (shared or [axes])[-1]  # panels that share an axis have its label once
    return {
        "title": axes.get_title(loc="left") or axes.get_title(),
        "data": [
            *(
                _bars(bars, str(bars.get_label()) in named)
                for bars in axes.containers
                if isinstance(bars, BarContainer)
            ),
            *(_trace(axes, line, str(line.get_label()) in named) for line in axes.lines),
        ],
        "layout": {
            "xaxis": _axis(axes.xaxis, across.get_xlabel(), axes.get_xlim()),
            "yaxis": _axis(axes.yaxis, axes.get_ylabel(), axes.get_ylim()),
            "annotations": [_note(text) for text in axes.texts],
        },
    }


def _bars(bars: BarContainer, named: bool) -> Chart:
    from matplotlib.colors import to_hex

    boxes, lying = bars.patches, bars.orientation == "horizontal"
    lengths = [float(box.get_width() if lying else box.get_height()) for box in boxes]
    places = [float(box.get_center()[1 if lying else 0]) for box in boxes]
    return {
        "type": "bar",
        "orientation": "h" if lying else "v",
        "x": lengths if lying else places,
        "y": places if lying else lengths,
        "width": [float(box.get_height() if lying else box.get_width()) for box in boxes],
        "name": _plain(str(bars.get_label())) if named else "",
        "showlegend": named,
        "marker": {"color": to_hex(boxes[0].get_facecolor())} if boxes else {},
    }


def _note(text: Text) -> Chart:
    x, y = text.get_position()
    return {"x": float(x), "y": float(y), "text": _plain(text.get_text()), "showarrow": False, "xanchor": "left"}


def _trace(axes: Axes, line: Line2D, named: bool) -> Chart:
    from matplotlib.colors import to_hex

    x, y = (_finite(values) for values in (line.get_xdata(orig=False), line.get_ydata(orig=False)))
    if line.get_transform() == axes.get_yaxis_transform(which="grid"):  # axhline: across the whole panel
        x = _finite(axes.get_xlim())
    if line.get_transform() == axes.get_xaxis_transform(which="grid"):  # axvline
        y = _finite(axes.get_ylim())
    drawn, dots = line.get_linestyle() != "None", line.get_marker() not in ("None", None, "")
    return {
        "x": x,
        "y": y,
        "name": _plain(str(line.get_label())) if named else "",
        "showlegend": named,
        "mode": "+".join(["lines"] * drawn + ["markers"] * dots),
        "opacity": line.get_alpha() or 1,
        "line": {
            "color": to_hex(line.get_color()),
            "width": line.get_linewidth(),
            "dash": DASHES.get(str(line.get_linestyle()), "solid"),
        },
        "marker": {
            "size": 1.6 * line.get_markersize(),
            "symbol": MARKERS.get(str(line.get_marker()), "circle"),
            "color": to_hex(line.get_color()),
            "line": {"width": line.get_markeredgewidth() if line.get_marker() == "|" else 0},
        },
    }


def _axis(axis: Axis, label: str, limits: Sequence[float]) -> Chart:
    from matplotlib.category import StrCategoryLocator
    from matplotlib.ticker import FixedLocator, FuncFormatter

    log = axis.get_scale() == "log"
    found: Chart = {
        "title": {"text": _plain(label)},
        "type": "log" if log else "linear",
        "exponentformat": "power" if log else "SI",
        "range": [math.log10(limit) if log else float(limit) for limit in limits],
    }
    ticks = [float(tick) for tick in axis.get_majorticklocs() if min(limits) <= tick <= max(limits)]
    if isinstance(axis.get_major_locator(), FixedLocator | StrCategoryLocator):  # ticks with names, such as layers
        named = dict(zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False))
        found |= {"tickvals": ticks, "ticktext": [_plain(named[tick].get_text()) for tick in ticks]}
    elif len(ticks) > 1 and all(tick.is_integer() for tick in ticks) and ticks[1] - ticks[0] == 1:  # such as ranks
        found["dtick"] = 1
    elif isinstance(write := axis.get_major_formatter(), FuncFormatter):  # numbers as people read them
        texts = [_plain(text) for text in write.format_ticks(ticks)]
        found |= {"tickmode": "array", "tickvals": ticks, "ticktext": texts}
    return found


def _finite(values: Any) -> list[float | None]:
    """Return numbers for JSON; a gap where one is not finite."""
    return [float(value) if value is not None and math.isfinite(value) else None for value in values]


def _plain(text: str) -> str:
    """Return text in which Plotly sees no tags; its lines are broken where the text's are."""
    return escape(text, quote=False).replace("\n", "<br>")
