"""The layer of changes over the configuration, and its history."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config_error import ConfigError
from proxy.settings import Settings, load_settings
from proxy.steering import (
    MAX_REVISIONS,
    StaleRevision,
    begin,
    change,
    check_changes,
    read_layer,
    read_revisions,
    roll_back,
)


def test_without_a_file_nothing_is_changed(tmp_path: Path) -> None:
    assert read_layer(tmp_path) == {}
    assert read_revisions(tmp_path) == ()
    begin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_change_lies_over_flags_and_can_be_taken_back(tmp_path: Path) -> None:
    change(tmp_path, {"timeouts.chunk_s": 5, "aliases": {"a": "b"}}, actor="me", note="slow")
    change(tmp_path, {"timeouts.chunk_s": None}, actor="me")
    assert read_layer(tmp_path) == {"aliases": {"a": "b"}}
    loaded = load_settings(environment={}, flags={"aliases": {"c": "d"}}, layer=read_layer(tmp_path))
    assert loaded.settings.aliases == {"a": "b"}
    assert loaded.sources["aliases"] == "control plane"
    assert [(each.number, each.actor, each.note) for each in read_revisions(tmp_path)] == [
        (1, "me", "slow"),
        (2, "me", ""),
    ]


def test_going_back_is_a_new_revision(tmp_path: Path) -> None:
    change(tmp_path, {"retry.budget": 0.1}, actor="a")
    change(tmp_path, {"retry.budget": 0.9}, actor="a")
    assert roll_back(tmp_path, 1, actor="b").values == {"retry.budget": 0.1}
    assert roll_back(tmp_path, 0, actor="b").values == {}
    assert [each.number for each in read_revisions(tmp_path)] == [1, 2, 3, 4]
    with pytest.raises(KeyError):
        roll_back(tmp_path, 77, actor="b")


def test_a_start_drops_what_was_not_to_be_kept(tmp_path: Path) -> None:
    change(tmp_path, {"retry.budget": 0.1}, actor="a", keep=True)
    change(tmp_path, {"retry.max_attempts": 2}, actor="a")
    begin(tmp_path)
    assert read_layer(tmp_path) == {"retry.budget": 0.1}
    begin(tmp_path)
    assert len(read_revisions(tmp_path)) == 3
    change(tmp_path, {"retry.budget": 0.3}, actor="a")  # changed for now only: no longer kept
    begin(tmp_path)
    assert read_layer(tmp_path) == {}


def test_a_change_for_another_revision_is_refused(tmp_path: Path) -> None:
    change(tmp_path, {"retry.budget": 0.1}, actor="a", expected=0)
    with pytest.raises(StaleRevision, match="revision 1 is in force, not 0"):
        change(tmp_path, {"retry.budget": 0.2}, actor="a", expected=0)
    assert read_layer(tmp_path) == {"retry.budget": 0.1}


def test_the_history_has_an_end_and_is_for_its_owner(tmp_path: Path) -> None:
    for number in range(MAX_REVISIONS + 5):
        change(tmp_path, {"retry.min_per_s": number}, actor="a")
    assert [each.number for each in read_revisions(tmp_path)] == list(range(6, MAX_REVISIONS + 6))
    assert stat.S_IMODE((tmp_path / "steering.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 9, "revisions": []}', b"\xff"])
def test_a_file_that_can_not_be_used_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "steering.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"steering\.json: "):
        read_layer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"retry.budgte": 1}, r"unknown setting 'retry.budgte'; the nearest known one is 'retry.budget'"),
        ({"": 1}, "unknown setting ''"),
        ({"retry": {}}, "unknown setting 'retry'"),  # a group: its keys are named one by one
        ({"retry.budget": 7}, r"change: retry.budget: .*less than or equal to 1, got 7"),
        ({"retry.budget": []}, r"change: retry.budget: .*number"),
        ({"port": 1}, "port: does not change while running.*a stop and a start"),
        ({"journal.budget": 1}, "journal.budget: does not change while running.*SIGUSR2"),
        ({"upstreams": [{"url": "x"}]}, "change: upstreams"),
        ({"aliases": {"a": "b", "b": "c"}}, "change: aliases: .*is itself an alias"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_changes(Settings(upstreams=("http://a:1",)), changes)


def test_what_can_be_is_checked_as_a_whole() -> None:
    wanted = check_changes(
        Settings(upstreams=("http://a:1",)),
        {"retry.budget": 0.5, "upstreams": [{"url": "http://b:1", "weight": 3}], "retry.min_per_s": None},
    )
    assert (wanted.retry.budget, str(wanted.upstreams[0]), wanted.upstreams[0].weight) == (0.5, "http://b:1", 3)


KEYS = st.sampled_from(["retry.budget", "retry.min_per_s", "retry.max_attempts"])
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.dictionaries(KEYS, st.none() | st.integers(1, 9), max_size=3), st.booleans()),
        st.tuples(st.just("back"), st.integers(0, 5), st.just(False)),
        st.tuples(st.just("start"), st.just(0), st.just(False)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(ACTS)
def test_the_layer_is_what_was_done_in_order(tmp_path_factory: pytest.TempPathFactory, acts: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("data")
    states: list[tuple[dict[str, Any], set[str]]] = [({}, set())]
    for kind, argument, keep in acts:
        values, kept = dict(states[-1][0]), set(states[-1][1])
        if kind == "set":
            change(folder, argument, actor="a", keep=keep)
            values |= argument
            values = {key: value for key, value in values.items() if value is not None}
            kept = (kept - set(argument)) | (set(argument) if keep else set())
            states.append((values, kept & set(values)))
        elif kind == "back" and argument < len(states):
            roll_back(folder, argument, actor="a")
            states.append(states[argument])
        elif kind == "start":
            begin(folder)
            left = {key: value for key, value in values.items() if key in kept}
            if left != values:
                states.append((left, kept))
        assert read_layer(folder) == states[-1][0]
