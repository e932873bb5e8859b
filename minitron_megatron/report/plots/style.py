"""Style of the plots: one look, a colour-blind-safe palette, and figures that are written atomically."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ... import numbers
from ...files import whole_file, write_json
from .charts import CHARTS, charts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ALARM",
    "COLOURS",
    "GREY",
    "PALE",
    "count_axis",
    "heat_map",
    "layer_bar",
    "layer_colours",
    "legend_outside",
    "log_axis",
    "new_figure",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, in the order of use."""
Colour = str | tuple[float, float, float, float]
"""Name of a colour, or its red, green, blue and opacity."""
GREY = "#8A8A8A"
PALE = "#C9CDD2"
ALARM = "#C0392B"

_STYLE: dict[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "figure.dpi": 144,
    "savefig.dpi": 144,
}


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of the given size in inches; write it to `path` as PNG if the block succeeds.

    Beside it, under the same name with `CHARTS`, stand the `charts_of` the figure, if any. matplotlib's global settings
    do not change.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        layout.execute(figure)
        figure.set_layout_engine("none")  # else matplotlib draws the figure once more, only to lay it out
        with whole_file(path) as partial:
            figure.savefig(partial, format="png")
        path.with_suffix(CHARTS).unlink(missing_ok=True)  # of an earlier figure
        if charts := charts_of(figure):
            write_json(path.with_suffix(CHARTS), charts)


def count_axis(axes: Axes, name: str, *, side: Literal["x", "y"] = "x") -> None:
    """Label an axis of counts; ticks are whole numbers, written as `250 k`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_label_text(name)
    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: numbers.tick(value, max(axis.get_view_interval()))))


def log_axis(axes: Axes, values: Sequence[float], write: Callable[[float], str]) -> None:
    """Give the y axis a log scale for `values` above 0; its ticks are powers of ten, and their 2- and 5-fold where the
    values span little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if max(values) > 300 * min(values) else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def legend_outside(axes: Axes, *, reverse: bool = False) -> None:
    """Put the legend, if anything has a label, to the right of the data. reverse: name what was drawn last first."""
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0.0, reverse=reverse)


def layer_colours(layers: Sequence[int | None]) -> dict[int | None, Colour]:
    """Return one colour per layer, from dark (first) to light (last); a single layer gets the first of `COLOURS`."""
    from matplotlib import colormaps

    if len(layers) == 1:
        return {layers[0]: COLOURS[0]}
    return {layer: colormaps["viridis"](0.9 * place / (len(layers) - 1)) for place, layer in enumerate(layers)}


def layer_bar(axes: Axes, layers: Sequence[int | None]) -> None:
    """Draw the legend of `layer_colours` as a colour bar, for many layers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(list(layer_colours(layers).values()))
    shades = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), colours)
    bar = axes.figure.colorbar(shades, ax=axes, pad=0.02)
    bar.ax.set_title("layer", loc="center", fontsize=9, fontweight="normal", pad=6)
    step = max(1, len(layers) // 8)
    bar.set_ticks(list(range(0, len(layers), step)), labels=[str(layer) for layer in layers[::step]])
    bar.outline.set_visible(False)


def heat_map(
    axes: Axes,
    strong: Sequence[Sequence[float]],
    faint: Sequence[Sequence[float]],
    *,
    extent: tuple[float, float, float, float],
) -> None:
    """Draw values from 0 to 1 on a log colour scale down to 0.001: `strong` in colour, `faint` in grey.

    Both are matrices of the same size; where one has a value the other is NaN.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    shares = [share for row in (*strong, *faint) for share in row if not math.isnan(share)]
    least = min(max(min(shares), 1e-3), 0.5)
    greys = ListedColormap(colormaps["gray"]([0.72 + 0.25 * place / 255 for place in range(256)]))
    for matrix, colours in ((faint, greys), (strong, colormaps["viridis"])):
        image = axes.imshow(
            [[max(share, least) for share in row] for row in matrix],
            norm=LogNorm(least, 1.0),
            cmap=colours,
            aspect="auto",
            interpolation="nearest",
            extent=extent,
        )
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_ticks([least, *(tick for tick in (1, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001) if tick > 1.25 * least)])
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{float(f'{100 * share:.2g}'):g} %")
    bar.minorticks_off()
    bar.outline.set_visible(False)
