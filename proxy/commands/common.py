"""What the commands share: their root, option types, the configured database, files that come whole."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
import zoneinfo
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
import typer
from rich.console import Console

from proxy.config_error import ConfigError
from traces.codec import FORMATS, TraceClock, TraceFormatError
from traces.record import LogType

if TYPE_CHECKING:
    import sqlalchemy as sa

    from proxy.settings import Loaded, Settings
    from traces.profile import WorkloadProfile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
db_app = typer.Typer(help="The database's schema.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(db_app, name="db")

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Journal, SQLite file, secret.")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="sqlite:///FILE or postgresql://USER@HOST/NAME.")
]
Upstreams = Annotated[list[str] | None, typer.Option("--upstream", help="Base URL of a vLLM server; repeatable.")]
ControlUrl = Annotated[
    str | None, typer.Option("--control", help="Base URL of the control plane.  [default: by the settings]")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only this model; repeatable.")]
Sessions = Annotated[list[str] | None, typer.Option("--session", help="Only this session; repeatable.")]
Outcomes = Annotated[list[str] | None, typer.Option("--outcome", help="Only this outcome; repeatable.")]
Origins = Annotated[list[str] | None, typer.Option("--origin", help="Only this origin; repeatable.")]
LogTypes = Annotated[list[str] | None, typer.Option("--log-type", help="conversation or api.")]
Runs = Annotated[list[str] | None, typer.Option("--run-id", help="Only this run or data set; repeatable.")]
From = Annotated[str | None, typer.Option("--from", help="ISO 8601 or epoch seconds, included.")]
To = Annotated[str | None, typer.Option("--to", help="ISO 8601 or epoch seconds, not included.")]
Timezone = Annotated[str | None, typer.Option("--timezone", help="IANA name, as Europe/Rome.")]
DayZero = Annotated[
    datetime.datetime | None, typer.Option("--day-zero", formats=["%Y-%m-%d"], help="Timestamp 0's day.")
]
Format = Annotated[str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]
FILE_BATCH_ROWS = 262_144
"""Rows of a file that statistics take at a time: of half a dozen columns, some 25 MB."""
ArchiveUrl = Annotated[str | None, typer.Option("--archive", help="Folder or URL of an archive whose rows come along.")]
TraceOrDatabase = Annotated[Path | None, typer.Argument(help="A trace file; without it, the database.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything as JSON; - is standard output.")]


def fail(message: str, status: int = 1) -> typer.Exit:
    """An error's line on standard error, and the exit to raise."""
    print(f"burstgate: {message}", file=sys.stderr)
    return typer.Exit(status)


def load_config(config: Path | None, **flags: Any) -> Loaded:
    """The settings of a file, the environment and these flags. Raises ConfigError."""
    from proxy.settings import load_settings

    return load_settings(config=config, flags=flags)


def control_url(control: str | None, config: Path | None) -> str:
    """The control plane's base URL: a flag's, else where the configured one listens. Raises ConfigError."""
    if control is not None:
        return control
    settings = load_config(config).settings
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.control_host, settings.control_host)
    scheme = "http" if settings.tls.control_cert_file is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.control_port}"


def load_steered(config: Path | None, **flags: Any) -> Loaded:
    """The same, with what was changed through the control plane over it. Raises ConfigError."""
    from proxy.settings import load_settings
    from proxy.steering import read_layer

    loaded = load_settings(config=config, flags=flags)
    layer = read_layer(loaded.settings.data_dir)
    return load_settings(config=config, flags=flags, layer=layer) if layer else loaded


def prepare_data_dir(settings: Settings) -> None:
    """Make the data directory. Raises ConfigError when it can not be written."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        probe = settings.data_dir / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"data_dir: {settings.data_dir} is not writable: {error.strerror}") from None


@contextlib.contextmanager
def open_database(
    config: Path | None, data_dir: Path | None, database_url: str | None, *, revision: str | None = None
) -> Iterator[sa.Engine]:
    """The configured database, closed at the end; with a revision it is made where it is missing, and upgraded."""
    from storage.engine import open_engine, upgrade

    settings = load_config(config, data_dir=data_dir, database_url=database_url).settings
    if settings.database_url is None:
        if revision is not None:
            prepare_data_dir(settings)
        elif not (settings.data_dir / "burstgate.db").exists():
            raise ConfigError(f"{settings.data_dir}: no burstgate.db there (set --data-dir or --database-url)")
    engine = open_engine(settings.database)
    try:
        if revision is not None:
            upgrade(engine, revision)
        yield engine
    finally:
        engine.dispose()


def stamp_s(text: str | None, timezone: str | None, flag: str) -> float | None:
    """A flag's moment as epoch seconds. Raises ConfigError."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{flag}: expected ISO 8601 or epoch seconds, got {text!r}") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zoneinfo.ZoneInfo(timezone or "UTC"))
    return moment.timestamp()


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def duration_s(text: str, flag: str) -> float:
    """A flag's duration, as 90s, 15m, 12h or 30d, in seconds. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise ConfigError(f"{flag}: expected a duration as 90s, 15m, 12h or 30d, got {text!r}")
    return float(found[1]) * _UNITS_S[found[2]]


LOG_TYPES: dict[str, str] = {"conversation": LogType.CONVERSATION, "api": LogType.API}


def one_of(values: list[str] | None, known: dict[str, str], flag: str) -> tuple[str, ...]:
    """A flag's values, as they are meant. Raises ConfigError naming the known ones."""
    for value in values or ():
        if value.lower() not in known:
            raise ConfigError(f"{flag}: expected one of {', '.join(known)}, got {value!r}")
    return tuple(known[value.lower()] for value in values or ())


