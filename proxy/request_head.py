"""What a request's headers say: those to send on, and what the gateway itself needs."""

from __future__ import annotations

from hmac import compare_digest

from traces.record import LogType, Origin
from wire.http1 import Headers, encode_lines

MAX_TEXT = 256
"""Texts from outside are cut to this in a record."""
MAX_COUNT = 2**40
"""Counts from outside are unknown beyond this."""

# RFC 9110, section 7.6.1, and what a proxy answers itself (Expect, section 10.1.1).
_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"te",
    b"transfer-encoding", b"upgrade", b"expect", b"host", b"content-length",
})  # fmt: skip
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
MAX_CREDENTIALS = 4
"""Those of a request that are looked at."""
_VIA = b"via: 1.1 burstgate\r\n"
_OURS = b"x-burstgate-"
LOG_TYPES = {
    "conversation": LogType.CONVERSATION,
    "conversation log": LogType.CONVERSATION,
    "api": LogType.API,
    "api log": LogType.API,
}


def clean(text: str | None) -> str | None:
    """A text from outside, fit for a record: bounded, and without NUL, which PostgreSQL can not store."""
    if text is None:
        return None
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT]
    return text.replace("\0", "\ufffd") if "\0" in text else text


def countable(number: int | None) -> int | None:
    """A count from outside, fit for a record and a sum; None for what no count can be."""
    return number if number is not None and 0 <= number <= MAX_COUNT else None


class RequestHead:
    """What the headers say: those to send on, and what the gateway itself needs. Shared by requests with equal ones."""

    __slots__ = ("_bare_lines", "client_request_id", "content_type", "credentials", "expects_continue", "forward",
                 "host", "hosts", "is_chunked", "lines", "log_type", "origin", "request_id", "run_id", "session",
                 "shadow_lines", "size", "tenant", "token")  # fmt: skip

    def __init__(
        self,
        headers: Headers,
        session_header: bytes,
        log_type_header: bytes,
        tenant_header: bytes = b"",
        injection_token: bytes = b"",
    ) -> None:
        """headers: names as sent, without Content-Length. tenant_header: empty for none.

        injection_token: what an injector must show; empty: none.
        """
        self.forward: Headers = []
        self.size = sum([len(name) + len(value) + 4 for name, value in headers])
        """Bytes of all headers, with their separators."""
        self.content_type = b""
        """In lower case."""
        self.expects_continue = False
        self.host: bytes | None = None
        self.hosts = 0
        """How many Host headers there are."""
        self.is_chunked = False
        self.request_id: bytes | None = None
        """As sent; `client_request_id` as recorded."""
        self.client_request_id: str | None = None
        self.credentials: tuple[bytes, ...] = ()
        """What the client shows: bearer tokens and keys."""
        self._bare_lines: bytes | None = None
        self.session: str | None = None
        self.tenant: str | None = None
        self.log_type: LogType | None = None
        self.origin = Origin.CLIENT
        self.run_id: str | None = None
        self.token: bytes | None = None
        """Of one that says it is an injector."""
        self.shadow_lines: dict[int, bytes] | None = None
        """As they are sent to shadow targets, by the targets' numbers; those work them out."""
        named: frozenset[bytes] = frozenset()
        for name, value in headers:
            lower = name.lower()
            value = value.rstrip(b" \t")  # which llhttp leaves
            if lower in _HOP_BY_HOP:
                if lower == b"connection" and value.lower() not in (b"keep-alive", b"close"):
                    named |= {token.strip().lower() for token in value.split(b",")}
                elif lower == b"host":
                    self.host = value
                    self.hosts += 1
                elif lower == b"transfer-encoding":
                    self.is_chunked = True
                elif lower == b"expect":
                    self.expects_continue = value.lower() == b"100-continue"
                continue
            if lower in CREDENTIALS:
                self._credential(lower, value)
            elif lower == b"content-type":
                self.content_type = value.lower()
            elif lower == b"x-request-id":
                self.request_id = value
                self.client_request_id = clean(value.decode("latin-1"))
                continue
            if lower == session_header:
                self.session = clean(value.decode("latin-1")) or None
            if tenant_header and lower == tenant_header:
                self.tenant = clean(value.decode("latin-1")) or None
            if lower == log_type_header:
                self.log_type = LOG_TYPES.get(value.decode("latin-1").strip().lower())
                continue
            if lower.startswith(_OURS):
                self._control(lower, value)
                continue
            self.forward.append((name, value))
        if injection_token and self._shows(injection_token):
            self.origin = Origin.INJECTED
        if named:
            self.forward = [header for header in self.forward if header[0].lower() not in named]
        self.lines = encode_lines(self.forward) + _VIA
        """As they are sent."""

    @property
    def bare(self) -> Headers:
        """The headers to send on, without the client's credentials."""
        return [header for header in self.forward if header[0].lower() not in CREDENTIALS]

    @property
    def bare_lines(self) -> bytes:
        """As `lines`, without the client's credentials."""
        if self._bare_lines is None:
            self._bare_lines = encode_lines(self.bare) + _VIA
        return self._bare_lines

    def _credential(self, name: bytes, value: bytes) -> None:
        if name == b"authorization":
            scheme, _, value = value.partition(b" ")
            if scheme.lower() != b"bearer":
                return
        value = value.strip(b" \t")
        if value and len(self.credentials) < MAX_CREDENTIALS:
            self.credentials = (*self.credentials, value)

    def _shows(self, token: bytes) -> bool:
        """Whether the injector's token came with the request. (Asked in `__init__`, a compiler takes it for None.)"""
        return self.token is not None and compare_digest(self.token, token)

    def _control(self, name: bytes, value: bytes) -> None:
        if name == b"x-burstgate-origin" and value == b"replay":
            self.origin = Origin.REPLAY
        elif name == b"x-burstgate-run-id":
            self.run_id = clean(value.decode("latin-1"))
        elif name == b"x-burstgate-injection":
            self.token = value
