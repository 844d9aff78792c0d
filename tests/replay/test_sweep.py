from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from proxy.cli import main
from replay.cells import live_cells, virtual_cells, wait_until_idle
from replay.client import ReplayError
from replay.metrics import Slo
from replay.runner import ReplayOptions
from replay.schedule import Planned
from replay.simulator.__main__ import machine_config
from replay.simulator.config import SimulatorConfig
from replay.simulator.server import running
from replay.sweep import (
    Arrivals,
    Cell,
    Ended,
    Measured,
    RunCell,
    Spread,
    Sweep,
    SweepOptions,
    Workload,
    as_csv,
    judge,
    ladder,
    measure,
    numbers,
    sweep,
)
from replay.sweep_report import page, render
from traces.codec import read_trace

TRACES = Path(os.environ.get("BURSTGATE_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
POISSON = Arrivals("poisson", 1.0)
TRACE = Arrivals("trace", None)
SMALL = SimulatorConfig(kv_capacity_tokens=4000, max_model_len=1024, step_base_s=0.01)
FIXED = Workload([Planned(n, float(n), None, None, 100, 20) for n in range(2)], has_gaps=False)


def rows(*due_s: float) -> list[Planned]:
    return [Planned(n, at_s, f"s{n}", "m", 10 + n, 5 + n) for n, at_s in enumerate(due_s)]


# --- options, arrivals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rates_rps": ()}, "rates: expected 1 to 1000 of them, got 0"),
        ({"rates_rps": (2.0, 1.0)}, "rates: expected ascending, above 0 to 1e.07, got 1"),
        ({"rates_rps": (0.0, 1.0)}, "rates: expected ascending, above 0"),
        ({"rates_rps": (math.nan,)}, "rates: expected ascending, above 0"),
        ({"shapes": (0.0,)}, "shapes: expected 0.001 to 1e.06, got 0"),
        ({"shapes": (0.5, 0.5)}, "shapes: expected each once"),
        ({"shapes": (1.0,)}, "shapes: expected each once, and not 1"),
        ({"requests": 10}, "requests: expected either"),
        ({"duration_s": 0.0}, "duration: expected seconds > 0, got 0"),
        ({"duration_s": 1.0}, r"requests: expected 2 to 1,000,000 in a cell, got 1 at 1 requests/s"),
        ({"duration_s": 1e7}, "requests: expected 2 to 1,000,000 in a cell"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"seed": -1}, "seeds: expected at least 1"),
    ],
)
def test_options_that_can_not_be(changed: dict[str, object], message: str) -> None:
    options = SweepOptions(rates_rps=(1.0, 2.0))
    with pytest.raises(ValueError, match=message):
        replace(options, **changed)  # type: ignore[arg-type]


