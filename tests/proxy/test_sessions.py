from __future__ import annotations

import json
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.sessions import ConversationKeys, SessionTable, conversation_keys, load_secret, response_key
from wire.openai import read_request
from wire.shapes import CutJson

SECRET = b"k" * 32
texts = st.text(max_size=40)
KEY = b"key-of-sixteen-b"


def keys(messages: object, secret: bytes = SECRET) -> ConversationKeys | None:
    raw = messages if isinstance(messages, bytes) else json.dumps(messages).encode()
    whole = b'{"messages":%b}' % raw
    messages = read_request(whole).messages
    return conversation_keys(messages or CutJson(raw, [], whole), secret)


def known(messages: object) -> ConversationKeys:
    found = keys(messages)
    assert found is not None
    return found


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("first", "answer", "second"),
    [
        ([user("q")], "a", [user("q"), assistant("a"), user("q2")]),
        ([user("q")], "a", [user("q"), assistant("a")]),  # asked to go on
        ([user("q")], "", [user("q"), assistant(""), user("q2")]),
        ([user("q")], "", [user("q"), assistant(None, tool_calls=[{"id": "1"}]), {"role": "tool", "content": "r"}]),
        ([user("q")], "", [user("q"), {"role": "assistant"}, user("q2")]),
        ([{"role": "system", "content": "s"}, user("q")], "a",
         [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("q2")]),
        ([user([{"type": "text", "text": "q"}])], "a", [user("q"), assistant("a"), user("q2")]),  # parts, or their text
        ([user("q")], "a", [user("q"), assistant([{"type": "text", "text": "a"}]), user("q2")]),
        ([user("q")], 'é"\n\\ €', [user("q"), assistant('é"\n\\ €'), user("q2")]),
        ([user("q"), assistant("a"), user("q2")], "b",
         [user("q"), assistant("a"), user("q2"), assistant("b"), user("q3")]),
        ([user(LONG)], LONG, [user(LONG), assistant(LONG), user("q2")]),
        ([user("")], "a", [user(""), assistant("a"), user("q2")]),
        ([user([{"type": "image_url", "image_url": {"url": "u"}}])], "a",
         [user([{"type": "image_url", "image_url": {"url": "u"}}]), assistant("a"), user("q2")]),
    ],
)  # fmt: skip
def test_next_turn_is_recognised(first: object, answer: str, second: object) -> None:
    assert known(second).earlier == known(first).after(answer.encode())


@pytest.mark.parametrize(
    ("first", "answer", "second"),
    [
        ([user("q")], "a", [user("q!"), assistant("a"), user("q2")]),  # an edited question
        ([user("q")], "a", [user("q"), assistant("A"), user("q2")]),  # an edited answer
        ([user("q")], "a", [user("q"), user("q2")]),
        ([user("q")], "a", [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("q2")]),
        ([user("q")], "a", [user("q"), {"role": "tool", "content": "a"}, user("q2")]),  # another speaker
        ([user("q"), user("r")], "a", [user("qr"), assistant("a")]),  # other borders
        ([user("q")], "a", [user("q"), assistant("a"), user("q2"), assistant("b"), user("q3")]),  # a turn later
        ([user(LONG)], "a", [user(LONG + "x"), assistant("a")]),  # long texts: their length counts
        ([user("a" * 9000)], "a", [user("b" + "a" * 8999), assistant("a")]),
        ([user("a" * 9000)], "a", [user("a" * 8999 + "b"), assistant("a")]),
        ([user([{"type": "image_url", "image_url": {"url": "u"}}])], "a",
         [user([{"type": "image_url", "image_url": {"url": "v"}}]), assistant("a")]),
    ],
)  # fmt: skip
def test_another_conversation_is_not(first: object, answer: str, second: object) -> None:
    assert known(second).earlier != known(first).after(answer.encode())


long_texts = st.lists(st.sampled_from(["a", 'q"', "\\", "\n", "é€", "😀", "x" * 500, "y" * 2000]), max_size=10).map(
    "".join
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(long_texts, long_texts, st.sampled_from(["text", "parts", "image"])), min_size=1, max_size=5),
    st.booleans(),
)
def test_long_conversations_are_recognised_turn_by_turn(turns: list[tuple[str, str, str]], as_ascii: bool) -> None:
    """A client spells its long texts as it did before; of its answers' spelling nothing is asked."""
    messages: list[dict[str, Any]] = []
    before = None
    for question, answer, kind in turns:
        content: Any = question
        if kind == "parts":
            content = [{"type": "text", "text": question}]
        elif kind == "image":
            content = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": question}}]
        messages.append(user(content))
        found = known(json.dumps(messages, ensure_ascii=as_ascii).encode())
        assert found.earlier == before
        before = found.after(answer.encode())
        messages.append(assistant([{"type": "text", "text": answer}] if answer and kind == "parts" else answer))


