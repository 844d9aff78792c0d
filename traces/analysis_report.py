"""An analysis, a failure report and a comparison for a terminal: tables, each with a word on how to read it.

Names come from clients and are shown on one line, without control characters or markup. Everything here is in the JSON,
the page and the CSVs too, with more of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from traces.analysis import Analysis, ArrivalPart, Source, source_warnings
from traces.burstiness import Quantiles
from traces.compare import Axis, Comparison, Difference
from traces.failures import FailureReport, Group, LoadEffect, Rate, Span
from traces.latency import LatencyReport
from traces.lengths import Distribution, LengthStats
from traces.shadow import ShadowComparison
from traces.summary import one_line, plain_table, shown_number, shown_percent, shown_stamp
from traces.table import Service

SHOWN_GROUPS: Final = 8
"""Groups of a breakdown that the terminal shows."""
MIN_FITTED: Final = 50
"""Fits of fewer lengths are not shown: any family fits them."""
MEASURE_NAMES: Final = {
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "elapsed_s": "end to end",
    "queue_s": "held by shaping",
}


def render(analysis: Analysis, console: Console) -> None:
    """Print an analysis."""
    console.print(_trace(analysis))
    if analysis.source.requests:
        console.print(_burstiness(analysis))
        console.print(_bursts(analysis))
        console.print(_periods(analysis))
        console.print(_lengths(analysis))
        console.print(_conversations(analysis))
        console.print(_load(analysis))
        _print_failures(analysis.failures, console)
        console.print(_latency(analysis.latency))
    _print_warnings(analysis.warnings, console)


def render_failures(source: Source, failures: FailureReport, console: Console) -> None:
    """Print the failures of a trace."""
    _print_failures(failures, console)
    _print_warnings(source_warnings(source), console)


def render_comparison(comparison: Comparison, a: str, b: str, console: Console) -> None:
    """Print a comparison of the traces named `a` and `b`."""
    table = plain_table(
        f"{comparison.verdict.upper()}: A {one_line(a)}, {comparison.a_requests:,} requests;"
        f" B {one_line(b)}, {comparison.b_requests:,}",
        f"interval: {comparison.options.confidence:.0%}, of B / A - 1, or of B - A for shares; same: within the"
        " tolerance, different: outside, unknown: it cannot be told",
    )
    _add_axes(table, comparison.axes)
    console.print(table)


def render_shadow(found: ShadowComparison, console: Console) -> None:
    """Print a comparison of a shadow target with production."""
    table = plain_table(
        f"{found.verdict.upper()}: {one_line(found.target)}, {found.pairs:,} requests beside their primaries"
        + (f"; {found.unpaired:,} without one" if found.unpaired else ""),
        f"A: primaries, B: shadows; interval: {found.options.confidence:.0%}, of B / A - 1, or of B - A for shares;"
        " same: within the tolerance, different: outside, unknown: it cannot be told",
    )
    _add_axes(table, found.axes)
    console.print(table)
    if found.changes:
        changed = ", ".join(f"{each.primary} -> {each.shadow} {each.requests:,}" for each in found.changes)
        console.print(f"outcomes that differ: {changed}")


def _add_axes(table: Table, axes: Iterable[Axis]) -> None:
    for heading in ("", "A", "B", "difference", "interval", "verdict"):
        table.add_column(heading, justify="left" if heading in ("", "verdict") else "right")
    for axis in axes:
        said = axis.verdict.value if axis.is_known else "not in both traces"
        table.add_row(f"[bold]{axis.name}[/]", "", "", "", "", f"[bold]{said}[/]")
        for each in axis.differences if axis.is_known else ():
            table.add_row(
                f"  {each.name}", shown_number(each.a), shown_number(each.b), *_difference(each), each.verdict
            )
        for each_distance in axis.distances if axis.is_known else ():
            table.add_row(
                f"  {each_distance.name} distance",
                "",
                "",
                f"{each_distance.ks:.3f}",
                f"{each_distance.ks_low:.3f} {each_distance.ks_high:.3f}",
                each_distance.verdict,
            )


def _difference(each: Difference) -> tuple[str, str]:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:+.1%}" if each.is_relative else f"{value:+.4f}"

    interval = "-" if each.low is None else f"{shown(each.low)} {shown(each.high)}"
    return shown(each.difference), interval


def service_name(service: Service | None) -> str:
    """`all`, or model and log type."""
    return "all" if service is None else f"{service.model or '(unknown)'}, {service.log_type.value}"


def part_name(part: ArrivalPart) -> str:
    """`all`, or the log type."""
    return "all" if part.log_type is None else part.log_type.value


def group_name(group: Group) -> str:
    """The group's value, or that it is unknown."""
    return "(unknown)" if group.name is None else group.name


