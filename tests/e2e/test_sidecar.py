"""The recorder beside the gateway, as in a pod: `recorder: false` and `burstgate record` on one data directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx

from tests.e2e.harness import BURSTGATE, Installation, Process, Simulator, wait_until

BODY = {"model": "simulated", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def ask(url: str) -> None:
    assert httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=20.0).status_code == 200


def test_recorder_in_a_process_of_its_own(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with Simulator() as simulator:
        gateway = Installation(simulator.url, data_dir=data_dir, env={"BURSTGATE_RECORDER": "false"})
        with gateway:
            assert gateway.pids("recorder") == []
            ask(gateway.gateway_url)
            recorder = Process([BURSTGATE, "record", "--data-dir", data_dir])
            try:
                gateway.wait_rows(1)
                os.kill(gateway.process.pid, signal.SIGUSR2)
                wait_until(lambda: "restarted as version" in gateway.output, 30.0, "restarted")
                assert gateway.pids("recorder") == []
                ask(gateway.gateway_url)
                gateway.stop()
                assert recorder.terminate(30.0) == 0  # after the gateway, as a sidecar: it empties the journal
                assert len(gateway.rows()) == 2
                assert gateway.doctor()["accounting"].detail.startswith("accepted 2 = in database 2 + in journal 0")
            finally:
                recorder.kill_tree()
