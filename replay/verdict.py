"""What a run is worth, in one word and the reasons for it: a pure function of its summary.

    invalid   the replay itself was the bottleneck, so the figures tell of it and not of the target:
              its own lag (wake lag, p99) or the longest stop of its event loop over the limits, a sender that used a
              whole core and was late, a sender that was lost, or --max-in-flight holding the rate down
    missed    a threshold that was asked for: failures, goodput; or the run was not what was asked for: a trace
              that broke off, a samples file that is not whole, nothing sent at all, or nothing that succeeded
    good      neither

Invalid wins over missed. Exit statuses follow: 0 good, 1 missed, 3 invalid (2 is wrong usage, 130 an interrupted run).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from replay.metrics import Summary

MAX_LAG_S = 0.010
STALL_LAGS = 10.0
"""The longest stop of a sender's loop, over the lag that is allowed."""
MAX_CPU_SHARE = 0.9
MIN_GOODPUT = 0.99
"""Where bounds are given and no share."""
MIN_SENT_SHARE = 0.9
"""Of the offered rate, below which --max-in-flight has made the run another one."""

EXIT_STATUSES = {"good": 0, "missed": 1, "invalid": 3}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run must keep. Raises ValueError naming the limit, its value and the rule."""

    max_lag_s: float = MAX_LAG_S
    """Dispatch lag of the replay's own making, at the 99th percentile."""
    max_error_rate: float | None = None
    min_goodput: float | None = None
    """A share; None is MIN_GOODPUT where the run has bounds."""

    def __post_init__(self) -> None:
        if not self.max_lag_s > 0:
            raise ValueError(f"max lag: expected seconds > 0, got {self.max_lag_s:g}")
        for name, share in (("max error rate", self.max_error_rate), ("min goodput", self.min_goodput)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {share:g}")

    @property
    def max_stall_s(self) -> float:
        """The longest that a sender's event loop may stand still, in seconds."""
        return STALL_LAGS * self.max_lag_s


def judged(summary: Summary, limits: Limits) -> Summary:
    """The summary with its verdict and the reasons."""
    invalid, missed = list(_invalid(summary, limits)), list(_missed(summary, limits))
    return msgspec.structs.replace(
        summary,
        verdict="invalid" if invalid else "missed" if missed else "good",
        reasons=(*invalid, *missed),
    )


def exit_status(summary: Summary) -> int:
    """Of a judged summary."""
    return 130 if summary.is_interrupted else EXIT_STATUSES[summary.verdict]


def _invalid(summary: Summary, limits: Limits) -> list[str]:
    found = [f"sender {sender.name} was lost: {sender.lost}" for sender in summary.senders if sender.lost is not None]
    wake = summary.wake_lag_s
    if wake is not None and wake.p99 > limits.max_lag_s:
        found.append(
            f"this machine could not keep the schedule: 1 % of the requests were begun {_ms(wake.p99)} late or more, "
            f"the limit is {_ms(limits.max_lag_s)}; replay slower, from more processes or from another machine"
        )
    for sender in summary.senders:
        if sender.stall_max_s is not None and sender.stall_max_s > limits.max_stall_s:
            found.append(
                f"sender {sender.name} stood still for {_ms(sender.stall_max_s)}, "
                f"the limit is {_ms(limits.max_stall_s)}"
            )
        is_late = sender.wake_lag_s is not None and sender.wake_lag_s.p99 > limits.max_lag_s
        if sender.cpu_share is not None and sender.cpu_share > MAX_CPU_SHARE and is_late:
            found.append(f"sender {sender.name} used {sender.cpu_share:.0%} of a core and was late")
    if (
        summary.max_in_flight is not None
        and summary.in_flight_max >= summary.max_in_flight
        and summary.offered_rps is not None
        and summary.sent_rps is not None
        and summary.sent_rps < MIN_SENT_SHARE * summary.offered_rps
    ):
        found.append(
            f"at most {summary.max_in_flight:,} requests were let in flight, which held {summary.offered_rps:,.2f} "
            f"offered requests/s down to {summary.sent_rps:,.2f}: this was no open loop"
        )
    return found


def _missed(summary: Summary, limits: Limits) -> list[str]:
    found = []
    if not summary.sent and not summary.is_interrupted:
        found.append("no request was sent and measured")
    if summary.sent and not summary.ok:
        found.append(f"none of the {summary.sent:,} requests succeeded")
    if summary.stopped_by is not None:
        found.append(f"the trace could not be read to its end: {summary.stopped_by}")
    if summary.samples_error is not None:
        found.append(f"the samples file is not whole: {summary.samples_error}")
    rate = summary.error_rate
    if limits.max_error_rate is not None and rate is not None and rate > limits.max_error_rate:
        found.append(f"{_percent(rate)} of the requests failed, at most {_percent(limits.max_error_rate)} may")
    goodput = summary.goodput
    least = MIN_GOODPUT if limits.min_goodput is None else limits.min_goodput
    if goodput is not None and goodput.share is not None and goodput.share < least:
        bounds = ", ".join(f"{name} <= {bound_s:g} s" for name, bound_s in goodput.slo_s.items())
        found.append(f"{_percent(goodput.share)} of the requests kept {bounds}, at least {_percent(least)} must")
    return found


def _ms(value_s: float) -> str:
    return f"{value_s * 1e3:,.3g} ms" if value_s < 1 else f"{value_s:,.1f} s"


def _percent(share: float) -> str:
    """To two decimals, and never rounded to a whole that it is not."""
    text = f"{share:.2%}"
    if share < 1 and text == "100.00%":
        text = "99.99%"
    elif share > 0 and text == "0.00%":
        text = "0.01%"
    return text.replace("%", " %")
