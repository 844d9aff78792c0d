"""What one exchange cost: (now_ns, bytes) in; first and last chunk times, token counts and the finish reason out.

An account is fed the response body as it arrives and hands back the bytes to pass on: the same bytes, except that the
usage event which the gateway itself asked for is taken out. Parsing never raises and never delays a whole event; only
an event that is not complete yet waits, and only where an event may have to be taken out.

Token counts, in order of trust: the upstream's usage (`usage`; cumulative where it comes with every chunk, so the
last one counts, summed over choices), else the number of content chunks (`estimated`), else nothing (`none`).
"""

from __future__ import annotations

import re

import msgspec

from wire.openai import (
    POOLING_FAMILIES,
    Family,
    Payload,
    Usage,
    error_type_of,
    read_payload,
    usage_of,
)
from wire.sse import SseSplitter, event_data

MAX_UNARY_BYTES = 32 * 1024 * 1024
"""A plain answer beyond this passes on unread, with unknown tokens."""


class Accounted(msgspec.Struct, frozen=True, gc=False):
    """The result. Times are monotonic nanoseconds."""

    first_chunk_ns: int | None = None
    last_chunk_ns: int | None = None
    content_chunks: int = 0
    usage: Usage | None = None
    """As reported by the upstream; None when none arrived."""
    finish_reason: str | None = None
    served_model: str | None = None
    response_id: str | None = None
    error_type: str | None = None
    """Of an error body, or of an error event within a stream."""
    answer: bytes | None = None
    """The answer's text, when it was asked to be kept for session inference. Never leaves memory."""

    @property
    def response_tokens(self) -> int | None:
        """Reported tokens, else the estimate from content chunks; None when nothing was seen."""
        if self.usage is not None and self.usage.response_tokens is not None:
            return self.usage.response_tokens
        return self.content_chunks or None


