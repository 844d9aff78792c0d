"""The gateway's settings: one frozen object, every key with its default and unit.

Sources, later ones win: defaults, `--config FILE` (YAML), environment (`BURSTGATE_PORT`, nested keys with two
underscores: `BURSTGATE_JOURNAL__BUDGET`), flags, what was changed through the control plane. An unknown key in any of
them is an error that names the nearest known one. Where each value came from is kept for `burstgate config show`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from proxy.config_error import ConfigError
from wire.http import parse_base_url

ENV_PREFIX = "BURSTGATE_"
_NOT_SETTINGS = ("BURSTGATE_TRACES", "BURSTGATE_VLLM")
"""Environment names that start like settings and belong to the tests."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _with_known_names(model: type[BaseModel], value: Any) -> Any:
    """What is to be validated. Raises ValueError where it is a mapping with a name that is no setting."""
    for name in value if isinstance(value, dict) else ():
        if name not in model.model_fields:
            near = difflib.get_close_matches(str(name), list(model.model_fields), n=1, cutoff=0.0)
            raise ValueError(f"unknown setting '{name}'; the nearest known one is '{near[0]}'")
    return value


def _server(model: type[BaseModel], value: Any) -> Any:
    """An entry of a list of servers: as text its URL. Raises ValueError for a name that is no setting."""
    return {"url": value} if isinstance(value, str) else _with_known_names(model, value)


class UpstreamSettings(_Frozen):
    """One vLLM server; as text, its URL."""

    url: str = Field(description="base URL")
    name: str | None = Field(None, pattern=r"^[!-~]{1,128}$", description="in records and answers; default: the URL")
    weight: float = Field(1.0, gt=0, le=100, description="share of the load, compared with the others'")
    models: tuple[str, ...] | None = Field(None, description="what it serves; default: what its /v1/models says")
    drain: bool = Field(False, description="no new requests; those in flight go on")
    ca_file: Path | None = Field(None, description="certificates to trust, PEM; default: the system's")
    cert_file: Path | None = Field(None, description="the gateway's own certificate, PEM")
    key_file: Path | None = Field(None, description="its key, PEM; default: in cert_file")
    api_key: str | None = Field(None, repr=False, min_length=1, description="sent in place of the client's key")
    api_key_env: str | None = Field(None, min_length=1, description="environment variable that holds it")
    api_key_file: Path | None = Field(None, description="file that holds it; read again when it changes")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _server(cls, value)

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        parse_base_url(value)
        return value

    @model_validator(mode="after")
    def _tls(self) -> UpstreamSettings:
        files = (self.ca_file, self.cert_file, self.key_file)
        if any(files) and not parse_base_url(self.url).is_tls:
            raise ValueError("ca_file, cert_file and key_file are for https:// upstreams")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs a cert_file")
        if sum(each is not None for each in (self.api_key, self.api_key_env, self.api_key_file)) > 1:
            raise ValueError("one of api_key, api_key_env and api_key_file is enough")
        return self

    def __str__(self) -> str:
        return self.url


class BalanceSettings(_Frozen):
    """Which upstream takes a request."""

    policy: Literal["least_in_flight", "round_robin", "session", "prefix"] = Field(
        "least_in_flight",
        description="least_in_flight, round_robin, session (the same one for a session) or prefix (one that has seen "
        "the prompt's beginning)",
    )
    max_load: float = Field(
        1.5, gt=1, le=100, description="session and prefix: in flight at one upstream, as a multiple of its fair share"
    )
    prefix_entries: int = Field(
        262_144, ge=1024, le=2**26, description="prefix: prompt blocks that a worker remembers (about 100 bytes each)"
    )
    slow_start_s: float = Field(
        10.0, ge=0, description="seconds in which the weight of an upstream that is well again grows; 0 is at once"
    )


