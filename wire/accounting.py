"""What one exchange cost: (now_ns, bytes) in; first and last chunk times, token counts and the finish reason out.

An account is fed the response body as it arrives and hands back the bytes to pass on: the same bytes, except that the
usage event which the gateway itself asked for is taken out. Parsing never raises. Where an event may have to be taken
out, one that is not complete yet waits, and so do those that end a choice: vLLM puts its `system_fingerprint` into them
when nobody asks for usage and into the usage event when somebody does, and it goes back to where the client expects it.

Token counts, in order of trust: the upstream's usage (`usage`; cumulative where it comes with every chunk, so the
last one counts, summed over choices), else the number of content chunks (`estimated`), else nothing (`none`).
"""

from __future__ import annotations

import enum
import re
from typing import Any

import msgspec

from wire.openai import error_type_of, read_payload, usage_of
from wire.shapes import Choice, Delta, Family, Payload, Usage
from wire.sse import SseSplitter, event_data

MAX_UNARY_BYTES = 32 * 1024 * 1024
"""A plain answer beyond this passes on unread, with unknown tokens."""

MAX_ANSWER_BYTES = 256 * 1024
"""Longer answers are not kept for session inference."""

_MAX_SHAPES = 8
_TEXT = re.compile(rb'"(content|text|reasoning|reasoning_content|arguments)":"([^"\\\x00-\x1f]*)"')
_FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"\\]*"')
_STRING = re.compile(rb'[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*')
"""The inside of a JSON string: no control byte, so that no line of an event ends within it."""
_NOT_PLAIN = re.compile(rb'["\\\x00-\x1f]')


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


class _Event(enum.Enum):
    """What an event is to a stream that the usage event is taken out of."""

    CHOICE = enum.auto()
    CHOICE_END = enum.auto()
    USAGE = enum.auto()
    OTHER = enum.auto()