def test_texts() -> None:
    assert numbers("1, 2.5,4", "rates") == (1.0, 2.5, 4.0)
    assert numbers("", "shapes") == ()
    assert ladder(1, 32, 6) == (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    with pytest.raises(ValueError, match="rates: expected numbers with commas between them, got 'x'"):
        numbers("1,x", "rates")
    with pytest.raises(ValueError, match="from: expected above 0 and below to"):
        ladder(4, 2, 3)
    with pytest.raises(ValueError, match="steps: expected 2 to"):
        ladder(1, 2, 1)


@settings(deadline=None)
@given(
    st.sampled_from([1.0, 0.5, 0.25, 4.0, None]),
    st.floats(0.1, 1000),
    st.integers(0, 5),
    st.integers(2, 60),
)
def test_a_cell_has_exactly_its_mean_rate(shape: float | None, rate_rps: float, seed: int, requests: int) -> None:
    workload = Workload(rows(0.0, 0.5, 7.0, 7.2, 30.0), has_gaps=True)
    arrivals = Arrivals("x", shape)
    trace = workload.trace(arrivals, rate_rps, seed, requests)
    at_s = trace["received_at"].to_numpy()
    assert at_s[0] == 0
    assert at_s[-1] == pytest.approx((requests - 1) / rate_rps, abs=1e-6)
    assert (np.diff(at_s) >= 0).all()
    assert trace.equals(workload.trace(arrivals, rate_rps, seed, requests))
    # Only the times differ from those of other arrivals.
    other = workload.trace(POISSON, rate_rps, seed, requests).drop("received_at")
    assert trace.drop("received_at").equals(other)


def test_a_trace_goes_round_with_its_own_gaps() -> None:
    workload = Workload(rows(0.0, 1.0, 4.0), has_gaps=True)  # gaps 1 and 3, 2 on average between its rounds
    first, second = (workload.trace(TRACE, 0.5, seed, 4) for seed in (0, 1))
    assert first["request_tokens"].to_list() == [10, 11, 12, 10]
    assert first["received_at"].to_list() == [0.0, 1.0, 4.0, 6.0]
    assert second["request_tokens"].to_list() == [11, 12, 10, 11]  # where the first one ended
    assert np.diff(second["received_at"]).tolist() == pytest.approx([3.0, 2.0, 1.0])


def test_gaps_have_their_shape() -> None:
    for shape in (1.0, 0.5, 0.25):
        gaps_s = np.diff(FIXED.trace(Arrivals("x", shape), 1.0, 0, 50_000)["received_at"])
        assert 1 / (np.std(gaps_s) / np.mean(gaps_s)) ** 2 == pytest.approx(shape, rel=0.1)


def test_a_workload_needs_rows_that_can_be_sent() -> None:
    unsendable = Planned(0, 0.0, None, None, None, None)
    with pytest.raises(ValueError, match="trace: expected at least 2 rows with both lengths, got 1"):
        Workload([*rows(0.0), unsendable], has_gaps=True)
    with pytest.raises(ValueError, match="trace: expected rows that span some time"):
        Workload(rows(1.0, 1.0), has_gaps=True)
    with pytest.raises(ValueError, match="trace: expected rows that span some time, got 2 at once"):
        Workload(rows(1.0, 1.0, 5.0), has_gaps=True).trace(TRACE, 1.0, 0, 2)


# --- figures, the knee ----------------------------------------------------------------------------------------------


def test_a_cell_by_hand() -> None:
    ended = [
        Ended(1.0, "ok", 0.1, 0.01, 2.0),
        Ended(2.0, "ok", 0.3, None, 0.3),
        Ended(5.0, "upstream_timeout", 9.0, None, 10.0),
        Ended(3.0, "rejected", None, None, None),
    ]
    cell = measure(POISSON, 0.5, 7, Measured(ended, 3, 0.25, 0.75), Slo(ttft_s=0.2))
    assert cell == Cell(
        arrivals="poisson",
        gamma_shape=1.0,
        rate_rps=0.5,
        seed=7,
        requests=4,
        ok=2,
        failures={"rejected": 1, "upstream_timeout": 1},
        arrivals_s=4.0,
        answered_s=14.0,
        achieved_rps=2 / 14,
        ttft_p50_s=0.1,
        ttft_p99_s=0.3,
        tpot_p99_s=0.01,
        e2e_p99_s=2.0,
        failure_share=0.5,
        preemptions=3,
        kv_usage_mean=0.25,
        kv_usage_max=0.75,
        goodput_share=0.25,
        goodput_rps=1 / 14,
        dispatch_lag_p99_s=None,
    )
    header, line, end = as_csv([cell]).split("\n")
    assert header.split(",")[:5] == ["arrivals", "gamma_shape", "rate_rps", "seed", "requests"]
    assert line.endswith("rejected=1 upstream_timeout=1")
    assert end == ""


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_s=0.2), 1),  # one is too late, and one has no first token
        (Slo(e2e_s=1.0), 2),
        (Slo(tpot_s=0.005), 2),  # an answer of one token has nothing to miss
        (Slo(itl_s=0.1), 2),
        (Slo(e2e_s=9.0), 3),
    ],
)
def test_goodput_is_the_replay_s(slo: Slo, good: int) -> None:
    ended = [
        Ended(0.0, "ok", 0.1, 0.01, 2.0, 0.5),
        Ended(1.0, "ok", 0.3, None, 0.3),
        Ended(2.0, "ok", None, None, 0.1, 0.01),
        Ended(3.0, "rejected", 0.01, 0.001, 0.02),  # a failure is a miss, however fast
    ]
    cell = measure(POISSON, 1.0, 0, Measured(ended), slo)
    assert cell.goodput_share == good / 4
    assert cell.goodput_rps == pytest.approx(good / 3.02)


