"""The figures of an analysis, as data: each a table, what to draw of it, and one sentence that says what to see.

A page, a CSV and a picture of a figure are all made from its table, so they hold the same numbers. The BurstGPT
paper's figures come first. A chart's size does not grow with the trace: what is drawn over time has bins, whose width
the analysis chose. Stamps are epoch seconds, beside them the zone's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import polars as pl

from traces.analysis import Analysis
from traces.analysis_report import MEASURE_NAMES, group_name, part_name, service_name
from traces.failures import Group, LoadEffect, Rate, Span
from traces.latency import LatencyBin
from traces.load import Load
from traces.periodicity import Box, Periodicity
from traces.table import Service, clock_s

SHOWN_SERVICES: Final = 4
MOST_WEEKS: Final = 160
"""Of a heat map: three years."""
MIN_SHOWN: Final = 50
"""Requests under which a service has no figures of its own."""
WEEKDAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

Mark = Literal["line", "step", "bar", "box", "heat"]


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure. `table` has the columns x and y, with `by` a series for each of its values, and with `band` the low
    and high end of each y. A box has p5, p25, p50, p75, p95 and mean at each x; a heat map its colour in `value`."""

    name: str
    """Of its files; letters, digits and underscores."""
    title: str
    note: str
    x_label: str
    y_label: str
    table: pl.DataFrame
    x: str
    y: str
    by: str | None = None
    band: tuple[str, str] | None = None
    value: str | None = None
    mark: Mark = "line"
    x_log: bool = False
    y_log: bool = False
    is_time: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.table.height or not self.table[self.value or self.y].count()


def charts(analysis: Analysis) -> list[Chart]:
    """Every figure, the paper's first; those that the trace has no data for are there, empty."""
    zone = ZoneInfo(analysis.options.zone)
    return [
        *_work_day(analysis),
        *_periodicity(analysis),
        *_lengths(analysis),
        *_conversations(analysis),
        *_failures(analysis, zone),
        *_bursts(analysis, zone),
        *_load(analysis.load, zone),
        *_latency(analysis, zone),
    ]


