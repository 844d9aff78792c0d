"""Lines on standard error: what is in them, and how many there are when failures storm."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.logs import FailureLog, configure_logging, error_type_of
from proxy.settings import LogSettings
from tests.proxy.harness import JSON, Client, Upstream, chat_body, in_loop, plain, running
from traces.record import Outcome, TraceRecord


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    uvicorn = logging.getLogger("uvicorn.error")
    was = root.handlers[:], root.level, uvicorn.level
    yield
    root.handlers[:], root.level, uvicorn.level = was


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def failure(number: int = 0, outcome: Outcome = Outcome.UPSTREAM_ERROR) -> TraceRecord:
    return TraceRecord(f"id-{number}", 1.7e9, elapsed_s=1.25, model='a "model"\n', outcome=outcome, status=500,
                       error_type="InternalServerError", upstream="gpu-1", attempts=2)  # fmt: skip


def test_json_is_a_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", LogSettings(format="json"))
    log = logging.getLogger("burstgate.gateway")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("went %s", "wrong")
    log.warning("plain")
    log.info("not written")
    first, second = lines(capsys)
    assert first.pop("exception").endswith("ValueError: two\nlines")
    assert first.pop("time").endswith("Z")
    assert first.pop("pid") > 0
    assert first == {"level": "error", "process": "worker", "logger": "burstgate.gateway", "message": "went wrong"}
    assert second.keys() == {"time", "level", "process", "pid", "logger", "message"}


def test_text_is_as_it_was_and_can_be_changed_to_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (None, LogSettings(), LogSettings(format="json"), LogSettings()):
        configure_logging("worker", settings)
        logging.getLogger("burstgate").error("hello")
    texts = capsys.readouterr().err.splitlines()
    assert len(texts) == 4
    assert [" ERROR hello" in text for text in texts] == [True, True, False, True]
    assert json.loads(texts[2])["message"] == "hello"


@pytest.mark.parametrize(
    ("error_type", "expected"),
    [
        ("BadRequestError", "BadRequestError"),
        ("upstream_timeout", "upstream_timeout"),
        (None, "truncated"),
        ("", "truncated"),
        ("a sentence that may hold a prompt", "truncated"),
        ("x" * 65, "truncated"),
    ],
)
def test_error_types_are_names(error_type: str | None, expected: str) -> None:
    assert error_type_of(TraceRecord("i", 0.0, outcome=Outcome.TRUNCATED, error_type=error_type)) == expected


@in_loop
async def test_a_storm_of_failures_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", LogSettings(format="json"))
    failures = FailureLog(3)
    for number in range(50):
        failures.ended(failure(number, Outcome.UPSTREAM_ERROR if number % 5 else Outcome.CONNECT_ERROR))
    first = lines(capsys)
    assert [line["request_id"] for line in first] == ["id-0", "id-1", "id-2"]
    assert {key: first[1][key] for key in ("outcome", "status", "error_type", "model", "upstream", "elapsed_s")} == {
        "outcome": "upstream_error",
        "status": 500,
        "error_type": "InternalServerError",
        "model": 'a "model"\n',
        "upstream": "gpu-1",
        "elapsed_s": 1.25,
    }
    await asyncio.sleep(1.1)  # nothing more fails, and the rest is told all the same
    (rest,) = lines(capsys)
    assert rest["message"] == "47 more requests failed: 38 upstream_error, 9 connect_error"
    assert rest["failures"] == {"upstream_error": 38, "connect_error": 9}
    failures.ended(failure(60))
    assert [line["request_id"] for line in lines(capsys)] == ["id-60"]


@pytest.mark.parametrize(
    ("settings", "count"),
    [(LogSettings(), 0), (LogSettings(failures=True), 1), (LogSettings(format="json"), 1),
     (LogSettings(format="json", failures=False), 0)],
)  # fmt: skip
@in_loop
async def test_failed_requests_have_lines_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: LogSettings, count: int
) -> None:
    configure_logging("worker", settings)
    said = b'{"error": {"message": "canary", "type": "canary in a sentence"}}'
    async with (
        Upstream(plain(b'{"id": 1}'), plain(said, 500, JSON)) as upstream,
        running(tmp_path, upstream.url, log=settings) as bench,
    ):
        for _ in range(2):  # one that is well has none
            key = (b"authorization", b"Bearer canary")
            await bench.serve(Client(chat_body("canary"), headers=(JSON, key, (b"x-request-id", b"canary"))))
        record = bench.records()[-1]
        bench.gateway.apply(bench.gateway.settings.model_copy(update={"log": LogSettings()}))
        await bench.serve(Client(chat_body("canary")))
    written = capsys.readouterr().err
    assert len(written.splitlines()) == count
    assert "canary" not in written
    assert (record.request_id in written) is bool(count)


def test_a_line_needs_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", LogSettings(failures=True))
    FailureLog(1).ended(failure())
    assert "failed: upstream_error, status 500, InternalServerError, model 'a \"model\"\\n', upstream gpu-1" in (
        capsys.readouterr().err
    )