class HealthSettings(_Frozen):
    """Which upstreams are passed over. Each worker judges for itself."""

    path: str = Field("/health", pattern=r"^/[!-~]*$", description="probed by GET; a status below 500 is well")
    interval_s: float = Field(5.0, ge=0, description="seconds between probes of an upstream; 0 switches them off")
    timeout_s: float = Field(2.0, gt=0, description="for a probe or a question for models")
    unhealthy_after: int = Field(2, ge=1, description="failed probes in a row until an upstream is down")
    healthy_after: int = Field(1, ge=1, description="good probes in a row until it is up again")
    models_interval_s: float = Field(
        30.0, ge=0, description="seconds between questions for an upstream's models, with more than one; 0: never asked"
    )
    max_connect_failures: int = Field(1, ge=1, description="failed connections in a row until an upstream is down")
    max_failures: int = Field(5, ge=1, description="failed requests in a row (no answer, cut off, 5xx) until ejected")
    pause_s: float = Field(1.0, gt=0, description="first pause without requests; doubles with each that did not help")
    max_pause_s: float = Field(60.0, gt=0, description="longest pause")
    trials: int = Field(2, ge=1, description="requests let through after a pause; all well, it is over")
    window_s: float = Field(30.0, gt=0, description="over which an upstream's error rate is compared with the rest's")
    min_requests: int = Field(
        20, ge=1, description="in that window, at the upstream and at the rest, to compare at all"
    )
    outlier_margin: float = Field(
        0.3, ge=0, le=1, description="ejected when its error rate exceeds the rest's by this; 0 switches it off"
    )
    max_ejected_share: float = Field(
        0.5, ge=0, le=1, description="of the fleet, ejected for failed requests at a time (at least one of several)"
    )


class RetrySettings(_Frozen):
    """When a request goes to another upstream before anything was answered."""

    max_attempts: int = Field(3, ge=1, le=100, description="times that a request is sent; 1: never again")
    budget: float = Field(0.2, ge=0, le=1, description="retries of the last 10 s, as a share of the requests")
    min_per_s: float = Field(1.0, ge=0, description="retries a second that are allowed in any case")
    statuses: tuple[Annotated[int, Field(ge=400, le=599)], ...] = Field(
        (502, 503, 504), description="answers for which another upstream is tried"
    )

    @field_validator("statuses", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)


class InjectionSettings(_Frozen):
    """Bursts and faults that the gateway injects, and their guard rails."""

    allowed: bool = Field(False, description="false: every injection is refused")
    max_rate_rps: float = Field(
        100.0, gt=0, le=1e6, description="injected requests in any second; a plan that would pass it ends before"
    )
    max_share: float = Field(
        1.0, gt=0, le=1, description="injected requests of all those of the last 10 s, or faults of all; 1: any share"
    )
    max_tokens: int = Field(10_000_000, ge=1, description="prompt and answer tokens that one injection may ask for")
    max_duration_s: float = Field(600.0, gt=0, le=86_400, description="seconds that one injection may take")
    stop_failure_rate: float = Field(
        0.05,
        ge=0,
        le=1,
        description="clients' failures of the last 10 s, as a share, beyond which it is stopped; 1: never",
    )
    stop_ttft_p95_s: float = Field(
        5.0,
        ge=0,
        description="clients' time to first token (p95 of the last 10 s) beyond which it is stopped; 0: never",
    )
    target: str | None = Field(None, description="where the injector reaches the gateway; default: its own address")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable with the API key that it sends"
    )
    trace_dir: Path | None = Field(
        None, description="folder in which the files lie that plans may name; default: any that burstgate can read"
    )


class ResponseHeaderSettings(_Frozen):
    """What the gateway adds to its answers."""

    overhead: bool = Field(True, description="x-burstgate-overhead-ms: the gateway's own time until the answer began")
    upstream: bool = Field(True, description="x-burstgate-upstream: who answered")


class RecordSettings(_Frozen):
    """What is recorded."""

    enabled: bool = Field(True, description="false: requests are counted, and nothing is kept of them")
    prefix_blocks: bool = Field(False, description="keyed hashes of the prompt's leading blocks, never a text")


class RetentionSettings(_Frozen):
    """What leaves the database, whole UTC days at a time. Without an age and a size, nothing does."""

    max_age_days: float | None = Field(
        None, ge=0, description="days after its end that a day is kept; default: for ever"
    )
    max_size: ByteSize | None = Field(
        None, ge=0, description="of the requests in the database; beyond it the oldest days go"
    )
    archive: str | None = Field(
        None, description="folder or URL (s3://..., with s3fs) where days go as Parquet before; default: nowhere"
    )
    check_interval_s: float = Field(3600.0, ge=1, description="seconds between looks at what is due")

    @property
    def is_on(self) -> bool:
        """There is something to do."""
        return self.max_age_days is not None or self.max_size is not None


class JournalSettings(_Frozen):
    """The journal in `data_dir/journal`."""

    segment: ByteSize = Field(ByteSize(16 * 1024**2), ge=64 * 1024, description="size at which a new segment starts")
    budget: ByteSize = Field(
        ByteSize(10 * 1024**3), ge=0, description="disk for the whole journal; beyond it, records are dropped, counted"
    )
    fsync_interval_s: float = Field(1.0, ge=0.01, description="seconds between fdatasync calls: what a power cut takes")


