"""What a replay says of a real vLLM: prefixes hit its cache as the trace has them, and its latencies are those that
vLLM's own benchmark measures for the same schedule."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.harness import MODEL, burstgate, clean_environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK_TOKENS = 512
MAX_REQUEST_TOKENS = 2048
ROWS = 60
TIMEOUT_S = 300.0

NOISE = 0.4
"""Two medians of one server that were measured one after the other, on a machine that does other things as well."""


def mooncake_window(real_traces: Path, folder: Path, *, first: int, output_length: int, speed: float) -> Path:
    """A part of Mooncake's conversation trace: short prompts, short answers, `speed` times as dense."""
    source = real_traces / "mooncake_conversation_trace.jsonl"
    if not source.exists():
        pytest.skip(f"needs {source} (BURSTGATE_TRACES)")
    rows = [json.loads(line) for line in source.read_text().splitlines()[first:]]
    rows = [row for row in rows if row["input_length"] <= MAX_REQUEST_TOKENS][:ROWS]
    window = folder / "window.jsonl"
    lines = [
        row | {"timestamp": int((row["timestamp"] - rows[0]["timestamp"]) / speed), "output_length": output_length}
        for row in rows
    ]
    window.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return window


def share_of_known_tokens(window: Path) -> float:
    """The tokens of prompts that stand in blocks which an earlier prompt began with as well, over all tokens."""
    seen: set[int] = set()
    known = total = 0
    for row in map(json.loads, window.read_text().splitlines()):
        ids = row["hash_ids"]
        leading = next((place for place, each in enumerate(ids) if each not in seen), len(ids))
        # A whole block is known only where the prompt fills it; and vLLM computes the last token in any case.
        known += min(leading * BLOCK_TOKENS, row["input_length"] - 1)
        total += row["input_length"]
        seen.update(ids)
    return known / total


def prefix_cache(url: str) -> tuple[float, float]:
    """Tokens that vLLM has looked up in its prefix cache, and found there."""
    text = httpx.get(f"{url}/metrics").text
    queried, hit = (
        sum(float(value) for value in re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", text, re.MULTILINE))
        for name in ("queries", "hits")
    )
    return queried, hit


def test_prefix_cache_is_hit_as_often_as_the_trace_has_it(vllm_url: str, real_traces: Path, tmp_path: Path) -> None:
    window = mooncake_window(real_traces, tmp_path, first=600, output_length=4, speed=4.0)
    queried, hit = prefix_cache(vllm_url)
    done = burstgate(
        "replay", window, "--target", vllm_url, "--model", MODEL, "--endpoint", "completions", "--seed", "20251",
        "--json", tmp_path / "summary.json", "--max-error-rate", "0", "--max-lag", "1", "--quiet", timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["prompts"]["exact_share"] == 1.0, told["prompts"]
    queried_after, hit_after = prefix_cache(vllm_url)
    share = (hit_after - hit) / (queried_after - queried)
    expected = share_of_known_tokens(window)
    print(f"\nprefix cache hit share {share:.4f}, in the trace {expected:.4f}")
    assert expected > 0.3
    assert abs(share - expected) <= 0.02


def bench(home: Path, url: str, trace: Path, result: Path) -> dict[str, Any]:
    """`vllm bench serve` at the stamps of a timed_trace."""
    command = [
        home / "venv/bin/vllm", "bench", "serve", "--backend", "openai", "--base-url", url,
        "--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", home / "tiny",
        "--dataset-name", "timed_trace", "--dataset-path", trace, "--timed-trace-chunk-hash-size", BLOCK_TOKENS,
        "--num-prompts", ROWS, "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", result.parent, "--result-filename", result.name,
    ]  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        env=clean_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}),
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def test_latencies_are_those_of_vllms_own_benchmark(
    vllm_url: str, vllm_home: Path, real_traces: Path, tmp_path: Path
) -> None:
    window = mooncake_window(real_traces, tmp_path, first=1500, output_length=24, speed=4.0)
    trace = tmp_path / "window.timed.jsonl"
    done = burstgate("convert", window, trace, "--to", "timed_trace")
    assert done.returncode == 0, done.stderr
    theirs = bench(vllm_home, vllm_url, trace, tmp_path / "theirs.json")
    done = burstgate(
        "replay", trace, "--target", vllm_url, "--model", MODEL, "--endpoint", "completions", "--seed", "20252",
        "--samples", tmp_path / "ours.jsonl", "--max-error-rate", "0", "--max-lag", "1", "--quiet", timeout_s=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert (theirs["completed"], len(ours)) == (ROWS, ROWS)
    assert sorted(theirs["input_lens"]) == sorted(sample["request_tokens_got"] for sample in ours)
    assert sorted(theirs["output_lens"]) == sorted(sample["response_tokens_got"] for sample in ours)
    their_tpot_s = [sum(gaps) / len(gaps) for gaps in theirs["itls"]]
    for name, their_values, our_values in (
        ("TTFT", theirs["ttfts"], [sample["ttft_s"] for sample in ours]),
        ("TPOT", their_tpot_s, [sample["tpot_s"] for sample in ours]),
    ):
        their_ms, our_ms = (float(np.median(values)) * 1e3 for values in (their_values, our_values))
        print(f"\nmedian {name}: {our_ms:.1f} ms, by vllm bench serve {their_ms:.1f} ms")
        assert abs(our_ms / their_ms - 1) <= NOISE
