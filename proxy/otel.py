"""OpenTelemetry over OTLP/HTTP: spans of sampled requests, and the counters as metrics, under GenAI names.

The only file that knows OpenTelemetry, and of it the names: `Name` is the GenAI semantic conventions as of
`SCHEMA_VERSION` (in development: a later version may rename them, and then this file alone changes).

A worker exports its spans: a thread takes what is finished from the tracer's queue. The control plane exports the
metrics of all workers: a thread reads their counters files and sends them as cumulative points. Neither waits for the
other or holds up a request; what the collector does not take is counted. OpenTelemetry is imported in these threads,
when they start. The exporter's own environment variables (`OTEL_EXPORTER_OTLP_CERTIFICATE` for instance,
`OTEL_RESOURCE_ATTRIBUTES`) hold too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client.core import Metric as PrometheusMetric

from proxy.config_error import ConfigError
from proxy.logs import error_type_of
from proxy.series import E2E_BUCKETS_S, TOKEN_BUCKETS, TPOT_BUCKETS_S, TTFT_BUCKETS_S, Rows, column, fold
from proxy.settings import Settings, TelemetrySettings
from proxy.telemetry import Totals
from proxy.tracing import Finished, Trace, Tracer
from traces.record import Outcome
from wire.http import BaseUrl, parse_base_url

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, MetricsData
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger("burstgate.telemetry")

SCHEMA_VERSION = "1.37.0"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{SCHEMA_VERSION}"
PROVIDER = "vllm"
EXPORT_TIMEOUT_S = 5.0
"""For one batch, with all its retries."""
SPAN_INTERVAL_S = 1.0
MAX_BATCH = 512
"""Requests whose spans are sent at a time."""
STOP_S = 2.0
"""What a process that ends waits for the collector."""


class Name:
    """Attributes."""

    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    REQUEST_MODEL = "gen_ai.request.model"
    RESPONSE_MODEL = "gen_ai.response.model"
    MAX_TOKENS = "gen_ai.request.max_tokens"
    CONVERSATION = "gen_ai.conversation.id"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    TOKEN_TYPE = "gen_ai.token.type"
    ERROR_TYPE = "error.type"
    SERVER_ADDRESS = "server.address"
    SERVER_PORT = "server.port"
    METHOD = "http.request.method"
    STATUS = "http.response.status_code"
    REQUEST_ID = "burstgate.request_id"
    OUTCOME = "burstgate.outcome"
    UPSTREAM = "burstgate.upstream"
    ATTEMPTS = "burstgate.attempts"
    TTFT = "burstgate.time_to_first_token_s"
    QUEUE = "burstgate.queue_s"
    TENANT = "burstgate.tenant"
    FIRST_TOKEN = "gen_ai.first_token"
    """An event."""


SERVER_HISTOGRAMS = (
    ("gen_ai.server.request.duration", "Submission to last byte.", "e2e", E2E_BUCKETS_S),
    ("gen_ai.server.time_to_first_token", "First content chunk minus request sent, of streams.", "ttft",
     TTFT_BUCKETS_S),
    ("gen_ai.server.time_per_output_token", "Last chunk minus first chunk, over output tokens but one.", "tpot",
     TPOT_BUCKETS_S),
)  # fmt: skip
"""By operation and model, in seconds: name, description, which of a row's histograms, its bounds."""
CLIENT_DURATION = ("gen_ai.client.operation.duration", "Sent to the upstream until its last byte.")
"""By operation, model and upstream."""
CLIENT_TOKENS = ("gen_ai.client.token.usage", "Tokens of a request, by type: input, output.")


def check_exporter() -> None:
    """Raises ConfigError where the exporter is not installed."""
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            "telemetry.otlp_endpoint: needs the package opentelemetry-exporter-otlp-proto-http, "
            "which is not installed (pip install 'burstgate[otlp]')"
        )


