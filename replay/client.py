"""One request to the target, over the gateway's own HTTP client and accounting; and what a replay asks beforehand.

Every request ends in exactly one `Reply`, with the outcome in the words of the trace record, seen from the client:

    ok                a whole answer with a status below 300
    rejected          429
    invalid_request   3xx, or another 4xx
    upstream_error    5xx, an error event in a stream, HTTP or an answer that cannot be read, a connection that ended
                      before its head
    upstream_timeout  the replay's own timeout
    connect_error     no connection
    truncated         the answer began and broke off, or its stream never said [DONE]
    client_gone       the replay was interrupted
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

import msgspec

from replay.schedule import Planned
from traces.record import Origin, Outcome
from wire.accounting import Accounted, NoAccount, StreamAccount, UnaryAccount
from wire.http import ConnectFailed, ConnectionLost, ConnectTimedOut, Exchange, HttpClient
from wire.http1 import BadResponse, Headers
from wire.shapes import Family, Usage

Endpoint = Literal["chat", "completions", "embeddings"]

FailureClass = Literal[
    "connect", "connect_timeout", "timeout_head", "timeout_first_token", "timeout_mid_stream", "http_3xx", "http_4xx",
    "http_429", "http_5xx", "no_answer", "mid_stream", "bad_answer", "cancelled",
]  # fmt: skip
"""How a request failed, finer than its outcome. The three timeouts are of the replay's one timer: no head yet, a head
but no token, tokens but no end. no_answer: the connection ended before the head; mid_stream: after it, or by an event;
bad_answer: no HTTP, or no completion."""

TARGETS: dict[Endpoint, bytes] = {
    "chat": b"/v1/chat/completions",
    "completions": b"/v1/completions",
    "embeddings": b"/v1/embeddings",
}
FAMILIES: dict[Endpoint, Family] = {
    "chat": Family.CHAT,
    "completions": Family.COMPLETIONS,
    "embeddings": Family.EMBEDDINGS,
}

MAX_ANSWER_BYTES = 32 * 1024 * 1024
"""An answer to one of the replay's own questions (/v1/models, /tokenize) beyond this is no answer."""

ASK_TIMEOUT_S = 30.0
"""For each of these questions."""

_VISIBLE = "".join(map(chr, range(0x20, 0x7F)))


class ReplayError(Exception):
    """The replay cannot start. One line for the user."""


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request went. Times are monotonic nanoseconds."""

    outcome: Outcome
    began_ns: int
    """When the replay turned to it; the connection is made after this."""
    end_ns: int
    """Last byte, or when the failure was known."""
    sent_ns: int | None = None
    first_chunk_ns: int | None = None
    last_chunk_ns: int | None = None
    usage: Usage | None = None
    status: int | None = None
    error: str | None = None
    gaps_ns: list[int] = field(default_factory=list)
    """Between content chunks; 0 between chunks that arrived together."""
    failure_class: FailureClass | None = None
    """None for `ok`."""
    text: str | None = None
    """The answer's, where it was asked to be kept and is no longer than `wire.accounting.MAX_ANSWER_BYTES`."""


def header_value(text: str) -> bytes:
    """Text from a trace as a header value: what is not visible ASCII is percent-encoded as UTF-8."""
    return quote(text, safe=_VISIBLE, errors="replace").strip().encode()


def origin_headers(injection_token: bytes | None) -> Headers:
    """What tells a gateway that no client of its own asks: a replay, or its own injector with its token."""
    if injection_token is None:
        return [(b"x-burstgate-origin", Origin.REPLAY.encode())]
    return [(b"x-burstgate-origin", Origin.INJECTED.encode()), (b"x-burstgate-injection", injection_token)]


