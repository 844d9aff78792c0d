"""The charts of an analysis as pictures for papers, by matplotlib (the extra `figures`): PNG or SVG, a file a chart.

A picture is made from the same table as the page's figure and its CSV (`traces.charts`), so all three hold the same
numbers. It is 84 mm wide, a column of a paper, on white; text in an SVG stays text. Names come from clients: matplotlib
would read `$` as mathematics, so it is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import polars as pl

from traces.charts import Chart

FORMATS: Final = ("png", "svg")
DPI: Final = 300
WIDTH_INCHES: Final = 84 / 25.4
HEIGHT_INCHES: Final = 60 / 25.4
COLOURS: Final = ("#1f6fc4", "#b8690b", "#17713a", "#b3261e", "#6a4c93", "#5b6570")
"""The page's."""
MOST_NAMED: Final = 6
"""Ticks with names on an axis, at most."""
STYLE: Final[dict[str, Any]] = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#d8dde3",
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 2.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "burstgate",
    "axes.unicode_minus": False,
}


class FiguresMissing(ValueError):
    """matplotlib is not installed."""


def check_available() -> None:
    """Raises FiguresMissing, whose message says what to install."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        raise FiguresMissing("figures need matplotlib, which is not installed: pip install 'burstgate[figures]'") from None


def drawn(charts: Iterable[Chart]) -> Iterator[Chart]:
    """Those that have something to draw."""
    return (chart for chart in charts if not chart.is_empty)


def draw(chart: Chart, stream: BinaryIO, form: str) -> None:
    """One picture of a chart that is not empty. form: of FORMATS. The same chart gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps every figure, and asks for a screen.
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _MARKS[chart.mark](axes, chart)
        if chart.mark == "heat":
            axes.grid(visible=False)
        axes.set_xlabel(_plain(chart.x_label))
        axes.set_ylabel(_plain(chart.y_label))
        if chart.x_log and chart.mark != "heat":
            axes.set_xscale("log")
        if chart.y_log:
            axes.set_yscale("log")
        elif chart.mark != "heat" and not chart.is_time:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        figure.savefig(stream, format=form, metadata={"Date": None} if form == "svg" else {"Software": "burstgate"})


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _series(chart: Chart) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """Name, colour and rows of each series."""
    names = [None] if chart.by is None else chart.table[chart.by].unique(maintain_order=True).to_list()
    for place, name in enumerate(names):
        rows = chart.table if name is None else chart.table.filter(pl.col(chart.by or "") == name)
        yield _plain(str(name or "")), COLOURS[place % len(COLOURS)], rows


def _values(rows: pl.DataFrame, chart: Chart, column: str) -> Any:
    if chart.is_time and column == chart.x:
        return np.array(rows[column].str.replace(" ", "T").to_list(), dtype="datetime64[s]")
    values = rows[column]
    return values.to_list() if values.dtype == pl.String else values.cast(pl.Float64).fill_null(np.nan).to_numpy()


def _line(axes: Any, chart: Chart) -> None:
    count = 0
    for name, colour, rows in _series(chart):
        x, y = (_values(rows, chart, column) for column in (chart.x, chart.y))
        marker = "o" if rows.height <= 60 and chart.mark == "line" else ""
        axes.plot(x, y, color=colour, label=name, marker=marker, drawstyle="steps-post" if chart.mark == "step" else None)
        if chart.band is not None:
            low, high = (_values(rows, chart, end) for end in chart.band)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        count += 1
    if chart.is_time:
        _dated(axes)
    if count > 1:
        axes.legend(loc="best")


def _dated(axes: Any) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=MOST_NAMED)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _bar(axes: Any, chart: Chart) -> None:
    for _, colour, rows in _series(chart):
        x, y = (_values(rows, chart, column) for column in (chart.x, chart.y))
        if chart.is_time:
            axes.plot(x, y, ".", color=colour)
            _dated(axes)
            continue
        names = [_plain(_cut(str(each))) for each in x]
        places = np.arange(len(names))
        if sum(map(len, names)) > 60:  # side by side they would run into each other
            errors = _errors(rows, chart, y)
            axes.barh(places, y, xerr=errors, color=colour, height=0.7, error_kw={"linewidth": 0.6})
            axes.set_yticks(places, names)
            axes.invert_yaxis()
            chart_x, chart_y = chart.y_label, chart.x_label
            axes.set_xlabel(_plain(chart_x))
            axes.set_ylabel(_plain(chart_y))
        else:
            axes.bar(places, y, yerr=_errors(rows, chart, y), color=colour, width=0.7, error_kw={"linewidth": 0.6})
            axes.set_xticks(places, names)
