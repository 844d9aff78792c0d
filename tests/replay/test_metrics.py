"""Summaries: the figures, what is unknown, goodput, merging, and the words about them."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from replay.metrics import (
    CDF_POINTS,
    MAX_ERRORS,
    Cdf,
    Distribution,
    Fidelity,
    Goodput,
    Histogram,
    Recent,
    SenderFacts,
    ServerFacts,
    Slo,
    Summary,
    Tally,
    Workload,
    merge_workloads,
    missed_bounds,
    parse_slo,
    summarize,
)
from replay.report import Progress, progress_shown, progress_text, render, summary_json, warnings
from replay.sample import Sample
from replay.timeline import OverTime
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
    ttft_from_due_s=0.625,
    itl_max_s=1.0,
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
        failure_classes={"connect": 1},
        errors={"refused": 1},
        error_rate=0.5,
        schedule_s=4.0,
        duration_s=2.0,
        offered_rps=0.5,
        sent_rps=2 / 1.5,
        achieved_rps=0.5,
        request_tokens_per_s=5.0,
        response_tokens_per_s=2.0,
        in_flight_max=2,
        goodput=None,
        ttft_s=all_of(0.125),
        ttft_from_due_s=all_of(0.625),
        tpot_s=all_of(0.25),
        itl_s=all_of(1.0),
        e2e_s=all_of(2.0),
        e2e_from_due_s=all_of(2.5),
        dispatch_lag_s=all_of(0.5),
        # Two values whose quantiles are bins' middles, within half a per cent.
        wake_lag_s=known.wake_lag_s,
        held_back_s=None,
        session_wait_s=None,
        prompts=Fidelity(1, 1, 1.0, 0, 10, 10),
        outputs=Fidelity(1, 0, 0.0, 1, 5, 4),
        # Sent at 1.5 s, first content at 1.625 s, over at 3.5 s; the other was due at 4 s and refused at 4.75 s.
        over_time=OverTime(
            bin_s=1.0,
            offered=[0, 1, 0, 0, 1],
            sent=[0, 1, 0, 0, 0],
            ok=[0, 0, 0, 1, 0],
            failed=[0, 0, 0, 0, 1],
            in_flight=[0.0, 0.5, 1.0, 0.5, 0.0],
            ttft_p50_s=[None, known.over_time.ttft_p50_s[1], None, None, None],
            ttft_p99_s=[None, known.over_time.ttft_p99_s[1], None, None, None],
            e2e_p50_s=[None, known.over_time.e2e_p50_s[1], None, None, None],
            e2e_p99_s=[None, known.over_time.e2e_p99_s[1], None, None, None],
            dispatch_lag_max_s=[None, 0.5, None, None, 0.75],
            response_tokens_per_s=[0.0, 0.8, 2.133333, 1.066667, 0.0],
        ),
        cdfs={
            name: Cdf([value, value], [0.0, 1.0])
            for name, value in (("ttft_s", 0.125), ("tpot_s", 0.25), ("e2e_s", 2.0))
        },
    )
    assert known.over_time.ttft_p50_s[1] == known.over_time.ttft_p99_s[1] == pytest.approx(0.125, rel=0.06)
    assert known.over_time.e2e_p50_s[1] == pytest.approx(2.0, rel=0.06)
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
    histogram.extend(values_s[split:])
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
    histogram.extend([])
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


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=0.5", Slo(ttft_s=0.5)),
        ("ttft=0.5,tpot=5e-2", Slo(ttft_s=0.5, tpot_s=0.05)),
        (" e2e = 10 , itl=1", Slo(e2e_s=10.0, itl_s=1.0)),
    ],
)
def test_bounds(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "slo: expected ttft=, tpot=, itl= or e2e= with seconds, got ''"),
        ("ttft=0.5,", "got ''"),
        ("p99=1", "got 'p99=1'"),
        ("ttft", "slo: ttft: expected seconds > 0, got ''"),
        ("ttft=0", "slo: ttft: expected seconds > 0, got '0'"),
        ("ttft=-1", "got '-1'"),
        ("ttft=nan", "got 'nan'"),
        ("ttft=inf", "got 'inf'"),
        ("ttft=500ms", "got '500ms'"),
        ("ttft=1,ttft=2", "slo: expected ttft once"),
    ],
)
def test_wrong_bounds(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="slo: ") as caught:
        parse_slo(text)
    assert message in str(caught.value)


ALL_BOUNDS = Slo(ttft_s=0.125, tpot_s=0.25, itl_s=1.0, e2e_s=2.0)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),  # a bound is kept by what equals it
        ({"ttft_s": 0.126}, ["ttft"]),
        ({"tpot_s": 0.251}, ["tpot"]),
        ({"itl_max_s": 1.01}, ["itl"]),
        ({"e2e_s": 2.01}, ["e2e"]),
        ({"ttft_s": 9.0, "e2e_s": 9.0}, ["ttft", "e2e"]),
        ({"tpot_s": None, "itl_max_s": None}, []),  # one token: there is no gap to bound
        ({"ttft_s": None}, ["ttft"]),  # never seen is not in time
    ],
)
def test_missed_bounds(changes: dict[str, object], missed: list[str]) -> None:
    assert missed_bounds(msgspec.structs.replace(OK, **changes), ALL_BOUNDS) == missed


def test_failures_are_in_the_denominator_of_goodput() -> None:
    slow = msgspec.structs.replace(OK, ttft_s=9.0)
    tally = Tally(Slo(ttft_s=0.5, e2e_s=10.0))
    for sample in (OK, OK, slow, REFUSED):
        tally.add(sample)
    goodput = tally.summary(WORKLOAD, 1).goodput
    assert goodput == Goodput({"ttft": 0.5, "e2e": 10.0}, 2, 0.5, 1.0, {"ttft": 1 / 3, "e2e": 0.0})
    assert Tally(Slo(ttft_s=0.5)).summary(WORKLOAD, 0).goodput == Goodput({"ttft": 0.5}, 0, None, None, {"ttft": None})


TIMES_S = st.floats(0, 5000) | st.floats(0, 3)
DURATIONS_S = st.none() | st.floats(0, 100) | st.floats(0, 0.01)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    due_s, wake_s, e2e_s = draw(TIMES_S), draw(st.floats(0, 1)), draw(st.floats(0, 100))
    wait_s = draw(st.none() | st.floats(0, 9))
    lag_s = wake_s + (wait_s or 0.0)
    outcome = draw(st.sampled_from([Outcome.OK, Outcome.OK, Outcome.TRUNCATED, Outcome.CONNECT_ERROR]))
    is_sent = outcome is not Outcome.CONNECT_ERROR
    ttft_s = draw(st.none() | st.floats(0, 1).map(lambda share: share * e2e_s)) if is_sent else None
    return msgspec.structs.replace(
        OK,
        due_s=due_s,
        wake_lag_s=wake_s,
        sent_s=due_s + lag_s if is_sent else None,
        dispatch_lag_s=lag_s if is_sent else None,
        e2e_s=e2e_s if is_sent else None,
        e2e_from_due_s=e2e_s + lag_s if is_sent else None,
        ttft_s=ttft_s,
        ttft_from_due_s=None if ttft_s is None else ttft_s + lag_s,
        tpot_s=draw(DURATIONS_S),
        response_tokens_got=draw(st.none() | st.integers(0, 1000)),
        outcome=outcome,
        error=None if outcome is Outcome.OK else outcome.value,
        session_wait_s=wait_s,
    )


def close(found: object, wanted: object) -> None:
    """Equal, but for what adding floats in another order changes."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            close(found[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert isinstance(found, (list, tuple))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-4)
    else:
        assert found == wanted


