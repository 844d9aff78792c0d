from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.request_head import MAX_COUNT, MAX_TEXT, RequestHead, clean, countable
from traces.record import LogType, Origin

Headers = list[tuple[bytes, bytes]]


def head(*headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(list(headers), b"x-session-id", b"x-burstgate-log-type")


@pytest.mark.parametrize(
    ("headers", "forward"),
    [
        ([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")], [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]),
        ([(b"authorization", b"Bearer k"), (b"accept-encoding", b"gzip")], None),
        ([(b"x-session-id", b"s")], None),  # the upstream may want it too
        ([(b"a", b"\xff\x80"), (b"b", b"")], None),
        ([(b"upgrade-insecure-requests", b"1"), (b"te-st", b"1")], None),  # not the hop's, only named alike
        ([(b"host", b"h")], []),
        ([(b"connection", b"keep-alive"), (b"keep-alive", b"timeout=5")], []),
        ([(b"te", b"trailers"), (b"transfer-encoding", b"chunked")], []),
        ([(b"trailer", b"x-sum")], None),  # they go on, too
        ([(b"X-A", b"1 \t"), (b"HOST", b"h")], [(b"X-A", b"1")]),  # names as they are; no space behind a value
        ([(b"upgrade", b"h2c"), (b"expect", b"100-continue")], []),
        ([(b"proxy-connection", b"close"), (b"proxy-authorization", b"Basic x")], []),
        ([(b"content-length", b"12")], []),  # the gateway frames the body itself
        ([(b"x-request-id", b"r")], []),  # and names the request
        ([(b"x-burstgate-origin", b"replay"), (b"x-burstgate-anything", b"1")], []),
        ([(b"x-burstgate-log-type", b"api")], []),
        # What Connection names, wherever it stands and however it is spelt.
        ([(b"x-a", b"1"), (b"connection", b"close, X-A"), (b"x-b", b"2")], [(b"x-b", b"2")]),
        ([(b"connection", b" x-a ,, x-b"), (b"x-a", b"1"), (b"x-b", b"2"), (b"x-c", b"3")], [(b"x-c", b"3")]),
        ([(b"connection", b"x-a"), (b"connection", b"x-b"), (b"x-a", b"1"), (b"x-b", b"2")], []),
        ([(b"connection", b"\xff\x00,"), (b"x-a", b"1")], [(b"x-a", b"1")]),
        ([(b"connection", b"Close"), (b"x-a", b"1")], [(b"x-a", b"1")]),
    ],
)
def test_headers_to_send_on(headers: Headers, forward: Headers | None) -> None:
    assert head(*headers).forward == (headers if forward is None else forward)


@given(st.lists(st.tuples(st.sampled_from([b"x-a", b"x-b", b"te", b"x-burstgate-y", b"connection"]), st.binary())))
def test_what_goes_on_is_in_order_and_never_the_hops(headers: Headers) -> None:
    headers = [(name, value.rstrip(b" \t")) for name, value in headers]
    forward = head(*headers).forward
    remaining = iter(headers)
    assert all(header in remaining for header in forward)
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    kept = {b"x-a", b"x-b"} - named
    assert forward == [header for header in headers if header[0] in kept]


@pytest.mark.parametrize(
    ("value", "log_type"),
    [
        (b"conversation", LogType.CONVERSATION),
        (b"Conversation log", LogType.CONVERSATION),
        (b" CONVERSATION LOG ", LogType.CONVERSATION),
        (b"api", LogType.API),
        (b"API log", LogType.API),
        (b"", None),
        (b"chat", None),
        (b"\xff", None),
    ],
)
def test_log_type(value: bytes, log_type: LogType | None) -> None:
    assert head((b"x-burstgate-log-type", value)).log_type is log_type


@pytest.mark.parametrize(
    ("value", "session"),
    [
        (b"s1", "s1"),
        (b"", None),
        (b"caf\xc3\xa9 \xff", "caf\xc3\xa9 \xff"),  # a header's bytes are Latin-1: nothing is lost, nothing raises
        (b"a\0b", "a\ufffdb"),
        (b"s" * 1000, "s" * MAX_TEXT),
    ],
)
def test_session(value: bytes, session: str | None) -> None:
    assert head((b"x-session-id", value)).session == session


@pytest.mark.parametrize("value", [b"client", b"injected", b"shadow", b"imported", b"REPLAY", b"re play", b"", b"\xff"])
def test_origin_can_not_be_forged(value: bytes) -> None:
    assert head((b"x-burstgate-origin", value)).origin is Origin.CLIENT


def test_replay_says_so_and_names_its_run() -> None:
    found = head((b"x-burstgate-origin", b"replay"), (b"x-burstgate-run-id", b"run 7"))
    assert (found.origin, found.run_id) == (Origin.REPLAY, "run 7")


@given(st.text(max_size=600))
def test_cleaned_text_is_bounded_and_fit_for_postgres(text: str) -> None:
    cleaned = clean(text)
    assert cleaned == text[:MAX_TEXT].replace("\0", "\ufffd")


@pytest.mark.parametrize(
    ("number", "count"),
    [(None, None), (0, 0), (7, 7), (MAX_COUNT, MAX_COUNT), (MAX_COUNT + 1, None), (-1, None), (10**30, None)],
)
def test_counts_from_outside(number: int | None, count: int | None) -> None:
    assert countable(number) == count


TOKEN = b"0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("headers", "token", "origin"),
    [
        ([(b"x-burstgate-origin", b"injected"), (b"x-burstgate-injection", TOKEN)], TOKEN, Origin.INJECTED),
        ([(b"X-Burstgate-Injection", TOKEN), (b"X-Burstgate-Origin", b"injected")], TOKEN, Origin.INJECTED),
        ([(b"x-burstgate-origin", b"injected")], TOKEN, Origin.CLIENT),
        ([(b"x-burstgate-origin", b"injected"), (b"x-burstgate-injection", TOKEN[:-1])], TOKEN, Origin.CLIENT),
        ([(b"x-burstgate-origin", b"injected"), (b"x-burstgate-injection", b"")], b"", Origin.CLIENT),  # none is known
        ([(b"x-burstgate-origin", b"shadow"), (b"x-burstgate-injection", TOKEN)], TOKEN, Origin.INJECTED),
    ],
)
def test_only_the_injector_itself_is_injected(headers: Headers, token: bytes, origin: Origin) -> None:
    found = RequestHead(headers, b"x-session-id", b"x-burstgate-log-type", injection_token=token)
    assert found.origin is origin
    assert found.forward == []  # the token stays here
