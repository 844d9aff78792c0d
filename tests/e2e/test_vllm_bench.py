"""`vllm bench serve`, a load generator that this project did not write, through the gateway."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import MODEL, Installation, clean_environment
from traces.record import Outcome, TokenSource

pytestmark = pytest.mark.vllm

PROMPTS = 24
BENCH_TIMEOUT_S = 240.0
BACKENDS = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions"}


def run_bench(home: Path, url: str, backend: str, result: Path) -> dict[str, Any]:
    """One run; what it measured, its lists ordered by request."""
    command = [
        home / "venv/bin/vllm", "bench", "serve", "--backend", backend, "--base-url", url,
        "--endpoint", BACKENDS[backend], "--model", MODEL, "--tokenizer", home / "tiny",
        "--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "12",
        "--random-range-ratio", "0.5", "--num-prompts", PROMPTS, "--request-rate", "20", "--seed", "0",
        "--ignore-eos", "--request-id-prefix", f"{backend}-", "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", result.parent, "--result-filename", result.name,
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        env=clean_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}),
        timeout=BENCH_TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_request_of_vllm_bench_is_in_the_database(
    backend: str, vllm_url: str, vllm_home: Path, tmp_path: Path
) -> None:
    with Installation(vllm_url, data_dir=tmp_path / "data") as gateway:
        measured = run_bench(vllm_home, gateway.gateway_url, backend, tmp_path / "result.json")
        gateway.stop()
        rows = gateway.rows()
        assert gateway.doctor()["accounting"].is_ok
    assert (measured["completed"], measured["failed"]) == (PROMPTS, 0)
    assert not any(measured["errors"])
    assert {row.outcome for row in rows} == {Outcome.OK}
    generated = [row for row in rows if row.endpoint == BACKENDS[backend]]
    by_id = {row.client_request_id: row for row in generated}
    assert len(by_id) == len(generated), "a request is there twice"
    for index in range(PROMPTS):
        row = by_id[f"{backend}-{index}"]
        assert row.stream
        assert row.token_source is TokenSource.USAGE
        assert (row.request_tokens, row.response_tokens) == (
            measured["input_lens"][index],
            measured["output_lens"][index],
        )
        # The gateway sees each chunk no later than its client. For a chat the bench takes the chunk that only opens the
        # message for the first token; the record takes the first one with content, and with a tool parser vLLM sends
        # none for tokens that show nothing.
        if backend == "openai":
            assert row.ttft_s is not None
            assert 0 < row.ttft_s <= measured["ttfts"][index]
        elif row.ttft_s is not None:
            assert 0 < row.ttft_s <= measured["ttfts"][index] + sum(measured["itls"][index])
    # Beside them only the bench's own check that the server answers; `/tokenize` and `/metrics` it asks as well.
    assert len(generated) - PROMPTS in (0, 1)
