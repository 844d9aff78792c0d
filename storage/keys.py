"""Clients' API keys and administrators' tokens in the database.

One row a key, with the keyed hash of it (storage/key_file.py), never the key: that is shown once, when it is made.
A key is valid until it is revoked or expires. Rotation makes a new key with everything of the old one, which stays
valid for a grace period. Rows are not deleted: a record's tenant stays explainable. `version` counts a row's changes,
so that the sum over all rows tells a reader whether anything has changed.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from storage.engine import database_errors
from storage.key_file import CachedKey, KeyLimits, Role, key_hash, new_token, secret_id, shown_prefix
from storage.schema import api_keys
from traces.record import LogType

ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
_TEXT = re.compile(r"[^\x00-\x1f\x7f]{1,128}")


class KeyConflict(ValueError):
    """The key can not be changed so: it is not there, or no longer valid."""


class KeyWanted(msgspec.Struct, frozen=True):
    """What a new key is to be. expires_at: epoch seconds. role: makes it an administrator's token."""

    name: str
    tenant: str | None = None
    expires_at: float | None = None
    limits: KeyLimits = KeyLimits()
    log_type: LogType | None = None
    role: Role | None = None


class ApiKey(msgspec.Struct, frozen=True):
    """A key as it is shown. Stamps are epoch seconds; state: valid, expired, revoked or rotated (old, in its grace)."""

    key_id: str
    name: str
    role: str | None
    tenant: str | None
    prefix: str
    state: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    rotated_at: float | None
    successor: str | None
    limits: KeyLimits
    log_type: str | None
    last_used_day: datetime.date | None


def check_wanted(wanted: KeyWanted, now_s: float) -> None:
    """Raises ValueError naming the field, its value and the rule."""
    for field, text in (("name", wanted.name), ("tenant", wanted.tenant)):
        if text is not None and not _TEXT.fullmatch(text):
            raise ValueError(f"{field}: expected 1 to 128 characters without control characters, got {text!r}")
    if wanted.role is not None and wanted.role not in ROLES:
        raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {wanted.role!r}")
    if wanted.role is not None and (wanted.tenant or wanted.log_type or wanted.limits != KeyLimits()):
        raise ValueError("role: an administrator's token has no tenant, limits or log type")
    if wanted.expires_at is not None and not now_s < wanted.expires_at < 1e11:
        raise ValueError(f"expires_at: expected a moment to come, got {wanted.expires_at:g}")
    for field in ("requests_per_s", "tokens_per_s", "concurrency"):
        value = getattr(wanted.limits, field)
        if value is not None and not 0 < value < 1e12:
            raise ValueError(f"{field}: expected a number above 0, got {value!r}")


def create_key(engine: sa.Engine, wanted: KeyWanted, secret: bytes, now_s: float) -> tuple[ApiKey, str]:
    """Make a key; returns it and its token, which nobody can show again.

    Raises ValueError for what is wanted wrongly, KeyConflict when the database's keys belong to another secret,
    DatabaseUnavailable.
    """
    check_wanted(wanted, now_s)
    token = new_token(is_admin=wanted.role is not None)
    row = _row(wanted, token, secret, now_s)
    with database_errors(engine), engine.begin() as connection:
        _check_secret(connection, secret)
        connection.execute(sa.insert(api_keys).values(row))
    return _shown({**row, "version": 0}, now_s), token


def list_keys(engine: sa.Engine, now_s: float) -> list[ApiKey]:
    """Every key ever made, the newest first. Raises DatabaseUnavailable."""
    statement = sa.select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.key_id)
    with database_errors(engine), engine.connect() as connection:
        return [_shown(row, now_s) for row in connection.execute(statement).mappings()]


def revoke_key(engine: sa.Engine, key_id: str, now_s: float) -> ApiKey:
    """End a key now. Raises KeyConflict when it is not there or was revoked before, DatabaseUnavailable."""
    with database_errors(engine), engine.begin() as connection:
        row = _find(connection, key_id)
        if row["revoked_at"] is not None:
            raise KeyConflict(f"key {key_id!r}: it was revoked before")
        return _shown(_change(connection, row, revoked_at=now_s), now_s)


def rotate_key(engine: sa.Engine, key_id: str, secret: bytes, *, grace_s: float, now_s: float) -> tuple[ApiKey, str]:
    """A new key with everything of an old one, which ends after `grace_s`; the new key and its token.

    A key that would have expired keeps that moment, in its successor too. Raises KeyConflict when the old one is not
    valid or was rotated before, DatabaseUnavailable.
    """
    if not 0 <= grace_s <= 366 * 86_400:
        raise ValueError(f"grace_s: expected 0 to a year, got {grace_s:g}")
    with database_errors(engine), engine.begin() as connection:
        row = _find(connection, key_id)
        shown = _shown(row, now_s)
        if shown.state != "valid":
            raise KeyConflict(f"key {key_id!r}: it is {shown.state}; only a valid one can be rotated")
        _check_secret(connection, secret)
        limits = KeyLimits(row["requests_per_s"], row["tokens_per_s"], row["concurrency"])
        wanted = KeyWanted(row["name"], row["tenant"], row["expires_at"], limits, shown.log_type, row["role"])  # type: ignore[arg-type]
        token = new_token(is_admin=wanted.role is not None)
        new = _row(wanted, token, secret, now_s)
        ends_at = now_s + grace_s if row["expires_at"] is None else min(row["expires_at"], now_s + grace_s)
        _change(connection, row, rotated_at=now_s, expires_at=ends_at, successor=new["key_id"])
        connection.execute(sa.insert(api_keys).values(new))
    return _shown({**new, "version": 0}, now_s), token