def at(
    rate_rps: float,
    ttft_s: float | None,
    *,
    late_s: float = 0.0,
    ok: int = 100,
    seed: int = 0,
    invalid: str | None = None,
) -> Cell:
    """100 requests at a rate; answers take 2 s, and the last one comes `late_s` after that."""
    span_s = 100 / rate_rps
    found = measure(POISSON, rate_rps, seed, Measured([]), None)
    return msgspec.structs.replace(
        found, requests=100, ok=ok, arrivals_s=span_s, answered_s=span_s + 2 + late_s, ttft_p99_s=ttft_s, e2e_p99_s=2.0,
        failure_share=1 - ok / 100, invalid=invalid,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "slo", "why_not"),
    [
        ([at(1, 0.1), at(2, 1.0)], None, [None, None]),
        ([at(1, 0.1), at(2, 1.01)], None, [None, "TTFT p99 1.01 s > 1 s"]),
        ([at(1, 0.1), at(2, 1.0)], Slo(ttft_s=0.5), [None, "TTFT p99 1 s > 0.5 s"]),
        ([at(1, 0.6), at(2, 1.0)], Slo(tpot_s=0.5), [None, None]),  # no bound of TTFT's: ten times the lowest rate's
        # The tail of 2 s is what answers take anyway; 3 s on top of 50 are 5.7 % too late.
        ([at(1, 0.1), at(2, 0.1, late_s=2.6)], None, [None, None]),
        ([at(1, 0.1), at(2, 0.1, late_s=3)], None, [None, "served 94.3% < 95%"]),
        ([at(1, 0.1), at(2, 0.1, ok=95)], None, [None, None]),
        ([at(1, 0.1), at(2, 0.1, ok=94)], None, [None, "served 94.0% < 95%"]),
        ([at(1, None, ok=0), at(2, 0.1)], None, ["served 0.0% < 95%", None]),
        # The median of three seeds.
        ([at(1, 0.1), at(2, 9.0), at(2, 0.9, seed=1), at(2, 0.1, seed=2)], None, [None, None]),
        ([], None, []),
        # Invalid cells are left out, of the limit too; a rate that has no others does not hold.
        ([at(1, 0.1), at(2, 9.0, invalid="late"), at(2, 0.1, seed=1)], None, [None, None]),
        ([at(1, 9.0, invalid="late"), at(1, 0.1, seed=1), at(2, 2.0)], None, [None, "TTFT p99 2 s > 1 s"]),
        ([at(1, 0.1), at(2, 0.1, invalid="late")], None, [None, "no cell is valid: late"]),
    ],
)
def test_whether_a_rate_holds(cells: list[Cell], slo: Slo | None, why_not: list[str | None]) -> None:
    rungs = judge(cells, slo)
    assert [rung.why_not for rung in rungs] == why_not
    assert [rung.holds for rung in rungs] == [reason is None for reason in why_not]


def scripted(slow_from_rps: float, seen: list[float], stop_after: int | None = None) -> RunCell:
    """A target whose TTFT jumps from a rate on."""

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        if stop_after is not None and len(seen) == stop_after:
            return None
        rate_rps = (trace.height - 1) / trace["received_at"][-1]
        seen.append(round(rate_rps, 3))
        ttft_s = 0.01 if rate_rps < slow_from_rps else 1.0
        return Measured([Ended(at_s, "ok", ttft_s, 0.01, 1.5) for at_s in trace["received_at"]])

    return run


