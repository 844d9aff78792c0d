"""A replay for the eyes: its progress while it runs, its summary with what to mind about it in words, and as JSON."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from replay.metrics import RECENT_S, Distribution, Fidelity, Recent, Summary

LATE_S = 0.010
"""Dispatch lag at the 99th percentile from which the figures are called suspect."""
PLAIN_PROGRESS_S = 10.0
_LOOPS = {
    "independent": "open loop (sends wait for no completion)",
    "ordered": "sessions open loop, their turns ordered (each waits for the one before)",
    "think-time": "sessions open loop, their turns by think time (from the end of the one before)",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a replay stands."""

    elapsed_s: float | None
    """Since schedule zero; None before."""
    sent: int
    ok: int
    failed: int
    in_flight: int
    is_draining: bool
    recent: Recent | None = None


def progress_text(progress: Progress) -> str:
    """One line."""
    if progress.elapsed_s is None:
        return "preparing prompts"
    text = (
        f"{progress.elapsed_s:,.0f} s: {progress.sent:,} sent, {progress.ok:,} ok, {progress.failed:,} failed, "
        f"{progress.in_flight:,} in flight"
    )
    return f"{text}; stopped, waiting for these (Ctrl-C again to end now)" if progress.is_draining else text


class _Pace:
    """Rates of the last seconds, from how far the run was then and is now."""

    def __init__(self) -> None:
        self._seen: deque[Progress] = deque()

    def text(self, progress: Progress) -> str:
        """One line; empty before there is anything to say."""
        now_s, recent = progress.elapsed_s, progress.recent
        if now_s is None:
            return ""
        self._seen.append(progress)
        while len(self._seen) > 2 and (self._seen[1].elapsed_s or 0.0) <= now_s - RECENT_S:
            self._seen.popleft()
        before = self._seen[0]
        over_s = now_s - (before.elapsed_s or 0.0)
        if over_s <= 0:
            return ""
        ended = progress.ok + progress.failed - before.ok - before.failed
        parts = [
            f"last {over_s:.0f} s: {(progress.sent - before.sent) / over_s:,.1f} sent/s, {ended / over_s:,.1f} ended/s"
        ]
        if recent is not None and recent.ttft_p50_s is not None and recent.ttft_p99_s is not None:
            p50, p99 = _milliseconds(recent.ttft_p50_s), _milliseconds(recent.ttft_p99_s)
            parts.append(f"first token p50 {p50} ms, p99 {p99} ms")
        if progress.failed > before.failed:
            parts.append(f"{progress.failed - before.failed:,} failed")
        if recent is not None and recent.lag_max_s is not None:
            parts.append(f"lag up to {_milliseconds(recent.lag_max_s)} ms")
        return ", ".join(parts)