@settings(max_examples=20, deadline=None)
@given(st.lists(samples(), max_size=30), st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_parts_merge_to_the_whole(taken: list[Sample], places: list[int]) -> None:
    slo = Slo(ttft_s=0.01, e2e_s=10.0)
    whole = Tally(slo)
    parts = [Tally(slo) for _ in range(3)]
    for number, (sample, place) in enumerate(zip(taken, places, strict=False)):
        gaps_ns = [number * 1_000_000] * number * 4  # from none to thousands in all
        whole.add(sample, gaps_ns)
        parts[place].add(sample, gaps_ns)
    merged: Tally = pickle.loads(pickle.dumps(parts[0]))
    for part in parts[1:]:
        merged.merge(pickle.loads(pickle.dumps(part)))
    close(msgspec.to_builtins(merged.summary(WORKLOAD, 1)), msgspec.to_builtins(whole.summary(WORKLOAD, 1)))


@settings(max_examples=20, deadline=None)
@given(st.lists(samples(), max_size=30))
def test_samples_give_the_summary_again(taken: list[Sample]) -> None:
    """All but the gaps between chunks, which are in no sample, and the largest number in flight, which they tell."""
    tally = Tally()
    for sample in taken:
        tally.add(sample)
    found = summarize(taken, WORKLOAD)
    moments_s = [sample.began_s for sample in taken]
    in_flight = [sum(each.began_s <= at_s <= each.end_s for each in taken) for at_s in moments_s]
    assert found == tally.summary(WORKLOAD, max(in_flight, default=0))


def test_the_warm_up_is_in_no_figure_again() -> None:
    found = summarize([OK, msgspec.structs.replace(OK, is_warmup=True, due_s=0.0)], Workload())
    assert (found.sent, found.warmup, found.target) == (1, 1, None)


@given(VALUES)
def test_a_cdf_is_short_and_rises_to_one(values_s: list[float]) -> None:
    histogram = Histogram()
    histogram.extend(values_s)
    cdf = histogram.cdf()
    assert cdf is not None
    assert len(cdf.values_s) == len(cdf.shares) <= CDF_POINTS
    assert cdf.values_s == sorted(cdf.values_s)
    assert cdf.shares == sorted(cdf.shares)
    assert (cdf.shares[0], cdf.shares[-1]) == (0.0, 1.0)
    assert cdf.values_s[-1] == pytest.approx(max(values_s), rel=1e-4)
    for value_s, share in zip(cdf.values_s[1:], cdf.shares[1:], strict=True):
        if value_s < 1e5:
            below = sum(each <= value_s * 1.0001 for each in values_s) / len(values_s)
            assert below >= share - 1e-5


def test_the_last_seconds() -> None:
    tally = Tally()
    assert tally.recent(5.0) == Recent(None, None, None)
    for n in range(100):  # one ends each second, and each was slower to begin
        tally.add(msgspec.structs.replace(OK, sent_s=float(n), e2e_s=1.0, ttft_s=n / 100, dispatch_lag_s=n / 1000))
    assert tally.recent(100.0) == Recent(0.94, 0.99, 0.099)
    assert tally.recent(1e6) == Recent(None, None, None)


def test_shards_of_a_run_add_up() -> None:
    sender = SenderFacts(
        name="a:1", host="a", sent=1, dispatch_lag_s=None, wake_lag_s=None, cpu_share=None, stall_max_s=None
    )
    one = msgspec.structs.replace(WORKLOAD, rows_read=5, unsent=1, senders=(sender,))
    two = msgspec.structs.replace(WORKLOAD, rows_read=7, stopped_by="row 8", is_interrupted=True)
    both = merge_workloads([one, two])
    assert both == msgspec.structs.replace(
        WORKLOAD, rows_read=12, unsent=1, senders=(sender,), stopped_by="row 8", is_interrupted=True
    )
    with pytest.raises(ValueError, match="expected shards of one run, got other, r"):
        merge_workloads([one, msgspec.structs.replace(two, run_id="other")])


SERVER = ServerFacts(
    urls=("http://h/metrics",), scrapes=0, failed_scrapes=3, error="http://h/metrics: HTTP 404", kv_max=None,
    kv_mean=None, running_max=None, waiting_max=None, preemptions=None, prefix_hit_share=None, prompt_tokens=None,
    generation_tokens=None, over_time=None,
)  # fmt: skip


def shown(summary: Summary) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(summary))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_report_says_goodput_classes_server_and_verdict() -> None:
    tally = Tally(Slo(ttft_s=0.1))
    for sample in (OK, REFUSED, msgspec.structs.replace(REFUSED, failure_class="timeout_head")):
        tally.add(sample)
    summary = msgspec.structs.replace(
        tally.summary(WORKLOAD, 1), server=SERVER, verdict="invalid", reasons=("so [it] is",)
    )
    text = shown(summary)
    assert "failures: 1 connect, 1 timeout_head" in text
    assert "goodput   0 % of all requests, 0.00 req/s: ttft <= 0.1 s (missed by 100 % of the ok)" in text
    assert "server    no metrics: http://h/metrics: HTTP 404" in text
    lines = text.rstrip().splitlines()
    assert lines[-2].startswith("verdict   INVALID: the replay was the bottleneck")
    assert lines[-1].strip() == "so [it] is"
    assert "KV cache" not in text


