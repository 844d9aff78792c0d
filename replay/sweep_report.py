"""A sweep for the eyes: a table for a console, and one HTML page that needs nothing from any network.

The page embeds plotly's script from its wheel and the sweep as JSON; its charts are latency, failures and KV use
against the rate, one line an arrival process: medians over the seeds, with their range.
"""

from __future__ import annotations

import html
from typing import Any, Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from replay.sweep import Capacity, Rung, Spread, Sweep

CHARTS: Final = (
    ("ttft_p99_s", "Time to first token, p99", "s", True),
    ("e2e_p99_s", "End to end, p99", "s", True),
    ("tpot_p99_s", "Time per output token, p99", "s", True),
    ("failure_share", "Failures", "share of requests", False),
    ("preemptions", "Preemptions", "a cell", False),
    ("kv_usage_mean", "KV cache in use, mean", "share", False),
    ("achieved_rps", "Achieved rate", "ok requests/s", False),
    ("goodput_share", "Goodput", "share of requests within the SLO", False),
)
"""Figure, title, unit, and whether its axis is logarithmic."""
COLOURS: Final = ("#2a9d8f", "#e9a03b", "#d1495b", "#6a4c93", "#1d6fa5", "#8d99ae")

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>burstgate sweep</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --line: #444; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
  max-width: 70rem; padding: 0 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%%), 1fr)); gap: 1rem; }
.chart { height: 20rem; min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
</style></head><body>
<h1>burstgate sweep</h1>
%(words)s
<div class="charts" id="charts"></div>
<h2>Every rate</h2>
<div class="table">%(table)s</div>
<script>%(plotly)s</script>
<script type="application/json" id="sweep">%(data)s</script>
<script type="application/json" id="figures">%(figures)s</script>
<script>
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = figures.map(() => document.createElement("div"));
for (const chart of charts) { chart.className = "chart"; }
document.getElementById("charts").append(...charts);  // all of them first: a chart takes the size that it finds
figures.forEach((figure, at) => {
  const ink = dark ? "#ddd" : "#222", grid = dark ? "#333" : "#e4e4e4";
  const axis = { gridcolor: grid, zerolinecolor: grid };
  const layout = {
    title: { text: figure.title, font: { size: 15 } }, font: { color: ink }, margin: { t: 40, r: 10, b: 45, l: 60 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", legend: { orientation: "h", y: 1.1, yanchor: "top" },
    xaxis: { ...axis, title: { text: "requests/s" }, type: "log" },
    yaxis: { ...axis, title: { text: figure.unit }, type: figure.log ? "log" : "linear",
      rangemode: figure.log ? "normal" : "tozero" },
  };
  Plotly.newPlot(charts[at], figure.lines, layout, { responsive: true, displayModeBar: false });
});
</script>
</body></html>
"""


def render(sweep: Sweep) -> RenderableType:
    """The table and what to know of it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "arrivals" else "right", no_wrap=True)
    for rung in sweep.rungs:
        table.add_row(*map(escape, _row(rung)))
    lines = [Text(line) for line in _words(sweep)]
    notes = [Text.from_markup(f"[yellow]warning:[/] {escape(text)}") for text in sweep.warnings]
    return Group(Text(f"{sweep.target}; {sweep.lengths}"), table, *lines, *notes)


def page(sweep: Sweep) -> str:
    """The page. Text from outside is escaped."""
    from plotly.offline import get_plotlyjs

    words = [f"{sweep.target}; {sweep.lengths}", *_words(sweep), *(f"Warning: {text}" for text in sweep.warnings)]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in _COLUMNS)
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in _row(rung)) for rung in sweep.rungs]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return _PAGE % {
        "words": "".join(f"<p>{html.escape(text)}</p>" for text in words),
        "table": f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else "<p>No cell.</p>",
        "plotly": get_plotlyjs(),
        "data": _embedded(sweep),
        "figures": _embedded(_figures(sweep)),
    }


def _embedded(value: Any) -> str:
    """JSON that no text in it can end the script element of."""
    return msgspec.json.encode(value).decode().replace("<", "\\u003c")


def _figures(sweep: Sweep) -> list[dict[str, Any]]:
    """A chart for each figure that is known anywhere."""
    names = list(dict.fromkeys(rung.arrivals for rung in sweep.rungs))
    figures = []
    for figure, title, unit, is_log in CHARTS:
        lines = []
        for at, name in enumerate(names):
            known = [(rung.rate_rps, rung.figures[figure]) for rung in sweep.rungs if rung.arrivals == name]
            points = [(rate_rps, spread) for rate_rps, spread in known if spread is not None]
            if points:
                lines.append(
                    {
                        "name": name,
                        "x": [rate_rps for rate_rps, _ in points],
                        "y": [spread.median for _, spread in points],
                        "error_y": {
                            "type": "data",
                            "symmetric": False,
                            "array": [spread.high - spread.median for _, spread in points],
                            "arrayminus": [spread.median - spread.low for _, spread in points],
                            "thickness": 1,
                        },
                        "mode": "lines+markers",
                        "line": {"color": COLOURS[at % len(COLOURS)]},
                    }
                )
        if lines:
            figures.append({"title": title, "unit": unit, "log": is_log, "lines": lines})
    return figures


def _words(sweep: Sweep) -> list[str]:
    seeds = ", ".join(map(str, sweep.seeds))
    lines = [_capacity(capacity, sweep) for capacity in sweep.capacities]
    lines.append(f"Capacity is {sweep.knee}. Medians over the seeds {seeds}; latencies in ms, [lowest highest].")
    if sweep.is_interrupted:
        lines.append("Interrupted: what had not been measured by then is missing.")
    return lines


def _capacity(capacity: Capacity, sweep: Sweep) -> str:
    own = [rung for rung in sweep.rungs if rung.arrivals == capacity.arrivals]
    broken = next((f": at {rung.rate_rps:g} {rung.why_not}" for rung in own if not rung.holds), "")
    if capacity.capacity_rps is None:
        found = "below the lowest rate" if capacity.is_knee_found else "not measured"
    else:
        found = f"{capacity.capacity_rps:g} requests/s" + ("" if capacity.is_knee_found else " or more")
    return f"{capacity.arrivals}: capacity {found}{broken}"


_COLUMNS: Final = (
    "arrivals", "req/s", "ok/s", "TTFT p50", "TTFT p99", "TPOT p99", "E2E p99", "failed", "preempted", "KV mean", "max",
    "goodput",
)  # fmt: skip


def _row(rung: Rung) -> list[str]:
    f = rung.figures
    return [
        rung.arrivals,
        f"{rung.rate_rps:g}",
        _number(f["achieved_rps"]),
        _ms(f["ttft_p50_s"]),
        _ms(f["ttft_p99_s"], has_range=True),
        _ms(f["tpot_p99_s"]),
        _ms(f["e2e_p99_s"]),
        _percent(f["failure_share"], 1),
        _number(f["preemptions"]),
        _percent(f["kv_usage_mean"], 0),
        _percent(f["kv_usage_max"], 0),
        _percent(f["goodput_share"], 1),
    ]


def _ms(spread: Spread | None, *, has_range: bool = False) -> str:
    if spread is None:
        return "-"
    median, low, high = (f"{value * 1e3:.{0 if value >= 0.1 else 1}f}" for value in
                         (spread.median, spread.low, spread.high))  # fmt: skip
    return f"{median} [{low} {high}]" if has_range and spread.low < spread.high else median


def _number(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.4g}"


def _percent(spread: Spread | None, digits: int) -> str:
    return "-" if spread is None else f"{spread.median:.{digits}%}"
