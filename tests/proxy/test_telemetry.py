from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric

from proxy.series import E2E_BUCKETS_S, TTFT_BUCKETS_S, Rows, add_rows
from proxy.telemetry import (
    GAUGES,
    WORKER_COUNTERS,
    WorkerMetrics,
    add_histograms,
    sum_counters,
    worker_metrics,
)
from storage.counters import places, slot_count
from storage.journal import JOURNAL_COUNTERS, JournalWriter
from traces.record import Outcome, TraceRecord

NAMES = JOURNAL_COUNTERS + WORKER_COUNTERS
OK = Outcome.OK


def samples(values: dict[str, int]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample as it is scraped: (name, label values) to value."""
    metrics: list[Metric] = list(worker_metrics(values))
    assert len({metric.name for metric in metrics}) == len(metrics)
    assert all(metric.documentation for metric in metrics)
    return {
        (sample.name, tuple(sample.labels.values())): float(sample.value)
        for metric in metrics
        for sample in metric.samples
    }


def counted(*ended: tuple[Outcome, int | None, int | None, float | None, float]) -> dict[str, int]:
    slots = memoryview(bytearray(8 * slot_count(NAMES))).cast("Q")
    metrics = WorkerMetrics(slots)
    for each in ended:
        metrics.ended(record(*each))
    places_of = dict(places(NAMES))
    values = {name: slots[place] for name, place in places_of.items()}
    rows: Rows = {}
    add_rows(rows, slots[places_of["series"] :])
    add_histograms(values, rows)
    return values


def record(
    outcome: Outcome, request_tokens: int | None, response_tokens: int | None, ttft_s: float | None, elapsed_s: float
) -> TraceRecord:
    return TraceRecord(
        "01a1fde2-4089-79ca-a20c-000000000000", 1.7e9, elapsed_s=elapsed_s, request_tokens=request_tokens,
        response_tokens=response_tokens, outcome=outcome, ttft_s=ttft_s,
    )  # fmt: skip


def test_what_is_counted_is_shown() -> None:
    found = samples(
        counted((OK, 10, 5, 0.02, 0.5), (OK, 7, None, None, 2.0), (Outcome.CLIENT_GONE, None, None, None, 1.0))
    )
    assert found["burstgate_requests_total", ("ok",)] == 2
    assert found["burstgate_requests_total", ("client_gone",)] == 1
    assert found["burstgate_requests_total", ("truncated",)] == 0
    assert found["burstgate_tokens_total", ("request",)] == 17
    assert found["burstgate_tokens_total", ("response",)] == 5
    assert found["burstgate_usage_unknown_total", ()] == 2
    assert found["burstgate_time_to_first_token_seconds_count", ()] == 1
    assert found["burstgate_time_to_first_token_seconds_sum", ()] == pytest.approx(0.02, abs=1e-6)
    assert found["burstgate_request_duration_seconds_count", ()] == 3
    assert found["burstgate_request_duration_seconds_sum", ()] == pytest.approx(3.5, abs=3e-6)


def test_every_slot_is_shown_under_some_name() -> None:
    before = samples(dict.fromkeys(NAMES, 0))
    hidden = {"ended"}  # the doctor's business
    for name in [name for name in NAMES if not name.endswith("]")]:  # the blocks are proxy/series.py's
        assert (samples({**dict.fromkeys(NAMES, 0), name: 1}) != before) is (name not in hidden), name


def test_every_outcome_is_shown_from_the_start() -> None:
    found = samples({})
    assert {labels[0] for name, labels in found if name == "burstgate_requests_total"} == {
        each.value for each in Outcome
    }
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("bounds", [TTFT_BUCKETS_S, E2E_BUCKETS_S])
def test_bounds_belong_to_their_bucket(bounds: tuple[float, ...]) -> None:
    is_ttft = bounds is TTFT_BUCKETS_S
    name = "burstgate_time_to_first_token_seconds" if is_ttft else "burstgate_request_duration_seconds"
    for bound in bounds:
        found = samples(counted((OK, 1, 1, bound if is_ttft else None, 0.0 if is_ttft else bound)))
        assert found[f"{name}_bucket", (f"{bound:g}",)] == 1  # Prometheus: le is "less or equal"
        lower = [each for each in bounds if each < bound]
        assert all(found[f"{name}_bucket", (f"{each:g}",)] == 0 for each in lower)


times = st.floats(0, 1000)


@settings(deadline=None)
@given(st.lists(st.tuples(st.none() | times, times), max_size=20))
def test_histograms_count_and_sum_all(durations: list[tuple[float | None, float]]) -> None:
    found = samples(counted(*((OK, 1, 1, ttft_s, e2e_s) for ttft_s, e2e_s in durations)))
    ttfts_s = [ttft_s for ttft_s, _ in durations if ttft_s is not None]
    for name, bounds, values in (
        ("burstgate_time_to_first_token_seconds", TTFT_BUCKETS_S, ttfts_s),
        ("burstgate_request_duration_seconds", E2E_BUCKETS_S, [e2e_s for _, e2e_s in durations]),
    ):
        assert found[f"{name}_count", ()] == found[f"{name}_bucket", ("+Inf",)] == len(values)
        assert found[f"{name}_sum", ()] == pytest.approx(sum(values), abs=1e-6 * (len(values) + 1))
        for bound in bounds:
            assert found[f"{name}_bucket", (f"{bound:g}",)] == sum(value <= bound for value in values)


# Sums over writers ----------------------------------------------------------------------------------------------------


def writer(journal: Path, name: str, in_flight: int, tokens: int) -> JournalWriter:
    made = JournalWriter(journal, name, gateway="test", counter_names=WORKER_COUNTERS)
    metrics = WorkerMetrics(made.counters.slots)
    for _ in range(in_flight):
        metrics.started()
    metrics.ended(record(OK, tokens, 0, None, 0.1))
    return made


def test_counters_of_all_writers_and_gauges_of_the_living(tmp_path: Path) -> None:
    living, dead, finished = (writer(tmp_path, name, 3, tokens) for name, tokens in (("a", 1), ("b", 10), ("c", 100)))
    dead.close()  # not yet retired: its database may be away for long
    finished.close()
    (tmp_path / "retired").mkdir()
    (finished.directory / "counters").rename(tmp_path / "retired" / "c.counters")
    shutil.rmtree(finished.directory)
    total = sum_counters(tmp_path)
    assert (total["request_tokens"], total["outcome_ok"]) == (111, 3)
    assert total["in_flight"] == 3  # the dead hold none
    assert frozenset(NAMES) >= GAUGES
    living.close()


def test_writer_that_is_being_retired_counts_once(tmp_path: Path) -> None:
    dead = writer(tmp_path, "a", 0, 7)
    dead.close()
    (tmp_path / "retired").mkdir()
    os.link(dead.directory / "counters", tmp_path / "retired" / "a.counters")
    assert sum_counters(tmp_path)["request_tokens"] == 7
    (dead.directory / "counters").unlink()
    assert sum_counters(tmp_path)["request_tokens"] == 7


def test_files_that_are_none_count_nothing(tmp_path: Path) -> None:
    made = writer(tmp_path, "a", 1, 7)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "counters").write_bytes(b"garbage")
    (tmp_path / "c").mkdir()
    (tmp_path / "recorder.lock").touch()
    (tmp_path / "retired").mkdir()
    (tmp_path / "retired" / "d.counters").write_bytes(b'{"format": "burstgate-counters", "names": 7}')
    assert sum_counters(tmp_path)["request_tokens"] == 7
    assert sum_counters(tmp_path / "nowhere") == {}
    made.close()


def test_slots_of_another_version_are_still_summed(tmp_path: Path) -> None:
    made = writer(tmp_path, "a", 0, 7)
    other = JournalWriter(tmp_path, "b", gateway="test", counter_names=("request_tokens", "of_the_future"))
    other.counters.slots[len(JOURNAL_COUNTERS)] = 5
    assert sum_counters(tmp_path)["request_tokens"] == 12
    made.close()
    other.close()
