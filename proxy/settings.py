"""The gateway's settings: one frozen object, every key with its default and unit.

Sources, later ones win: defaults, `--config FILE` (YAML), environment (`BURSTGATE_PORT`, nested keys with two
underscores: `BURSTGATE_JOURNAL__BUDGET`), flags. An unknown key in any of them is an error that names the nearest known
one. Where each value came from is kept for `burstgate config show`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator, model_validator

from proxy.config_error import ConfigError
from wire.http import parse_base_url

ENV_PREFIX = "BURSTGATE_"
_NOT_SETTINGS = ("BURSTGATE_TRACES", "BURSTGATE_VLLM")
"""Environment names that start like settings and belong to the tests."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UpstreamSettings(_Frozen):
    """One vLLM server; as text, its URL."""

    url: str = Field(description="base URL")
    name: str | None = Field(None, pattern=r"^[!-~]{1,128}$", description="in records and answers; default: the URL")
    weight: float = Field(1.0, gt=0, le=100, description="share of the load, compared with the others'")
    models: tuple[str, ...] | None = Field(None, description="what it serves; default: what its /v1/models says")
    drain: bool = Field(False, description="no new requests; those in flight go on")
    ca_file: Path | None = Field(None, description="certificates to trust, PEM; default: the system's")
    cert_file: Path | None = Field(None, description="the gateway's own certificate, PEM")
    key_file: Path | None = Field(None, description="its key, PEM; default: in cert_file")
    api_key: str | None = Field(None, repr=False, min_length=1, description="sent in place of the client's key")
    api_key_env: str | None = Field(None, min_length=1, description="environment variable that holds it")
    api_key_file: Path | None = Field(None, description="file that holds it; read again when it changes")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"url": value}
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), list(cls.model_fields), n=1, cutoff=0.0)
                raise ValueError(f"unknown setting '{name}'; the nearest known one is '{near[0]}'")
        return value

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        parse_base_url(value)
        return value

    @model_validator(mode="after")
    def _tls(self) -> UpstreamSettings:
        files = (self.ca_file, self.cert_file, self.key_file)
        if any(files) and not parse_base_url(self.url).is_tls:
            raise ValueError("ca_file, cert_file and key_file are for https:// upstreams")
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs a cert_file")
        if sum(each is not None for each in (self.api_key, self.api_key_env, self.api_key_file)) > 1:
            raise ValueError("one of api_key, api_key_env and api_key_file is enough")
        return self

    def __str__(self) -> str:
        return self.url


class BalanceSettings(_Frozen):
    """Which upstream takes a request."""

    policy: Literal["least_in_flight", "round_robin", "session", "prefix"] = Field(
        "least_in_flight",
        description="least_in_flight, round_robin, session (the same one for a session) or prefix (one that has seen "
        "the prompt's beginning)",
    )
    max_load: float = Field(
        1.5, gt=1, le=100, description="session and prefix: in flight at one upstream, as a multiple of its fair share"
    )
    prefix_entries: int = Field(
        262_144, ge=1024, le=2**26, description="prefix: prompt blocks that a worker remembers (about 100 bytes each)"
    )
    slow_start_s: float = Field(
        10.0, ge=0, description="seconds in which the weight of an upstream that is well again grows; 0 is at once"
    )


class HealthSettings(_Frozen):
    """Which upstreams are passed over. Each worker judges for itself."""

    path: str = Field("/health", pattern=r"^/[!-~]*$", description="probed by GET; a status below 500 is well")
    interval_s: float = Field(5.0, ge=0, description="seconds between probes of an upstream; 0 switches them off")
    timeout_s: float = Field(2.0, gt=0, description="for a probe or a question for models")
    unhealthy_after: int = Field(2, ge=1, description="failed probes in a row until an upstream is down")
    healthy_after: int = Field(1, ge=1, description="good probes in a row until it is up again")
    models_interval_s: float = Field(
        30.0, ge=0, description="seconds between questions for an upstream's models, with more than one; 0: never asked"
    )
    max_connect_failures: int = Field(1, ge=1, description="failed connections in a row until an upstream is down")
    max_failures: int = Field(5, ge=1, description="failed requests in a row (no answer, cut off, 5xx) until ejected")
    pause_s: float = Field(1.0, gt=0, description="first pause without requests; doubles with each that did not help")
    max_pause_s: float = Field(60.0, gt=0, description="longest pause")
    trials: int = Field(2, ge=1, description="requests let through after a pause; all well, it is over")
    window_s: float = Field(30.0, gt=0, description="over which an upstream's error rate is compared with the rest's")
    min_requests: int = Field(
        20, ge=1, description="in that window, at the upstream and at the rest, to compare at all"
    )
    outlier_margin: float = Field(
        0.3, ge=0, le=1, description="ejected when its error rate exceeds the rest's by this; 0 switches it off"
    )
    max_ejected_share: float = Field(
        0.5, ge=0, le=1, description="of the fleet, ejected for failed requests at a time (at least one of several)"
    )


