"""Replay runs in the database: what was asked, what came out, and their requests as rows with `origin` replay.

A run is stored whole or not at all, in one transaction, under its `run_id`, once. Options and summary are JSON texts
that their owner reads; the database knows of them only when the run was, at what target, and how it was judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import sqlalchemy as sa

from storage.engine import database_errors
from storage.schema import runs
from storage.sink import row_of, transaction
from traces.record import TraceRecord

BATCH_ROWS = 10_000


class RunConflict(ValueError):
    """The run id belongs to a run that is stored already; choose another."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run. started_at: schedule zero, epoch seconds. options, summary: JSON texts."""

    run_id: str
    started_at: float
    target: str
    model: str
    sent: int
    ok: int
    verdict: str
    options: str
    summary: str


def check_new(engine: sa.Engine, run_id: str) -> None:
    """Raises RunConflict when a run of this id is stored, DatabaseUnavailable."""
    with database_errors(engine), engine.connect() as connection:
        if connection.execute(sa.select(runs.c.run_id).where(runs.c.run_id == run_id)).first() is not None:
            raise RunConflict(f"run id {run_id!r}: expected a new one, a run of this id is stored already")


def store_run(engine: sa.Engine, run: Run, records: Iterable[TraceRecord]) -> int:
    """Stores a run and its requests; returns how many of the requests were new.

    Raises RunConflict, DatabaseUnavailable and whatever `records` raises; then nothing was stored.
    """
    with database_errors(engine), transaction(engine) as active:
        values: tuple[Any, ...] = (
            run.run_id, run.started_at, run.target, run.model, run.sent, run.ok, run.verdict, run.options, run.summary
        )  # fmt: skip
        added = active.execute(
            "INSERT INTO runs (run_id, started_at, target, model, sent, ok, verdict, options, summary)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run_id) DO NOTHING",
            values,
        )
        if not added:
            raise RunConflict(f"run id {run.run_id!r}: expected a new one, a run of this id is stored already")
        rest = iter(records)
        inserted = 0
        while rows := [row_of(record) for record in islice(rest, BATCH_ROWS)]:
            inserted += active.insert(rows)
        return inserted


def read_runs(engine: sa.Engine, run_id: str | None = None) -> list[Run]:
    """The stored runs, the newest first; of one id. Raises DatabaseUnavailable."""
    statement = sa.select(runs).order_by(runs.c.started_at.desc(), runs.c.run_id)
    if run_id is not None:
        statement = statement.where(runs.c.run_id == run_id)
    with database_errors(engine), engine.connect() as connection:
        return [
            Run(**{**row, "options": json.dumps(row["options"]), "summary": json.dumps(row["summary"])})
            for row in connection.execute(statement).mappings()
        ]
