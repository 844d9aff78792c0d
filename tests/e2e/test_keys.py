"""Keys, tokens and TLS at a real installation, used as an operator uses them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.harness import Installation, Simulator, burstgate, wait_until
from tests.proxy.test_tls import make_certificate
from traces.record import Outcome

ASK = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
STOPS_WITHIN_S = 10.0
"""Two seconds are promised; a machine that runs other tests beside takes longer for the requests alone."""


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    with Simulator() as running:
        yield running.url


@pytest.fixture(scope="module")
def guarded(simulator: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A gateway that asks for keys."""
    with Installation(
        simulator, data_dir=tmp_path_factory.mktemp("keys"), workers=2, env={"BURSTGATE_KEYS__REQUIRED": "true"}
    ) as made:
        yield made


def keys(installation: Installation, *arguments: str) -> str:
    done = burstgate("keys", *arguments, "--data-dir", installation.data_dir)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status(installation: Installation, key: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        url = f"{installation.gateway_url}/v1/chat/completions"
        return httpx.post(url, json=ASK, headers=headers, timeout=20.0).status_code
    except httpx.HTTPError:  # its worker was killed
        return 0


def until(installation: Installation, key: str, expected: int) -> None:
    """Both workers say so within the time promised: a request goes to either."""

    def agree() -> bool:
        return all(status(installation, key) == expected for _ in range(6))

    wait_until(agree, STOPS_WITHIN_S, f"status {expected}")


def test_a_keys_life(guarded: Installation) -> None:
    assert status(guarded, None) == 401
    key = keys(guarded, "create", "alice", "--tenant", "team-a", "--log-type", "conversation")
    until(guarded, key, 200)
    new = keys(guarded, "rotate", key_id(guarded, key), "--grace", "1h")
    until(guarded, new, 200)
    assert status(guarded, key) == 200  # in its grace
    for each in (key, new):
        keys(guarded, "revoke", key_id(guarded, each))
        until(guarded, each, 401)
    listed = keys(guarded, "list")
    assert key not in listed
    assert listed.count("revoked") >= 2
    wait_until(lambda: len(guarded.rows()) > 10, 20.0, "rows")
    rows = [row for row in guarded.rows() if row.outcome is Outcome.OK]
    assert {(row.tenant, row.log_type) for row in rows} == {("team-a", "Conversation log")}
    assert {row.tenant for row in guarded.rows() if row.status == 401} == {None}


def key_id(installation: Installation, key: str) -> str:
    (line,) = [line for line in keys(installation, "list").splitlines() if f" {key[:11]} " in line]
    return line.split()[0]


def test_keys_work_and_stay_revoked_without_a_database(guarded: Installation) -> None:
    good, revoked = keys(guarded, "create", "good"), keys(guarded, "create", "bad")
    until(guarded, revoked, 200)
    keys(guarded, "revoke", key_id(guarded, revoked))
    until(guarded, revoked, 401)
    database = guarded.data_dir / "burstgate.db"
    users = [*guarded.pids("recorder"), *guarded.pids("control")]
    for pid in users:
        os.kill(pid, signal.SIGSTOP)
    database.rename(guarded.data_dir / "away.db")
    try:
        assert (status(guarded, good), status(guarded, revoked)) == (200, 401)
        for pid in guarded.pids("worker"):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: status(guarded, good) == 200, 30.0, "new workers serve")
        assert status(guarded, revoked) == 401
    finally:
        (guarded.data_dir / "away.db").rename(database)
        for pid in users:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("create", ""), "name: expected 1 to 128 characters"),
        (("create", "a", "--expires-in", "soon"), "--expires-in: expected a number and one of s, m, h, d, w"),
        (("create", "a", "--log-type", "x"), "--log-type: expected conversation or api"),
        (("create", "a", "--concurrency", "0"), "concurrency: expected a number above 0"),
        (("admin", "create", "a", "--role", "root"), "--role: expected one of viewer, operator, admin"),
        (("revoke", "key_none"), "key 'key_none': expected the id of a key"),
        (("rotate", "key_none"), "key 'key_none': expected the id of a key"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    done = burstgate("keys", *arguments, "--data-dir", tmp_path)
    assert done.returncode in (1, 2)
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_beyond_loopback_it_starts_with_a_token_only(simulator: str, tmp_path: Path) -> None:
    serve = ("serve", "--upstream", simulator, "--data-dir", tmp_path, "--control-host", "0.0.0.0", "--port", "0",
             "--control-port", "0")  # fmt: skip
    done = burstgate(*serve)
    assert done.returncode == 2
    assert done.stderr.startswith("burstgate: control_host: 0.0.0.0: expected an administrator's token")
    assert len(done.stderr.splitlines()) == 1
    done = burstgate("keys", "admin", "create", "ops", "--role", "viewer", "--data-dir", tmp_path)
    token = done.stdout.strip()
    with Installation(simulator, data_dir=tmp_path, flags=("--control-host", "0.0.0.0")) as made:
        url = made.control_url
        assert httpx.get(f"{url}/api/v1/status").status_code == 401
        assert httpx.get(f"{url}/api/v1/status", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert token not in made.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_at_both_listeners(simulator: str, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "gate")
    other, other_key = make_certificate(tmp_path, "other")
    (tmp_path / "tokens").write_text("admin " + "t" * 20)
    env = {
        "BURSTGATE_TLS__CERT_FILE": str(certificate),
        "BURSTGATE_TLS__KEY_FILE": str(key),
        "BURSTGATE_TLS__CONTROL_CERT_FILE": str(certificate),
        "BURSTGATE_TLS__CONTROL_KEY_FILE": str(key),
        "BURSTGATE_CONTROL__TOKENS_FILE": str(tmp_path / "tokens"),
    }
    with Installation(simulator, data_dir=tmp_path / "data", env=env) as made:
        assert made.gateway_url.startswith("https://")
        with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as client:
            for stream in (False, True):
                answer = client.post(f"{made.gateway_url}/v1/chat/completions", json={**ASK, "stream": stream})
                assert answer.status_code == 200
                assert answer.text.endswith("data: [DONE]\n\n") == stream
            login = client.post(f"{made.control_url}/login", data={"token": "t" * 20})
            assert "; Secure" in login.headers["set-cookie"]
        address = (httpx.URL(made.gateway_url).host, httpx.URL(made.gateway_url).port or 0)
        with socket.create_connection(address) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"200" not in plain.recv(1000)
        shutil.copy(other_key, key)
        shutil.copy(other, certificate)

        def is_renewed() -> bool:
            try:
                return (
                    httpx.get(f"{made.gateway_url}/health", verify=ssl.create_default_context(cafile=other)).status_code
                    == 200
                )
            except httpx.ConnectError:
                return False

        wait_until(is_renewed, 5.0, "the new certificate is shown")


def test_secrets_are_not_shown(simulator: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"upstreams:\n  - url: {simulator}\n    api_key: SECRET-inline\n"
        f"  - url: http://127.0.0.1:1\n    api_key_env: KEY_OF_TEST\n"
    )
    shown = burstgate("config", "show", "--config", config)
    assert shown.returncode == 0
    assert "SECRET" not in shown.stdout
    assert "***" in shown.stdout
    config.write_text(f"upstreams:\n  - url: {simulator}\n    api_key: SECRET-inline\n    weight: -1\n")
    done = burstgate("config", "check", "--config", config)
    assert done.returncode == 2
    assert "SECRET" not in done.stderr + done.stdout
    for text, problem in [
        ("api_key_env: NO_SUCH_VARIABLE", "api_key_env: NO_SUCH_VARIABLE: no such environment variable"),
        (f"api_key_file: {tmp_path / 'none'}", "No such file"),
        ("api_key: 'SECRET with space'", "expected 1 to 4096 visible ASCII characters"),
        ("api_key: a\n    api_key_env: b", "one of api_key, api_key_env and api_key_file is enough"),
    ]:
        config.write_text(f"upstreams:\n  - url: {simulator}\n    {text}\n")
        done = burstgate("serve", "--config", config, "--data-dir", tmp_path / "d", "--check")
        assert done.returncode == 2
        assert problem in done.stderr
        assert "SECRET" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_start_is_quiet(simulator: str, tmp_path: Path) -> None:
    """A fresh installation has no table of keys until its recorder makes it: nothing to complain of."""
    with Installation(simulator, data_dir=tmp_path) as made:
        time.sleep(1.5)
        assert "ERROR" not in made.output