def _headed(title: str, headings: Sequence[str], caption: str | None = None, text: int = 1) -> Table:
    """The first `text` columns are text, the others numbers."""
    table = plain_table(title, caption)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < text else "right", overflow="fold")
    return table


def _trace(analysis: Analysis) -> Table:
    arrivals = analysis.arrivals[0].arrivals
    table = _headed("Trace", ("", "value", "what it is"), text=1)
    table.columns[2].justify = "left"
    for row in (
        ("requests", shown_number(arrivals.requests), "rows of the trace, failed ones too"),
        ("first", shown_stamp(arrivals.first_s), "earliest submission, UTC"),
        ("last", shown_stamp(arrivals.last_s), "latest submission, UTC"),
        ("span", shown_number(arrivals.span_s, " s"), "from the first to the last"),
        ("mean rate", shown_number(arrivals.rate_rps, " req/s"), "requests / span"),
        ("conversations", shown_number(analysis.conversations.sessions), "different sessions"),
        ("failures", _rate(analysis.failures.total), "requests whose outcome is not ok, with 95 % interval"),
    ):
        table.add_row(*row)
    return table


def _burstiness(analysis: Analysis) -> Table:
    table = _headed(
        "Burstiness",
        ("", "req/s", "peak 1 s", "CV, all gaps", "CV, 5 min", "alpha, 20 min", "not Poisson",
         "dispersion 1 s / 1 min / 1 h"),
        "CV of gaps: 1 is Poisson, above it bursty; 5 min: median of windows, p10 and p90; alpha: Gamma shape of the"
        " gaps, 1 / CV^2;\nnot Poisson: windows whose test rejects alpha = 1 at 5 %; dispersion: variance / mean of"
        " counts",
    )  # fmt: skip
    for part in analysis.arrivals:
        windows = {each.window_s: each for each in part.arrivals.windows}
        table.add_row(
            part_name(part),
            shown_number(part.arrivals.rate_rps),
            shown_number(windows[1].peak_rps if 1 in windows else None),
            shown_number(part.arrivals.gap_cv),
            _spread(part.detrended.cv),
            _spread(part.windows.alpha),
            shown_percent(part.windows.poisson_rejected),
            " / ".join(shown_number(windows[each].dispersion) if each in windows else "-" for each in (1, 60, 3600)),
        )
    return table


def _spread(values: Quantiles | None) -> str:
    return "-" if values is None else f"{values.p50:.2f} ({values.p10:.2f} {values.p90:.2f})"


def _bursts(analysis: Analysis) -> Table:
    found = analysis.episodes
    table = _headed(
        f"Bursts: {len(found.episodes):,} episodes, {shown_percent(found.request_share)} of the requests in"
        f" {shown_percent(found.time_share)} of the time",
        ("largest, UTC", "seconds", "requests", "peak req/s", "over baseline"),
        f"windows of {found.window_s} s that hold far more than the hour around them",
    )
    for each in sorted(found.episodes, key=lambda episode: -episode.requests)[:5]:
        over = "-" if each.peak_over_baseline is None else f"{each.peak_over_baseline:,.1f} x"
        table.add_row(
            shown_stamp(each.start_s),
            f"{each.end_s - each.start_s:g}",
            f"{each.requests:,}",
            f"{each.peak_rps:g}",
            over,
        )
    return table


def _periods(analysis: Analysis) -> Table:
    table = _headed(
        f"Periods ({one_line(analysis.options.zone)})",
        ("", "requests", "busiest hour", "peak / trough", "periods"),
        "mean of the busiest hour of day over the quietest's; periods: of the hourly counts, strongest first",
    )
    table.columns[4].justify = "left"
    for each in analysis.periodicity:
        peak = max(each.requests_by_hour, key=lambda box: box.mean, default=None)
        periods = ", ".join(f"{period.period_s / 3600:.3g} h" for period in each.periods) or "none"
        table.add_row(
            one_line(service_name(each.service)),
            f"{each.requests:,}",
            "-" if peak is None else f"{peak.hour:02}:00",
            shown_number(each.peak_to_trough),
            periods,
        )
    return table


