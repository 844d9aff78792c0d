"""The charts of an analysis as pictures for papers, by matplotlib (the extra `figures`): PNG or SVG, a file a chart.

A picture is made from the same table as the page's figure and its CSV (`traces.charts`), so all three hold the same
numbers. It is 84 mm wide, a column of a paper, on white; text in an SVG stays text. Names come from clients: matplotlib
would read `$` as mathematics, so it is escaped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
"""Dates on an axis, at most."""
MOST_MARKED: Final = 60
"""Points of a line that are marked one by one."""
MOST_LETTERS: Final = 32
"""Of a name beside its bar."""
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
        raise FiguresMissing("needs matplotlib, which is not installed: pip install 'burstgate[figures]'") from None


def draw(chart: Chart, stream: BinaryIO, form: str) -> None:
    """One picture of a chart that is not empty. form: of FORMATS. The same chart gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps every figure, and asks for a screen.
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **STYLE}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(_plain(chart.x_label))
        axes.set_ylabel(_plain(chart.y_label))
        if chart.x_log:
            axes.set_xscale("log")
        if chart.y_log:
            axes.set_yscale("log")
        _MARKS[chart.mark](axes, chart)
        if chart.is_time:
            _dated(axes)
        elif not chart.y_log and chart.mark in ("line", "step", "box"):
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        with warnings.catch_warnings():
            # Of dates that lie too close for its taste, and of long names that leave a picture little room.
            warnings.simplefilter("ignore", UserWarning)
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
    for name, colour, rows in _series(chart):
        x, y = (_values(rows, chart, column) for column in (chart.x, chart.y))
        is_step = chart.mark == "step"
        marker = "o" if rows.height <= MOST_MARKED and not is_step else ""
        axes.plot(x, y, color=colour, label=name, marker=marker, drawstyle="steps-post" if is_step else "default")
        if chart.band is not None:
            low, high = (_values(rows, chart, end) for end in chart.band)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if len(axes.lines) > 1:
        axes.legend(loc="best")


def _dated(axes: Any) -> None:
    from matplotlib import dates

    kit: Any = dates  # it has no types
    locator = kit.AutoDateLocator(maxticks=MOST_NAMED)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(kit.ConciseDateFormatter(locator))


def _bar(axes: Any, chart: Chart) -> None:
    """Names from top to bottom, where they have room, hours from left to right; in time, dots."""
    x, y = (_values(chart.table, chart, column) for column in (chart.x, chart.y))
    if chart.is_time:
        axes.plot(x, y, ".", color=COLOURS[0])
        return
    errors = None
    if chart.band is not None:
        low, high = (_values(chart.table, chart, end) for end in chart.band)
        errors = np.maximum(np.stack((y - low, high - y)), 0)
    places, names, thin = np.arange(len(y)), [_plain(_cut(str(each))) for each in x], {"linewidth": 0.6}
    axes.set_axisbelow(True)
    if max(map(len, names)) <= 2:  # hours
        axes.bar(places, y, yerr=errors, color=COLOURS[0], width=0.7, error_kw=thin)
        axes.set_xticks(places[::3], names[::3])
        return
    axes.barh(places, y, xerr=errors, color=COLOURS[0], height=0.7, error_kw=thin)
    axes.set_ylim(max(len(y), 4) - 0.5, -0.5)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelsize=min(7, 100 / len(y)))
    axes.set_xlabel(_plain(chart.y_label))
    axes.set_ylabel(_plain(chart.x_label))


def _cut(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 3] + "..."


def _box(axes: Any, chart: Chart) -> None:
    names = {"p5": "whislo", "p25": "q1", "p50": "med", "p75": "q3", "p95": "whishi", "mean": "mean"}
    boxes = [{names[name]: row[name] for name in names} for row in chart.table.iter_rows(named=True)]
    axes.bxp(
        boxes,
        positions=chart.table[chart.x].to_list(),
        widths=0.6,
        showfliers=False,
        manage_ticks=False,
        boxprops={"linewidth": 0.6},
        whiskerprops={"linewidth": 0.6},
        capprops={"linewidth": 0.6},
        medianprops={"color": COLOURS[0], "linewidth": 1.0},
    )
    axes.set_xticks(range(0, 24, 3))


def _heat(axes: Any, chart: Chart) -> None:
    assert chart.value is not None
    columns = chart.table[chart.x].unique(maintain_order=True).to_list()
    rows = chart.table[chart.y].unique(maintain_order=True).to_list()
    values = _values(chart.table, chart, chart.value).reshape(len(rows), len(columns))  # row by row, as the table is
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns)
    shown = range(0, len(rows), -(-len(rows) // (2 * MOST_NAMED)))
    axes.set_yticks(shown, [rows[place] for place in shown])
    axes.figure.colorbar(image, ax=axes, label=chart.value)


_MARKS: Final = {"line": _line, "step": _line, "bar": _bar, "box": _box, "heat": _heat}