def valid_keys(engine: sa.Engine, secret: bytes, now_s: float) -> tuple[tuple[CachedKey, ...], int]:
    """The keys that are valid, and how many are of another secret and so can not be checked here.

    Raises DatabaseUnavailable.
    """
    is_valid = sa.and_(
        api_keys.c.revoked_at.is_(None), sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now_s)
    )
    statement = sa.select(api_keys).where(is_valid).order_by(api_keys.c.key_id)
    ours = secret_id(secret)
    found: list[CachedKey] = []
    strangers = 0
    with database_errors(engine), engine.connect() as connection:
        for row in connection.execute(statement).mappings():
            if row["secret_id"] != ours:
                strangers += 1
                continue
            limits = KeyLimits(row["requests_per_s"], row["tokens_per_s"], row["concurrency"])
            log_type = None if row["log_type"] is None else LogType(row["log_type"])
            found.append(
                CachedKey(
                    row["key_id"], row["name"], bytes.fromhex(row["hash"]), row["tenant"], row["expires_at"], limits,
                    log_type, row["role"],
                )
            )  # fmt: skip
    return tuple(found), strangers


def keys_version(engine: sa.Engine) -> tuple[int, int]:
    """Differs after each change of any key. Raises DatabaseUnavailable."""
    statement = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(api_keys.c.version), 0))
    with database_errors(engine), engine.connect() as connection:
        count, changes = connection.execute(statement).one()
        return int(count), int(changes)


def mark_used(engine: sa.Engine, days: Mapping[str, datetime.date]) -> None:
    """Note the days on which keys were last used; a day does not go back. Raises DatabaseUnavailable."""
    with database_errors(engine), engine.begin() as connection:
        for key_id, day in days.items():
            is_later = sa.or_(api_keys.c.last_used_day.is_(None), api_keys.c.last_used_day < day)
            statement = sa.update(api_keys).where(api_keys.c.key_id == key_id, is_later)
            connection.execute(statement.values(last_used_day=day))


def _row(wanted: KeyWanted, token: str, secret: bytes, now_s: float) -> dict[str, Any]:
    return {
        "key_id": f"key_{secrets.token_hex(8)}",
        "name": wanted.name,
        "role": wanted.role,
        "tenant": wanted.tenant,
        "prefix": shown_prefix(token),
        "hash": key_hash(secret, token.encode()).hex(),
        "secret_id": secret_id(secret),
        "created_at": now_s,
        "expires_at": wanted.expires_at,
        "revoked_at": None,
        "rotated_at": None,
        "successor": None,
        "requests_per_s": wanted.limits.requests_per_s,
        "tokens_per_s": wanted.limits.tokens_per_s,
        "concurrency": wanted.limits.concurrency,
        "log_type": None if wanted.log_type is None else str(wanted.log_type),
        "last_used_day": None,
        "version": 0,
    }


def _check_secret(connection: sa.Connection, secret: bytes) -> None:
    other = sa.select(api_keys.c.key_id).where(api_keys.c.secret_id != secret_id(secret)).limit(1)
    if connection.execute(other).first() is not None:
        raise KeyConflict(
            "the keys in this database were made with another secret: use the gateway's data_dir or keys.secret_file"
        )


def _find(connection: sa.Connection, key_id: str) -> sa.RowMapping:
    row = connection.execute(sa.select(api_keys).where(api_keys.c.key_id == key_id)).mappings().first()
    if row is None:
        raise KeyConflict(f"key {key_id!r}: expected the id of a key, as `burstgate keys list` shows it")
    return row


def _change(connection: sa.Connection, row: sa.RowMapping, **values: Any) -> dict[str, Any]:
    changed = {**values, "version": row["version"] + 1}
    statement = sa.update(api_keys).where(api_keys.c.key_id == row["key_id"], api_keys.c.version == row["version"])
    if connection.execute(statement.values(changed)).rowcount != 1:
        raise KeyConflict(f"key {row['key_id']!r}: it was changed at the same time; look again")
    return {**row, **changed}


def _shown(row: Mapping[str, Any] | sa.RowMapping, now_s: float) -> ApiKey:
    state = "valid"
    if row["revoked_at"] is not None:
        state = "revoked"
    elif row["expires_at"] is not None and now_s >= row["expires_at"]:
        state = "expired"
    elif row["rotated_at"] is not None:
        state = "rotated"
    return ApiKey(
        row["key_id"], row["name"], row["role"], row["tenant"], row["prefix"], state, row["created_at"],
        row["expires_at"], row["revoked_at"], row["rotated_at"], row["successor"],
        KeyLimits(row["requests_per_s"], row["tokens_per_s"], row["concurrency"]), row["log_type"],
        row["last_used_day"],
    )  # fmt: skip