def request_headers(
    row: Planned,
    run_id: str,
    api_key: str | None,
    extra: Headers | None = None,
    *,
    injection_token: bytes | None = None,
) -> Headers:
    """The headers of a row's request, but for Content-Length. extra: the user's own."""
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", f"{run_id}-{row.index}".encode()),
        *origin_headers(injection_token),
        (b"x-burstgate-run-id", run_id.encode()),
        (b"x-burstgate-log-type", header_value(row.log_type)),
    ]
    if row.session_id is not None and (session_id := header_value(row.session_id)):
        headers.append((b"x-session-id", session_id))
    return headers + auth_headers(api_key) + (extra or [])


def auth_headers(api_key: str | None) -> Headers:
    """OpenAI's bearer header, or none."""
    return [] if api_key is None else [(b"authorization", b"Bearer " + api_key.encode())]


def outcome_of(
    status: int, accounted: Accounted, *, is_stream: bool, is_terminal: bool
) -> tuple[Outcome, FailureClass | None, str | None]:
    """The outcome of an answer whose last byte has arrived, its class, and what went wrong.

    is_stream: the answer is an event stream; is_terminal: it said that it was over.
    """
    if status >= 300:
        error = f"HTTP {status} {accounted.error_type or ''}".rstrip()
        if status == 429:
            return Outcome.REJECTED, "http_429", error
        if status >= 500:
            return Outcome.UPSTREAM_ERROR, "http_5xx", error
        return Outcome.INVALID_REQUEST, "http_4xx" if status >= 400 else "http_3xx", error
    if is_stream:
        if accounted.error_type is not None:
            return Outcome.UPSTREAM_ERROR, "mid_stream", f"error event in the stream: {accounted.error_type}"
        if not is_terminal and accounted.finish_reason is None:
            return Outcome.TRUNCATED, "mid_stream", "the stream ended without [DONE]"
    elif accounted.finish_reason is None and accounted.usage is None:
        return Outcome.UPSTREAM_ERROR, "bad_answer", f"HTTP {status}, but the answer is no completion"
    return Outcome.OK, None, None


class Request:
    """One request to the target: `start` sends it at once if that can be, `finish` sees it to its end."""

    __slots__ = ("_body", "_endpoint", "_http", "_keep_text", "_lines", "_reader", "began_ns")

    def __init__(
        self, http: HttpClient, endpoint: Endpoint, lines: bytes, body: bytes, *, keep_text: bool = False
    ) -> None:
        """lines: of the headers but for Content-Length, by `wire.http1.encode_lines`. keep_text: for `Reply.text`."""
        self._http = http
        self._endpoint: Endpoint = endpoint
        self._lines = b"%bcontent-length: %d\r\n" % (lines, len(body))
        self._body = body
        self._keep_text = keep_text
        self._reader: _Reader | None = None
        self.began_ns = time.monotonic_ns()

    def start(self) -> bool:
        """Send on an idle connection; False where there is none, and `finish` makes one."""
        exchange = self._http.start(b"POST", TARGETS[self._endpoint], self._lines, self._body)
        if exchange is None:
            return False
        self._reader = _Reader(exchange, FAMILIES[self._endpoint], keep_text=self._keep_text)
        return True

    async def finish(self, limit: asyncio.Timeout) -> Reply:
        """The answer, read to its end; failures come back as the reply's outcome.

        limit: entered here; when it fires the outcome is `upstream_timeout`.
        """
        failure_class: FailureClass | None
        try:
            async with limit:
                if self._reader is None:
                    exchange = await self._http.request(b"POST", TARGETS[self._endpoint], self._lines, self._body)
                    self._reader = _Reader(exchange, FAMILIES[self._endpoint], keep_text=self._keep_text)
                await self._reader.end
            account = self._reader.account
            outcome, failure_class, error = outcome_of(
                self._reader.exchange.status,
                account.result(),
                is_stream=isinstance(account, StreamAccount),
                is_terminal=account.terminal,
            )
        except ConnectTimedOut as failure:
            outcome, failure_class, error = Outcome.CONNECT_ERROR, "connect_timeout", str(failure)
        except ConnectFailed as failure:
            outcome, failure_class, error = Outcome.CONNECT_ERROR, "connect", str(failure)
        except TimeoutError:
            failure_class = "connect_timeout" if self._reader is None else self._reader.timeout_class
            outcome, error = Outcome.UPSTREAM_TIMEOUT, "the answer was not whole in time"
        except (ConnectionLost, BadResponse) as failure:
            has_begun = self._reader is not None and self._reader.exchange.has_head
            outcome, error = Outcome.TRUNCATED if has_begun else Outcome.UPSTREAM_ERROR, str(failure)
            is_http = isinstance(failure, ConnectionLost)
            failure_class = "mid_stream" if has_begun else "no_answer" if is_http else "bad_answer"
        except OSError as failure:
            outcome, failure_class, error = Outcome.CONNECT_ERROR, "connect", failure.strerror or type(failure).__name__
        finally:
            if self._reader is not None:
                self._reader.exchange.abort()
        return self._reply(outcome, failure_class, error)

    def _reply(self, outcome: Outcome, failure_class: FailureClass | None, error: str | None) -> Reply:
        reader = self._reader
        if reader is None:
            return Reply(outcome, self.began_ns, time.monotonic_ns(), error=error, failure_class=failure_class)
        exchange, accounted = reader.exchange, reader.account.result()
        return Reply(
            outcome=outcome,
            began_ns=self.began_ns,
            end_ns=exchange.received_ns if exchange.is_complete else time.monotonic_ns(),
            sent_ns=exchange.sent_ns,
            first_chunk_ns=accounted.first_chunk_ns,
            last_chunk_ns=accounted.last_chunk_ns,
            usage=accounted.usage,
            status=exchange.status if exchange.has_head else None,
            error=error,
            gaps_ns=reader.gaps_ns,
            failure_class=failure_class,
            text=None if accounted.answer is None else accounted.answer.decode(errors="replace"),
        )


