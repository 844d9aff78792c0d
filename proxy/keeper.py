"""Keeps the keys of this host as the database has them, and knows the administrators' tokens.

Twice a second one look, in a thread: has any key changed? Then the keys that are valid are written to the file that the
workers read (storage/key_file.py). While the database is away the file stands, and what it says of administrators too.
Once a minute the days on which keys were used go to the database.

An administrator's token is one of the database, or of `control.tokens_file` (lines of a role and a token, `#` begins a
comment), or in the environment variable that `control.token_env` names (role admin).
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import get_args

import sqlalchemy as sa

from proxy.config_error import ConfigError
from proxy.sessions import load_key_secret
from proxy.settings import Settings
from storage.engine import open_engine
from storage.errors import DatabaseUnavailable, DatabaseUrlError
from storage.key_file import CachedKey, Role, key_file, key_hash, read_key_file, signature, used_at, write_key_file
from storage.keys import keys_version, mark_used, valid_keys

log = logging.getLogger("burstgate.control")

LOOK_S = 0.5
MARK_S = 60.0
PATIENCE_S = 10.0
MIN_TOKEN = 16
_ROLES: tuple[Role, ...] = get_args(Role)


def configured_tokens(settings: Settings) -> Iterator[tuple[str, Role, str]]:
    """Name, role and text of the tokens that the settings name. Raises ConfigError, which shows none of them."""
    variable = settings.control.token_env
    if variable is not None:
        token = os.environ.get(variable, "")
        if len(token) < MIN_TOKEN:
            raise ConfigError(f"control.token_env: {variable}: expected a token of at least {MIN_TOKEN} characters")
        yield variable, "admin", token
    path = settings.control.tokens_file
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "expected text"
            raise ConfigError(f"control.tokens_file: {path}: {reason}") from None
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            role = next((role for role in _ROLES if role == words[0]), None)
            if role is None or len(words) != 2 or len(words[1]) < MIN_TOKEN:
                rule = f"{', '.join(_ROLES)} and a token of at least {MIN_TOKEN} characters"
                raise ConfigError(f"control.tokens_file: {path}:{number}: expected {rule}")
            yield f"{path.name}:{number}", role, words[1]


class KeyKeeper:
    """The keys of one host."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        """Replaced when they are reloaded."""
        self._secret: bytes | None = None
        self._secret_file = settings.keys.secret_file
        self._admins: dict[bytes, CachedKey] = {}
        self._stored: tuple[CachedKey, ...] | None = None
        self._version: tuple[int, int] | None = None
        self._expires_at: float | None = None
        self._engine: sa.Engine | None = None
        self._marked_s = 0.0
        self._marked: dict[str, datetime.date] = {}
        self._trouble: dict[str, float] = {}
        """Since when what fails; infinite once that was said."""
        self._lock = threading.Lock()

    @property
    def secret(self) -> bytes:
        """What keys are hashed with. Raises OSError."""
        if self._secret is None or self._secret_file != self.settings.keys.secret_file:
            self._secret_file = self.settings.keys.secret_file
            self._secret = load_key_secret(self.settings.data_dir, self._secret_file)
        return self._secret

    def admin(self, token: bytes, now_s: float) -> CachedKey | None:
        """Whose token this is. One hash and one lookup, whatever it is."""
        try:
            return self.admin_of(key_hash(self.secret, token), now_s)
        except OSError:
            return None

    def admin_of(self, digest: bytes, now_s: float) -> CachedKey | None:
        """The token of a hash, if it is valid still."""
        key = self._admins.get(digest)
        return None if key is None or key.is_expired(now_s) else key

    @property
    def has_admins(self) -> bool:
        """Somebody could be let in."""
        return bool(self._admins)

    async def keep(self) -> None:
        """Look again and again."""
        try:
            while True:
                await asyncio.to_thread(self.look)
                await asyncio.sleep(LOOK_S)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the database."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def engine(self) -> sa.Engine | None:
        """The database; None while there is none. Raises DatabaseUrlError."""
        settings = self.settings
        if settings.database_url is None and not (settings.data_dir / "burstgate.db").exists():
            return None
        if self._engine is None:
            self._engine = open_engine(settings.database)
        return self._engine

    def recall(self) -> None:
        """Who was an administrator when the database was last seen. What is wrong is logged once."""
        with self._lock:
            self._try(self._know_admins)

    def look(self) -> None:
        """One look. What is wrong is logged once."""
        with self._lock:
            self._try(self._look_at_database)
            self._try(self._know_admins)

    def _try(self, act: Callable[[], None]) -> None:
        name = act.__name__
        try:
            act()
        except (DatabaseUnavailable, DatabaseUrlError, OSError, ValueError) as error:
            since_s = self._trouble.setdefault(name, time.monotonic())
            if time.monotonic() - since_s >= PATIENCE_S:  # the recorder makes the tables at its first start
                self._trouble[name] = float("inf")
                log.error("keys stay as they were: %s", error)
        else:
            self._trouble.pop(name, None)

    def _look_at_database(self) -> None:
        now_s = time.time()
        engine = self.engine()
        if engine is None:
            return
        version = keys_version(engine)
        if version == (0, 0):
            self._version = version
            return
        is_stale = self._expires_at is not None and now_s >= self._expires_at
        if version != self._version or is_stale or signature(key_file(self.settings.data_dir)) is None:
            keys, strangers = valid_keys(engine, self.secret, now_s)
            write_key_file(key_file(self.settings.data_dir), keys)
            self._stored = keys
            self._version = version
            self._expires_at = min((key.expires_at for key in keys if key.expires_at is not None), default=None)
            if strangers:
                log.error("%d keys of the database were made with another secret (keys.secret_file)", strangers)
        if now_s - self._marked_s >= MARK_S:
            self._marked_s = now_s
            days = {
                key_id: datetime.datetime.fromtimestamp(at_s, datetime.UTC).date()
                for key_id, at_s in used_at(self.settings.data_dir).items()
            }
            new = {key_id: day for key_id, day in days.items() if self._marked.get(key_id) != day}
            if new:
                mark_used(engine, new)
                self._marked = days

    def _know_admins(self) -> None:
        if self._stored is None:
            self._stored = read_key_file(key_file(self.settings.data_dir))
        found = {key.hash: key for key in self._stored or () if key.role is not None}
        for name, role, token in configured_tokens(self.settings):
            digest = key_hash(self.secret, token.encode())
            found[digest] = CachedKey(name, name, digest, role=role)
        self._admins = found
