"""The table of labels: what is counted is read back, however many names come; and the exemplars."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from proxy.series import (
    MAX_MODELS,
    MAX_UPSTREAMS,
    OTHER,
    ROW_SLOTS,
    ROWS,
    TOKEN_BUCKETS,
    TPOT_BUCKETS_S,
    Labels,
    Rows,
    SeriesTable,
    add_rows,
    column,
    fold,
    series_metrics,
)
from proxy.telemetry import WORKER_COUNTERS, CountersReader, WorkerMetrics, all_worker_metrics
from storage.counters import read_blocks, trim_counters
from storage.journal import JournalWriter
from traces.record import Outcome, TraceRecord

ID = "01a1fde2-4089-79ca-a20c-00000000000a"
ID_2 = "01a1fde2-4089-79ca-a20c-00000000000b"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def record(
    model: str | None = "m", upstream: str | None = "u", outcome: Outcome = Outcome.OK, request_id: str = ID,
    at_s: float = 1.7e9, elapsed_s: float = 0.5, ttft_s: float | None = None, tokens: int | None = None,
    tpot_s: float | None = None,
) -> TraceRecord:  # fmt: skip
    return TraceRecord(
        request_id, at_s, elapsed_s=elapsed_s, model=model, outcome=outcome, ttft_s=ttft_s, upstream=upstream,
        request_tokens=tokens, response_tokens=tokens, tpot_s=tpot_s,
    )  # fmt: skip


def table() -> tuple[SeriesTable, memoryview]:
    slots = memoryview(bytearray(8 * (3 + ROWS * ROW_SLOTS))).cast("Q")
    return SeriesTable(slots, 3), slots


def read(slots: memoryview) -> Rows:
    rows: Rows = {}
    add_rows(rows, slots[3:])
    return Labels().bound(rows)


def requests(rows: Rows) -> dict[tuple[str, str, str], int]:
    return {key: sum(counts[: len(Outcome)]) for key, counts in rows.items()}


names = st.sampled_from(["a", "b", "mödel/1", "x" * 300, "with\0nul", "", OTHER, "c" * 191 + "é"])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["chat", "embeddings"]), st.none() | names, st.none() | st.sampled_from("uv"),
                          st.sampled_from(Outcome), st.none() | st.integers(0, 10**8), st.floats(0, 100))))  # fmt: skip
def test_nothing_is_lost(ended: list[tuple[str, str | None, str | None, Outcome, int | None, float]]) -> None:
    made, slots = table()
    for operation, model, upstream, outcome, tokens, tpot_s in ended:
        made.ended(record(model, upstream, outcome, tokens=tokens, tpot_s=tpot_s), operation, 0, 0, None)
    rows = read(slots)
    by_operation = fold(rows, keep=(0,))
    assert {key: sum(counts[:9]) for (key,), counts in by_operation.items()} == Counter(each[0] for each in ended)
    by_upstream = fold(rows, keep=(2,))
    assert {key: sum(counts[:9]) for (key,), counts in by_upstream.items()} == Counter(each[2] or "" for each in ended)
    for counts in fold(rows, keep=()).values():
        for place, outcome in enumerate(Outcome):
            assert counts[place] == sum(each[3] is outcome for each in ended)
        buckets, total = column(counts, "response_tokens", TOKEN_BUCKETS)
        known = [each[4] for each in ended if each[4] is not None]
        assert (sum(buckets), total) == (len(known), sum(known))
        buckets, total = column(counts, "tpot", TPOT_BUCKETS_S)
        assert sum(buckets) == len(ended)
        assert total / 1e6 == pytest.approx(sum(each[5] for each in ended), abs=1e-5 * (1 + len(ended)))


def test_a_model_is_told_apart_once_it_was_answered() -> None:
    made, slots = table()
    for outcome in (Outcome.INVALID_REQUEST, Outcome.CONNECT_ERROR, Outcome.OK, Outcome.CLIENT_GONE):
        made.ended(record("m", "u", outcome), "chat", 0, 0, None)
    made.ended(record(None, None, Outcome.INVALID_REQUEST), "other", 0, 0, None)
    assert requests(read(slots)) == {("chat", OTHER, "u"): 2, ("chat", "m", "u"): 2, ("other", "", ""): 1}


def test_too_many_names_are_one_other() -> None:
    made, slots = table()
    for _ in range(2):
        for number in range(3 * MAX_MODELS):
            made.ended(record(f"m{number}"), "chat", 0, 0, None)
    found = requests(read(slots))
    assert found.pop(("chat", OTHER, "u")) == 2 * 2 * MAX_MODELS
    assert found == {("chat", f"m{number}", "u"): 2 for number in range(MAX_MODELS)}


def test_a_full_table_counts_on_in_its_first_row() -> None:
    made, slots = table()
    for number in range(2 * ROWS):
        made.ended(record("m", f"u{number}"), "chat", 0, 0, None)
    rows: Rows = {}
    add_rows(rows, slots[3:])
    assert len(rows) == ROWS
    assert requests(rows)[OTHER, OTHER, ""] == ROWS + 1
    bounded = Labels().bound(rows)
    assert sum(requests(bounded).values()) == 2 * ROWS
    assert len({upstream for _, _, upstream in bounded}) == MAX_UPSTREAMS + 2  # and "other", and none


def test_labels_that_were_shown_stay() -> None:
    labels = Labels()
    one = [1] * 9
    first = {("chat", f"m{number}", "u"): one for number in range(MAX_MODELS)}
    assert labels.bound(first) == first
    older = {("chat", "of an older writer", "u"): one}
    assert labels.bound({**older, **first}) == {**first, ("chat", OTHER, "u"): one}


def test_a_table_goes_on_where_it_was() -> None:
    made, slots = table()
    for number in range(MAX_MODELS):
        made.ended(record(f"m{number}"), "chat", 0, 0, None)
    again = SeriesTable(slots, 3)
    again.ended(record("m3"), "chat", 0, 0, None)
    again.ended(record("one too many"), "chat", 0, 0, None)
    found = requests(read(slots))
    assert (found["chat", "m3", "u"], found["chat", OTHER, "u"], len(found)) == (2, 1, MAX_MODELS + 1)


def test_a_retired_writers_file_is_cut_and_counts_on(tmp_path: Path) -> None:
    reader = CountersReader(tmp_path)
    made = JournalWriter(tmp_path, "a", gateway="test", counter_names=WORKER_COUNTERS)
    WorkerMetrics(made.slots).ended(record(tokens=5), "chat")
    living = requests(reader.read().rows)
    made.close()
    (tmp_path / "retired").mkdir()
    path = tmp_path / "retired" / "a.counters"
    os.rename(made.directory / "counters", path)
    whole_bytes = path.stat().st_size
    before = reader.read().values
    trim_counters(path)
    assert path.stat().st_size < 20_000 < whole_bytes
    for each in (reader, CountersReader(tmp_path)):
        totals = each.read()
        assert requests(totals.rows) == living == {("chat", "m", "u"): 1}
        assert totals.values == before
    values, blocks = read_blocks(path)
    assert values["outcome_ok"] == 1
    assert len(blocks["series"]) < 3 * ROW_SLOTS


# As Prometheus reads it -----------------------------------------------------------------------------------------------


class _Once:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def scraped(journal: Path) -> dict[tuple[str, ...], tuple[float, dict[str, str] | None]]:
    """OpenMetrics samples, parsed: name and label values, in the order of the labels' names, to value and exemplar."""
    registry = CollectorRegistry()
    registry.register(_Once(list(all_worker_metrics(CountersReader(journal).read()))))
    text = exposition.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    return {
        (sample.name, *sample.labels.values()): (sample.value, sample.exemplar.labels if sample.exemplar else None)
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def test_exemplars_name_the_latest_request_or_trace(tmp_path: Path) -> None:
    made = JournalWriter(tmp_path, "a", gateway="test", counter_names=WORKER_COUNTERS)
    metrics = WorkerMetrics(made.slots)

    def of(name: str, bucket: str) -> dict[str, str] | None:
        return scraped(tmp_path)[f"burstgate_{name}_bucket", bucket][1]

    metrics.ended(record(ttft_s=0.04, elapsed_s=0.5), "chat")
    assert of("time_to_first_token_seconds", "0.05") == {"request_id": ID}
    assert of("time_to_first_token_seconds", "0.1") is None
    assert of("request_duration_seconds", "0.5") == {"request_id": ID}
    metrics.ended(record(request_id=ID_2, elapsed_s=0.5, at_s=1.7e9 + 0.2), "chat")
    assert of("request_duration_seconds", "0.5") == {"request_id": ID}  # too young to go
    metrics.ended(record(request_id=ID_2, elapsed_s=0.5, at_s=1.7e9 + 2), "chat")
    assert of("request_duration_seconds", "0.5") == {"request_id": ID_2}
    metrics.ended(record(elapsed_s=0.5, at_s=1.7e9 + 2.1), "chat", None, TRACE)
    metrics.ended(record(elapsed_s=0.5, at_s=1.7e9 + 9), "chat")
    assert of("request_duration_seconds", "0.5") == {"trace_id": TRACE}
    metrics.ended(record(elapsed_s=0.5, at_s=1.7e9 + 99), "chat")
    assert of("request_duration_seconds", "0.5") == {"request_id": ID}
    made.close()


def test_series_are_shown_by_model_and_by_upstream(tmp_path: Path) -> None:
    made = JournalWriter(tmp_path, "a", gateway="test", counter_names=WORKER_COUNTERS)
    metrics = WorkerMetrics(made.slots)
    metrics.ended(record("m", "u", ttft_s=0.2, tokens=3), "chat")
    metrics.ended(record("m", "v", Outcome.TRUNCATED, ttft_s=0.4), "chat")
    metrics.ended(record("m", "v"), "embeddings")
    found = {key: value for key, (value, _) in scraped(tmp_path).items()}
    made.close()
    assert found["burstgate_model_requests_total", "m", "ok"] == 2
    assert found["burstgate_model_requests_total", "m", "truncated"] == 1
    assert found["burstgate_upstream_requests_total", "ok", "v"] == 1
    assert found["burstgate_upstream_requests_total", "ok", "u"] == 1
    assert found["burstgate_model_tokens_total", "response", "m"] == 3
    assert found["burstgate_upstream_tokens_total", "response", "v"] == 0
    assert found["burstgate_model_time_to_first_token_seconds_count", "m"] == 2
    assert found["burstgate_upstream_time_to_first_token_seconds_sum", "v"] == pytest.approx(0.4)
    assert ("burstgate_upstream_requests_total", "truncated", "u") not in found


def test_a_scrape_of_full_tables_is_quick(tmp_path: Path) -> None:
    writers = []
    for name in "abcd":
        writers.append(JournalWriter(tmp_path, name, gateway="test", counter_names=WORKER_COUNTERS))
        metrics = WorkerMetrics(writers[-1].slots)
        for number in range(ROWS):
            metrics.ended(record(f"m{number % MAX_MODELS}", f"u{number // MAX_MODELS}", ttft_s=0.2, tokens=9), "chat")
    reader = CountersReader(tmp_path)
    registry = CollectorRegistry()

    class Live:
        def collect(self) -> list[Metric]:
            return list(all_worker_metrics(reader.read()))

    registry.register(Live())
    times_s = []
    for _ in range(5):
        start_s = time.thread_time()
        exposition.generate_latest(registry)  # type: ignore[no-untyped-call]
        times_s.append(time.thread_time() - start_s)
    print(f"{min(times_s) * 1e3:.1f} ms")
    for writer in writers:
        writer.close()
    assert min(times_s) < 0.15  # of one core; about 30 ms where nobody else works
    assert len(list(series_metrics(reader.read().rows))) == 6