class _Exporting:
    """A thread that exports every so often, until it is told to stop; then once more."""

    def __init__(self, settings: Settings, interval_s: float) -> None:
        """Raises ConfigError where the exporter is not installed."""
        check_exporter()
        self.settings = settings
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._is_failing = False
        self._exporter: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="otlp")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Have it end by itself, once it has sent what there is."""
        self._stopping.set()

    def join(self) -> None:
        """Wait for its end; a collector that does not answer in `STOP_S` is left."""
        self._thread.join(STOP_S)
        if self._thread.is_alive() and self._exporter is not None:
            self._exporter.shutdown()  # ends its pauses between retries
            self._thread.join(0.1)

    def _run(self) -> None:
        # It writes a line for each retry; here, one tells of all until the collector answers again.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        try:
            self._open()
        except Exception:  # never in the way
            log.exception("telemetry is off: the exporter could not be made")
            return
        while not self._stopping.wait(self._interval_s):
            self._export_safely()
        self._export_safely()
        with contextlib.suppress(Exception):
            self._exporter.shutdown()

    def _export_safely(self) -> None:
        try:
            self._export()
        except Exception:  # never in the way: a defect here must not end the thread
            log.exception("telemetry could not be exported")

    def _open(self) -> None:
        raise NotImplementedError

    def _export(self) -> None:
        raise NotImplementedError

    def _told(self, is_taken: bool) -> None:
        """Write a line when the collector stops or begins again to take what it is sent."""
        if is_taken == self._is_failing:
            self._is_failing = not is_taken
            endpoint = self.settings.telemetry.otlp_endpoint
            if is_taken:
                log.warning("the collector %s takes telemetry again", endpoint)
            else:
                log.error("the collector %s does not take telemetry; what is lost is counted", endpoint)

    def _resource(self) -> Resource:
        from opentelemetry.sdk.resources import Resource

        return Resource.create(
            {
                "service.name": self.settings.telemetry.service_name,
                "service.version": importlib.metadata.version("burstgate"),
                "service.instance.id": self.settings.gateway,
            },
            SCHEMA_URL,
        )


def _endpoint(telemetry: TelemetrySettings, signal: str) -> str:
    return f"{(telemetry.otlp_endpoint or '').rstrip('/')}/v1/{signal}"


# Spans ----------------------------------------------------------------------------------------------------------------


class SpanExporting(_Exporting):
    """Exports what a worker's tracer has finished."""

    def __init__(self, settings: Settings, tracer: Tracer) -> None:
        super().__init__(settings, SPAN_INTERVAL_S)
        self._tracer = tracer
        self._sending = 0
        """Spans that are on their way."""

    def join(self) -> None:
        """As its base; what is left then counts as lost."""
        super().join()
        self._tracer.close(self._sending)

    def _open(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        telemetry = self.settings.telemetry
        self._made_of = SpanMaker(self._resource(), self.settings)
        self._exporter = OTLPSpanExporter(
            _endpoint(telemetry, "traces"), headers=dict(telemetry.otlp_headers), timeout=EXPORT_TIMEOUT_S
        )

    def _export(self) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        queue = self._tracer.queue
        while queue:
            spans: list[ReadableSpan] = []
            for _ in range(min(len(queue), MAX_BATCH)):
                spans += self._made_of.spans(queue.popleft())
            self._sending = len(spans)
            is_taken = self._exporter.export(spans) is SpanExportResult.SUCCESS
            self._sending = 0
            self._tracer.sent(len(spans), is_taken=is_taken)
            self._told(is_taken)
            if self._stopping.is_set() and not is_taken:
                break


class SpanMaker:
    """Makes a request's spans of its record: one SERVER span, and a CLIENT span below it for each attempt."""

    def __init__(self, resource: Resource, settings: Settings) -> None:
        self._resource = resource
        self._address = settings.host
        self._port = settings.port

    def spans(self, finished: Finished) -> Iterator[ReadableSpan]:
        """The spans of one request."""
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import SpanKind

        record, trace = finished.record, finished.trace
        base_ns = int(record.received_at * 1e9) - finished.start_ns
        end_ns = finished.start_ns + int((record.elapsed_s or 0.0) * 1e9)
        shared: dict[str, Any] = {Name.OPERATION: finished.operation, Name.PROVIDER: PROVIDER}
        _put(shared, Name.REQUEST_MODEL, record.model)
        answered: dict[str, Any] = {}
        _put(answered, Name.RESPONSE_MODEL, record.served_model)
        _put(answered, Name.INPUT_TOKENS, record.request_tokens)
        _put(answered, Name.OUTPUT_TOKENS, record.response_tokens)
        _put(answered, Name.FINISH_REASONS, None if record.finish_reason is None else [record.finish_reason])
        _put(answered, Name.STATUS, record.status)
        error_type = None if record.outcome is Outcome.OK else error_type_of(record)
        attributes = {
            **shared,
            **answered,
            Name.METHOD: finished.method,
            Name.SERVER_ADDRESS: self._address,
            Name.SERVER_PORT: self._port,
            Name.REQUEST_ID: record.request_id,
            Name.OUTCOME: record.outcome.value,
            Name.ATTEMPTS: record.attempts,
        }
        _put(attributes, Name.CONVERSATION, record.session_id)
        _put(attributes, Name.MAX_TOKENS, record.max_tokens)
        _put(attributes, Name.UPSTREAM, record.upstream)
        _put(attributes, Name.TTFT, record.ttft_s)
        _put(attributes, Name.QUEUE, record.queue_s)
        _put(attributes, Name.TENANT, record.tenant)
        name = f"{finished.operation} {record.model}" if record.model is not None else finished.operation
        yield self._span(
            name, trace, trace.span_id, trace.parent_id, SpanKind.SERVER, attributes, error_type,
            base_ns + finished.start_ns, base_ns + end_ns,
        )  # fmt: skip
        for attempt in trace.attempts:
            is_last = attempt is trace.attempts[-1] and attempt.error_type is None
            more = {**shared, Name.UPSTREAM: attempt.name, **_address(attempt.url)}
            events = []
            if is_last:
                more |= answered
                if record.ttft_s is not None:
                    at_ns = base_ns + attempt.start_ns + int(record.ttft_s * 1e9)
                    events.append(Event(Name.FIRST_TOKEN, timestamp=at_ns))
            yield self._span(
                name, trace, attempt.span_id, trace.span_id, SpanKind.CLIENT, more,
                error_type if is_last else attempt.error_type,
                base_ns + attempt.start_ns, base_ns + (attempt.end_ns or end_ns), events,
            )  # fmt: skip

    def _span(
        self,
        name: str,
        trace: Trace,
        span_id: int,
        parent_id: int,
        kind: Any,
        attributes: dict[str, Any],
        error_type: str | None,
        start_ns: int,
        end_ns: int,
        events: Iterable[Any] = (),
    ) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        def context(id_: int, *, is_remote: bool) -> SpanContext:
            return SpanContext(trace.trace_id, id_, is_remote, TraceFlags(trace.flags))

        is_server = span_id == trace.span_id
        if error_type is not None:
            attributes[Name.ERROR_TYPE] = error_type
        return ReadableSpan(
            name,
            context(span_id, is_remote=False),
            context(parent_id, is_remote=is_server) if parent_id else None,
            self._resource,
            attributes,
            tuple(events),
            kind=kind,
            status=Status(StatusCode.ERROR if error_type is not None else StatusCode.UNSET),
            start_time=start_ns,
            end_time=max(start_ns, end_ns),
            instrumentation_scope=InstrumentationScope("burstgate", schema_url=SCHEMA_URL),
        )


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is not None:
        attributes[name] = value


def _address(url: BaseUrl) -> dict[str, Any]:
    if url.socket_path is not None:
        return {Name.SERVER_ADDRESS: url.socket_path.decode("utf-8", "replace")}
    return {Name.SERVER_ADDRESS: url.host, Name.SERVER_PORT: url.port}


# Metrics --------------------------------------------------------------------------------------------------------------


class MetricExporting(_Exporting):
    """Exports what a collector of Prometheus metrics gathers, and the rows under GenAI names."""

    def __init__(
        self, settings: Settings, gather: Callable[[], tuple[Totals, Iterable[PrometheusMetric], int]]
    ) -> None:
        """gather: what there is now, and since when it counts (epoch ns). Raises ConfigError."""
        super().__init__(settings, settings.telemetry.metrics_interval_s)
        self._gather = gather
        self._since_ns = 0
        self.failures = 0
        """Exports that the collector did not take."""

    def _open(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        telemetry = self.settings.telemetry
        self._resource_made = self._resource()
        self._servers = {
            upstream.name or url.text: _address(url)
            for upstream in self.settings.upstreams
            for url in [parse_base_url(upstream.url)]
        }
        self._exporter = OTLPMetricExporter(
            _endpoint(telemetry, "metrics"), headers=dict(telemetry.otlp_headers), timeout=EXPORT_TIMEOUT_S
        )

    def _export(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricExportResult

        is_taken = self._exporter.export(self._data()) is MetricExportResult.SUCCESS
        if not is_taken:
            self.failures += 1
        self._told(is_taken)

    def _data(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import Metric, MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        totals, families, self._since_ns = self._gather()
        now_ns = time.time_ns()
        metrics: list[Metric] = [*self._gen_ai(totals.rows, now_ns), *self._own(families, now_ns)]
        scope = ScopeMetrics(InstrumentationScope("burstgate", schema_url=SCHEMA_URL), metrics, SCHEMA_URL)
        return MetricsData([ResourceMetrics(self._resource_made, [scope], SCHEMA_URL)])

    def _gen_ai(self, rows: Rows, now_ns: int) -> Iterator[Any]:
        by_model = fold(rows, keep=(0, 1))
        for name, text, histogram, bounds in SERVER_HISTOGRAMS:
            points = [
                self._point(_attributes(*key), counts, histogram, bounds, 1e6, now_ns)
                for key, counts in by_model.items()
            ]
            yield self._histogram(name, text, "s", points)
        points = []
        for (operation, model, upstream), counts in rows.items():
            attributes = _attributes(operation, model) | self._servers.get(upstream, {Name.SERVER_ADDRESS: upstream})
            if upstream:
                points.append(self._point(attributes, counts, "upstream", E2E_BUCKETS_S, 1e6, now_ns))
        yield self._histogram(*CLIENT_DURATION, "s", points)
        points = [
            self._point(_attributes(*key) | {Name.TOKEN_TYPE: kind}, counts, histogram, TOKEN_BUCKETS, 1, now_ns)
            for kind, histogram in (("input", "request_tokens"), ("output", "response_tokens"))
            for key, counts in by_model.items()
        ]
        yield self._histogram(*CLIENT_TOKENS, "{token}", points)

    def _point(
        self, attributes: dict[str, Any], counts: list[int], histogram: str, bounds: tuple[float, ...], unit: float,
        now_ns: int,
    ) -> HistogramDataPoint:  # fmt: skip
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        buckets, total = column(counts, histogram, bounds)
        unknown: Any = None  # extremes are not kept; OTLP has both optional
        return HistogramDataPoint(
            attributes, self._since_ns, now_ns, sum(buckets), total / unit, buckets, bounds, unknown, unknown
        )

    @staticmethod
    def _histogram(name: str, text: str, unit: str, points: list[HistogramDataPoint]) -> Any:
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Histogram, Metric

        return Metric(
            name, text, unit, Histogram([each for each in points if each.count], AggregationTemporality.CUMULATIVE)
        )

    def _own(self, families: Iterable[PrometheusMetric], now_ns: int) -> Iterator[Any]:
        """Our own counters and gauges, as they are; the histograms have gone under their GenAI names."""
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Metric, NumberDataPoint, Sum

        for family in families:
            if family.type not in ("counter", "gauge"):
                continue
            points = [
                NumberDataPoint(dict(sample.labels), self._since_ns, now_ns, float(sample.value))
                for sample in family.samples
            ]
            data: Any = Gauge(points)
            if family.type == "counter":
                data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
            yield Metric(family.name, family.documentation, "", data)


def _attributes(operation: str, model: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {Name.OPERATION: operation, Name.PROVIDER: PROVIDER}
    if model:
        attributes[Name.REQUEST_MODEL] = model
    return attributes