class TimeoutSettings(_Frozen):
    """Seconds; 0 switches a timer off."""

    connect_s: float = Field(5.0, gt=0, description="to make a connection to an upstream")
    first_byte_s: float = Field(
        600.0, ge=0, description="from the request sent to the answer's head; of a stream, to its first event"
    )
    chunk_s: float = Field(300.0, ge=0, description="between two pieces of a response")
    total_s: float = Field(3600.0, ge=0, description="for the whole exchange")
    drain_s: float = Field(30.0, ge=0, description="for requests in flight when the gateway is asked to stop")
    sse_comment_s: float = Field(
        0.0, ge=0, description="while a stream's first event is awaited, a comment to the client every so often"
    )
    upstream_idle_s: float = Field(4.0, ge=0, description="how long an idle upstream connection is reused (vLLM: 5 s)")


class LimitSettings(_Frozen):
    """What a client may send."""

    body: ByteSize = Field(ByteSize(64 * 1024**2), ge=1024, description="request body; beyond it 413")
    headers: ByteSize = Field(ByteSize(64 * 1024), ge=1024, description="request line and headers; beyond it 431")


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):
        raise ValueError("expected a header name")
    return value.lower()


class SessionSettings(_Frozen):
    """How a request's session and log type are found."""

    header: str = Field("x-session-id", description="request header that names the session")
    infer: bool = Field(True, description="recognise a chat that continues an earlier one by its messages")
    log_type_header: str = Field("x-burstgate-log-type", description="request header: conversation or api")
    log_type: Literal["auto", "conversation", "api"] = Field(
        "auto", description="log type without that header; auto: conversation where a session is known"
    )

    @field_validator("header", "log_type_header")
    @classmethod
    def _token(cls, value: str) -> str:
        return _header_name(value)


class MatchSettings(_Frozen):
    """Which requests a shaping rule is for: every pattern must match. `*` and `?` as in file names."""

    model: str | None = Field(None, description="as the client asked for it")
    tenant: str | None = Field(
        None, description="of the API key or of `shaping.tenant_header`; unknown matches `*` only"
    )
    log_type: Literal["conversation", "api"] | None = Field(None, description="conversation or api")
    origin: str | None = Field(None, description="client, replay or injected")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _with_known_names(cls, value)


class RuleSettings(_Frozen):
    """One shaping rule: limits, by class. docs/shaping.md has examples."""

    name: str = Field(pattern=r"^[!-~]{1,64}$", description="in records, metrics and refusals")
    match: MatchSettings = Field(MatchSettings(), description="which requests; default: all")
    group: str | None = Field(None, description="of the rules of a group only the first that matches applies")
    per: Literal["none", "model", "tenant", "session", "log_type"] = Field(
        "none", description="each of these is a class with the limits to itself"
    )
    requests_per_s: float | None = Field(None, gt=0, le=1e6, description="requests a second")
    burst: int | None = Field(None, ge=1, le=10**6, description="requests at once; default: those of one second")
    tokens_per_s: float | None = Field(None, gt=0, le=1e9, description="prompt and answer tokens a second")
    burst_tokens: int | None = Field(None, ge=1, le=10**9, description="tokens at once; default: those of one second")
    concurrency: Annotated[int, Field(ge=1, le=10**6)] | Literal["adaptive"] | None = Field(
        None, description="requests in flight; adaptive: found from the time to first token"
    )
    queue: int = Field(1000, ge=0, le=10**6, description="requests that wait, by class; beyond them 429")
    max_wait_s: float = Field(30.0, ge=0, le=3600, description="the longest wait; then 429")
    fair_by: Literal["none", "session", "tenant"] = Field("none", description="whose requests take turns in the queue")
    priority: int | None = Field(
        None, ge=-9, le=9, description="of the requests that match, in every queue; the first rule that has one decides"
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _with_known_names(cls, value)

    @model_validator(mode="after")
    def _limits(self) -> RuleSettings:
        limits = (self.requests_per_s, self.tokens_per_s, self.concurrency, self.priority)
        if all(limit is None for limit in limits):
            raise ValueError(f"rule '{self.name}' needs requests_per_s, tokens_per_s, concurrency or priority")
        if self.burst is not None and self.requests_per_s is None:
            raise ValueError(f"rule '{self.name}': burst is for requests_per_s")
        if self.burst_tokens is not None and self.tokens_per_s is None:
            raise ValueError(f"rule '{self.name}': burst_tokens is for tokens_per_s")
        return self

    def __str__(self) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False)


