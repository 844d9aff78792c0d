"""`burstgate simulate --trace`: flags, report, files, refusals. The live server's are in test_simulator_server.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from replay.simulator.__main__ import main
from replay.simulator.virtual import SimulatedRequest, VirtualSummary
from traces.record import Outcome

HEADER = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
ROWS = "".join(f"{at},,1,ChatGPT,{100 + at},{20 + at},{120 + 2 * at},API log\n" for at in range(30))
SLOW_STEPS = (
    "prefill_tokens,decode_sequences,context_tokens,step_s\n0,1,0,1.5\n100,1,0,2.5\n0,2,0,2\n0,1,9,1.5\n9,9,9,5.59\n"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(HEADER + ROWS)
    return file


def test_a_report_and_a_line_a_request(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    assert main(["--trace", str(trace), "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "requests  30, 30 ok, failures: none" in text
    assert "prefixes  not cached" in text
    for name in ("queue", "time to first token", "time per output token", "end to end"):
        assert f"\n{name}  " in text
    ended = [msgspec.json.decode(line, type=SimulatedRequest) for line in output.read_bytes().splitlines()]
    assert sorted(each.index for each in ended) == list(range(30))
    assert all(each.response_tokens == 20 + each.index for each in ended)


def test_json_is_the_summary_and_always_the_same(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["--trace", str(trace), "--json", "--seed", "3", "--preset", "a100-70b-tp4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    summary = msgspec.json.decode(texts[0], type=VirtualSummary)
    assert (summary.requests, summary.ok, summary.prefix_hit_rate) == (30, 30, 0.0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--limit", "7"], {"requests": 7}),
        (["--start", "20"], {"requests": 10}),
        (["--duration", "12"], {"requests": 12}),
        (["--timeout", "0.1"], {"ok": 0, "failures": {"upstream_timeout": 30}}),
        (["--max-model-len", "130"], {"failures": {"invalid_request": 24}}),
        (["--num-gpu-blocks-override", "1024", "--block-size", "32"], {"kv_blocks": 1024}),
        (["--kv-blocks", "2048"], {"kv_blocks": 2048}),
        (["--enable-prefix-caching"], {"prefix_hit_rate": 0.0}),
        (["--preset", "h100-8b", "--no-enable-prefix-caching"], {"prefix_hit_rate": None}),
        (["--speed", "1000", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"], {"max_running": 2}),
        (["--fast"], {"span_s": pytest.approx(29.0)}),
    ],
)
def test_flags(flags: list[str], expected: dict[str, object], trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(trace), "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in expected} == expected


def test_a_fit_makes_the_steps(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps.csv"
    steps.write_text(SLOW_STEPS)  # 1 s, 10 ms a prompt token, 0.5 s a sequence, nothing for the context
    arguments = ["--trace", str(trace), "--json", "--limit", "1", "--preset", "h100-8b", "--fit", str(steps)]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ttft_s"]["max"] == pytest.approx(1 + 100 * 0.01)
    assert found["tpot_s"]["max"] == pytest.approx(1.5)
    assert main([*arguments, "--step-base-s", "0"]) == 0  # a flag wins over the fit
    assert json.loads(capsys.readouterr().out)["tpot_s"]["max"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trace", "TRACE", "--fit", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--trace", "TRACE", "--fit", "TRACE"], "trace.csv:1: expected the header prefill_tokens,"),
        (["--trace", "TRACE", "--speed", "0"], "speed: expected 1e-06 to 1e+09, got 0"),
        (["--trace", "TRACE", "--speed", "nan"], "speed: expected"),
        (["--trace", "TRACE", "--limit", "0"], "limit: expected rows >= 1, got 0"),
        (["--trace", "TRACE", "--seed", "-1"], "seed: expected an integer >= 0, got -1"),
        (["--trace", "TRACE", "--timeout", "0"], "timeout: expected seconds > 0, got 0"),
        (["--trace", "TRACE", "--timeout", "nan"], "timeout: expected seconds > 0, got nan"),
        (["--trace", "TRACE", "--hash-block-tokens", "0"], "hash block: expected tokens >= 1, got 0"),
        (["--trace", "TRACE", "--format", "nonsense"], "--format: expected one of"),
        (["--trace", "TRACE", "--block-size", "0"], "simulator: block_size: expected at least 1, got 0"),
        (["--trace", "TRACE", "--num-gpu-blocks-override", "9"], "simulator: num_gpu_blocks_override: expected blocks"),
        (["--trace", "TRACE", "--max-num-waiting", "-1"], "simulator: max_num_waiting: expected at least 0, got -1"),
        (["--trace", "TRACE", "--step-per-context-token-s", "inf"], "simulator: step_per_context_token_s: expected"),
        (["--limit", "3"], "--limit: it needs --trace"),
        (["--json"], "--json: it needs --trace"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see burstgate simulate --help)"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--preset", "x"], "argument --preset: invalid choice: 'x'"),
    ],
)
def test_what_can_not_be_done_is_one_line_and_status_2(
    flags: list[str], message: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace) if flag == "TRACE" else flag for flag in flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("burstgate: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "5,,1,m,10,10,20,API log\n3,,1,m,10,10,20,API log\n", "row 2: received_at: expected >="),
        (HEADER + "5,,1,m,10,-3,7,API log\n", "trace.csv:2: column 'Response tokens': expected an integer >= 0"),
        ("\0\0\0", "trace.csv"),
    ],
)
def test_a_trace_that_can_not_be_run_names_the_row(
    content: str, message: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace.write_text(content)
    assert main(["--trace", str(trace)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trace", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["--trace", "."], "Is a directory"),
        (["--trace", "TRACE", "--output", "nowhere/o.jsonl"], "nowhere/o.jsonl: No such file or directory"),
    ],
)
def test_a_file_that_can_not_be_opened_is_one_line_and_status_1(
    flags: list[str], message: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace) if flag == "TRACE" else flag for flag in flags]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_trace_without_rows(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.write_text(HEADER)
    assert main(["--trace", str(trace)]) == 0
    assert "requests  0, 0 ok" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(trace), "--output", "/dev/full"]) == 1
    assert capsys.readouterr().err == "burstgate: /dev/full: No space left on device\n"


def test_outcomes_are_the_record_s(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    flags = ["--speed", "1e6", "--max-num-seqs", "1", "--max-num-waiting", "3", "--timeout", "0.4", "--ties", "keep"]
    assert main(["--trace", str(trace), "--output", str(output), *flags]) == 0
    outcomes = {json.loads(line)["outcome"] for line in output.read_text().splitlines()}
    assert outcomes == {Outcome.OK, Outcome.REJECTED, Outcome.UPSTREAM_TIMEOUT}


def test_the_live_server_needs_no_trace_code() -> None:
    import subprocess

    program = "import replay.simulator.__main__, replay.simulator.server, sys; print('polars' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
