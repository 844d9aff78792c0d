from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wire.openai import (
    LONG_TEXT_BYTES,
    ask_for_usage,
    cut_texts,
    error_type_of,
    family_of,
    read_form,
    read_payload,
    read_request,
    usage_of,
    with_model,
)
from wire.shapes import NO_FACTS, CutJson, Family, RequestFacts, Usage


def facts(**fields: Any) -> RequestFacts:
    return RequestFacts(is_json=True, **fields)


def without_messages(found: RequestFacts) -> RequestFacts:
    return msgspec.structs.replace(found, messages=msgspec.Raw())


# --- paths ----------------------------------------------------------------------------------------------------------

PATHS = [
    ("/v1/chat/completions", Family.CHAT),
    ("/v1/completions", Family.COMPLETIONS),
    ("/v1/responses", Family.RESPONSES),
    ("/v1/messages", Family.MESSAGES),
    ("/v1/embeddings", Family.EMBEDDINGS),
    ("/rerank", Family.RERANK),
    ("/v1/rerank", Family.RERANK),
    ("/v2/rerank", Family.RERANK),
    ("/score", Family.SCORE),
    ("/v1/score", Family.SCORE),
    ("/pooling", Family.POOLING),
    ("/classify", Family.CLASSIFY),
    ("/v1/audio/transcriptions", Family.AUDIO),
    ("/v1/audio/translations", Family.AUDIO),
    ("/v1/messages/count_tokens", Family.OTHER),
    ("/v1/models", Family.OTHER),
    ("/v1/chat/completions/", Family.OTHER),  # a redirect at vLLM
    ("/V1/completions", Family.OTHER),
    ("", Family.OTHER),
]


@pytest.mark.parametrize(("path", "family"), PATHS)
def test_the_family_of_a_path(path: str, family: Family) -> None:
    assert family_of(path) is family


