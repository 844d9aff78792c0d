from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from proxy.child import ChildTask, encode_task
from proxy.config_error import ConfigError
from proxy.settings import Loaded, Settings, UpstreamSettings, describe, load_settings, setting_keys, show_value


def load(
    tmp_path: Path, text: str | bytes | None = None, flags: dict[str, Any] | None = None, **environment: str
) -> Loaded:
    """Settings from a file with this text, the environment `BURSTGATE_...` and flags."""
    path = None
    if text is not None:
        path = tmp_path / "burstgate.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    named = {f"BURSTGATE_{name}": value for name, value in environment.items()}
    return load_settings(config=path, environment=named, flags=flags)


@pytest.mark.parametrize(
    ("file", "environment", "flag", "port", "source"),
    [
        (None, None, None, 8080, "default"),
        (1, None, None, 1, "FILE"),
        (1, "2", None, 2, "environment"),
        (1, "2", 3, 3, "flag"),
        (1, None, 3, 3, "flag"),
        (None, "2", None, 2, "environment"),
        (8080, None, None, 8080, "FILE"),  # said, though it is the default
        (1, "2", 0, 0, "flag"),  # zero is a value
        (1, "0", None, 0, "environment"),
        (0, None, None, 0, "FILE"),
    ],
)
def test_later_sources_win_and_are_named(
    tmp_path: Path, file: int | None, environment: str | None, flag: int | None, port: int, source: str
) -> None:
    loaded = load(
        tmp_path,
        None if file is None else f"port: {file}\n",
        {"port": flag},
        **({} if environment is None else {"PORT": environment}),
    )
    assert loaded.settings.port == port
    rows = {key: (value, place) for key, value, place in describe(loaded)}
    assert rows["port"] == (str(port), source.replace("FILE", str(tmp_path / "burstgate.yaml")))
    assert rows["host"] == ("127.0.0.1", "default")


@pytest.mark.parametrize(
    ("text", "environment", "key", "value"),
    [
        ("journal: {budget: 5GiB}", {}, "journal.budget", 5 * 1024**3),
        ("journal.budget: 5GiB", {}, "journal.budget", 5 * 1024**3),
        ("journal:\n  budget: 0", {}, "journal.budget", 0),
        ("", {"JOURNAL__BUDGET": "10GiB"}, "journal.budget", 10 * 1024**3),
        ("journal: {budget: 1GiB, segment: 1MiB}", {"JOURNAL__BUDGET": "2GB"}, "journal.budget", 2 * 1000**3),
        ("journal: {budget: 1GiB, segment: 1MiB}", {"JOURNAL__BUDGET": "2GB"}, "journal.segment", 1024**2),
        ("journal: {budget: 1048576}", {}, "journal.budget", 1024**2),
        ("", {"TIMEOUTS__CHUNK_S": "0"}, "timeouts.chunk_s", 0.0),
        ("timeouts: {connect_s: 2}", {}, "timeouts.connect_s", 2.0),
        ("", {"SESSIONS__INFER": "false"}, "sessions.infer", False),
        ("sessions: {infer: no, header: X-Chat}", {}, "sessions.infer", False),
        ("sessions: {infer: no, header: X-Chat}", {}, "sessions.header", "x-chat"),
        ("journal:", {}, "journal.budget", 10 * 1024**3),  # a heading with nothing under it
        ("data_dir: /somewhere", {}, "data_dir", Path("/somewhere")),
        ("gateway: ünïcode", {}, "gateway", "ünïcode"),
    ],
)
def test_nested_keys_by_file_and_environment(
    tmp_path: Path, text: str, environment: dict[str, Any], key: str, value: object
) -> None:
    found: Any = load(tmp_path, text, **environment).settings
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    "loads",
    [
        {"text": "upstreams: [http://a:1, 'http://b:2/prefix']"},
        {"text": "upstreams: http://a:1, http://b:2/prefix"},
        {"UPSTREAMS": "http://a:1,http://b:2/prefix"},
        {"UPSTREAMS": " http://a:1   http://b:2/prefix\n"},
        {"flags": {"upstreams": ("http://a:1", "http://b:2/prefix")}},
        {"text": "upstreams: [http://c:3]", "flags": {"upstreams": ["http://a:1", "http://b:2/prefix"]}},
    ],
)
def test_upstreams_in_every_source(tmp_path: Path, loads: dict[str, Any]) -> None:
    upstreams = load(tmp_path, **loads).settings.upstreams
    assert upstreams == tuple(UpstreamSettings(url=url) for url in ("http://a:1", "http://b:2/prefix"))


