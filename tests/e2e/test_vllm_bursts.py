"""The BurstGPT paper's finding on a real vLLM with a small KV cache: what bursts cost at an equal mean rate."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from replay.sweep import Sweep
from tests.e2e.conftest import REPOSITORY, START_TIMEOUT_S, _free_port, _is_healthy, _lower_priority
from tests.e2e.harness import MODEL, Process, burstgate, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCKS, BLOCK_TOKENS = 80, 32
"""A cache of 2,560 tokens: twelve of the requests below."""
SWEEP_TIMEOUT_S = 170.0


@pytest.fixture(scope="module")
def small_vllm_url(vllm_home: Path) -> Iterator[str]:
    """A vLLM of its own: the cache's size is a flag of its start."""
    serve = REPOSITORY / os.environ.get("BURSTGATE_VLLM", "../shared/vllm-cpu") / "serve.sh"
    if not serve.exists():
        pytest.skip(f"needs a vLLM of its own: no {serve} (BURSTGATE_VLLM), and no flag of a running one is ours")
    url = f"http://127.0.0.1:{(port := _free_port())}"
    process = Process(
        [serve, str(port), "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(BLOCKS)],
        {"VLLM_MAX_MODEL_LEN": "1024"},
        cwd=REPOSITORY,
    )
    try:
        _lower_priority(process.pid)
        wait_until(
            lambda: _is_healthy(url) or not process.is_running, START_TIMEOUT_S, f"{url}/health is 200", poll_s=0.5
        )
        assert process.is_running, f"vLLM ended:\n{process.output}"
        yield url
        process.terminate(60.0)
    finally:
        process.kill_tree()


def test_bursts_cost_latency_and_preemptions(small_vllm_url: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    done = burstgate(
        "sweep", "--target", small_vllm_url, "--model", MODEL, "--request-tokens", "150", "--response-tokens", "60",
        "--rates", "8", "--requests", "60", "--shapes", "0.15", "--seeds", "3", "--json", file,
        timeout_s=SWEEP_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = msgspec.json.decode(file.read_bytes(), type=Sweep)
    assert all(cell.ok == cell.requests == 60 for cell in found.cells)
    calm, wild = ([cell for cell in found.cells if cell.arrivals == arrivals] for arrivals in ("poisson", "gamma 0.15"))
    for figure in ("ttft_p99_s", "preemptions", "kv_usage_mean"):
        assert statistics.median(getattr(cell, figure) for cell in wild) > statistics.median(
            getattr(cell, figure) for cell in calm
        ), figure
