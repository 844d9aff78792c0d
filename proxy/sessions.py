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
import functools
import hashlib
import mmap
import os
import re
import secrets
import struct
import zlib
from pathlib import Path
from typing import Protocol

import msgspec

from wire.openai import LONG_TEXT_BYTES
from wire.shapes import CutJson

_ENTRY = struct.Struct("<16s16sI4x")
_WAYS = 8
_BUCKET_BYTES = _ENTRY.size * _WAYS
_HEADER_BYTES = 64
_END_BYTES = 512
"""Of a text that is not looked into, how much of each end tells conversations apart."""
_ROLES = {role: role.encode() + b"\0" for role in ("system", "developer", "user", "assistant", "tool")}


class _Message(msgspec.Struct, gc=False):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class _Part(msgspec.Struct, gc=False):
    text: msgspec.Raw = msgspec.Raw()


_messages_decoder = msgspec.json.Decoder(list[_Message])
_text_decoder = msgspec.json.Decoder(str)
_parts_decoder = msgspec.json.Decoder(list[_Part])
_pack_length = struct.Struct("<Q").pack
_CUT = re.compile(rb'"\xff(\d+)"')
"""What `cut_texts` leaves of a long text."""


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
        text = _shortened(answer)
        state.update(b"".join((_ROLES["assistant"], _pack_length(len(text)), text)))
        return state.digest()


def _shortened(text: bytes) -> bytes:
    """A long text as its length, beginning and end: tells conversations apart at bounded cost."""
    return text if len(text) <= LONG_TEXT_BYTES else _ends(text, 0, len(text))


def _ends(data: bytes, start: int, end: int) -> bytes:
    return b"%d\0%b%b" % (end - start, data[start : start + _END_BYTES], data[end - _END_BYTES : end])


def _decoded(inside: bytes) -> bytes:
    if b"\\" not in inside:
        return inside
    return _text_decoder.decode(b'"%b"' % inside).encode("utf-8", "surrogatepass")


class _Texts:
    """The texts of messages, some of which were cut out of them."""

    __slots__ = ("_spans", "_whole")

    def __init__(self, spans: list[tuple[int, int]], whole: bytes) -> None:
        self._spans = spans
        self._whole = whole

    def of(self, content: bytes, *, is_answer: bool) -> bytes:
        """What stands for a message's content, text or list of parts.

        An answer is decoded, so that it equals what the gateway saw, however the client spells it. Of the rest only
        short texts are: a client spells a long one each time as before.
        """
        if content.startswith(b'"'):
            text = self._of_string(content, is_answer=is_answer)
            return _shortened(text) if is_answer else text
        if not content.startswith(b"["):
            return b""
        try:
            parts = [bytes(part.text) for part in _parts_decoder.decode(content)]
        except msgspec.ValidationError:
            parts = [b""]
        if all(part.startswith(b'"') and part != b'""' for part in parts):
            text = b"".join([self._of_string(part, is_answer=is_answer) for part in parts])
            return _shortened(text) if is_answer else text
        return _shortened(_CUT.sub(self._cut_out, content) if self._spans else content)

    def _of_string(self, string: bytes, *, is_answer: bool) -> bytes:
        cut = _CUT.fullmatch(string) if self._spans else None
        data, start, end = string, 1, len(string) - 1
        if cut is not None:
            data, (start, end) = self._whole, self._spans[int(cut[1])]
        if is_answer or end - start <= LONG_TEXT_BYTES:
            return _decoded(data[start:end])
        return _ends(data, start, end)

    def _cut_out(self, cut: re.Match[bytes]) -> bytes:
        start, end = self._spans[int(cut[1])]
        return b'"%b"' % self._whole[start:end]


def conversation_keys(messages: CutJson, secret: bytes) -> ConversationKeys | None:
    """Hash a chat request's messages; None when they are not a list of messages."""
    spans = messages.spans
    texts = _Texts(spans, messages.whole)
    hashed: list[bytes] = []
    known = 0
    try:
        for message in _messages_decoder.decode(messages.cut):
            role = message.role
            text = bytes(message.content)
            # A byte is looked for at a third of the cost of a string of one.
            if text[:1] != b'"' or len(text) > LONG_TEXT_BYTES or 0x5C in text or (spans and 0xFF in text):
                text = texts.of(text, is_answer=role == "assistant")
            else:
                text = text[1:-1]
            hashed += (_ROLES.get(role) or role.encode() + b"\0", _pack_length(len(text)), text)
            if role == "assistant":
                known = len(hashed)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    state = _keyed(secret).copy()
    earlier = None
    if known:
        state.update(b"".join(hashed[:known]))
        earlier = state.digest()
    state.update(b"".join(hashed[known:]))
    return ConversationKeys(state, earlier)


@functools.lru_cache(maxsize=4)
def _keyed(secret: bytes) -> Digest:
    return hashlib.blake2b(key=secret, digest_size=16)


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


def injection_token(secret: bytes) -> bytes:
    """What the gateway's own injector shows with a request, so that no client can pass for it: 32 hex digits."""
    return hashlib.blake2b(b"injection", key=secret, digest_size=16).hexdigest().encode()


def load_key_secret(data_dir: Path, secret_file: Path | None) -> bytes:
    """What API keys are hashed with: an own file's bytes, or derived from the installation's secret. Raises OSError."""
    if secret_file is None:
        return hashlib.blake2b(load_secret(data_dir), digest_size=32, person=b"burstgate keys").digest()
    secret = secret_file.read_bytes().strip()
    if len(secret) < 16:
        raise OSError(f"{secret_file}: keys.secret_file: expected at least 16 bytes, found {len(secret)}")
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
