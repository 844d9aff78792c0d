"""The target's own metrics during a run: vLLM's /metrics, once a second, on the run's time axis.

A thread of its own asks; of an answer only the lines of the metrics named below are parsed, so that a scrape takes the
sending loop's interpreter for a fraction of a millisecond. Counters are added up from their differences, each server by
itself, so a server that restarts loses nothing. Several servers (several URLs, or a gateway that says who answered in
`x-burstgate-upstream`) are shown together: requests and counters summed, of the KV-cache use the largest.

    vllm:num_requests_running, vllm:num_requests_waiting, vllm:kv_cache_usage_perc (older: vllm:gpu_cache_usage_perc),
    vllm:num_preemptions_total, vllm:prefix_cache_queries_total, vllm:prefix_cache_hits_total,
    vllm:prompt_tokens_total, vllm:generation_tokens_total

A target without them is said once in the summary and fails nothing. More than MAX_POINTS scrapes are thinned by joining
neighbours, as the summary's bins are.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from replay.metrics import ServerFacts, ServerOverTime

INTERVAL_S = 1.0
TIMEOUT_S = 2.0
MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_POINTS = 2000
FIRST_SCRAPE_S = 1.0
"""How long the start of a run waits for the first answer, which is what the counters are counted from."""
_GIVE_UP = 3
"""Refusals in a row (HTTP 4xx, or a page without vLLM's metrics) after which a URL that never answered is left."""

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv",
    "vllm:gpu_cache_usage_perc": "kv",
}
_COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
}
_COUNTED = tuple(_COUNTERS.values())
_WANTED = tuple(name.encode() for name in (*_GAUGES, *_COUNTERS))


