"""What the processes write on standard error: a line an event, as text or as JSON; and a line a failed request.

A line of JSON has `time` (RFC 3339, UTC), `level`, `process`, `pid`, `logger`, `message`, `exception` where there is
one, and what the event adds. No line has a prompt, an answer, a header or a key in it.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import time
from collections import Counter
from typing import Any

import msgspec

from proxy.settings import LogSettings
from traces.record import TraceRecord

log = logging.getLogger("burstgate.requests")

_ERROR_TYPE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def error_type_of(record: TraceRecord) -> str:
    """A failure's kind in few words: the error's type where it is one name, else the outcome."""
    kind = record.error_type
    return kind if kind is not None and _ERROR_TYPE.fullmatch(kind) else record.outcome.value


class JsonFormatter(logging.Formatter):
    """A line of JSON an event."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The event as JSON."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(name: str, settings: LogSettings | None = None) -> None:
    """One line an event on standard error. Again: change to other settings."""
    # force: the handler of an earlier call goes.
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s burstgate {name}[%(process)d] %(levelname)s %(message)s",
        force=True,
    )
    if settings is not None and settings.format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter(name))
    # It reports every answer that a vanished upstream or client left unfinished; those are records, not errors.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


class FailureLog:
    """A line for each failed request, and no more than so many a second: the rest is counted in a line of its own."""

    WINDOW_S = 1.0

    def __init__(self, lines_per_s: int) -> None:
        self._lines_per_s = lines_per_s
        self._until_s = 0.0
        self._lines = 0
        self._rest: Counter[str] = Counter()

    def ended(self, record: TraceRecord) -> None:
        """A request failed."""
        now_s = time.monotonic()
        if now_s >= self._until_s:
            self._tell_rest()
            self._until_s = now_s + self.WINDOW_S
            self._lines = 0
        if self._lines < self._lines_per_s:
            self._lines += 1
            _write(record)
            return
        if not self._rest:
            asyncio.get_running_loop().call_later(self._until_s - now_s, self._tell_rest)
        self._rest[record.outcome.value] += 1

    def _tell_rest(self) -> None:
        if self._rest:
            rest, self._rest = self._rest, Counter()
            which = ", ".join(f"{count} {outcome}" for outcome, count in rest.most_common())
            fields = {"failures": dict(rest)}
            log.warning("%d more requests failed: %s", rest.total(), which, extra={"fields": fields})


def _write(record: TraceRecord) -> None:
    fields = {
        "request_id": record.request_id,
        "outcome": record.outcome.value,
        "status": record.status,
        "error_type": error_type_of(record),
        "model": record.model,
        "upstream": record.upstream,
        "attempts": record.attempts,
        "elapsed_s": round(record.elapsed_s or 0.0, 6),
    }
    log.warning(
        "request %s failed: %s, status %s, %s, model %r, upstream %s, after %.3f s",
        record.request_id, record.outcome.value, record.status, fields["error_type"], record.model,
        record.upstream, record.elapsed_s or 0.0, extra={"fields": fields},
    )  # fmt: skip
