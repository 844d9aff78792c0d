"""Commands for clients' API keys and administrators' tokens."""

from __future__ import annotations

import datetime
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from proxy.commands.common import Config, DatabaseUrl, DataDir, Json, app, load_config, open_database, prepare_data_dir
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from storage.keys import ApiKey, KeyWanted

keys_app = typer.Typer(help="Clients' API keys.", no_args_is_help=True)
admin_app = typer.Typer(help="Tokens for the control plane.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
keys_app.add_typer(admin_app, name="admin")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
ExpiresIn = Annotated[str | None, typer.Option("--expires-in", help="As 90d, 12h, 30m.  [default: never]")]


def _seconds(text: str | None, flag: str) -> float | None:
    if text is None:
        return None
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ConfigError(f"{flag}: expected a number and one of s, m, h, d, w, as in 90d, got {text!r}")
    return float(found[1]) * _UNITS_S[found[2]]


@contextmanager
def _keys(config: Config, data_dir: DataDir, database_url: DatabaseUrl) -> Iterator[tuple[sa.Engine, bytes]]:
    """The database and the secret; what was changed is handed to this host's workers at the end."""
    from proxy.keeper import KeyKeeper

    settings = load_config(config, data_dir=data_dir, database_url=database_url).settings
    prepare_data_dir(settings)
    with open_database(config, data_dir, database_url, revision="head") as engine:
        keeper = KeyKeeper(settings)
        try:
            yield engine, keeper.secret
            keeper.look()
        finally:
            keeper.close()


def _say_made(key: ApiKey, token: str, json: bool) -> None:
    if json:
        print(msgspec.json.encode({"key": key, "token": token}).decode())
        return
    print(token)
    ends = "never expires" if key.expires_at is None else f"expires {_stamp(key.expires_at)}"
    of = f"tenant {key.tenant}" if key.tenant is not None else f"role {key.role}" if key.role else "no tenant"
    print(f"{key.key_id} ({key.name}, {of}, {ends}); it is not shown again", file=sys.stderr)


def _stamp(epoch_s: float | None) -> str:
    if epoch_s is None:
        return ""
    return datetime.datetime.fromtimestamp(epoch_s, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _create(wanted: KeyWanted, config: Config, data_dir: DataDir, database_url: DatabaseUrl, json: bool) -> None:
    from storage.keys import create_key

    with _keys(config, data_dir, database_url) as (engine, secret):
        _say_made(*create_key(engine, wanted, secret, time.time()), json)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    tenant: Annotated[str | None, typer.Option(help="Whom its requests are accounted to.")] = None,
    expires_in: ExpiresIn = None,
    requests_per_s: Annotated[float | None, typer.Option(help="Limit.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="Limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Limit.")] = None,
    log_type: Annotated[str | None, typer.Option(help="Of requests that say none: conversation or api.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a key, and print it: it can not be shown again."""
    from proxy.request_head import LOG_TYPES
    from storage.key_file import KeyLimits
    from storage.keys import KeyWanted

    if log_type is not None and log_type not in ("conversation", "api"):
        raise ConfigError(f"--log-type: expected conversation or api, got {log_type!r}")
    seconds = _seconds(expires_in, "--expires-in")
    limits = KeyLimits(requests_per_s, tokens_per_s, concurrency)
    expires_at = None if seconds is None else time.time() + seconds
    wanted = KeyWanted(name, tenant, expires_at, limits, None if log_type is None else LOG_TYPES[log_type])
    _create(wanted, config, data_dir, database_url, json)


@admin_app.command("create")
def admin_create(
    name: Annotated[str, typer.Argument(help="Whose token it is, for people.")],
    role: Annotated[str, typer.Option(help="viewer, operator or admin.")],
    expires_in: ExpiresIn = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a token for the control plane, and print it: it can not be shown again."""
    from storage.keys import ROLES, KeyWanted

    known = next((each for each in ROLES if each == role), None)
    if known is None:
        raise ConfigError(f"--role: expected one of {', '.join(ROLES)}, got {role!r}")
    seconds = _seconds(expires_in, "--expires-in")
    expires_at = None if seconds is None else time.time() + seconds
    _create(KeyWanted(name, expires_at=expires_at, role=known), config, data_dir, database_url, json)


@keys_app.command("list")
def keys_list(
    data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None, json: Json = False
) -> None:
    """List every key and token ever made, the newest first; of each its beginning."""
    from storage.keys import list_keys

    with open_database(config, data_dir, database_url) as engine:
        found = list_keys(engine, time.time())
    if json:
        print(msgspec.json.encode(found).decode())
        return
    rows = [("id", "begins", "name", "tenant or role", "state", "created", "expires", "last used", "limits")]
    for key in found:
        limits = msgspec.structs.asdict(key.limits)
        said = ", ".join(f"{name} {value:g}" for name, value in limits.items() if value is not None)
        rows.append((
            key.key_id, key.prefix, key.name, key.tenant or key.role or "", key.state, _stamp(key.created_at),
            _stamp(key.expires_at), str(key.last_used_day or ""), said,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@keys_app.command("revoke")
def keys_revoke(key_id: str, data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """End a key or a token now: gateways refuse it within two seconds."""
    from storage.keys import revoke_key

    with _keys(config, data_dir, database_url) as (engine, _):
        key = revoke_key(engine, key_id, time.time())
    print(f"{key.key_id} ({key.name}) revoked")


@keys_app.command("rotate")
def keys_rotate(
    key_id: str,
    grace: Annotated[str, typer.Option(help="How long the old one stays valid.")] = "24h",
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Make a key's successor with its tenant, limits and expiry, and print it."""
    from storage.keys import rotate_key

    grace_s = _seconds(grace, "--grace") or 0.0
    with _keys(config, data_dir, database_url) as (engine, secret):
        _say_made(*rotate_key(engine, key_id, secret, grace_s=grace_s, now_s=time.time()), json)