class StreamAccount:
    """Accounts for a server-sent event stream of any family.

    strip_usage: the gateway asked for usage on the client's behalf; the extra event is removed.
    keep_answer: collect the answer's text (up to `MAX_ANSWER_BYTES`), of a request for one choice.

    Most events of a stream differ from an earlier one in one string. So the bytes around that string are kept (its
    shape), and an event that has the same bytes around another string is counted unread.
    """

    __slots__ = (
        "_answer",
        "_answer_bytes",
        "_by_choice",
        "_content_chunks",
        "_ended",
        "_error_type",
        "_family",
        "_finish_reason",
        "_first_ns",
        "_held",
        "_last_ns",
        "_response_id",
        "_served_model",
        "_shapes",
        "_splitter",
        "_strip",
        "_usage",
        "terminal",
    )

    def __init__(self, family: Family, *, strip_usage: bool = False, keep_answer: bool = False) -> None:
        self._family = family
        self._strip = strip_usage
        self._splitter = SseSplitter()
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._content_chunks = 0
        self._shapes: list[tuple[bytes, bytes, bool]] = []
        """What is before and after the text of a chunk, and whether that text belongs to the answer."""
        self._usage: Usage | None = None
        self._by_choice: dict[int, Usage] = {}
        self._ended = 0
        """The choice that the last CHOICE_END ended."""
        self._held: dict[int, bytes] = {}
        """Events that end a choice, by choice, until the usage event."""
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
        if not self._splitter.rest:
            if self._counts_unread(now_ns, data):
                return data
            known = self._count_run(now_ns, data)
            if known:
                return data if known == len(data) else data[:known] + self._feed_rest(now_ns, data[known:])
        return self._feed_rest(now_ns, data)

    def _feed_rest(self, now_ns: int, data: bytes) -> bytes:
        blocks = self._splitter.feed(data)
        if not self._strip:
            for block in blocks:
                self._account(now_ns, block)
            return data
        return b"".join([self._passed_on(now_ns, block) for block in blocks])

    def eof(self, now_ns: int) -> bytes:
        """Account for the end of the stream; returns what was still held back."""
        rest = self._splitter.eof()
        if not self._strip:
            if rest:
                self._account(now_ns, rest)
            return b""
        return (self._passed_on(now_ns, rest) if rest else b"") + self._release()

    def _passed_on(self, now_ns: int, block: bytes) -> bytes:
        """Count one event of a stream without its usage event; returns what to pass on in its place."""
        kind = self._account(now_ns, block)
        if kind is _Event.USAGE:
            found = _FINGERPRINT.search(block)
            return self._release(found[0] if found is not None else b"")
        if kind is _Event.CHOICE_END:
            # A choice that ends more than once: a server whose every chunk has a finish reason. Nothing waits then.
            before = self._release() if self._ended in self._held else b""
            self._held[self._ended] = block
            return before
        return self._release() + block if kind is _Event.OTHER and self._held else block

    def _release(self, fingerprint: bytes = b"") -> bytes:
        """The events held back, with the fingerprint that they would carry without usage."""
        held, self._held = self._held, {}
        return b"".join(_stamped(block, fingerprint) for block in held.values())

    def _counts_unread(self, now_ns: int, block: bytes) -> bool:
        """Count an event that differs from an earlier chunk of the answer in its text only."""
        for before, after, is_answer in self._shapes:
            if block.startswith(before) and block.endswith(after):
                text = _STRING.fullmatch(block, len(before), len(block) - len(after))
                if text is not None:
                    self._content_chunks += 1
                    self._last_ns = now_ns
                    if is_answer:
                        self._keep(text[0])
                    return True
        return False

    def _count_run(self, now_ns: int, data: bytes) -> int:
        """Count the events at the start of `data` that differ in their text only; returns how many bytes they have."""
        for before, after, is_answer in self._shapes:
            if data.startswith(before):
                texts = data[len(before) :].split(after + before)
                last, found, rest = texts.pop().partition(after)
                if found:
                    texts.append(last)
                whole = b"".join(texts)
                if _NOT_PLAIN.search(whole) and not all(map(_STRING.fullmatch, texts)):
                    continue
                if texts:
                    self._content_chunks += len(texts)
                    self._last_ns = now_ns
                    if is_answer:
                        self._keep(whole)
                # Without its end, the last one begins an event that is another, or not whole yet.
                return len(data) - len(rest) if found else len(data) - len(before) - len(last)
        return 0

    def _account(self, now_ns: int, block: bytes) -> _Event:
        """Count one event; returns what it is to a stream that the usage event is taken out of."""
        if self._counts_unread(now_ns, block):
            return _Event.CHOICE
        data = event_data(block)
        if data.startswith(b"[DONE]"):
            self.terminal = True
            return _Event.OTHER
        payload = read_payload(data) if data else None
        if payload is None:
            return _Event.OTHER
        self._learn(payload)
        if payload.choices is None:
            self._account_typed(now_ns, payload, block)
            return _Event.OTHER
        if payload.choices:
            self._account_chunk(now_ns, payload, payload.choices, block)
            self._ended = payload.choices[0].index
            return _Event.CHOICE_END if payload.choices[0].finish_reason else _Event.CHOICE
        self._merge(usage_of(payload, self._family))
        return _Event.OTHER if payload.usage is None else _Event.USAGE

    def _account_chunk(self, now_ns: int, payload: Payload, choices: list[Choice], block: bytes) -> None:
        has_output = False
        for choice in choices:
            self._finish_reason = choice.finish_reason or self._finish_reason
            has_output |= choice.has_output
        choice = choices[0]
        if has_output:
            self._chunk(now_ns)
            said = choice.delta.content if choice.delta is not None else choice.text
            if isinstance(said, str):
                self._keep(msgspec.json.encode(said)[1:-1])
        usage = usage_of(payload, self._family)
        if len(choices) > 1:
            self._merge(usage)
        elif usage is not None:
            self._by_choice[choice.index] = usage
        elif has_output and choice.finish_reason is None:
            self._learn_shape(block, choice.delta, choice.text)

    def _learn_shape(self, block: bytes, delta: Delta | None, said: Any = None) -> None:
        """Keep what surrounds the text of a chunk that is not the first of its message and says nothing else."""
        text = _TEXT.search(block)
        if text is None or len(self._shapes) == _MAX_SHAPES or (delta is not None and delta.role is not None):
            return
        content = delta.content if delta is not None else said
        is_answer = self._answer is not None and content is not None
        key = b"content" if delta is not None else b"text"
        if is_answer and (text[1] != key or text[2].decode("utf-8", "replace") != content):
            return
        start, end = text.span(2)
        self._shapes.append((block[:start], block[end:], is_answer))

    def _account_typed(self, now_ns: int, payload: Payload, block: bytes) -> None:
        """The Responses API, Anthropic messages and OpenAI's transcriptions, whose events name their type."""
        kind = payload.type or ""
        delta = payload.delta if isinstance(payload.delta, Delta) else None
        inner = payload.response or payload.message
        if inner is not None:
            self._learn(inner)
            usage = usage_of(inner, self._family)
            if usage is not None and kind == "message_start":  # its output count is from before any output
                usage = Usage(usage.request_tokens, None, usage.cached_tokens)
            self._merge(usage)
        self._merge(usage_of(payload, self._family))
        if kind.endswith(".delta") or (
            kind == "content_block_delta" and (delta is None or delta.type != "signature_delta")
        ):
            self._chunk(now_ns)
            self._learn_shape(block, delta)
        elif kind == "message_delta" and delta is not None:
            self._finish_reason = delta.stop_reason or self._finish_reason
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            status = inner.status if inner is not None else None
            self._finish_reason = status or kind.removeprefix("response.")
            self.terminal = True
        elif kind == "message_stop":
            self.terminal = True

    def _chunk(self, now_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = now_ns
        self._last_ns = now_ns
        self._content_chunks += 1

    def _learn(self, payload: Payload) -> None:
        if not self._served_model:
            self._served_model = payload.model
            self._response_id = payload.id
        self._error_type = error_type_of(payload) or self._error_type

    def _merge(self, usage: Usage | None) -> None:
        """A later report replaces what it names; Anthropic names the input at the start and the output at the end."""
        if usage is None:
            return
        old = self._usage or Usage()
        self._usage = Usage(
            usage.request_tokens if usage.request_tokens is not None else old.request_tokens,
            usage.response_tokens if usage.response_tokens is not None else old.response_tokens,
            usage.cached_tokens if usage.cached_tokens is not None else old.cached_tokens,
        )

    def _keep(self, text: bytes) -> None:
        """Add the inside of a JSON string to the answer; too much ends the keeping."""
        if self._answer is not None:
            self._answer.append(text)
            self._answer_bytes += len(text)
            if self._answer_bytes > MAX_ANSWER_BYTES:
                self._answer = None

    def result(self) -> Accounted:
        """What is known so far."""
        usage = self._usage
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
            None if self._answer is None else _unescaped(b"".join(self._answer)),
        )


def _stamped(block: bytes, fingerprint: bytes) -> bytes:
    """An event of one JSON object with the member added at its end, unless it has it."""
    end = block.rfind(b"}")
    if not fingerprint or end < 0 or _FINGERPRINT.search(block):
        return block
    return block[:end] + fingerprint + block[end:]


def _unescaped(text: bytes) -> bytes | None:
    """The inside of a JSON string as UTF-8 text; None when it is not one."""
    if b"\\" not in text:
        return text
    try:
        return msgspec.json.decode(b'"%b"' % text, type=str).encode()
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
        finish = payload.stop_reason
        answer = None
        if payload.choices:
            finish = payload.choices[0].finish_reason
            if self._keep_answer:
                message = payload.choices[0].message
                said = message.content if message is not None else payload.choices[0].text
                if isinstance(said, str):
                    answer = said.encode()
        elif self._family is Family.RESPONSES:
            finish = payload.status
        return Accounted(
            usage=usage_of(payload, self._family),
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
