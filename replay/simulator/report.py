"""A simulated trace for the eyes, and for programs. Pure."""

from __future__ import annotations

import msgspec

from replay.metrics import Distribution
from replay.simulator.config import SimulatorConfig
from replay.simulator.virtual import VirtualSummary


def as_json(summary: VirtualSummary) -> str:
    """One line of JSON: the fields of VirtualSummary. The same trace, settings and seed give the same line."""
    return msgspec.json.encode(summary).decode()


def as_text(summary: VirtualSummary, config: SimulatorConfig, wall_s: float) -> str:
    """Lines for a terminal. wall_s: seconds that the simulation itself took."""
    s = summary
    failures = ", ".join(f"{count:,} {name}" for name, count in s.failures.items()) or "none"
    speed = f", {s.span_s / wall_s:,.0f} x real time" if wall_s > 0 else ""
    lines = [
        f"rows      {s.rows_read:,} read, {s.not_sent:,} without token counts and not sent",
        f"requests  {s.requests:,}, {s.ok:,} ok, failures: {failures}",
        f"time      {s.span_s:,.1f} s virtual in {wall_s:,.2f} s{speed}; {s.steps:,} steps",
        f"rate      {_number(s.offered_rps, ' req/s')} offered, {_number(s.response_tokens_per_s, ' output tokens/s')};"
        f" at most {s.max_running:,} running, {s.max_waiting:,} waiting",
        f"KV cache  {s.kv_blocks:,} blocks of {config.block_size} tokens, {_percent(s.kv_usage_mean)} used in the mean,"
        f" {_percent(s.kv_usage_peak)} at most",
        f"preempted {s.preemptions:,} times, {s.preempted_requests:,} requests",
        f"prefixes  {_percent(s.prefix_hit_rate)} of the prompt tokens found in the cache"
        if s.prefix_hit_rate is not None
        else "prefixes  not cached",
        "",
        f"{'milliseconds':<22}" + "".join(f"{name:>11}" for name in ("mean", "p50", "p90", "p95", "p99", "max")),
    ]
    rows = (
        ("queue", s.queue_s),
        ("time to first token", s.ttft_s),
        ("time per output token", s.tpot_s),
        ("end to end", s.e2e_s),
    )
    return "\n".join([*lines, *(f"{name:<22}" + _figures(figures) for name, figures in rows)])


def _figures(figures: Distribution | None) -> str:
    if figures is None:
        return f"{'-':>11}" * 6
    values = (figures.mean, figures.p50, figures.p90, figures.p95, figures.p99, figures.max)
    return "".join(f"{_milliseconds(value):>11}" for value in values)


def _milliseconds(value_s: float) -> str:
    value_ms = value_s * 1e3
    return f"{value_ms:,.0f}" if value_ms >= 100 else f"{value_ms:.2f}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.2f}{unit}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"
