"""An OTLP/HTTP collector: what it is sent, decoded by the protocol's own messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


def plain(attributes: Any) -> dict[str, Any]:
    """OTLP's attributes as a dict."""

    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        if kind == "array_value":
            return [value(each) for each in any_value.array_value.values]
        return getattr(any_value, kind)

    return {each.key: value(each.value) for each in attributes}


class Collector:
    """Takes what comes on a free port of 127.0.0.1, and answers `status`."""

    def __init__(self, status: int = 200, delay_s: float = 0.0) -> None:
        self.status = status
        self.headers: list[dict[str, str]] = []
        self.bodies: list[tuple[str, bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                outer.bodies.append((self.path, body))
                time.sleep(delay_s)
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Not a word."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self) -> list[Any]:
        """All spans, with their resource's attributes as `resource`, in the order they came."""
        return [span for _, span in self.spans_by_resource()]

    def spans_by_resource(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for path, body in list(self.bodies):
            if path == "/v1/traces":
                for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in each.scope_spans:
                        for span in scope.spans:
                            yield plain(each.resource.attributes), span

    def metrics(self) -> dict[str, Any]:
        """The metrics of the latest export, by name."""
        bodies = [body for path, body in list(self.bodies) if path == "/v1/metrics"]
        request = ExportMetricsServiceRequest.FromString(bodies[-1]) if bodies else ExportMetricsServiceRequest()
        return {
            metric.name: metric
            for each in request.resource_metrics
            for scope in each.scope_metrics
            for metric in scope.metrics
        }

    def wait(self, is_there: Callable[[], object], what: str, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_there():
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
            time.sleep(0.02)
