"""`burstgate top` and what it looks at: a control plane over HTTP with a real journal and database behind it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from textual.widgets import DataTable, Sparkline, Static

from proxy.cli import main
from proxy.glance import Control, ControlAway, Glance, Reading, Readings, as_text, glance, parse_samples, quantile
from proxy.top import Top
from tests.proxy.harness import Upstream, closed_port, in_loop, plain
from tests.proxy.test_control import Installation, serving
from traces.record import Outcome

INF = float("inf")


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path)
    for outcome in (Outcome.OK, Outcome.UPSTREAM_ERROR, Outcome.CLIENT_GONE):
        made.request(outcome)
    made.record()
    yield made
    made.journal.close()


@pytest.mark.parametrize(
    ("buckets", "share", "expected"),
    [
        ({}, 0.5, None),
        ({1.0: 0.0, INF: 0.0}, 0.5, None),
        ({1.0: 10.0}, 0.5, 0.5),
        ({1.0: 5.0, 2.0: 5.0}, 0.95, 1.9),
        ({1.0: 5.0, 2.0: 0.0, 4.0: 5.0}, 0.5, 1.0),
        ({1.0: 1.0, INF: 9.0}, 0.99, 1.0),  # beyond the last bound it is that bound
        ({INF: 3.0}, 0.5, 0.0),
    ],
)
def test_quantiles_of_buckets(buckets: dict[float, float], share: float, expected: float | None) -> None:
    assert quantile(buckets, share) == (None if expected is None else pytest.approx(expected))


def test_only_what_is_looked_at_is_parsed() -> None:
    text = """\
burstgate_requests_total{outcome="ok"} 3
burstgate_workers 1
burstgate_upstream_tokens_total{upstream="u",direction="response"} 4
"""
    found = parse_samples(text)
    assert found["burstgate_requests_total"] == {("ok",): 3.0}
    assert found["burstgate_upstream_tokens_total"] == {("response", "u"): 4.0}
    assert "burstgate_workers" not in found
    with pytest.raises(ValueError, match="nonsense"):
        parse_samples("burstgate_requests_total nonsense nonsense\n")


async def looked(url: str) -> Reading:
    control = Control(url)
    try:
        return await control.read()
    finally:
        await control.close()


def between(installation: Installation, client: httpx.Client) -> Glance:
    """Two seconds in which two requests end well, one fails, and one stays open."""
    url = str(client.base_url)
    before = asyncio.run(looked(url))
    for outcome in (Outcome.OK, Outcome.OK, Outcome.UPSTREAM_ERROR, None):
        installation.request(outcome)
    installation.record()
    now = asyncio.run(looked(url))
    return glance(before, dataclasses.replace(now, at_s=before.at_s + 2.0))


def test_what_happened_between_two_readings(installation: Installation) -> None:
    with serving(installation.settings) as client:
        seen = between(installation, client)
    assert (seen.requests_per_s, seen.failures_per_s, seen.in_flight) == (1.5, 0.5, 1)
    assert (seen.request_tokens_per_s, seen.response_tokens_per_s) == (10.5, 4.5)
    assert seen.ttft_s[0] == pytest.approx(0.02, abs=0.01)
    assert seen.outcomes == (("upstream_error", 0.5, 2), ("client_gone", 0.0, 1))
    assert {row.name: row.failures_per_s for row in seen.models} == {"m": 0.5}
    ((upstream, row),) = seen.upstreams
    assert (upstream.name, upstream.state, row.requests_per_s) == ("http://user-a:8000", "?", 1.5)
    assert [each.outcome for each in seen.reading.failures] == ["upstream_error", "client_gone", "upstream_error"]


def test_the_snapshot_as_text(installation: Installation) -> None:
    with serving(installation.settings) as client:
        text = as_text(between(installation, client))
    text = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text) + "\n"
    text = re.sub(r"^burstgate \S+", "burstgate VERSION", text)
    assert (
        text
        == """\
burstgate VERSION  test  workers 1/2  database up  over 2.0 s
requests/s  1.5
tokens/s    10.5 in, 4.5 out
in flight   1
ttft        p50 18 ms  p95 24 ms  p99 25 ms
failed/s    0.5
failures    upstream_error 0.5/s (2)  client_gone 0.0/s (1)

upstream            state  in flight  weight  requests/s  failed/s  ttft p95
http://user-a:8000  ?      0          1       1.5         0.5       24 ms

model  requests/s  failed/s  tokens/s  ttft p50  p95    p99
m      1.5         0.5       4.5       18 ms     24 ms  25 ms

