"""The BurstGPT paper's finding on a real vLLM with a small KV cache: what bursts cost at an equal mean rate.

The cache holds seven of these requests at their end and 23 at their beginning. At 4 requests/s Poisson arrivals are two
to four at a time; the bursts of the other arrivals, which are the same in every run, are of ten and more, and their
answers outgrow the cache. Simulated, steps may take 5 to 25 ms for that: preempted are, over both seeds, 0 to 17 of
Poisson's requests, 29 to 44 of Gamma's and 9 to 33 of the trace's. A much slower machine preempts them all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from replay.sweep import Sweep
from tests.e2e.conftest import own_vllm
from tests.e2e.harness import MODEL, burstgate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCKS, BLOCK_TOKENS, MAX_MODEL_LEN = 24, 32, 512
SWEEP_TIMEOUT_S = 180.0
"""Six cells of 8 s, and the time between them."""


@pytest.fixture(scope="module")
def small_vllm_url(vllm_home: Path) -> Iterator[str]:
    """A vLLM of its own, also where another runs: the cache's size is a flag of its start. It has computed before."""
    flags = ("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(BLOCKS), "--max-num-seqs", "64")
    with own_vllm(MAX_MODEL_LEN, *flags) as url:
        body = {"model": MODEL, "prompt": ["a b c"] * 8, "max_tokens": 60, "ignore_eos": True}
        for _ in range(2):
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).status_code == 200
        yield url


def test_bursts_cost_latency_and_preemptions(small_vllm_url: str, real_traces: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    done = burstgate(
        "sweep", "--target", small_vllm_url, "--model", MODEL, "--endpoint", "completions",
        "--trace", real_traces / "BurstGPT_1_head.csv", "--request-tokens", "30", "--response-tokens", "60",
        "--rates", "4", "--requests", "30", "--shapes", "0.05", "--seed", "1", "--seeds", "2", "--timeout", "60",
        "--idle-timeout", "20", "--max-lag", "0.25", "--json", file,
        timeout_s=SWEEP_TIMEOUT_S,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = msgspec.json.decode(file.read_bytes(), type=Sweep)
    assert len(found.cells) == 6
    assert all(cell.ok == cell.requests == 30 for cell in found.cells)
    preempted, ttft_p50_s = (
        {
            name: sum(getattr(cell, figure) for cell in found.cells if cell.arrivals == name)
            for name in ("poisson", "gamma 0.05", "trace")
        }
        for figure in ("preemptions", "ttft_p50_s")
    )
    assert preempted["gamma 0.05"] > preempted["poisson"], done.stdout
    assert preempted["gamma 0.05"] + preempted["trace"] > 2 * preempted["poisson"], done.stdout
    # Of 30 requests the 99th percentile is the slowest, and one hiccup of a shared machine (0.17 s was seen) makes it.
    assert ttft_p50_s["gamma 0.05"] > ttft_p50_s["poisson"], done.stdout