class Unscraped(Exception):
    """A scrape that brought nothing. is_final: asking again will not help."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


def parse_metrics(body: bytes) -> dict[str, float]:
    """Of a Prometheus text page, the metrics named above that it has: `running`, `kv` (the largest), `preemptions`...

    Engines and models of one page are added up. Raises ValueError where a line of them cannot be parsed.
    """
    from prometheus_client.parser import text_string_to_metric_families

    lines = [line for line in body.split(b"\n") if line.startswith(_WANTED)]
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(b"\n".join(lines).decode("utf-8", "replace") + "\n"):
        for sample in family.samples:
            name = _GAUGES.get(sample.name) or _COUNTERS.get(sample.name)
            if name == "kv":
                found["kv"] = max(found.get("kv", 0.0), sample.value)
            elif name is not None:
                found[name] = found.get(name, 0.0) + sample.value
    return found


def fetch(url: str) -> tuple[bytes, str | None]:
    """A GET's body and its `x-burstgate-upstream`. Raises Unscraped."""
    if not url.startswith(("http://", "https://")):  # urllib would read files, too
        raise Unscraped(f"{url}: expected http://HOST or https://HOST", is_final=True)
    try:
        with _direct.open(url, timeout=TIMEOUT_S) as answer:
            body: bytes = answer.read(MAX_BODY_BYTES + 1)
            answered_by: str | None = answer.headers.get("x-burstgate-upstream")
    except urllib.error.HTTPError as error:
        with error:
            raise Unscraped(f"{url}: HTTP {error.code}", is_final=400 <= error.code < 500) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts among them
        reason = getattr(error, "reason", None) or error
        raise Unscraped(f"{url}: {' '.join(str(reason).split()) or type(error).__name__}") from None
    if len(body) > MAX_BODY_BYTES:
        raise Unscraped(f"{url}: expected at most {MAX_BODY_BYTES} bytes, got more", is_final=True)
    return body, answered_by


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""As the requests themselves go: through no proxy."""


def is_burstgate(target: str) -> bool:
    """Whether a burstgate gateway answers at the target: it says who answered."""
    try:
        return fetch(f"{target.rstrip('/')}/v1/models")[1] is not None
    except Unscraped:
        return False


@dataclass(slots=True)
class _Server:
    """One server as it was last seen, and what it counted since the first look."""

    last: dict[str, float]
    counted: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0.0))

    def see(self, now: dict[str, float]) -> None:
        for name in _COUNTED:
            if name in now:
                before = self.last.get(name)
                # A counter that fell began again at zero.
                self.counted[name] += 0.0 if before is None else now[name] - (before if now[name] >= before else 0.0)
        self.last = now


@dataclass(frozen=True, slots=True)
class _Point:
    at_ns: int
    running: float
    waiting: float
    kv: float | None
    counted: tuple[float, ...]
    """In the order of _COUNTED, since the first scrape."""


class Scraper:
    """Scrapes from `start` to `stop`; then `facts`."""

    def __init__(self, urls: Sequence[str], interval_s: float = INTERVAL_S) -> None:
        self._urls = tuple(urls)
        self._interval_s = interval_s
        self._servers: dict[tuple[str, str | None], _Server] = {}
        self._points: list[_Point] = []
        self._stride = 1
        """Scrapes that are one point."""
        self._rounds = self._scrapes = self._failed = 0
        self._refused: dict[str, int] = {}
        self._error: str | None = None
        self._is_over = threading.Event()
        self._is_first_done = threading.Event()
        self._epoch_zero_s = time.time() - time.monotonic_ns() / 1e9
        self._thread = threading.Thread(target=self._run, name="scraper", daemon=True)

    def start(self) -> None:
        """Begin, and wait a moment for the first answer."""
        self._thread.start()
        self._is_first_done.wait(FIRST_SCRAPE_S)

    def stop(self) -> None:
        """Scrape a last time and end."""
        self._is_over.set()
        self._thread.join(len(self._urls) * 2 * TIMEOUT_S + 1)

    def _run(self) -> None:
        import_first: Callable[[bytes], dict[str, float]] = parse_metrics
        import_first(b"")  # the parser is imported before the run begins, not during its first second
        due_s = time.monotonic()
        while True:
            self._scrape_all()
            self._is_first_done.set()
            due_s = max(due_s + self._interval_s, time.monotonic())
            if self._is_over.wait(due_s - time.monotonic()):
                self._scrape_all()
                return

    def _scrape_all(self) -> None:
        for url in self._urls:
            if self._refused.get(url, 0) >= _GIVE_UP:
                continue
            try:
                self._scrape(url)
                self._scrapes += 1
                self._refused[url] = 0
            except Unscraped as error:
                self._failed += 1
                self._error = str(error)
                has_answered = any(known == url for known, _ in self._servers)
                if error.is_final and not has_answered:
                    self._refused[url] = self._refused.get(url, 0) + 1
        if self._servers:
            self._take_point()

    def _scrape(self, url: str) -> None:
        body, answered_by = fetch(url)
        try:
            found = parse_metrics(body)
        except ValueError as error:
            raise Unscraped(f"{url}: not Prometheus text: {error}", is_final=True) from None
        if not found:
            raise Unscraped(f"{url}: no metrics of vLLM's in it", is_final=True)
        server = self._servers.get((url, answered_by))
        if server is None:
            self._servers[url, answered_by] = _Server(found)
        else:
            server.see(found)

    def _take_point(self) -> None:
        servers = self._servers.values()
        kv = [server.last["kv"] for server in servers if "kv" in server.last]
        point = _Point(
            time.monotonic_ns(),
            sum(server.last.get("running", 0.0) for server in servers),
            sum(server.last.get("waiting", 0.0) for server in servers),
            max(kv) if kv else None,
            tuple(sum(server.counted[name] for server in servers) for name in _COUNTED),
        )
        self._rounds += 1
        if self._points and self._rounds % self._stride:
            self._points[-1] = _joined(self._points[-1], point)
        else:
            self._points.append(point)
        if len(self._points) > MAX_POINTS:
            self._stride *= 2
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            last = self._points[-1:] if len(self._points) % 2 else []
            self._points = [*(_joined(first, second) for first, second in pairs), *last]

    def facts(self, started_at: float | None) -> ServerFacts:
        """What was found. started_at: schedule zero, epoch seconds; None when there was none, and no point is kept."""
        zero_ns = None if started_at is None else round((started_at - self._epoch_zero_s) * 1e9)
        points = list(self._points)
        before = [] if zero_ns is None else [point for point in points if point.at_ns <= zero_ns]
        during = [] if zero_ns is None else [point for point in points if point.at_ns > zero_ns]
        first = next(iter(before[-1:] or during[:1]), None)
        kv = [point.kv for point in during if point.kv is not None]
        counted: dict[str, float | None] = dict.fromkeys(_COUNTED)
        series: list[tuple[float, ...]] = []
        if first is not None and during:
            series = [
                tuple(now - start for now, start in zip(point.counted, first.counted, strict=True)) for point in during
            ]
            seen = {name for server in self._servers.values() for name in server.last}
            counted |= {name: value for name, value in zip(_COUNTED, series[-1], strict=True) if name in seen}
        hits, queries = counted["prefix_hits"], counted["prefix_queries"]
        columns = {name: [values[at] for values in series] for at, name in enumerate(_COUNTED)}
        return ServerFacts(
            urls=self._urls,
            scrapes=self._scrapes,
            failed_scrapes=self._failed,
            error=self._error,
            kv_max=max(kv, default=None),
            kv_mean=sum(kv) / len(kv) if kv else None,
            running_max=max((point.running for point in during), default=None),
            waiting_max=max((point.waiting for point in during), default=None),
            preemptions=counted["preemptions"],
            prefix_hit_share=hits / queries if hits is not None and queries else None,
            prompt_tokens=counted["prompt_tokens"],
            generation_tokens=counted["generation_tokens"],
            over_time=ServerOverTime(
                at_s=[round((point.at_ns - (zero_ns or 0)) / 1e9, 3) for point in during],
                running=[point.running for point in during],
                waiting=[point.waiting for point in during],
                kv_share=[point.kv for point in during],
                **columns,
            )
            if series
            else None,
        )


def _joined(first: _Point, second: _Point) -> _Point:
    kv = [each for each in (first.kv, second.kv) if each is not None]
    return _Point(
        second.at_ns,
        max(first.running, second.running),
        max(first.waiting, second.waiting),
        max(kv) if kv else None,
        second.counted,
    )


def metrics_urls(target: str, urls: Sequence[str]) -> tuple[str, ...]:
    """Where to scrape: the URLs given, else the target's /metrics."""
    from_target = target.rstrip("/").removesuffix("/v1").rstrip("/") + "/metrics"
    return tuple(urls) or (from_target,)


@contextmanager
def scraping(urls: Sequence[str]) -> Iterator[Scraper]:
    """A scraper that runs until the end of the block."""
    scraper = Scraper(urls)
    scraper.start()
    try:
        yield scraper
    finally:
        scraper.stop()
