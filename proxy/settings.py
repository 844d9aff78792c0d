"""The gateway's settings: one frozen object, every key with its default and unit.

Sources, later ones win: defaults, `--config FILE` (YAML), environment (`BURSTGATE_PORT`, nested keys with two
underscores: `BURSTGATE_JOURNAL__BUDGET`), flags. An unknown key in any of them is an error that names the nearest known
one. Where each value came from is kept for `burstgate config show`.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from wire.http import parse_base_url

ENV_PREFIX = "BURSTGATE_"
_NOT_SETTINGS = ("BURSTGATE_TRACES", "BURSTGATE_VLLM")
"""Environment names that start like settings and belong to the tests."""


class ConfigError(ValueError):
    """A setting that can not be used: place, value and rule in one line."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JournalSettings(_Frozen):
    """The journal in `data_dir/journal`."""

    segment: ByteSize = Field(ByteSize(16 * 1024**2), ge=64 * 1024, description="size at which a new segment starts")
    budget: ByteSize = Field(
        ByteSize(10 * 1024**3), ge=0, description="disk for the whole journal; beyond it, records are dropped, counted"
    )
    fsync_interval_s: float = Field(1.0, ge=0.01, description="seconds between fdatasync calls: what a power cut takes")


class TimeoutSettings(_Frozen):
    """Seconds; 0 switches a timer off."""

    connect_s: float = Field(5.0, gt=0, description="to make a connection to an upstream")
    first_byte_s: float = Field(
        600.0, ge=0, description="from the request sent to the answer's head; of a stream, to its first event"
    )
    chunk_s: float = Field(300.0, ge=0, description="between two pieces of a response")
    total_s: float = Field(3600.0, ge=0, description="for the whole exchange")
    drain_s: float = Field(30.0, ge=0, description="for requests in flight when the gateway is asked to stop")
    upstream_idle_s: float = Field(4.0, ge=0, description="how long an idle upstream connection is reused (vLLM: 5 s)")


class LimitSettings(_Frozen):
    """What a client may send."""

    body: ByteSize = Field(ByteSize(64 * 1024**2), ge=1024, description="request body; beyond it 413")
    headers: ByteSize = Field(ByteSize(64 * 1024), ge=1024, description="request line and headers; beyond it 431")


class SessionSettings(_Frozen):
    """How a request's session and log type are found."""

    header: str = Field("x-session-id", description="request header that names the session")
    infer: bool = Field(True, description="recognise a chat that continues an earlier one by its messages")
    log_type_header: str = Field("x-burstgate-log-type", description="request header: conversation or api")
    log_type: Literal["auto", "conversation", "api"] = Field(
        "auto", description="log type without that header; auto: conversation where a session is known"
    )

    @field_validator("header", "log_type_header")
    @classmethod
    def _token(cls, value: str) -> str:
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):
            raise ValueError("expected a header name")
        return value.lower()


class Settings(_Frozen):
    """Everything that `burstgate serve` can be told."""

    upstreams: tuple[str, ...] = Field((), description="base URLs of the vLLM servers")
    host: str = Field("127.0.0.1", description="address of the gateway")
    port: int = Field(8080, ge=0, le=65535, description="port of the gateway; 0 takes a free one")
    control_host: str = Field("127.0.0.1", description="address of the control plane")
    control_port: int = Field(8081, ge=0, le=65535, description="port of the control plane; 0 takes a free one")
    data_dir: Path = Field(Path("burstgate-data"), description="journal, SQLite file and secret")
    database_url: str | None = Field(None, description="default: SQLite in data_dir; postgresql://USER@HOST/NAME")
    workers: int = Field(1, ge=1, le=256, description="gateway worker processes")
    gateway: str = Field(default_factory=socket.gethostname, description="this gateway's name in its records")
    journal: JournalSettings = JournalSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    sessions: SessionSettings = SessionSettings()

    @field_validator("upstreams", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in re.split(r"[,\s]+", value) if part) if isinstance(value, str) else value

    @field_validator("upstreams")
    @classmethod
    def _urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({parse_base_url(url).text for url in value}) != len(value):
            raise ValueError("each upstream may be named once")
        return value

    @property
    def database(self) -> str:
        """The database's URL, the default spelt out."""
        return self.database_url or f"sqlite:///{self.data_dir / 'burstgate.db'}"

    @property
    def journal_dir(self) -> Path:
        """Where the writers' directories lie."""
        return self.data_dir / "journal"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and, by dotted key, where each value came from (`default` when absent)."""

    settings: Settings
    sources: Mapping[str, str]


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def setting_keys() -> tuple[str, ...]:
    """Every key, dotted."""
    return tuple(_keys(Settings))


def _flatten(values: Mapping[str, Any], place: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    groups = {key.rpartition(".")[0] for key in setting_keys()} - {""}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in groups:
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: {key}: expected a mapping of settings, got {value!r}")
            yield from _flatten(value, place, key + ".")
        else:
            yield key, value


def _check_known(key: str, shown: str, place: str, spell: Mapping[str, str]) -> None:
    if key not in spell:
        near = difflib.get_close_matches(key, list(spell), n=1, cutoff=0.0)
        raise ConfigError(f"{place}: unknown setting '{shown}'; the nearest known one is '{spell[near[0]]}'")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{line}: not YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    values = dict(_flatten(data, str(path)))
    spell = {key: key for key in setting_keys()}
    for key in values:
        _check_known(str(key), str(key), str(path), spell)
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    spell = {key: ENV_PREFIX + key.replace(".", "__").upper() for key in setting_keys()}
    values = {}
    for name, text in environment.items():
        if name.startswith(ENV_PREFIX) and not name.startswith(_NOT_SETTINGS):
            key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            _check_known(key, name, "environment", spell)
            values[key] = text
    return values


def load_settings(
    *,
    config: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge the sources and validate. flags holds dotted keys; None values are flags not given.

    Raises ConfigError.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if config is not None:
        layers.append((str(config), _from_file(config)))
    layers.append(("environment", _from_environment(environment)))
    layers.append(("flag", {key: value for key, value in (flags or {}).items() if value is not None}))
    for place, values in layers:
        for key, value in values.items():
            merged[key] = value
            sources[key] = place
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        *groups, name = key.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    try:
        settings = Settings.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, sources)) from None
    return Loaded(settings, sources)


def _first_problem(error: ValidationError, sources: Mapping[str, str]) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    place = sources.get(key, "settings")
    rule = problem["msg"].removeprefix("Value error, ")
    return _without_secrets(f"{place}: {key}: {rule}, got {problem['input']!r}")


_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^\s'\"]*@")
_PASSWORD_OPTION = re.compile(r"(?<=password=)[^&\s'\"]*", re.IGNORECASE)


def _without_secrets(text: str) -> str:
    return _PASSWORD_OPTION.sub("***", _PASSWORD.sub(r"\1:***@", text))


def show_value(value: Any) -> str:
    """A value for people, with the passwords of a URL as `***`."""
    if isinstance(value, tuple):
        return ", ".join(show_value(part) for part in value) or "(none)"
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, ByteSize):
        return value.human_readable()
    return _without_secrets(str(value))


def describe(loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Rows of (key, value, source) for every setting."""
    for key in setting_keys():
        value: Any = loaded.settings
        for name in key.split("."):
            value = getattr(value, name)
        if key == "database_url" and value is None:
            value = loaded.settings.database
        yield key, show_value(value), loaded.sources.get(key, "default")