def test_a_report_from_samples_alone_says_what_it_is() -> None:
    text = shown(summarize([OK], Workload()))
    assert "run (unnamed), from its samples" in text
    assert "None" not in text


def test_lists_of_numbers_are_a_line_of_the_json() -> None:
    summary = summary_of(OK, REFUSED)
    text = summary_json(summary)
    assert msgspec.json.decode(text, type=Summary) == summary
    assert b'"offered": [ 0, 1, 0, 0, 1 ]' in text
    assert b'"ttft_p99_s": [ null, 0.' in text


def test_live_lines_say_the_rates_of_the_last_seconds() -> None:
    console = Console(file=io.StringIO(), width=40)
    with progress_shown(console) as show:
        first = Progress(0.0, 0, 0, 0, 0, False)
        for second in range(41):
            show(replace(first, elapsed_s=float(second), sent=second * 7, ok=second * 5, failed=second // 20,
                         recent=Recent(0.05, 0.25, 0.001)))  # fmt: skip
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1] == (
        "20 s: 140 sent, 100 ok, 1 failed, 0 in flight; last 10 s: 7.0 sent/s, 5.1 ended/s, "
        "first token p50 50.00 ms, p99 250 ms, 1 failed, lag up to 1.00 ms"
    )
    assert len(lines) == 4


def test_live_lines_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with progress_shown(console) as show:
        show(Progress(None, 0, 0, 0, 0, False))
        show(Progress(1.0, 3, 2, 0, 1, False, Recent(None, None, None)))
        show(Progress(2.0, 6, 4, 0, 2, False, Recent(0.1, 0.2, 0.0)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2 s: 6 sent, 4 ok, 0 failed, 2 in flight" in text
    assert "last 1 s: 3.0 sent/s, 2.0 ended/s, first token p50 100 ms, p99 200 ms" in text