class PacingSettings(_Frozen):
    """When requests leave, apart from limits. Each worker paces for itself."""

    mode: Literal["off", "smooth", "retime"] = Field(
        "off", description="smooth: to `cv` or `peak_rps`; retime: to the Gamma `shape` or the `pattern`"
    )
    cv: float | None = Field(None, ge=0, le=30, description="smooth: asked CV of the gaps between leavings")
    peak_rps: float | None = Field(None, gt=0, le=1e6, description="smooth: no two leave closer than 1 / this, seconds")
    shape: float | None = Field(
        None, ge=0.001, le=1e6, description="retime: Gamma shape of the gaps (1 is Poisson, below 1 bursty)"
    )
    pattern: Path | None = Field(
        None, description="retime: a trace or workload profile whose gaps are followed, at the live mean rate"
    )
    delay_budget_s: float = Field(1.0, gt=0, le=3600, description="no request is held longer; half of it is the mean")
    seed: int | None = Field(None, description="of the draws; default: another one in every worker")

    @model_validator(mode="after")
    def _one_goal(self) -> PacingSettings:
        goals = {"smooth": (self.cv, self.peak_rps), "retime": (self.shape, self.pattern)}
        names = {"smooth": "cv or peak_rps", "retime": "shape or pattern"}
        for mode, values in goals.items():
            wanted = 1 if mode == self.mode else 0
            if sum(value is not None for value in values) != wanted:
                rule = f"mode {mode} needs {names[mode]}, one of them" if wanted else f"{names[mode]} needs mode {mode}"
                raise ValueError(rule)
        return self