# --- requests -------------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000
REQUESTS: list[tuple[bytes, RequestFacts]] = [
    (b"{}", facts()),
    (b' \t\r\n{"model":"m"}\n ', facts(model="m")),
    (b'\xef\xbb\xbf{"model":"m"}', facts(model="m")),  # a byte order mark, as json.loads takes it
    (b'{"model":"m","stream":true}', facts(model="m", stream=True)),
    (b'{"stream":false,"stream_options":{"include_usage":true}}', facts(asks_usage=True)),
    (
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        facts(stream=True, asks_usage=True, has_stream_options=True),
    ),
    (b'{"stream":true,"stream_options":{"include_usage":false}}', facts(stream=True, has_stream_options=True)),
    (b'{"stream":true,"stream_options":{}}', facts(stream=True, has_stream_options=True)),
    (b'{"stream":true,"stream_options":null}', facts(stream=True, has_stream_options=True)),
    (b'{"stream":true,"stream_options":7}', facts(stream=True, has_stream_options=True)),
    # The name written with an escape is the same name.
    (
        b'{"stream":true,"stream\\u005foptions":{"include_usage":true}}',
        facts(stream=True, asks_usage=True, has_stream_options=True),
    ),
    (b'{"stream":true,"user":"\\"stream_options\\""}', facts(stream=True)),
    (b'{"stream":true,"metadata":{"stream_options":{"include_usage":true}}}', facts(stream=True)),
    (b'{"max_tokens":7}', facts(max_tokens=7)),
    (b'{"max_tokens":7,"max_completion_tokens":8}', facts(max_tokens=8)),
    (b'{"max_output_tokens":9}', facts(max_tokens=9)),
    (b'{"max_tokens":0}', facts(max_tokens=0)),
    (b'{"max_tokens":' + b"9" * 5000 + b',"model":"m"}', facts(model="m")),  # more than any integer: unknown
    (b'{"n":3}', facts(choices=3)),
    (b'{"n":null}', facts()),
    # Of two, the last counts.
    (b'{"model":"a","model":"b","stream":true,"stream":false}', facts(model="b")),
    # What has an unexpected type counts as absent, and nothing else with it.
    (
        b'{"model":5,"stream":"yes","max_tokens":"7","n":[],"metadata":3,"stream_options":"x","prompt_cache_key":"k"}',
        facts(session_id="k"),
    ),
    (b'{"model":{"a":1},"max_tokens":12}', facts(max_tokens=12)),
    # Sessions, in the order of their precedence.
    (b'{"metadata":{"session_id":"a"},"session_id":"b","prompt_cache_key":"c"}', facts(session_id="a")),
    (b'{"metadata":{"conversation_id":"a"}}', facts(session_id="a")),
    (b'{"metadata":{"user_session_id":"a","session_id":5}}', facts(session_id="a")),
    (b'{"metadata":null,"session_id":"b","prompt_cache_key":"c","conversation":"d"}', facts(session_id="b")),
    (b'{"prompt_cache_key":"c","conversation":"d"}', facts(session_id="c")),
    (b'{"conversation":"d","previous_response_id":"r"}', facts(session_id="d", previous_response_id="r")),
    (b'{"conversation":{"id":"d"}}', facts(session_id="d")),
    (b'{"session_id":"","prompt_cache_key":7,"conversation":{"id":""}}', facts()),
    (b'{"session_id":"%b"}' % (b"s" * 300), facts(session_id="s" * 256)),
    # Fields that are read late may turn out unreadable.
    (b'{"model":"m","session_id":"\xff"}', facts(model="m")),
    (b'{"model":"m","session_id":1e999}', facts(model="m")),
    (b'{"model":"m","conversation":{"id":%b}}' % (b"9" * 5000), facts(model="m")),
    (b'{"model":"m","metadata":{"session_id":"\xff"},"prompt_cache_key":"k"}', facts(model="m", session_id="k")),
    (b'{"model":"m","prompt":"\xff"}', facts(model="m")),  # not looked into
]
UNREADABLE = [
    b"", b" ", b"null", b"5", b'"model"', b"[]", b'[{"model":"m"}]', b"{", b'{"model":"m"', b'{"model":"m"} x',
    b"{'model':'m'}", b'{"model":NaN}', b'{"model":"m","temperature":Infinity}', b'{"model":"\\ud800"}',
    b'{"model":"\xff"}', b"\xff\xfe{\x00}\x00", b'{"metadata":' + DEEP + b"}", DEEP, b"\x00", b"--boundary\r\n",
    b'{"model":"m",}', b'{"model":"\x01"}',
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), REQUESTS)
def test_the_facts_of_a_request(body: bytes, expected: RequestFacts) -> None:
    assert read_request(body) == expected


@pytest.mark.parametrize("body", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_json_object_says_nothing(body: bytes) -> None:
    assert read_request(body) == NO_FACTS


def test_messages_stay_as_they_came() -> None:
    found = read_request(b'{"model":"m","messages": [ {"role":"user","content":"\\u00e9 \xff"} ] }')
    assert found.messages is not None
    assert found.messages.cut == b'[ {"role":"user","content":"\\u00e9 \xff"} ]'


KEYS = st.sampled_from([
    "model", "stream", "stream_options", "max_tokens", "n", "metadata", "session_id", "conversation", "messages",
    "prompt_cache_key", "previous_response_id", "include_usage", "continuous_usage_stats", "id", 'a"b', "é\u2028",
])  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), KEYS,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.just('"stream_options":{'),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
SPACE = st.text(" \t\r\n", max_size=2)


