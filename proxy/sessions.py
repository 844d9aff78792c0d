"""Which conversation a request belongs to, when nobody says so.

A chat request whose leading messages are an earlier request's messages plus its answer continues that conversation.
What is kept of a conversation is one keyed hash (BLAKE2b, 128 bits, key in `DATA_DIR/secret`) of its messages and the
session it stands for; never a text. The table is a memory-mapped file that all workers of a host share and that
survives restarts, so that a conversation stays one wherever its turns arrive.

A session that is found this way is named by the request id of its first turn.

File: 64 bytes of header (`burstgate-sessions 1 BUCKETS\\n`, padded with spaces), then buckets of 8 entries of 40 bytes:
key 16, session 16, CRC-32 of both 4, zero 4. Within a bucket the entry used last stands first and the last one falls
out: a bounded LRU. Two workers may write a bucket at once; an entry torn by that fails its CRC and is not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Protocol

import msgspec

_ENTRY = struct.Struct("<16s16sI4x")
_WAYS = 8
_BUCKET_BYTES = _ENTRY.size * _WAYS
_HEADER_BYTES = 64
_SHORT_BYTES = 8192
"""Longer texts are hashed by length, first and last half of this: tells conversations apart at bounded cost."""


class _Message(msgspec.Struct, gc=False):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, gc=False):
    text: str = ""


_messages_decoder = msgspec.json.Decoder(list[_Message])
_text_decoder = msgspec.json.Decoder(str)
_parts_decoder = msgspec.json.Decoder(list[_Part])


class Digest(Protocol):
    """What is used of a hashlib object."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""
        ...

    def digest(self) -> bytes:
        """The hash so far."""
        ...

    def copy(self) -> Digest:
        """A second one at the same state."""
        ...


class ConversationKeys:
    """Hashes of one request's messages."""

    __slots__ = ("_state", "earlier")

    def __init__(self, state: Digest, earlier: bytes | None) -> None:
        self._state = state
        self.earlier = earlier
        """The key under which the conversation up to its last answer is known; None for a first turn."""

    def after(self, answer: bytes) -> bytes:
        """The key of the conversation once `answer` has been given."""
        state = self._state.copy()
        _add(state, "assistant", answer)
        return state.digest()


def _add(state: Digest, role: str, text: bytes) -> None:
    if len(text) > _SHORT_BYTES:
        half = _SHORT_BYTES // 2
        text = b"%d\0%b%b" % (len(text), text[:half], text[-half:])
    state.update(b"%b\0%d\0%b" % (role.encode("utf-8", "replace"), len(text), text))


def _text_of(content: msgspec.Raw) -> bytes:
    raw = bytes(content)
    if raw.startswith(b'"'):
        if b"\\" not in raw:
            return raw[1:-1]
        return _text_decoder.decode(raw).encode("utf-8", "surrogatepass")
    if raw.startswith(b"["):
        with contextlib.suppress(msgspec.ValidationError):
            parts = _parts_decoder.decode(raw)
            if all(part.text for part in parts):
                return "".join(part.text for part in parts).encode("utf-8", "surrogatepass")
        return raw
    return b""


def conversation_keys(messages: msgspec.Raw, secret: bytes) -> ConversationKeys | None:
    """Hash a chat request's messages; None when they are not a list of messages."""
    try:
        decoded = _messages_decoder.decode(messages)
        state: Digest = hashlib.blake2b(key=secret, digest_size=16)
        earlier = None
        for message in decoded:
            _add(state, message.role, _text_of(message.content))
            if message.role == "assistant":
                earlier = state.digest()
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return ConversationKeys(state, earlier)


def response_key(response_id: str, secret: bytes) -> bytes:
    """The key under which an answer of the Responses API is known."""
    return hashlib.blake2b(b"response\0" + response_id.encode("utf-8", "replace"), key=secret, digest_size=16).digest()


def load_secret(data_dir: Path) -> bytes:
    """The installation's hash key, made at the first call. Raises OSError."""
    path = data_dir / "secret"
    if not path.exists():
        # Written whole under another name and linked: of workers that start at once each reads the same whole one.
        new = data_dir / f".secret-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
        finally:
            new.unlink(missing_ok=True)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise OSError(f"{path}: expected 32 bytes, found {len(secret)}; delete it to make a new one")
    return secret


def _holds(path: Path, header: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(header)) == header
    except FileNotFoundError:
        return False


class SessionTable:
    """Keys to sessions, shared by all processes that open the file."""

    def __init__(self, path: Path, *, buckets: int = 32_768) -> None:
        """Open or create. A file of another size or version is replaced. Raises OSError."""
        header = f"burstgate-sessions 1 {buckets}\n".encode().ljust(_HEADER_BYTES)
        size = _HEADER_BYTES + buckets * _BUCKET_BYTES
        with path.with_name(f"{path.name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _holds(path, header, size):
                path.unlink(missing_ok=True)  # not cut: another process may have it mapped, and that is a SIGBUS
                path.touch(0o600)
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a store into a hole of a full disk is one, too
                    file.write(header)
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), size)
        self._buckets = buckets

    def _bucket(self, key: bytes) -> int:
        return _HEADER_BYTES + int.from_bytes(key[:8], "little") % self._buckets * _BUCKET_BYTES

    def get(self, key: bytes) -> bytes | None:
        """The session (16 bytes) stored under a key (16 bytes); it becomes the bucket's newest."""
        start = self._bucket(key)
        bucket = self._map[start : start + _BUCKET_BYTES]
        for offset in range(0, _BUCKET_BYTES, _ENTRY.size):
            found, session, crc = _ENTRY.unpack_from(bucket, offset)
            if found == key and crc == zlib.crc32(found + session):
                if offset:
                    self._write(start, bucket, offset, bucket[offset : offset + _ENTRY.size])
                return bytes(session)
        return None

    def put(self, key: bytes, session: bytes) -> None:
        """Store; the bucket's oldest entry falls out."""
        start = self._bucket(key)
        bucket = self._map[start : start + _BUCKET_BYTES]
        keep = _BUCKET_BYTES - _ENTRY.size
        for offset in range(0, _BUCKET_BYTES, _ENTRY.size):
            if bucket.startswith(key, offset):
                keep = offset
                break
        self._write(start, bucket, keep, _ENTRY.pack(key, session, zlib.crc32(key + session)))

    def _write(self, start: int, bucket: bytes, gone: int, entry: bytes) -> None:
        """Put `entry` first and leave out the one at `gone`."""
        self._map[start : start + gone + _ENTRY.size] = entry + bucket[:gone]

    def close(self) -> None:
        """Release the map."""
        self._map.close()
