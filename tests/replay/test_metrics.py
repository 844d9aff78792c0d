"""Summaries: the figures, what is unknown, and the words about them."""

from __future__ import annotations

import io
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from replay.metrics import MAX_ERRORS, Distribution, Fidelity, Histogram, Summary, Tally, Workload
from replay.report import Progress, progress_text, render, warnings
from replay.sample import Sample
from traces.record import Outcome

WORKLOAD = Workload(
    target="http://127.0.0.1:8000",
    model="m",
    endpoint="chat",
    stream=True,
    run_id="r",
    speed=1.0,
    seed=0,
    ties="spread",
    max_in_flight=None,
    started_at=1.0,
    rows_read=0,
    failed_in_source=0,
    without_tokens=0,
    unsent=0,
    is_interrupted=False,
    stopped_by=None,
    prompt_method="tokenize",
    prompts_counted=0,
    max_model_len=None,
    over_max_model_len=0,
    samples_error=None,
)

OK = Sample(
    index=0,
    due_s=1.0,
    sent_s=1.5,
    dispatch_lag_s=0.5,
    wake_lag_s=0.25,
    ttft_s=0.125,
    tpot_s=0.25,
    e2e_s=2.0,
    e2e_from_due_s=2.5,
    request_tokens_asked=10,
    request_tokens_got=10,
    response_tokens_asked=5,
    response_tokens_got=4,
    status=200,
    outcome=Outcome.OK,
)
REFUSED = Sample(
    index=1,
    due_s=4.0,
    sent_s=None,
    dispatch_lag_s=None,
    wake_lag_s=0.75,
    ttft_s=None,
    tpot_s=None,
    e2e_s=None,
    e2e_from_due_s=None,
    request_tokens_asked=10,
    request_tokens_got=None,
    response_tokens_asked=5,
    response_tokens_got=None,
    status=None,
    outcome=Outcome.CONNECT_ERROR,
    error="refused",
)


def summary_of(*samples: Sample, gaps_ns: list[int] | None = None, workload: Workload = WORKLOAD) -> Summary:
    tally = Tally()
    for sample in samples:
        tally.add(sample, gaps_ns or [])
    return tally.summary(workload, 2)


def all_of(value: float) -> Distribution:
    return Distribution(1, value, value, value, value, value, value)


def test_a_whole_summary() -> None:
    known = summary_of(OK, REFUSED, gaps_ns=[1_000_000_000])
    assert known == Summary(
        **msgspec.structs.asdict(WORKLOAD),
        sent=2,
        ok=1,
        failures={"connect_error": 1},
        errors={"refused": 1},
        error_rate=0.5,
        schedule_s=4.0,
        duration_s=2.0,
        offered_rps=0.5,
        achieved_rps=0.5,
        request_tokens_per_s=5.0,
        response_tokens_per_s=2.0,
        in_flight_max=2,
        ttft_s=all_of(0.125),
        tpot_s=all_of(0.25),
        itl_s=all_of(1.0),
        e2e_s=all_of(2.0),
        e2e_from_due_s=all_of(2.5),
        dispatch_lag_s=all_of(0.5),
        # Two values whose quantiles are bins' middles, within half a per cent.
        wake_lag_s=known.wake_lag_s,
        prompts=Fidelity(1, 1, 1.0, 0, 10, 10),
        outputs=Fidelity(1, 0, 0.0, 1, 5, 4),
    )
    assert known.loop == "open"
    # Two values, whose quantiles are the middles of bins.
    assert known.wake_lag_s is not None
    assert msgspec.structs.astuple(known.wake_lag_s) == pytest.approx((2, 0.5, 0.25, 0.75, 0.75, 0.75, 0.75), rel=0.006)


def test_nothing_is_unknown_never_nan() -> None:
    empty = summary_of()
    assert (empty.ttft_s, empty.error_rate, empty.offered_rps, empty.duration_s) == (None, None, None, None)
    assert empty.prompts == Fidelity(0, 0, None, None, 0, 0)
    assert b"NaN" not in msgspec.json.encode(empty)
    only_failed = summary_of(REFUSED)
    assert (only_failed.ok, only_failed.error_rate, only_failed.e2e_s, only_failed.achieved_rps) == (0, 1.0, None, None)


def test_a_summary_survives_json() -> None:
    known = summary_of(OK, REFUSED)
    assert msgspec.json.decode(msgspec.json.encode(known), type=Summary) == known


