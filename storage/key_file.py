"""Keys as the processes of one host hold them: hashes, in a file beside the journal, and never a key itself.

A gateway worker does not talk to the database. Who does (the control plane, `burstgate keys`) writes the keys that are
valid now to `DATA_DIR/keys.cache`; workers read it again when it has changed, so that keys work, and stay revoked, with
the database down. `DATA_DIR/keys.used/KEY_ID` is an empty file whose time says when the key was last used.

A hash is HMAC-SHA256 of the key under the installation's secret: who reads the file or the database can neither use
what stands there nor try guesses on it.

File: one JSON object, {"version": 1, "keys": [...]}, mode 0600, replaced whole.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from traces.record import LogType

VERSION = 1
CLIENT_MARK = "bg-"
"""How a client's key begins: what begins so is for the gateway and never for an upstream."""
ADMIN_MARK = "bga-"
_SHOWN = 8
"""Characters of a key, behind its mark, that are kept to be shown: 32 of its 192 bits."""

Role = Literal["viewer", "operator", "admin"]


class KeyLimits(msgspec.Struct, frozen=True):
    """What a key's holder may use; None: no limit of its own."""

    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    concurrency: int | None = None


NO_LIMITS = KeyLimits()


class CachedKey(msgspec.Struct, frozen=True):
    """A key that is valid, or will have been until `expires_at` (epoch seconds)."""

    key_id: str
    name: str
    hash: bytes
    tenant: str | None = None
    expires_at: float | None = None
    limits: KeyLimits = NO_LIMITS
    log_type: LogType | None = None
    role: Role | None = None
    """Of an admin token; None for a client's key."""

    def is_expired(self, now_s: float) -> bool:
        """now_s: epoch seconds."""
        return self.expires_at is not None and now_s >= self.expires_at


class _File(msgspec.Struct, frozen=True):
    version: int
    keys: tuple[CachedKey, ...]


def new_token(*, is_admin: bool) -> str:
    """A key for a client, or a token for an administrator: 192 random bits."""
    return (ADMIN_MARK if is_admin else CLIENT_MARK) + secrets.token_hex(24)


def shown_prefix(token: str) -> str:
    """What may be shown of it."""
    mark = ADMIN_MARK if token.startswith(ADMIN_MARK) else CLIENT_MARK
    return token[: len(mark) + _SHOWN]


def key_hash(secret: bytes, token: bytes) -> bytes:
    """32 bytes."""
    return hmac.digest(secret, token, "sha256")


def secret_id(secret: bytes) -> str:
    """Tells secrets apart without showing them."""
    return hmac.digest(secret, b"secret id", "sha256")[:8].hex()


def key_file(data_dir: Path) -> Path:
    """Where the keys of this host lie."""
    return data_dir / "keys.cache"


def read_key_file(path: Path) -> tuple[CachedKey, ...] | None:
    """The keys; None where there is no file. Raises OSError, ValueError naming the file."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of keys: {error}") from None
    if found.version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {found.version}")
    return found.keys


def write_key_file(path: Path, keys: Sequence[CachedKey]) -> None:
    """Replace the file, unless it says the same. Raises OSError."""
    data = msgspec.json.encode(_File(VERSION, tuple(keys)))
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    new = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes with each replacement of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def touch_used(data_dir: Path, key_id: str) -> None:
    """Note that a key is used now. Raises OSError."""
    directory = data_dir / "keys.used"
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / key_id).touch(mode=0o600)


def used_at(data_dir: Path) -> dict[str, float]:
    """When each key was last used here, epoch seconds."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(data_dir / "keys.used"):
            found[entry.name] = entry.stat().st_mtime
    return found
