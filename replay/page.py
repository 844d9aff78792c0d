"""A run as one HTML page that opens from disk, offline: the verdict first, then the figures, then the run over time.

The page (`page.html` in `frame.html`, which a sweep's page has too) holds plotly.js from its wheel, the figures as JSON
and nothing that is fetched; a Content-Security-Policy says so to the browser. Text from outside (names, errors) is
escaped, by Jinja in the page and as `\\u003c` in the JSON. Every figure is drawn from the summary alone, so the page is
the summary's JSON for the eyes. What has no data says so in words. Without JavaScript verdict and tables remain.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import msgspec

from replay.metrics import Cdf, Distribution, Summary
from replay.report import figures_ms, overview_lines, verdict_lines, warnings

_NO_DATA = "No data: "


def page(summary: Summary) -> bytes:
    """The page, UTF-8."""
    started = summary.started_at
    return fill(
        "page.html",
        figures_of(summary),
        {"summary": summary},
        summary=summary,
        verdict=verdict_lines(summary)[0].removeprefix("verdict").strip(),
        overview=overview_lines(summary),
        warnings=warnings(summary),
        started=None
        if started is None
        else datetime.datetime.fromtimestamp(started, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        distributions=[(name, figures_ms(value)) for name, value in distributions_of(summary)],
        failures=list(summary.errors.items()),
        fidelity=[("prompts", summary.prompts), ("answers", summary.outputs)],
    )


def fill(template: str, figures: list[dict[str, Any]], data: dict[str, object], **values: object) -> bytes:
    """A page of the frame, UTF-8.

    figures: as those of `figures_of`; `x_log` and `y_log` where an axis is logarithmic, `x_text` and `y_text` where it
    is of names, `is_free` where y need not begin at 0, `note` with a sentence, `csv` with its table's address and
    `name` its file's. data: what the page holds as JSON, by the id of its
    element. values: the template's own; text in them is escaped.
    """
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    shown = [{"id": f"f{number}", **each} for number, each in enumerate(figures)]
    # The page's own element has the CSV.
    drawn = [{key: value for key, value in each.items() if key != "csv"} for each in shown if each["traces"]]
    data = {**data, "figures": drawn}
    text = environment.get_template(template).render(
        figures=shown,
        data=[(name, _json(value)) for name, value in data.items()],
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        **values,
    )
    return text.encode()


def distributions_of(summary: Summary) -> list[tuple[str, Distribution | None]]:
    """The table of figures: name and distribution in seconds."""
    waits = [
        ("Held back by the limit in flight", summary.held_back_s),
        ("Waiting for the turn before", summary.session_wait_s),
    ]
    return [
        ("Time to first token", summary.ttft_s),
        ("Time to first token, from the planned send", summary.ttft_from_due_s),
        ("Time per output token", summary.tpot_s),
        ("Gap between chunks", summary.itl_s),
        ("End to end", summary.e2e_s),
        ("End to end, from the planned send", summary.e2e_from_due_s),
        ("Dispatch lag", summary.dispatch_lag_s),
        ("Dispatch lag, the replay's own part", summary.wake_lag_s),
        *((name, value) for name, value in waits if value is not None),
    ]


def figures_of(summary: Summary) -> list[dict[str, Any]]:
    """The figures, each with `title`, `y` (its axis), `x`, `traces` (plotly's) and `empty`, what to say without any."""
    time, server = summary.over_time, None if summary.server is None else summary.server.over_time
    at_s = [round(n * time.bin_s, 3) for n in range(len(time.offered))]

    def rates(counts: list[int]) -> list[float]:
        return [n / time.bin_s for n in counts]

    def over_time(title: str, y: str, empty: str, **lines: list[Any]) -> dict[str, Any]:
        return _figure(title, y, "seconds since the start", empty, at_s, lines)

    def of_server(title: str, y: str, **lines: list[Any]) -> dict[str, Any]:
        said = None if summary.server is None else summary.server.error
        empty = f"the target's own metrics were not scraped{'' if said is None else f' ({said})'}."
        return _figure(title, y, "seconds since the start", empty, [] if server is None else server.at_s, lines)

    nothing_sent = "no request was sent."
    no_answer = "no request ended well."
    figures = [
        over_time("Requests", "requests/s", nothing_sent, offered=rates(time.offered), sent=rates(time.sent),
                  ok=rates(time.ok), failed=rates(time.failed)),
        over_time("In flight", "requests", nothing_sent, **{"in flight, mean": time.in_flight}),
        over_time("Time to first token", "ms", f"{no_answer[:-1]} with a first token seen.",
                  p50=_ms(time.ttft_p50_s), p99=_ms(time.ttft_p99_s)),
        over_time("End to end", "ms", no_answer, p50=_ms(time.e2e_p50_s), p99=_ms(time.e2e_p99_s)),
        over_time("Dispatch lag", "ms", nothing_sent, largest=_ms(time.dispatch_lag_max_s)),
        over_time("Response tokens", "tokens/s", no_answer, **{"tokens/s": time.response_tokens_per_s}),
        of_server("KV-cache use, by the server", "%",
                  used=[] if server is None else [None if kv is None else kv * 100 for kv in server.kv_share]),
        of_server("Requests in the server", "requests", running=[] if server is None else server.running,
                  waiting=[] if server is None else server.waiting),
        of_server("Preemptions, since the start", "preemptions",
                  preempted=[] if server is None else server.preemptions),
    ]  # fmt: skip
    names = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "end to end"}
    for key, name in names.items():
        figures.append(_cdf(f"How many within: {name}", summary.cdfs.get(key), no_answer))
    classes = summary.failure_classes
    bars = [{"type": "bar", "orientation": "h", "x": list(classes.values()), "y": list(classes), "name": "failed"}]
    figures.append(
        {
            "title": "Failures by class",
            "x": "requests",
            "y": "",
            "traces": bars if classes else [],
            "empty": "No request failed." if summary.sent else _NO_DATA + nothing_sent,
        }
    )
    return figures


def _figure(title: str, y: str, x: str, empty: str, at: list[float], lines: dict[str, list[Any]]) -> dict[str, Any]:
    has_data = any(value is not None for values in lines.values() for value in values)
    # A lone point has no line to draw.
    mode = "lines" if len(at) > 1 else "markers"
    traces = [
        {"type": "scatter", "mode": mode, "name": name, "x": at, "y": values, "connectgaps": False}
        for name, values in lines.items()
    ]
    return {"title": title, "x": x, "y": y, "traces": traces if has_data else [], "empty": _NO_DATA + empty}


def _cdf(title: str, cdf: Cdf | None, empty: str) -> dict[str, Any]:
    shares, values = ([], []) if cdf is None else ([share * 100 for share in cdf.shares], _ms(list(cdf.values_s)))
    found = _figure(title, "% of requests", "ms", empty, values, {"requests": shares})
    for trace in found["traces"]:
        trace["line"] = {"shape": "hv"}
    return found


def _ms(values_s: list[Any]) -> list[Any]:
    return [None if value_s is None else float(f"{value_s * 1e3:.5g}") for value_s in values_s]


def _json(value: object) -> Any:
    """As JSON that can stand in a script element: no `<` begins an end tag or a comment."""
    from markupsafe import Markup

    text = msgspec.json.encode(value).decode()
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
