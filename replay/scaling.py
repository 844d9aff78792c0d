"""How much load is asked of a system: a share of its measured capacity, or of its KV cache, as a rate of requests.

    capacity    rate = load * capacity_rps. The capacity is a number, or `capacity_rps` in the JSON of a sweep.
    KV budget   rate = budget * cache tokens / E[W * T]: by Little's law (1961) the tokens held on average are the rate
                times the mean of a request's residence W times the tokens T that it holds meanwhile. T is its prompt
                and half of its answer, which grows from none. W and T go together: it is the mean of the product.
    W           `ttft_s + tpot_s * response tokens` where a TPOT is given; else the trace's own elapsed time, which is
                that of the system where it was recorded, with its queue. Rows without it are left out.
    cache       `num_gpu_blocks * block_size` of vLLM's `vllm:cache_config_info`, over all its engines. Blocks that
                requests share (prefix cache) and the unused end of a request's last block are not counted.

Means are over the first SAMPLED_ROWS rows that can be sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import polars as pl

from replay.arrivals import ArrivalOptions
from replay.client import read_api_key
from replay.rows import open_rows
from replay.source import SourceOptions
from traces.profile import WorkloadProfile
from traces.record import Outcome

SAMPLED_ROWS: Final = 100_000
ASK_TIMEOUT_S: Final = 30.0
_CACHE: Final = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """At most one way to scale. Raises ValueError naming the option, the value and the rule."""

    capacity: str | None = None
    """Requests a second, or a sweep's JSON file."""
    load: float | None = None
    """Share of the capacity."""
    kv_budget: float | None = None
    """Share of the KV cache."""
    ttft_s: float = 0.0
    tpot_s: float | None = None
    """None is the trace's own elapsed times."""

    def __post_init__(self) -> None:
        if (self.capacity is None) != (self.load is None):
            raise ValueError("load: expected with a capacity, and a capacity with a load, got one without the other")
        if self.load is not None and not 0 < self.load <= 100:
            raise ValueError(f"load: expected a share above 0 to 100, got {self.load:g}")
        if self.kv_budget is not None and not 0 < self.kv_budget <= 100:
            raise ValueError(f"kv budget: expected a share above 0 to 100, got {self.kv_budget:g}")
        if self.kv_budget is not None and self.capacity is not None:
            raise ValueError("kv budget: expected without a capacity, got both")
        if self.tpot_s is not None and not 0 < self.tpot_s < math.inf:
            raise ValueError(f"tpot: expected seconds > 0, got {self.tpot_s:g}")
        if not 0 <= self.ttft_s < math.inf:
            raise ValueError(f"ttft: expected seconds >= 0, got {self.ttft_s:g}")
        if self.kv_budget is None and (self.tpot_s is not None or self.ttft_s):
            raise ValueError("tpot: expected with a kv budget, got it without")

    @property
    def is_asked(self) -> bool:
        """Whether a rate is to be found at all."""
        return self.capacity is not None or self.kv_budget is not None


def asked_rate_rps(
    options: ScaleOptions,
    trace: Path | None,
    source: SourceOptions,
    profile: WorkloadProfile | None = None,
    *,
    target: str,
    format: str | None = None,
    api_key_env: str | None = None,
) -> float:
    """The rate that the options ask for. Reads the first rows and asks the target only where that is needed.

    trace, source, profile, format: the rows, as `replay.rows.open_rows` takes them; their times do not matter.
    Raises ValueError naming the option or the place, ReplayError for the key, OSError.
    """
    if options.capacity is not None:
        return read_capacity_rps(options.capacity) * (options.load or 0.0)
    rows = open_rows(trace, source, ArrivalOptions(profile=profile if trace is None else None), format=format)
    held = mean_token_seconds(rows, tpot_s=options.tpot_s, ttft_s=options.ttft_s)
    return kv_rate_rps(options.kv_budget or 0.0, ask_kv_tokens(target, read_api_key(api_key_env)), held)


def read_capacity_rps(text: str) -> float:
    """A number of requests a second, or that in a sweep's JSON file. Raises ValueError, OSError naming the file."""
    place, value = "capacity", text
    try:
        rate_rps = float(text)
    except ValueError:
        place = f"{text}: capacity_rps"
        try:
            rate_rps = msgspec.json.decode(Path(text).read_bytes(), type=_Sweep).capacity_rps
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{text}: expected a sweep's JSON with capacity_rps: {error}") from error
        value = f"{rate_rps:g}"
    if not 0 < rate_rps < math.inf:
        raise ValueError(f"{place}: expected requests/s > 0, got {value}")
    return rate_rps


class _Sweep(msgspec.Struct):
    capacity_rps: float


def mean_token_seconds(rows: Iterable[pl.DataFrame], *, tpot_s: float | None = None, ttft_s: float = 0.0) -> float:
    """E[W * T] in token seconds over the first SAMPLED_ROWS rows that can be sent.

    Raises ValueError where no row says how long it stays, or all stay for no time.
    """
    total, n = 0.0, 0
    for batch in rows:
        response = pl.col("response_tokens")
        stays_s = pl.col("elapsed_s") if tpot_s is None else ttft_s + tpot_s * response
        held = (
            batch.filter((pl.col("outcome") == Outcome.OK.value) & (pl.col("request_tokens") > 0) & (response > 0))
            .select((stays_s * (pl.col("request_tokens") + response / 2)).alias("held"))["held"]
            .drop_nulls()
        )
        held = held.head(SAMPLED_ROWS - n)
        total, n = total + float(held.sum()), n + held.len()
        if n == SAMPLED_ROWS:
            break
    if not total:
        raise ValueError("kv budget: expected rows with elapsed times, or a tpot, got neither")
    return total / n


def kv_rate_rps(budget: float, kv_tokens: int, token_seconds: float) -> float:
    """The rate at which requests of `token_seconds` each hold the share `budget` of `kv_tokens` on average."""
    return budget * kv_tokens / token_seconds


def kv_tokens(metrics: str) -> int:
    """Tokens that fit into the KV caches of which vLLM's `/metrics` tells. Raises ValueError where it tells of none."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        labels = [
            sample.labels
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == _CACHE
        ]
        tokens = sum(int(each["block_size"]) * int(each["num_gpu_blocks"]) for each in labels)
    except (ValueError, KeyError) as error:
        raise ValueError(f"expected {_CACHE} with block_size and num_gpu_blocks, got others ({error})") from error
    if tokens <= 0:
        raise ValueError(f"expected {_CACHE} with blocks, got none")
    return tokens


def ask_kv_tokens(url: str, api_key: str | None) -> int:
    """The KV cache of the vLLM server at `url`, in tokens. Raises ValueError naming the place and what was there."""
    import httpx

    place = url.rstrip("/").removesuffix("/v1") + "/metrics"
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(place, headers=headers, timeout=ASK_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"kv budget: cannot read {place}: {str(error) or type(error).__name__}") from error
    if answer.status_code != 200:
        raise ValueError(f"kv budget: {place}: expected status 200, got {answer.status_code}")
    try:
        return kv_tokens(answer.text)
    except ValueError as error:
        raise ValueError(f"kv budget: {place}: {error}") from error
