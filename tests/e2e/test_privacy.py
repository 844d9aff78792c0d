"""Nothing of prompts, answers or keys is kept: a canary goes down every route and error path, and is then looked for.

In every file of the data directory (with the recorder stopped, so that the journal is still there, and after it has
recorded), every table of the database, what the processes said, `/metrics`, and what the control plane tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from storage.engine import open_engine
from tests.e2e.harness import Installation, Simulator, _read_request, _Server, burstgate, wait_until

CANARY = "QZcanary7731prompt"
SECRETS = ("QZcanary7731inline", "bg-QZcanary7731client", "QZcanary7731file", "QZcanary7731token")
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


class Echo(_Server):
    """An upstream that repeats the canary in answers and errors of every kind, by what the path says."""

    def serve(self, client: socket.socket) -> None:
        request = _read_request(client.recv)
        target = request.split(b" ")[1]
        text = CANARY.encode()
        error = json.dumps(
            {"error": {"message": CANARY, "type": "BadRequest", "param": CANARY, "code": CANARY}}
        ).encode()
        choice = {"index": 0, "message": {"role": "assistant", "content": CANARY}, "finish_reason": "stop"}
        answer = json.dumps({"id": "x", "object": "chat.completion", "model": "echo", "choices": [choice]}).encode()
        event = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text
        wholes = {b"400": error, b"500": error, b"422": b'{"detail":"%b"}' % text, b"503": text}
        for status, body in wholes.items():
            if b"status=" + status in target:
                client.sendall(b"HTTP/1.1 %b X %b\r\ncontent-type: application/json\r\n" % (status, text))
                client.sendall(
                    b"x-echo: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (text, len(body), body)
                )
                return
        if b"garbage" in target:
            client.sendall(text + b"\r\n\r\n")
        elif b"half" in target:
            client.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n" + answer
            )
        elif b"broken-event" in target:
            client.sendall(STREAM + event + b"data: {" + text + b"\n\n" + b'data: {"error":"' + text + b'"}\n\n')
        elif b"stream-error" in target:
            client.sendall(STREAM + event + b"data: " + error + b"\n\ndata: [DONE]\n\n")
        elif b"stream" in target:
            client.sendall(STREAM + event + b"data: [DONE]\n\n")
        elif b"/v1/models" in target:
            listed = b'{"object":"list","data":[{"id":"echo","object":"model","note":"%b"}]}' % text
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
            client.sendall(b"content-length: %d\r\n\r\n%b" % (len(listed), listed))
        elif b"/health" in target:
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        else:
            client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
            client.sendall(b"set-cookie: %b\r\ncontent-length: %d\r\n\r\n%b" % (text, len(answer), answer))


MESSAGES = [
    {"role": "system", "content": f"You are {CANARY}."},
    {"role": "user", "content": [{"type": "text", "text": CANARY}, {"type": "image_url", "url": CANARY}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": CANARY, "type": "function", "function": {"name": CANARY, "arguments": json.dumps({"a": CANARY})}}
    ]},
    {"role": "tool", "tool_call_id": CANARY, "content": CANARY},
    {"role": "user", "content": f"{CANARY} " * 200},
]  # fmt: skip
MORE: dict[str, Any] = {
    "user": CANARY, "stop": [CANARY], "metadata": {"note": CANARY}, "seed": 1, "max_tokens": 3, CANARY: CANARY,
    "tools": [{"type": "function", "function": {"name": CANARY, "description": CANARY, "parameters": {}}}],
}  # fmt: skip
HEADERS = {"x-note": CANARY, "cookie": f"a={CANARY}", "user-agent": CANARY, "referer": f"http://x/{CANARY}",
           "authorization": f"Bearer sk-{CANARY}", "x-api-key": CANARY, "traceparent": CANARY,
           "baggage": CANARY}  # fmt: skip


def bodies(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Routes, and what is asked of them."""
    for stream in (False, True):
        chat = {"model": model, "messages": MESSAGES, "stream": stream, **MORE}
        yield "/v1/chat/completions", chat
        yield "/v1/completions", {"model": model, "prompt": [CANARY] * 2, "suffix": CANARY, "stream": stream, **MORE}
        yield "/v1/responses", {"model": model, "input": CANARY, "instructions": CANARY, "stream": stream}
        yield (
            "/v1/messages",
            {"model": model, "system": CANARY, "messages": MESSAGES[-1:], "stream": stream, "max_tokens": 3},
        )
    yield "/v1/embeddings", {"model": model, "input": CANARY}
    yield "/v1/rerank", {"model": model, "query": CANARY, "documents": [CANARY]}
    yield "/score", {"model": model, "text_1": CANARY, "text_2": CANARY}
    yield "/classify", {"model": model, "input": CANARY}
    yield "/tokenize", {"model": model, "prompt": CANARY}
    yield "/invocations", {"model": model, "prompt": CANARY}
    yield "/unknown/route", {"model": model, "anything": CANARY}


