"""Every command, and what each says of bad input: one line with place, value and rule, the right exit status.

Commands that end by themselves run in this process, through the console script's own `main`; servers are processes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import typer

from proxy.cli import app, main
from tests.e2e.harness import BURSTGATE, Installation, Process, Simulator, burstgate, wait_until
from traces.record import Outcome

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
GOOD = f"{HEADER}\n5,ChatGPT,10,20,30,API log\n6,GPT-4,10,3,13,Conversation log\n"
SECRET = "correct-horse"
DOWN = "http://127.0.0.1:9"
"""The discard port, on which nobody listens."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs one command in a folder of its own: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("BURSTGATE_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["burstgate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    """What the table's rows name."""
    for name, content in {
        "file": b"",
        "minus.csv": f"{HEADER}\n5,ChatGPT,10,20,30,API log\n6,ChatGPT,10,-3,7,API log\n".encode(),
        "header.csv": b"foo,bar\n1,2\n",
        "empty.csv": b"",
        "noise.csv": bytes(range(256)) * 64,
        "good.csv": GOOD.encode(),
        "unknown.yaml": b"journal:\n  bugdet: 1GiB\n",
        "scalar.yaml": b"journal: 5\n",
        "broken.yaml": b"port: [\n",
        "nul.yaml": b"port\0: 1\n",
        "latin.yaml": b"gateway: caf\xe9\n",
        "list.yaml": b"- port\n",
        "type.yaml": b"port: eighty\n",
        "secret.yaml": f"database_url: mysql://me:{SECRET}@h/x\n".encode(),
    }.items():
        (tmp_path / name).write_bytes(content)


_EXPORT = ("export", "-o", "out.csv")
_REPLAY = ("replay", "--target", DOWN, "--model", "m", "--quiet")
_SERVE = ("serve", "--upstream", DOWN, "--port", "0", "--control-port", "0")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        # usage
        (["--nope"], 2, "No such option: --nope (see burstgate --help)"),
        (["nope"], 2, "No such command 'nope'. (see burstgate --help)"),
        (["serve", "--nope"], 2, "No such option: --nope (see burstgate serve --help)"),
        (["export"], 2, "Missing option '--output' / '-o'. (see burstgate export --help)"),
        (["db", "downgrade"], 2, "(see burstgate db downgrade --help)"),
        (["import", "good.csv", "more"], 2, "unexpected extra argument"),
        ([*_SERVE, "--port", "abc"], 2, "'--port'"),
        # settings: flag, file
        (["serve"], 2, "upstreams: name at least one, as in --upstream http://127.0.0.1:8000"),
        (["serve", "--upstream", "ftp://x"], 2, "flag: upstreams: upstream URL 'ftp://x': expected http://HOST"),
        ([*_SERVE, "--port", "70000"], 2, "flag: port: Input should be less than or equal to 65535, got 70000"),
        ([*_SERVE, "--host", "256.1.1.1"], 2, "port: "),
        (["config", "check", "--config", "unknown.yaml"], 2, "unknown.yaml: unknown setting 'journal.bugdet'; the"
         " nearest known one is 'journal.budget'"),
        (["config", "check", "--config", "scalar.yaml"], 2, "scalar.yaml: journal: expected a mapping of settings"),
        (["config", "check", "--config", "broken.yaml"], 2, "broken.yaml:2: not YAML"),
        (["config", "check", "--config", "nul.yaml"], 2, "nul.yaml: not YAML"),
        (["config", "check", "--config", "latin.yaml"], 2, "latin.yaml: expected UTF-8 text"),
        (["config", "check", "--config", "list.yaml"], 2, "list.yaml: expected a mapping of settings, got list"),
        (["config", "check", "--config", "type.yaml"], 2, "type.yaml: port: "),
        (["config", "check", "--config", "none.yaml"], 2, "none.yaml: can not be read: No such file or directory"),
        # databases
        ([*_SERVE, "--database-url", f"mysql://me:{SECRET}@h/x"], 2, "expected a scheme of sqlite or postgresql"),
        ([*_SERVE, "--config", "secret.yaml"], 2, "database URL 'mysql://me:***@h/x': expected a scheme"),
        ([*_SERVE, "--database-url", f"postgresql://me:{SECRET}@h:port/x"], 2, "expected sqlite:///PATH or"),
        ([*_SERVE, "--database-url", "sqlite:////nowhere/x.db"], 2, "the folder '/nowhere' does not exist"),
        (["stats", "--database-url", f"postgresql://me:{SECRET}@127.0.0.1:9/x"], 1, "me:***@127.0.0.1:9/x"),
        (["stats", "--data-dir", "nowhere"], 2, "nowhere: no burstgate.db there (set --data-dir or --database-url)"),
        (["db", "current", "--data-dir", "nowhere"], 2, "nowhere: no burstgate.db there"),
        (["db", "upgrade", "0999", "--database-url", "sqlite:///x.db"], 1, "'0999'"),
        # directories
        ([*_SERVE, "--data-dir", "file/x"], 2, "data_dir: file/x is not writable: Not a directory"),
        ([*_SERVE, "--data-dir", "file"], 2, "data_dir: file is not writable: File exists"),
        (["record", "--data-dir", "/proc/burstgate"], 2, "data_dir: /proc/burstgate is not writable"),
        # traces
        (["import", "minus.csv", "--data-dir", "d"], 1, "minus.csv:3: column 'Response tokens': expected an integer"
         " >= 0, got '-3'"),
        (["stats", "minus.csv"], 1, "minus.csv:3: column 'Response tokens': expected an integer >= 0, got '-3'"),
        (["stats", "header.csv"], 1, "header.csv:1: expected"),
        (["stats", "empty.csv"], 1, "empty.csv:1: expected a header line, got an empty file"),
        (["import", "noise.csv", "--data-dir", "d"], 1, "noise.csv:1: expected a Parquet file"),
        (["analyze", "minus.csv"], 1, "minus.csv:3: column 'Response tokens': expected an integer >= 0, got '-3'"),
        (["analyze", "none.csv", "--html", "x.html"], 1, "none.csv: No such file or directory"),
        (["analyze", "good.csv", "--json", "no/x"], 2, "no/x: no such directory"),
        (["analyze", "good.csv", "--slo", "itl=1"], 2, "--slo: expected each of ttft, tpot, e2e, queue at most once"),
        (["analyze", "good.csv", "--availability", "1"], 2, "--availability: expected a share above 0 and below 1"),
        (["failures", "empty.csv"], 1, "empty.csv:1: expected a header line, got an empty file"),
        (["failures", "--data-dir", "nowhere"], 2, "nowhere: no burstgate.db there"),
        (["compare", "good.csv", "none.csv"], 2, "none.csv: No such file or directory"),
        (["compare", "good.csv", "minus.csv"], 2, "minus.csv:3: column 'Response tokens': expected"),
        (["compare", "good.csv", "day=1"], 2, "'day=1': no such file, and as a selection 'day=1' is none of from, to"),
        (["compare", "good.csv", "good.csv", "--rounds", "1"], 2, "compare: rounds: expected 20 to 100,000, got 1"),
        (["stats", "none.csv"], 1, "none.csv: No such file or directory"),
        (["stats", "/"], 1, "/: Is a directory"),
        ([*_REPLAY, "none.csv"], 1, "none.csv: No such file or directory"),
        ([*_REPLAY, "header.csv"], 1, "header.csv:1: expected"),
        ([*_REPLAY, "good.csv"], 1, f"cannot reach the target: {DOWN}"),
        ([*_REPLAY, "good.csv", "--slo", "ttft"], 2, "slo: ttft: expected seconds > 0, got ''"),
        ([*_REPLAY, "good.csv", "--slo", "ttft=1", "--no-stream"], 2, "slo: expected only e2e where answers are not"),
        ([*_REPLAY, "good.csv", "--min-goodput", "0.9"], 2, "min goodput: expected with an slo"),
        ([*_REPLAY, "good.csv", "--max-lag", "0"], 2, "max lag: expected seconds > 0, got 0"),
        ([*_REPLAY, "good.csv", "--html", "nowhere/x"], 1, "nowhere/x: no such directory"),
        (["report", "none.jsonl"], 1, "none.jsonl: No such file or directory"),
        (["report", "good.csv"], 1, "good.csv:1: expected a sample: "),
        (["report", "empty.csv", "--summary", "good.csv"], 1, "good.csv: expected a summary, as replay --json writes"),
        (["report", "empty.csv", "--slo", "x=1"], 2, "slo: expected ttft=, tpot=, itl= or e2e= with seconds"),
        ([*_REPLAY, "good.csv", "--speed", "0"], 2, "speed: expected"),
        ([*_REPLAY, "good.csv", "--ties", "x"], 2, "ties: expected spread or keep, got 'x'"),
        ([*_REPLAY, "good.csv", "--rate-scale", "0"], 2, "rate scale: expected above 0 to 1000, got 0"),
        ([*_REPLAY, "good.csv", "--process", "poisson"], 2, "rate: expected with the process poisson, got none"),
        ([*_REPLAY, "good.csv", "--only-log-type", "x"], 2, "--only-log-type: expected one of conversation, api, got"),
        (["convert", "minus.csv", "x.parquet"], 1, "minus.csv:3: column 'Response tokens': expected an integer >= 0,"),
        (["fit", "empty.csv", "-o", "p.json"], 1, "empty.csv:1: expected a header line, got an empty file"),
        (["generate", "--profile", "empty.csv", "--rows", "5", "-o", "x.csv"], 1, "empty.csv: profile: expected"),
        (["generate", "--process", "poisson", "--rate", "9", "--rows", "9", "-o", "no/x.csv"], 1, "no/x.csv: No such"),
        (["generate", "-o", "x.csv"], 2, "generate: name a --profile, a --process"),
        (["generate", "-o", "x.csv", "--process", "poisson", "--rate", "1"], 2, "generate: name a --duration, --rows"),
        # options of one command
        ([*_EXPORT, "--format", "xml"], 2, "--format: expected one of burstgpt, burstgpt6, parquet, jsonl, azure,"),
        ([*_EXPORT, "--outcome", "fine"], 2, "--outcome: expected one of ok, rejected,"),
        ([*_EXPORT, "--log-type", "x"], 2, "--log-type: expected one of conversation, api, got 'x'"),
        ([*_EXPORT, "--from", "yesterday"], 2, "--from: expected ISO 8601 or epoch seconds, got 'yesterday'"),
        ([*_EXPORT, "--timezone", "Mars/X"], 2, "--timezone: expected an IANA time zone, got 'Mars/X'"),
        ([*_EXPORT, "--failures", "hide"], 2, "--failures: expected keep or drop, got 'hide'"),
        (["import", "good.csv", "--timezone", ""], 2, "--timezone: expected an IANA time zone, got ''"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_the_right_status(
    arguments: list[str], status: int, said: str, run: Run, tmp_path: Path
) -> None:
    before = _files(tmp_path)
    got, out, err = run(*arguments)
    assert (got, err.count("\n")) == (status, 1), err
    assert said in err
    assert err.startswith("burstgate: ")
    assert out == ""
    assert SECRET not in err
    left = _files(tmp_path)
    assert {name: left[name] for name in before} == before
    # An import or an upgrade may have made its database; nothing else is left behind.
    assert all(Path(name).name.startswith(("burstgate.db", "x.db")) for name in left.keys() - before.keys())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BURSTGATE_PROT", "1", "unknown setting 'BURSTGATE_PROT'; the nearest known one is 'BURSTGATE_PORT'"),
        ("BURSTGATE_JOURNAL__BUGDET", "1", "the nearest known one is 'BURSTGATE_JOURNAL__BUDGET'"),
        ("BURSTGATE_JOURNAL__BUDGET", "lots", "environment: journal.budget: "),
        ("BURSTGATE_WORKERS", "0", "environment: workers: Input should be greater than or equal to 1, got '0'"),
    ],
)
def test_a_wrong_environment_is_named(
    name: str, value: str, said: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    status, out, err = run("config", "check")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_config_show_says_where_each_value_comes_from(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "b.yaml").write_text(f"workers: 3\nport: 1\ndatabase_url: postgresql://me:{SECRET}@h/x\n")
    monkeypatch.setenv("BURSTGATE_PORT", "2")
    assert run("config", "check", "--config", "b.yaml") == (0, "ok\n", "")
    status, out, err = run("config", "show", "--config", "b.yaml", "--upstream", "http://one")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert (status, err) == (0, "")
    assert rows["workers"] == ["3", "b.yaml"]
    assert rows["port"] == ["2", "environment"]
    assert rows["upstreams"] == ["http://one", "flag"]
    assert rows["host"] == ["127.0.0.1", "default"]
    assert rows["database_url"] == ["postgresql://me:***@h/x", "b.yaml"]


def test_import_stats_export_and_back(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    assert run("import", "good.csv", "--data-dir", "d")[2].startswith("good.csv: 2 rows read (burstgpt6), 2 inserted")
    assert "0 inserted, 2 already there" in run("import", "good.csv", "--data-dir", "d")[2]
    assert run("export", "-o", "out.csv", "--data-dir", "d")[0] == 0
    assert (tmp_path / "out.csv").read_text() == GOOD
    assert run("export", "-o", "-", "--data-dir", "d")[:2] == (0, GOOD)
    status, out, _ = run("stats", "--data-dir", "d", "--json")
    assert (status, json.loads(out)["requests"]) == (0, 2)
    status, out, _ = run("stats", "out.csv")
    assert (status, "ChatGPT" in out) == (0, True)


def test_analyze_failures_and_compare_of_files_and_the_database(run: Run, tmp_path: Path) -> None:
    arrivals = ("generate", "--process", "poisson", "--rate", "2", "--duration", "7200", "--start", "0")
    assert run(*arrivals, "--seed", "1", "-o", "a.csv")[0] == 0
    assert run(*arrivals, "--seed", "2", "-o", "b.csv")[0] == 0
    assert run("import", "a.csv", "--data-dir", "d")[0] == 0
    status, out, err = run("analyze", "a.csv", "--json", "-")
    of_file = json.loads(out)
    assert (status, err) == (0, "")
    assert json.loads(run("analyze", "--data-dir", "d", "--json", "-")[1]) == of_file
    status, out, err = run("analyze", "a.csv", "--timezone", "Europe/Rome", "--slo", "e2e=1")
    assert (status, err) == (0, "")
    assert all(word in out for word in ("Burstiness", "Periods (Europe/Rome)", "Conversations", "goodput"))
    status, out, err = run("failures", "a.csv", "--json", "f.json")
    assert (status, err, out.splitlines()[0].strip()) == (0, "", "Failures")
    assert json.loads((tmp_path / "f.json").read_text()) == of_file["failures"]

    # Two hours of the same process, told apart by nothing; fixed lengths are the same, a tenth more requests is not.
    loose = ("--arrival-tolerance", "0.5", "--ks-tolerance", "0.2")
    status, out, err = run("compare", "a.csv", "b.csv", *loose)
    assert (status, err, out.split(":")[0]) == (0, "", "SAME"), out
    status, out, err = run("compare", "run-id=a,from=0,to=3600", "b.csv", "--data-dir", "d", *loose, "--json", "-")
    assert (status, err) == (0, "")
    stamps_s = [float(line.split(",")[0]) for line in (tmp_path / "a.csv").read_text().splitlines()[1:]]
    assert json.loads(out)["a_requests"] == sum(stamp_s < 3600 for stamp_s in stamps_s)
    assert run(*arrivals[:4], "4", *arrivals[5:], "--seed", "3", "-o", "c.csv")[0] == 0
    assert run("compare", "a.csv", "c.csv", *loose)[0] == 1
    assert run("generate", "--process", "poisson", "--rate", "2", "--rows", "9", "-o", "few.csv")[0] == 0
    assert run("compare", "few.csv", "few.csv")[0] == 3


def test_a_failed_export_leaves_the_old_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    run("import", "good.csv", "--data-dir", "d")
    (tmp_path / "out.csv").write_text("old")
    for target, said in (("none/o.csv", "No such file"), ("good.csv/o.csv", "Not a directory"), ("d", "directory")):
        status, _, err = run("export", "-o", target, "--data-dir", "d")
        assert (status, err.count("\n")) == (1, 1), err
        assert said in err
    content = (tmp_path / "d" / "burstgate.db").read_bytes()
    (tmp_path / "d" / "burstgate.db").write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
    status, _, err = run("export", "-o", "out.csv", "--data-dir", "d")  # the schema is good, the tables are not
    assert (status, err.count("\n")) == (1, 1), err
    assert "d/burstgate.db: " in err
    assert (tmp_path / "out.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"good.csv", "d", "out.csv"}


def test_an_immutable_folder_takes_no_export_and_no_data(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    run("import", "good.csv", "--data-dir", "d")
    locked = tmp_path / "locked"
    locked.mkdir()
    with contextlib.ExitStack() as cleanup:
        if os.geteuid():
            locked.chmod(0o500)
            cleanup.callback(locked.chmod, 0o700)
        else:  # root writes everywhere else
            done = subprocess.run(["chattr", "+i", locked], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs chattr +i: {done.stderr.strip()}")
            cleanup.callback(lambda: subprocess.run(["chattr", "-i", locked], check=True))
        status, _, err = run("export", "-o", "locked/out.csv", "--data-dir", "d")
        assert (status, err.count("\n")) == (1, 1)
        assert "locked/out.csv" in err
        status, _, err = run(*_SERVE, "--data-dir", "locked")
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith("burstgate: data_dir: locked is not writable: ")
    assert list(locked.iterdir()) == []


def test_db_commands(run: Run) -> None:
    assert run("db", "upgrade", "--data-dir", "d")[0] == 0
    head = run("db", "current", "--data-dir", "d")[1]
    assert head.strip() not in ("", "(no schema)")
    assert run("db", "upgrade", "--data-dir", "d") == (0, head, "")
    assert run("db", "downgrade", "base", "--data-dir", "d") == (0, "(no schema)\n", "")
    status, out, err = run("stats", "--data-dir", "d")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "`burstgate db upgrade` makes it" in err


def test_doctor_on_what_is_not_there_and_what_is_broken(run: Run, tmp_path: Path) -> None:
    assert run("doctor", "--data-dir", "nowhere") == (1, "FAIL data directory: nowhere: no such directory\n", "")
    (tmp_path / "d").mkdir()
    status, out, err = run("doctor", "--data-dir", "d")
    assert (status, err, "FAIL database: " in out) == (1, "", True)
    assert _files(tmp_path) == {}, "the doctor made a database"
    (tmp_path / "d" / "burstgate.db").write_bytes(b"not a database, certainly" * 100)
    status, out, err = run("doctor", "--data-dir", "d", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert (status, err) == (1, "")
    assert checks["database"]["is_ok"] is False
    assert "file is not a database" in checks["database"]["detail"]


def test_version_and_the_help_of_every_command(run: Run) -> None:
    assert run("version") == run("--version") == (0, importlib.metadata.version("burstgate") + "\n", "")

    def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, command in getattr(group, "commands", {}).items():
            yield from commands(command, (*path, name))

    paths = list(commands(typer.main.get_command(app), ()))
    assert len(paths) > 15
    for path in paths:
        status, out, err = run(*path, "--help")
        assert (status, err) == (0, ""), path
        assert "usage" in out.lower(), path


@contextlib.contextmanager
def _serving(*arguments: str | Path, ready: str) -> Iterator[Process]:
    process = Process([BURSTGATE, *arguments])
    try:
        process.wait_for(ready, 60.0)
        yield process
    finally:
        process.kill_tree()


def test_a_port_in_use_is_named(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flag, place in (("--port", "port"), ("--control-port", "control_port")):
            status, _, err = run(*_SERVE, flag, port)
            assert (status, err) == (
                2,
                f"burstgate: {place}: can not listen on 127.0.0.1:{port}: Address already in use\n",
            )
        status, _, err = run("simulate", "--port", port)
        assert (status, err.count("\n")) == (2, 1)
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in err


def test_two_gateways_can_share_neither_port_nor_data(run: Run, tmp_path: Path) -> None:
    with Installation(DOWN, data_dir=tmp_path / "d", workers=2) as installation:
        port = installation.gateway_url.rpartition(":")[2]
        for workers in ("1", "2"):  # SO_REUSEPORT would let a second one in unseen
            status, _, err = run(*_SERVE, "--port", port, "--workers", workers, "--data-dir", "other")
            assert (status, err) == (
                2,
                f"burstgate: port: can not listen on 127.0.0.1:{port}: Address already in use\n",
            )
        done = burstgate(*_SERVE, "--data-dir", tmp_path / "d")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "another recorder is at work on this data directory" in done.stderr
        assert done.stderr.splitlines()[-1] == "burstgate: the recorder did not start; its reason is above"
        status, _, err = run("record", "--data-dir", tmp_path / "d")
        assert (status, err.count("\n")) == (2, 1)
        assert "another recorder is at work on this data directory" in err
        assert run("doctor", "--data-dir", tmp_path / "d")[0] == 0


@pytest.mark.parametrize(
    ("blocked", "said"),
    [
        ("journal", "journal"),
        ("secret", "expected 32 bytes, found 3; delete it to make a new one"),
        ("sessions.table/x", "Is a directory"),
    ],
)
def test_a_part_that_can_not_start_says_why(blocked: str, said: str, tmp_path: Path) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_bytes(b"abc")
    done = burstgate(*_SERVE, "--data-dir", tmp_path)
    *reasons, last = done.stderr.splitlines()  # worker and recorder may both have one
    assert done.returncode == 2
    assert last.endswith("did not start; its reason is above")
    assert reasons
    assert all("CRITICAL" in reason and said in reason for reason in reasons), done.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_serve_drains_a_running_stream_and_stops_with_status_0(signum: signal.Signals, tmp_path: Path) -> None:
    with (
        Simulator("--step-base-s", "0.1") as simulator,
        Installation(simulator.url, data_dir=tmp_path / "d") as installation,
    ):
        body = {"model": "m", "prompt": "a", "max_tokens": 25, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{installation.gateway_url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(installation.process.pid, signum)
            time.sleep(0.5)
            assert installation.process.is_running
            assert [line for line in lines if line][-1] == "data: [DONE]"
        wait_until(lambda: not installation.process.is_running, 10.0, "a stop")
        assert installation.process.terminate(1.0) == 0
        assert installation.process.commands() == {}
        assert [(row.outcome, row.response_tokens) for row in installation.rows()] == [(Outcome.OK, 25)]
        assert "Traceback" not in installation.output
        assert installation.doctor()["accounting"].is_ok


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_record_alone_moves_what_a_dead_gateway_left_and_stops_with_status_0(
    signum: signal.Signals, tmp_path: Path
) -> None:
    with Simulator("--fast") as simulator, Installation(simulator.url, data_dir=tmp_path / "d") as installation:
        os.kill(installation.pid("recorder"), signal.SIGSTOP)
        for _ in range(5):
            httpx.get(f"{installation.gateway_url}/v1/models").raise_for_status()
        installation.kill_tree()
        process = Process([BURSTGATE, "record", "--data-dir", tmp_path / "d"])
        try:
            rows = installation.wait_rows(5)
            assert {row.endpoint for row in rows} == {"/v1/models"}
            os.kill(process.pid, signum)
            wait_until(lambda: not process.is_running, 10.0, "a stop")
            assert process.terminate(1.0) == 0
            assert process.output == ""
        finally:
            process.kill_tree()
        assert installation.doctor()["accounting"].is_ok


def test_simulate_and_replay(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "minus.csv").write_text(GOOD + "7,ChatGPT,10,-3,7,API log\n")
    with _serving("simulate", "--port", "0", "--fast", ready=r"\b(http://\S+)$") as simulator:
        url = simulator.wait_for(r"\b(http://\S+)$", 1.0)[1]
        arguments = ("replay", "--target", url, "--model", "simulated", "--speed", "100", "--quiet",
                     "--max-lag", "5")  # what else this machine does is no matter here  # fmt: skip
        assert run(*arguments, "good.csv", "--json", "s.json", "--samples", "s.jsonl")[0] == 0
        assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 2
        replay = (
            "replay",
            "--target",
            url,
            "--model",
            "simulated",
            "--quiet",
            "good.csv",
            "--json",
            "s.json",
            "--max-lag",
            "5",
        )
        assert run(*replay, "--loop", "3", "--process", "gamma", "--rate", "50", "--shape", "0.5")[0] == 0
        summary = json.loads((tmp_path / "s.json").read_text())
        assert (summary["process"], summary["sent"], summary["ok"]) == ("gamma", 6, 6)
        # Rows of a profile at a share of a capacity; the trace's own models under other names.
        assert run("fit", "good.csv", "-o", "p.json")[0] == 0
        made = ("replay", "--target", url, "--quiet", "--profile", "p.json", "--limit", "7", "--json", "s.json",
                "--max-lag", "5")  # fmt: skip
        assert run(*made, "--model", "simulated", "--capacity", "200", "--load", "0.5")[0] == 0
        summary = json.loads((tmp_path / "s.json").read_text())
        assert (summary["sent"], summary["ok"]) == (7, 7)
        assert run(*made, "--model-map", "model-0=simulated", "--kv-budget", "0.00001", "--tpot", "1")[0] == 0
        assert json.loads((tmp_path / "s.json").read_text())["ok"] == 7  # the simulator serves no model-0
        assert (
            run("replay", "--target", url, "--quiet", "good.csv", "--speed", "100", "--keep-models", "--max-lag", "5")[
                0
            ]
            == 0
        )
        for wrong, message in (
            (("good.csv",), "--model: expected one model for all rows, or --model-map or --keep-models, and not both"),
            (("good.csv", "--model", "m", "--keep-models"), "--model: expected one model for all rows"),
            (("good.csv", "--model-map", "A"), "--model-map: expected A=B, got 'A'"),
            (("good.csv", "--model-map", "ChatGPT=other"), "model 'other': the target"),
            (("--model", "simulated"), "trace: expected a file, or a profile to make rows of, got neither"),
            (("good.csv", "--model", "simulated", "--capacity", "5", "--load", "1", "--rate", "2"), "--load: expected"),
        ):
            status, _, err = run("replay", "--target", url, "--quiet", *wrong)
            assert (status in (1, 2), err.count("\n"), message in err) == (True, 1, True), err
        for flag in ("--json", "--samples"):
            status, _, err = run(*arguments, "good.csv", flag, "nowhere/s")
            assert (status, err.count("\n")) == (1, 1), err
            assert "nowhere" in err
        status, out, err = run(*arguments, "minus.csv")
        assert status == 1
        assert "minus.csv:4: column 'Response tokens': expected an integer >= 0, got '-3'" in " ".join(
            (out + err).split()
        )


def test_a_replay_is_judged_reported_and_kept(run: Run, tmp_path: Path) -> None:
    """Verdict and exit status, the page, the report made again from the samples, the run and its rows kept."""
    (tmp_path / "good.csv").write_text(GOOD)
    with _serving("simulate", "--port", "0", "--fast", ready=r"\b(http://\S+)$") as simulator:
        url = simulator.wait_for(r"\b(http://\S+)$", 1.0)[1]
        replay = ("replay", "good.csv", "--target", url, "--model", "simulated", "--speed", "50")
        files = ("--samples", "s.parquet", "--json", "s.json", "--html", "s.html")
        kept = ("--max-lag", "5", "--store", "--run-id", "r1", "--data-dir", "d")
        status, out, err = run(*replay, "--slo", "ttft=5,e2e=9", *files, *kept)
        assert (status, err) == (0, "burstgate: stored as run r1, with 2 requests\n")
        assert out.splitlines()[-1] == "verdict   GOOD: nothing that was asked for was missed"
        assert "goodput   100 % of all requests" in out
        assert b"GOOD: nothing" in (tmp_path / "s.html").read_bytes()
        summary = json.loads((tmp_path / "s.json").read_text())
        assert (summary["verdict"], summary["goodput"]["good"], summary["server"]["scrapes"] > 0) == ("good", 2, True)

        status, out, err = run(*replay, *kept)
        assert (status, err.count("\n")) == (1, 1)
        assert "run id 'r1': expected a new one" in err
        status, _, err = run(*replay, "--quiet", "--max-lag", "1e-9", "--slo", "ttft=1e-6")
        assert status == 3
        assert err.startswith("burstgate: invalid: this machine could not keep the schedule")
        assert "burstgate: invalid: 0.00 % of the requests kept ttft <= 1e-06 s" in err
        plain = ("--max-lag", "5", "--quiet", "--store", "--no-store-requests", "--run-id", "r2", "--data-dir", "d")
        status, _, err = run(*replay, *plain)
        assert (status, err) == (0, "burstgate: stored as run r2, its requests are the gateway's to record\n")

    status, out, _ = run("report", "s.parquet", "--summary", "s.json", "--json", "--html", "a.html", "--max-lag", "5")
    again = json.loads(out)
    assert (status, again["ttft_s"], again["run_id"]) == (0, summary["ttft_s"], "r1")
    assert again["over_time"] == summary["over_time"]
    assert (tmp_path / "a.html").stat().st_size > 1_000_000
    status, out, _ = run("report", "s.parquet", "--slo", "ttft=1e-6", "--max-lag", "5")
    assert (status, out.splitlines()[0]) == (1, "run (unnamed), from its samples")

    status, out, _ = run("runs", "--data-dir", "d", "--json")
    runs = json.loads(out)
    assert (status, [each["run_id"] for each in runs]) == (0, ["r2", "r1"])
    assert runs[1]["summary"] == summary
    assert runs[1]["options"]["speed"] == 50.0
    status, out, _ = run("runs", "--data-dir", "d")
    assert out.split()[-3:] == ["2", "2", "good"]
    status, out, _ = run("stats", "--data-dir", "d", "--run-id", "r1", "--json")
    assert json.loads(out)["requests"] == 2
    status, _, err = run("runs", "--run-id", "nope", "--data-dir", "d")
    assert (status, err.count("\n")) == (1, 1)


@pytest.mark.slow
def test_demo(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("demo", "--directory", "demo-out")
    assert status == 0
    assert any(path.suffix == ".csv" for path in (tmp_path / "demo-out").iterdir())
    assert "ok" in out


class _Envelope(msgspec.Struct):
    error: dict[str, str | None]


def _error_type(body: bytes) -> str | None:
    envelope = msgspec.json.decode(body, type=_Envelope).error
    assert set(envelope) == {"message", "type", "param", "code"}
    return envelope["type"]


def _raw(url: str, *pieces: bytes) -> tuple[int, bytes]:
    """Status and body of what comes back for these bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as connection:
        for piece in pieces:
            with contextlib.suppress(OSError):
                connection.sendall(piece)
        data = b""
        with contextlib.suppress(OSError):
            while more := connection.recv(65536):
                data += more
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    settings = {"BURSTGATE_LIMITS__BODY": "64KiB", "BURSTGATE_LIMITS__HEADERS": "8KiB"}
    data_dir = tmp_path_factory.mktemp("gateway") / "d"
    with Simulator("--fast") as simulator, Installation(simulator.url, data_dir=data_dir, env=settings) as installation:
        yield installation


def _post(path: str, *lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: h", "connection: close", *lines, "", ""]).encode() + body


_CHUNKS = [b"8000\r\n" + b"x" * 0x8000 + b"\r\n"] * 4


@pytest.mark.parametrize(
    ("pieces", "status", "error_type", "outcome"),
    [
        # The upstream's own answers pass: FastAPI's for a route, vLLM's for a body.
        ([_post("/v1/nope", "content-length: 0")], 404, None, Outcome.INVALID_REQUEST),
        ([_post("/%00/%ff", "content-length: 0")], 404, None, Outcome.INVALID_REQUEST),
        (
            [_post("/v1/completions", "content-type: application/json", "content-length: 4", body=b"{{{{")],
            *(400, "Bad Request", Outcome.INVALID_REQUEST),
        ),
        # Ours: what the gateway can not or will not read.
        ([_post("/v1/completions", "content-length: 70000")], 413, "request_too_large", Outcome.INVALID_REQUEST),
        (
            [_post("/v1/completions", "transfer-encoding: chunked"), *_CHUNKS],
            *(413, "request_too_large", Outcome.INVALID_REQUEST),
        ),
        ([_post("/v1/completions", "x-long: " + "y" * 9_000)], 431, "request_header_fields_too_large", None),
        (
            [b"GET / HTTP/1.1\r\n", *[b"x-many: " + b"y" * 1_000 + b"\r\n"] * 10],
            *(431, "request_header_fields_too_large", None),
        ),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)], 400, "invalid_http", None),  # TLS
        ([b"GET / HTTP/1.1\r\nhost: h\r\nbad header\r\n\r\n"], 400, "invalid_http", None),
    ],
)  # fmt: skip
def test_bad_requests(
    pieces: Sequence[bytes], status: int, error_type: str | None, outcome: Outcome | None, gateway: Installation
) -> None:
    before = len(gateway.rows()) if gateway.doctor()["database"].is_ok else 0
    got, body = _raw(gateway.gateway_url, *pieces)
    assert got == status
    if status == 404:
        assert body == b'{"detail":"Not Found"}'
    elif error_type != "Bad Request":
        assert _error_type(body) == error_type
    if outcome is not None:  # bytes that are no request have no record
        row = gateway.wait_rows(before + 1)[-1]
        assert (row.outcome, row.status, row.error_type) == (outcome, status, error_type)


def test_an_upstream_that_is_down_is_a_502_and_a_connect_error(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and not listened on
        down = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with Installation(down, data_dir=tmp_path / "d") as installation:
            answer = httpx.post(f"{installation.gateway_url}/v1/completions", json={"model": "m", "prompt": "a"})
            assert answer.status_code == 502
            assert _error_type(answer.content) == "upstream_connect_error"
            assert answer.json()["error"]["message"] == f"{down}: Connection refused"
            row = installation.wait_rows(1)[0]
    assert (row.outcome, row.status, row.error_type, row.model, row.attempts) == (
        *(Outcome.CONNECT_ERROR, 502, "upstream_connect_error", "m", 1),
    )
