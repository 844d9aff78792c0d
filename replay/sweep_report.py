"""A sweep for the eyes: a table for a console, and one HTML page that needs nothing from any network.

The page (`sweep.html` in the frame of `replay.page`) holds the sweep as JSON; its charts are latency, failures and KV
use against the rate, one line an arrival process: medians over the seeds, with their range. A rate with invalid cells
is marked *; where there is no other, with an open cross in the charts.
"""

from __future__ import annotations

from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from replay.page import fill
from replay.sweep import Capacity, Cell, Rung, Spread, Sweep

CHARTS: Final = (
    ("ttft_p99_s", "Time to first token, p99", "s", True),
    ("e2e_p99_s", "End to end, p99", "s", True),
    ("tpot_p99_s", "Time per output token, p99", "s", True),
    ("failure_share", "Failures", "share of requests", False),
    ("preemptions", "Preemptions", "a cell", False),
    ("kv_usage_mean", "KV cache in use, mean", "share", False),
    ("achieved_rps", "Achieved rate", "ok requests/s", False),
    ("goodput_share", "Goodput", "share of requests", False),
)
"""Figure, title, unit, and whether its axis is logarithmic."""


def render(sweep: Sweep) -> RenderableType:
    """The table and what to know of it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "arrivals" else "right", no_wrap=True)
    for rung in sweep.rungs:
        table.add_row(*map(escape, _row(rung)))
    lines = [Text(line) for line in _words(sweep)]
    notes = [Text.from_markup(f"[yellow]warning:[/] {escape(text)}") for text in _warnings(sweep)]
    return Group(Text(f"{sweep.target}; {sweep.lengths}"), table, *lines, *notes)


def page(sweep: Sweep) -> bytes:
    """The page, UTF-8. Text from outside is escaped."""
    return fill(
        "sweep.html",
        [_figure(sweep, *chart) for chart in CHARTS],
        {"sweep": sweep},
        sweep=sweep,
        words=_words(sweep),
        warnings=_warnings(sweep),
        columns=_COLUMNS,
        rows=[_row(rung) for rung in sweep.rungs],
    )


def _figure(sweep: Sweep, figure: str, title: str, unit: str, is_log: bool) -> dict[str, Any]:
    traces = []
    for name in dict.fromkeys(rung.arrivals for rung in sweep.rungs):
        own = [rung for rung in sweep.rungs if rung.arrivals == name]
        points = [(rung, spread) for rung in own if (spread := rung.figures[figure]) is not None]
        if points:
            traces.append(
                {
                    "name": name,
                    "x": [rung.rate_rps for rung, _ in points],
                    "y": [spread.median for _, spread in points],
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [spread.high - spread.median for _, spread in points],
                        "arrayminus": [spread.median - spread.low for _, spread in points],
                        "thickness": 1,
                    },
                    "mode": "lines+markers",
                    "marker": {"symbol": ["circle" if rung.is_valid else "x-open" for rung, _ in points]},
                }
            )
    return {"title": title, "x": "requests/s", "y": unit, "x_log": True, "y_log": is_log, "traces": traces,
            "empty": "No data: no cell has it."}  # fmt: skip


def _words(sweep: Sweep) -> list[str]:
    seeds = ", ".join(map(str, sweep.seeds))
    lines = [_capacity(capacity, sweep) for capacity in sweep.capacities]
    lines.append(f"Capacity is {sweep.knee}. Medians over the seeds {seeds}; latencies in ms, [lowest highest].")
    if sweep.is_interrupted:
        lines.append("Interrupted: what had not been measured by then is missing.")
    return lines


def _warnings(sweep: Sweep) -> list[str]:
    found = list(sweep.warnings)
    for rung in sweep.rungs:
        if rung.invalid_cells:
            why = next(cell.invalid for cell in sweep.cells if cell.invalid is not None and _is_of(cell, rung))
            use = "left out" if rung.is_valid else "figures of the replay and not of the target"
            found.append(
                f"* {rung.arrivals} at {rung.rate_rps:g} requests/s: {rung.invalid_cells} of {rung.cells} cells are"
                f" invalid, {use}: {why}"
            )
    if sweep.stopped_by is not None:
        found.append(f"ended early: {sweep.stopped_by}")
    return found


def _is_of(cell: Cell, rung: Rung) -> bool:
    return (cell.arrivals, cell.rate_rps) == (rung.arrivals, rung.rate_rps)


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
        rung.arrivals + ("*" if rung.invalid_cells else ""),
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
