"""`burstgate doctor`: is this installation sound, and is every request accounted for? Works live and stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import msgspec

from proxy.retention import read_state
from proxy.settings import Settings, show_value
from storage.doctor import Balance, live_writers, take_balance
from storage.engine import current, head_revision, open_engine
from storage.errors import DatabaseUnavailable, DatabaseUrlError, SchemaError
from storage.journal import directory_bytes
from storage.sink import open_sink


class Check(msgspec.Struct, frozen=True):
    """One finding. is_ok None: nothing to judge."""

    name: str
    is_ok: bool | None
    detail: str


def balance_of(settings: Settings) -> Balance:
    """The accounting identity's terms now. Raises DatabaseUnavailable, DatabaseUrlError, OSError."""
    engine = open_engine(settings.database)
    try:
        with contextlib.closing(open_sink(engine)) as sink:
            return take_balance(settings.journal_dir, sink)
    finally:
        engine.dispose()


def diagnose(settings: Settings) -> Iterator[Check]:
    """Look at the data directory, the journal, the database and the identity, in this order."""
    directory = settings.data_dir
    if not directory.is_dir():
        yield Check("data directory", False, f"{directory}: no such directory")
        return
    is_writable = os.access(directory, os.W_OK | os.X_OK)
    yield Check("data directory", is_writable, f"{directory}{'' if is_writable else ': not writable'}")
    used, budget = directory_bytes(settings.journal_dir), int(settings.journal.budget)
    yield Check(
        "journal", used < budget, f"{used:,} of {budget:,} bytes, {live_writers(settings.journal_dir)} live writers"
    )
    shown = show_value(settings.database)
    if settings.database_url is None and not (directory / "burstgate.db").exists():
        yield Check("database", False, f"{shown}: not there yet: the recorder or burstgate db upgrade makes it")
        return
    try:
        engine = open_engine(settings.database)
        try:
            found, wanted = current(engine), head_revision()
        finally:
            engine.dispose()
    except (DatabaseUrlError, DatabaseUnavailable, SchemaError) as error:
        yield Check("database", False, str(error))
        return
    if found != wanted:
        yield Check(
            "database", False, f"{shown}: schema {found or 'missing'}, expected {wanted}: run burstgate db upgrade"
        )
        return
    yield Check("database", True, f"{shown}, schema {found}")
    try:
        yield _identity(balance_of(settings))
    except (DatabaseUnavailable, OSError) as error:
        yield Check("accounting", False, str(error))
    yield from _retention(settings)


def _retention(settings: Settings) -> Iterator[Check]:
    """How the runs went, where there were any; judged where these settings have retention on."""
    state = read_state(settings.data_dir)
    if state is not None:
        done = f"{state.runs:,} runs, {state.rows_pruned:,} records taken out"
        is_ok = state.error is None if settings.retention.is_on else None
        yield Check("retention", is_ok, done if state.error is None else f"{done}; {state.error}")


def _identity(balance: Balance) -> Check:
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(balance.dropped.items())) or "0"
    text = (
        f"accepted {balance.accepted:,} = in database {balance.in_database:,}"
        f"{f' + pruned {balance.pruned:,}' if balance.pruned else ''}"
        f" + in journal {balance.in_journal:,} + dropped {dropped}"
    )
    if balance.slack:
        text += f" (live: counters moved by up to {balance.slack:,} while read)"
    if balance.unreadable:
        text += f"; {balance.unreadable[0]}"
    elif balance.strangers:
        text += f"; {len(balance.strangers)} finished writers are not in this database: was it replaced?"
    elif balance.missing > 0:
        text += f"; {balance.missing:,} requests are missing"
    elif balance.missing < 0:
        text += f"; {-balance.missing:,} records too many"
    return Check("accounting", balance.is_balanced, text)