def _lengths(analysis: Analysis) -> Table:
    table = _headed(
        "Tokens of requests that went well",
        ("", "", "mean", "p50", "p90", "p99", "max", "best fit (KS)", "Zipf tail", "modes"),
        "best fit by BIC; Zipf tail: exponent, from how many tokens on; modes: medians of two lognormals where they are"
        " clearly two",
        text=2,
    )
    for each in analysis.lengths:
        relation = each.lengths.relation.spearman
        name = f"{one_line(service_name(each.service))}" + ("" if relation is None else f"\nrank corr. {relation:.2f}")
        table.add_row(name, "request", *_length_cells(each.lengths.request))
        table.add_row("", "response", *_length_cells(each.lengths.response))
    return table


def _length_cells(stats: LengthStats) -> list[str]:
    d, best, tail, modes = stats.lengths, next(iter(stats.families), None), stats.zipf_tail, stats.bimodality
    if d is not None and d.n < MIN_FITTED:
        best = tail = modes = None
    return [
        *(("-",) * 5 if d is None else (f"{d.mean:,.0f}", *(f"{each:,.0f}" for each in (d.p50, d.p90, d.p99, d.max)))),
        "-" if best is None else f"{best.family} ({best.ks:.3f})",
        "-" if tail is None else f"{tail.exponent:.2f} from {tail.x_min:,}",
        f"{modes.low_tokens:,.0f}, {modes.high_tokens:,.0f}" if modes is not None and modes.is_bimodal else "-",
    ]


def _conversations(analysis: Analysis) -> Table:
    found = analysis.conversations
    counts = dict(found.turn_counts)
    single = counts.get(1, 0) / found.sessions if found.sessions else None
    caption = None
    if found.sessions:
        caption = (
            f"{shown_percent(single)} have one request; {found.models.sessions:,} change their model;"
            f" think time: from an answer's end to the next request"
        )
    table = _headed(
        f"Conversations: {found.sessions:,}, {found.without_session:,} requests without",
        ("", "n", "mean", "p10", "p50", "p75", "p90", "p99", "max"),
        caption,
    )
    for name, values in (
        ("turns", found.turns),
        ("gap between turns, s", found.gap_s),
        ("think time, s", found.think_s),
        ("duration, s", found.duration_s),
        ("growth of the request, tokens", found.growth_tokens),
    ):
        table.add_row(name, *_distribution(values))
    return table


def _distribution(d: Distribution | None) -> tuple[str, ...]:
    if d is None:
        return ("0", *("-",) * 7)
    return f"{d.n:,}", *(f"{each:,.4g}" for each in (d.mean, d.p10, d.p50, d.p75, d.p90, d.p99, d.max))


def _load(analysis: Analysis) -> Table:
    load = analysis.load
    table = _headed(
        "In flight",
        ("", "mean", "most"),
        "from elapsed times" if load is None or not load.untimed else f"{load.untimed:,} requests without elapsed time",
    )
    for name, level in (("requests", load and load.requests), ("tokens", load and load.tokens)):
        table.add_row(
            name,
            shown_number(level.overall_mean) if level else "-",
            shown_number(level.overall_max) if level else "-",
        )
    return table


def _rate(rate: Rate) -> str:
    if rate.rate is None or rate.low is None or rate.high is None:
        return "-"
    return f"{rate.failures:,}, {rate.rate:.2%} ({rate.low:.2%} {rate.high:.2%})"


def _rate_cells(rate: Rate) -> tuple[str, str, str, str]:
    interval = "-" if rate.low is None else f"{shown_percent(rate.low)} {shown_percent(rate.high)}"
    return f"{rate.requests:,}", f"{rate.failures:,}", shown_percent(rate.rate), interval


def _print_failures(report: FailureReport, console: Console) -> None:
    table = _headed(
        "Failures", ("", "", "requests", "failed", "rate", "95 % interval"), "causes are shares of all requests", text=2
    )
    table.add_row("all", "", *_rate_cells(report.total))
    for column, groups in (*report.causes.items(), *report.by.items()):
        is_told = any(each.name is not None for each in groups) and (len(groups) > 1 or column in report.causes)
        if not is_told:
            continue
        _add_groups(table, column, groups)
    if report.total.failures:
        _add_spans(table, "request_tokens", report.by_request_tokens)
        hours = [each for each in report.by_hour if each.requests.failures]
        worst = sorted(hours, key=lambda group: -(group.requests.rate or 0.0))[:3]
        for place, each in enumerate(worst):
            table.add_row("worst hours" if place == 0 else "", f"{each.name}:00", *_rate_cells(each.requests))
        _add_load(table, "in flight", report.by_in_flight)
        _add_load(table, "req/s, last minute", report.by_arrival_rate)
        if report.bursts is not None and report.bursts.inside.requests:
            table.add_row("bursts", "inside", *_rate_cells(report.bursts.inside))
            table.add_row("", "outside", *_rate_cells(report.bursts.outside))
    console.print(table)
    if not report.total.requests:
        return
    for line in _failure_lines(report):
        console.print(f"  {line}", soft_wrap=True)
    if report.total.failures:
        console.print(_runs(report))
    console.print(_budget(report))


