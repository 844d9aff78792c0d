"""The control plane's routes for what was recorded: requests, histories, statistics, failures, downloads.

Each reads the database in a thread of its own turn; a database that is away is a 503. Nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import threading
import time
import zoneinfo
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import polars as pl
import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Query, Response
from fastapi.responses import StreamingResponse

from proxy.control_schema import answers
from proxy.settings import Settings
from storage.engine import open_engine
from storage.errors import DatabaseUnavailable, SchemaError
from storage.export import export
from storage.history import quantile_s, read_history
from storage.query import Filter, newest, read_batches
from traces.analysis import Options, Source, analyze_failures
from traces.codec import FORMATS, TraceClock
from traces.failures import FailureReport
from traces.record import LogType, Origin, Outcome, TraceRecord
from traces.summary import Summary, summarize

MAX_PAGE = 1000
MAX_ANALYZED_ROWS = 2_000_000
"""A statistic over more rows is a matter for `burstgate stats` or `analyze`: the control plane must stay small."""
_PIECE_BYTES = 256 * 1024


def _reply(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def selected(
    start: Annotated[float | None, Query(alias="from", description="epoch seconds, included")] = None,
    end: Annotated[float | None, Query(alias="to", description="epoch seconds, not included")] = None,
    model: Annotated[list[str] | None, Query()] = None,
    session: Annotated[list[str] | None, Query()] = None,
    outcome: Annotated[list[Outcome] | None, Query()] = None,
    origin: Annotated[list[Origin] | None, Query(description="default: client")] = None,
    log_type: Annotated[list[LogType] | None, Query()] = None,
    run_id: Annotated[list[str] | None, Query()] = None,
) -> Filter:
    """Which requests: repeated parameters are alternatives."""
    return Filter(
        start_s=start,
        end_s=end,
        models=tuple(model or ()),
        sessions=tuple(session or ()),
        outcomes=tuple(each.value for each in outcome or ()),
        origins=tuple(each.value for each in origin or ()) or ((Origin.CLIENT.value,) if not run_id else ()),
        log_types=tuple(each.value for each in log_type or ()),
        run_ids=tuple(run_id or ()),
    )


Selected = Annotated[Filter, Depends(selected)]


class Reader:
    """The database, for the control plane. It may not be there yet, or away."""

    def __init__(self, current: Callable[[], Settings]) -> None:
        self._current = current
        self._engine: sa.Engine | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def engine(self) -> Iterator[sa.Engine]:
        """Raises HTTPException 503 where the database can not be read."""
        try:
            with self._lock:
                if self._engine is None:
                    self._engine = open_engine(self._current().database)
            yield self._engine
        except (DatabaseUnavailable, SchemaError) as error:
            raise HTTPException(503, f"the database can not be read: {error}") from None

    def close(self) -> None:
        """Let go of its connections."""
        if self._engine is not None:
            self._engine.dispose()


def _stretch(start: float | None, end: float | None) -> tuple[float, float]:
    last = time.time() if end is None else end
    first = last - 3600 if start is None else start
    if not first < last:
        raise HTTPException(422, f"from: expected a time before to, got {first:g} and {last:g}")
    if not (first >= -62_135_596_800 and last <= 253_402_300_800):
        raise HTTPException(422, "from, to: expected epoch seconds in the years 1 to 9999")
    return first, last


RequestView: Any = msgspec.defstruct(
    "RequestView", [(each.name, each.type) for each in msgspec.structs.fields(TraceRecord)], frozen=True
)
"""A record by the names of its fields: TraceRecord itself is written as an array."""


class Point(msgspec.Struct, frozen=True):
    """One step of a history."""

    at: int
    """Its start, epoch seconds."""
    requests: int = 0
    failures: int = 0
    request_tokens: int = 0
    response_tokens: int = 0
    outcomes: dict[str, int] = {}
    ttft_s: tuple[float | None, ...] = ()
    """At the shares of `QUANTILES`; empty where nothing is known."""
    tpot_s: tuple[float | None, ...] = ()
    e2e_s: tuple[float | None, ...] = ()


QUANTILES = (0.5, 0.95, 0.99)


class Total(msgspec.Struct, frozen=True):
    """A model or an upstream over the whole stretch."""

    name: str
    requests: int
    failures: int
    response_tokens: int


class HistoryView(msgspec.Struct, frozen=True):
    """A stretch of time, in steps."""

    start: float
    end: float
    step_s: int
    quantiles: tuple[float, ...]
    points: tuple[Point, ...]
    """Those with requests, by time."""
    models: tuple[Total, ...]
    upstreams: tuple[Total, ...]


class FailuresView(msgspec.Struct, frozen=True):
    """Where requests fail, and of which trace."""

    source: Source
    failures: FailureReport


def history_view(
    engine: sa.Engine, start_s: float, end_s: float, points: int, origins: tuple[str, ...], models: tuple[str, ...]
) -> HistoryView:
    """The sums of a stretch as they are drawn. Raises DatabaseUnavailable."""
    found = read_history(engine, start_s, end_s, points=points, origins=origins, models=models)
    made: dict[int, dict[str, Any]] = {}
    sums = ("requests", "request_tokens", "response_tokens")
    failed = pl.when(pl.col("outcome") == Outcome.OK.value).then(0).otherwise(pl.col("requests"))
    counts = found.counts.with_columns(failures=failed)
    for at, outcome, *values in counts.group_by("at", "outcome").agg(pl.sum(*sums, "failures")).iter_rows():
        point = made.setdefault(at, {"outcomes": {}, **dict.fromkeys((*sums, "failures"), 0)})
        point["outcomes"][outcome] = values[0]
        for name, value in zip((*sums, "failures"), values, strict=True):
            point[name] += value
    buckets: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for at, kind, bucket, requests in found.latencies.iter_rows():
        buckets.setdefault((at, kind), []).append((bucket, requests))
    for (at, kind), counted in buckets.items():
        made.setdefault(at, {})[f"{kind}_s"] = tuple(quantile_s(counted, share) for share in QUANTILES)
    ranked = {
        kind: tuple(
            Total(name or "(unknown)", *values)
            for name, *values in counts.group_by(kind)
            .agg(pl.sum("requests", "failures", "response_tokens"))
            .sort(["requests", kind], descending=[True, False])
            .head(50)
            .iter_rows()
        )
        for kind in ("model", "upstream")
    }
    steps = tuple(Point(at=at, **values) for at, values in sorted(made.items()))
    return HistoryView(start_s, end_s, found.step_s, QUANTILES, steps, ranked["model"], ranked["upstream"])


def traces_router(reader: Reader) -> APIRouter:
    """`/api/v1/requests`, `history`, `stats`, `failures`, `export`."""
    router = APIRouter(prefix="/api/v1", tags=["traces"])

    def bounded(engine: sa.Engine, selection: Filter) -> Iterator[Any]:
        rows = 0
        for batch in read_batches(engine, selection):
            rows += batch.height
            if rows > MAX_ANALYZED_ROWS:
                raise HTTPException(
                    413, f"over {MAX_ANALYZED_ROWS:,} requests: choose a shorter time, or use the command line"
                )
            yield batch

    @router.get(
        "/requests",
        summary="Requests, newest first; go on with `before` and `before_id` of the last one",
        responses=answers(list[RequestView], 503),
    )
    def requests(
        selection: Selected,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        failures: Annotated[bool, Query(description="only those that did not end well")] = False,
        before: Annotated[float | None, Query(description="received_at of the last one seen")] = None,
        before_id: Annotated[str, Query(description="request_id of the last one seen")] = "",
    ) -> Response:
        with reader.engine() as engine:
            return _reply(newest(engine, selection, limit, failures=failures, before=before, before_id=before_id))

    @router.get("/requests/{request_id}", summary="One request, whole", responses=answers(RequestView, 404, 503))
    def request(request_id: str) -> Response:
        with reader.engine() as engine:
            found = newest(engine, Filter(), 1, request_id=request_id)
        if not found:
            raise HTTPException(404, f"no request '{request_id}' in the database")
        return _reply(found[0])

    @router.get(
        "/history", summary="Requests, failures, tokens and latencies over time", responses=answers(HistoryView, 503)
    )
    def history(
        start: Annotated[float | None, Query(alias="from", description="default: an hour before `to`")] = None,
        end: Annotated[float | None, Query(alias="to", description="default: now")] = None,
        points: Annotated[int, Query(ge=1, le=2000)] = 300,
        origin: Annotated[list[Origin] | None, Query(description="default: client")] = None,
        model: Annotated[list[str] | None, Query()] = None,
    ) -> Response:
        first, last = _stretch(start, end)
        origins = tuple(each.value for each in origin or (Origin.CLIENT,))
        with reader.engine() as engine:
            return _reply(history_view(engine, first, last, points, origins, tuple(model or ())))

    @router.get(
        "/stats",
        summary="Requests, rates, tokens and failures, as `burstgate stats`",
        responses=answers(Summary, 413, 503),
    )
    def stats(selection: Selected) -> Response:
        with reader.engine() as engine:
            return _reply(summarize(bounded(engine, selection)))

    @router.get(
        "/failures", summary="Where requests fail, as `burstgate failures`", responses=answers(FailuresView, 413, 503)
    )
    def failures(
        selection: Selected, availability: Annotated[float, Query(gt=0, lt=1, description="objective")] = 0.999
    ) -> Response:
        with reader.engine() as engine:
            source, report = analyze_failures(bounded(engine, selection), Options(slo=availability))
        return _reply(FailuresView(source, report))

    @router.get(
        "/export",
        summary="A trace as a download",
        response_class=StreamingResponse,
        responses=answers(str, 503, media="application/octet-stream"),
    )
    async def download(
        selection: Selected,
        format: Annotated[str, Query(description=", ".join(FORMATS))] = "burstgpt",
        timezone: str = "UTC",
        failures: Literal["keep", "drop"] = "keep",
    ) -> StreamingResponse:
        if format not in FORMATS:
            raise HTTPException(422, f"format: expected one of {', '.join(FORMATS)}, got '{format}'")
        try:
            TraceClock(datetime.date(1970, 1, 1), timezone)
        except (ValueError, zoneinfo.ZoneInfoNotFoundError, OSError):
            raise HTTPException(422, f"timezone: expected an IANA time zone, got '{timezone}'") from None
        suffix = {"parquet": "parquet"}.get(format, "jsonl" if "json" in format or format == "mooncake" else "csv")
        pieces = _exported(reader, selection, format, timezone, failures)
        first = await anext(pieces, b"")  # a database that is away is an answer of its own
        return StreamingResponse(
            _from(first, pieces),
            media_type="application/octet-stream",
            headers={"content-disposition": f'attachment; filename="burstgate.{suffix}"'},
        )

    return router


async def _from(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _exported(
    reader: Reader, selection: Filter, format: str, timezone: str, failures: Literal["keep", "drop"]
) -> AsyncIterator[bytes]:
    """What `export` writes, piece by piece through a pipe, so that nothing of it is kept here.

    A client that leaves breaks the pipe, and with it the export.
    """
    source, sink = os.pipe()
    problems: list[BaseException] = []

    def write() -> None:
        try:
            with os.fdopen(sink, "wb") as stream, reader.engine() as engine:
                export(engine, stream, selection, format=format, timezone=timezone, failures=failures)
        except BrokenPipeError:
            pass
        except Exception as error:  # noqa: BLE001 (raised where it is read)
            problems.append(error)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        while piece := await asyncio.to_thread(os.read, source, _PIECE_BYTES):
            yield piece
    finally:
        os.close(source)
        await asyncio.to_thread(writer.join)
    if problems:
        raise problems[0]