OPTIONS = SweepOptions(rates_rps=(1.0, 2.0, 4.0, 8.0), shapes=(0.25,), duration_s=None, requests=20, seeds=2)


def swept(options: SweepOptions, run: RunCell, workload: Workload = FIXED) -> Sweep:
    return sweep(options, workload, run, target="t", lengths="l")


def test_the_climb_ends_after_the_knee() -> None:
    seen: list[float] = []
    found = swept(OPTIONS, scripted(3.0, seen))
    assert seen == [1.0] * 4 + [2.0] * 4 + [4.0] * 4
    assert [(each.arrivals, each.capacity_rps, each.is_knee_found) for each in found.capacities] == [
        ("poisson", 2.0, True),
        ("gamma 0.25", 2.0, True),
    ]
    assert [(cell.arrivals, cell.seed) for cell in found.cells[:4]] == [
        ("poisson", 0),
        ("gamma 0.25", 0),
        ("poisson", 1),
        ("gamma 0.25", 1),
    ]
    assert found.rungs[0].figures["ttft_p99_s"] == Spread(0.01, 0.01, 0.01)


def test_all_rates_and_a_ladder_without_a_knee() -> None:
    seen: list[float] = []
    found = swept(replace(OPTIONS, is_full=True), scripted(3.0, seen))
    assert seen[-1] == 8.0
    assert [each.capacity_rps for each in found.capacities] == [2.0, 2.0]
    found = swept(OPTIONS, scripted(100.0, []))
    assert [(each.capacity_rps, each.is_knee_found) for each in found.capacities] == [(8.0, False)] * 2


def test_an_invalid_rate_ends_the_climb_and_is_no_knee() -> None:
    """Of Poisson's cells from 4/s on none is valid, of the Gamma's one is not."""
    seen: list[float] = []
    fast = scripted(100.0, seen)
    late = iter([*[None] * 8, "poisson 0", "gamma 0", "poisson 1", *[None] * 9])

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        measured = fast(trace, seed)
        assert measured is not None
        return replace(measured, invalid=next(late))

    found = swept(OPTIONS, run)
    assert seen == [1.0] * 4 + [2.0] * 4 + [4.0] * 4 + [8.0] * 2
    assert [(each.capacity_rps, each.is_knee_found) for each in found.capacities] == [(2.0, False), (8.0, False)]
    assert [(rung.cells, rung.invalid_cells) for rung in found.rungs if rung.rate_rps == 4] == [(2, 2), (2, 1)]
    assert not found.is_valid
    assert as_csv(found.cells).count(",gamma 0,") == 1
    text = io.StringIO()
    Console(file=text, width=140).print(render(found))
    words = " ".join(text.getvalue().split())
    assert " poisson* 4 " in words
    assert " gamma 0.25* 4 " in words
    assert "poisson: capacity 2 requests/s or more: at 4 no cell is valid: poisson 0" in words
    assert "* poisson at 4 requests/s: 2 of 2 cells are invalid, figures of the replay and not of the target" in words
    assert "* gamma 0.25 at 4 requests/s: 1 of 2 cells are invalid, left out: gamma 0" in words
    shown = _Page()
    shown.feed(page(found).decode())
    poisson, gamma = json.loads(shown.ids["figures"])[0]["traces"]
    assert poisson["marker"]["symbol"] == ["circle", "circle", "x-open"]
    assert gamma["marker"]["symbol"] == ["circle"] * 4
    assert "<td>poisson*</td>" in page(found).decode()


def test_a_target_that_goes_away_leaves_what_was_measured() -> None:
    seen: list[float] = []
    fast = scripted(100.0, seen)

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        if len(seen) == 3:
            raise ReplayError("gone")
        return fast(trace, seed)

    found = swept(OPTIONS, run)
    assert (len(found.cells), found.stopped_by, found.is_interrupted) == (3, "gone", False)
    assert "ended early: gone" in page(found).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_cells_ends_a_sweep_though_it_was_ignored_before(number: signal.Signals) -> None:
    seen: list[float] = []
    fast = scripted(100.0, seen)

    def run(trace: pl.DataFrame, seed: int) -> Measured | None:
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return fast(trace, seed)

    before = signal.signal(number, signal.SIG_IGN)
    try:
        found = swept(OPTIONS, run)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert (len(found.cells), found.is_interrupted) == (3, True)


