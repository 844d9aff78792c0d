"""No original name survives, and what rows share stays shared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.anonymize import _ENDPOINTS, KEY_BYTES, Anonymizer
from traces.batch import SCHEMA, batch_from_records, records_from_batch
from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

KEY = bytes(range(KEY_BYTES))
CANARY = "canary-"
ROW = TraceRecord(
    f"{CANARY}request", 1_700_000_061.75, f"{CANARY}request", 2.5, f"{CANARY}model", 10, 20, LogType.CONVERSATION,
    Outcome.TRUNCATED, f"{CANARY}client", f"{CANARY}served", 200, "overloaded", 0.1, 0.02, 0.3,
    f"/v1/files/{CANARY}file", True, f"http://{CANARY}upstream", 2, "length", 3, 99, TokenSource.USAGE, (7, 8),
    Origin.SHADOW, f"{CANARY}run", f"{CANARY}primary", f"{CANARY}tenant", f"{CANARY}gateway", f"{CANARY}rule",
    f"{CANARY}class", 0.5,
)  # fmt: skip


def anonymized(rows: Sequence[TraceRecord], anonymizer: Anonymizer | None = None, size: int = 100) -> list[TraceRecord]:
    anonymizer = anonymizer or Anonymizer(KEY)
    batch = batch_from_records(rows)
    return [row for part in batch.iter_slices(size) for row in records_from_batch(anonymizer(part))]


def test_what_becomes_of_each_field() -> None:
    (row,) = anonymized([ROW], Anonymizer(KEY, hide_models=True, coarsen_s=60, shift_days=-7))
    assert CANARY not in json.dumps(
        [str(value) for value in row.__struct_fields__ and [getattr(row, n) for n in row.__struct_fields__]]
    )
    names = {row.request_id, row.client_request_id, row.run_id, row.shadow_of, row.tenant}
    assert len(names) == 5
    assert {len(name) for name in names if name is not None} == {32}
    assert row == TraceRecord(
        row.request_id, 1_700_000_040.0 - 7 * 86_400, row.request_id, 2.5, "model-1", 10, 20, LogType.CONVERSATION,
        Outcome.TRUNCATED, row.client_request_id, "model-2", 200, "overloaded", 0.1, 0.02, 0.3, "/other", True, None, 2,
        "length", 3, 99, TokenSource.USAGE, row.prefix_blocks, Origin.SHADOW, row.run_id, row.shadow_of, row.tenant,
        agreement=0.5,
    )  # fmt: skip
    assert row.prefix_blocks is not None
    assert len({*row.prefix_blocks, 7, 8}) == 4


def test_models_are_kept_unless_asked_otherwise() -> None:
    (row,) = anonymized([ROW])
    assert (row.model, row.served_model) == (ROW.model, ROW.served_model)


@pytest.mark.parametrize("endpoint", _ENDPOINTS)
def test_the_apis_own_endpoints_stay(endpoint: str) -> None:
    (row,) = anonymized([TraceRecord("a", 0.0, endpoint=endpoint)])
    assert row.endpoint == endpoint


def test_another_key_another_pseudonym() -> None:
    first, second = (anonymized([ROW], Anonymizer(bytes([n]) * KEY_BYTES))[0] for n in (1, 2))
    for name in ("request_id", "session_id", "client_request_id", "run_id", "shadow_of", "tenant", "prefix_blocks"):
        assert getattr(first, name) != getattr(second, name)


def test_a_field_of_tomorrow_is_left_out() -> None:
    batch = batch_from_records([ROW]).with_columns(secret=pl.lit("x"))
    assert Anonymizer(KEY)(batch).columns == list(SCHEMA)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"coarsen_s": -1.0}, "coarsen: expected 0 to 86400 seconds, got -1"), ({"coarsen_s": 86_401.0}, "got 86401")],
)
def test_wrong_options(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Anonymizer(KEY, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key: expected 32 bytes, got 3"):
        Anonymizer(b"abc")


_some_rows = st.lists(
    st.builds(
        TraceRecord,
        st.sampled_from(["a", "b", "c", "d", "e", "\N{PILE OF POO}"]),
        st.floats(0, 1e6).map(lambda at: round(at, 6)),
        session_id=st.sampled_from([None, "a", "b", "s"]),
        tenant=st.sampled_from([None, "a", "t"]),
        model=st.sampled_from([None, "m", "n"]),
        prefix_blocks=st.none() | st.lists(st.integers(0, 3), max_size=4).map(tuple),
    ),
    max_size=12,
).map(lambda rows: sorted(rows, key=lambda row: row.received_at))


@given(_some_rows, st.integers(1, 5), st.sampled_from([0.0, 1.0, 60.0]))
def test_structure_survives(rows: list[TraceRecord], size: int, coarsen_s: float) -> None:
    """Who shares an id, a session, a tenant or a block; the order; gaps but for the coarsening; however it is cut."""
    anonymizer = Anonymizer(KEY, coarsen_s=coarsen_s, hide_models=True)
    found = anonymized(rows, anonymizer, size)
    assert found == anonymized(rows, Anonymizer(KEY, coarsen_s=coarsen_s, hide_models=True))
    assert [row.received_at for row in found] == sorted(row.received_at for row in found)
    for (a, b), (x, y) in zip(itertools.combinations(rows, 2), itertools.combinations(found, 2), strict=True):
        assert abs((y.received_at - x.received_at) - (b.received_at - a.received_at)) <= coarsen_s
        for name in ("request_id", "session_id", "tenant", "model", "prefix_blocks"):
            assert (getattr(a, name) == getattr(b, name)) == (getattr(x, name) == getattr(y, name))
        assert (a.request_id == b.session_id) == (x.request_id == y.session_id)
    assert [row.prefix_blocks and len(row.prefix_blocks) for row in rows] == [
        row.prefix_blocks and len(row.prefix_blocks) for row in found
    ]
