from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from replay.schedule import PlanOptions
from replay.simulator.config import SimulatorConfig
from replay.simulator.costs import StepCosts
from replay.simulator.measured import fit_file, read_samples, rows_of_samples
from replay.simulator.virtual import RequestsFile, VirtualOptions, simulate
from traces.batch import complete_batch

TRUE = StepCosts(15_000.0, 0.009, 2e-4, 1e-7)
LINE = '{"due_s":1.0,"outcome":"ok","ttft_s":0.5,"tpot_s":0.25,"request_tokens":10,"response_tokens":5}\n'


def workload(seed: int, rows: int = 1500, rate_rps: float = 3.0) -> pl.DataFrame:
    """Arrivals whose rate changes, so that batches of all sizes occur."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(rng.uniform(0.2, 3.0, 1 + rows // 100), 100)[:rows]
    return complete_batch(
        pl.DataFrame(
            {
                "request_id": [f"{row:032x}" for row in range(rows)],
                "received_at": np.cumsum(rng.exponential(1 / rate_rps, rows) * scale),
                "request_tokens": rng.integers(20, 3000, rows),
                "response_tokens": rng.integers(2, 300, rows),
                "log_type": ["API log"] * rows,
                "outcome": ["ok"] * rows,
            }
        )
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_costs_that_made_a_run_are_found_in_its_samples(seed: int, noise: float, tmp_path: Path) -> None:
    """Noise: what network and scheduling do to each request's latencies."""
    config = SimulatorConfig(**TRUE.settings())  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    file = tmp_path / "samples.jsonl"
    with RequestsFile(file) as output:
        simulate(
            [workload(seed)],
            config,
            VirtualOptions(PlanOptions(ties="keep")),
            lambda ended: output.write(
                msgspec.structs.replace(
                    ended,
                    ttft_s=(ended.ttft_s or 0.0) * (1 + noise * rng.random()),
                    tpot_s=(ended.tpot_s or 0.0) * (1 + noise * rng.standard_normal()),
                )
            ),
        )
    found = fit_file(file).settings()
    for name in ("step_base_s", "prefill_tokens_per_s"):
        assert found[name] == pytest.approx(TRUE.settings()[name], rel=0.1), name
    # More sequences have more context, so these two costs can hardly be told apart; what counts is the step.
    fitted = SimulatorConfig(**found)  # type: ignore[arg-type]
    for batch in ((0, 1, 1000), (0, 40, 60_000), (500, 20, 20_000), (3000, 0, 0)):
        assert fitted.step_s(*batch) == pytest.approx(config.step_s(*batch), rel=0.08), batch


def test_a_run_by_hand() -> None:
    """Two requests: one decodes from 1 s to 3 s, the other's prompt is computed at 2 s, and it decodes until 4 s."""
    samples = np.array([[0.0, 1.0, 3.0, 100, 5], [1.5, 2.0, 4.0, 60, 3]])
    rows, weights = rows_of_samples(samples)
    # 4 steps of 0.5 s with one prompt of 60 and 1 of the other's 2 steps; then 2 steps of 1 s, half of the first's 4.
    # The context of the m-th step is the prompt and m - 1: 100 to 103, and 60 to 61.
    expected = [
        [60 / 4, 5 / 4, (100 + 101 + 102 + 103 + 60) / 4, 0.5],
        [0, 4 / 2, (60 + 61 + 102 + 103) / 2, 1.0],
        [100, 0, 0, 1.0],  # it was alone until its first token; the other one was not
    ]
    assert rows == pytest.approx(np.array(expected))
    assert weights.tolist() == [4, 2, 1]


def test_what_did_not_end_well_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(
        LINE
        + LINE.replace('"ok"', '"truncated"')
        + LINE.replace("0.5", "null")
        + "\n"
        + '{"due_s":1,"sent_s":2,"outcome":"ok","ttft_s":1,"tpot_s":null,"request_tokens_asked":9,'
        '"request_tokens_got":8,"response_tokens_asked":3,"response_tokens_got":1,"unknown":0}\n'
    )
    assert read_samples(file).tolist() == [[1.0, 1.5, 2.5, 10, 5], [2, 3, 3, 8, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINE + "{]\n", "samples.jsonl:2: expected a sample as JSON"),
        ('{"due_s":"x","outcome":"ok"}\n', "samples.jsonl:1: expected a sample as JSON: Expected `float`"),
        (LINE, "samples.jsonl: step rows: 2 rows can not tell the four costs apart"),
        (LINE.replace("ok", "truncated"), "samples.jsonl: step rows: 0 rows can not tell"),
        ("prefill\n", "samples.jsonl:1: expected the header"),
    ],
)
def test_a_file_that_can_not_be_fitted(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        fit_file(file)