def test_an_interrupted_sweep_has_what_was_measured() -> None:
    found = swept(OPTIONS, scripted(100.0, [], stop_after=5))
    assert found.is_interrupted
    assert len(found.cells) == 5
    empty = swept(OPTIONS, scripted(100.0, [], stop_after=0))
    assert (empty.cells, empty.capacities[0].capacity_rps, empty.capacities[0].is_knee_found) == ((), None, False)
    assert "No cell." in page(empty).decode()
    text = io.StringIO()
    Console(file=text, width=120).print(render(empty))
    assert "poisson: capacity not measured" in text.getvalue()
    assert "Interrupted" in text.getvalue()


# --- the simulator --------------------------------------------------------------------------------------------------


def test_a_virtual_sweep_is_deterministic() -> None:
    run = virtual_cells(SMALL, 2.0)
    workload = Workload(rows(*np.cumsum(np.random.default_rng(0).exponential(1, 50)).tolist()), has_gaps=True)
    first, second = (swept(replace(OPTIONS, requests=60), run, workload) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)
    assert {cell.arrivals for cell in first.cells} == {"poisson", "gamma 0.25", "trace"}
    assert all(cell.requests == 60 and cell.preemptions is not None for cell in first.cells)


@pytest.mark.slow
def test_the_paper_s_finding() -> None:
    """At one mean rate, with the same requests, burstier arrivals raise TTFT p99, preemptions and failures."""
    config = machine_config("a100-8b", None, ["--kv-blocks", "2000", "--max-model-len", "8192"], prog="test")
    workload = Workload([Planned(n, float(n), None, None, 512, 128) for n in range(2)], has_gaps=False)
    options = SweepOptions(rates_rps=(7.0,), requests=1500, duration_s=None, seeds=10)
    ranked = {"ttft_p99_s": 0, "preemptions": 0, "failure_share": 0}
    found = swept(options, virtual_cells(config, 5.0), workload)
    for seed in range(10):
        cells = [cell for cell in found.cells if cell.seed == seed]
        assert [cell.gamma_shape for cell in cells] == [1.0, 0.5, 0.25]
        for figure in ranked:
            poisson, bursty, burstier = (getattr(cell, figure) for cell in cells)
            ranked[figure] += poisson <= bursty < burstier
    assert min(ranked.values()) >= 9, ranked


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"{TRACES}: no real traces there (BURSTGATE_TRACES)")
def test_a_real_trace_is_burstier_than_poisson() -> None:
    from replay.schedule import PlanOptions, plan

    planned = list(plan(read_trace(TRACES / "BurstGPT_1_head.csv"), PlanOptions()))
    workload = Workload([msgspec.structs.replace(row, request_tokens=200, response_tokens=50) for row in planned if
                         row.is_sendable], has_gaps=True)  # fmt: skip
    found = swept(replace(OPTIONS, rates_rps=(10.0,), requests=190), virtual_cells(SMALL, None), workload)
    by_name = {name: [cell for cell in found.cells if cell.arrivals == name] for name in ("poisson", "trace")}
    # A window of it can be calm; what bursts cost is seen over several.
    for figure in ("ttft_p99_s", "preemptions"):
        calm, own = (sum(getattr(cell, figure) for cell in by_name[name]) for name in ("poisson", "trace"))
        assert own > calm, figure


# --- live -----------------------------------------------------------------------------------------------------------


