"""What keeps a host's keys: the database while it is there, the file while it is not."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.keeper import KeyKeeper
from proxy.sessions import load_key_secret
from proxy.settings import KeySettings, Settings
from storage.engine import open_engine, upgrade
from storage.key_file import key_file, read_key_file, touch_used
from storage.keys import KeyWanted, create_key, list_keys, revoke_key


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[KeyKeeper]:
    made = KeyKeeper(Settings(data_dir=tmp_path))
    engine = open_engine(made.settings.database)
    upgrade(engine)
    engine.dispose()
    yield made
    made.close()


def cached(keeper: KeyKeeper) -> set[str] | None:
    found = read_key_file(key_file(keeper.settings.data_dir))
    return None if found is None else {key.name for key in found}


def test_the_file_follows_the_database(keeper: KeyKeeper) -> None:
    keeper.look()
    assert cached(keeper) is None  # nobody uses keys here
    engine = keeper.engine()
    assert engine is not None
    key, _ = create_key(engine, KeyWanted("a"), keeper.secret, time.time())
    keeper.look()
    assert cached(keeper) == {"a"}
    key_file(keeper.settings.data_dir).unlink()
    keeper.look()
    assert cached(keeper) == {"a"}
    revoke_key(engine, key.key_id, time.time())
    keeper.look()
    assert cached(keeper) == set()


def test_administrators_are_known_without_a_database(keeper: KeyKeeper) -> None:
    engine = keeper.engine()
    assert engine is not None
    _, token = create_key(engine, KeyWanted("ops", role="admin"), keeper.secret, time.time())
    keeper.look()
    away = KeyKeeper(keeper.settings.model_copy(update={"database_url": "postgresql://u@127.0.0.1:1/x"}))
    with contextlib.closing(away):
        away.look()
        found = away.admin(token.encode(), time.time())
        assert found is not None
        assert (found.name, found.role) == ("ops", "admin")
        assert away.admin(b"bga-wrong", time.time()) is None
        assert cached(away) == {"ops"}


def test_the_day_of_last_use_reaches_the_database(keeper: KeyKeeper) -> None:
    engine = keeper.engine()
    assert engine is not None
    key, _ = create_key(engine, KeyWanted("a"), keeper.secret, time.time())
    touch_used(keeper.settings.data_dir, key.key_id)
    keeper.look()
    assert list_keys(engine, time.time())[0].last_used_day == datetime.datetime.now(datetime.UTC).date()


def test_keys_of_another_secret_are_reported(
    keeper: KeyKeeper, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    engine = keeper.engine()
    assert engine is not None
    create_key(engine, KeyWanted("a"), keeper.secret, time.time())
    (tmp_path / "other").write_bytes(b"another secret of ours")
    keys = KeySettings(secret_file=tmp_path / "other")
    with contextlib.closing(KeyKeeper(keeper.settings.model_copy(update={"keys": keys}))) as other:
        with caplog.at_level(logging.ERROR):
            other.look()
            other.look()
        assert [record.message for record in caplog.records] == [
            "1 keys of the database were made with another secret (keys.secret_file)"
        ]


def test_a_secret_is_long_enough(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short\n")
    with pytest.raises(OSError, match=r"keys\.secret_file: expected at least 16 bytes, found 5"):
        load_key_secret(tmp_path, tmp_path / "short")
    assert load_key_secret(tmp_path, None) != (tmp_path / "secret").read_bytes()