@st.composite
def json_text(draw: st.DrawFn, value: Any) -> str:
    """`value` as JSON, with white space and escapes where JSON allows them; objects may be lists of pairs."""
    if isinstance(value, dict):
        value = list(value.items())
        return draw(json_text(tuple(value)))
    if isinstance(value, tuple):
        members = [draw(json_text(name)) + draw(SPACE) + ":" + draw(json_text(item)) for name, item in value]
        return draw(SPACE) + "{" + (draw(SPACE) + "," + draw(SPACE)).join(members) + "}" + draw(SPACE)
    if isinstance(value, list):
        return draw(SPACE) + "[" + ",".join([draw(json_text(item)) for item in value]) + "]" + draw(SPACE)
    if isinstance(value, str) and draw(st.integers(0, 3)) == 0:
        return draw(SPACE) + '"' + "".join(f"\\u{unit:04x}" for unit in utf16(value)) + '"'
    return draw(SPACE) + json.dumps(value, ensure_ascii=draw(st.booleans()))


def utf16(text: str) -> list[int]:
    data = text.encode("utf-16-be")
    return [data[i] << 8 | data[i + 1] for i in range(0, len(data), 2)]


OPTIONS = st.one_of(
    st.none(),
    st.dictionaries(st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), st.booleans() | st.none()),
    LEAVES,
)
REQUEST_PAIRS = st.lists(
    st.one_of(
        st.tuples(KEYS, VALUES),
        st.tuples(st.just("stream_options"), OPTIONS),
        st.tuples(st.just("stream"), st.booleans()),
    ),
    max_size=6,
).map(tuple)
REQUEST_TEXTS = REQUEST_PAIRS.flatmap(json_text)


@given(body=st.binary(max_size=60) | REQUEST_TEXTS.map(str.encode))
@example(body=b'{"session_id":"\xff"}')
def test_reading_a_request_raises_for_no_bytes(body: bytes) -> None:
    found = read_request(body)
    assert found.is_json or found == NO_FACTS


@given(text=REQUEST_TEXTS)
def test_the_facts_are_what_python_reads(text: str) -> None:
    read = json.loads(text)
    found = read_request(text.encode())
    assert found.is_json
    assert found.model == (read.get("model") if isinstance(read.get("model"), str) else None)
    assert found.stream is (read.get("stream") is True)
    assert found.has_stream_options is (found.stream and "stream_options" in read)
    options = read.get("stream_options")
    assert found.asks_usage is (isinstance(options, dict) and options.get("include_usage") is True)


# --- long texts -----------------------------------------------------------------------------------------------------

LONG = "x" * 9000
PIECES = st.sampled_from(['"', "\\", "\n", "é", "\u2028", "😀", "a", ",", "}", '":', "x" * 700, "y" * LONG_TEXT_BYTES])
LONG_TEXTS = st.lists(PIECES, max_size=12).map("".join)
LONG_REQUESTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["prompt", "user", "a", "model", "session_id"]), LONG_TEXTS),
        st.tuples(st.just("metadata"), st.dictionaries(st.sampled_from(["session_id", "x"]), LONG_TEXTS)),
        st.tuples(
            st.just("messages"), st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": LONG_TEXTS}))
        ),
        st.tuples(st.just("stream"), st.booleans()),
        st.tuples(st.just("stream_options"), OPTIONS | st.dictionaries(st.just("x"), LONG_TEXTS)),
        st.tuples(st.just("max_tokens"), st.integers(0, 99)),
    ),
    max_size=8,
).map(lambda pairs: ((("prompt", LONG), *pairs)))


def restored(messages: CutJson) -> bytes:
    """With the texts that were taken out put back."""

    def text(mark: re.Match[bytes]) -> bytes:
        start, end = messages.spans[int(mark[1])]
        return messages.whole[start:end]

    return re.sub(rb"\xff(\d+)", text, messages.cut) if messages.spans else messages.cut


def spelt(pairs: tuple[tuple[str, Any], ...], as_ascii: bool) -> bytes:
    members = [json.dumps(name) + ": " + json.dumps(value, ensure_ascii=as_ascii) for name, value in pairs]
    return ("{" + ",".join(members) + "}").encode()