def _table(rows: Iterable[Sequence[Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=schema, orient="row")


def _timed(table: pl.DataFrame, zone: ZoneInfo) -> pl.DataFrame:
    """With the column `clock`: what a clock in the zone shows at start_s."""
    local_s = clock_s(table["start_s"].to_numpy(), zone)
    text = np.datetime_as_string(np.floor(local_s).astype("datetime64[s]"))
    return table.with_columns(clock=pl.Series([str(each).replace("T", " ") for each in text], dtype=pl.String))


def _work_day(analysis: Analysis) -> Iterator[Chart]:
    rows = [
        (part_name(part), slot.start_s / 3600, slot.windows, slot.fitted, slot.rate_rps, slot.alpha, slot.beta)
        for part in analysis.arrivals
        for slot in part.work_day
    ]
    names = {"service": pl.String, "hour": pl.Float64, "windows": pl.Int64, "fitted": pl.Int64}
    table = _table(rows, {**names, "rate_rps": pl.Float64, "alpha": pl.Float64, "beta": pl.Float64})
    yield Chart(
        "work_day_alpha", "Burstiness over the work day: alpha(t)",
        "The Gamma shape of the gaps in 20-minute windows, averaged over work days: 1 is Poisson, the further below 1"
        " the burstier (CV = 1 / sqrt(alpha)).",
        "hour of day", "alpha", table, x="hour", y="alpha", by="service",
    )  # fmt: skip
    yield Chart(
        "work_day_beta", "Pace over the work day: beta(t)",
        "The Gamma rate of the same windows: with alpha it gives the pace, requests/s = beta / alpha.",
        "hour of day", "beta, 1/s", table, x="hour", y="beta", by="service",
    )  # fmt: skip


def _periodicity(analysis: Analysis) -> Iterator[Chart]:
    shown = [each for each in analysis.periodicity[: SHOWN_SERVICES + 1] if _is_shown(each.service)]
    for place, each in enumerate(shown):
        name = service_name(each.service)
        suffix = "" if place == 0 else f"_{place}"
        yield _weeks(each, name, suffix)
        for side, boxes in (
            ("requests", each.requests_by_hour),
            ("request tokens", each.request_tokens_by_hour),
            ("response tokens", each.response_tokens_by_hour),
        ):
            yield _boxes(boxes, side, name, suffix)
    whole = analysis.periodicity[:1]
    bound = next((each.autocorrelation_bound for each in whole), None)
    rows = [
        (service_name(each.service), float(lag), value)
        for each in shown
        for lag, value in enumerate(each.autocorrelation)
    ]
    yield Chart(
        "autocorrelation", "What repeats",
        "How alike the hourly counts are to those some hours before: a peak at 24 is a daily rhythm, at 168 a weekly"
        f" one{'' if bound is None else f'; within {bound:.2f} of 0 it is noise'}.",
        "hours apart", "autocorrelation",
        _table(rows, {"service": pl.String, "lag_hours": pl.Float64, "autocorrelation": pl.Float64}),
        x="lag_hours", y="autocorrelation", by="service",
    )  # fmt: skip


def _is_shown(service: Service | None) -> bool:
    return service is None or service.requests >= MIN_SHOWN


def _weeks(each: Periodicity, name: str, suffix: str) -> Chart:
    shown = each.weeks[-MOST_WEEKS:]
    cut = "" if len(shown) == len(each.weeks) else f" The last {len(shown)} of {len(each.weeks):,} weeks."
    rows = [
        (week.monday, day, n)
        for week in shown
        for day, n in zip(WEEKDAYS, week.requests, strict=True)
    ]  # fmt: skip
    return Chart(
        f"weeks{suffix}", f"Requests by week and weekday: {name}",
        "Each cell is a day: rows that look alike are a weekly rhythm, dark columns its days off."
        f"{cut}",
        "weekday", "week of", _table(rows, {"week_of": pl.String, "weekday": pl.String, "requests": pl.Int64}),
        x="weekday", y="week_of", value="requests", mark="heat",
    )  # fmt: skip


def _boxes(boxes: Sequence[Box], side: str, name: str, suffix: str) -> Chart:
    schema = {field.name: pl.Float64 for field in msgspec.structs.fields(Box)} | {"hour": pl.Int64, "hours": pl.Int64}
    peak = max(boxes, key=lambda box: box.mean, default=None)
    busiest = (
        "" if peak is None or not peak.mean else f"; the most come at {peak.hour:02}:00, {peak.mean:,.0f} on average"
    )
    return Chart(
        f"hours_{side.replace(' ', '_')}{suffix}", f"{side.capitalize()} an hour, by hour of day: {name}",
        f"Boxes hold the middle half of the hours, whiskers 5 to 95 %{busiest}.",
        "hour of day", f"{side} an hour", _table((msgspec.structs.astuple(box) for box in boxes), schema),
        x="hour", y="p50", mark="box",
    )  # fmt: skip


def _lengths(analysis: Analysis) -> Iterator[Chart]:
    for side in ("request", "response"):
        rows = []
        for each in analysis.lengths[: SHOWN_SERVICES + 1]:
            histogram = getattr(each.lengths, side).histogram
            if histogram is not None and _is_shown(each.service):
                total = sum(histogram.counts)
                edges = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
                rows += [(service_name(each.service), max(low, 0.5), high, n, n / total) for low, high, n in edges]
        stats = getattr(analysis.lengths[0].lengths, side)
        best = next(iter(stats.families), None)
        fit = "" if best is None else f"; of the families fitted, {best.family} is the nearest (KS {best.ks:.3f})"
        modes = stats.bimodality
        two = ""
        if modes is not None and modes.is_bimodal:
            two = f"; two modes, about {modes.low_tokens:,.0f} and {modes.high_tokens:,.0f}"
        yield Chart(
            f"lengths_{side}", f"{side.capitalize()} lengths",
            "Share of requests in bins of equal width on the log scale: a fall from the left on is Zipf's, a hill"
            f" lognormal{fit}{two}.",
            "tokens", "share of requests",
            _table(rows, {"service": pl.String, "tokens": pl.Float64, "below": pl.Float64, "requests": pl.Int64,
                          "share": pl.Float64}),
            x="tokens", y="share", by="service", mark="step", x_log=True,
        )  # fmt: skip
    relation = analysis.lengths[0].lengths.relation
    corr = "" if relation.spearman is None else f" Their rank correlation is {relation.spearman:.2f}."
    bins = relation.bins
    if len(bins) > 400:  # the bins of most requests; the CSV says how many each has
        least = sorted((each.n for each in bins), reverse=True)[400]
        bins = tuple(each for each in bins if each.n > least)
    middles = [(each.from_tokens + 4.5, each.n, each.p50, each.mean, each.p5, each.p95) for each in bins]
    columns = {"tokens": pl.Float64, "n": pl.Int64, "median": pl.Float64, "mean": pl.Float64, "p5": pl.Float64}
    yield Chart(
        "response_by_request", "Response against request length",
        f"Median response of requests in bins of 10 tokens, with the band that holds 90 %: a flat line says that the"
        f" request does not tell the answer's length.{corr}",
        "request tokens", "response tokens", _table(middles, {**columns, "p95": pl.Float64}), x="tokens", y="median",
        band=("p5", "p95"), x_log=True,
    )  # fmt: skip


def _conversations(analysis: Analysis) -> Iterator[Chart]:
    found = analysis.conversations
    counts = [(turns, n, n / found.sessions) for turns, n in found.turn_counts]
    single = f" {counts[0][2]:.0%} have one request." if counts and counts[0][0] == 1 else ""
    yield Chart(
        "turns", "Requests a conversation",
        f"Share of the conversations with so many requests.{single}", "requests", "share of conversations",
        _table(counts[:200], {"turns": pl.Int64, "conversations": pl.Int64, "share": pl.Float64}),
        x="turns", y="share", x_log=True, y_log=True,
    )  # fmt: skip
    rows = [
        (name, float(share), seconds)
        for name, d in (("gap between turns", found.gap_s), ("think time", found.think_s))
        if d is not None
        for share, seconds in zip(
            (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9),
            (d.p1, d.p5, d.p10, d.p25, d.p50, d.p75, d.p90, d.p95, d.p99, d.p999),
            strict=True,
        )
    ]
    gap = "" if found.gap_s is None else f": half within {found.gap_s.p50:,.0f} s"
    yield Chart(
        "turn_gaps", "Time between the turns of a conversation",
        f"Share of the next turns that had come within so many seconds{gap}; think time counts from the answer's end.",
        "seconds", "% of turns",
        _table(rows, {"what": pl.String, "percent": pl.Float64, "seconds": pl.Float64}),
        x="seconds", y="percent", by="what", x_log=True,
    )  # fmt: skip
    turns = [
        (side, each.turn, each.requests, d.mean, d.p10, d.p50, d.p90)
        for each in found.by_turn
        for side, d in (("request", each.request_tokens), ("response", each.response_tokens))
        if d is not None
    ]
    yield Chart(
        "turn_lengths", "Lengths by turn",
        "Median length of each turn: requests grow by the history that they carry.", "turn", "tokens",
        _table(turns, {"side": pl.String, "turn": pl.Int64, "requests": pl.Int64, "mean": pl.Float64,
                       "p10": pl.Float64, "median": pl.Float64, "p90": pl.Float64}),
        x="turn", y="median", by="side",
    )  # fmt: skip


_RATE: Final = {"requests": pl.Int64, "failures": pl.Int64, "rate": pl.Float64, "low": pl.Float64, "high": pl.Float64}


def _rate(rate: Rate) -> tuple[Any, ...]:
    return rate.requests, rate.failures, rate.rate, rate.low, rate.high


def _failures(analysis: Analysis, zone: ZoneInfo) -> Iterator[Chart]:
    found = analysis.failures
    total = found.total
    said = "" if total.rate is None else f" Of all requests {total.rate:.2%} failed."
    groups = [
        (f"{column}: {group_name(group)}", *_rate(group.requests))
        for column in ("log_type", "model", "upstream", "endpoint")
        for group in found.by[column][:6]
        if len(found.by[column]) > 1
    ]
    groups = groups or [("all", *_rate(total))]
    yield Chart(
        "failures_by", "Failure rate by service, model and upstream",
        f"Share of requests that failed, with 95 % intervals: those that do not overlap differ.{said}", "",
        "share failed",
        _table(groups if total.requests else [], {"group": pl.String, **_RATE}), x="group", y="rate",
        band=("low", "high"), mark="bar",
    )  # fmt: skip
    causes = [(group_name(group), *_rate(group.requests)) for group in found.causes["outcome"]]
    yield Chart(
        "failures_outcome", "How requests fail", "Failures with each outcome, as a share of all requests.", "",
        "share of requests", _table(causes, {"outcome": pl.String, **_RATE}), x="outcome", y="rate",
        band=("low", "high"), mark="bar",
    )  # fmt: skip
    yield _over_load(found.by_in_flight, "in_flight", "requests in flight")
    yield _over_load(found.by_arrival_rate, "arrival_rate", "requests/s, last minute")
    known = [each for each in found.by_request_tokens if each.low is not None]
    yield Chart(
        "failures_by_request_tokens", "Failure rate by request length",
        "Bins double; where failures lose their length, as in BurstGPT's files, there is nothing to see.",
        "request tokens", "share failed", _spans(known), x="low_end", y="rate", band=("low", "high"), x_log=True,
    )  # fmt: skip
    yield Chart(
        "failures_by_hour", "Failure rate by hour of day",
        "With 95 % intervals: a rate that follows the day follows the load.",
        "hour of day", "share failed", _hours(found.by_hour), x="hour", y="rate", band=("low", "high"), mark="bar",
    )  # fmt: skip
    bins = _timed(_spans(found.over_time).rename({"low_end": "start_s", "high_end": "end_s"}), zone)
    width_s = found.over_time_s or 1.0
    yield Chart(
        "failures_over_time", "Failure rate over time", f"In bins of {width_s:g} s; peaks are outages or overload.",
        "", "share failed", bins, x="clock", y="rate", is_time=True,
    )  # fmt: skip
    yield Chart(
        "rate_over_time", "Requests over time",
        f"Mean rate in bins of {width_s:g} s; those without a request are left out.",
        "", "requests/s", bins.with_columns(rate_rps=pl.col("requests") / width_s), x="clock", y="rate_rps",
        is_time=True,
    )  # fmt: skip


def _spans(spans: Iterable[Span]) -> pl.DataFrame:
    rows = ((each.low, each.high, *_rate(each.requests)) for each in spans)
    return _table(rows, {"low_end": pl.Float64, "high_end": pl.Float64, **_RATE})


def _hours(groups: Iterable[Group]) -> pl.DataFrame:
    return _table(((group.name, *_rate(group.requests)) for group in groups), {"hour": pl.String, **_RATE})


def _over_load(effect: LoadEffect | None, name: str, label: str) -> Chart:
    return Chart(
        f"failures_by_{name}", f"Failure rate against {label}",
        "One point for each tenth of the requests, by the load that they found: a rising line says that load makes"
        " requests fail.",
        label, "share failed", _spans(() if effect is None else effect.bins), x="low_end", y="rate",
        band=("low", "high"),
    )  # fmt: skip


def _bursts(analysis: Analysis, zone: ZoneInfo) -> Iterator[Chart]:
    windows = [
        (part_name(part), each.window_s, each.windows, each.p50_rps, each.p99_rps, each.dispersion, each.peak_rps)
        for part in analysis.arrivals
        for each in part.arrivals.windows
    ]
    names = {"service": pl.String, "window_s": pl.Int64, "windows": pl.Int64, "p50_rps": pl.Float64}
    table = _table(windows, {**names, "p99_rps": pl.Float64, "dispersion": pl.Float64, "peak_rps": pl.Float64})
    yield Chart(
        "dispersion", "Index of dispersion by window",
        "Variance over mean of the counts in windows of each length: 1 is Poisson; what grows with the window is a rate"
        " that changes.",
        "window, s", "variance / mean", table, x="window_s", y="dispersion", by="service", x_log=True, y_log=True,
    )  # fmt: skip
    yield Chart(
        "peak_rate", "Peak rate by window", "The fullest window of each length: what a server must bear for so long.",
        "window, s", "requests/s", table, x="window_s", y="peak_rps", by="service", x_log=True, y_log=True,
    )  # fmt: skip
    fits = [
        (part_name(part), *msgspec.structs.astuple(each)) for part in analysis.arrivals for each in part.over_time
    ]  # fmt: skip
    schema = {"service": pl.String, "start_s": pl.Float64, "windows": pl.Int64, "fitted": pl.Int64}
    yield Chart(
        "alpha_over_time", "Burstiness over time",
        "Median alpha of the 20-minute windows of each bin (of a day or more): below 1 bursty.", "", "alpha",
        _timed(_table(fits, {**schema, "p10": pl.Float64, "p50": pl.Float64, "p90": pl.Float64}), zone),
        x="clock", y="p50", by="service", is_time=True,
    )  # fmt: skip
    largest = sorted(analysis.episodes.episodes, key=lambda each: -each.requests)[:300]
    rows = [msgspec.structs.astuple(each) for each in sorted(largest, key=lambda each: each.start_s)]
    schema = {"start_s": pl.Float64, "end_s": pl.Float64, "requests": pl.Int64, "peak_rps": pl.Float64}
    yield Chart(
        "bursts", "Bursts",
        f"Peak rate of the {len(rows):,} largest of {len(analysis.episodes.episodes):,} episodes of far more requests"
        " than in the hour around.", "", "peak requests/s",
        _timed(_table(rows, {**schema, "baseline_rps": pl.Float64, "peak_over_baseline": pl.Float64}), zone),
        x="clock", y="peak_rps", mark="bar", is_time=True,
    )  # fmt: skip


def _load(load: Load | None, zone: ZoneInfo) -> Iterator[Chart]:
    for side in ("requests", "tokens"):
        rows: list[tuple[Any, ...]] = []
        if load is not None:
            level = getattr(load, side)
            step = -(-len(level.mean) // 500)  # the mean of bins of equal length, and the most of any of them
            for first in range(0, len(level.mean), step):
                part = level.mean[first : first + step]
                start_s = load.start_s + first * load.bin_s
                most = max(level.max[first : first + step])
                rows += [("mean", start_s, sum(part) / len(part)), ("most", start_s, float(most))]
        yield Chart(
            f"in_flight_{side}", f"{side.capitalize()} in flight",
            "The mean and the most at any instant of each bin, from elapsed times.", "", f"{side} in flight",
            _timed(_table(rows, {"what": pl.String, "start_s": pl.Float64, "in_flight": pl.Float64}), zone),
            x="clock", y="in_flight", by="what", is_time=True,
        )  # fmt: skip


def _latency(analysis: Analysis, zone: ZoneInfo) -> Iterator[Chart]:
    found = analysis.latency
    schema = {"what": pl.String, "start_s": pl.Float64, "n": pl.Int64, "seconds": pl.Float64}

    def rows(bins: Iterable[LatencyBin], measure: str) -> Iterator[tuple[Any, ...]]:
        for each in bins:
            figures = each.measures.get(measure)
            if figures is not None:
                for name in ("p50", "p90", "p99"):
                    yield name, each.low, figures.n, getattr(figures, name)

    for measure, total in found.total.items():
        name = MEASURE_NAMES[measure]
        said = "" if total is None else f": over the whole trace p50 {total.p50:.4g} s, p99 {total.p99:.4g} s"
        yield Chart(
            f"{measure}_over_time", f"{name.capitalize()} over time", f"Percentiles of each bin of time{said}.", "",
            "seconds", _timed(_table(rows(found.over_time, measure), schema), zone), x="clock", y="seconds", by="what",
            is_time=True,
        )  # fmt: skip
        yield Chart(
            f"{measure}_by_in_flight", f"{name.capitalize()} against load",
            "Percentiles by the requests in flight at arrival: where p99 leaves p50 behind, load costs the unlucky.",
            "requests in flight", "seconds",
            _table(rows(found.by_in_flight or (), measure), schema).rename({"start_s": "in_flight"}),
            x="in_flight", y="seconds", by="what",
        )  # fmt: skip
    good = found.goodput
    if good is not None:
        bounds = ", ".join(f"{name} <= {bound_s:g}" for name, bound_s in good.bounds_s.items())
        share = "" if good.share is None else f": {good.share:.2%} over the whole trace"
        bins = [(each.start_s, each.requests, each.good, each.goodput_rps, each.share) for each in good.over_time]
        columns = {"start_s": pl.Float64, "requests": pl.Int64, "good": pl.Int64, "goodput_rps": pl.Float64}
        yield Chart(
            "goodput", "Goodput over time", f"Requests a second that met {bounds}{share}.", "", "requests/s",
            _timed(_table(bins, {**columns, "share": pl.Float64}), zone), x="clock", y="goodput_rps", is_time=True,
        )  # fmt: skip