class StreamAccount:
    """Accounts for a server-sent event stream of any family.

    strip_usage: the gateway asked for usage on the client's behalf; the extra event is removed.
    keep_answer: collect the answer's text (up to `MAX_ANSWER_BYTES`).
    """

    __slots__ = (
        "_answer",
        "_answer_bytes",
        "_by_choice",
        "_content_chunks",
        "_error_type",
        "_family",
        "_finish_reason",
        "_first_ns",
        "_last_ns",
        "_openai",
        "_response_id",
        "_served_model",
        "_splitter",
        "_strip",
        "_usage",
        "terminal",
    )

    def __init__(self, family: Family, *, strip_usage: bool = False, keep_answer: bool = False) -> None:
        self._family = family
        self._openai = family not in (Family.RESPONSES, Family.MESSAGES)
        self._strip = strip_usage
        self._splitter = SseSplitter()
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._content_chunks = 0
        self._usage: Usage | None = None
        self._by_choice: dict[int, Usage] = {}
        self._finish_reason: str | None = None
        self._served_model: str | None = None
        self._response_id: str | None = None
        self._error_type: str | None = None
        self._answer: list[bytes] | None = [] if keep_answer else None
        self._answer_bytes = 0
        self.terminal = False
        """The event that ends the answer has been seen: `[DONE]`, `response.completed` or `message_stop`."""

    def feed(self, now_ns: int, data: bytes) -> bytes:
        """Account for `data`; returns what to pass on now."""
        blocks = self._splitter.feed(data)
        if not self._strip:
            for block in blocks:
                self._account(now_ns, block)
            return data
        keep = [block for block in blocks if not self._account(now_ns, block)]
        return keep[0] if len(keep) == 1 else b"".join(keep)

    def eof(self, now_ns: int) -> bytes:
        """Account for the end of the stream; returns what was still held back."""
        rest = self._splitter.eof()
        extra = self._account(now_ns, rest) if rest else False
        return b"" if extra or not self._strip else rest

    def _account(self, now_ns: int, block: bytes) -> bool:
        """Count one event; True when it is the extra usage event."""
        if (
            self._openai
            and self._first_ns is not None
            and b'"choices":[{' in block
            and (b'"finish_reason"' not in block or b'"finish_reason":null' in block)
            and (b'"usage"' not in block or b'"usage":null' in block)
        ):
            self._content_chunks += 1
            self._last_ns = now_ns
            if self._answer is not None:
                self._keep(block)
            return False
        return self._account_read(now_ns, block)

    def _account_read(self, now_ns: int, block: bytes) -> bool:
        data = event_data(block)
        if data == b"[DONE]":
            self.terminal = True
            return False
        payload = read_payload(data) if data else None
        if payload is None:
            return False
        if self._openai:
            return self._account_chunk(now_ns, payload, block)
        self._account_typed(now_ns, payload)
        return False

    def _account_chunk(self, now_ns: int, payload: Payload, block: bytes) -> bool:
        self._learn(payload)
        choices = payload.choices or ()
        has_content = False
        for choice in choices:
            if choice.finish_reason is not None:
                self._finish_reason = choice.finish_reason
            delta = choice.delta
            has_content |= bool(choice.text) or (
                delta is not None
                and bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls
                         or delta.function_call or delta.refusal)
            )  # fmt: skip
        if has_content:
            self._chunk(now_ns)
            if self._answer is not None:
                self._keep(block)
        if payload.usage is None:
            return False
        usage = usage_of(payload.usage, self._family)
        if len(choices) == 1:
            self._by_choice[choices[0].index] = usage
            return False
        self._usage = usage
        return not choices and self._strip

    def _account_typed(self, now_ns: int, payload: Payload) -> None:
        """The Responses API and Anthropic messages, whose events name their type."""
        kind = payload.type or ""
        inner = payload.response or payload.message
        if inner is not None:
            self._learn(inner)
            if inner.usage is not None:
                self._merge(usage_of(inner.usage, self._family))
        if payload.usage is not None:
            self._merge(usage_of(payload.usage, self._family))
        if payload.error is not None:
            self._error_type = error_type_of(payload)
        if kind == "content_block_delta" or (kind.startswith("response.") and kind.endswith(".delta")):
            self._chunk(now_ns)
        elif kind == "message_delta" and isinstance(payload.delta, msgspec.Struct):
            self._finish_reason = payload.delta.stop_reason or self._finish_reason
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._finish_reason = kind.removeprefix("response.")
            self.terminal = True
        elif kind == "message_stop":
            self.terminal = True
        elif kind == "error":
            self._error_type = self._error_type or "error"

    def _chunk(self, now_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = now_ns
        self._last_ns = now_ns
        self._content_chunks += 1

    def _learn(self, payload: Payload) -> None:
        if self._served_model is None:
            self._served_model = payload.model
            self._response_id = payload.id
        self._error_type = error_type_of(payload) or self._error_type

    def _merge(self, usage: Usage) -> None:
        """A later report replaces what it names; Anthropic names the input at the start and the output at the end."""
        old = self._usage or Usage()
        self._usage = Usage(
            usage.request_tokens if usage.request_tokens is not None else old.request_tokens,
            usage.response_tokens if usage.response_tokens is not None else old.response_tokens,
            usage.cached_tokens if usage.cached_tokens is not None else old.cached_tokens,
        )

    def _keep(self, block: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        found = _CONTENT.findall(block)
        answer.extend(found)
        self._answer_bytes += sum(map(len, found))
        if self._answer_bytes > MAX_ANSWER_BYTES:
            self._answer = None

    def result(self) -> Accounted:
        """What is known so far."""
        usage = self._usage
        if self._family is Family.MESSAGES and self._content_chunks and not self.terminal and usage is not None:
            # message_start says how long the input is; an output count in it is from before any output.
            usage = Usage(usage.request_tokens, self._content_chunks, usage.cached_tokens)
        if usage is None and self._by_choice:
            parts = self._by_choice.values()
            known = [part.response_tokens for part in parts if part.response_tokens is not None]
            last = next(reversed(parts))
            usage = Usage(last.request_tokens, sum(known) if known else None, last.cached_tokens)
        return Accounted(
            self._first_ns,
            self._last_ns,
            self._content_chunks,
            usage,
            self._finish_reason,
            self._served_model,
            self._response_id,
            self._error_type,
            None if self._answer is None else _unescape(b"".join(self._answer)),
        )


MAX_ANSWER_BYTES = 256 * 1024
"""Longer answers are not kept for session inference."""

_CONTENT = re.compile(rb'"content":\s*"((?:[^"\\]|\\.)*)"')


def _unescape(text: bytes) -> bytes | None:
    """A JSON string's inside as UTF-8 text."""
    if b"\\" not in text:
        return text
    try:
        return msgspec.json.decode(b'"%b"' % text, type=str).encode("utf-8", "surrogatepass")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class UnaryAccount:
    """Accounts for a plain (not streamed) answer of any family. Bytes pass on unchanged."""

    __slots__ = ("_bytes", "_family", "_keep_answer", "_parts", "terminal")

    def __init__(self, family: Family, *, keep_answer: bool = False) -> None:
        self._family = family
        self._parts: list[bytes] | None = []
        self._bytes = 0
        self._keep_answer = keep_answer
        self.terminal = False

    def feed(self, now_ns: int, data: bytes) -> bytes:
        """Keep `data` to read at the end; returns it."""
        if self._parts is not None:
            self._bytes += len(data)
            if self._bytes > MAX_UNARY_BYTES:
                self._parts = None
            else:
                self._parts.append(data)
        return data

    def eof(self, now_ns: int) -> bytes:
        """Nothing is ever held back."""
        return b""

    def result(self) -> Accounted:
        """The counts of the whole body; empty when it is not readable."""
        if not self._parts:
            return Accounted()
        payload = read_payload(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
        if payload is None:
            return Accounted()
        usage = None
        if payload.usage is not None:
            usage = usage_of(payload.usage, self._family)
            if usage.request_tokens is None and (usage.response_tokens is None or self._family in POOLING_FAMILIES):
                usage = None
        finish = payload.stop_reason
        answer = None
        if payload.choices:
            finish = payload.choices[0].finish_reason
            if self._keep_answer:
                message = payload.choices[0].message
                if message is not None and message.content is not None:
                    answer = message.content.encode("utf-8", "surrogatepass")
        elif self._family is Family.RESPONSES:
            finish = payload.status
        return Accounted(
            usage=usage,
            finish_reason=finish,
            served_model=payload.model,
            response_id=payload.id,
            error_type=error_type_of(payload),
            answer=answer,
        )


class NoAccount:
    """For answers whose insides are not read: only the bytes pass."""

    __slots__ = ("terminal",)

    def __init__(self) -> None:
        self.terminal = False

    def feed(self, now_ns: int, data: bytes) -> bytes:
        """Returns `data`."""
        return data

    def eof(self, now_ns: int) -> bytes:
        """Nothing is ever held back."""
        return b""

    def result(self) -> Accounted:
        """Nothing is known."""
        return Accounted()


Account = StreamAccount | UnaryAccount | NoAccount