class ShapingSettings(_Frozen):
    """Limits, queues and pacing of requests on their way to an upstream. GET, HEAD and OPTIONS are not shaped."""

    rules: tuple[RuleSettings, ...] = Field(
        (), description="limits; all rules that match a request must admit it (docs/shaping.md)"
    )
    tenant_header: str | None = Field(
        None, description="request header that names the tenant, where no API key does; default: none"
    )
    ageing_s: float = Field(
        10.0, ge=0, description="after each such wait a request counts one priority higher; 0: never"
    )
    hosts: int = Field(1, ge=1, le=10_000, description="gateways that share the limits: each takes its part of them")
    backend: str | None = Field(
        None, description="redis://HOST/DB: limits hold exactly over all workers and gateways; default: a part for each"
    )
    pacing: PacingSettings = PacingSettings()

    @field_validator("rules", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError):
                raise ValueError("expected a list of rules, as in [{name: all, requests_per_s: 10}]") from None
        return () if value is None else value

    @field_validator("rules")
    @classmethod
    def _differ(cls, value: tuple[RuleSettings, ...]) -> tuple[RuleSettings, ...]:
        names = [rule.name for rule in value]
        for name in names:
            if names.count(name) > 1 or name in ("pacing", "key"):
                raise ValueError(f"each rule needs a name of its own, other than 'pacing' and 'key'; '{name}' is not")
        return value

    @field_validator("tenant_header")
    @classmethod
    def _header(cls, value: str | None) -> str | None:
        return None if value is None else _header_name(value)

    @field_validator("backend")
    @classmethod
    def _is_redis(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"(rediss?|unix)://.", value):
            raise ValueError("expected redis://HOST:PORT/DB, rediss:// or unix://PATH")
        return value

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do for a request."""
        return bool(self.rules) or self.pacing.mode != "off"


class TelemetrySettings(_Frozen):
    """OpenTelemetry over OTLP/HTTP; off without an endpoint."""

    otlp_endpoint: str | None = Field(
        None, description="base URL of the collector, as http://collector:4318; default: no OpenTelemetry"
    )
    otlp_headers: dict[str, str] = Field(
        {}, repr=False, description="sent to the collector, secret: {name: value}; as text name=value,name=value"
    )
    traces_sample: float = Field(
        0.01, ge=0, le=1, description="share of the requests with a span, where no traceparent decides"
    )
    metrics_interval_s: float = Field(15.0, ge=1, description="seconds between exports of the metrics")
    service_name: str = Field("burstgate", min_length=1, max_length=128, description="service.name of what is exported")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", value):
            raise ValueError("expected http://HOST[:PORT][/PATH] or https://..., keys in otlp_headers")
        return value

    @field_validator("otlp_headers", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return {} if value is None else value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError("expected name=value,name=value")
        return {name.strip(): text.strip() for name, _, text in pairs}


class LogSettings(_Frozen):
    """What the processes write on standard error."""

    format: Literal["text", "json"] = Field("text", description="text, or json: an object a line")
    failures: bool | None = Field(None, description="a line for each failed request; default: with json only")
    failures_per_s: int = Field(
        10, ge=1, le=10_000, description="of such lines, at most so many a second and worker; the rest is counted"
    )

    @property
    def has_failures(self) -> bool:
        """Whether failed requests have lines."""
        return self.format == "json" if self.failures is None else self.failures


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_TO_SET = frozenset({"host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"})


class BreakerSettings(_Frozen):
    """When a shadow target is left alone."""

    max_connect_failures: int = Field(1, ge=1, description="failed connections in a row until it is left alone")
    max_failures: int = Field(5, ge=1, description="failed requests in a row (no answer, cut off, 5xx) until then")
    pause_s: float = Field(1.0, gt=0, description="first pause; doubles with each that did not help")
    max_pause_s: float = Field(60.0, gt=0, description="longest pause")
    trials: int = Field(2, ge=1, description="requests let through after a pause; all well, it is over")


class CollectSettings(_Frozen):
    """Mirrored later: collected, then sent as the burst that was seen, faster or slower."""

    collect_s: float = Field(gt=0, le=86_400, description="seconds from a window's first request to its release")
    speed: float = Field(1.0, gt=0, le=1000, description="divides the gaps between the requests of a window")


class MirrorTargetSettings(_Frozen):
    """One target of mirrored traffic; as text, its URL."""

    url: str = Field(description="base URL")
    name: str | None = Field(None, pattern=r"^[!-~]{1,128}$", description="in records; default: the URL")
    share: float = Field(1.0, ge=0, le=1, description="of the sessions or requests, that is mirrored")
    by: Literal["session", "request"] = Field("session", description="what is drawn; session keeps them whole")
    models: dict[str, str] = Field({}, description="{asked: sent}; * stands for all others")
    api_key_env: str | None = Field(None, description="environment variable with the target's API key")
    api_key_file: Path | None = Field(None, description="file with it, read at each start and reload")
    headers: dict[str, str] = Field({}, description="headers to set; shown as ***")
    drop_headers: tuple[str, ...] = Field((), description="clients' headers that do not leave, beside credentials")
    tells: bool = Field(False, description="send x-burstgate-shadow-of with the primary's id")
    concurrency: int = Field(64, ge=1, le=100_000, description="requests in flight")
    queue: int = Field(1024, ge=1, le=10_000_000, description="requests that wait; more are dropped, counted")
    queue_bytes: ByteSize = Field(ByteSize(64 * 1024**2), ge=1024, description="bodies held, waiting or in flight")
    max_body: ByteSize = Field(ByteSize(4 * 1024**2), ge=1024, description="larger requests are not mirrored")
    copies: int = Field(1, ge=1, le=1000, description="how often each request is sent")
    jitter_s: float = Field(0.0, ge=0, le=3600, description="copies after the first leave so much later, drawn evenly")
    timeout_s: float = Field(300.0, gt=0, description="for a whole exchange")
    breaker: BreakerSettings = BreakerSettings()
    agreement: Literal["none", "exact", "similarity"] = Field(
        "none", description="how outputs are compared with the primary's; texts are not stored"
    )
    release: Literal["live"] | CollectSettings = Field("live", description="live, or {collect_s, speed}")
    ca_file: Path | None = Field(None, description="certificates to trust, PEM; default: the system's")
    cert_file: Path | None = Field(None, description="the gateway's own certificate, PEM")
    key_file: Path | None = Field(None, description="its key, PEM; default: in cert_file")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return _server(cls, value)

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        parse_base_url(value)
        return value

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _HEADER_NAME.fullmatch(name) or name.lower() in _NOT_TO_SET:
                raise ValueError(f"'{name}' is no header that can be set")
            if not all(" " <= each <= "~" or each == "\t" for each in text):
                raise ValueError(f"the value of '{name}': expected visible ASCII")  # without the value: it may be a key
        return value

    @model_validator(mode="after")
    def _fit(self) -> MirrorTargetSettings:
        files = (self.ca_file, self.cert_file, self.key_file)
        if any(files) and not parse_base_url(self.url).is_tls:
            raise ValueError("ca_file, cert_file and key_file are for https:// targets")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs a cert_file")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env or api_key_file, not both")
        return self

    def __str__(self) -> str:
        return self.url


class MirrorSettings(_Frozen):
    """Shadow traffic: requests sent once more, to targets whose answers nobody waits for."""

    targets: tuple[MirrorTargetSettings, ...] = Field(
        (), description="URLs, or in the file mappings of url, name, share and what docs/shadow.md lists"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            try:
                value = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError):
                raise ValueError("expected a list of URLs or mappings") from None
        return [value] if isinstance(value, dict) else _split_text(value)

    @field_validator("targets")
    @classmethod
    def _differ(cls, value: tuple[MirrorTargetSettings, ...]) -> tuple[MirrorTargetSettings, ...]:
        names = [target.name or parse_base_url(target.url).text for target in value]
        if len(set(names)) != len(value):
            raise ValueError("each target may be named once")
        return value


class KeySettings(_Frozen):
    """Clients' API keys: Authorization: Bearer KEY, or x-api-key."""

    required: bool = Field(False, description="refuse requests without a key of this gateway's (burstgate keys)")
    secret_file: Path | None = Field(
        None, description="what keys are hashed with, the same on all hosts of a database; default: data_dir/secret"
    )


