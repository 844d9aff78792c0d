"""Spans and metrics as a real OTLP collector gets them, from a gateway in front of a scripted upstream."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.config_error import ConfigError
from proxy.otel import MetricExporting, Name, check_exporter
from proxy.settings import HealthSettings, RetrySettings, Settings, TelemetrySettings
from proxy.telemetry import CountersReader, all_worker_metrics, counting_since_ns
from tests.proxy.collector import Collector, plain
from tests.proxy.harness import (
    CHAT,
    JSON,
    Client,
    Script,
    Upstream,
    chat_answer,
    chat_body,
    closed_port,
    in_loop,
    running,
    streaming,
)
from tests.proxy.harness import plain as answering
from traces.record import Outcome

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01".encode()


def telemetry(url: str, share: float = 1.0, **more: Any) -> TelemetrySettings:
    return TelemetrySettings(otlp_endpoint=url, traces_sample=share, **more)


def traced(value: bytes, *more: tuple[bytes, bytes]) -> Client:
    return Client(chat_body("hi"), headers=(JSON, (b"traceparent", value), *more))


@in_loop
async def test_a_span_says_what_the_record_says(tmp_path: Path) -> None:
    with Collector() as collector:
        settings = telemetry(collector.url, otlp_headers={"x-key": "s3cret"}, service_name="edge")
        async with Upstream(streaming()) as upstream, running(tmp_path, upstream.url, telemetry=settings) as bench:
            session = (b"x-session-id", b"s-1")
            await bench.serve(Client(chat_body("hi", stream=True, max_tokens=9), headers=(JSON, session)))
            record = bench.record()
            sent = upstream.requests[0].values(b"traceparent")
    (resource, server), (_, client) = collector.spans_by_resource()
    assert resource["service.name"] == "edge"
    assert resource["service.instance.id"] == "test"
    assert collector.headers[0]["x-key"] == "s3cret"
    assert server.name == client.name == "chat m"
    assert (server.kind, client.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert server.parent_span_id == b""
    assert (client.trace_id, client.parent_span_id) == (server.trace_id, server.span_id)
    assert sent == [b"00-%b-%b-01" % (client.trace_id.hex().encode(), client.span_id.hex().encode())]
    assert server.status.code == client.status.code == Status.STATUS_CODE_UNSET
    assert record.elapsed_s is not None
    assert record.ttft_s is not None
    assert server.start_time_unix_nano == int(record.received_at * 1e9)
    assert (server.end_time_unix_nano - server.start_time_unix_nano) / 1e9 == pytest.approx(record.elapsed_s, abs=1e-6)
    assert server.start_time_unix_nano < client.start_time_unix_nano < client.end_time_unix_nano
    assert client.end_time_unix_nano == server.end_time_unix_nano
    host, port = upstream.url.removeprefix("http://").split(":")
    shared = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "served",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["stop"],
        "http.response.status_code": 200,
        "burstgate.upstream": upstream.url,
    }
    assert plain(server.attributes) == shared | {
        "http.request.method": "POST",
        "server.address": "127.0.0.1",
        "server.port": 8080,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.conversation.id": "s-1",
        "burstgate.request_id": record.request_id,
        "burstgate.outcome": "ok",
        "burstgate.attempts": 1,
        "burstgate.time_to_first_token_s": record.ttft_s,
    }
    assert plain(client.attributes) == shared | {"server.address": host, "server.port": int(port)}
    (event,) = client.events
    assert event.name == Name.FIRST_TOKEN
    first_s = (event.time_unix_nano - client.start_time_unix_nano) / 1e9
    assert first_s == pytest.approx(record.ttft_s, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ([SAMPLED], "ours"),
        ([f"00-{TRACE}-{PARENT}-03".encode()], "ours"),  # random trace id (level 2)
        ([f"cc-{TRACE}-{PARENT}-01-what-the-future-brings".encode()], "ours"),
        ([f"00-{TRACE}-{PARENT}-00".encode()], "unsampled"),
        ([f"00-{TRACE}-{PARENT}-02".encode()], "unsampled"),
        ([f"00-{TRACE}-{PARENT}-01-more".encode()], "malformed"),  # version 0 has no more
        ([f"ff-{TRACE}-{PARENT}-01".encode()], "malformed"),
        ([f"00-{TRACE.upper()}-{PARENT}-01".encode()], "malformed"),
        ([b"00-" + b"0" * 32 + f"-{PARENT}-01".encode()], "malformed"),
        ([f"00-{TRACE}-".encode() + b"0" * 16 + b"-01"], "malformed"),
        ([b"garbage"], "malformed"),
        ([SAMPLED, SAMPLED], "malformed"),
    ],
)
@in_loop
async def test_trace_context_reaches_the_upstream(tmp_path: Path, values: list[bytes], passes: str) -> None:
    state = (b"tracestate", b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")
    headers = [JSON, *((b"traceparent", value) for value in values), state]
    async with Upstream(answering(chat_answer())) as upstream:
        async with running(tmp_path / "off", upstream.url) as bench:
            await bench.serve(Client(chat_body("hi"), headers=headers))
        with Collector() as collector:
            async with running(tmp_path / "on", upstream.url, telemetry=telemetry(collector.url)) as bench:
                await bench.serve(Client(chat_body("hi"), headers=headers))
    off, on = upstream.requests
    assert off.values(b"traceparent") == values
    assert off.values(b"tracestate") == on.values(b"tracestate") == [state[1]]
    others = [[header for header in each.headers if header[0] not in (b"traceparent", b"x-request-id")]
              for each in (off, on)]  # fmt: skip
    assert others[0] == others[1]
    if passes == "unsampled":
        assert collector.spans() == []
        assert on.values(b"traceparent") == values
        return
    server, client = collector.spans()
    assert client.parent_span_id == server.span_id
    if passes == "malformed":
        assert on.values(b"traceparent") == values
        assert (server.trace_id.hex() != TRACE, server.parent_span_id) == (True, b"")
    else:
        assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
        flags = values[0][53:55]
        assert on.values(b"traceparent") == [f"00-{TRACE}-{client.span_id.hex()}-".encode() + flags]


@in_loop
async def test_each_attempt_has_a_span(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{closed_port()}"
    async with Upstream(answering(b"{}", 503)) as busy, Upstream(answering(chat_answer())) as well:
        with Collector() as collector:
            health = HealthSettings(interval_s=0, models_interval_s=0)
            async with running(
                tmp_path, nobody, busy.url, well.url, telemetry=telemetry(collector.url), health=health,
                balance={"policy": "round_robin"}, retry=RetrySettings(max_attempts=3, min_per_s=100),
            ) as bench:  # fmt: skip
                for _ in range(3):
                    await bench.serve(traced(SAMPLED))
                records = bench.records()
    spans = collector.spans()
    servers = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert len(servers) == 3
    kinds = set()
    for server, record in zip(servers, records, strict=True):
        attempts = [span for span in spans if span.parent_span_id == server.span_id]
        assert plain(server.attributes)["burstgate.attempts"] == record.attempts == len(attempts)
        assert [plain(each.attributes)["burstgate.upstream"] for each in attempts][-1] == record.upstream == well.url
        for failed in attempts[:-1]:
            said = plain(failed.attributes)
            kinds.add((said["burstgate.upstream"], said["error.type"]))
            assert failed.status.code == Status.STATUS_CODE_ERROR
            assert failed.end_time_unix_nano <= attempts[-1].start_time_unix_nano
        assert "error.type" not in plain(attempts[-1].attributes)
    assert kinds == {(nobody, "upstream_connect_error"), (busy.url, "503")}
    sent = [request.values(b"traceparent")[0].split(b"-")[2].decode() for request in (*busy.requests, *well.requests)]
    assert set(sent) <= {span.span_id.hex() for span in spans if span.kind == Span.SPAN_KIND_CLIENT}
    assert len(set(sent)) == len(sent)


REFUSED = b'{"error": {"message": "secret of the prompt", "type": "BadRequestError", "code": 400}}'
CHATTY = b'{"error": {"message": "x", "type": "you asked: secret of the prompt"}}'


@pytest.mark.parametrize(
    ("script", "outcome", "error_type"),
    [
        (answering(REFUSED, 400, JSON), Outcome.INVALID_REQUEST, "BadRequestError"),
        (answering(CHATTY, 500, JSON), Outcome.UPSTREAM_ERROR, "upstream_error"),  # a sentence is no type
        (None, Outcome.CONNECT_ERROR, "upstream_connect_error"),
    ],
)
@in_loop
async def test_a_failure_is_an_error_without_its_text(
    tmp_path: Path, script: Script | None, outcome: Outcome, error_type: str
) -> None:
    with Collector() as collector:
        async with Upstream(script or answering()) as upstream:
            url = upstream.url if script is not None else f"http://127.0.0.1:{closed_port()}"
            async with running(tmp_path, url, telemetry=telemetry(collector.url)) as bench:
                key = (b"authorization", b"Bearer secret of the key")
                await bench.serve(Client(chat_body("secret of the prompt"), headers=(JSON, key)))
                assert bench.record().outcome is outcome
    server, client = collector.spans()
    for span in (server, client):
        assert plain(span.attributes)["error.type"] == error_type
        assert span.status.code == Status.STATUS_CODE_ERROR
    assert plain(server.attributes)["burstgate.outcome"] == outcome.value
    assert all(b"secret" not in body for _, body in collector.bodies)


@pytest.mark.parametrize("collector_is", ["nobody", "failing", "slow"])
@in_loop
async def test_a_collector_in_trouble_holds_up_nobody(tmp_path: Path, collector_is: str) -> None:
    with Collector(400 if collector_is == "failing" else 200, 3.0 if collector_is == "slow" else 0.0) as collector:
        url = f"http://127.0.0.1:{closed_port()}" if collector_is == "nobody" else collector.url
        async with (
            Upstream(answering(chat_answer())) as upstream,
            running(tmp_path, upstream.url, telemetry=telemetry(url)) as bench,
        ):
            start_s = time.monotonic()
            for _ in range(20):
                assert (await bench.serve(Client(chat_body("hi")))).status == 200
            assert time.monotonic() - start_s < 1.5
            bench.records()
            start_s = time.monotonic()
            await asyncio.to_thread(bench.gateway.end_telemetry)
            assert time.monotonic() - start_s < 3.0
            counted = {name: bench.counter(name) for name in (
                "spans_exported", "spans_dropped_queue", "spans_dropped_export")}  # fmt: skip
    assert counted["spans_exported"] == 0
    assert counted["spans_dropped_export"] + counted["spans_dropped_queue"] == 40


@in_loop
async def test_telemetry_begins_and_ends_while_running(tmp_path: Path) -> None:
    with Collector() as first, Collector() as second:
        async with Upstream(answering(chat_answer())) as upstream, running(tmp_path, upstream.url) as bench:
            for url in (None, first.url, second.url, None):
                await asyncio.to_thread(bench.gateway.end_telemetry)
                settings = bench.gateway.settings
                bench.gateway.apply(settings.model_copy(update={"telemetry": TelemetrySettings(
                    otlp_endpoint=url, traces_sample=1.0)}))  # fmt: skip
                await bench.serve(Client(chat_body("hi")))
            assert bench.gateway.tracer is None
    assert [len(each.spans()) for each in (first, second)] == [2, 2]


def test_a_missing_exporter_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_exporter()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)  # as if it were not there
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint: needs the package opentelemetry-exporter-otlp"):
        check_exporter()


# Metrics --------------------------------------------------------------------------------------------------------------


@in_loop
async def test_metrics_are_the_records_sums(tmp_path: Path) -> None:
    async with Upstream(streaming(), answering(chat_answer())) as upstream, running(tmp_path, upstream.url) as bench:
        await bench.serve(Client(chat_body("hi", stream=True)))
        await bench.serve(Client(chat_body("hi")))
        await bench.serve(Client(chat_body("hi", model=None), path="/v1/embeddings"))
        records = bench.records()
        chats = [record for record in records if record.endpoint == CHAT]
        reader = CountersReader(bench.gateway.settings.journal_dir)

        def gather() -> Any:
            totals = reader.read()
            since_ns = counting_since_ns(bench.gateway.settings.journal_dir)
            return totals, list(all_worker_metrics(totals)), since_ns

        with Collector() as collector:
            settings = Settings(upstreams=(upstream.url,), telemetry=telemetry(collector.url, metrics_interval_s=60))
            exporting = MetricExporting(settings, gather)
            exporting.start()
            exporting.stop()
            await asyncio.to_thread(exporting.join)
            found = collector.metrics()
            assert exporting.failures == 0

    def points(name: str, **labels: str) -> list[Any]:
        return [
            point
            for point in found[name].histogram.data_points
            if labels.items()
            <= {key.replace(".", "_"): value for key, value in plain(point.attributes).items()}.items()
        ]

    def check(name: str, unit: str, values: list[float | None], **labels: str) -> None:
        known = [value for value in values if value is not None]
        (point,) = points(name, **labels)
        assert found[name].unit == unit
        assert found[name].histogram.aggregation_temporality == 2  # cumulative
        assert point.count == sum(point.bucket_counts) == len(known)
        assert point.sum == pytest.approx(sum(known), abs=1e-5)
        for bound, count in zip(point.explicit_bounds, point.bucket_counts, strict=False):
            assert sum(value <= bound for value in known) >= count
        assert not point.HasField("min")
        assert point.start_time_unix_nano <= int(records[0].received_at * 1e9) < point.time_unix_nano
        assert plain(point.attributes)["gen_ai.provider.name"] == "vllm"

    asked = {"gen_ai_operation_name": "chat", "gen_ai_request_model": "m"}
    check("gen_ai.server.request.duration", "s", [each.elapsed_s for each in chats], **asked)
    check("gen_ai.server.time_to_first_token", "s", [each.ttft_s for each in chats], **asked)
    check("gen_ai.server.time_per_output_token", "s", [each.tpot_s for each in chats], **asked)
    inputs: list[float | None] = [each.request_tokens for each in chats]
    outputs: list[float | None] = [each.response_tokens for each in chats]
    check("gen_ai.client.token.usage", "{token}", inputs, gen_ai_token_type="input", **asked)
    check("gen_ai.client.token.usage", "{token}", outputs, gen_ai_token_type="output", **asked)
    (client,) = points("gen_ai.client.operation.duration", **asked)
    said = plain(client.attributes)
    assert (said["server.address"], said["server.port"]) == ("127.0.0.1", int(upstream.url.rpartition(":")[2]))
    assert client.count == 2
    assert 0 < client.sum < sum(each.elapsed_s or 0 for each in chats)
    assert len(points("gen_ai.server.request.duration", gen_ai_operation_name="embeddings")) == 1
    requests = found["burstgate_requests"].sum
    assert requests.is_monotonic
    assert {plain(each.attributes)["outcome"]: each.as_double for each in requests.data_points}["ok"] == 3
    assert found["burstgate_requests_in_flight"].gauge.data_points[0].as_double == 0