def test_a_live_sweep() -> None:
    options = replace(OPTIONS, rates_rps=(40.0,), requests=30, seeds=1, slo=Slo(ttft_s=5.0, itl_s=5.0))
    with running(SMALL) as url:
        assert wait_until_idle([f"{url}/metrics"], 5.0)
        # This machine may be busy: what it is too late for is another test's.
        replayed = ReplayOptions(target=url, model="simulated", max_lag_s=10.0)
        run = live_cells(replayed, idle_timeout_s=5.0, cool_down_s=0.0)
        found = swept(options, run)
    assert len(found.cells) == 2
    for cell in found.cells:
        assert (cell.requests, cell.ok) == (30, 30)
        assert cell.preemptions is not None
        assert cell.kv_usage_max is not None
        assert cell.dispatch_lag_p99_s is not None
        assert cell.arrivals_s == pytest.approx(29 / 40, abs=1e-3)
        assert cell.e2e_p99_s is not None
        assert cell.e2e_p99_s > 19 * 0.01
        assert cell.goodput_share == 1.0
        assert cell.invalid is None
    assert not [text for text in found.warnings if "KV use" in text]


def test_a_target_without_metrics_is_said() -> None:
    with running(SMALL) as url:
        assert wait_until_idle([f"{url}/nowhere"], 5.0) is None
        assert wait_until_idle([f"{url}/metrics", f"{url}/health"], 5.0) is None
        assert wait_until_idle(["http://127.0.0.1:9/metrics"], 5.0) is None
        options = ReplayOptions(target=url, model="simulated", metrics_urls=(f"{url}/nowhere",), max_lag_s=10.0)
        run = live_cells(options, idle_timeout_s=5.0, cool_down_s=0.0)
        found = swept(replace(OPTIONS, rates_rps=(40.0,), requests=5, shapes=(), seeds=1), run)
    assert found.warnings == (f"KV use and preemptions are unknown: {url}/nowhere: HTTP 404",)
    assert (found.cells[0].preemptions, found.cells[0].kv_usage_mean) == (None, None)


def test_a_cell_that_this_machine_could_not_send_is_invalid_and_no_error() -> None:
    with running(SMALL) as url:
        options = ReplayOptions(target=url, model="simulated", max_lag_s=1e-9)
        run = live_cells(options, idle_timeout_s=5.0, cool_down_s=0.0)
        found = swept(replace(OPTIONS, rates_rps=(40.0, 80.0), requests=5, shapes=(), seeds=1), run)
    (cell,) = found.cells
    assert cell.ok == 5
    assert cell.invalid is not None
    assert "this machine could not keep the schedule" in cell.invalid
    assert (found.capacities[0].capacity_rps, found.capacities[0].is_knee_found) == (None, False)


def test_a_busy_target_is_waited_for_so_long() -> None:
    import httpx

    with running(replace(SMALL, step_base_s=0.1)) as url, httpx.Client(base_url=url) as client:
        body = {"model": "m", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body):
            began_s = time.monotonic()
            assert wait_until_idle([f"{url}/metrics"], 0.6) is False
            assert 0.6 <= time.monotonic() - began_s < 5


def test_a_target_that_is_not_there() -> None:
    run = live_cells(
        ReplayOptions(target="http://127.0.0.1:9", model="m"),
        idle_timeout_s=1.0,
        cool_down_s=0.0,
    )
    with pytest.raises(ReplayError, match=r"127\.0\.0\.1:9"):
        swept(OPTIONS, run)