class RouteSettings(_Frozen):
    """What clients may ask upstreams for: paths, or all below one, as /internal/*."""

    deny_management: bool = Field(True, description="refuse vLLM's management: /sleep, LoRA loading and the like")
    allow: tuple[str, ...] = Field((), description="paths to let through, with /* all below one")
    deny: tuple[str, ...] = Field((), description="paths to refuse, with /* all below one")

    @field_validator("allow", "deny", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)

    @field_validator("allow", "deny")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+(/\*)?|/\*?", path):
                raise ValueError(f"expected a path such as /metrics or /internal/*, got {path!r}")
        return value


class TlsSettings(_Frozen):
    """HTTPS for clients and for the control plane. Files that are replaced are read again within a second."""

    cert_file: Path | None = Field(None, description="the gateway's certificate and its chain, PEM; without it HTTP")
    key_file: Path | None = Field(None, description="its key, PEM; default: in cert_file")
    control_cert_file: Path | None = Field(None, description="the control plane's certificate, PEM; without it HTTP")
    control_key_file: Path | None = Field(None, description="its key, PEM; default: in control_cert_file")

    @model_validator(mode="after")
    def _pairs(self) -> TlsSettings:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs a cert_file")
        if self.control_key_file is not None and self.control_cert_file is None:
            raise ValueError("control_key_file needs a control_cert_file")
        return self


class ControlSettings(_Frozen):
    """Who may use the control plane. Beyond loopback always somebody with a token (burstgate keys admin create)."""

    require_token: bool = Field(False, description="ask for a token on loopback too")
    token_env: str | None = Field(None, min_length=1, description="environment variable that holds an admin token")
    tokens_file: Path | None = Field(None, description="file of tokens: viewer, operator or admin, and a token, a line")
    hosts: tuple[str, ...] = Field((), description="names by which it may be asked without a token, beside loopback's")
    read_only: bool = Field(False, description="refuse whatever changes something")
    open_metrics: bool = Field(False, description="/metrics without a token")

    @field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)


