"""The paper's finding through the gateway: bursts injected at one mean rate, Poisson against Gamma gaps of shape 0.25.

    python -m benchmarks.injection OUT.csv [--seeds 5] [--duration 20]

A simulated vLLM with a small KV cache, a gateway in front of it whose clients wait FIRST_BYTE_S for a first token, and
`burstgate inject` for each arrival process and seed in turn; what is written is what the gateway recorded: a line an
injection, as `benchmarks/bursts.py` draws them.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
from pathlib import Path

import httpx
import msgspec
import numpy as np

from storage.query import Filter
from tests.e2e.harness import Installation, Simulator, burstgate, wait_until
from traces.record import Outcome

MODEL = "m"
RATE_RPS = 16.0
SHAPES = {"poisson": 1.0, "gamma 0.25": 0.25}
FIRST_BYTE_S = 0.8
MACHINE = ("--kv-capacity-tokens", "6400", "--max-model-len", "2048", "--models", MODEL)
LENGTHS = {"request_tokens": 256, "response_tokens": 64}
SETTINGS = {
    "BURSTGATE_INJECTION__ALLOWED": "true",
    "BURSTGATE_INJECTION__MAX_RATE_RPS": "1000",
    "BURSTGATE_TIMEOUTS__FIRST_BYTE_S": str(FIRST_BYTE_S),
    "BURSTGATE_HEALTH__MAX_FAILURES": "1000000",  # the simulator is slow here, never ill
    "BURSTGATE_HEALTH__OUTLIER_MARGIN": "0",
}
COLUMNS = (
    "arrivals", "shape", "seed", "rate_rps", "requests", "achieved_rps", "cv", "ttft_p50_s", "ttft_p99_s", "failed",
    "failure_share", "preemptions",
)  # fmt: skip


def preemptions(url: str) -> int:
    text = httpx.get(f"{url}/metrics").text
    return round(
        sum(float(value) for value in re.findall(r"^vllm:num_preemptions_total\S* (\S+)$", text, re.MULTILINE))
    )


def inject(serving: Installation, upstream: str, name: str, seed: int, duration_s: float) -> dict[str, object]:
    run_id, before = f"{name.replace(' ', '-')}-{seed}", preemptions(upstream)
    plan = serving.data_dir / "plan.json"
    fields = {"model": MODEL, "rate_rps": RATE_RPS, "shape": SHAPES[name], "duration_s": duration_s, "seed": seed}
    plan.write_bytes(msgspec.json.encode({**fields, **LENGTHS, "run_id": run_id}))
    done = burstgate("inject", plan, "--watch", "--json", "--control", serving.control_url)
    assert done.returncode == 0, done.stdout + done.stderr
    sent = msgspec.json.decode(done.stdout)["sent"]
    selection = Filter(run_ids=(run_id,), models=(MODEL,))
    wait_until(lambda: len(serving.rows(selection)) == sent, 30.0, "all are recorded")
    rows = serving.rows(selection)
    gaps_s = np.diff([row.received_at for row in rows])
    ttft_s = [row.ttft_s for row in rows if row.ttft_s is not None]
    failed = sum(row.outcome is not Outcome.OK for row in rows)
    return {
        "arrivals": name, "shape": SHAPES[name], "seed": seed, "rate_rps": RATE_RPS, "requests": len(rows),
        "achieved_rps": round(1 / float(np.mean(gaps_s)), 2), "cv": round(float(np.std(gaps_s) / np.mean(gaps_s)), 2),
        "ttft_p50_s": round(float(np.quantile(ttft_s, 0.5)), 4),
        "ttft_p99_s": round(float(np.quantile(ttft_s, 0.99)), 4),
        "failed": failed, "failure_share": round(failed / len(rows), 4), "preemptions": preemptions(upstream) - before,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--duration", type=float, default=20.0)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="burstgate-injection-") as folder,
        Simulator(*MACHINE) as upstream,
        Installation(upstream.url, data_dir=Path(folder), env=SETTINGS) as serving,
        given.out.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in range(given.seeds):
            for name in SHAPES:  # in turns, so that a machine that drifts does so for both
                found = inject(serving, upstream.url, name, seed, given.duration)
                print(found, flush=True)
                writer.writerow(found)


if __name__ == "__main__":
    main()
