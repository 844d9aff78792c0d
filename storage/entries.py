"""What the journal's frames hold; the other one is `traces.record.TraceRecord`."""

from __future__ import annotations

import msgspec

from traces.record import LogType, Origin, Outcome, TraceRecord


class Begun(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of a request when it is accepted; a record is made of it should the worker die."""

    request_id: str
    received_at: float
    session_id: str | None = None
    model: str | None = None
    log_type: LogType = LogType.API
    client_request_id: str | None = None
    endpoint: str = ""
    stream: bool = False
    max_tokens: int | None = None
    origin: Origin = Origin.CLIENT
    run_id: str | None = None
    tenant: str | None = None
    shadow_of: str | None = None


class Header(msgspec.Struct, frozen=True):
    """The first frame of a segment."""

    format: str
    version: int
    writer: str
    gateway: str
    segment: int
    created_at: float
    begun_fields: tuple[str, ...]
    record_fields: tuple[str, ...]


def crash_record(begun: Begun, gateway: str) -> TraceRecord:
    """The record of a request whose worker died: as much as was known at its start."""
    return TraceRecord(
        request_id=begun.request_id,
        received_at=begun.received_at,
        session_id=begun.session_id,
        model=begun.model,
        log_type=begun.log_type,
        outcome=Outcome.GATEWAY_CRASH,
        client_request_id=begun.client_request_id,
        endpoint=begun.endpoint,
        stream=begun.stream,
        max_tokens=begun.max_tokens,
        origin=begun.origin,
        run_id=begun.run_id,
        tenant=begun.tenant,
        shadow_of=begun.shadow_of,
        gateway=gateway,
    )
