from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.key_file import (
    CachedKey,
    KeyLimits,
    key_hash,
    new_token,
    read_key_file,
    secret_id,
    shown_prefix,
    signature,
    touch_used,
    used_at,
    write_key_file,
)
from traces.record import LogType

SECRET = b"s" * 32
KEY = CachedKey("key_1", "alice", key_hash(SECRET, b"bg-1"), "team", 2e9, KeyLimits(5.0, None, 3), LogType.CONVERSATION)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.cache"
    assert read_key_file(path) is None
    write_key_file(path, [KEY, CachedKey("key_2", "ops", b"h" * 32, role="admin")])
    assert read_key_file(path) == (KEY, CachedKey("key_2", "ops", b"h" * 32, role="admin"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keys.cache"]


def test_a_file_that_says_the_same_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.cache"
    write_key_file(path, [KEY])
    before = signature(path)
    write_key_file(path, [KEY])
    assert signature(path) == before
    write_key_file(path, [])
    assert signature(path) != before
    assert read_key_file(path) == ()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"version":2,"keys":[]}', b'{"version":1,"keys":[{"x":1}]}', b"\xff"]
)
def test_what_is_no_file_of_keys_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "keys.cache"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"keys\.cache: "):
        read_key_file(path)


def test_tokens_differ_and_show_little() -> None:
    tokens = {new_token(is_admin=False) for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 51 and token.startswith("bg-") and len(shown_prefix(token)) == 11 for token in tokens)
    admin = new_token(is_admin=True)
    assert admin.startswith(shown_prefix(admin))
    assert len(shown_prefix(admin)) == 12


@given(st.binary(min_size=16, max_size=40), st.binary(max_size=80))
def test_a_hash_is_of_both_secret_and_key(secret: bytes, token: bytes) -> None:
    assert key_hash(secret, token) == key_hash(secret, token)
    assert len({key_hash(secret, token), key_hash(secret + b"x", token), key_hash(secret, token + b"x")}) == 3
    assert secret_id(secret) != secret_id(secret + b"x")


@pytest.mark.parametrize(
    ("expires_at", "now_s", "expected"), [(None, 1e12, False), (5.0, 4.9, False), (5.0, 5.0, True)]
)
def test_expiry(expires_at: float | None, now_s: float, expected: bool) -> None:
    assert CachedKey("k", "n", b"", expires_at=expires_at).is_expired(now_s) is expected


def test_use_is_noted(tmp_path: Path) -> None:
    assert used_at(tmp_path) == {}
    touch_used(tmp_path, "key_1")
    touch_used(tmp_path, "key_1")
    assert list(used_at(tmp_path)) == ["key_1"]
