"""The record: what burstgate knows about one request.

One `TraceRecord` is one row of a trace, one end frame in the journal and one row of the `requests` table. The first
eight fields after the id are BurstGPT's columns. Rules: unknown is None and zero means zero; a failed request has an
outcome other than `ok` and its counts as they were observed; no prompt, answer or header is ever part of a record.

The structs are array-like: in MessagePack a record is an array in the order of the fields below. New fields go to the
end, with a default, so that older journals stay readable.
"""

from __future__ import annotations

import enum

import msgspec


class Outcome(enum.StrEnum):
    """How a request ended. Everything but `ok` is a failure.

    ok: the client received the whole of a response with a status below 400.
    rejected: refused for load, by the gateway's shaping or by an upstream's 429.
    upstream_error: the upstream answered 5xx or broke HTTP before its first byte.
    upstream_timeout: one of the gateway's timers ended it.
    connect_error: no upstream connection could be made.
    truncated: the upstream broke off after the response had begun.
    client_gone: the client left before the response was whole.
    gateway_crash: the worker died while the request was in flight.
    invalid_request: refused as wrong, by the gateway or by an upstream's 4xx other than 429.
    """

    OK = "ok"
    REJECTED = "rejected"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    CONNECT_ERROR = "connect_error"
    TRUNCATED = "truncated"
    CLIENT_GONE = "client_gone"
    GATEWAY_CRASH = "gateway_crash"
    INVALID_REQUEST = "invalid_request"


class Origin(enum.StrEnum):
    """Who caused the request. Statistics leave out the gateway's own (`OWN_ORIGINS`) unless asked for them."""

    CLIENT = "client"
    REPLAY = "replay"
    INJECTED = "injected"
    SHADOW = "shadow"
    IMPORTED = "imported"


OWN_ORIGINS = (Origin.INJECTED, Origin.SHADOW)
"""Requests that no client sent: bursts of the gateway's own, and copies of its clients' requests."""


class LogType(enum.StrEnum):
    """BurstGPT's `Log Type` column, spelt as in the published files."""

    CONVERSATION = "Conversation log"
    API = "API log"


class TokenSource(enum.StrEnum):
    """Where the token counts come from: the upstream's usage, an estimate from content chunks, or nowhere."""

    USAGE = "usage"
    ESTIMATED = "estimated"
    NONE = "none"


class TraceRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request. Durations in seconds, counts in tokens, `received_at` in epoch seconds with microseconds kept."""

    request_id: str
    """UUIDv7, text; the key under which a record exists once."""
    received_at: float
    session_id: str | None = None
    elapsed_s: float | None = None
    """Submission to last byte."""
    model: str | None = None
    """As the client asked."""
    request_tokens: int | None = None
    response_tokens: int | None = None
    log_type: LogType = LogType.API
    outcome: Outcome = Outcome.OK
    client_request_id: str | None = None
    served_model: str | None = None
    """As the upstream answered."""
    status: int | None = None
    """The HTTP status sent to the client; None when none was sent."""
    error_type: str | None = None
    """The upstream's own error type, or the gateway's."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    queue_s: float | None = None
    """Time held by shaping."""
    endpoint: str = ""
    """The path of the request, without its query, at most 200 characters."""
    stream: bool = False
    upstream: str | None = None
    attempts: int = 0
    finish_reason: str | None = None
    cached_tokens: int | None = None
    max_tokens: int | None = None
    token_source: TokenSource = TokenSource.NONE
    prefix_blocks: tuple[int, ...] | None = None
    """Opt-in keyed hashes of prompt-prefix blocks, unsigned 64-bit."""
    origin: Origin = Origin.CLIENT
    run_id: str | None = None
    """The replay or injection run; for imported rows the data set's name."""
    shadow_of: str | None = None
    tenant: str | None = None
    gateway: str | None = None
    """Name of the gateway that recorded it."""
    shaping_rule: str | None = None
    """The rule of the gateway's shaping that held or refused it; None where none did."""
    shaping_class: str | None = None
    """The class (a rule's key: a model, a tenant, a log type) in which that rule counted it."""
    agreement: float | None = None
    """Of a shadow: how much of its output equals its primary's, 0 to 1; None where that was not compared."""
