"""Any record that the type allows and that a codec of every field must keep."""

from __future__ import annotations

from hypothesis import strategies as st

from traces.record import LogType, Origin, Outcome, TokenSource, TraceRecord

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_tokens = st.integers(0, 2**63 - 1)
_seconds = st.floats(0, allow_nan=False, allow_infinity=False)

RECORDS = st.builds(
    TraceRecord,
    request_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
    received_at=st.floats(-62135596800.0, 253402300799.0),
    session_id=st.none() | _text,
    elapsed_s=st.none() | _seconds,
    model=st.none() | _text,
    request_tokens=st.none() | _tokens,
    response_tokens=st.none() | _tokens,
    log_type=st.sampled_from(LogType),
    outcome=st.sampled_from(Outcome),
    client_request_id=st.none() | _text,
    served_model=st.none() | _text,
    status=st.none() | st.integers(100, 599),
    error_type=st.none() | _text,
    ttft_s=st.none() | _seconds,
    tpot_s=st.none() | _seconds,
    queue_s=st.none() | _seconds,
    endpoint=_text,
    stream=st.booleans(),
    upstream=st.none() | _text,
    attempts=st.integers(0, 9),
    finish_reason=st.none() | _text,
    cached_tokens=st.none() | _tokens,
    max_tokens=st.none() | st.integers(-(2**63), 2**63 - 1),
    token_source=st.sampled_from(TokenSource),
    prefix_blocks=st.none() | st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple),
    origin=st.sampled_from(Origin),
    run_id=st.none() | _text,
    shadow_of=st.none() | _text,
    tenant=st.none() | _text,
    gateway=st.none() | _text,
)
