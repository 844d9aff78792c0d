"""A real vLLM for the tests marked `vllm`: one that runs already, or one of our own for the session."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.harness import Process, wait_until

INSTALL_TIMEOUT_S = 900.0
START_TIMEOUT_S = 300.0
MAX_MODEL_LEN = 32768
"""The longest prompt of BurstGPT_3_head.csv has 25,085 tokens."""
REPOSITORY = Path(__file__).parents[2]


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def _lower_priority(pid: int) -> None:
    """A real vLLM computes on its GPU; this one must not take the CPU from the gateway and the clients."""
    os.setpriority(os.PRIO_PROCESS, pid, 10)
    # Linux shares the CPU between sessions first: a nice value counts within one only (sched(7), autogroup).
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("10")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def vllm_home() -> Path:
    """Where the vLLM build lies: `venv/bin/vllm` and the model `tiny`. Installed first where it is not there."""
    folder = REPOSITORY / os.environ.get("BURSTGATE_VLLM", "../shared/vllm-cpu")
    home = Path(os.environ.get("VLLM_CPU_HOME", "~/.cache/vllm-cpu")).expanduser()
    install = folder / "install.sh"
    if install.exists():
        done = subprocess.run([install], capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        assert done.returncode == 0, f"{install} failed:\n{done.stdout}{done.stderr}"
    elif not (home / "venv/bin/vllm").exists():
        pytest.skip(f"needs the vLLM build: no {install} (BURSTGATE_VLLM), no {home} (VLLM_CPU_HOME)")
    return home


@contextlib.contextmanager
def own_vllm(max_model_len: int, *flags: str) -> Iterator[str]:
    """Base URL of a vLLM that is started for it and ends with it. Skips where there is none to start."""
    serve = REPOSITORY / os.environ.get("BURSTGATE_VLLM", "../shared/vllm-cpu") / "serve.sh"
    if not serve.exists():
        pytest.skip(f"needs a vLLM to start: there is no {serve} (BURSTGATE_VLLM)")
    url = f"http://127.0.0.1:{(port := _free_port())}"
    process = Process(
        [serve, str(port), *flags],
        {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_MAX_MODEL_LEN": str(max_model_len)},
        cwd=REPOSITORY,
    )
    try:
        _lower_priority(process.pid)
        wait_until(
            lambda: _is_healthy(url) or not process.is_running, START_TIMEOUT_S, f"{url}/health is 200", poll_s=0.5
        )
        assert process.is_running, f"vLLM ended:\n{process.output}"
        yield url
        process.terminate(60.0)
    finally:
        process.kill_tree()


@pytest.fixture(scope="session")
def vllm_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL of a vLLM that serves the model `tiny`."""
    url = os.environ.get("BURSTGATE_VLLM_URL", "").rstrip("/")
    if url:
        assert _is_healthy(url), f"BURSTGATE_VLLM_URL: {url}/health does not answer 200"
        yield url
        return
    serve = REPOSITORY / os.environ.get("BURSTGATE_VLLM", "../shared/vllm-cpu") / "serve.sh"
    if not serve.exists():
        pytest.skip(f"needs a vLLM: BURSTGATE_VLLM_URL is not set, and there is no {serve} (BURSTGATE_VLLM)")
    request.getfixturevalue("vllm_home")
    with own_vllm(MAX_MODEL_LEN, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as started:
        yield started


@pytest.fixture(scope="session")
def real_traces() -> Path:
    """The folder of real traces."""
    folder = REPOSITORY / os.environ.get("BURSTGATE_TRACES", "../shared/traces")
    if not folder.is_dir():
        pytest.skip(f"needs the real traces at {folder} (BURSTGATE_TRACES)")
    return folder