def send_all(url: str) -> int:
    """Everything with a canary in it; how many requests were sent."""
    sent = 0
    with httpx.Client(base_url=url, timeout=30.0, headers=HEADERS) as client:

        def ask(method: str, path: str, **more: Any) -> None:
            nonlocal sent
            sent += 1
            with contextlib.suppress(httpx.HTTPError):  # of an answer that breaks off
                client.request(method, path, **more)

        for model in ("sim", "echo"):
            for path, body in bodies(model):
                ask("POST", f"{path}?q={CANARY}", json=body)
        chat = {"model": "echo", "messages": MESSAGES}
        for query in ("status=400", "status=422", "status=500", "status=503", "garbage", "half", "broken-event",
                      "stream", "stream-error"):  # fmt: skip
            for stream in (False, True):
                ask("POST", f"/v1/chat/completions?{query}&q={CANARY}", json={**chat, "stream": stream})
        for kind in ("transcriptions", "translations"):
            form = {"model": "echo", "prompt": CANARY}
            ask("POST", f"/v1/audio/{kind}", data=form, files={"file": (f"{CANARY}.wav", CANARY.encode() * 9)})
        large = {"file": (f"{CANARY}.wav", CANARY.encode() * 70_000)}  # an upload that is streamed on
        ask("POST", "/v1/audio/transcriptions", data={"model": "echo"}, files=large)
        json_type = {"content-type": "application/json"}
        cut, odd = f'{{"model": "echo", "messages": [{{"content": "{CANARY}', f'{{"model": {{"a": "{CANARY}"}}}}'
        for bad in (cut, odd, CANARY, f'["{CANARY}"]'):
            ask("POST", "/v1/chat/completions", content=bad.encode(), headers=json_type)
        ask("POST", "/v1/chat/completions", content=CANARY.encode("utf-16"), headers=json_type)
        ask("POST", "/v1/chat/completions", content=CANARY.encode() * 100_000, headers=json_type)  # 413
        ask("POST", "/sleep", json={"tags": CANARY})  # 403
        ask("GET", f"/v1/models?q={CANARY}")
        ask("POST", "/v1/chat/completions", json=chat, headers={"authorization": f"Bearer {SECRETS[1]}"})  # 401
    address = (httpx.URL(url).host, httpx.URL(url).port or 0)
    head = f"POST /v1/chat/completions?q={CANARY} HTTP/1.1\r\nHost: h\r\nX-Note: {CANARY}\r\n"
    for raw in (
        head + "Content-Length: 1000\r\n\r\n" + CANARY,  # leaves in its body
        head + f"Transfer-Encoding: chunked\r\n\r\n{CANARY}",  # no chunk
        head + f"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{CANARY}",
        head + f"Bad Header {CANARY}\r\n\r\n",
        head + f"X-Long: {CANARY * 8000}\r\n\r\n",  # 431
        f"{CANARY}\r\n\r\n",
        f"GET /{'%' * 9}?q={CANARY} HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection(address) as client_socket, contextlib.suppress(OSError):
            client_socket.sendall(raw.encode())
            client_socket.shutdown(socket.SHUT_WR)
            while client_socket.recv(65536):
                pass
    return sent


def places(made: Installation, texts: tuple[str, ...]) -> set[str]:
    """Where one of these texts stands."""
    found = set()
    for path in sorted(made.data_dir.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found |= {
                f"{path.name}: {text}" for text in texts if text.encode() in data or text.encode("utf-16-le") in data
            }
    said = {"output": made.output}
    with httpx.Client(
        base_url=made.control_url, timeout=30.0, headers={"authorization": f"Bearer {SECRETS[3]}"}
    ) as client:
        for page in ("/metrics", "/api/v1/status", "/api/v1/doctor", "/api/v1/keys", "/openapi.json", "/nothing"):
            said[page] = client.get(page).text
    return found | {f"{place}: {text}" for place, shown in said.items() for text in texts if text in shown}


def in_tables(made: Installation, texts: tuple[str, ...]) -> set[str]:
    """In which column of which table one of these texts stands."""
    engine = open_engine(made.database_url)
    found = set()
    try:
        with engine.connect() as connection:
            for table in sa.inspect(engine).get_table_names():
                for row in connection.execute(sa.text(f'SELECT * FROM "{table}"')).mappings():
                    found |= {
                        f"{table}.{column}: {text}"
                        for column, value in row.items()
                        for text in texts
                        if text in (value.decode("latin-1") if isinstance(value, bytes) else str(value))
                    }
    finally:
        engine.dispose()
    return found


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A gateway with everything on that looks into prompts, its recorder stopped and started again by the test."""
    directory = tmp_path_factory.mktemp("privacy")
    (directory / "upstream-key").write_text(SECRETS[2])
    (directory / "tokens").write_text(f"admin {SECRETS[3]}\n")
    with Simulator() as simulator, Echo() as echo:
        config = directory / "config.yaml"
        config.write_text(
            f"upstreams:\n  - {{url: '{simulator.url}', models: [sim], api_key: {SECRETS[0]}}}\n"
            f"  - {{url: '{echo.url}', models: [echo], api_key_file: {directory / 'upstream-key'}}}\n"
            "record: {prefix_blocks: true}\nbalance: {policy: prefix}\nlimits: {body: 1500KiB}\n"
            f"control: {{require_token: true, tokens_file: {directory / 'tokens'}}}\n"
        )
        with Installation(data_dir=directory / "data", flags=("--config", str(config))) as made:
            done = burstgate("keys", "create", "somebody", "--data-dir", made.data_dir)
            assert done.returncode == 0, done.stderr
            yield made


def test_the_canary_is_nowhere(installation: Installation) -> None:
    made = installation
    wait_until(lambda: (made.data_dir / "burstgate.db").exists(), 20.0, "the database")
    recorder = made.pid("recorder")
    os.kill(recorder, signal.SIGSTOP)
    try:
        sent = send_all(made.gateway_url)
        assert sent >= 60
        assert places(made, (CANARY, *SECRETS)) == set()
        assert any(place.startswith("0") and "seg" in place for place in places(made, ("/v1/chat/completions",)))
    finally:
        os.kill(recorder, signal.SIGCONT)
    wait_until(lambda: len(made.rows()) >= sent, 60.0, "rows of all requests")
    assert places(made, (CANARY, *SECRETS)) == set()
    assert in_tables(made, (CANARY, *SECRETS)) == set()
    assert in_tables(made, ("/v1/chat/completions",)) == {"requests.endpoint: /v1/chat/completions"}  # it does look
    shown = {row.status for row in made.rows()} | {row.outcome.value for row in made.rows()}
    assert {200, 400, 401, 403, 413, 422, 500, 502, "truncated", "client_gone"} <= shown  # the paths were taken


def test_a_reload_and_a_stop_do_not_show_it_either(installation: Installation) -> None:
    made = installation
    os.kill(made.process.pid, signal.SIGHUP)
    wait_until(lambda: "reloaded" in made.output, 20.0, "reloaded")
    output = made.stop()
    assert [text for text in (CANARY, *SECRETS) if text in output] == []
    assert "Traceback" not in output
