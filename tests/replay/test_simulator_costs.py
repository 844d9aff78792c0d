from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from replay.simulator.config import SimulatorConfig
from replay.simulator.costs import PRESETS, StepCosts, fit_costs, read_step_rows
from replay.simulator.engine import Engine, SequenceRequest

TRUE = StepCosts(20_000.0, 0.008, 5e-5, 5e-8)
HEADER = "prefill_tokens,decode_sequences,context_tokens,step_s\n"


def measured(costs: StepCosts, seed: int, count: int, noise: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    rows = np.column_stack(
        (rng.integers(0, 8192, count), rng.integers(0, 256, count), rng.integers(0, 400_000, count), np.zeros(count))
    ).astype(np.float64)
    config = SimulatorConfig(**costs.settings())  # type: ignore[arg-type]
    rows[:, 3] = [config.step_s(int(a), int(b), int(c)) for a, b, c, _ in rows]
    rows[:, 3] *= 1 + noise * rng.standard_normal(count)
    return rows


@settings(max_examples=50, deadline=None)
@given(st.floats(100, 1e6), st.floats(0, 0.1), st.floats(0, 1e-3), st.floats(0, 1e-6), st.integers(0, 1000))
def test_a_fit_finds_the_costs_that_made_the_steps(
    rate: float, base_s: float, sequence_s: float, context_s: float, seed: int
) -> None:
    true = StepCosts(rate, base_s, sequence_s, context_s)
    rows = measured(true, seed, 50)
    found = SimulatorConfig(**fit_costs(rows).settings())  # type: ignore[arg-type]
    again = [found.step_s(int(a), int(b), int(c)) for a, b, c, _ in rows]
    assert again == pytest.approx(rows[:, 3].tolist(), rel=1e-6, abs=1e-9)


def test_a_fit_of_noisy_steps_is_near() -> None:
    found = fit_costs(measured(TRUE, 0, 5000, noise=0.05))
    for name, value in TRUE.settings().items():
        assert found.settings()[name] == pytest.approx(value, rel=0.05), name


def test_no_cost_is_negative() -> None:
    # More decoding sequences make these steps shorter: the best that may be is that they cost nothing.
    rows = measured(TRUE, 1, 200)
    rows[:, 3] = 0.05 + rows[:, 0] / 20_000 - rows[:, 1] * 1e-4
    found = fit_costs(rows)
    assert found.step_per_seq_s == 0
    assert min(found.settings().values()) >= 0
    assert found.prefill_tokens_per_s == pytest.approx(20_000, rel=0.05)


def test_the_steps_of_the_engine_give_its_costs_back() -> None:
    config = SimulatorConfig(**TRUE.settings(), max_batched_tokens=512)  # type: ignore[arg-type]
    engine, now_s, rows = Engine(config), 0.0, []
    for number in range(40):
        engine.add(SequenceRequest(number, 50 + 37 * number, 5 + 7 * number % 60))
    while not engine.is_idle:
        step = engine.step(now_s)
        rows.append((step.prompt_tokens, step.decode_sequences, step.context_tokens, step.duration_s))
        now_s += step.duration_s
    found = fit_costs(np.array(rows, np.float64))
    assert list(found.settings().values()) == pytest.approx(list(TRUE.settings().values()), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones((9, 3)), r"step rows: expected 4 columns, .*, got \(9, 3\)"),
        (np.ones((3, 4)), "step rows: 3 rows can not tell the four costs apart"),
        (np.ones((9, 4)), "step rows: 9 rows can not tell the four costs apart"),
        (np.zeros((0, 4)), "step rows: 0 rows can not tell the four costs apart"),
        (np.array([[1, 1, 1, 1], [1, -2, 1, 1]], np.float64), "step row 2: decode_sequences: .* >= 0, got -2"),
        (np.array([[1, 1, 1, np.nan]]), "step row 1: step_s: expected a finite number >= 0, got nan"),
    ],
)
def test_rows_that_can_not_be_fitted(rows: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_costs(rows)


def test_a_file_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    rows = measured(TRUE, 2, 30)
    lines = "".join(",".join(repr(value) for value in row) + "\r\n" for row in rows.tolist())
    file.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + lines.encode() + b"\n")
    assert np.array_equal(read_step_rows(file), rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r":1: expected the header prefill_tokens,.*, got ''"),
        (b"a,b,c,d\n1,2,3,4\n", r":1: expected the header .*, got 'a,b,c,d'"),
        (HEADER.encode() + b"1,2,3\n", r":2: expected 4 finite numbers >= 0, got '1,2,3'"),
        (HEADER.encode() + b"1,2,3,4\n\n1,2,x,4\n", r":4: expected 4 finite numbers >= 0, got '1,2,x,4'"),
        (HEADER.encode() + b"1,2,3,nan\n", r":2: expected 4 finite numbers"),
        (HEADER.encode() + b"1,2,3,-1\n", r":2: expected 4 finite numbers"),
        (b"\xff\xfe\x00", r":1: expected the header"),
    ],
)
def test_a_file_that_is_no_steps(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_step_rows(file)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_machine(name: str) -> None:
    config = SimulatorConfig(**PRESETS[name])  # type: ignore[arg-type]
    assert config.enable_prefix_caching
    # One sequence decodes at 10 to 500 tokens/s on any of them, and a prompt is faster than an answer.
    assert 10 < 1 / config.step_s(0, 1, 1000) < 500
    assert config.step_s(1000, 0, 0) < 1000 * config.step_s(0, 1, 1000)
    assert replace(config, seed=1).num_blocks == config.num_blocks


def test_presets_are_in_order_of_speed() -> None:
    def tokens_per_s(name: str) -> float:
        return 1 / SimulatorConfig(**PRESETS[name]).step_s(0, 32, 32_000)  # type: ignore[arg-type]

    assert tokens_per_s("h100-8b") > tokens_per_s("a100-8b") > tokens_per_s("l4-8b")
    assert tokens_per_s("h100-8b") > tokens_per_s("h100-70b-tp4") > tokens_per_s("a100-70b-tp4")
    # The known size of an 8B model's cache on one H100: about 400,000 tokens at 128 KiB each.
    assert SimulatorConfig(**PRESETS["h100-8b"]).kv_capacity_tokens == pytest.approx(400_000, rel=0.1)  # type: ignore[arg-type]