# --- the command ----------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: dict[str, str] = {}
        self._id: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self._id = dict(attrs).get("id")

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.ids[self._id] = self.ids.get(self._id, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._id = None


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxy.cli", "sweep", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


SIMULATED = ("--simulate", "a100-8b", "--kv-blocks", "2000", "--max-model-len", "8192")


def test_the_command_writes_everything(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("s.json", "s.csv", "s.html")]
    done = command(
        *SIMULATED, "--from", "1", "--to", "4", "--steps", "3", "--requests", "20", "--seeds", "2", "--slo", "ttft=1",
        "--json", files[0], "--csv", files[1], "--html", files[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 requests/s, poisson, seed 0: 20 sent, 20 ok, TTFT p99" in done.stdout
    assert "gamma 0.25: capacity 4 requests/s or more" in done.stdout
    found = msgspec.json.decode(files[0].read_bytes(), type=Sweep)
    assert [capacity.capacity_rps for capacity in found.capacities] == [4.0, 4.0, 4.0]
    assert len(files[1].read_text().splitlines()) == 1 + len(found.cells) == 1 + 3 * 3 * 2
    read = _Page()
    read.feed(files[2].read_text())
    assert read.links == []
    assert msgspec.json.decode(read.ids["sweep"], type=Sweep) == found
    charts = json.loads(read.ids["figures"])
    assert [line["name"] for line in charts[0]["traces"]] == ["poisson", "gamma 0.5", "gamma 0.25"]
    assert charts[0]["traces"][0]["x"] == [1.0, 2.0, 4.0]
    assert len(list(tmp_path.iterdir())) == 3


def test_text_from_outside_can_not_leave_its_place_in_the_page() -> None:
    evil = "</script><script>alert(1)</script>"
    found = msgspec.structs.replace(swept(OPTIONS, scripted(100.0, [])), target=evil, warnings=(evil,))
    read = _Page()
    read.feed(page(found).decode())
    assert msgspec.json.decode(read.ids["sweep"], type=Sweep).target == evil
    assert page(found).count(b"alert(1)</script>") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "rates: expected --rates, or --from and --to"),
        (("--rates", "1"), "target: expected either --target or --simulate"),
        (("--rates", "x", *SIMULATED), "rates: expected numbers with commas between them, got 'x'"),
        (("--rates", "1", "--simulate", "x"), "preset: expected one of a100-70b-tp4,"),
        (("--rates", "1", *SIMULATED, "--nonsense", "1"), "unrecognized arguments: --nonsense 1"),
        (("--rates", "1", *SIMULATED, "--block-size", "0"), "simulator: block_size: expected at least 1, got 0"),
        (("--rates", "1", "--target", "http://x", "--model", "m", "--kv-blocks", "1"), "--kv-blocks: it needs --sim"),
        (("--rates", "1", "--target", "http://x"), "model: expected with --target, got none"),
        (("--rates", "1", *SIMULATED, "--slo", "ttft=0"), "slo: ttft: expected seconds > 0, got '0'"),
        (("--rates", "1", *SIMULATED, "--slo", "itl=1"), "slo: itl: expected with --target only; the simulator keeps"),
        (("--rates", "1", "--target", "http://x", "--model", "m", "--max-lag", "0"), "max lag: expected seconds > 0"),
        (("--rates", "1", *SIMULATED, "--timeout", "0"), "timeout: expected seconds > 0, got 0"),
        (("--rates", "1", *SIMULATED, "--request-tokens", "0"), "request tokens: expected 1 to"),
        (("--rates", "1", *SIMULATED, "--csv", "nowhere/x.csv"), "nowhere/x.csv: no such directory"),
        (("--rates", "1", *SIMULATED, "--trace", "nowhere.csv"), "nowhere.csv: No such file or directory"),
        (("--rates", "1", *SIMULATED, "--format", "x"), "expected one of"),
    ],
)
def test_what_can_not_be_swept_is_one_line(
    flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["burstgate", "sweep", *flags])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == (1 if "nowhere.csv" in flags else 2)
    assert message in error
    assert error.startswith("burstgate: ")
    assert error.count("\n") == 1


def test_ctrl_c_writes_what_is_there(tmp_path: Path) -> None:
    with running(SMALL) as url:
        process = subprocess.Popen(
            [sys.executable, "-m", "proxy.cli", "sweep", "--target", url, "--model", "simulated", "--rates", "20,40",
             "--requests", "20", "--request-tokens", "50", "--response-tokens", "5", "--seeds", "1000",
             "--json", str(tmp_path / "s.json")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert "Interrupted" in out
    found = msgspec.json.decode((tmp_path / "s.json").read_bytes(), type=Sweep)
    assert found.is_interrupted
    assert 1 <= len(found.cells) < 20