def _add_groups(table: Table, column: str, groups: Sequence[Group]) -> None:
    for place, each in enumerate(groups[:SHOWN_GROUPS]):
        table.add_row(column if place == 0 else "", one_line(group_name(each)), *_rate_cells(each.requests))
    if len(groups) > SHOWN_GROUPS:
        table.add_row("", f"({len(groups) - SHOWN_GROUPS} more)", "", "", "", "")


def _add_spans(table: Table, column: str, spans: Sequence[Span]) -> None:
    for place, each in enumerate(spans):
        name = (
            "(unknown)" if each.low is None or each.high is None else f"{each.low:,.0f} to {max(each.high - 1, 0):,.0f}"
        )
        table.add_row(column if place == 0 else "", name, *_rate_cells(each.requests))


def _add_load(table: Table, column: str, effect: LoadEffect | None) -> None:
    if effect is None or len(effect.bins) < 2:
        return
    for place, each in enumerate((effect.bins[0], effect.bins[-1])):
        table.add_row(column if place == 0 else "", f"{each.low:.4g} to {each.high:.4g}", *_rate_cells(each.requests))


def _failure_lines(report: FailureReport) -> Iterable[str]:
    in_flight, rate = report.by_in_flight, report.by_arrival_rate
    contrasts = (
        ("inside bursts against outside", report.bursts),
        ("at the most in flight against less", None if in_flight is None else in_flight.highest),
        ("at the highest arrival rate against lower", None if rate is None else rate.highest),
    )
    if report.total.failures:
        for name, contrast in contrasts:
            if contrast is not None and contrast.odds_ratio is not None:
                yield (
                    f"odds of failing {name}: {contrast.odds_ratio:.3g} times"
                    f" ({contrast.low:.3g} {contrast.high:.3g})"
                )  # fmt: skip
        wasted = report.wasted
        yield (
            f"thrown away: {wasted.response_tokens:,} response tokens ({shown_percent(wasted.response_share)}),"
            f" {wasted.request_tokens:,} request tokens ({shown_percent(wasted.request_share)})"
        )


def _runs(report: FailureReport) -> Table:
    table = _headed(
        "Runs of failures, by upstream",
        ("", "runs", "longest", "between, s", "to recover, s", "at most, s"),
        "consecutive failures; between: mean time up to the next run; to recover: to the next success",
    )
    for each in report.runs[:SHOWN_GROUPS]:
        name = "all" if each.name is None else one_line(each.name)
        table.add_row(
            name, *map(shown_number, (each.runs, each.longest, each.mtbf_s, each.mttr_s, each.max_recovery_s))
        )
    return table


def _budget(report: FailureReport) -> Table:
    found = report.availability
    met = {True: "met", False: "missed", None: "-"}[found.is_met]
    table = _headed(
        f"Availability {shown_percent(found.availability)}, objective {found.slo:.6g}: {met};"
        f" {'-' if found.budget_used is None else f'{found.budget_used:.0%}'} of the error budget used",
        ("alert", "burn rate", "largest burn", "at the end", "times fired"),
        "without invalid requests and clients that left; burn 1 uses up the budget just in its period",
    )
    for each in found.alerts:
        rule = each.rule
        table.add_row(
            f"{rule.severity}: {rule.long_s / 3600:g} h and {rule.short_s / 60:g} min",
            f"{rule.burn_rate:g}",
            shown_number(each.burn_max),
            shown_number(each.burn_at_end),
            f"{len(each.episodes):,}",
        )
    return table


def _latency(report: LatencyReport) -> Table:
    good = report.goodput
    caption = "of requests that went well"
    if good is not None:
        bounds = ", ".join(f"{name} <= {bound_s:g}" for name, bound_s in good.bounds_s.items())
        caption += (
            f"; goodput ({bounds}): {good.good:,} of {good.requests - good.unjudged:,}, {shown_percent(good.share)}"
        )
    table = _headed("Latency, seconds", ("", "n", "mean", "p10", "p50", "p75", "p90", "p99", "max"), caption)
    for name, values in report.total.items():
        table.add_row(MEASURE_NAMES[name], *_distribution(values))
    return table


def _print_warnings(warnings: Iterable[str], console: Console) -> None:
    for text in warnings:
        console.print(f"[yellow]to mind:[/] {escape(text)}", soft_wrap=True)
