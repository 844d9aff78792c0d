"""A rate from a share of a system's capacity or of its KV cache, by formulas worked by hand."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import polars as pl
import pytest

from replay.scaling import (
    ScaleOptions,
    ask_kv_tokens,
    asked_rate_rps,
    kv_rate_rps,
    kv_tokens,
    mean_token_seconds,
    read_capacity_rps,
)
from replay.simulator.config import SimulatorConfig
from replay.simulator.metrics import Counters, exposition
from replay.source import SourceOptions
from tests.traces.test_generation import PROFILE
from traces.batch import complete_batch
from traces.codec import COLUMNS_8

ROWS = complete_batch(
    pl.DataFrame(
        {
            "request_id": ["a", "b", "c", "d"],
            "received_at": [0.0, 1.0, 2.0, 3.0],
            "request_tokens": [100, 50, 10, None],
            "response_tokens": [20, 100, 40, 5],
            "elapsed_s": [2.0, 4.0, None, 9.0],
            "outcome": ["ok", "ok", "ok", "ok"],
        }
    )
)
ONE = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000"} 1.0\n'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 2 s of 100 + 20/2 and 4 s of 50 + 100/2; a row without an elapsed time or a length says nothing.
        ({}, (2 * 110 + 4 * 100) / 2),
        # 0.1 s a token, and 1 s before the first: 3 s of 110, 11 s of 100, 5 s of 30.
        ({"tpot_s": 0.1, "ttft_s": 1.0}, (3 * 110 + 11 * 100 + 5 * 30) / 3),
    ],
)
@pytest.mark.parametrize("rows_each", [1, 4])
def test_token_seconds(options: dict[str, float], expected: float, rows_each: int) -> None:
    assert mean_token_seconds(ROWS.iter_slices(rows_each), **options) == pytest.approx(expected)


def test_a_budget_is_kept_by_littles_law() -> None:
    # 10 requests/s, each holding 110 tokens for 2 s, hold 2,200 tokens on average.
    assert kv_rate_rps(0.22, 10_000, 220.0) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("metrics", "tokens"),
    [
        (ONE, 16_000),
        (f"# HELP x y\n{ONE}{ONE.replace('1000', '500')}vllm:num_requests_running 3\n", 24_000),  # two engines
    ],
)
def test_cache_sizes(metrics: str, tokens: int) -> None:
    assert kv_tokens(metrics) == tokens


def test_the_simulators_cache() -> None:
    config = SimulatorConfig(num_gpu_blocks_override=640, block_size=32)
    counters = Counters()
    metrics = exposition(counters, counters.stats(running=0, waiting=0, kv_usage=0.0), config)
    assert kv_tokens(metrics.decode()) == 640 * 32


@pytest.mark.parametrize(
    "metrics", ["", "vllm:num_requests_running 3\n", ONE.replace("1000", "None"), ONE.replace("1000", "0"), "{"]
)
def test_metrics_without_a_cache(metrics: str) -> None:
    with pytest.raises(ValueError, match="expected vllm:cache_config_info"):
        kv_tokens(metrics)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Any:
    """A server whose /metrics is the parameter."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            if self.path == "/metrics":
                self.wfile.write(request.param.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("server", [ONE], indirect=True)
def test_the_target_is_asked(tmp_path: Path, server: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{','.join(COLUMNS_8)}\n1,,2,m,100,20,120,API log\n2,,2,m,100,20,120,API log\n")
    for url in (server, f"{server}/", f"{server}/v1"):
        rate_rps = asked_rate_rps(ScaleOptions(kv_budget=0.5), path, SourceOptions(), target=url)
        assert rate_rps == pytest.approx(0.5 * 16_000 / 220)
    generated = asked_rate_rps(
        ScaleOptions(kv_budget=0.5, tpot_s=0.01), None, SourceOptions(duration_s=60.0), PROFILE, target=server
    )
    assert generated > 0
    with pytest.raises(ValueError, match=f"kv budget: {server}/none/metrics: expected status 200, got 404"):
        ask_kv_tokens(f"{server}/none", None)


@pytest.mark.parametrize("server", ["other 1\n"], indirect=True)
def test_a_target_that_is_no_vllm_is_named(server: str) -> None:
    with pytest.raises(ValueError, match=f"kv budget: {server}/metrics: expected vllm:cache_config_info"):
        ask_kv_tokens(server, None)


def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"kv budget: cannot read http://127\.0\.0\.1:1/metrics: "):
        ask_kv_tokens("http://127.0.0.1:1", None)


def test_capacities(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text('{"capacity_rps": 12.5, "points": []}')
    assert read_capacity_rps(str(path)) == 12.5
    options = ScaleOptions(capacity="40", load=0.7)
    assert asked_rate_rps(options, None, SourceOptions(), target="unasked") == pytest.approx(28.0)
    for text, message in (
        ('{"x": 1}', "sweep.json: expected a sweep's JSON with capacity_rps"),
        ("\xff", "sweep.json: expected a sweep's JSON with capacity_rps"),
        ('{"capacity_rps": -1}', "sweep.json: capacity_rps: expected requests/s > 0, got -1"),
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            read_capacity_rps(str(path))
    for text in ("0", "nan", "inf", "-3"):
        with pytest.raises(ValueError, match=f"capacity: expected requests/s > 0, got {text}"):
            read_capacity_rps(text)
    with pytest.raises(FileNotFoundError):
        read_capacity_rps(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"load": 0.5}, "load: expected with a capacity"),
        ({"capacity": "5"}, "load: expected with a capacity"),
        ({"capacity": "5", "load": 0.0}, "load: expected a share above 0 to 100, got 0"),
        ({"kv_budget": -0.1}, "kv budget: expected a share above 0 to 100, got -0.1"),
        ({"kv_budget": 0.1, "capacity": "5", "load": 1.0}, "kv budget: expected without a capacity"),
        ({"kv_budget": 0.1, "tpot_s": 0.0}, "tpot: expected seconds > 0, got 0"),
        ({"kv_budget": 0.1, "ttft_s": -1.0}, "ttft: expected seconds >= 0, got -1"),
        ({"tpot_s": 0.1}, "tpot: expected with a kv budget"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleOptions(**wrong)


@pytest.mark.parametrize("elapsed_s", [None, 0.0])
def test_rows_that_do_not_say_how_long_they_stay(elapsed_s: float | None) -> None:
    rows = ROWS.with_columns(elapsed_s=pl.lit(elapsed_s, dtype=pl.Float64))
    with pytest.raises(ValueError, match="kv budget: expected rows with elapsed times, or a tpot, got neither"):
        mean_token_seconds([rows])
