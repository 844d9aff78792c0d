"""Verdicts: what makes a run invalid, what makes it miss, and in which words."""

from __future__ import annotations

import msgspec
import pytest

from replay.metrics import Distribution, Goodput, SenderFacts, Summary, Tally, Workload
from replay.verdict import Limits, exit_status, judged


def spread(p99: float) -> Distribution:
    return Distribution(100, p99 / 4, p99 / 4, p99 / 2, p99 / 2, p99, p99 * 2)


def sender(**changes: object) -> SenderFacts:
    plain = SenderFacts(
        name="host:7", host="host", sent=50, dispatch_lag_s=spread(0.001), wake_lag_s=spread(0.001), cpu_share=0.5,
        stall_max_s=0.05,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def run(**changes: object) -> Summary:
    """A good one, changed."""
    plain = Tally().summary(Workload(), 5)
    good = {"sent": 100, "ok": 100, "error_rate": 0.0, "offered_rps": 10.0, "sent_rps": 10.0, "senders": (sender(),),
            "wake_lag_s": spread(0.010), "dispatch_lag_s": spread(0.5)}  # fmt: skip
    return msgspec.structs.replace(plain, **{**good, **changes})


def goodput(share: float | None) -> Goodput:
    return Goodput({"ttft": 0.5, "e2e": 10.0}, 0, share, None, {"ttft": None, "e2e": None})


@pytest.mark.parametrize(
    ("changes", "limits", "verdict", "words"),
    [
        # A limit is kept by what equals it; lag that is the target's (its connections) judges nobody here.
        ({}, {}, "good", []),
        ({"wake_lag_s": None, "senders": ()}, {}, "good", []),
        ({"wake_lag_s": spread(0.0101)}, {}, "invalid", ["were begun 10.1 ms late", "limit is 10 ms"]),
        ({"wake_lag_s": spread(0.0101)}, {"max_lag_s": 0.02}, "good", []),
        ({"wake_lag_s": spread(2.5)}, {}, "invalid", ["2.5 s late or more"]),
        ({"senders": (sender(stall_max_s=0.1),)}, {}, "good", []),
        ({"senders": (sender(stall_max_s=0.25),)}, {}, "invalid", ["sender host:7 stood still for 250 ms", "100 ms"]),
        ({"senders": (sender(stall_max_s=0.25),)}, {"max_lag_s": 0.03}, "good", []),
        # A busy core that is on time is one well used.
        ({"senders": (sender(cpu_share=0.99),)}, {}, "good", []),
        ({"senders": (sender(cpu_share=0.99, wake_lag_s=spread(0.02)),)}, {}, "invalid", ["99% of a core"]),
        ({"senders": (sender(cpu_share=None, wake_lag_s=None, stall_max_s=None),)}, {}, "good", []),
        ({"senders": (sender(), sender(lost="killed by signal 9"))}, {}, "invalid", ["was lost: killed by signal 9"]),
        ({"max_in_flight": 5, "in_flight_max": 5, "sent_rps": 8.9}, {}, "invalid", ["at most 5", "to 8.90"]),
        ({"max_in_flight": 5, "in_flight_max": 5, "sent_rps": 9.5}, {}, "good", []),
        ({"max_in_flight": 9, "in_flight_max": 5, "sent_rps": 1.0}, {}, "good", []),
        ({"error_rate": 0.5}, {}, "good", []),  # nobody asked
        ({"error_rate": 1.0, "ok": 0}, {}, "missed", ["none of the 100 requests succeeded"]),
        ({"error_rate": 0.1}, {"max_error_rate": 0.1}, "good", []),
        ({"error_rate": 0.101}, {"max_error_rate": 0.1}, "missed", ["10.10 % of the requests failed, at most 10"]),
        ({"error_rate": 1e-6}, {"max_error_rate": 0.0}, "missed", ["0.01 % of the requests failed"]),
        ({"goodput": goodput(0.99)}, {}, "good", []),
        ({"goodput": goodput(0.98)}, {}, "missed", ["98.00 % of", "kept ttft <= 0.5 s, e2e <= 10 s", "99.00 %"]),
        ({"goodput": goodput(0.98)}, {"min_goodput": 0.5}, "good", []),
        ({"goodput": goodput(0.99999)}, {"min_goodput": 1.0}, "missed", ["99.99 % of the requests", "100.00 % must"]),
        ({"goodput": goodput(None)}, {}, "good", []),
        ({"stopped_by": "row 8: goes backwards"}, {}, "missed", ["not be read to its end: row 8: goes backwards"]),
        ({"samples_error": "s: No space left on device"}, {}, "missed", ["samples file is not whole: s: No space"]),
        ({"sent": 0, "ok": 0, "error_rate": None}, {"max_error_rate": 0.0}, "missed", ["no request was sent"]),
        ({"sent": 0, "ok": 0, "error_rate": None, "is_interrupted": True}, {}, "good", []),
        # Invalid wins, and both are said.
        ({"wake_lag_s": spread(1.0), "error_rate": 1.0}, {"max_error_rate": 0.0}, "invalid", ["late", "failed"]),
    ],
)  # fmt: skip
def test_verdicts(changes: dict[str, object], limits: dict[str, float], verdict: str, words: list[str]) -> None:
    found = judged(run(**changes), Limits(**limits))
    assert found.verdict == verdict
    text = "\n".join(found.reasons)
    assert bool(text) is bool(words)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("verdict", "is_interrupted", "status"),
    [("good", False, 0), ("missed", False, 1), ("invalid", False, 3), ("good", True, 130), ("invalid", True, 130)],
)
def test_exit_statuses(verdict: str, is_interrupted: bool, status: int) -> None:
    assert exit_status(run(verdict=verdict, is_interrupted=is_interrupted)) == status


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_lag_s": 0.0}, "max lag: expected seconds > 0, got 0"),
        ({"max_lag_s": float("nan")}, "max lag: expected seconds > 0, got nan"),
        ({"max_error_rate": 1.5}, "max error rate: expected 0 to 1, got 1.5"),
        ({"min_goodput": 99.0}, "min goodput: expected 0 to 1, got 99"),
    ],
)
def test_wrong_limits(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**wrong)
