from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

import migrations
from storage.engine import current, downgrade, open_engine, upgrade
from storage.schema import is_partition, metadata, requests
from storage.sink import SegmentProgress, WriterTotals, open_sink
from tests.compiled import needs_source
from traces.record import TraceRecord

RECORDS = [
    TraceRecord(f"0190a0a0-0000-7000-8000-{number:012x}", 1_700_000_000.25 + number * 43_200) for number in range(5)
]


def _fill(engine: sa.Engine) -> int:
    return open_sink(engine).commit(
        RECORDS, [SegmentProgress("w", 1, 10, 5)], [WriterTotals("w", "g", 5, {"full": 1}, False)]
    )


def test_the_migrated_database_is_what_the_metadata_says(engine: sa.Engine) -> None:
    _fill(engine)  # so that PostgreSQL has partitions to be left out

    def is_ours(name: str | None, kind: str, _parents: Any) -> bool:
        return not (kind == "table" and name is not None and is_partition(name))

    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "include_name": is_ours}
        )
        assert compare_metadata(context, metadata) == []


def test_what_autogenerate_does_not_compare_agrees_too(engine: sa.Engine) -> None:
    reflected = sa.inspect(engine)
    assert reflected.get_pk_constraint("requests")["constrained_columns"] == ["received_at", "request_id"]
    assert {index["name"] for index in reflected.get_indexes("requests")} == {"requests_session", "requests_failures"}
    if engine.dialect.name == "postgresql":
        got = {column["name"]: column["comment"] for column in reflected.get_columns("requests")}
        assert got == {column.name: column.comment for column in requests.columns}
    else:
        with engine.connect() as connection:
            made = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'requests'").scalar_one()
        assert made.rstrip().endswith("WITHOUT ROWID")


def test_up_and_down_with_rows(database_url: str) -> None:
    engine = open_engine(database_url)
    assert current(engine) is None
    upgrade(engine)
    assert current(engine) == "0007"
    assert _fill(engine) == 5
    upgrade(engine)  # nothing to do: the rows stay
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(requests)).scalar() == 5
    downgrade(engine, "base")  # drops the tables and their rows, partitions included
    assert current(engine) is None
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]
    upgrade(engine)
    assert _fill(engine) == 5
    engine.dispose()


def test_every_migration_can_go_down() -> None:
    versions = sorted(Path(migrations.__path__[0]).glob("versions/*.py"))
    assert versions
    assert [path.name for path in versions if "def downgrade" not in path.read_text()] == []


@needs_source
def test_migrations_travel_in_the_wheel(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(Path(__file__).parents[2]))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    assert {"migrations/env.py", "migrations/script.py.mako", "migrations/versions/0001_requests.py"} <= set(names)