def test_failures_stay_out_of_the_latencies() -> None:
    slow = msgspec.structs.replace(OK, outcome=Outcome.TRUNCATED, ttft_s=99.0, e2e_s=99.0, error="broke off")
    found = summary_of(OK, slow)
    assert found.ttft_s == all_of(0.125)
    assert found.e2e_s == all_of(2.0)
    assert found.dispatch_lag_s is not None
    assert found.dispatch_lag_s.count == 2


def test_error_texts_are_bounded() -> None:
    failed = [msgspec.structs.replace(REFUSED, error=f"error {n}") for n in range(MAX_ERRORS + 30)]
    errors = summary_of(*failed).errors
    assert len(errors) == MAX_ERRORS + 1
    assert errors["others"] == 30


VALUES = st.lists(st.floats(0, 1e6) | st.floats(1e-7, 1e-3), min_size=1, max_size=200)


@given(VALUES, st.integers(0, 200))
def test_histogram_against_the_sorted_values(values_s: list[float], split: int) -> None:
    histogram = Histogram()
    for value_s in values_s[:split]:
        histogram.add(value_s)
    histogram.add_all(np.array(values_s[split:], np.float64))
    found = histogram.distribution()
    assert found is not None
    ranked = sorted(values_s)
    assert (found.count, found.max) == (len(ranked), ranked[-1])
    assert found.mean == pytest.approx(sum(ranked) / len(ranked))
    for share, got in ((0.5, found.p50), (0.9, found.p90), (0.95, found.p95), (0.99, found.p99)):
        exact_s = ranked[math.ceil(share * len(ranked)) - 1]
        if exact_s <= 1e5:
            assert got == pytest.approx(exact_s, rel=0.0051, abs=1e-6)


def test_no_value_no_figures() -> None:
    histogram = Histogram()
    histogram.add_all(np.array([]))
    assert histogram.distribution() is None


LATE = Distribution(100, 0.02, 0.01, 0.02, 0.02, 0.05, 0.05)
ON_TIME = Distribution(100, 0.001, 0.001, 0.001, 0.001, 0.010, 0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dispatch_lag_s": ON_TIME, "wake_lag_s": ON_TIME}, []),
        ({"dispatch_lag_s": LATE, "wake_lag_s": LATE}, ["50 ms late or more", "this machine could not keep"]),
        ({"dispatch_lag_s": LATE, "wake_lag_s": ON_TIME}, ["50 ms late or more", "opening connections"]),
        ({"dispatch_lag_s": LATE, "max_in_flight": 2}, ["50 ms late or more", "no open loop"]),
        ({"is_interrupted": True}, ["interrupted"]),
        ({"stopped_by": "row 7 [b]"}, ["could not be read to its end: row 7 [b]"]),
        ({"samples_error": "disk full"}, ["not whole: disk full"]),
        ({"over_max_model_len": 3, "max_model_len": 4096}, ["3 requests ask for more than the 4,096 tokens"]),
        ({"prompt_method": "usage"}, ["no /tokenize"]),
        ({"prompts": Fidelity(9, 7, 7 / 9, 12, 90, 99)}, ["2 of 9 prompts", "up to 12 tokens"]),
        ({"outputs": Fidelity(0, 0, None, None, 0, 0)}, ["reports no usage"]),
    ],
)
def test_warnings(changes: dict[str, object], words: list[str]) -> None:
    exact = msgspec.structs.replace(OK, response_tokens_got=5, dispatch_lag_s=0.0, wake_lag_s=0.0)
    summary = msgspec.structs.replace(summary_of(exact), **changes)
    text = "\n".join(warnings(summary))
    assert bool(text) is bool(words)
    for word in words:
        assert word in text
    # The report has the warnings, and text from outside is shown as it is, not taken for markup.
    console = Console(file=io.StringIO(), width=400)
    console.print(render(summary))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(line in shown for line in text.splitlines())
    assert "open loop" in shown


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(None, 0, 0, 0, 0, False), "preparing prompts"),
        (Progress(3.2, 1200, 1100, 40, 60, False), "3 s: 1,200 sent, 1,100 ok, 40 failed, 60 in flight"),
        (
            Progress(3.2, 9, 8, 0, 1, True),
            "3 s: 9 sent, 8 ok, 0 failed, 1 in flight; stopped, waiting for these (Ctrl-C again to end now)",
        ),
    ],
)
def test_progress(progress: Progress, text: str) -> None:
    assert progress_text(progress) == text
