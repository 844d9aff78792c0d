"""Streams in the exact shapes of vLLM 0.32, OpenAI, Azure and Anthropic, written by hand."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.cuts import CUTS, every_byte, pieces_at
from wire.accounting import (
    MAX_ANSWER_BYTES,
    MAX_UNARY_BYTES,
    Accounted,
    NoAccount,
    StreamAccount,
    UnaryAccount,
)
from wire.shapes import Family, Usage

DONE = b"data: [DONE]\n\n"


def event(payload: Any, *, name: str = "", spaces: bool = False) -> bytes:
    """An event as vLLM writes it; `spaces` as Python's json does by default, after colons and commas."""
    data = json.dumps(payload, ensure_ascii=False, separators=None if spaces else (",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def typed(payload: dict[str, Any]) -> bytes:
    """An event of the Responses API or Anthropic's, named by its type."""
    return event(payload, name=payload["type"])


def chunk(delta: dict[str, Any] | None, finish: str | None = None, *, index: int = 0, **more: Any) -> bytes:
    """A chat chunk; without a choice for a delta of None."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    return event({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1795260012, "model": "tiny",
        "choices": [] if delta is None else [choice], **more,
    })  # fmt: skip


def text_chunk(text: str | None, finish: str | None = None, *, index: int = 0, **more: Any) -> bytes:
    """A completion chunk; without a choice for a text of None."""
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return event({
        "id": "cmpl-1", "object": "text_completion", "created": 1795260012, "model": "tiny",
        "choices": [] if text is None else [choice], **more,
    })  # fmt: skip


def usage(request: int, response: int) -> dict[str, int]:
    return {"prompt_tokens": request, "total_tokens": request + response, "completion_tokens": response}


ROLE = chunk({"role": "assistant", "content": ""})
USAGE = chunk(None, usage=usage(4, 3))
KNOWN: dict[str, Any] = {"served_model": "tiny", "response_id": "chatcmpl-1"}
KNOWN_TEXT: dict[str, Any] = {"served_model": "tiny", "response_id": "cmpl-1"}


def feed_all(account: StreamAccount, pieces: list[bytes]) -> tuple[bytes, Accounted]:
    """Feed the pieces at 10, 20, 30 ... ns; returns what was passed on and the result."""
    passed = b"".join([account.feed(10 * number, piece) for number, piece in enumerate(pieces, 1)])
    passed += account.eof(10 * len(pieces))
    return passed, account.result()


def account_for(events: list[bytes], family: Family = Family.CHAT, **options: bool) -> Accounted:
    """The account of a stream whose events arrive one by one, at 10, 20, 30 ... ns."""
    passed, accounted = feed_all(StreamAccount(family, **options), events)
    assert passed == b"".join(events) or options.get("strip_usage")
    return accounted


CHAT_STREAMS: list[tuple[str, list[bytes], Accounted]] = [
    (
        "vLLM, with usage",
        [ROLE, chunk({"content": "Hi"}), chunk({"content": " there"}), chunk({"content": "!"}, "stop"), USAGE, DONE],
        Accounted(20, 40, 3, Usage(4, 3), "stop", **KNOWN),
    ),
    (
        "no usage at all: the chunks are an estimate",
        [ROLE, chunk({"content": "Hi"}), chunk({"content": " there"}), chunk({"content": "!"}, "stop"), DONE],
        Accounted(20, 40, 3, None, "stop", **KNOWN),
    ),
    (
        "vLLM sends an empty text for a token that shows nothing yet",
        [
            ROLE,
            chunk({"content": ""}),
            chunk({"content": "é"}),
            chunk({"content": ""}),
            chunk({"content": ""}, "length"),
            DONE,
        ],
        Accounted(20, 50, 4, None, "length", **KNOWN),
    ),
    (
        "several tokens in a chunk",
        [
            ROLE,
            chunk({"content": "one two three"}),
            chunk({"content": " four five"}, "stop"),
            chunk(None, usage=usage(9, 5)),
        ],
        Accounted(20, 30, 2, Usage(9, 5), "stop", **KNOWN),
    ),
    (
        "OpenAI: null usage on every chunk, and a finish chunk of its own",
        [
            chunk({"role": "assistant", "content": "", "refusal": None}, usage=None),
            chunk({"content": "Hi"}, usage=None),
            chunk({"content": "!"}, usage=None),
            chunk({}, "stop", usage=None),
            chunk(None, usage=usage(4, 2) | {"prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0}}),
            DONE,
        ],
        Accounted(20, 30, 2, Usage(4, 2, 3), "stop", **KNOWN),
    ),
    (
        "OpenAI: padding that differs in each event",
        [ROLE, *[chunk({"content": "a"}, obfuscation="x" * n) for n in range(20)], chunk({}, "stop"), DONE],
        Accounted(20, 210, 20, None, "stop", **KNOWN),
    ),
    (
        "two choices: their events come in any order",
        [
            ROLE,
            chunk({"role": "assistant", "content": ""}, index=1),
            chunk({"content": "a"}),
            chunk({"content": "b"}, index=1),
            chunk({"content": "c"}),
            chunk({"content": "d"}, "stop", index=1),
            chunk({"content": "e"}, "length"),
            chunk(None, usage=usage(4, 5)),
        ],
        Accounted(30, 70, 5, Usage(4, 5), "length", **KNOWN),
    ),
    (
        "the role of the second choice comes late, and is no content",
        [ROLE, chunk({"content": "a"}), chunk({"role": "assistant", "content": ""}, index=1), DONE],
        Accounted(20, 20, 1, None, None, **KNOWN),
    ),
    (
        "continuous usage is cumulative, for each choice; here cut off before the total",
        [
            chunk({"role": "assistant", "content": ""}, usage=usage(4, 0)),
            chunk({"content": "a"}, usage=usage(4, 1)),
            chunk({"content": "b"}, index=1, usage=usage(4, 1)),
            chunk({"content": "c"}, usage=usage(4, 3)),
            chunk({"content": "d"}, index=1, usage=usage(4, 4)),
        ],
        Accounted(20, 50, 4, Usage(4, 7), None, **KNOWN),
    ),
    (
        "continuous usage with its total at the end",
        [
            chunk({"content": "a"}, usage=usage(4, 1)),
            chunk({"content": "b"}, "stop", usage=usage(4, 2)),
            chunk({"content": "c"}, "stop", index=1, usage=usage(4, 1)),
            chunk(None, usage=usage(4, 3)),
            DONE,
        ],
        Accounted(10, 30, 3, Usage(4, 3), "stop", **KNOWN),
    ),
    (
        "usage on the last chunk of content itself",
        [ROLE, chunk({"content": "a"}), chunk({"content": "b"}, "stop", usage=usage(4, 2)), DONE],
        Accounted(20, 30, 2, Usage(4, 2), "stop", **KNOWN),
    ),
    (
        "reasoning, then an answer",
        [
            ROLE,
            chunk({"reasoning": "Hm"}),
            chunk({"reasoning": "."}),
            chunk({"content": "Yes"}),
            chunk({"content": ""}, "stop"),
        ],
        Accounted(20, 50, 4, None, "stop", **KNOWN),
    ),
    (
        "reasoning as DeepSeek names it",
        [
            chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
            chunk({"content": None, "reasoning_content": "Hm"}),
            chunk({"content": None, "reasoning_content": "."}),
            chunk({"content": "Yes", "reasoning_content": None}),
        ],
        Accounted(20, 40, 3, None, None, **KNOWN),
    ),
    (
        "a tool call",
        [
            ROLE,
            chunk(
                {
                    "tool_calls": [
                        {"id": "call_1", "type": "function", "index": 0, "function": {"name": "look", "arguments": ""}}
                    ]
                }
            ),
            *[
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})
                for text in ('{"', "city", '": "', "Oslo", '"}')
            ],
            chunk({"content": ""}, "tool_calls"),
            USAGE,
        ],
        Accounted(20, 80, 7, Usage(4, 3), "tool_calls", **KNOWN),
    ),
    (
        "a tool call that begins beside the role, as OpenAI's do",
        [
            chunk(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}],
                }
            )
        ],
        Accounted(10, 10, 1, None, None, **KNOWN),
    ),
    (
        "a refusal",
        [chunk({"role": "assistant", "content": "", "refusal": None}), chunk({"refusal": "No"}), chunk({}, "stop")],
        Accounted(20, 20, 1, None, "stop", **KNOWN),
    ),
    (
        "content beside the role, in every chunk",
        [
            chunk({"role": "assistant", "content": "a"}),
            chunk({"role": "assistant", "content": "b"}),
            chunk({"role": "assistant", "content": ""}, "stop"),
        ],
        Accounted(10, 20, 2, None, "stop", **KNOWN),
    ),
    (
        "content as a list of parts",
        [chunk({"content": [{"type": "text", "text": "a"}]}), chunk({"content": [{"type": "text", "text": "b"}]})],
        Accounted(10, 20, 2, None, None, **KNOWN),
    ),
    (
        "Azure: an event of no choices and no usage, and an empty model",
        [
            event(
                {
                    "choices": [],
                    "created": 0,
                    "id": "",
                    "model": "",
                    "object": "",
                    "prompt_filter_results": [{"prompt_index": 0}],
                }
            ),
            ROLE,
            chunk({"content": "a"}),
            chunk({}, "stop"),
        ],
        Accounted(30, 30, 1, None, "stop", **KNOWN),
    ),
    (
        "a text that looks like what the accounting reads",
        [
            ROLE,
            chunk({"content": 'a","finish_reason":"stop"},"usage":{}'}),
            chunk({"content": "[DONE]"}),
            chunk({"content": "\\"}),
        ],
        Accounted(20, 40, 3, None, None, **KNOWN),
    ),
    (
        "an error within",
        [
            ROLE,
            chunk({"content": "a"}),
            event({"error": {"message": "no", "type": "InternalServerError", "param": None, "code": 500}}),
            DONE,
        ],
        Accounted(20, 20, 1, None, None, "tiny", "chatcmpl-1", "InternalServerError"),
    ),
    ("pings", [b": ping\n\n", ROLE, b": ping\n\n", chunk({"content": "a"})], Accounted(40, 40, 1, None, None, **KNOWN)),
    (
        "rubbish",
        [b"data: {\n\n", b"data: \xff\n\n", b"\n\n", b"event: x\n\n", b"data: [1]\n\n", b"\0\r\r\n"],
        Accounted(),
    ),
    ("nothing", [], Accounted()),
]


@pytest.mark.parametrize(
    ("events", "expected"), [row[1:] for row in CHAT_STREAMS], ids=[row[0] for row in CHAT_STREAMS]
)
def test_chat_streams(events: list[bytes], expected: Accounted) -> None:
    assert account_for(events) == expected


@pytest.mark.parametrize("events", [row[1] for row in CHAT_STREAMS], ids=[row[0] for row in CHAT_STREAMS])
def test_how_a_stream_is_framed_makes_no_difference(events: list[bytes]) -> None:
    plain = without_times(account_for(events))
    stream = b"".join(events)
    for spelling in (stream.replace(b"\n", b"\r\n"), stream.replace(b"\n", b"\r"), stream.replace(b"data: ", b"data:")):
        assert without_times(feed_all(StreamAccount(Family.CHAT), [spelling])[1]) == plain
        assert without_times(feed_all(StreamAccount(Family.CHAT), every_byte(spelling))[1]) == plain


def without_times(accounted: Accounted) -> Accounted:
    return msgspec.structs.replace(accounted, first_chunk_ns=None, last_chunk_ns=None)


def test_white_space_inside_the_json_makes_no_difference() -> None:
    payloads = [json.loads(data[6:]) for data in (ROLE, chunk({"content": "a"}), chunk({"content": "b"}), USAGE)]
    spaced = [event(payload, spaces=True) for payload in payloads]
    assert b'"choices": []' in spaced[-1]
    assert account_for(spaced) == Accounted(20, 30, 2, Usage(4, 3), None, **KNOWN)
    assert feed_all(StreamAccount(Family.CHAT, strip_usage=True), spaced)[0] == b"".join(spaced[:-1])


def test_completion_streams() -> None:
    events = [
        text_chunk("Hi"),
        text_chunk(""),
        text_chunk("b", index=1),
        text_chunk("!", "length"),
        text_chunk("", "stop", index=1),
        text_chunk(None, usage=usage(2, 5)),
        DONE,
    ]
    assert account_for(events, Family.COMPLETIONS) == Accounted(10, 50, 5, Usage(2, 5), "stop", **KNOWN_TEXT)
    assert account_for(events[:3], Family.COMPLETIONS) == Accounted(10, 30, 3, None, None, **KNOWN_TEXT)


def test_transcription_streams() -> None:
    def part(delta: dict[str, Any], **more: Any) -> bytes:
        return event({"id": "trsc-1", "object": "transcription.chunk", "created": 1, "model": "w",
                      "choices": [{"delta": delta, **more}]})  # fmt: skip

    vllm = [
        part({"content": " one"}),
        part({"content": " two"}, finish_reason="stop", stop_reason=None),
        event(
            {
                "id": "trsc-1",
                "object": "transcription.chunk",
                "created": 1,
                "choices": [],
                "model": "w",
                "usage": usage(200, 4),
            }
        ),
        DONE,
    ]
    assert account_for(vllm, Family.AUDIO) == Accounted(10, 20, 2, Usage(200, 4), "stop", "w", "trsc-1")
    openai = [
        event({"type": "transcript.text.delta", "delta": "one", "logprobs": []}),
        event({"type": "transcript.text.delta", "delta": " two", "logprobs": []}),
        event(
            {
                "type": "transcript.text.done",
                "text": "one two",
                "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 5, "total_tokens": 19},
            }
        ),
    ]
    assert account_for(openai, Family.AUDIO) == Accounted(10, 20, 2, Usage(14, 5))


# --- the usage event that the gateway asked for ---------------------------------------------------------------------

KEPT_EVENTS = [
    # Not the extra event, and so passed on.
    ROLE,
    chunk({"content": "a"}),
    chunk({"content": 'b"c'}),
    chunk({"content": "e"}, usage=usage(4, 3)),
    chunk(None),
    chunk(None, usage=None),
    event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
    event({"usage": usage(4, 3)}),
    event({"error": {"message": "no", "type": "x"}, "usage": usage(1, 1)}),
    b": ping\n\n",
    b'data: {"choices":[],"usage":\n\n',
    b"data: [1]\n\n",
    DONE,
]
EXTRA_EVENTS = [
    USAGE,
    chunk(None, usage=usage(0, 0)),
    event({"choices": [], "usage": usage(4, 3)}, spaces=True),
    b'data:{"usage":{},"choices":[]}\r\n\r\n',
    b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":1}}\n\n',
]


@pytest.mark.parametrize("kept", KEPT_EVENTS, ids=range(len(KEPT_EVENTS)))
def test_only_the_extra_event_is_taken_out(kept: bytes) -> None:
    for extra in EXTRA_EVENTS:
        stream = [kept, extra, kept]
        assert feed_all(StreamAccount(Family.CHAT, strip_usage=True), stream)[0] == kept + kept
        assert feed_all(StreamAccount(Family.CHAT), stream)[0] == b"".join(stream)


PRINT: dict[str, Any] = {"system_fingerprint": "vllm-0.32.0-ab12"}
ENDS: list[tuple[str, list[bytes], list[bytes]]] = [
    (
        "vLLM moves its fingerprint into the usage event; without usage it ends the choice",
        [ROLE, chunk({"content": "a"}), chunk({"content": "b"}, "stop"), chunk(None, usage=usage(4, 2), **PRINT), DONE],
        [ROLE, chunk({"content": "a"}), chunk({"content": "b"}, "stop", **PRINT), DONE],
    ),
    (
        "no fingerprint: nothing is added",
        [ROLE, chunk({"content": "a"}, "stop"), USAGE, DONE],
        [ROLE, chunk({"content": "a"}, "stop"), DONE],
    ),
    (
        "one that is there already stays",
        [chunk({"content": "a"}, "stop", system_fingerprint="fp_1"), chunk(None, usage=usage(4, 1), **PRINT), DONE],
        [chunk({"content": "a"}, "stop", system_fingerprint="fp_1"), DONE],
    ),
    (
        "each choice's end carries it",
        [
            chunk({"content": "a"}, "stop"),
            chunk({"content": "b"}, "length", index=1),
            chunk(None, usage=usage(4, 2), **PRINT),
            DONE,
        ],
        [chunk({"content": "a"}, "stop", **PRINT), chunk({"content": "b"}, "length", index=1, **PRINT), DONE],
    ),
    (
        "an upstream that sends no usage: the end waits for what follows it",
        [chunk({"content": "a"}, "stop"), DONE],
        [chunk({"content": "a"}, "stop"), DONE],
    ),
    (
        "a stream that breaks off after a choice's end",
        [chunk({"content": "a"}, "stop")],
        [chunk({"content": "a"}, "stop")],
    ),
    (
        "a usage of its own in the event that ends the choice",
        [chunk({"content": "d"}, "stop", usage=usage(4, 3)), DONE],
        [chunk({"content": "d"}, "stop", usage=usage(4, 3)), DONE],
    ),
    (
        "a server whose every chunk has a finish reason: nothing waits for long",
        [
            chunk({"content": "a"}, "stop"),
            chunk({"content": "b"}, "stop"),
            chunk({"content": "c"}, "stop"),
            USAGE,
            DONE,
        ],
        [chunk({"content": "a"}, "stop"), chunk({"content": "b"}, "stop"), chunk({"content": "c"}, "stop"), DONE],
    ),
    (
        "completions",
        [text_chunk("a"), text_chunk("b", "length"), text_chunk(None, usage=usage(4, 2), **PRINT), DONE],
        [text_chunk("a"), text_chunk("b", "length", **PRINT), DONE],
    ),
]


@pytest.mark.parametrize(("events", "expected"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS])
@given(at=CUTS)
def test_a_choice_ends_as_it_would_without_usage(events: list[bytes], expected: list[bytes], at: list[int]) -> None:
    for pieces in (events, [b"".join(events)], every_byte(b"".join(events)), pieces_at(b"".join(events), at)):
        assert feed_all(StreamAccount(Family.CHAT, strip_usage=True), pieces)[0] == b"".join(expected)
        assert feed_all(StreamAccount(Family.CHAT), pieces)[0] == b"".join(events)


def test_an_event_that_ends_a_choice_waits_no_longer_than_for_the_next_event() -> None:
    account = StreamAccount(Family.CHAT, strip_usage=True)
    end = chunk({"content": "b"}, "stop")
    assert account.feed(10, ROLE) == ROLE
    assert account.feed(20, end) == b""
    assert account.feed(30, b": ping\n\n") == end + b": ping\n\n"


def arguments_chunk(text: str) -> bytes:
    """What comes of a tool call after its first event."""
    return chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})


EVENTS = st.one_of(
    st.sampled_from(KEPT_EVENTS),
    st.sampled_from(EXTRA_EVENTS),
    st.text("ab\"\\\n\u2028é😀", max_size=4).map(lambda text: chunk({"content": text})),
    st.text("ab\"\\", max_size=4).map(lambda text: chunk({"content": text}, index=1)),
    st.text("ab\"\\", max_size=4).map(arguments_chunk),
    st.text("ab\"\\", max_size=4).map(text_chunk),
    # A line that ends within a string is no JSON, however alike its surroundings are to those of an earlier event.
    st.sampled_from([b"\n", b"\r", b"a\nb", b"\0"]).map(lambda raw: chunk({"content": "~"}).replace(b"~", raw)),
)  # fmt: skip


@given(events=st.lists(EVENTS, max_size=12), at=CUTS, keep_answer=st.booleans(), crlf=st.booleans())
def test_any_cut_passes_on_the_same_bytes_and_counts_the_same(
    events: list[bytes], at: list[int], keep_answer: bool, crlf: bool
) -> None:
    if crlf:
        events = [event.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") for event in events]
    extras = {
        extra for event in EXTRA_EVENTS for extra in (event, event.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    }
    stream = b"".join(events)
    kept = b"".join(event for event in events if event not in extras)

    whole = StreamAccount(Family.CHAT, strip_usage=True, keep_answer=keep_answer)
    assert feed_all(whole, [stream])[0] == kept
    expected = without_times(whole.result())
    for pieces in (pieces_at(stream, at), events):
        for strip_usage in (True, False):
            account = StreamAccount(Family.CHAT, strip_usage=strip_usage, keep_answer=keep_answer)
            passed, accounted = feed_all(account, pieces)
            assert passed == (kept if strip_usage else stream)
            assert without_times(accounted) == expected
            assert account.terminal is whole.terminal


TEXTS = st.text('ab"\\\n\u2028é😀', max_size=4)
CHUNKS = st.one_of(
    TEXTS.map(lambda text: chunk({"content": text})),
    TEXTS.map(lambda text: chunk({"content": text, "reasoning": None})),
    TEXTS.map(lambda text: chunk({"role": "assistant", "content": text})),
    TEXTS.map(lambda text: chunk({"content": text}, "stop")),
    TEXTS.map(lambda text: chunk({"content": text}, "length")),
    TEXTS.map(lambda text: chunk({"reasoning": text, "content": text})),
    TEXTS.map(lambda text: chunk({"content": None, "reasoning_content": text})),
    TEXTS.map(lambda text: chunk({"content": [{"type": "text", "text": text}]})),
    TEXTS.map(arguments_chunk),
    TEXTS.map(lambda text: chunk({"content": text}, usage=usage(4, len(text)))),
    st.sampled_from([ROLE, chunk({}), chunk({}, "stop"), chunk(None)]),
)


@given(events=st.lists(CHUNKS, max_size=20), as_ascii=st.booleans())
@example(events=[chunk({"content": "a"}, finish) for finish in ("stop", "length", "stop")], as_ascii=False)
@example(events=[chunk({"reasoning": text, "content": "a"}) for text in "ab"], as_ascii=False)
def test_an_event_counted_unread_counts_as_if_it_were_read(events: list[bytes], as_ascii: bool) -> None:
    if as_ascii:
        events = [
            b"data: " + json.dumps(json.loads(data[6:]), separators=(",", ":")).encode() + b"\n\n" for data in events
        ]
    chunks, finish, answer, tokens = 0, None, "", None
    for data in events:
        read = json.loads(data[6:])
        for choice in read["choices"]:
            delta = choice["delta"]
            parts = [delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls")]
            chunks += any(parts) or ("role" not in delta and any(part is not None for part in parts))
            finish = choice["finish_reason"] or finish
            answer += delta["content"] if isinstance(delta.get("content"), str) else ""
        tokens = read.get("usage", {}).get("completion_tokens", tokens)
    accounted = account_for(events, keep_answer=True)
    assert (accounted.content_chunks, accounted.finish_reason, accounted.answer) == (chunks, finish, answer.encode())
    assert (accounted.usage and accounted.usage.response_tokens) == tokens


RUN_ENDS = [
    b"",
    chunk({"content": "a"})[:-20],
    chunk({"content": "a"})[:30],
    chunk({}, "stop"),
    chunk({"content": "a"}, index=1) + chunk({"content": "b"}),
    b": a comment\n\n",
    b"data: {broken\n\n",
]


@pytest.mark.parametrize("end", RUN_ENDS)
@pytest.mark.parametrize("texts", [["b", "c"], ["b"], ['q"', "\\", "\n", "é\u2028"], ["", ""]])
def test_many_events_in_one_piece_count_as_they_do_one_by_one(texts: list[str], end: bytes) -> None:
    first = [ROLE, chunk({"content": "a"})]
    run = [chunk({"content": text}) for text in texts]
    for strip_usage in (True, False):
        apart = StreamAccount(Family.CHAT, strip_usage=strip_usage, keep_answer=True)
        together = StreamAccount(Family.CHAT, strip_usage=strip_usage, keep_answer=True)
        expected = feed_all(apart, [*first, *run, end])
        passed, accounted = feed_all(together, [*first, b"".join(run) + end])
        assert passed == expected[0]
        assert without_times(accounted) == without_times(expected[1])
        assert accounted.content_chunks >= 1 + len(texts)
        assert (accounted.answer or b"").decode().startswith("a" + "".join(texts))


def test_an_event_behind_a_broken_one_is_a_part_of_it() -> None:
    account = StreamAccount(Family.CHAT, strip_usage=True)
    account.feed(1, chunk({"content": "a"}))
    assert account.feed(2, b": no end") == b""
    assert account.feed(3, chunk({"content": "a"})) == b": no end" + chunk({"content": "a"})
    assert account.result().content_chunks == 1


def test_a_stream_whose_events_all_differ_takes_bounded_memory() -> None:
    account = StreamAccount(Family.CHAT)
    tracemalloc.start()
    try:
        for number in range(500):
            account.feed(0, chunk({"content": "a"}, padding=f"{number:2000}"))
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_an_answer_that_is_too_long_is_not_kept() -> None:
    events = [chunk({"content": "x" * 1000})] * (MAX_ANSWER_BYTES // 1000)
    assert account_for(events, keep_answer=True).answer == b"x" * 1000 * len(events)
    assert account_for([*events, *events[:2]], keep_answer=True).answer is None
    assert account_for(events).answer is None


def test_what_does_not_wait_for_its_end_passes_at_once() -> None:
    account = StreamAccount(Family.CHAT, strip_usage=True)
    assert account.feed(1, ROLE + USAGE[:30]) == ROLE
    assert account.feed(2, USAGE[30:-1]) == b""
    assert account.feed(3, USAGE[-1:] + DONE) == DONE
    assert account.feed(4, b"data: half") == b""
    assert account.eof(5) == b"data: half"
    # Where nothing is to be taken out, nothing waits.
    account = StreamAccount(Family.CHAT)
    assert account.feed(1, b"data: half") == b"data: half"
    assert account.eof(2) == b""


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_stream_that_ends_without_its_blank_line(end: bytes) -> None:
    account = StreamAccount(Family.CHAT, strip_usage=True)
    assert feed_all(account, [ROLE, b"data: [DONE]" + end])[0] == ROLE + b"data: [DONE]" + end
    assert account.terminal
    passed, accounted = feed_all(StreamAccount(Family.CHAT, strip_usage=True), [ROLE, USAGE[:-2] + end])
    assert (passed, accounted.usage) == (ROLE, Usage(4, 3))


# --- the Responses API ----------------------------------------------------------------------------------------------


def response(kind: str, status: str, reported: Any = None, **more: Any) -> bytes:
    tool = {"type": "function", "name": "f", "parameters": {"choices": [{"text": "a"}]}}
    body = {"id": "resp_1", "model": "tiny", "object": "response", "status": status, "usage": reported, "error": None,
            "output": [], "tools": [tool]}  # fmt: skip
    return typed({"response": body | more, "sequence_number": 0, "type": kind})


def delta(kind: str, text: str, number: int) -> bytes:
    return typed({"content_index": 0, "delta": text, "item_id": "msg_1", "output_index": 0, "sequence_number": number,
                  "type": kind})  # fmt: skip


RESPONSE_USAGE = {
    "input_tokens": 4,
    "input_tokens_details": {"cached_tokens": 1},
    "output_tokens": 9,
    "total_tokens": 13,
}
RESPONSE_STREAM = [
    response("response.created", "in_progress"),
    response("response.in_progress", "in_progress"),
    typed({"type": "response.output_item.added", "item": {"type": "message", "content": []}, "output_index": 0}),
    delta("response.reasoning_text.delta", "Hm", 3),
    delta("response.output_text.delta", "Hi", 4),
    delta("response.function_call_arguments.delta", "{}", 5),
    typed({"type": "response.output_text.done", "text": "Hi", "output_index": 0}),
]
KNOWN_RESPONSE: dict[str, Any] = {"served_model": "tiny", "response_id": "resp_1"}
RESPONSE_ENDS: list[tuple[list[bytes], Accounted, bool]] = [
    (
        [response("response.completed", "completed", RESPONSE_USAGE)],
        Accounted(40, 60, 3, Usage(4, 9, 1), "completed", **KNOWN_RESPONSE),
        True,
    ),
    # vLLM calls the event completed, and says incomplete inside.
    (
        [response("response.completed", "incomplete", RESPONSE_USAGE)],
        Accounted(40, 60, 3, Usage(4, 9, 1), "incomplete", **KNOWN_RESPONSE),
        True,
    ),
    (
        [response("response.incomplete", "incomplete", RESPONSE_USAGE)],
        Accounted(40, 60, 3, Usage(4, 9, 1), "incomplete", **KNOWN_RESPONSE),
        True,
    ),
    (
        [response("response.failed", "failed", error={"code": "server_error", "message": "no"})],
        Accounted(40, 60, 3, None, "failed", "tiny", "resp_1", "server_error"),
        True,
    ),
    (
        [typed({"type": "error", "code": "server_error", "message": "no", "param": None, "sequence_number": 6})],
        Accounted(40, 60, 3, None, None, "tiny", "resp_1", "server_error"),
        False,
    ),
    ([], Accounted(40, 60, 3, None, None, **KNOWN_RESPONSE), False),
]


@pytest.mark.parametrize(("end", "expected", "is_terminal"), RESPONSE_ENDS)
def test_responses_streams(end: list[bytes], expected: Accounted, is_terminal: bool) -> None:
    account = StreamAccount(Family.RESPONSES)
    stream = RESPONSE_STREAM + end
    assert feed_all(account, stream) == (b"".join(stream), expected)
    assert account.terminal is is_terminal


# --- Anthropic's messages -------------------------------------------------------------------------------------------


def message_start(**reported: int) -> bytes:
    return typed({"type": "message_start", "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "tiny", "stop_reason": None,
        "stop_sequence": None, "usage": reported}})  # fmt: skip


def block_delta(kind: str, **parts: str) -> bytes:
    return typed({"type": "content_block_delta", "index": 0, "delta": {"type": kind, **parts}})


MESSAGE_STREAM = [
    message_start(input_tokens=4, cache_read_input_tokens=10, cache_creation_input_tokens=100, output_tokens=1),
    typed({"type": "ping"}),
    typed({"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}}),
    block_delta("thinking_delta", thinking="Hm"),
    block_delta("signature_delta", signature="c2ln"),  # no token
    typed({"type": "content_block_stop", "index": 0}),
    block_delta("text_delta", text="Hi"),
    block_delta("text_delta", text=" there"),
    block_delta("input_json_delta", partial_json='{"a"'),
]
STOP = typed({"type": "message_stop"})
KNOWN_MESSAGE: dict[str, Any] = {"served_model": "tiny", "response_id": "msg_1"}
MESSAGE_ENDS: list[tuple[list[bytes], Accounted, int | None, bool]] = [
    (
        [
            typed(
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                    "usage": {"output_tokens": 9},
                }
            ),
            STOP,
        ],
        Accounted(40, 90, 4, Usage(114, 9, 10), "end_turn", **KNOWN_MESSAGE),
        9,
        True,
    ),
    # vLLM repeats the input at the end.
    (
        [
            typed(
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": "max_tokens"},
                    "usage": {"input_tokens": 5, "output_tokens": 9},
                }
            )
        ],
        Accounted(40, 90, 4, Usage(5, 9, 10), "max_tokens", **KNOWN_MESSAGE),
        9,
        False,
    ),
    # Cut off: the output count of the start is from before any output, so the chunks are the estimate.
    ([], Accounted(40, 90, 4, Usage(114, None, 10), None, **KNOWN_MESSAGE), 4, False),
    (
        [typed({"type": "error", "error": {"type": "overloaded_error", "message": "no"}})],
        Accounted(40, 90, 4, Usage(114, None, 10), None, "tiny", "msg_1", "overloaded_error"),
        4,
        False,
    ),
]


@pytest.mark.parametrize(("end", "expected", "tokens", "is_terminal"), MESSAGE_ENDS)
def test_messages_streams(end: list[bytes], expected: Accounted, tokens: int | None, is_terminal: bool) -> None:
    account = StreamAccount(Family.MESSAGES)
    stream = MESSAGE_STREAM + end
    assert feed_all(account, stream) == (b"".join(stream), expected)
    assert expected.response_tokens == tokens
    assert account.terminal is is_terminal


def test_a_message_cut_off_before_any_output_has_unknown_tokens() -> None:
    accounted = account_for(MESSAGE_STREAM[:2], Family.MESSAGES)
    assert accounted == Accounted(usage=Usage(114, None, 10), **KNOWN_MESSAGE)
    assert accounted.response_tokens is None


TERMINAL = [
    (Family.CHAT, [ROLE, chunk({"content": "a"}, "stop"), USAGE], False),
    (Family.CHAT, [DONE], True),
    (Family.CHAT, [b"data:[DONE]\n\n"], True),
    (Family.CHAT, [b"data: [DONE] \n\n"], True),  # as the openai SDK reads it
    (Family.CHAT, [b"data: [DONE]\r\n\r\n"], True),
    (Family.CHAT, [chunk({"content": "[DONE]"})], False),
    (Family.MESSAGES, [STOP], True),
    (Family.RESPONSES, [b"data: [DONE]\n\n"], True),
]


@pytest.mark.parametrize(("family", "events", "is_terminal"), TERMINAL)
def test_the_event_that_ends_an_answer(family: Family, events: list[bytes], is_terminal: bool) -> None:
    account = StreamAccount(family)
    assert not account.terminal
    feed_all(account, events)
    assert account.terminal is is_terminal


@given(data=st.lists(st.binary(max_size=30) | EVENTS, max_size=6), family=st.sampled_from(Family), strip=st.booleans())
def test_accounting_raises_for_no_bytes(data: list[bytes], family: Family, strip: bool) -> None:
    feed_all(StreamAccount(family, strip_usage=strip, keep_answer=True), data)
    unary = UnaryAccount(family, keep_answer=True)
    assert [unary.feed(0, piece) for piece in data] == data
    assert unary.eof(0) == b""
    unary.result()


# --- answers that are no streams ------------------------------------------------------------------------------------

UNARY: list[tuple[str, Family, Any, Accounted]] = [
    (
        "chat",
        Family.CHAT,
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "tiny",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hi", "refusal": None, "reasoning": None},
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ],
            "usage": usage(4, 3) | {"prompt_tokens_details": {"cached_tokens": 2}},
        },
        Accounted(usage=Usage(4, 3, 2), finish_reason="length", answer=b"Hi", **KNOWN),
    ),
    (
        "chat, tool calls",
        Family.CHAT,
        {
            "id": "chatcmpl-1",
            "model": "tiny",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None, "tool_calls": [{}]},
                    "finish_reason": "tool_calls",
                }
            ],
        },
        Accounted(finish_reason="tool_calls", **KNOWN),
    ),
    (
        "completions",
        Family.COMPLETIONS,
        {
            "id": "cmpl-1",
            "model": "tiny",
            "choices": [{"index": 0, "text": "a", "finish_reason": "stop"}],
            "usage": usage(2, 3),
        },
        Accounted(usage=Usage(2, 3), finish_reason="stop", answer=b"a", **KNOWN_TEXT),
    ),
    (
        "responses",
        Family.RESPONSES,
        {
            "id": "resp_1",
            "object": "response",
            "model": "tiny",
            "status": "incomplete",
            "error": None,
            "usage": RESPONSE_USAGE,
        },
        Accounted(usage=Usage(4, 9, 1), finish_reason="incomplete", **KNOWN_RESPONSE),
    ),
    (
        "messages",
        Family.MESSAGES,
        {
            "id": "msg_1",
            "type": "message",
            "content": [{"type": "text", "text": "Hi"}],
            "model": "tiny",
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 4, "cache_read_input_tokens": 6, "output_tokens": 3},
        },
        Accounted(usage=Usage(10, 3, 6), finish_reason="end_turn", **KNOWN_MESSAGE),
    ),
    (
        "embeddings",
        Family.EMBEDDINGS,
        {
            "id": "embd-1",
            "object": "list",
            "model": "e",
            "data": [{"index": 0, "embedding": [0.5]}],
            "usage": {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0, "prompt_tokens_details": None},
        },
        Accounted(usage=Usage(6, 0), served_model="e", response_id="embd-1"),
    ),
    (
        "rerank",
        Family.RERANK,
        {"id": "rerank-1", "model": "r", "usage": {"prompt_tokens": 6, "total_tokens": 6}, "results": []},
        Accounted(usage=Usage(6, 0), served_model="r", response_id="rerank-1"),
    ),
    (
        "score",
        Family.SCORE,
        {
            "id": "score-1",
            "model": "s",
            "data": [],
            "usage": {"prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0},
        },
        Accounted(usage=Usage(6, 0), served_model="s", response_id="score-1"),
    ),
    (
        "pooling",
        Family.POOLING,
        {"model": "p", "usage": {"total_tokens": 6}},
        Accounted(usage=Usage(6, 0), served_model="p"),
    ),
    (
        "classify",
        Family.CLASSIFY,
        {"model": "c", "usage": {"prompt_tokens": 6}},
        Accounted(usage=Usage(6, 0), served_model="c"),
    ),
    ("audio by the second", Family.AUDIO, {"text": "Hi", "usage": {"type": "duration", "seconds": 7}}, Accounted()),
    (
        "audio by the token",
        Family.AUDIO,
        {"text": "Hi", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 45}},
        Accounted(usage=Usage(14, 45)),
    ),
    (
        "an error",
        Family.CHAT,
        {"error": {"message": "no", "type": "NotFoundError", "code": 404}},
        Accounted(error_type="NotFoundError"),
    ),
    ("an error of embeddings: no known 0", Family.EMBEDDINGS, {"error": {"type": "x"}}, Accounted(error_type="x")),
    ("FastAPI's error", Family.EMBEDDINGS, {"detail": "Not Found"}, Accounted()),
]


@pytest.mark.parametrize(("family", "body", "expected"), [row[1:] for row in UNARY], ids=[row[0] for row in UNARY])
def test_answers_that_are_no_streams(family: Family, body: Any, expected: Accounted) -> None:
    data = json.dumps(body).encode()
    for pieces in ([data], every_byte(data)):
        account = UnaryAccount(family, keep_answer=True)
        assert [account.feed(0, piece) for piece in pieces] == pieces
        assert account.eof(0) == b""
        assert account.result() == expected
        assert not account.terminal


@pytest.mark.parametrize("body", [b"", b"{", b"<html>", b"[]", b"null", b"\xff", b"[" * 100_000], ids=range(7))
def test_an_unreadable_answer_says_nothing(body: bytes) -> None:
    account = UnaryAccount(Family.EMBEDDINGS)
    assert account.feed(0, body) == body
    assert account.result() == Accounted()


def test_a_plain_answer_over_the_limit_is_not_held() -> None:
    account = UnaryAccount(Family.CHAT)
    body = b'{"usage":{"prompt_tokens":4,"completion_tokens":3}'
    account.feed(0, body)
    piece = b" " * (1 << 20)
    for _ in range(MAX_UNARY_BYTES >> 20):
        assert account.feed(0, piece) is piece
    account.feed(0, b"}")
    assert account.result() == Accounted()

    account = UnaryAccount(Family.CHAT)
    account.feed(0, body + b" " * (MAX_UNARY_BYTES - len(body) - 1) + b"}")
    assert account.result() == Accounted(usage=Usage(4, 3))


def test_no_account_lets_everything_pass() -> None:
    account = NoAccount()
    assert account.feed(0, DONE) == DONE
    assert account.eof(0) == b""
    assert (account.result(), account.terminal) == (Accounted(), False)


TOKENS = [
    (Accounted(), None),
    (Accounted(content_chunks=3), 3),
    (Accounted(content_chunks=3, usage=Usage(4, 5)), 5),
    (Accounted(content_chunks=3, usage=Usage(4, 0)), 0),  # the upstream's word
    (Accounted(content_chunks=3, usage=Usage(4)), 3),
    (Accounted(usage=Usage(4)), None),
]


@pytest.mark.parametrize(("accounted", "tokens"), TOKENS)
def test_the_response_tokens(accounted: Accounted, tokens: int | None) -> None:
    assert accounted.response_tokens == tokens


@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_the_text_of_a_completion_is_kept_as_a_chats_is(cut: int) -> None:
    def said(text: str) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
        return b"data: " + json.dumps({"id": "cmpl-1", "model": "tiny", "choices": [choice]}).encode() + b"\n\n"

    texts = ["one", " two", ' "three"', "\n\u00e9", "", " end"]
    data = b"".join(map(said, texts)) + DONE
    account = StreamAccount(Family.COMPLETIONS, keep_answer=True)
    for start in range(0, len(data), cut):
        account.feed(start, data[start : start + cut])
    account.eof(len(data))
    assert account.result().answer == "".join(texts).encode()
    assert account.result().content_chunks == len(texts)
