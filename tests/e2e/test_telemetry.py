"""Telemetry end to end: the `openai` SDK through real processes to a simulated vLLM, and a collector that listens."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai

from tests.e2e.harness import BURSTGATE, Installation, Process, Simulator
from tests.proxy.collector import Collector, plain
from tests.proxy.harness import closed_port
from traces.record import Outcome

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
PROMPT = "the canary sings"
KEY = "sk-canary"


def test_a_client_finds_its_request_in_its_own_trace(tmp_path: Path) -> None:
    with Simulator() as simulator, Collector() as collector:
        environment = {
            "BURSTGATE_TELEMETRY__OTLP_ENDPOINT": collector.url,
            "BURSTGATE_TELEMETRY__OTLP_HEADERS": "x-key=collector-secret",
            "BURSTGATE_TELEMETRY__TRACES_SAMPLE": "0",
            "BURSTGATE_TELEMETRY__METRICS_INTERVAL_S": "1",
            "BURSTGATE_LOG__FAILURES": "true",
        }
        with Installation(simulator.url, data_dir=tmp_path, env=environment) as installation:
            client = openai.OpenAI(base_url=f"{installation.gateway_url}/v1", api_key=KEY, max_retries=0)
            model = client.models.list().data[0].id
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=5, extra_headers=headers
            )
            client.completions.create(model=model, prompt=PROMPT, max_tokens=3)  # without a parent, and not drawn
            collector.wait(collector.spans, "spans")
            (record,) = [row for row in installation.wait_rows(3) if row.endpoint == "/v1/chat/completions"]

            def requests() -> float:
                found = collector.metrics().get("burstgate_requests")
                points = found.sum.data_points if found is not None else ()
                return sum(float(each.as_double) for each in points if plain(each.attributes)["outcome"] == "ok")

            collector.wait(lambda: requests() == 3, "metrics of three requests")
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            page = httpx.get(f"{installation.control_url}/metrics", headers=accept)
            output = installation.stop()
    server, attempt = collector.spans()
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert attempt.parent_span_id == server.span_id
    assert server.name == f"chat {model}"
    said = plain(server.attributes)
    assert said["burstgate.request_id"] == record.request_id
    assert answer.usage is not None
    assert said["gen_ai.usage.output_tokens"] == record.response_tokens == answer.usage.completion_tokens
    assert said["gen_ai.usage.input_tokens"] == record.request_tokens == answer.usage.prompt_tokens
    assert record.outcome is Outcome.OK
    tokens = collector.metrics()["gen_ai.client.token.usage"].histogram.data_points
    assert {plain(each.attributes)["gen_ai.operation.name"] for each in tokens} == {"chat", "text_completion"}
    assert collector.headers[0]["x-key"] == "collector-secret"
    assert page.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert f'# {{trace_id="{TRACE}"}}' in page.text
    assert page.text.endswith("# EOF\n")
    for written in (output, page.text, *(body.decode("latin-1") for _, body in collector.bodies)):
        assert all(secret not in written for secret in (PROMPT, KEY, "collector-secret"))


def test_all_processes_log_json(tmp_path: Path) -> None:
    command: list[str | Path] = [
        BURSTGATE,
        "serve",
        "--upstream",
        f"http://127.0.0.1:{closed_port()}",
        "--data-dir",
        tmp_path,
    ]
    process = Process([*command, "--port", "0", "--control-port", "0"], {"BURSTGATE_LOG__FORMAT": "json"})
    try:
        url = process.wait_for(r'"message":"gateway (http://\S+) ->', 60.0)[1]
        process.wait_for('"message":"recording ', 60.0)
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": []})
        process.wait_for('"outcome":"connect_error"', 10.0)
        process.terminate(60.0)
    finally:
        process.kill_tree()
    lines = [json.loads(line) for line in process.output.splitlines()]
    assert answer.status_code == 502
    assert {line["process"] for line in lines} == {"supervisor", "worker"}
    (failed,) = [line for line in lines if "request_id" in line]
    assert failed["request_id"] == answer.headers["x-request-id"]
    assert (failed["status"], failed["error_type"], failed["model"]) == (502, "upstream_connect_error", "m")