@pytest.mark.parametrize(
    ("loads", "key", "value", "shown"),
    [
        ({"ALIASES": "{fast: llama-8b}"}, "aliases", {"fast": "llama-8b"}, '{"fast": "llama-8b"}'),
        ({"text": "aliases:\n  fast: llama-8b"}, "aliases", {"fast": "llama-8b"}, '{"fast": "llama-8b"}'),
        ({"text": "aliases:"}, "aliases", {}, "(none)"),
        ({"text": "fallbacks: {a: b, c: [d, e]}"}, "fallbacks", {"a": ("b",), "c": ("d", "e")},
         '{"a": ["b"], "c": ["d", "e"]}'),
        ({"RETRY__STATUSES": "429 503"}, "retry.statuses", (429, 503), "429, 503"),
        ({"text": "retry: {statuses: []}"}, "retry.statuses", (), "(none)"),
        ({"text": "upstreams: [http://a, {url: http://b, weight: 2, drain: true, models: [m]}]"}, "upstreams",
         (UpstreamSettings(url="http://a"), UpstreamSettings(url="http://b", weight=2, drain=True, models=("m",))),
         'http://a, http://b {"weight": 2.0, "models": ["m"], "drain": true}'),
    ],
)  # fmt: skip
def test_lists_and_mappings(tmp_path: Path, loads: dict[str, Any], key: str, value: object, shown: str) -> None:
    loaded = load(tmp_path, **loads)
    found: Any = loaded.settings
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert {key: text for key, text, _ in describe(loaded)}[key] == shown
    fields = json.loads(encode_task(ChildTask(loaded.settings, 5, 6)))
    assert Settings.model_validate(fields["settings"]) == loaded.settings


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n", "\ufeff# a byte order mark\n"])
def test_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == load(tmp_path)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ({"text": "prot: 1"}, "FILE: unknown setting 'prot'; the nearest known one is 'port'"),
        ({"text": "journal: {bugdet: 1}"}, "FILE: unknown setting 'journal.bugdet'; the nearest known one is "
         "'journal.budget'"),
        ({"text": "journal: 5"}, "FILE: journal: expected a mapping of settings, got 5"),
        ({"text": "journal: [1]"}, "FILE: journal: expected a mapping of settings, got [1]"),
        ({"text": "8080: x"}, "FILE: unknown setting '8080'; the nearest known one is '*'"),
        ({"text": "[port]"}, "FILE: expected a mapping of settings, got list"),
        ({"text": "just text"}, "FILE: expected a mapping of settings, got str"),
        ({"text": "port: [1\nhost: x"}, "FILE:2: not YAML: *"),
        ({"text": "\tport: 1"}, "FILE:1: not YAML: *"),
        ({"text": "port: 1\nlog: {format: json}\nport: 2"}, "FILE:3: not YAML: 'port' stands there twice"),
        ({"text": "log:\n  format: json\n  format: text"}, "FILE:3: not YAML: 'format' stands there twice"),
        ({"text": b"port: \x00"}, "FILE: not YAML: *"),
        ({"text": b"gateway: \xff\xfe"}, "FILE: expected UTF-8 text"),
        ({"text": "[" * 1500}, "FILE: not YAML: *"),
        ({"text": "port: many"}, "FILE: port: *, got 'many'"),
        ({"text": "port: 65536"}, "FILE: port: *, got 65536"),
        ({"text": "port: -1"}, "FILE: port: *, got -1"),
        ({"text": "port: null"}, "FILE: port: *, got None"),
        ({"text": "workers: 0"}, "FILE: workers: *, got 0"),
        ({"text": "workers: 1.5"}, "FILE: workers: *, got 1.5"),
        ({"text": "journal: {budget: much}"}, "FILE: journal.budget: *, got 'much'"),
        ({"text": "journal: {budget: -1}"}, "FILE: journal.budget: *, got -1"),
        ({"text": "journal: {segment: 1KiB}"}, "FILE: journal.segment: *"),
        ({"text": "timeouts: {chunk_s: .inf}"}, "FILE: timeouts.chunk_s: *, got inf"),
        ({"text": "timeouts: {chunk_s: .nan}"}, "FILE: timeouts.chunk_s: *, got nan"),
        ({"text": "timeouts: {connect_s: 0}"}, "FILE: timeouts.connect_s: *, got 0"),
        ({"text": "sessions: {header: 'x y'}"}, "FILE: sessions.header: expected a header name, got 'x y'"),
        ({"text": "sessions: {log_type: chat}"}, "FILE: sessions.log_type: *, got 'chat'"),
        ({"text": "upstreams: [7]"}, "FILE: upstreams: *, got 7"),
        ({"text": "upstreams: [ftp://a]"}, "FILE: upstreams: upstream URL 'ftp://a': expected http://*"),
        ({"PROT": "1"}, "environment: unknown setting 'BURSTGATE_PROT'; the nearest known one is 'BURSTGATE_PORT'"),
        ({"JOURNAL_BUDGET": "1"}, "environment: unknown setting 'BURSTGATE_JOURNAL_BUDGET'; the nearest known one is "
         "'BURSTGATE_JOURNAL__BUDGET'"),
        ({"JOURNAL": "1"}, "environment: unknown setting 'BURSTGATE_JOURNAL'; *"),
        ({"PORT": ""}, "environment: port: *, got ''"),
        ({"UPSTREAMS": "127.0.0.1:8000"}, "environment: upstreams: upstream URL '127.0.0.1:8000': expected http://*"),
        ({"UPSTREAMS": "http://a:99999"}, "environment: upstreams: upstream URL 'http://a:99999': expected *"),
        ({"UPSTREAMS": "http://a/?q=1"}, "environment: upstreams: upstream URL 'http://a/?q=1': expected *"),
        ({"UPSTREAMS": "http://"}, "environment: upstreams: upstream URL 'http://': expected *"),
        ({"UPSTREAMS": "http://a http://a"}, "environment: upstreams: each upstream may be named once, *"),
        ({"UPSTREAMS": "http://a http://a/"}, "environment: upstreams: each upstream may be named once, *"),
        ({"UPSTREAMS": "http://u:hidden@a"}, "environment: upstreams: upstream URL 'http://*"),
        ({"text": "upstreams: [http://a, {url: http://b, wieght: 2}]"},
         "FILE: upstreams: unknown setting 'wieght'; the nearest known one is 'weight', got *"),
        ({"text": "upstreams: [{url: http://b, weight: 0}]"}, "FILE: upstreams: weight: *, got 0"),
        ({"text": "upstreams: [{weight: 1}]"}, "FILE: upstreams: url: Field required, got *"),
        ({"text": "upstreams: [{url: http://u:hidden@b}]"}, "FILE: upstreams: upstream URL 'http://*"),
        ({"text": "upstreams: [{url: http://b, ca_file: x}]"}, "FILE: upstreams: ca_file, cert_file and *"),
        ({"text": "upstreams: [{url: https://b, key_file: x}]"}, "FILE: upstreams: key_file needs a cert_file, got *"),
        ({"text": "upstreams: [{url: http://a, name: x}, {url: http://b, name: x}]"},
         "FILE: upstreams: each upstream may be named once, got *"),
        ({"text": "upstreams: [{url: http://a, name: 'x y'}]"}, "FILE: upstreams: name: *, got 'x y'"),
        ({"text": "aliases: [a]"}, "FILE: aliases: *, got *"),
        ({"text": "aliases: {a: 7}"}, "FILE: aliases: a: *, got 7"),
        ({"text": "aliases: {a: b, b: c}"}, "FILE: aliases: 'a' stands for 'b', which is itself an alias; *"),
        ({"ALIASES": "{a: "}, "environment: aliases: expected a mapping, as in {name: model}, got '{a: '"),
        ({"text": "fallbacks: {a: {b: c}}"}, "FILE: fallbacks: a: *"),
        ({"text": "shaping: {rules: [{name: a}]}"}, "FILE: shaping.rules[0]: rule 'a' needs requests_per_s, *"),
        ({"text": "shaping: {rules: [{name: a, priority: 1}, {name: a, priority: 2}]}"},
         "FILE: shaping.rules: each rule needs a name of its own, *'a' is not, got *"),
        ({"text": "shaping: {rules: [{name: pacing, priority: 1}]}"}, "FILE: shaping.rules: each rule needs *"),
        ({"text": "shaping: {rules: [{name: a, concurrency: 0}]}"}, "FILE: shaping.rules[0]: concurrency: *, got 0"),
        ({"text": "shaping: {rules: [{name: a, request_per_s: 1}]}"},
         "FILE: shaping.rules[0]: unknown setting 'request_per_s'; the nearest known one is 'requests_per_s', got *"),
        ({"text": "shaping: {rules: [{name: a, priority: 1, match: {modle: x}}]}"},
         "FILE: shaping.rules[0]: match: unknown setting 'modle'; the nearest known one is 'model', got *"),
        ({"text": "shaping: {rules: [{name: a, concurrency: 1, burst: 2}]}"},
         "FILE: shaping.rules[0]: rule 'a': burst is for requests_per_s, got *"),
        ({"SHAPING__RULES": "[{"}, "environment: shaping.rules: expected a list of rules, *, got '[{'"),
        ({"text": "shaping: {tenant_header: 'x y'}"}, "FILE: shaping.tenant_header: expected a header name, got 'x y'"),
        ({"text": "shaping: {backend: 'http://a'}"}, "FILE: shaping.backend: expected redis://*, got 'http://a'"),
        ({"text": "shaping: {pacing: {mode: smooth}}"}, "FILE: shaping.pacing: mode smooth needs cv or peak_rps, *"),
        ({"text": "shaping: {pacing: {cv: 1}}"}, "FILE: shaping.pacing: cv or peak_rps needs mode smooth, got *"),
        ({"text": "balance: {policy: random}"}, "FILE: balance.policy: *, got 'random'"),
        ({"text": "health: {path: health}"}, "FILE: health.path: *, got 'health'"),
        ({"text": "retry: {statuses: [200]}"}, "FILE: retry.statuses: *, got 200"),
        ({"RETRY__STATUSES": "502,x"}, "environment: retry.statuses: *, got 'x'"),
        ({"flags": {"port": 70000}}, "flag: port: *, got 70000"),
        ({"text": "port: 1", "flags": {"port": 70000}}, "flag: port: *, got 70000"),
    ],
)  # fmt: skip
def test_wrong_setting_names_place_value_and_rule(tmp_path: Path, loads: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **loads)
    text = str(caught.value)
    pattern = re.escape(message).replace(r"\*\*\*", "\0").replace(r"\*", ".+").replace("\0", r"\*\*\*")
    assert re.fullmatch(pattern.replace("FILE", re.escape(str(tmp_path / "burstgate.yaml"))), text), text
    assert "hidden" not in text


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_file_that_can_not_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r": can not be read: (No such file|Is a directory)"):
        load_settings(config=tmp_path / name, environment={})