def selection_of(
    models: list[str] | None,
    sessions: list[str] | None,
    outcomes: list[str] | None,
    origins: list[str] | None,
    log_types: list[str] | None,
    run_ids: list[str] | None,
    start: float | None,
    end: float | None,
) -> Any:
    """The rows that the flags ask for; the gateway's own only by their origin or run. Raises ConfigError."""
    from storage.query import Filter
    from traces.record import OWN_ORIGINS, Origin, Outcome

    return Filter(
        start_s=start,
        end_s=end,
        models=tuple(models or ()),
        sessions=tuple(sessions or ()),
        outcomes=one_of(outcomes, {each.value: each.value for each in Outcome}, "--outcome"),
        origins=one_of(origins, {each.value: each.value for each in Origin}, "--origin"),
        log_types=one_of(log_types, LOG_TYPES, "--log-type"),
        run_ids=tuple(run_ids or ()),
        without_origins=() if origins or run_ids else OWN_ORIGINS,
    )


def check_format(format: str | None) -> None:
    """Raises ConfigError for a format that is none."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")


def check_timezone(timezone: str | None) -> None:
    """Raises ConfigError for a time zone that is none."""
    try:
        zoneinfo.ZoneInfo("UTC" if timezone is None else timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"--timezone: expected an IANA time zone, got {timezone!r}") from None


@contextlib.contextmanager
def whole_file(output: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole; - is standard output, and a device or a pipe is written straight.

    An OSError names the file.
    """
    if output == Path("-"):
        yield sys.stdout.buffer
        return
    if output.exists() and not output.is_file() and not output.is_dir():  # what is no file is not to be replaced
        try:
            with output.open("wb") as stream:
                yield stream
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(output)) from None
        return
    part = output.with_name(f".{output.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(output)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(output)) from None
    finally:
        part.unlink(missing_ok=True)


def parse_operand(text: str, timezone: str | None) -> tuple[Path | None, Any]:
    """A trace file, or a selection of the database: origin=client,from=2026-11-01,to=2026-11-08."""
    if Path(text).exists() or "=" not in text:
        return Path(text), selection_of(None, None, None, None, None, None, None, None)
    names = ("from", "to", "model", "session", "outcome", "origin", "log-type", "run-id")
    given: dict[str, list[str]] = {}
    for part in text.split(","):
        name, is_pair, value = part.strip().partition("=")
        if name not in names or not is_pair:
            raise ConfigError(f"{text!r}: no such file, and as a selection {part!r} is none of {', '.join(names)}")
        given.setdefault(name, []).append(value)
    first, last = (given.get(name, [None])[-1] for name in ("from", "to"))
    return None, selection_of(
        given.get("model"), given.get("session"), given.get("outcome"), given.get("origin"), given.get("log-type"),
        given.get("run-id"), stamp_s(first, timezone, "from"), stamp_s(last, timezone, "to"),
    )  # fmt: skip


@contextlib.contextmanager
def matching_rows(
    trace: Path | None,
    selection: Any,
    format: str | None,
    timezone: str | None,
    day_zero: datetime.datetime | None,
    database: tuple[Path | None, Path | None, str | None],
    archive: str | None = None,
) -> Iterator[Iterator[Any]]:
    """The batches that match: of a trace file, or of the database of (config, data_dir, database_url) and an archive.

    Raises ConfigError for an archive beside a trace file.
    """
    import dataclasses

    from storage.query import matching
    from traces.batch import ahead
    from traces.codec import read_trace
    from traces.table import READS

    if trace is not None:
        if archive is not None:
            raise ConfigError("--archive: expected with the database, not with a trace file")
        clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone or "UTC")
        batches = read_trace(trace, format=format, clock=clock, fields=(*READS, "run_id"), batch_rows=FILE_BATCH_ROWS)
        asked = dataclasses.replace(selection, without_origins=())  # who names a file asks for what is in it
        yield (matching(batch, asked) for batch in ahead(batches))
        return
    with open_database(*database) as engine:
        yield rows_of(engine, selection, archive, READS)


def open_archive(url: str | None) -> Any:
    """The archive of a flag. Raises ArchiveError."""
    if url is None:
        return None
    from storage.archive import Archive

    return Archive(url)


def rows_of(engine: sa.Engine, selection: Any, archive: str | None, fields: Collection[str]) -> Iterator[Any]:
    """The database's batches that match, with those of an archive where one is named; with these columns."""
    if archive is None:
        from storage.query import read_batches

        return read_batches(engine, selection, fields=fields)
    from storage.archive import read_with_archive

    batches = read_with_archive(engine, open_archive(archive), selection)
    return (batch.select(name for name in batch.columns if name in fields) for batch in batches)


@contextlib.contextmanager
def progress() -> Iterator[Any]:
    """Says on a terminal's standard error what is being done."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("reading") as status:
        yield status.update


def write_json(path: Path, value: object) -> None:
    """A value as indented JSON, in a file that comes whole."""
    with whole_file(path) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_profile_file(path: Path) -> WorkloadProfile:
    """A workload profile. Raises ConfigError."""
    from traces.profile import decode_profile

    try:
        return decode_profile(path.read_bytes())
    except ValueError as error:
        raise TraceFormatError(f"{path}: {error}") from None


def parse_model_map(pairs: list[str] | None) -> dict[str, str]:
    """Pairs of OLD=NEW. Raises ConfigError."""
    for pair in pairs or ():
        if not all(pair.partition("=")):
            raise ConfigError(f"--model-map: expected A=B, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs or ())