@settings(max_examples=40, deadline=None)
@given(pairs=LONG_REQUESTS, as_ascii=st.booleans())
@example(pairs=(("prompt", "\\" * 9001), ("model", "m")), as_ascii=True)
@example(pairs=(("prompt", '"' * 9001), ("model", "m")), as_ascii=True)
@example(pairs=(("model", LONG), ("session_id", LONG)), as_ascii=True)
@example(pairs=(("messages", [{"role": "user", "content": LONG}] * 3), ("user", LONG)), as_ascii=True)
@example(pairs=(("a", {f"k{number}": "v" for number in range(50)}), ("prompt", LONG)), as_ascii=True)
def test_a_long_request_says_what_python_reads(pairs: tuple[tuple[str, Any], ...], as_ascii: bool) -> None:
    body = spelt(pairs, as_ascii)
    read = dict(pairs)
    found = read_request(body)
    assert found.is_json
    assert (found.model, found.max_tokens) == (read.get("model"), read.get("max_tokens"))
    metadata = read.get("metadata", {})
    session = metadata.get("session_id") or read.get("session_id") or None
    assert found.session_id == (session and session[:256])
    assert (found.messages is None) == ("messages" not in read)
    if found.messages is not None:
        raw = restored(found.messages)
        assert json.loads(raw) == read["messages"]
        assert raw in body


@settings(max_examples=40, deadline=None)
@given(pairs=LONG_REQUESTS.map(lambda pairs: (*pairs, ("stream", True))), as_ascii=st.booleans())
@example(pairs=(("prompt", LONG), ("stream_options", {"x": LONG}), ("stream", True)), as_ascii=True)
@example(pairs=(("prompt", LONG), ("stream", True), ("stream_options", {"x": 1}), ("user", LONG)), as_ascii=False)
def test_a_long_request_is_asked_for_usage_like_any(pairs: tuple[tuple[str, Any], ...], as_ascii: bool) -> None:
    body = spelt(pairs, as_ascii)
    found = read_request(body)
    if found.asks_usage:
        return
    asked = ask_for_usage(body, found)
    read = json.loads(body)
    options = {} if read.get("stream_options") is None else read["stream_options"]
    if not isinstance(options, dict) or options.get("include_usage") not in (None, False):
        assert asked is None
        return
    assert asked is not None
    wanted = {key: value for key, value in options.items() if key != "continuous_usage_stats"} | {"include_usage": True}
    assert json.loads(asked) == read | {"stream_options": wanted}


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(LONG_TEXTS, max_size=30), as_ascii=st.booleans())
@example(texts=["\\" * 20_000], as_ascii=True)
@example(texts=['"' * 20_000, LONG], as_ascii=True)
def test_what_is_cut_are_the_insides_of_texts(texts: list[str], as_ascii: bool) -> None:
    data = json.dumps([LONG, *texts], ensure_ascii=as_ascii).encode()
    cut, spans = cut_texts(data)
    assert spans[0] == (2, 2 + len(LONG))
    whole = cut
    for number, (start, end) in enumerate(spans):
        assert end - start > LONG_TEXT_BYTES
        assert json.loads(data[start - 1 : end + 1]) in [LONG, *texts]
        whole = whole.replace(b'"\xff%d"' % number, data[start - 1 : end + 1], 1)
    assert whole == data


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 9000, b'"' + b"x" * 9000, b'"' + b"\\" * 9000 + b'"', b"1," * 9000, b'"%b\xff"' % LONG.encode()],
)
def test_what_is_not_cut(data: bytes) -> None:
    assert cut_texts(data) == (data, [])


# --- asking for usage -----------------------------------------------------------------------------------------------