@contextmanager
def progress_shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress: in place on a terminal, else as a line now and then."""
    pace = _Pace()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda progress: live.update(
                Text("\n".join(filter(None, (progress_text(progress), pace.text(progress))))), refresh=True
            )
        return
    next_s = PLAIN_PROGRESS_S

    def show(progress: Progress) -> None:
        nonlocal next_s
        now = pace.text(progress)
        if progress.elapsed_s is not None and progress.elapsed_s >= next_s:
            next_s = progress.elapsed_s + PLAIN_PROGRESS_S
            line = "; ".join(filter(None, (progress_text(progress), now)))
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield show


def render(summary: Summary) -> RenderableType:
    """The whole report, for a console."""
    parts: list[RenderableType] = [Text(line) for line in overview_lines(summary)]
    distributions = [
        ("time to first token", summary.ttft_s),
        ("  from the planned send", summary.ttft_from_due_s),
        ("time per output token", summary.tpot_s),
        ("gap between chunks", summary.itl_s),
        ("end to end", summary.e2e_s),
        ("  from the planned send", summary.e2e_from_due_s),
        ("dispatch lag", summary.dispatch_lag_s),
        ("  the replay's own part", summary.wake_lag_s),
    ]
    distributions += [
        (name, distribution)
        for name, distribution in (
            ("  held back", summary.held_back_s),
            ("  waiting for the turn before", summary.session_wait_s),
        )
        if distribution is not None
    ]
    table = Table("milliseconds", *("mean", "p50", "p90", "p95", "p99", "max"), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, distribution in distributions:
        table.add_row(name, *figures_ms(distribution))
    parts.append(table)
    parts += [Text(f"failed with: {n:,} x {text}") for text, n in summary.errors.items()]
    parts += [Text.from_markup(f"[yellow]warning:[/] {escape(text)}") for text in warnings(summary)]
    colour = {"good": "green", "missed": "red", "invalid": "red"}[summary.verdict]
    parts += [Text.from_markup(f"[{colour}]{escape(line)}[/]") for line in verdict_lines(summary)]
    return Group(*parts)


def verdict_lines(summary: Summary) -> list[str]:
    """What the run is worth, in words."""
    words = {
        "good": "GOOD: nothing that was asked for was missed",
        "missed": "MISSED",
        "invalid": "INVALID: the replay was the bottleneck, its figures are not the target's",
    }
    return [f"verdict   {words[summary.verdict]}", *(f"          {reason}" for reason in summary.reasons)]


def summary_json(summary: Summary) -> bytes:
    """The summary as indented JSON, with each list of numbers on a line of its own."""
    text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
    return re.sub(rb"\[[-+.\deE\s,nul]*\]", lambda found: b" ".join(found[0].split()), text) + b"\n"


def _run_lines(summary: Summary) -> list[str]:
    """What was replayed and how, as far as it is known."""
    if summary.target is None:
        return [f"run {summary.run_id or '(unnamed)'}, from its samples"]
    streaming = "streamed" if summary.stream else "not streamed"
    arrivals = "" if summary.process == "trace" else f", arrivals {summary.process}"
    return [
        f"replay {summary.run_id} of model {summary.model} at {summary.target}, {summary.endpoint}, {streaming}",
        f"{_LOOPS[summary.sessions]}, speed {summary.speed:g}, seed {summary.seed}, ties {summary.ties}{arrivals}",
    ]


def overview_lines(summary: Summary) -> list[str]:
    """Rows, requests, rates, tokens, goodput and server, a line each."""
    failures = ", ".join(f"{n:,} {name}" for name, n in summary.failure_classes.items()) or "none"
    skipped = [f"{summary.failed_in_source:,} failed in the trace and were not sent"]
    if summary.without_tokens:
        skipped.append(f"{summary.without_tokens:,} without token counts")
    if summary.warmup:
        skipped.append(f"{summary.warmup:,} sent in the first {summary.warmup_s:g} s and not measured")
    if summary.unsent:
        skipped.append(f"{summary.unsent:,} not sent any more")
    rows = [] if summary.rows_read is None else [f"rows      {summary.rows_read:,} read, {', '.join(skipped)}"]
    return [
        *_run_lines(summary),
        *rows,
        f"requests  {summary.sent:,} sent, {summary.ok:,} ok, failures: {failures}",
        f"rate      {_rate(summary.offered_rps)} offered over {_seconds(summary.schedule_s)}, "
        f"{_rate(summary.achieved_rps)} achieved over {_seconds(summary.duration_s)}, "
        f"at most {summary.in_flight_max:,} in flight",
        f"tokens    {_number(summary.request_tokens_per_s)} in/s, {_number(summary.response_tokens_per_s)} out/s; "
        f"prompts {_fidelity(summary.prompts)}, answers {_fidelity(summary.outputs)}",
        *goodput_lines(summary),
        *server_lines(summary),
    ]


def goodput_lines(summary: Summary) -> list[str]:
    """How much kept the bounds; nothing where there were none."""
    goodput = summary.goodput
    if goodput is None:
        return []
    bounds = ", ".join(
        f"{name} <= {bound_s:g} s (missed by {_share(goodput.missed_share[name])} of the ok)"
        for name, bound_s in goodput.slo_s.items()
    )
    return [f"goodput   {_share(goodput.share)} of all requests, {_rate(goodput.rps)}: {bounds}"]


def server_lines(summary: Summary) -> list[str]:
    """What the servers said of themselves; why nothing, where they were asked."""
    server = summary.server
    if server is None:
        return []
    if server.over_time is None:
        return [f"server    no metrics: {server.error or 'no scrape during the run'}"]
    return [
        f"server    KV cache {_share(server.kv_max)} at most, {_share(server.kv_mean)} on average; "
        f"{_number(server.running_max)} running and {_number(server.waiting_max)} waiting at most; "
        f"{_number(server.preemptions)} preemptions; prefix cache hits {_share(server.prefix_hit_share)}"
    ]


def warnings(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    lag, wake = summary.dispatch_lag_s, summary.wake_lag_s
    if lag is not None and lag.p99 > LATE_S:
        if summary.max_in_flight is not None and summary.in_flight_max >= summary.max_in_flight:
            why = f"at most {summary.max_in_flight} requests were let in flight, so this was no open loop"
        elif wake is not None and wake.p99 > LATE_S:
            why = "this machine could not keep the schedule: the figures are suspect, replay slower or from another one"
        else:
            why = "opening connections to the target took that long"
        found.append(f"1 % of the requests were sent {lag.p99 * 1e3:,.0f} ms late or more; {why}")
    if summary.lost:
        found.append(f"{summary.lost:,} rows of lost senders have no sample")
    if summary.read_late:
        found.append(f"{summary.read_late:,} turns were read late, because too many others waited for their sessions")
    if summary.gaps_estimated:
        found.append(
            f"{summary.gaps_estimated:,} think times are estimates, because the trace has no elapsed time for them"
        )
    if summary.late_dropped:
        found.append(f"{summary.late_dropped:,} rows were late and were not sent")
    if summary.is_interrupted:
        found.append("interrupted: the figures are of the part that was sent")
    if summary.over_max_model_len:
        found.append(
            f"{summary.over_max_model_len:,} requests ask for more than the {summary.max_model_len:,} tokens that "
            "the target's model takes"
        )
    if summary.prompt_method == "usage":
        found.append("the target has no /tokenize, so prompt lengths were guessed from the usage of earlier answers")
    found += summary.prompt_notes
    for name, fidelity in (("prompt", summary.prompts), ("answer", summary.outputs)):
        inexact = fidelity.known - fidelity.exact
        if inexact:
            found.append(
                f"{inexact:,} of {fidelity.known:,} {name}s were not of the trace's length, by up to "
                f"{fidelity.max_error_tokens:,} tokens"
            )
    if summary.ok and not summary.outputs.known:
        found.append("the target reports no usage, so token counts could not be checked")
    return found


def figures_ms(distribution: Distribution | None) -> list[str]:
    """Mean, p50, p90, p95, p99 and max in milliseconds, as text."""
    if distribution is None:
        return ["-"] * 6
    d = distribution
    return [_milliseconds(value) for value in (d.mean, d.p50, d.p90, d.p95, d.p99, d.max)]


def _milliseconds(value_s: float) -> str:
    value_ms = value_s * 1e3
    return f"{value_ms:,.0f}" if value_ms >= 100 else f"{value_ms:.2f}"


def _fidelity(fidelity: Fidelity) -> str:
    if fidelity.exact_share is None:
        return "of unknown length"
    # 99.96 % is not "100.0 % exact": round down.
    return f"{int(fidelity.exact_share * 1000) / 10:g} % exact"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{int(share * 1000 + 1e-9) / 10:g} %"


def _rate(rps: float | None) -> str:
    return "-" if rps is None else f"{rps:,.2f} req/s"


def _seconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s:,.1f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