class Settings(_Frozen):
    """Everything that `burstgate serve` can be told."""

    upstreams: tuple[UpstreamSettings, ...] = Field(
        (),
        description="base URLs of the vLLM servers; in the file also mappings of url, name, weight, models, drain, "
        "ca_file, cert_file, key_file, api_key, api_key_env, api_key_file",
    )
    aliases: dict[str, str] = Field({}, description="other names for models: {alias: model}")
    fallbacks: dict[str, tuple[str, ...]] = Field(
        {}, description="models to take where nobody who is well serves one: {model: [other, ...]}"
    )
    host: str = Field("127.0.0.1", description="address of the gateway")
    port: int = Field(8080, ge=0, le=65535, description="port of the gateway; 0 takes a free one")
    control_host: str = Field("127.0.0.1", description="address of the control plane")
    control_port: int = Field(8081, ge=0, le=65535, description="port of the control plane; 0 takes a free one")
    data_dir: Path = Field(Path("burstgate-data"), description="journal, SQLite file and secret")
    database_url: str | None = Field(None, description="default: SQLite in data_dir; postgresql://USER@HOST/NAME")
    workers: int = Field(1, ge=1, le=256, description="gateway worker processes")
    recorder: bool = Field(True, description="false: `burstgate record` runs beside it, on the same data_dir")
    gateway: str = Field(default_factory=socket.gethostname, description="this gateway's name in its records")
    journal: JournalSettings = JournalSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    sessions: SessionSettings = SessionSettings()
    balance: BalanceSettings = BalanceSettings()
    health: HealthSettings = HealthSettings()
    retry: RetrySettings = RetrySettings()
    shaping: ShapingSettings = ShapingSettings()
    record: RecordSettings = RecordSettings()
    retention: RetentionSettings = RetentionSettings()
    response_headers: ResponseHeaderSettings = ResponseHeaderSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    log: LogSettings = LogSettings()
    injection: InjectionSettings = InjectionSettings()
    mirror: MirrorSettings = MirrorSettings()
    keys: KeySettings = KeySettings()
    routes: RouteSettings = RouteSettings()
    tls: TlsSettings = TlsSettings()
    control: ControlSettings = ControlSettings()

    @field_validator("upstreams", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)

    @field_validator("upstreams")
    @classmethod
    def _differ(cls, value: tuple[UpstreamSettings, ...]) -> tuple[UpstreamSettings, ...]:
        urls = [parse_base_url(upstream.url).text for upstream in value]
        names = [upstream.name or url for upstream, url in zip(value, urls, strict=True)]
        if len(set(urls)) != len(value) or len(set(names)) != len(value):
            raise ValueError("each upstream may be named once")
        return value

    @field_validator("aliases", "fallbacks", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError):
                raise ValueError("expected a mapping, as in {name: model}") from None
        return {} if value is None else value

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {model: (other,) if isinstance(other, str) else other for model, other in value.items()}
        return value

    @field_validator("aliases")
    @classmethod
    def _one_step(cls, value: dict[str, str]) -> dict[str, str]:
        for alias, model in value.items():
            if model in value:
                raise ValueError(f"'{alias}' stands for '{model}', which is itself an alias; name the model")
        return value

    @property
    def database(self) -> str:
        """The database's URL, the default spelt out."""
        return self.database_url or f"sqlite:///{self.data_dir / 'burstgate.db'}"

    @property
    def journal_dir(self) -> Path:
        """Where the writers' directories lie."""
        return self.data_dir / "journal"


NEED_STOP = ("host", "port", "control_host", "control_port", "data_dir", "database_url", "recorder")
"""Settings, or groups of them, that a running installation keeps until it is stopped and started."""
NEED_RESTART = ("gateway", "journal", "record", "tls")
"""Those that new processes take up: a zero-downtime restart will do. All others change while running."""


SECRET = frozenset({"telemetry.otlp_headers"})
"""Keys whose values are shown as `***`."""


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that differs."""

    key: str
    old: str
    new: str
    """Both as they are shown: without secrets."""

    @property
    def group(self) -> str:
        """The key's first part."""
        return self.key.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Settings, new: Settings) -> Iterator[Change]:
    """What differs, key by key."""
    for key in setting_keys():
        before, after = value_of(old, key), value_of(new, key)
        if before != after:
            yield Change(key, show_setting(key, before), show_setting(key, after))


def keep(old: Settings, new: Settings, groups: Iterable[str]) -> Settings:
    """The new settings, but for some groups."""
    return new.model_copy(update={group: getattr(old, group) for group in groups})


def _split_text(value: Any) -> Any:
    return tuple(part for part in re.split(r"[,\s]+", value) if part) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and, by dotted key, where each value came from (`default` when absent)."""

    settings: Settings
    sources: Mapping[str, str]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def setting_keys() -> tuple[str, ...]:
    """Every key, dotted."""
    return tuple(_keys(Settings))


def value_of(settings: Settings, key: str) -> Any:
    """A setting by its dotted key."""
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _flatten(values: Mapping[str, Any], place: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    groups = {key.rpartition(".")[0] for key in setting_keys()} - {""}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in groups:
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: {key}: expected a mapping of settings, got {value!r}")
            yield from _flatten(value, place, key + ".")
        else:
            yield key, value


def _check_known(key: str, shown: str, place: str, spell: Mapping[str, str]) -> None:
    if key not in spell:
        near = difflib.get_close_matches(key, list(spell), n=1, cutoff=0.0)
        raise ConfigError(f"{place}: unknown setting '{shown}'; the nearest known one is '{spell[near[0]]}'")


class _Loader(yaml.SafeLoader):
    """YAML's own loader lets the last of equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key.value}' stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    values = dict(_flatten(data, str(path)))
    spell = {key: key for key in setting_keys()}
    for key in values:
        _check_known(str(key), str(key), str(path), spell)
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    spell = {key: ENV_PREFIX + key.replace(".", "__").upper() for key in setting_keys()}
    values = {}
    for name, text in environment.items():
        if name.startswith(ENV_PREFIX) and not name.startswith(_NOT_SETTINGS):
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _check_known(key, name, "environment", spell)
            values[key] = text
    return values