ASKED = [
    # body, what goes upstream
    (b'{"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
    (b' { "stream" : true } ', b' {"stream_options":{"include_usage":true}, "stream" : true } '),
    (b'{"stream":true,"stream_options":{}}', b'{"stream":true,"stream_options":{"include_usage":true}}'),
    (b'{"stream_options": null ,"stream":true}', b'{"stream_options": {"include_usage":true} ,"stream":true}'),
    (
        b'{"stream":true,"stream_options":{"include_usage":false,"continuous_usage_stats":true,"x":[1, 2]}}',
        b'{"stream":true,"stream_options":{"include_usage":true,"x":[1,2]}}',
    ),
    (b'{"stream":true,"stream_options":{"x":"\\u00e9"}}',
     b'{"stream":true,"stream_options":{"x":"\\u00e9","include_usage":true}}'),
    # The last of two is the one that is read.
    (
        b'{"stream_options":{"include_usage":true},"stream":true,"stream_options":null}',
        b'{"stream_options":{"include_usage":true},"stream":true,"stream_options":{"include_usage":true}}',
    ),
    (b'{"stream":true,"stream\\u005foptions":null}', b'{"stream":true,"stream\\u005foptions":{"include_usage":true}}'),
    (
        b'{"a":{"stream_options":1},"b":"\\"stream_options\\":{","stream":true}',
        b'{"stream_options":{"include_usage":true},"a":{"stream_options":1},"b":"\\"stream_options\\":{","stream":true}',
    ),
    (b'{"stream":true,"prompt":"\xff"}', b'{"stream_options":{"include_usage":true},"stream":true,"prompt":"\xff"}'),
    (b'\xef\xbb\xbf{"stream":true}', b'\xef\xbb\xbf{"stream_options":{"include_usage":true},"stream":true}'),
    # Left to the upstream's judgement.
    (b'{"stream":true,"stream_options":7}', None),
    (b'{"stream":true,"stream_options":[]}', None),
    (b'{"stream":true,"stream_options":{"include_usage":"true"}}', None),
    (b'{"stream":true,"stream_options":{"include_usage":1}}', None),
    (b'{"stream":true,"stream_options":{},"prompt":"\xff"}', None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), ASKED)
def test_usage_is_asked_for(body: bytes, expected: bytes | None) -> None:
    assert ask_for_usage(body, read_request(body)) == expected


@given(text=REQUEST_PAIRS.map(lambda pairs: (*pairs, ("stream", True))).flatmap(json_text))
@example(
    text='{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},"stream_options":null}'
)
def test_asking_changes_nothing_but_the_option(text: str) -> None:
    body = text.encode()
    found = read_request(body)
    if not found.stream or found.asks_usage:
        return
    asked = ask_for_usage(body, found)
    before = json.loads(text)
    options = before.get("stream_options") or {}
    if "stream_options" in before and (
        not isinstance(before["stream_options"], dict | None) or options.get("include_usage") not in (None, False)
    ):
        assert asked is None
        return
    assert asked is not None
    wanted = {key: value for key, value in options.items() if key != "continuous_usage_stats"} | {"include_usage": True}
    assert json.loads(asked) == before | {"stream_options": wanted}
    written = json.dumps(wanted, separators=(",", ":")).encode()
    if "stream_options" not in before:
        start = body.index(b"{") + 1
        assert asked == body[:start] + b'"stream_options":' + written + b"," + body[start:]
        return
    # All but one value, which was the option's, is the body's own, byte for byte.
    spans = [(match.start(), len(asked) - match.end()) for match in re.finditer(re.escape(written), asked)]
    assert any(
        body.startswith(asked[:start])
        and body.endswith(asked[len(asked) - after :])
        and parsed(body[start : len(body) - after]) == [before["stream_options"]]
        for start, after in spans
    )


def parsed(data: bytes) -> list[Any]:
    try:
        return [json.loads(data)]
    except ValueError:
        return []


# --- forms ----------------------------------------------------------------------------------------------------------


def form(*parts: bytes, boundary: bytes = b"--x7") -> bytes:
    return b"".join(boundary + b"\r\n" + part + b"\r\n" for part in parts) + boundary + b"--\r\n"


DISPOSITION = b"Content-Disposition: form-data; "
FILE = (
    DISPOSITION + b'name="file"; filename="model"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n\r\nname="model"\r\n\r\nno'
)
FORMS = [
    (form(DISPOSITION + b'name="model"\r\n\r\nwhisper'), "whisper", False),
    (form(DISPOSITION + b"name=model\r\n\r\nwhisper"), "whisper", False),
    (form(b'content-disposition:form-data;name="model"\r\n\r\nwhisper'), "whisper", False),
    (form(b'CONTENT-DISPOSITION: form-data; NAME = "model"\r\n\r\nwhisper'), "whisper", False),
    (form(DISPOSITION + b'name="model"\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nwhisper'), "whisper", False),
    (form(b"Content-Type: text/plain\r\n" + DISPOSITION + b'name="model"\r\n\r\nwhisper'), "whisper", False),
    (form(DISPOSITION + b'filename="a"; name="model"\r\n\r\nwhisper'), "whisper", False),
    (form(FILE, DISPOSITION + b'name="model"\r\n\r\nwhisper'), "whisper", False),
    (form(DISPOSITION + b'name="model"\r\n\r\nwhisper', FILE), "whisper", False),
    (form(DISPOSITION + b'name="model"\r\n\r\nw', DISPOSITION + b'name="stream"\r\n\r\nTrue'), "w", True),
    (form(DISPOSITION + b'name="stream"\r\n\r\nfalse'), None, False),
    (form(DISPOSITION + b'name="model"\r\n\r\n\xff\xc3\xa9'), "\ufffdé", False),
    (form(DISPOSITION + b'name="model"\r\n\r\n'), None, False),
    (form(DISPOSITION + b'name="model"\r\n\r\na\r\nb'), "a\r\nb", False),  # a value may have lines
    (form(DISPOSITION + b'name="a\\"; name=model"\r\n\r\nwhisper'), None, False),
    (form(FILE), None, False),  # neither a file's name nor its inside is the field
    (form(DISPOSITION + b'name="mymodel"\r\n\r\nwhisper'), None, False),
    (form(DISPOSITION + b'name="model"\r\n\r\n' + b"m" * 300), None, False),
    (form(DISPOSITION + b'name="model"\r\n\r\nwhisper')[:-20], None, False),  # its end is not in sight
    (form(FILE, DISPOSITION + b'name="model"\r\n\r\nwhisper', boundary=b"----WebKitFormBoundary7"), "whisper", False),
    (b"", None, False),
    (b"--", None, False),
    (b"--\r\n--\r\n--", None, False),
    (b"model=whisper", None, False),
]


@pytest.mark.parametrize(("head", "model", "stream"), FORMS)
def test_the_facts_of_a_form(head: bytes, model: str | None, stream: bool) -> None:
    assert read_form(head) == RequestFacts(model=model, stream=stream)


@given(head=st.binary(max_size=80))
def test_reading_a_form_raises_for_no_bytes(head: bytes) -> None:
    read_form(head)
    read_form(b"--x\r\n" + head + b"\r\n--x")


# --- usage ----------------------------------------------------------------------------------------------------------

USAGES: list[tuple[Family, str, Usage | None]] = [
    (Family.CHAT, '{"prompt_tokens":4,"completion_tokens":3,"prompt_tokens_details":null}', Usage(4, 3)),
    (
        Family.CHAT,
        '{"prompt_tokens":4,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2,"audio_tokens":0}}',
        Usage(4, 3, 2),
    ),
    (Family.COMPLETIONS, '{"prompt_tokens":0,"total_tokens":0,"completion_tokens":0}', Usage(0, 0)),
    (Family.COMPLETIONS, '{"prompt_tokens":5}', Usage(5)),
    (
        Family.RESPONSES,
        '{"input_tokens":4,"input_tokens_details":{"cached_tokens":1},"output_tokens":3,"total_tokens":7}',
        Usage(4, 3, 1),
    ),
    # Anthropic's input leaves the cache out.
    (
        Family.MESSAGES,
        '{"input_tokens":4,"cache_read_input_tokens":10,"cache_creation_input_tokens":100,"output_tokens":3}',
        Usage(114, 3, 10),
    ),
    (Family.MESSAGES, '{"input_tokens":4,"output_tokens":3,"cache_read_input_tokens":null}', Usage(4, 3)),
    (Family.MESSAGES, '{"output_tokens":3}', Usage(None, 3)),
    # Nothing is generated: a known 0.
    (Family.EMBEDDINGS, '{"prompt_tokens":6,"total_tokens":6,"completion_tokens":0}', Usage(6, 0)),
    (Family.EMBEDDINGS, '{"prompt_tokens":6,"total_tokens":6}', Usage(6, 0)),
    (Family.RERANK, '{"prompt_tokens":6,"total_tokens":6}', Usage(6, 0)),
    (Family.RERANK, '{"total_tokens":6}', Usage(6, 0)),
    (Family.SCORE, '{"prompt_tokens":6,"total_tokens":6,"completion_tokens":0}', Usage(6, 0)),
    (Family.POOLING, '{"prompt_tokens":6,"total_tokens":6}', Usage(6, 0)),
    (Family.CLASSIFY, '{"prompt_tokens":6,"total_tokens":6,"completion_tokens":0}', Usage(6, 0)),
    (Family.EMBEDDINGS, "{}", None),
    (Family.AUDIO, '{"type":"duration","seconds":7}', None),  # unknown, not 0
    (Family.AUDIO, '{"type":"tokens","input_tokens":14,"output_tokens":45,"total_tokens":59}', Usage(14, 45)),
    (Family.CHAT, "{}", None),
    (Family.CHAT, "null", None),
    (Family.CHAT, "7", None),
    (Family.CHAT, '{"prompt_tokens":"4","completion_tokens":3}', None),
    (Family.CHAT, '{"prompt_tokens":4,"completion_tokens":3,"prompt_tokens_details":[1]}', Usage(4, 3)),
    (Family.CHAT, '{"prompt_tokens":4,"prompt_tokens_details":{"cached_tokens":"x"}}', Usage(4)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "usage", "expected"), USAGES)
def test_the_usage_of_an_answer(family: Family, usage: str, expected: Usage | None) -> None:
    payload = read_payload(b'{"id":"x","usage":%b}' % usage.encode())
    assert payload is not None
    assert usage_of(payload, family) == expected


# --- errors ---------------------------------------------------------------------------------------------------------

ERRORS = [
    # vLLM and OpenAI
    ('{"error":{"message":"no","type":"NotFoundError","param":"model","code":404}}', "NotFoundError"),
    ('{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"x"}}', "invalid_request_error"),
    ('{"error":{"message":"no","type":null,"code":"context_length_exceeded"}}', "context_length_exceeded"),
    ('{"error":{"message":"no","type":"","code":500}}', "500"),
    ('{"error":{"message":"no"}}', "error"),
    # vLLM before 0.10
    ('{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}', "BadRequestError"),
    ('{"object":"error","message":"no"}', "error"),
    # Anthropic
    ('{"type":"error","error":{"type":"overloaded_error","message":"no"}}', "overloaded_error"),
    # The Responses API's event
    ('{"type":"error","code":"server_error","message":"no","sequence_number":3}', "server_error"),
    ('{"type":"error","code":null,"message":"no"}', "error"),
    # Others
    ('{"error":"no"}', "error"),
    ('{"error":42}', "error"),
    ('{"error":["no"]}', "error"),
    ('{"error":{"type":{"a":1},"code":[]}}', "error"),
    ('{"error":{"type":"%s"}}' % ("t" * 200), "t" * 128),
    # No errors
    ('{"error":null}', None),
    ('{"error":{}}', None),
    ("{}", None),
    ('{"type":"message","code":5}', None),
    ('{"detail":"Not Found"}', None),
]


@pytest.mark.parametrize(("body", "expected"), ERRORS)
def test_the_type_of_an_error(body: str, expected: str | None) -> None:
    payload = read_payload(body.encode())
    assert payload is not None
    assert error_type_of(payload) == expected


def test_a_field_of_a_wrong_type_takes_no_other_with_it() -> None:
    payload = read_payload(
        b'{"id":5,"model":"m","choices":"x","usage":{"prompt_tokens":1},"error":7,"status":[],"message":"text"}'
    )
    assert payload is not None
    assert (payload.id, payload.model, payload.choices, payload.status, payload.message) == (
        None,
        "m",
        None,
        None,
        None,
    )
    assert usage_of(payload, Family.CHAT) == Usage(1)
    assert error_type_of(payload) == "error"


@pytest.mark.parametrize(
    "data", [b"", b"[DONE]", b"5", b"[]", b"{", b'{"a":\xff}', b'{"id":"\xff"', DEEP], ids=range(8)
)
def test_what_is_no_json_object_is_no_payload(data: bytes) -> None:
    assert read_payload(data) is None


@given(data=st.binary(max_size=40) | VALUES.flatmap(json_text).map(str.encode))
def test_reading_a_payload_raises_for_no_bytes(data: bytes) -> None:
    payload = read_payload(data)
    if payload is not None:
        error_type_of(payload)
        for family in Family:
            usage_of(payload, family)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"new"}'),
        (b' { "n" : 1.50 , "model" :\n "a" , "x": [ ] } ', b' { "n" : 1.50 , "model" :\n "new" , "x": [ ] } '),
        (b'\xef\xbb\xbf{"model":"a"}', b'\xef\xbb\xbf{"model":"new"}'),
        (b'{"model":"\\"}\\u00e9","n":1}', b'{"model":"new","n":1}'),
        (b'{"model":"","n":1}', b'{"model":"new","n":1}'),
        (b'{"prompt":"\\"model\\":\\"x\\"","model":"a"}', b'{"prompt":"\\"model\\":\\"x\\"","model":"new"}'),
        (b'{"tools":[{"model":"x"}],"model":"a","y":{"model":"z"}}',
         b'{"tools":[{"model":"x"}],"model":"new","y":{"model":"z"}}'),
        (b'{"a":"model","model":"a"}', b'{"a":"model","model":"new"}'),
        (b'{"a":"}]{[","b":{"model":"}"},"model":"a"}', b'{"a":"}]{[","b":{"model":"}"},"model":"new"}'),
        (b'{"model":"a","model":"b"}', b'{"model":"a","model":"new"}'),  # the last one counts
        (b'{"model":5,"model":"b"}', b'{"model":5,"model":"new"}'),
        (b'{"mod\\u0065l":"a"}', b'{"mod\\u0065l":"new"}'),
        (b'{"model":"a","mod\\u0065l":"b"}', b'{"model":"a","mod\\u0065l":"new"}'),
        ('{"é":"ü","model":"ö"}'.encode(), '{"é":"ü","model":"new"}'.encode()),
        (b'{"x":{"model":"a"}}', None),
        (b'{"prompt":"model"}', None),
        (b'{"model":null}', None),
        (b'{"model":"a","model":7}', None),
        (b'{"model":"a"', None),
        (b'["model"]', None),
        (b"--form\r\n", None),
        (b"", None),
    ],
)  # fmt: skip
def test_another_model(body: bytes, expected: bytes | None) -> None:
    assert with_model(body, "new") == expected


@given(
    st.dictionaries(st.text(max_size=5) | st.just("model"), st.recursive(
        st.text(max_size=9) | st.just('"model":"'), lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.just("model") | st.text(max_size=3), inner, max_size=3)), max_size=5),
    st.text(max_size=5), st.text(max_size=5), st.booleans(), st.sampled_from([None, 1]),
)  # fmt: skip
def test_another_model_is_the_only_difference(
    fields: dict[str, Any], old: str, new: str, ascii_only: bool, indent: int | None
) -> None:
    body = json.dumps({**fields, "model": old}, ensure_ascii=ascii_only, indent=indent).encode()
    renamed = with_model(body, new)
    assert renamed is not None
    assert list(json.loads(renamed).items()) == list({**fields, "model": new}.items())
    assert with_model(renamed, old) == with_model(body, old)
