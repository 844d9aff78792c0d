"""How many times faster than real time the simulator runs on its virtual clock, and the paper's finding on it.

    taskset -c 0 python -m benchmarks.simulator [REQUESTS]

Speed: REQUESTS (100,000) Poisson arrivals at 10 requests/s with lengths like BurstGPT's, on presets that it loads
lightly and fully, without prefixes and with one shared by all. Planning the schedule is counted, reading a file is not.
Burstiness: 20,000 requests of one mean rate and the same lengths, Gamma gaps of falling shape, on a small KV cache.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import polars as pl

from replay.metrics import Distribution
from replay.schedule import PlanOptions
from replay.simulator.config import SimulatorConfig
from replay.simulator.costs import PRESETS
from replay.simulator.virtual import VirtualOptions, VirtualSummary, simulate
from traces.batch import complete_batch

MACHINES = ("h100-8b", "a100-8b", "h100-70b-tp4")
SHAPES = (1.0, 0.5, 0.25, 0.1)
OPTIONS = VirtualOptions(PlanOptions(ties="keep"))


def generated(rows: int, rate_rps: float, gamma_shape: float, *, has_prefixes: bool = False) -> pl.DataFrame:
    """Gaps scaled to exactly the mean rate; log-normal lengths with BurstGPT's means of about 620 and 250 tokens."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(5.9, 1.0, rows), 1, 6000).astype(np.int64)
    answers = np.clip(rng.lognormal(5.1, 0.9, rows), 1, 1500).astype(np.int64)
    gaps_s = rng.gamma(gamma_shape, 1.0, rows)
    columns = {
        "request_id": [f"{row:032x}" for row in range(rows)],
        "received_at": np.cumsum(gaps_s / gaps_s.mean() / rate_rps),
        "model": ["m"] * rows,
        "request_tokens": prompts,
        "response_tokens": answers,
        "log_type": ["API log"] * rows,
        "outcome": ["ok"] * rows,
    }
    if has_prefixes:
        named = [
            [1] + [row * 100 + at for at in range(2, -(-int(tokens) // 512) + 1)] for row, tokens in enumerate(prompts)
        ]
        columns["prefix_blocks"] = pl.Series(named, dtype=pl.List(pl.UInt64()))
    return complete_batch(pl.DataFrame(columns))


def timed(frame: pl.DataFrame, config: SimulatorConfig) -> tuple[VirtualSummary, float]:
    began_s = time.perf_counter()
    summary = simulate([frame], config, OPTIONS)
    return summary, time.perf_counter() - began_s


def p99_s(figures: Distribution | None) -> float:
    return figures.p99 if figures is not None else float("nan")


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(
        f"{'machine':<16}{'prefixes':<10}{'x real time':>12}{'requests/s':>12}{'steps/s':>12}{'running':>9}{'hits':>8}"
    )
    for has_prefixes in (False, True):
        frame = generated(rows, 10.0, 1.0, has_prefixes=has_prefixes)
        for name in MACHINES:
            summary, wall_s = timed(frame, SimulatorConfig(**PRESETS[name]))  # type: ignore[arg-type]
            print(
                f"{name:<16}{'shared' if has_prefixes else 'none':<10}{summary.span_s / wall_s:>12,.0f}"
                f"{rows / wall_s:>12,.0f}{summary.steps / wall_s:>12,.0f}{summary.max_running:>9,}"
                f"{summary.prefix_hit_rate or 0:>8.1%}"
            )
    config = SimulatorConfig(kv_capacity_tokens=20_000, max_model_len=8192)
    print(
        f"\n{'Gamma shape':<13}{'rate':>7}{'TTFT p99':>11}{'TPOT p99':>11}{'preempted':>11}{'KV mean':>9}{'KV peak':>9}"
    )
    for shape in SHAPES:
        summary, _ = timed(generated(20_000, 5.0, shape), config)
        print(
            f"{shape:<13g}{summary.offered_rps or 0:>7.2f}{p99_s(summary.ttft_s):>9,.2f} s"
            f"{p99_s(summary.tpot_s) * 1e3:>8,.1f} ms{summary.preemptions:>11,}"
            f"{summary.kv_usage_mean or 0:>9.1%}{summary.kv_usage_peak:>9.1%}"
        )


if __name__ == "__main__":
    main()