class RetrySettings(_Frozen):
    """When a request goes to another upstream before anything was answered."""

    max_attempts: int = Field(3, ge=1, le=100, description="times that a request is sent; 1: never again")
    budget: float = Field(0.2, ge=0, le=1, description="retries of the last 10 s, as a share of the requests")
    min_per_s: float = Field(1.0, ge=0, description="retries a second that are allowed in any case")
    statuses: tuple[Annotated[int, Field(ge=400, le=599)], ...] = Field(
        (502, 503, 504), description="answers for which another upstream is tried"
    )

    @field_validator("statuses", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)


class ResponseHeaderSettings(_Frozen):
    """What the gateway adds to its answers."""

    overhead: bool = Field(True, description="x-burstgate-overhead-ms: the gateway's own time until the answer began")
    upstream: bool = Field(True, description="x-burstgate-upstream: who answered")


class RecordSettings(_Frozen):
    """What is recorded."""

    enabled: bool = Field(True, description="false: requests are counted, and nothing is kept of them")
    prefix_blocks: bool = Field(False, description="keyed hashes of the prompt's leading blocks, never a text")


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
    sse_comment_s: float = Field(
        0.0, ge=0, description="while a stream's first event is awaited, a comment to the client every so often"
    )
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


class KeySettings(_Frozen):
    """Clients' API keys: Authorization: Bearer KEY, or x-api-key."""

    required: bool = Field(False, description="refuse requests without a key of this gateway's (burstgate keys)")
    secret_file: Path | None = Field(
        None, description="what keys are hashed with, the same on all hosts of a database; default: data_dir/secret"
    )


class RouteSettings(_Frozen):
    """What clients may ask upstreams for: paths, or all below one, as /internal/*."""

    deny_management: bool = Field(True, description="refuse vLLM's management: /sleep, LoRA loading and the like")
    allow: tuple[str, ...] = Field((), description="paths to let through, with /* all below one")
    deny: tuple[str, ...] = Field((), description="paths to refuse, with /* all below one")

    @field_validator("allow", "deny", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)

    @field_validator("allow", "deny")
    @classmethod
    def _paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+(/\*)?|/\*?", path):
                raise ValueError(f"expected a path such as /metrics or /internal/*, got {path!r}")
        return value


class TlsSettings(_Frozen):
    """HTTPS for clients and for the control plane. Files that are replaced are read again within a second."""

    cert_file: Path | None = Field(None, description="the gateway's certificate and its chain, PEM; without it HTTP")
    key_file: Path | None = Field(None, description="its key, PEM; default: in cert_file")
    control_cert_file: Path | None = Field(None, description="the control plane's certificate, PEM; without it HTTP")
    control_key_file: Path | None = Field(None, description="its key, PEM; default: in control_cert_file")

    @model_validator(mode="after")
    def _pairs(self) -> TlsSettings:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs a cert_file")
        if self.control_key_file is not None and self.control_cert_file is None:
            raise ValueError("control_key_file needs a control_cert_file")
        return self


class ControlSettings(_Frozen):
    """Who may use the control plane. Beyond loopback always somebody with a token (burstgate keys admin create)."""

    require_token: bool = Field(False, description="ask for a token on loopback too")
    token_env: str | None = Field(None, min_length=1, description="environment variable that holds an admin token")
    tokens_file: Path | None = Field(None, description="file of tokens: viewer, operator or admin, and a token, a line")
    hosts: tuple[str, ...] = Field((), description="names by which it may be asked without a token, beside loopback's")
    read_only: bool = Field(False, description="refuse whatever changes something")
    open_metrics: bool = Field(False, description="/metrics without a token")

    @field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)


