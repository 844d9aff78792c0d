from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.engine import current, downgrade, open_engine, upgrade
from storage.errors import DatabaseUnavailable, DatabaseUrlError, SchemaError


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "expected sqlite:///PATH or postgresql://USER@HOST/DATABASE"),
        ("burstgate.db", "expected sqlite:///PATH or postgresql://"),
        ("postgresql://host:notaport/db", "expected sqlite:///PATH"),
        ("mysql://root:secret@host/db", "mysql://root:***@host/db': expected a scheme of sqlite or postgresql"),
        ("postgresql+asyncpg://u:secret@host/db", "got 'postgresql+asyncpg'"),
        ("mysql://u:sec@ret@host/db", "mysql://u:***@host/db"),  # an "@" that should have been %40
        ("mysql://u:sec/ret@host/db", "mysql://u:***@host/db"),
        ("mysql://host/db?password=secret", "password=***"),
        ("sqlite://", "expected a file path after sqlite:///"),
        ("sqlite:///:memory:", "expected a file path after sqlite:///, got ':memory:'"),
        ("sqlite:////nonexistent/folder/x.db", "the folder '/nonexistent/folder' does not exist"),
        ("sqlite:////", "is a folder"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line_without_its_password(url: str, message: str) -> None:
    with pytest.raises(DatabaseUrlError) as caught:
        open_engine(url)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_schemes_are_one_and_opening_does_not_connect(scheme: str) -> None:
    engine = open_engine(f"{scheme}://u:secret@127.0.0.1:1/db")
    assert engine.url.drivername == "postgresql+psycopg"
    with pytest.raises(DatabaseUnavailable, match="Connection refused") as caught:
        current(engine)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = open_engine(f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/db?connect_timeout=2")
        with pytest.raises(DatabaseUnavailable, match="timeout"):
            current(engine)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DatabaseUrlError, match="no permission to use"):
        open_engine(f"sqlite:///{tmp_path / 'x.db'}")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, though long enough to be looked at as one" * 100)
    with pytest.raises(DatabaseUnavailable, match=r"notes\.txt: file is not a database"):
        upgrade(open_engine(f"sqlite:///{path}"))


def test_sqlite_settings(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
    with engine.connect() as connection:
        got = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
    assert got == ["wal", 1, 5000, 1]
    engine.dispose()


@pytest.mark.postgres
def test_postgres_connections_carry_our_name(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW application_name").scalar() == "burstgate"
    engine.dispose()


@pytest.mark.parametrize("run", [lambda engine: upgrade(engine, "9999"), lambda engine: downgrade(engine, "9999")])
def test_a_revision_that_is_not_known_is_named(database_url: str, run: object) -> None:
    engine = open_engine(database_url)
    upgrade(engine)
    assert callable(run)
    with pytest.raises(SchemaError, match=r"'9999'.*knows revisions up to '0007'"):
        run(engine)
    engine.dispose()


def test_a_database_of_a_newer_version_is_refused(database_url: str) -> None:
    engine = open_engine(database_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaError, match="9999"):
        upgrade(engine)
    assert current(engine) == "9999"
    engine.dispose()


def test_processes_that_upgrade_at_once_all_succeed_from_any_folder(database_url: str, tmp_path: Path) -> None:
    code = (
        "import sys; from storage.engine import open_engine, upgrade, current;"
        "engine = open_engine(sys.argv[1]); upgrade(engine); print(current(engine)); engine.dispose()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, database_url],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert [process.communicate(timeout=60) for process in started] == [("0007\n", "")] * 4


def test_a_migration_that_fails_leaves_nothing(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with engine.begin() as connection:  # the third of the migration's tables is in the way
        connection.exec_driver_sql("CREATE TABLE segments (x)")
    with pytest.raises(DatabaseUnavailable, match="table segments already exists"):
        upgrade(engine)
    assert current(engine) is None
    assert sa.inspect(engine).get_table_names() == ["segments"]
    engine.dispose()


def test_a_locked_file_is_said_to_be_locked(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.engine._UPGRADE_BUSY_TIMEOUT_S", 0.05)
    engine = open_engine(sqlite_url)
    current(engine)
    holder = sqlite3.connect(engine.url.database or "")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="database is locked"):
        upgrade(engine)
    holder.close()
    upgrade(engine)
    assert current(engine) == "0007"
    engine.dispose()
