"""An analysis as one HTML page that opens from disk, offline (`analysis.html` in the frame of `replay.page`).

The pictures are those of `traces.charts`; each has its sentence and a link to its table as CSV, which the page itself
holds, packed: a browser that can unpack gives the CSV, another the `.csv.gz`. Text from outside (names) is escaped.
What the trace has no data for is named below them.
"""

from __future__ import annotations

import base64
import gzip
import io
from typing import Any, Final

import polars as pl
from rich.console import Console

from replay.page import fill
from traces.analysis import Analysis
from traces.analysis_report import render
from traces.charts import Chart, charts
from traces.summary import shown_number, shown_percent, shown_stamp

TEXT_WIDTH: Final = 150


def page(analysis: Analysis) -> bytes:
    """The page, UTF-8."""
    shown = Console(file=io.StringIO(), width=TEXT_WIDTH, highlight=False, no_color=True)
    render(analysis, shown)
    assert isinstance(shown.file, io.StringIO)
    arrivals, total = analysis.arrivals[0].arrivals, analysis.failures.total
    drawn = charts(analysis)
    facts = [
        ("requests", shown_number(arrivals.requests)),
        ("from", shown_stamp(arrivals.first_s)),
        ("to", shown_stamp(arrivals.last_s)),
        ("requests/s", shown_number(arrivals.rate_rps)),
        ("conversations", shown_number(analysis.conversations.sessions)),
        ("failed", shown_percent(total.rate)),
    ]
    return fill(
        "analysis.html",
        [picture(chart) for chart in drawn if not chart.is_empty],
        {},
        empty=[chart.title for chart in drawn if chart.is_empty],
        facts=facts,
        warnings=analysis.warnings,
        zone=analysis.options.zone,
        text="\n".join(line.rstrip() for line in shown.file.getvalue().splitlines()),
    )


def picture(chart: Chart) -> dict[str, Any]:
    """A chart that is not empty, as a figure of the frame."""
    csv = gzip.compress(chart.table.write_csv().encode(), mtime=0)
    return {
        "title": chart.title, "note": chart.note, "x": chart.x_label, "y": chart.y_label, "x_log": chart.x_log,
        "y_log": chart.y_log, "empty": "", "name": f"{chart.name}.csv.gz",
        "csv": f"data:application/gzip;base64,{base64.b64encode(csv).decode()}",
        "traces": _traces(chart), "is_free": chart.mark == "heat" or chart.is_time,
        "x_text": chart.mark in ("bar", "heat") and not chart.is_time, "y_text": chart.mark == "heat",
    }  # fmt: skip


def _traces(chart: Chart) -> list[dict[str, Any]]:
    table = chart.table
    if chart.mark == "heat":
        return [_heat(chart)]
    if chart.mark == "box":
        return [
            {
                "type": "box", "name": "hours", "x": table["hour"].to_list(), "q1": _short(table["p25"]),
                "median": _short(table["p50"]), "q3": _short(table["p75"]), "lowerfence": _short(table["p5"]),
                "upperfence": _short(table["p95"]), "mean": _short(table["mean"]),
            }
        ]  # fmt: skip
    names = [None] if chart.by is None else table[chart.by].unique(maintain_order=True).to_list()
    traces: list[dict[str, Any]] = []
    for name in names:
        rows = table if chart.by is None else table.filter(pl.col(chart.by) == name)
        x, y = _short(rows[chart.x]), _short(rows[chart.y])
        trace: dict[str, Any] = {"name": name or chart.y, "x": x, "y": y}
        if chart.mark == "bar":
            trace["type"] = "bar"
            if chart.is_time:
                trace |= {"type": "scatter", "mode": "markers"}
        else:
            trace |= {
                "type": "scatter",
                "mode": "lines" if rows.height > 60 or chart.mark == "step" else "lines+markers",
            }
            trace["connectgaps"] = False
            if chart.mark == "step":
                trace["line"] = {"shape": "hv"}
        if chart.band is not None and (chart.mark == "bar" or rows.height <= 60):
            trace["error_y"] = _errors(rows, chart)
        traces.append(trace)
        if chart.band is not None and chart.mark == "line" and rows.height > 60:
            low, high = (_short(rows[end]) for end in chart.band)
            band = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
            traces.append({**band, "name": chart.band[0], "x": x, "y": low})
            traces.append(
                {**band, "name": "band", "x": x, "y": high, "fill": "tonexty", "fillcolor": "rgba(120,140,170,.3)"}
            )
    return traces


def _errors(rows: pl.DataFrame, chart: Chart) -> dict[str, Any]:
    assert chart.band is not None
    low, high = chart.band
    return {
        "type": "data", "symmetric": False, "thickness": 1,
        "array": _short(rows[high] - rows[chart.y]), "arrayminus": _short(rows[chart.y] - rows[low]),
    }  # fmt: skip


def _heat(chart: Chart) -> dict[str, Any]:
    assert chart.value is not None
    columns = chart.table[chart.x].unique(maintain_order=True).to_list()
    rows = chart.table[chart.y].unique(maintain_order=True).to_list()
    values = iter(chart.table[chart.value].to_list())  # row by row, as the table stands
    z = [[next(values) for _ in columns] for _ in rows]
    return {"type": "heatmap", "x": columns, "y": rows, "z": z, "colorscale": "Viridis", "name": chart.value}


def _short(values: pl.Series) -> list[Any]:
    """Numbers to five digits, which is more than a picture shows; the CSV has all."""
    if values.dtype.is_float():
        return [None if value is None else float(f"{value:.5g}") for value in values]
    return values.to_list()
