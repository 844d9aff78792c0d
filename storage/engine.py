"""Opens the database and brings its schema to a revision.

Two databases: SQLite (a file, in WAL mode, so that readers and the one writer do not wait for each other) and
PostgreSQL through psycopg 3. Opening PostgreSQL does not connect: the gateway starts while its database is down.

Migrations are Alembic's, run in this process from the packaged `migrations/`. One run is one transaction behind one
lock (an advisory lock on PostgreSQL, BEGIN IMMEDIATE on SQLite), so of two processes that upgrade at once one waits
and then finds the work done, and a migration that fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa

import migrations
from storage.errors import DatabaseUnavailable, DatabaseUrlError, SchemaError

if TYPE_CHECKING:
    from alembic.config import Config

# Alembic reports each of its steps, its own import included, as news.
logging.getLogger("alembic").setLevel(logging.WARNING)

BUSY_TIMEOUT_S = 5.0
"""How long a SQLite statement waits for another process's write."""
_CONNECT_TIMEOUT_S = 5
_UPGRADE_BUSY_TIMEOUT_S = 300.0
"""A second upgrade waits out the first; a migration of a large SQLite file takes minutes."""
_UPGRADE_LOCK = 0x6275727374  # "burst": the advisory lock's key, ours alone in the database
_SQLITE_BEGIN = "burstgate_sqlite_begin"
_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# Alembic keeps the migration in progress in module globals, so one at a time in a process.
_alembic_in_use = threading.Lock()


def open_engine(database_url: str) -> sa.Engine:
    """An engine for `sqlite:///path` or `postgresql://...` (or `postgres://...`).

    SQLite: the folder must exist; the file is made at first use. PostgreSQL: no connection is made yet.
    Raises DatabaseUrlError naming the URL and what is wrong with it.
    """
    shown = _without_password(database_url)
    try:
        url = sa.make_url(database_url)
        driver = _DRIVERS.get(url.drivername)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise DatabaseUrlError(
            f"database URL {shown!r}: expected sqlite:///PATH or postgresql://USER@HOST/DATABASE"
        ) from error
    if driver is None:
        raise DatabaseUrlError(
            f"database URL {shown!r}: expected a scheme of sqlite or postgresql, got {url.drivername!r}"
        )
    url = url.set(drivername=driver)
    if driver.startswith("sqlite"):
        return _open_sqlite(url, shown)
    return _open_postgres(url)


def upgrade(engine: sa.Engine, revision: str = "head") -> None:
    """Brings the schema up to `revision`; nothing when it is there already.

    Raises SchemaError for a revision that is not known, DatabaseUnavailable.
    """
    from alembic import command  # imported by those who migrate: it takes longer than the rest of this package

    _migrate(engine, lambda config: command.upgrade(config, revision))


def downgrade(engine: sa.Engine, revision: str) -> None:
    """Takes the schema down to `revision`; `base` drops every table with its rows.

    Raises SchemaError for a revision that is not known, DatabaseUnavailable.
    """
    from alembic import command

    _migrate(engine, lambda config: command.downgrade(config, revision))


def current(engine: sa.Engine) -> str | None:
    """The schema's revision; None for a database without burstgate's tables. Raises DatabaseUnavailable."""
    from alembic.runtime.migration import MigrationContext

    with database_errors(engine), engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head_revision() -> str | None:
    """The newest revision that this version of burstgate knows."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(migrations.__path__[0]))).get_current_head()


@contextlib.contextmanager
def database_errors(engine: sa.Engine, raised: type[DatabaseUnavailable] = DatabaseUnavailable) -> Iterator[None]:
    """Turns the driver's and SQLAlchemy's errors into `raised`, one line that names the database and the reason."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error, psycopg.Error) as error:
        reason = _first_line(getattr(error, "orig", None) or error)
        if isinstance(getattr(error, "orig", error), psycopg.errors.UndefinedTable) or "no such table" in reason:
            reason += " (is the schema there? `burstgate db upgrade` makes it)"
        raise raised(f"database {_without_password(str(engine.url))}: {reason}") from error


def _open_sqlite(url: sa.URL, shown: str) -> sa.Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise DatabaseUrlError(f"database URL {shown!r}: expected a file path after sqlite:///, got {url.database!r}")
    path = Path(url.database)
    if path.is_dir():
        raise DatabaseUrlError(f"database URL {shown!r}: expected a file, {str(path)!r} is a folder")
    if not path.parent.is_dir():
        raise DatabaseUrlError(f"database URL {shown!r}: the folder {str(path.parent)!r} does not exist")
    needed = path if path.exists() else path.parent
    if not os.access(needed, os.R_OK if path.exists() else os.W_OK | os.X_OK):
        raise DatabaseUrlError(f"database URL {shown!r}: no permission to use {str(needed)!r}")
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own BEGIN comes before DML only, so DDL would escape its transaction: BEGIN is ours to say.
    connection.isolation_level = None
    # Of a new file only, and before anything is written into it: retention gives space back a few pages at a time.
    if connection.execute("PRAGMA page_count").fetchone() == (0,):
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    _enter_wal(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Puts the file into WAL mode. It lasts, so only the first opener changes it; that change ignores busy_timeout."""
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname == "SQLITE_READONLY":
                return
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
        else:
            return  # a file system without shared memory keeps its mode, and the database works all the same


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_SQLITE_BEGIN, 'DEFERRED')}")


def _open_postgres(url: sa.URL) -> sa.Engine:
    defaults: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "application_name": "burstgate",
        # A server that vanished without a word is noticed in half a minute, not in the kernel's two hours.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 4,
        "tcp_user_timeout": 30_000,
    }
    return sa.create_engine(
        url, pool_pre_ping=True, connect_args={key: value for key, value in defaults.items() if key not in url.query}
    )


def _migrate(engine: sa.Engine, run: Callable[[Config], None]) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])).replace("%", "%%"))
    with _alembic_in_use, database_errors(engine), _locked(engine) as connection:
        config.attributes["connection"] = connection
        try:
            run(config)
        except CommandError as error:
            head = ScriptDirectory.from_config(config).get_current_head()
            raise SchemaError(
                f"database {_without_password(str(engine.url))}: {_first_line(error)} "
                f"(this version of burstgate knows revisions up to {head!r})"
            ) from error


@contextlib.contextmanager
def _locked(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection in a transaction that no other migration of this database runs beside."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection = connection.execution_options(**{_SQLITE_BEGIN: "IMMEDIATE"})
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.execute(f"PRAGMA busy_timeout={_UPGRADE_BUSY_TIMEOUT_S * 1000:.0f}")
            try:
                with connection.begin():
                    yield connection
            finally:
                driver.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000:.0f}")
        else:
            with connection.begin():
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
                yield connection


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _without_password(database_url: str) -> str:
    # To the last "@", because a password pasted unescaped may hold one.
    hidden = re.sub(r"(://[^:/?#]*):[^/?#]*@", r"\1:***@", database_url)
    hidden = re.sub(r"(://[^:/]*):.*@", r"\1:***@", hidden) if ":***@" not in hidden else hidden
    return re.sub(r"([?&](?:password|sslpassword)=)[^&]*", r"\1***", hidden)