@pytest.mark.parametrize("as_ascii", [True, False])
def test_an_answer_is_known_however_it_is_spelt(as_ascii: bool) -> None:
    answer = 'é "quoted"\n' * 3000
    raw = json.dumps([user("q"), assistant(answer), user(LONG)], ensure_ascii=as_ascii).encode()
    assert known(raw).earlier == known([user("q")]).after(answer.encode())


@pytest.mark.parametrize("content", [LONG, [{"type": "image_url", "image_url": {"url": LONG}}]])
@pytest.mark.parametrize("position", [0, 450, 99_550, 99_999])
def test_long_texts_that_differ_near_an_end_are_apart(content: Any, position: int) -> None:
    other = json.loads(json.dumps(content).replace(LONG, LONG[:position] + "y" + LONG[position + 1 :]))
    assert known([user(content)]).after(b"a") != known([user(other)]).after(b"a")


def test_first_turn_continues_nothing() -> None:
    assert known([user("q")]).earlier is None
    assert known([]).earlier is None


def test_keys_are_keyed_and_hold_no_text() -> None:
    raw = json.dumps([user("question"), assistant("answer")]).encode()
    one, two = keys(raw), keys(raw, b"another secret")
    assert one is not None
    assert two is not None
    assert one.earlier != two.earlier
    assert len(one.earlier or b"") == 16


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"7", b'"text"', b"[1]", b'["q"]', b'[{"role": 7}]', b"[{", b"\xff", b'[{"content":"\xff',
     b"[" * 100_000],
)  # fmt: skip
def test_messages_that_are_none(raw: bytes) -> None:
    assert keys(raw) is None


@pytest.mark.parametrize(
    "raw",
    [
        b'[{"role":"user","content":7}]',
        b'[{"role":"user","content":{"a":1}}]',
        b'[{"role":"user","content":[7,{"text":3},null]}]',
        b'[{"content":null}]',
        b'[{"role":"user","content":"\xff"}]',
        b'[{"role":"user","content":"\\ud800\\u0000"}]',
    ],
)
def test_odd_messages_are_bytes_like_any(raw: bytes) -> None:
    found = keys(raw)
    assert found is None or len(found.after(b"a")) == 16


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), texts)
def test_any_conversation_is_recognised_turn_by_turn(turns: list[tuple[str, str]], system: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    before = None
    for question, answer in turns:
        messages.append(user(question))
        # The client may escape as it likes.
        for raw in (json.dumps(messages).encode(), json.dumps(messages, ensure_ascii=False).encode()):
            assert known(raw).earlier == before
        before = known(messages).after(answer.encode())
        messages.append(assistant(answer))


@given(st.binary(max_size=200))
def test_no_bytes_raise(raw: bytes) -> None:
    found = keys(raw)
    assert found is None or found.earlier is None or len(found.earlier) == 16


def test_response_keys_are_apart_from_each_other_and_from_messages() -> None:
    assert response_key("resp_1", SECRET) == response_key("resp_1", SECRET)
    assert response_key("resp_1", SECRET) != response_key("resp_2", SECRET)
    assert response_key("resp_1", SECRET) != response_key("resp_1", b"other")
    assert len(response_key("\ud800", SECRET)) == 16


# The table ------------------------------------------------------------------------------------------------------------


def numbered(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_put_get_and_replace(tmp_path: Path) -> None:
    table = SessionTable(tmp_path / "t", buckets=4)
    assert table.get(KEY) is None
    table.put(KEY, numbered(1))
    table.put(KEY, numbered(2))
    assert table.get(KEY) == numbered(2)
    for number in range(7):  # the replaced entry takes no second place
        table.put(KEY[:8] + numbered(number)[8:], numbered(number))
    assert table.get(KEY) == numbered(2)
    table.close()


def test_bucket_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    table = SessionTable(tmp_path / "t", buckets=1)
    for number in range(1, 9):
        table.put(numbered(number), numbered(number))
    assert table.get(numbered(1)) == numbered(1)  # used: now the newest
    table.put(numbered(9), numbered(9))
    assert [number for number in range(1, 10) if table.get(numbered(number)) is not None] == [1, *range(3, 10)]
    table.close()


@settings(deadline=None)  # it writes files
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=80))
def test_bucket_is_an_lru(steps: list[tuple[bool, int]]) -> None:
    model: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as directory:
        table = SessionTable(Path(directory) / "t", buckets=1)
        for step, (is_put, number) in enumerate(steps):
            if is_put:
                model.pop(number, None)
                model[number] = step + 1
                if len(model) > 8:
                    del model[next(iter(model))]
                table.put(numbered(number + 1), numbered(step + 1))
            else:
                if (value := model.pop(number, None)) is not None:
                    model[number] = value
                assert table.get(numbered(number + 1)) == (None if value is None else numbered(value))
        table.close()