def test_other_programs_variables_and_the_tests_own_are_no_settings() -> None:
    environment = {"PORT": "1", "BURSTGATE_TRACES": "/x", "BURSTGATE_VLLM": "/y", "burstgate_port": "1"}
    assert load_settings(environment=environment).settings.port == 8080


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgresql://bob:hidden@db/x", "postgresql://bob:***@db/x"),
        ("postgresql://bob:hid/den@db/x", "postgresql://bob:***@db/x"),
        ("postgresql://bob:hid@den@db/x", "postgresql://bob:***@db/x"),
        ("postgresql://:hidden@db/x", "postgresql://:***@db/x"),
        ("postgresql://db/x?user=bob&password=hidden&sslmode=require",
         "postgresql://db/x?user=bob&password=***&sslmode=require"),
        ("postgresql://db/x?sslpassword=hidden", "postgresql://db/x?sslpassword=***"),
        ("postgresql://bob@db/x", "postgresql://bob@db/x"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        (("http://a", "http://u:hidden@b"), "http://a, http://u:***@b"),
        ((), "(none)"),
        (None, "(none)"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (0.0, "0.0"),
    ],
)  # fmt: skip
def test_values_for_people(value: object, shown: str) -> None:
    assert show_value(value) == shown


def test_description_covers_every_key_and_hides_the_password(tmp_path: Path) -> None:
    loaded = load(tmp_path, DATABASE_URL="postgresql://bob:hidden@db/x", JOURNAL__BUDGET="10GiB")
    rows = {key: value for key, value, _ in describe(loaded)}
    assert tuple(rows) == setting_keys()
    assert rows["database_url"] == "postgresql://bob:***@db/x"
    assert rows["journal.budget"] == "10.0GiB"
    assert "hidden" not in "".join(rows.values())


def test_default_database_is_spelt_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, "data_dir: /d")
    assert loaded.settings.database == "sqlite:////d/burstgate.db"
    assert {key: value for key, value, _ in describe(loaded)}["database_url"] == "sqlite:////d/burstgate.db"


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert field.annotation.__doc__
            found += _fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def test_every_key_has_a_description_and_a_default() -> None:
    fields = _fields(Settings)
    assert tuple(key for key, _ in fields) == setting_keys()
    for key, field in fields:
        assert field.description, key
        assert not field.is_required(), key


def test_settings_are_frozen(tmp_path: Path) -> None:
    settings = load(tmp_path).settings
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.journal.budget = settings.journal.segment  # type: ignore[misc]
    assert isinstance(hash(settings.timeouts), int)


def test_settings_reach_a_child_process_whole(tmp_path: Path) -> None:
    settings = load(tmp_path, "journal: {budget: 0}", UPSTREAMS="http://a", GATEWAY="ünïcode").settings
    line = encode_task(ChildTask(settings, 5, 6))
    assert line.count(b"\n") == 1
    fields = json.loads(line)
    assert Settings.model_validate(fields["settings"]) == settings
    assert (fields["socket_fd"], fields["ready_fd"]) == (5, 6)