time      outcome         status  error  model  upstream
HH:MM:SS  upstream_error  -       -      m      http://user-a:8000
HH:MM:SS  client_gone     -       -      m      http://user-a:8000
HH:MM:SS  upstream_error  -       -      m      http://user-a:8000
"""
    )
    assert all(len(line) <= 80 for line in text.splitlines())


def test_readings_are_compared_over_the_window() -> None:
    readings = Readings()
    base = Reading(0.0, parse_samples(""), None, (), (), None)  # type: ignore[arg-type]

    def at(at_s: float) -> float | None:
        seen = readings.add(dataclasses.replace(base, at_s=at_s))
        return None if seen is None else seen.over_s

    assert [at(float(each)) for each in (0, 1, 5, 10, 11, 30)] == [None, 1, 5, 10, 10, 19]


# The screen -----------------------------------------------------------------------------------------------------------


async def until(is_true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.02)


def shown(top: Top, name: str) -> str:
    return str(top.query_one(f"#{name}", Static).render())


def cells(top: Top, name: str) -> list[list[str]]:
    table = top.query_one(f"#{name}", DataTable)
    return [list(map(str, table.get_row_at(place))) for place in range(table.row_count)]


def test_the_screen_shows_tables_and_takes_keys(installation: Installation) -> None:
    @in_loop
    async def use(url: str) -> None:
        top = Top(Control(url), 0.05)
        async with top.run_test(size=(80, 24)) as pilot:
            await until(lambda: bool(cells(top, "failures")), "failures are listed")
            assert "test  workers 1/2  database up  by requests" in shown(top, "head")
            assert [row[1] for row in cells(top, "failures")] == ["client_gone", "upstream_error"]
            assert [row[0] for row in cells(top, "upstreams")] == ["http://user-a:8000"]
            installation.request(Outcome.OK)
            installation.request(None)
            await until(lambda: shown(top, "in-flight") == "1", "a request in flight is seen")
            await until(lambda: "p50 " in shown(top, "ttft") and "-" not in shown(top, "ttft"), "its TTFT")
            assert any(top.query_one("#requests-s-line", Sparkline).data or ())
            assert top.query_one("#failures", DataTable).region.height >= 3
            assert top.screen.size == (80, 24)

            await pilot.press("f")
            assert [top.query_one(f"#{each}").display for each in ("upstreams", "models", "failures")] == [
                False, False, True,
            ]  # fmt: skip
            await pilot.press("u")
            assert [top.query_one(f"#{each}").display for each in ("upstreams", "models", "failures")] == [
                True, False, False,
            ]  # fmt: skip
            await pilot.press("u")
            assert all(top.query_one(f"#{each}").display for each in ("upstreams", "models", "failures"))
            await pilot.press("s")
            assert shown(top, "head").endswith("by failures")

            await pilot.press("p")
            assert "paused" in shown(top, "note")
            before = shown(top, "in-flight")
            installation.request(None)
            await asyncio.sleep(0.3)
            assert shown(top, "in-flight") == before
            await pilot.press("p")
            await until(lambda: shown(top, "in-flight") == "2", "it goes on")
            await pilot.press("q")
        assert not top.is_running

    with serving(installation.settings) as client:
        use(str(client.base_url))


def test_a_control_plane_that_goes_and_comes_back(installation: Installation) -> None:
    @in_loop
    async def use() -> None:
        port = closed_port()
        top = Top(Control(f"http://127.0.0.1:{port}"), 0.05)
        async with top.run_test(size=(80, 24)):
            for _ in range(2):
                await until(lambda: "is away" in shown(top, "note"), "it says that nobody answers")
                with contextlib.ExitStack() as stack:
                    await asyncio.to_thread(stack.enter_context, serving(installation.settings, port))
                    await until(lambda: not top.query_one("#note").display, "it comes back by itself")
                    await until(lambda: "workers" in shown(top, "head"), "it shows what it found")
                    await asyncio.to_thread(stack.close)

    use()


# The command ----------------------------------------------------------------------------------------------------------


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str, str]:
    """Exit status, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["burstgate", "top", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capsys.readouterr()


def test_once_prints_and_ends(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(installation.settings) as client:
        url = str(client.base_url)
        status, out, err = command(monkeypatch, capsys, "--once", "--interval", "0.2", "--control", url)
    assert (status, err) == (0, "")
    assert out.startswith("burstgate ")
    assert "upstream_error 0.0/s (1)" in out


def test_what_top_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("two words\n")
    away = f"http://127.0.0.1:{closed_port()}"
    for arguments, status, problem in (
        (("--once", "--control", away), 1, f"burstgate: {away}: the control plane is away: no answer"),
        (("--control", away), 2, "burstgate: top: expected a terminal; elsewhere use --once"),
        (("--once", "--control", "user-a:8081"), 2, "burstgate: --control: expected http://HOST:PORT, got 'user-a"),
        (("--token-file", str(tmp_path / "token")), 2, f"burstgate: --token-file: {tmp_path / 'token'}: expected one"),
        (("--token-file", str(tmp_path / "none")), 1, f"burstgate: {tmp_path / 'none'}: No such file or directory"),
    ):
        found, out, err = command(monkeypatch, capsys, *arguments)
        assert (found, out) == (status, "")
        assert err.startswith(problem), err
        assert err.count("\n") == 1


@in_loop
async def test_an_answer_that_is_none_of_ours_is_said(tmp_path: Path) -> None:

    async with Upstream(plain(b"{}")) as other:
        with pytest.raises(ControlAway, match="not burstgate's control plane"):
            await looked(other.url)
    async with Upstream(plain(b'{"error": {"message": "expected a token"}}', 401)) as other:
        with pytest.raises(ControlAway, match="HTTP 401 of /metrics: expected a token; name a token's file"):
            await looked(other.url)
