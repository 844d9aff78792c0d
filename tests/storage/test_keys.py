"""Keys in both databases."""

from __future__ import annotations

import datetime

import pytest
import sqlalchemy as sa

from storage.engine import open_engine
from storage.errors import DatabaseUnavailable
from storage.key_file import CachedKey, KeyLimits, key_hash
from storage.keys import (
    KeyConflict,
    KeyWanted,
    check_wanted,
    create_key,
    keys_version,
    list_keys,
    mark_used,
    revoke_key,
    rotate_key,
    valid_keys,
)
from storage.schema import api_keys
from traces.record import LogType

SECRET = b"s" * 32
NOW_S = 1_800_000_000.0
ALICE = KeyWanted("alice", "team-a", NOW_S + 1000, KeyLimits(5.0, 1000.0, 3), LogType.CONVERSATION)


def states(engine: sa.Engine, now_s: float) -> dict[str, str]:
    return {key.key_id: key.state for key in list_keys(engine, now_s)}


def valid_ids(engine: sa.Engine, now_s: float) -> set[str]:
    return {key.key_id for key in valid_keys(engine, SECRET, now_s)[0]}


def test_a_key_from_its_making_to_its_expiry(engine: sa.Engine) -> None:
    assert keys_version(engine) == (0, 0)
    key, token = create_key(engine, ALICE, SECRET, NOW_S)
    assert (key.state, key.tenant, key.prefix, key.log_type) == ("valid", "team-a", token[:11], "Conversation log")
    assert list_keys(engine, NOW_S) == [key]
    cached = CachedKey(
        key.key_id,
        "alice",
        key_hash(SECRET, token.encode()),
        "team-a",
        NOW_S + 1000,
        ALICE.limits,
        LogType.CONVERSATION,
    )
    assert valid_keys(engine, SECRET, NOW_S + 999.9) == ((cached,), 0)
    assert valid_keys(engine, SECRET, NOW_S + 1000) == ((), 0)
    assert states(engine, NOW_S + 1000) == {key.key_id: "expired"}


def test_the_database_holds_no_key(engine: sa.Engine) -> None:
    _, token = create_key(engine, ALICE, SECRET, NOW_S)
    with engine.connect() as connection:
        (row,) = connection.execute(sa.select(api_keys)).all()
    assert token not in repr(row)
    assert token[:11] in repr(row)
    assert token[11:] not in repr(row)


def test_revoking(engine: sa.Engine) -> None:
    key, _ = create_key(engine, ALICE, SECRET, NOW_S)
    other, _ = create_key(engine, KeyWanted("bob"), SECRET, NOW_S)
    version = keys_version(engine)
    assert revoke_key(engine, key.key_id, NOW_S + 1).state == "revoked"
    assert keys_version(engine) > version
    assert valid_ids(engine, NOW_S + 1) == {other.key_id}
    with pytest.raises(KeyConflict, match="it was revoked before"):
        revoke_key(engine, key.key_id, NOW_S + 2)
    with pytest.raises(KeyConflict, match="expected the id of a key"):
        revoke_key(engine, "key_none", NOW_S)


def test_rotating(engine: sa.Engine) -> None:
    key, token = create_key(engine, KeyWanted("bob", "team-b", None, ALICE.limits), SECRET, NOW_S)
    new, new_token = rotate_key(engine, key.key_id, SECRET, grace_s=60, now_s=NOW_S + 10)
    assert new_token != token
    assert (new.name, new.tenant, new.limits, new.expires_at) == ("bob", "team-b", ALICE.limits, None)
    assert states(engine, NOW_S + 10) == {key.key_id: "rotated", new.key_id: "valid"}
    assert valid_ids(engine, NOW_S + 69.9) == {key.key_id, new.key_id}
    assert valid_ids(engine, NOW_S + 70) == {new.key_id}
    (old,) = [each for each in list_keys(engine, NOW_S + 70) if each.key_id == key.key_id]
    assert (old.rotated_at, old.expires_at, old.successor) == (NOW_S + 10, NOW_S + 70, new.key_id)
    for now_s, state in [(NOW_S + 20, "rotated"), (NOW_S + 80, "expired")]:
        with pytest.raises(KeyConflict, match=f"it is {state}; only a valid one"):
            rotate_key(engine, key.key_id, SECRET, grace_s=60, now_s=now_s)


def test_rotating_does_not_lengthen_a_life(engine: sa.Engine) -> None:
    key, _ = create_key(engine, ALICE, SECRET, NOW_S)
    new, _ = rotate_key(engine, key.key_id, SECRET, grace_s=86_400, now_s=NOW_S + 1)
    assert new.expires_at == ALICE.expires_at
    assert {each.expires_at for each in list_keys(engine, NOW_S)} == {ALICE.expires_at}


def test_an_administrators_token_stays_one(engine: sa.Engine) -> None:
    key, token = create_key(engine, KeyWanted("ops", role="operator"), SECRET, NOW_S)
    assert token.startswith("bga-")
    new, new_token = rotate_key(engine, key.key_id, SECRET, grace_s=0, now_s=NOW_S + 1)
    assert new_token.startswith("bga-")
    assert [(each.key_id, each.role) for each in valid_keys(engine, SECRET, NOW_S + 1)[0]] == [(new.key_id, "operator")]


def test_keys_of_another_secret_are_counted_and_not_used(engine: sa.Engine) -> None:
    create_key(engine, ALICE, SECRET, NOW_S)
    assert valid_keys(engine, b"t" * 32, NOW_S) == ((), 1)
    with pytest.raises(KeyConflict, match="made with another secret"):
        create_key(engine, ALICE, b"t" * 32, NOW_S)


def test_the_day_of_last_use_does_not_go_back(engine: sa.Engine) -> None:
    key, _ = create_key(engine, ALICE, SECRET, NOW_S)
    days = [datetime.date(2026, 11, day) for day in (2, 1, 3)]
    for day in days:
        mark_used(engine, {key.key_id: day, "key_gone": day})
        found = list_keys(engine, NOW_S)[0].last_used_day
        assert found == max(days[: days.index(day) + 1])


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (KeyWanted(""), "name: expected 1 to 128 characters"),
        (KeyWanted("a\nb"), "name: expected 1 to 128 characters"),
        (KeyWanted("a", "t" * 129), "tenant: expected 1 to 128"),
        (KeyWanted("a", expires_at=NOW_S), "expires_at: expected a moment to come"),
        (KeyWanted("a", expires_at=float("nan")), "expires_at: expected a moment to come"),
        (KeyWanted("a", limits=KeyLimits(requests_per_s=0)), "requests_per_s: expected a number above 0, got 0"),
        (KeyWanted("a", limits=KeyLimits(tokens_per_s=float("inf"))), "tokens_per_s: expected"),
        (KeyWanted("a", limits=KeyLimits(concurrency=-1)), "concurrency: expected"),
        (KeyWanted("a", "t", role="viewer"), "role: an administrator's token has no tenant"),
        (KeyWanted("a", role="root"), "role: expected one of viewer, operator, admin, got 'root'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wanted_wrongly_is_named(wanted: KeyWanted, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_wanted(wanted, NOW_S)


def test_a_database_without_the_table_says_so(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    try:
        with pytest.raises(DatabaseUnavailable, match="burstgate db upgrade"):
            keys_version(engine)
    finally:
        engine.dispose()
