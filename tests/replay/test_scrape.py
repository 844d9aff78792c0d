"""Scraping: what is read of a page, counters across servers and restarts, and a live simulator under load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from replay.metrics import ServerFacts
from replay.runner import ReplayOptions, run
from replay.schedule import Planned
from replay.scrape import MAX_BODY_BYTES, Scraper, Unscraped, fetch, is_burstgate, metrics_urls, parse_metrics
from replay.simulator.config import SimulatorConfig
from replay.simulator.server import running

PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_preemptions_total{engine="0",model_name="m"} 5.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_queries_total{engine="0"} 100.0
vllm:prefix_cache_hits_total{engine="0"} 1e+01
vllm:num_requests_running_elsewhere 9
process_resident_memory_bytes 1
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (PAGE, {"running": 7, "waiting": 1, "kv": 0.75, "preemptions": 5, "prefix_queries": 100, "prefix_hits": 10}),
        (b'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\n', {"kv": 0.5}),  # vLLM before 0.9
        (b"vllm:prompt_tokens_total 7\nvllm:generation_tokens_total 8", {"prompt_tokens": 7, "generation_tokens": 8}),
        (b"process_resident_memory_bytes 1\n", {}),
        (b"<html>\xff</html>", {}),
        (b"", {}),
    ],
)
def test_what_is_read_of_a_page(body: bytes, found: dict[str, float]) -> None:
    assert parse_metrics(body) == found


def test_a_page_that_cannot_be_parsed() -> None:
    with pytest.raises(ValueError):
        parse_metrics(b"vllm:prompt_tokens_total{ 7\n")


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def saying(*bodies: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """Each body in turn, the last again and again."""
    left = list(bodies)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def counters(preemptions: float, queries: float, hits: float, running: float = 1.0) -> bytes:
    return (
        f"vllm:num_requests_running {running}\nvllm:num_preemptions_total {preemptions}\n"
        f"vllm:prefix_cache_queries_total {queries}\nvllm:prefix_cache_hits_total {hits}\n"
    ).encode()


def scraped(urls: list[str], seconds: float = 0.3) -> ServerFacts:
    """Every 20 ms, from a run that began after the first scrape."""
    scraper = Scraper(urls, 0.02)
    scraper.start()
    started_at = time.time()
    time.sleep(seconds)
    scraper.stop()
    return scraper.facts(started_at)


def test_counters_are_of_the_run_and_survive_a_restart() -> None:
    """50 preemptions before the run, 3 in it, a restart, 2 more."""
    bodies = [counters(50, 1000, 500), counters(53, 1100, 550, 4.0), counters(1, 10, 5), counters(2, 20, 5)]
    with serving(saying(*bodies)) as url:
        found = scraped([url])
    assert (found.preemptions, found.running_max, found.kv_max, found.waiting_max) == (5.0, 4.0, None, 0.0)
    assert found.prefix_hit_share == pytest.approx(55 / 120)
    assert (found.failed_scrapes, found.error, found.prompt_tokens) == (0, None, None)
    assert found.over_time is not None
    assert found.over_time.preemptions[:3] == [3.0, 4.0, 5.0]
    assert found.over_time.at_s == sorted(found.over_time.at_s)
    assert 0 < found.over_time.at_s[0] < 0.2
    assert set(found.over_time.kv_share) == {None}


def test_several_servers_are_added_up() -> None:
    one = saying(counters(0, 0, 0, 2.0), counters(1, 10, 1, 2.0) + b"vllm:kv_cache_usage_perc 0.5\n")
    two = saying(counters(5, 0, 0, 3.0), counters(9, 10, 4, 3.0) + b"vllm:gpu_cache_usage_perc 0.75\n")
    with serving(one) as first, serving(two) as second:
        found = scraped([first, second])
    assert (found.running_max, found.preemptions, found.kv_max, found.prefix_hit_share) == (5.0, 5.0, 0.75, 0.25)


def test_servers_behind_one_gateway_are_told_apart_by_who_answered() -> None:
    turns = iter(range(10**6))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        turn = next(turns)
        body = counters(100 * (turn % 2) + turn // 2, 0, 0)
        saying(body, headers={"x-burstgate-upstream": "ab"[turn % 2]})(handler)

    with serving(answer) as url:
        found = scraped([url])
    # Were they taken for one, its counter would jump up by 100 every second time.
    assert found.preemptions is not None
    assert 0 < found.preemptions <= found.scrapes


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (saying(b"no", status=404), "HTTP 404"),
        (saying(b"process_resident_memory_bytes 1\n"), "no metrics of vLLM's in it"),
        (saying(b"vllm:prompt_tokens_total{ 7\n"), "not Prometheus text"),
        (saying(b"x" * (MAX_BODY_BYTES + 1)), f"expected at most {MAX_BODY_BYTES} bytes, got more"),
    ],
)
def test_a_target_without_metrics_is_asked_three_times_and_said_once(answer: Answer, error: str) -> None:
    asked = []

    def counted(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        answer(handler)

    with serving(counted) as url:
        found = scraped([f"{url}/metrics"])
    assert error in str(found.error)
    assert (found.scrapes, found.failed_scrapes, found.over_time, len(asked)) == (0, 3, None, 3)


def test_a_server_that_comes_late_is_seen() -> None:
    calls = iter(range(10**6))
    with serving(lambda handler: saying(counters(0, 0, 0), status=200 if next(calls) >= 4 else 503)(handler)) as url:
        found = scraped([url])
    assert found.failed_scrapes == 4
    assert found.scrapes > 0
    assert found.running_max == 1.0


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/metrics", "localhost:8000/metrics", "file:///etc/hosts", "http://["]
)
def test_nobody_there(url: str) -> None:
    with pytest.raises(Unscraped) as caught:
        fetch(url)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)


def test_a_run_that_never_began_has_no_points() -> None:
    with serving(saying(counters(1, 1, 1))) as url:
        scraper = Scraper([url], 0.02)
        scraper.start()
        scraper.stop()
    found = scraper.facts(None)
    assert (found.over_time, found.preemptions) == (None, None)
    assert found.scrapes > 0


def test_a_long_run_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.scrape.MAX_POINTS", 10)
    bodies = [counters(n, 0, 0, 40.0 if n == 30 else 1.0) for n in range(1000)]
    with serving(saying(*bodies)) as url:
        scraper = Scraper([url], 0.001)
        scraper.start()
        started_at = time.time() - 10
        while scraper._scrapes < 100:
            time.sleep(0.01)
        scraper.stop()
    found = scraper.facts(started_at)
    assert found.over_time is not None
    assert 3 <= len(found.over_time.at_s) <= 10
    assert found.running_max == 40.0  # a peak is not thinned away
    assert found.over_time.preemptions[-1] == found.preemptions == found.scrapes - 1 - _first(scraper)


def _first(scraper: Scraper) -> float:
    """What was counted by the end of the first point, from which the rest is counted."""
    return scraper._points[0].counted[0]


@pytest.mark.parametrize(
    ("target", "given", "urls"),
    [
        ("http://h:8000", (), ("http://h:8000/metrics",)),
        ("http://h:8000/v1/", (), ("http://h:8000/metrics",)),
        ("http://h/prefix/", (), ("http://h/prefix/metrics",)),
        ("http://h", ("http://a/metrics", "http://b/m"), ("http://a/metrics", "http://b/m")),
    ],
)
def test_where_to_scrape(target: str, given: tuple[str, ...], urls: tuple[str, ...]) -> None:
    assert metrics_urls(target, given) == urls


def test_who_is_a_gateway() -> None:
    with serving(saying(b"{}", headers={"x-burstgate-upstream": "a"})) as url:
        assert is_burstgate(url)
    with serving(saying(b"{}")) as url:
        assert not is_burstgate(url + "/")
    assert not is_burstgate("http://127.0.0.1:9")


def test_a_live_simulator_under_load() -> None:
    """A KV cache for six requests of a burst of thirty: its use, its queue and its preemptions are seen."""
    config = SimulatorConfig(kv_capacity_tokens=768, max_model_len=512)
    planned = [Planned(n, n * 0.005, None, None, 100, 60) for n in range(30)]
    with running(config) as url:
        scraper = Scraper(metrics_urls(url, ()), 0.05)
        scraper.start()
        summary = asyncio.run(run(planned, ReplayOptions(url, "simulated")))
        scraper.stop()
        found = scraper.facts(summary.started_at)
    assert (summary.ok, found.error) == (30, None)
    assert (summary.outputs.got_tokens, summary.prompts.got_tokens) == (1800, 3000)
    assert found.generation_tokens is not None
    assert found.generation_tokens >= 1800  # what was preempted is made again
    assert found.kv_max is not None
    assert found.kv_mean is not None
    assert 0.5 < found.kv_mean < found.kv_max <= 1
    assert found.running_max is not None
    assert found.waiting_max is not None
    assert 1 < found.running_max < 10 < found.waiting_max
    assert found.preemptions is not None
    assert found.preemptions > 0
