"""What an operator has changed on a running installation: the last layer over the configuration, with its history.

`data_dir/steering.json` holds revisions, oldest first; the last one is in force. A revision is the whole layer: dotted
setting keys and their values, and which of them are kept over a stop and a start. Undoing is a new revision with an
older one's content, so that the history only grows (to the last `MAX_REVISIONS`). The file is replaced whole, readable
by its owner only: a value may be a secret.

The control plane writes it, and asks the supervisor to load its configuration again (SIGHUP); the supervisor lays it
over file, environment and flags (proxy/settings.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from proxy.config_error import ConfigError
from proxy.settings import NEED_RESTART, NEED_STOP, Settings, setting_keys, validate

MAX_REVISIONS = 100
_VERSION = 1


class Revision(msgspec.Struct, frozen=True):
    """One state of the layer."""

    number: int
    at: float
    """Epoch seconds."""
    actor: str
    note: str
    values: dict[str, Any]
    kept: tuple[str, ...] = ()
    """Keys that outlive a stop and a start."""


class _File(msgspec.Struct, frozen=True):
    version: int
    revisions: tuple[Revision, ...]


NOTHING = Revision(0, 0.0, "", "", {})
"""Before the first change."""


class StaleRevision(Exception):
    """The change was meant for another revision than the one in force."""


def _path(data_dir: Path) -> Path:
    return data_dir / "steering.json"


def read_revisions(data_dir: Path) -> tuple[Revision, ...]:
    """All that are kept, oldest first. Raises ConfigError when the file can not be used."""
    path = _path(data_dir)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except (FileNotFoundError, NotADirectoryError):  # a data directory that is none is the caller's to refuse
        return ()
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}; without the file, the configuration alone is in force") from None
    if found.version != _VERSION:
        raise ConfigError(f"{path}: version {found.version}; this program knows version {_VERSION}")
    return found.revisions


def read_layer(data_dir: Path) -> dict[str, Any]:
    """The values in force, by dotted key. Raises ConfigError."""
    revisions = read_revisions(data_dir)
    return revisions[-1].values if revisions else {}


@contextlib.contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    descriptor = os.open(data_dir / ".steering.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(data_dir: Path, revisions: tuple[Revision, ...]) -> None:
    path = _path(data_dir)
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(_File(_VERSION, revisions[-MAX_REVISIONS:]))))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _append(revisions: tuple[Revision, ...], revision: Revision, data_dir: Path) -> Revision:
    _write(data_dir, (*revisions, revision))
    return revision


def change(
    data_dir: Path,
    changes: Mapping[str, Any],
    *,
    actor: str,
    note: str = "",
    keep: bool = False,
    expected: int | None = None,
) -> Revision:
    """Set values, or with None take them back to what the configuration says; returns the new revision.

    keep: the changed keys outlive a stop and a start. expected: the revision that the change is meant for.
    Raises StaleRevision, ConfigError, OSError.
    """
    with _alone(data_dir):
        revisions = read_revisions(data_dir)
        last = revisions[-1] if revisions else NOTHING
        if expected is not None and expected != last.number:
            raise StaleRevision(f"revision {last.number} is in force, not {expected}")
        values = {**last.values, **changes}
        values = {key: value for key, value in values.items() if value is not None}
        kept = set(last.kept) - set(changes) | (set(changes) if keep else set())
        made = Revision(last.number + 1, time.time(), actor, note, values, tuple(sorted(kept & set(values))))
        return _append(revisions, made, data_dir)


def roll_back(data_dir: Path, number: int, *, actor: str) -> Revision:
    """A new revision with the content of an older one (0: of none). Raises KeyError when it is not kept any more."""
    with _alone(data_dir):
        revisions = read_revisions(data_dir)
        wanted = next((each for each in (NOTHING, *revisions) if each.number == number), None)
        if wanted is None:
            raise KeyError(number)
        last = revisions[-1] if revisions else NOTHING
        made = Revision(last.number + 1, time.time(), actor, f"back to revision {number}", wanted.values, wanted.kept)
        return _append(revisions, made, data_dir)


def begin(data_dir: Path) -> None:
    """At a start: what was not to be kept is gone. Raises ConfigError, OSError."""
    if not _path(data_dir).exists():
        return
    with _alone(data_dir):
        revisions = read_revisions(data_dir)
        last = revisions[-1] if revisions else NOTHING
        values = {key: value for key, value in last.values.items() if key in last.kept}
        if values != last.values:
            made = Revision(last.number + 1, time.time(), "start", "what was not kept is dropped", values, last.kept)
            _append(revisions, made, data_dir)


def check_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """What the settings would be with these values (None: as the configuration says, taken for unchanged).

    Raises ConfigError for an unknown key, a value that can not be, and a setting that does not change while running.
    """
    known = set(setting_keys())
    fields: dict[str, Any] = settings.model_dump(mode="json")
    for key, value in changes.items():
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            raise ConfigError(f"unknown setting '{key}'; the nearest known one is '{near[0]}'")
        group = key.partition(".")[0]
        if group in NEED_STOP or group in NEED_RESTART:
            what = "a stop and a start" if group in NEED_STOP else "a restart (SIGUSR2)"
            raise ConfigError(f"{key}: does not change while running: set it in the configuration; it needs {what}")
        if value is not None:
            target = fields
            *groups, name = key.split(".")
            for part in groups:
                target = target[part]
            target[name] = value
    return validate(fields, dict.fromkeys(changes, "change"))