def load_settings(
    *,
    config: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    layer: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge the sources and validate. flags holds dotted keys; None values are flags not given.

    layer: what was changed while running (proxy/steering.py), by dotted key.

    Raises ConfigError.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if config is not None:
        layers.append((str(config), _from_file(config)))
    layers.append(("environment", _from_environment(environment)))
    layers.append(("flag", {key: value for key, value in (flags or {}).items() if value is not None}))
    layers.append(("control plane", layer or {}))
    for place, values in layers:
        for key, value in values.items():
            merged[key] = value
            sources[key] = place
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        *groups, name = key.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    return Loaded(validate(nested, sources), sources)


def validate(fields: Any, sources: Mapping[str, str]) -> Settings:
    """Settings from nested mappings. Raises ConfigError, which names the key's source."""
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, sources)) from None


def _first_problem(error: ValidationError, sources: Mapping[str, str]) -> str:
    problem = error.errors()[0]
    parts = problem["loc"]
    keys = set(setting_keys())
    size = next((n for n in range(len(parts), 0, -1) if ".".join(map(str, parts[:n])) in keys), len(parts))
    key = ".".join(map(str, parts[:size]))
    place = sources.get(key) or next((at for name, at in sources.items() if name.startswith(f"{key}.")), "settings")
    inner = [part for part in parts[size:] if isinstance(part, str) and part != "[key]"]
    if key == "shaping.rules" and size < len(parts):  # a list of many like ones
        key += f"[{parts[size]}]"
    if inner == ["url"] and problem["type"] == "value_error":
        inner = []  # the rule names it
    within = "".join(f" {part}:" for part in inner)
    rule = problem["msg"].removeprefix("Value error, ")
    got = "***" if key in SECRET else repr(problem["input"])
    return _without_secrets(f"{place}: {key}:{within} {rule}, got {got}")


_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^\s'\"]*@")
_API_KEY = re.compile(r"""(?<=api_key['"]: )(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_PASSWORD_OPTION = re.compile(r"(?<=password=)[^&\s'\"]*", re.IGNORECASE)


def _without_secrets(text: str) -> str:
    return _API_KEY.sub("***", _PASSWORD_OPTION.sub("***", _PASSWORD.sub(r"\1:***@", text)))


def show_setting(key: str, value: Any) -> str:
    """A setting's value for people."""
    return "***" if key in SECRET and value else show_value(value)


def show_value(value: Any) -> str:
    """A value for people, with the passwords of a URL as `***`."""
    if isinstance(value, tuple):
        return ", ".join(show_value(part) for part in value) or "(none)"
    if isinstance(value, dict):
        return _without_secrets(json.dumps(value, ensure_ascii=False)) if value else "(none)"
    if isinstance(value, UpstreamSettings):
        said = value.model_dump(mode="json", exclude_defaults=True, exclude={"url"})
        if "api_key" in said:
            said["api_key"] = "***"
        return _without_secrets(f"{value} {json.dumps(said, ensure_ascii=False)}" if said else str(value))
    if isinstance(value, MirrorTargetSettings):
        said = value.model_dump(mode="json", exclude_defaults=True, exclude={"url"})
        if "headers" in said:
            said["headers"] = dict.fromkeys(said["headers"], "***")
        return _without_secrets(f"{value} {json.dumps(said, ensure_ascii=False)}" if said else str(value))
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, ByteSize):
        return value.human_readable()
    return _without_secrets(str(value))


def parse_size(text: str, place: str) -> int:
    """Bytes of a size with a unit, as 50GB or 200MiB. Raises ConfigError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{place}: expected a size as 50GB or 200MiB, got {text!r}") from None


def show_size(size_bytes: int) -> str:
    """A number of bytes for people."""
    return ByteSize(size_bytes).human_readable()


def describe(loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Rows of (key, value, source) for every setting."""
    for key in setting_keys():
        value = value_of(loaded.settings, key)
        if key == "database_url" and value is None:
            value = loaded.settings.database
        yield key, show_setting(key, value), loaded.sources.get(key, "default")
