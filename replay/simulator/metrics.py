"""What the simulator counts, and its two forms: /metrics with vLLM's Prometheus names, /stats as JSON. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry

from replay.simulator.config import SimulatorConfig

_LATENCY_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_REQUEST_BUCKETS_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts of values by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative buckets with their upper bounds as text, and the sum of the values."""
        total = 0
        cumulative: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            cumulative.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return cumulative, self._sum


class Stats(msgspec.Struct, frozen=True):
    """/stats. Requests in `accepted`, `in_flight`, `finished`, `aborted`; the rest counts sequences.

    accepted = in_flight + finished + aborted. Refused requests and those of routes without work count nowhere.
    """

    accepted: int
    in_flight: int
    running: int
    waiting: int
    finished: int
    aborted: int
    preempted: int
    kv_usage: float
    max_running: int
    """Most sequences that ran at once since the start."""
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int = 0
    """Prompt tokens looked for in the prefix cache."""
    prefix_hits: int = 0


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    accepted: int = 0
    finished: int = 0
    aborted: int = 0
    preempted: int = 0
    max_running: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    reasons: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    step_tokens: Histogram = field(default_factory=lambda: Histogram(_STEP_TOKEN_BUCKETS))
    ttft_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    itl_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    tpot_s: Histogram = field(default_factory=lambda: Histogram(_LATENCY_BUCKETS_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    decode_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    inference_s: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BUCKETS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BUCKETS))

    def stats(
        self, *, running: int, waiting: int, kv_usage: float, prefix_queries: int = 0, prefix_hits: int = 0
    ) -> Stats:
        """The counts with the engine's present state."""
        return Stats(
            accepted=self.accepted,
            in_flight=self.accepted - self.finished - self.aborted,
            running=running,
            waiting=waiting,
            finished=self.finished,
            aborted=self.aborted,
            preempted=self.preempted,
            kv_usage=kv_usage,
            max_running=self.max_running,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_queries=prefix_queries,
            prefix_hits=prefix_hits,
        )


class _Exposition:
    """A Prometheus collector of one moment."""

    def __init__(self, counters: Counters, stats: Stats, config: SimulatorConfig) -> None:
        self._counters = counters
        self._stats = stats
        self._config = config
        self._labels = ["0", config.models[0]]

    def collect(self) -> Iterator[Metric]:
        """The families, in vLLM's order."""
        stats, counters = self._stats, self._counters
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", stats.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", stats.waiting)
        usage = "KV-cache usage. 1 means 100 percent usage."
        yield self._gauge("kv_cache_usage_perc", usage, stats.kv_usage)
        queries = "Prefix cache queries, in terms of number of queried tokens."
        yield self._counter("prefix_cache_queries", queries, stats.prefix_queries)
        hits = "Prefix cache hits, in terms of number of cached tokens."
        yield self._counter("prefix_cache_hits", hits, stats.prefix_hits)
        preemptions = "Cumulative number of preemption from the engine."
        yield self._counter("num_preemptions", preemptions, counters.preempted)
        yield self._counter("prompt_tokens", "Number of prefill tokens processed.", counters.prompt_tokens)
        yield self._counter("generation_tokens", "Number of generation tokens processed.", counters.generation_tokens)
        success = CounterMetricFamily(
            "vllm:request_success",
            "Count of successfully processed requests.",
            labels=["engine", "model_name", "finished_reason"],
        )
        for reason, count in counters.reasons.items():
            success.add_metric([*self._labels, reason], count)
        yield success
        histograms = (
            ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", counters.step_tokens),
            ("request_prompt_tokens", "Number of prefill tokens processed.", counters.request_prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", counters.request_generation_tokens),
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", counters.ttft_s),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", counters.itl_s),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                counters.tpot_s,
            ),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", counters.e2e_s),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", counters.queue_s),
            (
                "request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                counters.prefill_s,
            ),
            ("request_decode_time_seconds", "Histogram of time spent in DECODE phase for request.", counters.decode_s),
            (
                "request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                counters.inference_s,
            ),
        )
        for name, text, histogram in histograms:
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=["engine", "model_name"])
            buckets, total = histogram.buckets()
            family.add_metric(self._labels, buckets=buckets, sum_value=total)
            yield family
        config = self._config
        # Those of vLLM's labels whose values mean something here; it writes None as text.
        cache = {
            "block_size": config.block_size,
            "cache_dtype": "auto",
            "enable_prefix_caching": config.enable_prefix_caching,
            "engine": 0,
            "gpu_memory_utilization": 0.92,
            "is_attention_free": False,
            "kv_cache_size_tokens": config.num_blocks * config.block_size,
            "num_cpu_blocks": None,
            "num_gpu_blocks": config.num_blocks,
            "num_gpu_blocks_override": config.num_gpu_blocks_override or None,
            "prefix_caching_hash_algo": "sha256",
            "sliding_window": None,
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=list(cache)
        )
        info.add_metric([str(value) for value in cache.values()], 1)
        yield info

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["engine", "model_name"])
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=["engine", "model_name"])
        family.add_metric(self._labels, value)
        return family


def exposition(counters: Counters, stats: Stats, config: SimulatorConfig) -> bytes:
    """The body of /metrics."""
    registry = CollectorRegistry()
    registry.register(_Exposition(counters, stats, config))
    return generate_latest(registry)