class _Reader:
    """Accounts for an answer as it arrives, as the exchange's listener: no task wakes up for a chunk."""

    def __init__(self, exchange: Exchange, family: Family, *, keep_text: bool) -> None:
        self.exchange = exchange
        self._family = family
        self._keep_text = keep_text
        self.account: StreamAccount | UnaryAccount | NoAccount = NoAccount()
        self._seen: Accounted | None = None
        """Of a stream, at the last look."""
        self.gaps_ns: list[int] = []
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the last byte; what the exchange failed with, else."""
        exchange.listener = self._look
        if exchange.is_complete or exchange.error is not None:
            self._look()

    @property
    def timeout_class(self) -> FailureClass:
        """Where an answer that is not whole stands."""
        if not self.exchange.has_head:
            return "timeout_head"
        return "timeout_first_token" if self.account.result().first_chunk_ns is None else "timeout_mid_stream"

    def _look(self) -> None:
        exchange = self.exchange
        if self.end.done():
            return
        if exchange.has_head and isinstance(self.account, NoAccount):
            self.account = _account_for(exchange, self._family, keep_text=self._keep_text)
            if isinstance(self.account, StreamAccount):
                self._seen = self.account.result()
        if data := exchange.take():
            self.account.feed(exchange.received_ns, data)
        if exchange.is_complete:
            self.account.eof(exchange.received_ns)
            self.end.set_result(None)
        elif exchange.error is not None:
            self.end.set_exception(exchange.error)
        if self._seen is not None:
            now = self.account.result()
            _gaps(self._seen, now, self.gaps_ns)
            self._seen = now


def _account_for(exchange: Exchange, family: Family, *, keep_text: bool) -> StreamAccount | UnaryAccount:
    content_type = next((value for name, value in exchange.headers if name.lower() == b"content-type"), b"")
    is_stream = exchange.status < 300 and content_type.lower().startswith(b"text/event-stream")
    kind = StreamAccount if is_stream else UnaryAccount
    return kind(family, keep_answer=keep_text)


def _gaps(before: Accounted, after: Accounted, gaps_ns: list[int]) -> None:
    """Append the gaps of the chunks that came between two looks; they came together."""
    chunks = after.content_chunks - before.content_chunks
    if chunks and before.last_chunk_ns is not None and after.last_chunk_ns is not None:
        gaps_ns.append(after.last_chunk_ns - before.last_chunk_ns)
        chunks -= 1
    elif chunks:
        chunks -= 1  # the very first chunk has no gap before it
    gaps_ns.extend([0] * chunks)


class Unanswered(Exception):
    """The target does not answer a question of the replay's: another status than 200, or not the JSON expected."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class Counted(msgspec.Struct, frozen=True):
    """vLLM's answer to /tokenize."""

    count: int
    max_model_len: int | None = None


