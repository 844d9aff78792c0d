"""The control plane's view of what was recorded, over HTTP, against the rows themselves."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from proxy.settings import Settings
from storage.engine import open_engine, upgrade
from storage.export import export
from storage.query import Filter
from storage.sink import open_sink
from tests.proxy.test_control import serving
from traces.record import Origin, Outcome, TraceRecord

START_S = 1_763_683_200.0


def rows() -> list[TraceRecord]:
    made = []
    for number in range(300):
        stamp_s = START_S + 10 * number
        made.append(
            TraceRecord(
                f"{int(stamp_s * 1000):012x}"[:8]
                + "-"
                + f"{int(stamp_s * 1000):012x}"[8:]
                + f"-7000-8000-{number:012x}",
                stamp_s,
                elapsed_s=0.5,
                model="ab"[number % 2],
                upstream="u",
                request_tokens=10,
                response_tokens=5,
                outcome=Outcome.UPSTREAM_ERROR if number % 10 == 0 else Outcome.OK,
                ttft_s=0.1,
                origin=Origin.REPLAY if number >= 280 else Origin.CLIENT,
                run_id="r" if number >= 280 else None,
            )
        )
    return made


ROWS = rows()
CLIENT = ROWS[:280]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("control")
    settings = Settings(upstreams=("http://user-a:8000",), data_dir=folder, gateway="test")
    engine = open_engine(settings.database)
    upgrade(engine)
    open_sink(engine).commit(ROWS)
    engine.dispose()
    return settings


@pytest.fixture(scope="module")
def client(recorded: Settings) -> Iterator[httpx.Client]:
    with serving(recorded) as opened:
        opened.base_url = opened.base_url.join("/api/v1/")
        yield opened


def good(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_pages_go_back_in_time_and_hold_every_request_once(client: httpx.Client) -> None:
    seen: list[dict[str, Any]] = []
    place: dict[str, Any] = {}
    while page := good(client.get("requests", params={"limit": 77, **place})):
        seen += page
        place = {"before": page[-1]["received_at"], "before_id": page[-1]["request_id"]}
    assert [row["request_id"] for row in seen] == [row.request_id for row in reversed(CLIENT)]
    assert seen[0]["model"] == "b"


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"failures": True}, [row for row in CLIENT if row.outcome is not Outcome.OK]),
        ({"model": "a", "to": START_S + 100}, [row for row in CLIENT[:10] if row.model == "a"]),
        ({"origin": "replay"}, ROWS[280:]),
        ({"run_id": "r"}, ROWS[280:]),
        ({"origin": ["client", "replay"], "from": START_S + 2700}, ROWS[270:]),
        ({"outcome": "client_gone"}, []),
    ],
)
def test_requests_are_chosen(client: httpx.Client, params: dict[str, Any], wanted: list[TraceRecord]) -> None:
    found = good(client.get("requests", params={"limit": 1000, **params}))
    assert [row["request_id"] for row in found] == [row.request_id for row in reversed(wanted)]


def test_one_request_whole(client: httpx.Client) -> None:
    found = good(client.get(f"requests/{ROWS[290].request_id}"))
    assert (found["received_at"], found["origin"], found["ttft_s"]) == (ROWS[290].received_at, "replay", 0.1)
    missing = client.get("requests/nobody")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "no request 'nobody' in the database")


def test_a_history_counts_what_is_there(client: httpx.Client) -> None:
    found = good(client.get("history", params={"from": START_S, "to": START_S + 3600, "points": 60}))
    assert found["step_s"] == 60
    assert sum(point["requests"] for point in found["points"]) == 280
    assert sum(point["failures"] for point in found["points"]) == 28
    assert sum(point["request_tokens"] for point in found["points"]) == 2800
    assert found["points"][0]["outcomes"] == {"ok": 5, "upstream_error": 1}
    assert all(each["ttft_s"][0] == pytest.approx(0.1, rel=0.2) for each in found["points"])
    assert [(each["name"], each["requests"]) for each in found["models"]] == [("a", 140), ("b", 140)]
    of_one = good(client.get("history", params={"from": START_S, "to": START_S + 3600, "model": "a"}))
    assert sum(point["requests"] for point in of_one["points"]) == 140


def test_statistics_are_those_of_the_command_line(client: httpx.Client) -> None:
    assert good(client.get("stats"))["requests"] == 280
    failures = good(client.get("failures"))
    assert failures["source"]["requests"] == 280
    assert failures["failures"]["total"]["failures"] == 28


@pytest.mark.parametrize("format", ["burstgpt", "jsonl", "parquet"])
def test_a_download_is_the_export(client: httpx.Client, recorded: Settings, tmp_path: Path, format: str) -> None:
    answer = client.get("export", params={"format": format, "from": START_S + 500})
    assert answer.status_code == 200
    engine = open_engine(recorded.database)
    export(engine, tmp_path / "own", Filter(start_s=START_S + 500, origins=("client",)), format=format)
    engine.dispose()
    if format == "parquet":
        assert pl.read_parquet(io.BytesIO(answer.content)).equals(pl.read_parquet(tmp_path / "own"))
    else:
        assert answer.content == (tmp_path / "own").read_bytes()


@pytest.mark.parametrize(
    ("path", "params", "problem"),
    [
        ("requests", {"limit": 0}, "query.limit: "),
        ("requests", {"limit": 1001}, "query.limit: "),
        ("requests", {"outcome": "bad"}, "query.outcome.0: "),
        ("requests", {"from": "yesterday"}, "query.from: "),
        ("history", {"from": 10, "to": 5}, "from: expected a time before to, got 10 and 5"),
        ("history", {"from": "nan"}, "from: expected a time before to"),
        ("history", {"from": 0, "to": 1e300}, "from, to: expected epoch seconds in the years 1 to 9999"),
        ("export", {"format": "pdf"}, "format: expected one of "),
        ("export", {"timezone": "Moon/Base"}, "timezone: expected an IANA time zone"),
        ("failures", {"availability": 2}, "query.availability: "),
    ],
)
def test_bad_questions_are_a_422_in_openais_envelope(
    client: httpx.Client, path: str, params: dict[str, Any], problem: str
) -> None:
    answer = client.get(path, params=params)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(problem)


@pytest.mark.parametrize("path", ["requests", "requests/x", "history", "stats", "failures", "export"])
def test_a_database_that_is_away_is_a_503(path: str, tmp_path: Path) -> None:
    settings = Settings(
        upstreams=("http://user-a:8000",), data_dir=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/none"
    )
    with serving(settings) as client:
        answer = client.get(f"/api/v1/{path}")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("the database can not be read: ")