class Settings(_Frozen):
    """Everything that `burstgate serve` can be told."""

    upstreams: tuple[UpstreamSettings, ...] = Field(
        (),
        description="base URLs of the vLLM servers; in the file also mappings of url, name, weight, models, drain, "
        "ca_file, cert_file, key_file, api_key, api_key_env, api_key_file",
    )
    aliases: dict[str, str] = Field({}, description="other names for models: {alias: model}")
    fallbacks: dict[str, tuple[str, ...]] = Field(
        {}, description="models to take where nobody who is well serves one: {model: [other, ...]}"
    )
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
    balance: BalanceSettings = BalanceSettings()
    health: HealthSettings = HealthSettings()
    retry: RetrySettings = RetrySettings()
    record: RecordSettings = RecordSettings()
    response_headers: ResponseHeaderSettings = ResponseHeaderSettings()
    keys: KeySettings = KeySettings()
    routes: RouteSettings = RouteSettings()
    tls: TlsSettings = TlsSettings()
    control: ControlSettings = ControlSettings()

    @field_validator("upstreams", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_text(value)

    @field_validator("upstreams")
    @classmethod
    def _differ(cls, value: tuple[UpstreamSettings, ...]) -> tuple[UpstreamSettings, ...]:
        urls = [parse_base_url(upstream.url).text for upstream in value]
        names = [upstream.name or url for upstream, url in zip(value, urls, strict=True)]
        if len(set(urls)) != len(value) or len(set(names)) != len(value):
            raise ValueError("each upstream may be named once")
        return value

    @field_validator("aliases", "fallbacks", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value)
            except (yaml.YAMLError, RecursionError):
                raise ValueError("expected a mapping, as in {name: model}") from None
        return {} if value is None else value

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {model: (other,) if isinstance(other, str) else other for model, other in value.items()}
        return value

    @field_validator("aliases")
    @classmethod
    def _one_step(cls, value: dict[str, str]) -> dict[str, str]:
        for alias, model in value.items():
            if model in value:
                raise ValueError(f"'{alias}' stands for '{model}', which is itself an alias; name the model")
        return value

    @property
    def database(self) -> str:
        """The database's URL, the default spelt out."""
        return self.database_url or f"sqlite:///{self.data_dir / 'burstgate.db'}"

    @property
    def journal_dir(self) -> Path:
        """Where the writers' directories lie."""
        return self.data_dir / "journal"


NEED_STOP = ("host", "port", "control_host", "control_port", "data_dir", "database_url")
"""Settings, or groups of them, that a running installation keeps until it is stopped and started."""
NEED_RESTART = ("gateway", "journal", "record", "tls")
"""Those that new processes take up: a zero-downtime restart will do. All others change while running."""


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that differs."""

    key: str
    old: str
    new: str
    """Both as they are shown: without secrets."""

    @property
    def group(self) -> str:
        """The key's first part."""
        return self.key.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Settings, new: Settings) -> Iterator[Change]:
    """What differs, key by key."""
    for key in setting_keys():
        before, after = _value(old, key), _value(new, key)
        if before != after:
            yield Change(key, show_value(before), show_value(after))


def keep(old: Settings, new: Settings, groups: Iterable[str]) -> Settings:
    """The new settings, but for some groups."""
    return new.model_copy(update={group: getattr(old, group) for group in groups})


def _split_text(value: Any) -> Any:
    return tuple(part for part in re.split(r"[,\s]+", value) if part) if isinstance(value, str) else value


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


def _value(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


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
    return Loaded(validate(nested, sources), sources)


def validate(fields: Any, sources: Mapping[str, str]) -> Settings:
    """Settings from nested mappings. Raises ConfigError, which names the key's source."""
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, sources)) from None


def _first_problem(error: ValidationError, sources: Mapping[str, str]) -> str:
    problem = error.errors()[0]
    parts = problem["loc"]
    keys = set(setting_keys())
    size = next((n for n in range(len(parts), 0, -1) if ".".join(map(str, parts[:n])) in keys), len(parts))
    key = ".".join(map(str, parts[:size]))
    place = sources.get(key, "settings")
    inner = [part for part in parts[size:] if isinstance(part, str) and part != "[key]"]
    if inner == ["url"] and problem["type"] == "value_error":
        inner = []  # the rule names it
    within = "".join(f" {part}:" for part in inner)
    rule = problem["msg"].removeprefix("Value error, ")
    return _without_secrets(f"{place}: {key}:{within} {rule}, got {problem['input']!r}")


_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^\s'\"]*@")
_API_KEY = re.compile(r"""(?<=api_key['"]: )(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_PASSWORD_OPTION = re.compile(r"(?<=password=)[^&\s'\"]*", re.IGNORECASE)


def _without_secrets(text: str) -> str:
    return _API_KEY.sub("***", _PASSWORD_OPTION.sub("***", _PASSWORD.sub(r"\1:***@", text)))


def show_value(value: Any) -> str:
    """A value for people, with the passwords of a URL as `***`."""
    if isinstance(value, tuple):
        return ", ".join(show_value(part) for part in value) or "(none)"
    if isinstance(value, dict):
        return _without_secrets(json.dumps(value, ensure_ascii=False)) if value else "(none)"
    if isinstance(value, UpstreamSettings):
        said = value.model_dump(mode="json", exclude_defaults=True, exclude={"url"})
        if "api_key" in said:
            said["api_key"] = "***"
        return _without_secrets(f"{value} {json.dumps(said, ensure_ascii=False)}" if said else str(value))
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
        value = _value(loaded.settings, key)
        if key == "database_url" and value is None:
            value = loaded.settings.database
        yield key, show_value(value), loaded.sources.get(key, "default")