async def list_models(http: HttpClient, api_key: str | None, extra: Headers | None = None) -> list[str]:
    """The names of the models that the target serves.

    Raises Unanswered, ConnectFailed, ConnectionLost, BadResponse, TimeoutError.
    """
    status, body = await _ask(http, b"GET", b"/v1/models", auth_headers(api_key) + (extra or []), b"")
    if status != 200:
        raise Unanswered(f"HTTP {status}", status)
    try:
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Unanswered("not a list of models") from None


async def count_tokens(http: HttpClient, question: bytes, extra: Headers) -> Counted:
    """The tokens that the target counts for a prompt, its chat template included.

    question: the body, of `BodyWriter.question`. extra: the key's header and the user's.
    Raises Unanswered when it cannot be had for any reason.
    """
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(question)),
        (b"x-burstgate-origin", Origin.REPLAY.encode()),
        *extra,
    ]
    try:
        status, answer = await _ask(http, b"POST", b"/tokenize", headers, question)
        if status != 200:
            raise Unanswered(f"HTTP {status}", status)
        return msgspec.json.decode(answer, type=Counted)
    except (ConnectFailed, ConnectionLost, BadResponse, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unanswered(str(error) or type(error).__name__) from error


async def _ask(http: HttpClient, method: bytes, target: bytes, headers: Headers, body: bytes) -> tuple[int, bytes]:
    exchange: Exchange | None = None
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            exchange = await http.request(method, target, headers, body)
            parts = bytearray()
            while not exchange.is_complete:
                await exchange.wait()
                parts += exchange.take()
                if len(parts) > MAX_ANSWER_BYTES:
                    raise Unanswered(f"an answer over {MAX_ANSWER_BYTES} bytes")
            return exchange.status, bytes(parts + exchange.take())
    finally:
        if exchange is not None:
            exchange.abort()


async def check_target(
    http: HttpClient, models: Sequence[str], api_key: str | None, extra: Headers | None = None
) -> None:
    """Raises ReplayError when the target cannot be reached, refuses the key or lists models without one of `models`."""
    url = http.url.text
    try:
        names = await list_models(http, api_key, extra)
    except ConnectFailed as error:
        raise ReplayError(f"cannot reach the target: {error}") from None
    except TimeoutError:
        raise ReplayError(f"{url}/v1/models: no answer within {ASK_TIMEOUT_S:g} s") from None
    except (ConnectionLost, BadResponse) as error:
        raise ReplayError(f"{url}/v1/models: expected an HTTP answer, got: {error}") from None
    except Unanswered as error:
        if error.status in (401, 403):
            raise ReplayError(f"{url}/v1/models: the target wants another API key ({error})") from None
        return  # an OpenAI-like server need not list its models
    unknown = [model for model in models if model not in names]
    if names and unknown:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ReplayError(f"model {unknown[0]!r}: the target {url} serves {listed}")


def read_api_key(variable: str | None) -> str | None:
    """The key that an environment variable holds. Raises ReplayError naming the variable, never its value."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ReplayError(f"API key: the environment variable {variable} is not set")
    if not re.fullmatch(r"[!-~]+", key):
        raise ReplayError(f"API key: the environment variable {variable} holds more than visible ASCII characters")
    return key