def test_torn_entry_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t"
    table = SessionTable(path, buckets=1)
    table.put(KEY, numbered(1))
    data = bytearray(path.read_bytes())
    for offset in range(64, 64 + 36):
        torn = bytearray(data)
        torn[offset] ^= 0x40
        path.write_bytes(torn)  # the same file: what another process's half-done store would leave
        assert table.get(KEY) is None
    path.write_bytes(data)
    assert table.get(KEY) == numbered(1)
    table.close()


def test_empty_entries_are_nobodys(tmp_path: Path) -> None:
    table = SessionTable(tmp_path / "t", buckets=1)
    assert table.get(bytes(16)) is None
    table.put(bytes(16), numbered(5))
    assert table.get(bytes(16)) == numbered(5)
    table.close()


def test_table_survives_its_process_and_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "t"
    mine = SessionTable(path)
    mine.put(KEY, numbered(1))
    program = (
        "import sys; from pathlib import Path; from proxy.sessions import SessionTable\n"
        "table = SessionTable(Path(sys.argv[1]))\n"
        f"assert table.get({KEY!r}) == {numbered(1)!r}\n"
        f"table.put(b'0123456789abcdef', {numbered(2)!r})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert mine.get(b"0123456789abcdef") == numbered(2)  # while it is open here
    mine.close()
    again = SessionTable(path)
    assert (again.get(KEY), again.get(b"0123456789abcdef")) == (numbered(1), numbered(2))
    again.close()


@pytest.mark.parametrize("content", [b"", b"garbage", b"x" * (64 + 4 * 320), b"burstgate-sessions 1 4\n"])
def test_file_of_another_kind_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    table = SessionTable(path, buckets=4)
    table.put(KEY, numbered(1))
    assert table.get(KEY) == numbered(1)
    assert path.stat().st_size == 64 + 4 * 320
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    table.close()


def test_replacing_leaves_a_process_with_the_old_file_alive(tmp_path: Path) -> None:
    """A map whose file is cut is a SIGBUS: a worker of the older version would die of it."""
    path = tmp_path / "t"
    program = (
        "import sys; from pathlib import Path; from proxy.sessions import SessionTable\n"
        "old = SessionTable(Path(sys.argv[1]), buckets=64)\n"
        f"old.put({KEY!r}, {numbered(1)!r})\n"
        "SessionTable(Path(sys.argv[1]), buckets=4).close()\n"
        f"assert old.get({KEY!r}) == {numbered(1)!r}\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def test_workers_that_start_at_once_share_one_table_and_one_secret(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from proxy.sessions import SessionTable, load_secret\n"
        "directory, mine = Path(sys.argv[1]), int(sys.argv[2])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "secret = load_secret(directory); table = SessionTable(directory / 't', buckets=1024)\n"
        "table.put(mine.to_bytes(16, 'little'), bytes([mine]) * 16)\n"
        "print(secret.hex(), flush=True); sys.stdin.readline()\n"
        "print([table.get(n.to_bytes(16, 'little')) == bytes([n]) * 16 for n in range(1, 5)], flush=True)\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for number in range(1, 5)
    ]

    def step(worker: subprocess.Popen[str]) -> str:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        return worker.stdout.readline()

    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(step, workers))
        assert len(set(found)) == 1
        assert len(found[0]) == 65
        assert set(pool.map(step, workers)) == {"[True, True, True, True]\n"}
    for worker in workers:
        worker.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "t", "t.lock"]


def test_secret_is_made_once_and_for_the_owner_only(tmp_path: Path) -> None:
    secret = load_secret(tmp_path)
    assert len(secret) == 32
    assert load_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_broken_secret_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(OSError, match=r"secret: expected 32 bytes, found 5; delete it to make a new one"):
        load_secret(tmp_path)
    assert (tmp_path / "secret").read_bytes() == b"short"


def test_secret_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_secret(tmp_path / "nowhere")
