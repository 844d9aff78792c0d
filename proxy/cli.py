"""The `burstgate` command: parses, wires, reports. Exit status 0 good, 1 failed, 2 wrong usage or configuration.

Of a replay also 3, when it was itself the bottleneck; of a comparison, when it cannot be told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import os
import sys
import tempfile
import zoneinfo
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from proxy.config_error import ConfigError
from storage.errors import DatabaseUnavailable, DatabaseUrlError, SchemaError
from traces.codec import FORMATS, TraceClock, TraceFormatError
from traces.record import LogType

if TYPE_CHECKING:
    import sqlalchemy as sa

    from proxy.settings import Loaded, Settings
    from replay.metrics import Summary
    from replay.runner import ReplayOptions
    from traces.analysis import Analyzed
    from traces.profile import WorkloadProfile

app = typer.Typer(
    help="An OpenAI-compatible gateway for vLLM fleets that records every request as a BurstGPT trace.",
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
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def _fail(message: str, status: int = 1) -> typer.Exit:
    print(f"burstgate: {message}", file=sys.stderr)
    return typer.Exit(status)


def _load(config: Path | None, **flags: Any) -> Loaded:
    from proxy.settings import load_settings

    return load_settings(config=config, flags=flags)


def _prepare_data_dir(settings: Settings) -> None:
    """Make the data directory. Raises ConfigError when it can not be written."""
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        probe = settings.data_dir / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"data_dir: {settings.data_dir} is not writable: {error.strerror}") from None


@app.command()
def serve(
    upstream: Upstreams = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway.  [default: 8080]")] = None,
    control_host: Annotated[
        str | None, typer.Option(help="Address of the control plane.  [default: 127.0.0.1]")
    ] = None,
    control_port: Annotated[int | None, typer.Option(help="Port of the control plane.  [default: 8081]")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Annotated[int | None, typer.Option(help="Gateway worker processes.  [default: 1]")] = None,
    config: Config = None,
    check: Annotated[bool, typer.Option("--check", help="Only find out whether it would start.")] = False,
) -> None:
    """Run the gateway: workers, recorder and control plane. SIGHUP reloads, SIGUSR2 restarts without downtime."""
    from proxy.handover import take_handover
    from proxy.settings import show_value
    from proxy.supervisor import Supervisor, settings_after
    from storage.engine import open_engine

    flags = {
        "upstreams": tuple(upstream) if upstream else None,
        "host": host,
        "port": port,
        "control_host": control_host,
        "control_port": control_port,
        "data_dir": data_dir,
        "database_url": database_url,
        "workers": workers,
    }

    def load() -> Settings:
        settings = _load(config, **flags).settings
        if not settings.upstreams:
            raise ConfigError("upstreams: name at least one, as in --upstream http://127.0.0.1:8000")
        return settings

    def warn(line: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed
            print(f"burstgate: {line}", file=sys.stderr, flush=True)

    handover = None if check else take_handover()
    settings = load() if handover is None else settings_after(handover, load, warn)
    if handover is None:  # else the trial run has done it: from here on, nothing may fail
        _prepare_data_dir(settings)
        open_engine(settings.database).dispose()
    if check:
        for module in ("proxy.app", "proxy.record", "proxy.control"):
            importlib.import_module(module)
        print("ok")
        return
    supervisor = Supervisor(settings, say=warn, load=load)
    supervisor.catch_signals()
    if handover is not None:
        supervisor.take_over(handover)
    else:
        gateway, control = supervisor.start()
        say = Console(stderr=True, highlight=False).print
        say(f"gateway   {gateway} -> {', '.join(map(str, settings.upstreams))}")
        say(f"control   {control} (/metrics, /api/v1/status, /api/v1/doctor)")
        say(f"recording {show_value(settings.database)}")
    supervisor.run()


@app.command()
def record(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Run the recorder alone: journal in, database out."""
    from proxy.child import configure_logging
    from proxy.record import open_recorder, run_recorder

    settings = _load(config, data_dir=data_dir, database_url=database_url).settings
    _prepare_data_dir(settings)
    configure_logging("recorder")
    run_recorder(open_recorder(settings))


@config_app.command("show")
def config_show(config: Config = None, data_dir: DataDir = None, upstream: Upstreams = None) -> None:
    """Print every setting, its value and where it came from."""
    from proxy.settings import describe

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for row in describe(_load(config, data_dir=data_dir, upstreams=tuple(upstream) if upstream else None)):
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True).print(table)


@config_app.command("check")
def config_check(config: Config = None) -> None:
    """Validate the settings; a problem is one line and exit status 2."""
    _load(config)
    print("ok")


@contextlib.contextmanager
def _database(
    config: Path | None, data_dir: Path | None, database_url: str | None, *, revision: str | None = None
) -> Iterator[sa.Engine]:
    """The configured database, closed at the end; with a revision it is made where it is missing, and upgraded."""
    from storage.engine import open_engine, upgrade

    settings = _load(config, data_dir=data_dir, database_url=database_url).settings
    if settings.database_url is None:
        if revision is not None:
            _prepare_data_dir(settings)
        elif not (settings.data_dir / "burstgate.db").exists():
            raise ConfigError(f"{settings.data_dir}: no burstgate.db there (set --data-dir or --database-url)")
    engine = open_engine(settings.database)
    try:
        if revision is not None:
            upgrade(engine, revision)
        yield engine
    finally:
        engine.dispose()


@db_app.command("upgrade")
def db_upgrade(
    revision: Annotated[str, typer.Argument()] = "head",
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Bring the schema up to REVISION."""
    from storage.engine import current

    with _database(config, data_dir, database_url, revision=revision) as engine:
        print(current(engine) or "(no schema)")


@db_app.command("downgrade")
def db_downgrade(
    revision: str, data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None
) -> None:
    """Take the schema back to REVISION; `base` drops the tables with all rows."""
    from storage.engine import current, downgrade

    with _database(config, data_dir, database_url) as engine:
        downgrade(engine, revision)
        print(current(engine) or "(no schema)")


@db_app.command("current")
def db_current(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Print the schema's revision."""
    from storage.engine import current

    with _database(config, data_dir, database_url) as engine:
        print(current(engine) or "(no schema)")


@app.command()
def doctor(
    data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None, json: Json = False
) -> None:
    """Check an installation, live or stopped: is every request accounted for?"""
    from proxy.doctor import diagnose

    checks = list(diagnose(_load(config, data_dir=data_dir, database_url=database_url).settings))
    if json:
        print(msgspec.json.encode(checks).decode())
    else:
        for check in checks:
            print(f"{'ok  ' if check.is_ok else 'FAIL'} {check.name}: {check.detail}")
    if any(check.is_ok is False for check in checks):
        raise typer.Exit(1)


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


def _stamp(text: str | None, timezone: str | None, flag: str) -> float | None:
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


LOG_TYPES: dict[str, str] = {"conversation": LogType.CONVERSATION, "api": LogType.API}


def _one_of(values: list[str] | None, known: dict[str, str], flag: str) -> tuple[str, ...]:
    for value in values or ():
        if value.lower() not in known:
            raise ConfigError(f"{flag}: expected one of {', '.join(known)}, got {value!r}")
    return tuple(known[value.lower()] for value in values or ())


def _selection(
    models: list[str] | None,
    sessions: list[str] | None,
    outcomes: list[str] | None,
    origins: list[str] | None,
    log_types: list[str] | None,
    run_ids: list[str] | None,
    start: float | None,
    end: float | None,
) -> Any:
    from storage.query import Filter
    from traces.record import Origin, Outcome

    return Filter(
        start_s=start,
        end_s=end,
        models=tuple(models or ()),
        sessions=tuple(sessions or ()),
        outcomes=_one_of(outcomes, {each.value: each.value for each in Outcome}, "--outcome"),
        origins=_one_of(origins, {each.value: each.value for each in Origin}, "--origin"),
        log_types=_one_of(log_types, LOG_TYPES, "--log-type"),
        run_ids=tuple(run_ids or ()),
    )


def _known_format(format: str | None) -> None:
    if format is not None and format not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")


def _known_timezone(timezone: str | None) -> None:
    try:
        zoneinfo.ZoneInfo("UTC" if timezone is None else timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"--timezone: expected an IANA time zone, got {timezone!r}") from None


@app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - is standard output.")],
    format: Format = None,
    failures: Annotated[str, typer.Option(help="keep or drop failed requests.")] = "keep",
    relabel_model: Annotated[str | None, typer.Option(help="Name every row's model so.")] = None,
    salt: Annotated[str | None, typer.Option(help="For the same block ids again.  [default: a new one]")] = None,
    stamps: Annotated[str | None, typer.Option(help="int or float Timestamps.")] = None,
    timezone: Timezone = None,
    day_zero: DayZero = None,
    start: From = None,
    end: To = None,
    model: Models = None,
    session: Sessions = None,
    outcome: Outcomes = None,
    origin: Origins = None,
    log_type: LogTypes = None,
    run_id: Runs = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Write recorded requests as a trace, with a JSON sidecar that says what was done."""
    from storage import export as exports

    _known_format(format)
    _known_timezone(timezone)
    if failures not in ("keep", "drop"):
        raise ConfigError(f"--failures: expected keep or drop, got {failures!r}")
    if stamps not in (None, "int", "float"):
        raise ConfigError(f"--stamps: expected int or float, got {stamps!r}")
    selection = _selection(
        model, session, outcome, origin, log_type, run_id,
        _stamp(start, timezone, "--from"), _stamp(end, timezone, "--to"),
    )  # fmt: skip
    with _database(config, data_dir, database_url) as engine:
        report = exports.export(
            engine,
            output,
            selection,
            format=format,
            day_zero=day_zero.date() if day_zero is not None else None,
            timezone=timezone,
            failures="drop" if failures == "drop" else "keep",
            model=relabel_model,
            salt=None if salt is None else salt.encode(),
            stamps=None if stamps is None else ("int" if stamps == "int" else "float"),
        )
    dropped = "".join(f", {n:,} dropped: {reason}" for reason, n in report.dropped.items())
    notes = "".join(f", {n:,} with {note}" for note, n in report.notes.items())
    print(
        f"{output}: {report.rows_written:,} of {report.rows_in:,} rows as {report.format}{dropped}{notes}",
        file=sys.stderr,
    )


@app.command("import")
def import_(
    trace: Path,
    dataset: Annotated[str | None, typer.Option(help="Name of the data set.  [default: the file's stem]")] = None,
    format: Format = None,
    timezone: Annotated[str, typer.Option(help="IANA name.")] = "UTC",
    day_zero: DayZero = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Read a trace file into the database; again changes nothing."""
    from storage.importing import import_trace

    _known_format(format)
    _known_timezone(timezone)
    clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone)
    with _database(config, data_dir, database_url, revision="head") as engine:
        report = import_trace(engine, trace, dataset=dataset, format=format, clock=clock)
    name = f" as data set {report.dataset}" if report.dataset else ""
    print(
        f"{trace}: {report.rows_read:,} rows read ({report.format}), {report.rows_inserted:,} inserted,"
        f" {report.rows_already_there:,} already there{name}",
        file=sys.stderr,
    )


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN")],
    target: Annotated[Path, typer.Argument(metavar="OUT")],
    source_format: Annotated[str | None, typer.Option("--from", help="Format of IN.  [default: found out]")] = None,
    target_format: Annotated[str | None, typer.Option("--to", help="Format of OUT.  [default: by its suffix]")] = None,
    map: Annotated[
        str | None, typer.Option("--map", help="Columns of any CSV: timestamp=A,prompt_tokens=B,output_tokens=C.")
    ] = None,
    failures: Annotated[str, typer.Option(help="keep or drop failed requests.")] = "keep",
    relabel_model: Annotated[str | None, typer.Option(help="Name every row's model so.")] = None,
    timezone: Annotated[str, typer.Option(help="IANA name.")] = "UTC",
    day_zero: DayZero = None,
    salt: Annotated[str | None, typer.Option(help="For the same block ids again.  [default: a new one]")] = None,
    block_tokens: Annotated[int | None, typer.Option(min=1, help="Of IN's prefix blocks, if it does not say.")] = None,
) -> None:
    """Write a trace file in another format; what was written is read back and compared."""
    from traces import convert as conversion
    from traces.mapped import parse_columns

    _known_timezone(timezone)
    if failures not in ("keep", "drop"):
        raise ConfigError(f"--failures: expected keep or drop, got {failures!r}")
    try:
        columns = None if map is None else parse_columns(map)
        formats = conversion.chosen_formats(source, target, source_format, target_format, columns)
    except TraceFormatError:
        raise
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    done = conversion.convert(
        source,
        target,
        source_format=formats[0],
        target_format=formats[1],
        columns=columns,
        clock=TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone),
        failures="drop" if failures == "drop" else "keep",
        model=relabel_model,
        salt=None if salt is None else salt.encode(),
        source_block_tokens=block_tokens,
    )
    for line in conversion.describe(done, source, target):
        print(line, file=sys.stderr)


@app.command()
def stats(
    trace: Annotated[Path | None, typer.Argument(help="A trace file; without it, the database.")] = None,
    json: Json = False,
    format: Format = None,
    timezone: Timezone = None,
    start: From = None,
    end: To = None,
    model: Models = None,
    session: Sessions = None,
    outcome: Outcomes = None,
    origin: Origins = None,
    log_type: LogTypes = None,
    run_id: Runs = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Requests, rates, tokens and failures of a trace file or of the database."""
    from storage.query import matching, read_batches
    from traces.codec import read_trace
    from traces.summary import render, summarize

    _known_format(format)
    _known_timezone(timezone)
    selection = _selection(
        model, session, outcome, origin, log_type, run_id,
        _stamp(start, timezone, "--from"), _stamp(end, timezone, "--to"),
    )  # fmt: skip
    if trace is not None:
        summary = summarize(matching(batch, selection) for batch in read_trace(trace, format=format))
    else:
        with _database(config, data_dir, database_url) as engine:
            summary = summarize(read_batches(engine, selection))
    if json:
        print(msgspec.json.encode(summary).decode())
    else:
        render(summary, Console(highlight=False))


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[BinaryIO]:
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


def _operand(text: str, timezone: str | None) -> tuple[Path | None, Any]:
    """A trace file, or a selection of the database: origin=client,from=2026-11-01,to=2026-11-08."""
    if Path(text).exists() or "=" not in text:
        return Path(text), _selection(None, None, None, None, None, None, None, None)
    names = ("from", "to", "model", "session", "outcome", "origin", "log-type", "run-id")
    given: dict[str, list[str]] = {}
    for part in text.split(","):
        name, is_pair, value = part.strip().partition("=")
        if name not in names or not is_pair:
            raise ConfigError(f"{text!r}: no such file, and as a selection {part!r} is none of {', '.join(names)}")
        given.setdefault(name, []).append(value)
    first, last = (given.get(name, [None])[-1] for name in ("from", "to"))
    return None, _selection(
        given.get("model"), given.get("session"), given.get("outcome"), given.get("origin"), given.get("log-type"),
        given.get("run-id"), _stamp(first, timezone, "from"), _stamp(last, timezone, "to"),
    )  # fmt: skip


@contextlib.contextmanager
def _rows(
    trace: Path | None,
    selection: Any,
    format: str | None,
    timezone: str | None,
    day_zero: datetime.datetime | None,
    database: tuple[Path | None, Path | None, str | None],
) -> Iterator[Iterator[Any]]:
    """The batches of a trace file, or of the database of (config, data_dir, database_url), that match."""
    from storage.query import matching, read_batches
    from traces.codec import read_trace
    from traces.table import READS

    if trace is not None:
        clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone or "UTC")
        batches = read_trace(trace, format=format, clock=clock, fields=(*READS, "run_id"))
        yield (matching(batch, selection) for batch in batches)
        return
    with _database(*database) as engine:
        yield read_batches(engine, selection)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Says on a terminal's standard error what is being done."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("reading") as status:
        yield status.update


def _write_json(path: Path, value: object) -> None:
    with _whole(path) as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


TraceOrDatabase = Annotated[Path | None, typer.Argument(help="A trace file; without it, the database.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything as JSON; - is standard output.")]
Objective = Annotated[
    float, typer.Option("--availability", help="Share of valid requests that must not fail: the error budget.")
]


@app.command()
def analyze(
    trace: TraceOrDatabase = None,
    json: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page that opens offline.")] = None,
    csv_dir: Annotated[Path | None, typer.Option(help="Folder for each figure's numbers as CSV.")] = None,
    slo: Annotated[
        str | None,
        typer.Option("--slo", help="Bounds in seconds, as ttft=0.5,tpot=0.05,e2e=10,queue=1; gives goodput."),
    ] = None,
    availability: Objective = 0.999,
    services: Annotated[int, typer.Option(help="Models and log types described one by one: the largest.")] = 8,
    format: Format = None,
    timezone: Timezone = None,
    day_zero: DayZero = None,
    start: From = None,
    end: To = None,
    model: Models = None,
    session: Sessions = None,
    outcome: Outcomes = None,
    origin: Origins = None,
    log_type: LogTypes = None,
    run_id: Runs = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Burstiness, periods, lengths, conversations, load, failures and latency of a trace file or of the database."""
    from traces.analysis import Options, check_options, parse_bounds
    from traces.analysis import analyze as analyzed
    from traces.analysis_report import render

    _known_format(format)
    _known_timezone(timezone)
    try:
        bounds_s = {} if slo is None else parse_bounds(slo)
        options = Options(zone=timezone or "UTC", slo=availability, bounds_s=bounds_s, most_services=services)
        check_options(options)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    for path in (json, html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: no such directory")
    selection = _selection(
        model, session, outcome, origin, log_type, run_id,
        _stamp(start, timezone, "--from"), _stamp(end, timezone, "--to"),
    )  # fmt: skip
    with (
        _progress() as say,
        _rows(trace, selection, format, timezone, day_zero, (config, data_dir, database_url)) as batches,
    ):
        found = analyzed(batches, options, say)
    if json != Path("-"):
        render(found.analysis, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    if json is not None:
        _write_json(json, found.analysis)
    if html is not None:
        from replay.analysis_page import page

        with _whole(html) as stream:
            stream.write(page(found.analysis))
    if csv_dir is not None:
        _write_tables(csv_dir, found)


def _write_tables(folder: Path, found: Analyzed) -> None:
    """A CSV for each figure, and windows.csv with every window that was fitted."""
    from traces.charts import charts

    folder.mkdir(parents=True, exist_ok=True)
    tables = {chart.name: chart.table for chart in charts(found.analysis)}
    for name, table in (*tables.items(), ("windows", found.windows)):
        with _whole(folder / f"{name}.csv") as stream:
            table.write_csv(stream)


@app.command()
def failures(
    trace: TraceOrDatabase = None,
    json: JsonFile = None,
    availability: Objective = 0.999,
    format: Format = None,
    timezone: Timezone = None,
    day_zero: DayZero = None,
    start: From = None,
    end: To = None,
    model: Models = None,
    session: Sessions = None,
    outcome: Outcomes = None,
    origin: Origins = None,
    log_type: LogTypes = None,
    run_id: Runs = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Where, when and under what load requests fail, of a trace file or of the database; in a pager on a terminal."""
    from traces.analysis import Options, analyze_failures, check_options
    from traces.analysis_report import render_failures

    _known_format(format)
    _known_timezone(timezone)
    try:
        options = Options(zone=timezone or "UTC", slo=availability)
        check_options(options)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    selection = _selection(
        model, session, outcome, origin, log_type, run_id,
        _stamp(start, timezone, "--from"), _stamp(end, timezone, "--to"),
    )  # fmt: skip
    with (
        _progress() as say,
        _rows(trace, selection, format, timezone, day_zero, (config, data_dir, database_url)) as batches,
    ):
        source, found = analyze_failures(batches, options, say)
    if json is not None:
        _write_json(json, found)
    if json != Path("-"):
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        with console.pager() if sys.stdout.isatty() else contextlib.nullcontext():
            render_failures(source, found, console)


@app.command()
def compare(
    a: Annotated[
        str, typer.Argument(help="A trace file, or of the database as from=2026-11-01,to=2026-11-08,origin=client.")
    ],
    b: Annotated[str, typer.Argument(help="The other one, set against the first.")],
    json: JsonFile = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    rounds: Annotated[int, typer.Option(help="Resamplings of the bootstrap.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    block: Annotated[float, typer.Option(help="Seconds that arrivals and failures are resampled in.")] = 1200.0,
    arrival_tolerance: Annotated[float, typer.Option(help="Relative difference of rates, CV and dispersion.")] = 0.1,
    length_tolerance: Annotated[float, typer.Option(help="Relative difference of token lengths.")] = 0.05,
    session_tolerance: Annotated[float, typer.Option(help="Relative difference of turns and gaps.")] = 0.1,
    latency_tolerance: Annotated[float, typer.Option(help="Relative difference of latencies.")] = 0.1,
    failure_tolerance: Annotated[float, typer.Option(help="Difference of the shares of failures.")] = 0.005,
    ks_tolerance: Annotated[float, typer.Option(help="Distance of distributions (KS).")] = 0.05,
    format: Format = None,
    timezone: Timezone = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Is B as A? Arrivals, lengths, sessions, failures, latency.

    Exit status: 0 the same, 1 different, 2 a trace cannot be read or wrong usage, 3 too few requests to tell.
    """
    from traces.analysis_report import render_comparison
    from traces.compare import Options, Verdict, check_options
    from traces.compare import compare as compared
    from traces.table import collect

    _known_format(format)
    _known_timezone(timezone)
    options = Options(
        seed=seed, rounds=rounds, confidence=confidence, block_s=block, arrival_tolerance=arrival_tolerance,
        length_tolerance=length_tolerance, session_tolerance=session_tolerance, latency_tolerance=latency_tolerance,
        failure_tolerance=failure_tolerance, ks_tolerance=ks_tolerance,
    )  # fmt: skip
    try:
        check_options(options)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tables = []
    with _progress() as say:
        try:
            for operand in (a, b):
                say(f"reading {operand}")
                path, selection = _operand(operand, timezone)
                with _rows(path, selection, format, timezone, None, (config, data_dir, database_url)) as batches:
                    tables.append(collect(batches).table)
        except OSError as error:  # status 1 says that the traces differ
            raise ConfigError(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from None
        except (ValueError, DatabaseUnavailable, SchemaError) as error:
            raise ConfigError(str(error)) from None
        say("comparing")
        found = compared(tables[0], tables[1], options)
    if json is not None:
        _write_json(json, found)
    if json != Path("-"):
        render_comparison(found, a, b, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    if status := {Verdict.SAME: 0, Verdict.DIFFERENT: 1, Verdict.UNKNOWN: 3}[found.verdict]:
        raise typer.Exit(status)


def _read_profile(path: Path) -> WorkloadProfile:
    from traces.profile import decode_profile

    try:
        return decode_profile(path.read_bytes())
    except ValueError as error:
        raise TraceFormatError(f"{path}: {error}") from None


def _model_map(pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or ():
        if not all(pair.partition("=")):
            raise ConfigError(f"--model-map: expected A=B, got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs or ())


@app.command()
def fit(
    trace: Path,
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write, JSON; - is standard output.")],
    format: Format = None,
    timezone: Annotated[str, typer.Option(help="IANA name.")] = "UTC",
    day_zero: DayZero = None,
) -> None:
    """Make a workload profile of a trace: rates, burstiness, lengths and sessions, with no name and no id in it."""
    from traces.codec import read_trace
    from traces.profile import FIELDS, encode_profile, fit_profile

    _known_format(format)
    _known_timezone(timezone)
    clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone)
    profile = fit_profile(read_trace(trace, format=format, clock=clock, fields=FIELDS))
    with _whole(output) as stream:
        stream.write(encode_profile(profile))
    print(
        f"{output}: {len(profile.services)} services of {profile.requests:,} requests,"
        f" {profile.mean_rps:.4g} requests/s on average",
        file=sys.stderr,
    )


@app.command()
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace to write; - is standard output.")],
    profile: Annotated[Path | None, typer.Option(help="Workload profile, as burstgate fit writes it.")] = None,
    process: Annotated[
        str | None,
        typer.Option(
            help="constant, poisson, gamma, curve or modeled.  [default: the profile's arrivals, with sessions]"
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, on average.")] = None,
    shape: Annotated[float | None, typer.Option(help="Gamma shape of the gaps: 1 is Poisson, below it bursty.")] = None,
    curve: Annotated[Path | None, typer.Option(help="CSV with the columns time_s,rps.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of trace.")] = None,
    rows: Annotated[int | None, typer.Option(help="At most this many rows.")] = None,
    seed: Annotated[int, typer.Option(help="The same gives the same trace.")] = 0,
    start: Annotated[str, typer.Option(help="ISO 8601 or epoch seconds of the trace's beginning.")] = "0",
    model: Annotated[list[str] | None, typer.Option(help="Name of the next model class; repeatable.")] = None,
    request_tokens: Annotated[
        int | None, typer.Option(help="Without a profile.  [default: 512; modeled: Zipf]")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="Without a profile.  [default: 128; modeled: Zipf]")
    ] = None,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "burstgpt",
) -> None:
    """Write a trace from a workload profile or an arrival process."""
    from replay.arrivals import PAPER_THETA, ArrivalOptions, open_process
    from traces.codec import open_writer
    from traces.generation import fixed_lengths, plain_profile, zipf_lengths
    from traces.generation import generate as generated

    _known_format(format)
    if profile is None and process in (None, "trace"):
        raise ConfigError("generate: name a --profile, a --process (constant, poisson, gamma, curve, modeled), or both")
    if duration is None and rows is None:
        raise ConfigError("generate: name a --duration, --rows, or both, so that the trace ends")
    if profile is not None and (request_tokens, response_tokens) != (None, None):
        raise ConfigError("--request-tokens: lengths are the profile's where one is given")
    start_s = _stamp(start, None, "--start") or 0.0
    fitted = None if profile is None else _read_profile(profile)
    try:
        literal: Any = process or "trace"
        options = ArrivalOptions(literal, rate, shape, curve, fitted)
        if fitted is not None:
            workload = fitted
        elif process == "modeled" and request_tokens is None and response_tokens is None:
            workload = plain_profile(zipf_lengths(PAPER_THETA, 4096))
        else:
            workload = plain_profile(
                fixed_lengths(
                    512 if request_tokens is None else request_tokens,
                    128 if response_tokens is None else response_tokens,
                )
            )
        batches = generated(
            workload, seed=seed, duration_s=duration, rows=rows, start_s=start_s, rate_rps=rate,
            process=open_process(options, start_s=start_s), models=model or (),
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with _whole(output) as stream:
        writer = open_writer(stream, format=format)
        for batch in batches:
            writer.write(batch)
        report = writer.close()
    dropped = "".join(f", {n:,} dropped: {reason}" for reason, n in report.dropped.items())
    print(f"{output}: {report.rows_written:,} of {report.rows_in:,} rows as {format}{dropped}", file=sys.stderr)


MAX_LAG_S = 0.010
"""As in `replay.verdict`, which takes longer to import than --help may."""
SloText = Annotated[
    str | None, typer.Option("--slo", help="Bounds in seconds, as ttft=0.5,tpot=0.05,itl=0.2,e2e=10; gives goodput.")
]
MinGoodput = Annotated[
    float | None, typer.Option(help="Exit status 1 below this share of requests within --slo.  [default: 0.99]")
]
MaxLag = Annotated[float, typer.Option(help="Exit status 3 where the replay's own lag (p99) is more seconds.")]
MaxErrorRate = Annotated[float | None, typer.Option(help="Exit status 1 beyond this share of failures.")]
Html = Annotated[Path | None, typer.Option(help="Write the report as one HTML page that opens offline.")]


@app.command()
def replay(
    target: Annotated[str, typer.Option(help="Base URL to send to.")],
    trace: Annotated[Path | None, typer.Argument(help="A trace file; without it, --profile.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for.")] = None,
    model_map: Annotated[
        list[str] | None, typer.Option(help="A=B asks for B where the trace has A; repeatable, instead of --model.")
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Ask for the trace's own models.")] = False,
    speed: Annotated[float, typer.Option(help="Divides the trace's time.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="At most this many rows.")] = None,
    start: Annotated[float, typer.Option(help="Skip this many seconds of trace time.")] = 0.0,
    duration: Annotated[float | None, typer.Option(help="Seconds of trace time to take.")] = None,
    only_model: Annotated[list[str] | None, typer.Option(help="Only rows of this model; repeatable.")] = None,
    only_log_type: Annotated[list[str] | None, typer.Option(help="Only rows of this log type; repeatable.")] = None,
    only_session: Annotated[list[str] | None, typer.Option(help="Only this session; repeatable.")] = None,
    only_outcome: Annotated[list[str] | None, typer.Option(help="Only rows of this outcome; repeatable.")] = None,
    idle_cap: Annotated[float | None, typer.Option(help="Cut gaps that are longer, in seconds of trace time.")] = None,
    loop: Annotated[int, typer.Option(help="Send the trace so often; 0 is for ever.")] = 1,
    rate_scale: Annotated[
        float | None, typer.Option(help="Part of the sessions, or so many times as many; bursts stay bursts.")
    ] = None,
    target_rps: Annotated[float | None, typer.Option(help="The rate scale that gives this mean rate.")] = None,
    warmup: Annotated[float, typer.Option(help="Seconds whose requests are sent and not measured.")] = 0.0,
    process: Annotated[
        str, typer.Option(help="When rows are due: trace, constant, poisson, gamma, curve or modeled.")
    ] = "trace",
    rate: Annotated[float | None, typer.Option(help="Requests a second, with --process.")] = None,
    shape: Annotated[float | None, typer.Option(help="Gamma shape of the gaps: 1 is Poisson, below it bursty.")] = None,
    curve: Annotated[Path | None, typer.Option(help="CSV with the columns time_s,rps.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Workload profile: without a trace its rows, from --start after Monday 0:00; or for modeled."
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Requests a second that the target can do, or a sweep's JSON file; with --load.")
    ] = None,
    load: Annotated[float | None, typer.Option(help="Share of --capacity to send.")] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="Send what fills this share of vLLM's KV cache on average.")
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(help="For --kv-budget, seconds a token.  [default: the trace's elapsed times]")
    ] = None,
    ttft: Annotated[float, typer.Option(help="For --kv-budget with --tpot, seconds to the first token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, ties and arrivals.")] = 0,
    ties: Annotated[
        str, typer.Option(help="spread equal whole-second stamps inside their second, or keep them.")
    ] = "spread",
    endpoint: Annotated[str, typer.Option(help="chat, completions or embeddings.")] = "chat",
    stream: Annotated[bool, typer.Option(help="Ask for streamed answers.")] = True,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer.json, or a folder with it and the chat template.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to take texts from: ShareGPT JSON, JSONL, or a text with one a line.")
    ] = None,
    history: Annotated[
        str, typer.Option(help="A session's earlier turns in each request: none, synthetic or real answers.")
    ] = "none",
    block_tokens: Annotated[int | None, typer.Option(help="Of the trace's prefix blocks, if it does not say.")] = None,
    blocks: Annotated[
        bool, typer.Option(" /--no-blocks", show_default=False, help="Make no prompts of the trace's prefix blocks.")
    ] = True,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object whose fields replace ours in each body; @FILE reads it.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE or NAME=$VARIABLE of the environment; repeatable.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(" /--no-ignore-eos", show_default=False, help="Let answers end by themselves.")
    ] = True,
    min_tokens: Annotated[
        bool, typer.Option(" /--no-min-tokens", show_default=False, help="Ask for no least length.")
    ] = True,
    max_tokens: Annotated[
        bool, typer.Option(" /--no-max-tokens", show_default=False, help="Ask for no greatest length.")
    ] = True,
    format: Format = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of this run in the records.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write a row a request: JSON lines, or Parquet for a name in .parquet.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary as JSON.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(help="Hold back beyond this; counts as lag.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 600.0,
    max_error_rate: MaxErrorRate = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    sessions: Annotated[
        str,
        typer.Option(help="independent (strict open loop), ordered or think-time: a turn waits for the one before."),
    ] = "independent",
    late: Annotated[str, typer.Option(help="send rows that are late, or drop and count them.")] = "send",
    late_after: Annotated[float, typer.Option(help="Seconds from which --late drop drops.")] = 1.0,
    processes: Annotated[
        int | None, typer.Option(help="Sender processes on this host.  [default: by the rate, where it is known]")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: send this part of n; auto/n in a Kubernetes Job.")] = None,
    start_at: Annotated[str | None, typer.Option(help="Schedule zero, as ISO 8601 or epoch seconds.")] = None,
    ray: Annotated[str | None, typer.Option(help="Send from this Ray cluster: an address, auto or local.")] = None,
    senders: Annotated[int | None, typer.Option(help="Actors on that cluster.  [default: one a node]")] = None,
    slo: SloText = None,
    min_goodput: MinGoodput = None,
    max_lag: MaxLag = MAX_LAG_S,
    html: Html = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="Metrics of a vLLM behind the target; repeatable.  [default: TARGET/metrics]"),
    ] = None,
    store: Annotated[bool, typer.Option("--store", help="Keep the run in the database.")] = False,
    store_requests: Annotated[
        bool | None,
        typer.Option(
            "--store-requests/--no-store-requests",
            help="With --store, its requests, too.  [default: unless the target is a burstgate that records them]",
        ),
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Send a trace to a server, open loop on absolute deadlines, and report what came back.

    Exit status: 0 good, 1 a threshold was missed, 2 wrong usage, 3 the replay itself was the bottleneck.
    """
    from replay.arrivals import ArrivalOptions
    from replay.bodies import parse_fields, parse_header
    from replay.metrics import parse_slo
    from replay.options import parse_shard
    from replay.prompts import PromptOptions
    from replay.runner import ReplayOptions
    from replay.runner import replay as run
    from replay.scaling import ScaleOptions, asked_rate_rps
    from replay.source import SourceOptions

    _known_format(format)
    literal: Any = {"ties": ties, "endpoint": endpoint, "sessions": sessions, "late": late}
    named: Any = process
    try:
        source = SourceOptions(
            start_s=start, duration_s=duration, models=tuple(only_model or ()),
            log_types=_one_of(only_log_type, LOG_TYPES, "--only-log-type"), sessions=tuple(only_session or ()),
            outcomes=tuple(only_outcome or ()), idle_cap_s=idle_cap, passes=loop or None, rate_scale=rate_scale,
            target_rps=target_rps, speed=speed, seed=seed, model_map=_model_map(model_map),
        )  # fmt: skip
        told: Any = history
        texts = PromptOptions(
            tokenizer=tokenizer, pool=prompts, blocks=blocks, block_tokens=block_tokens, history=told,
            max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos,
            extra_body={} if extra_body is None else parse_fields(extra_body),
            extra_headers=tuple(parse_header(each) for each in header or ()),
        )  # fmt: skip
        if (model is None) == (not source.model_map and not keep_models):
            raise ConfigError("--model: expected one model for all rows, or --model-map or --keep-models, and not both")
        fitted = None if profile is None else _read_profile(profile)
        scale = ScaleOptions(capacity, load, kv_budget, ttft, tpot)
        if scale.is_asked:
            if (target_rps, rate_scale, rate) != (None, None, None):
                raise ConfigError("--load: expected without --rate, --rate-scale and --target-rps, which it stands for")
            found = asked_rate_rps(
                scale, trace, source, fitted, target=target, format=format, api_key_env=api_key_env
            )  # fmt: skip
            if process == "trace":
                source = dataclasses.replace(source, target_rps=found)
            else:
                rate = found
        arrivals = ArrivalOptions(named, rate, shape, curve, fitted)
        options = ReplayOptions(
            prompts=texts, target=target, model=model or "", speed=speed, limit=limit, source=source,
            arrivals=arrivals, warmup_s=warmup, seed=seed,
            stream=stream, format=format, api_key_env=api_key_env, run_id=run_id, samples=samples, json=json,
            max_in_flight=max_in_flight, timeout_s=timeout, max_error_rate=max_error_rate, quiet=quiet,
            late_after_s=late_after, processes=processes, ray=ray, senders=senders,
            shard=None if shard is None else parse_shard(shard, os.environ),
            start_at_s=_stamp(start_at, None, "--start-at"),
            slo=None if slo is None else parse_slo(slo), min_goodput=min_goodput, max_lag_s=max_lag, html=html,
            metrics_urls=tuple(metrics_url or ()), **literal,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with contextlib.ExitStack() as undo:
        engine = None
        if store:
            engine = undo.enter_context(_database(config, data_dir, database_url, revision="head"))
            options = _options_to_store(options, engine, undo)
        summary = run(trace, options, console=Console(highlight=False))
        if engine is not None:
            _store_run(engine, options, summary, store_requests)
    _exit_by_verdict(summary, quiet=quiet)


def _exit_by_verdict(summary: Summary, *, quiet: bool) -> None:
    """Raises typer.Exit unless the run was good; says why where nothing has been printed."""
    from replay.verdict import exit_status

    if quiet:
        for reason in summary.reasons:
            print(f"burstgate: {summary.verdict}: {reason}", file=sys.stderr)
    if status := exit_status(summary):
        raise typer.Exit(status)


def _options_to_store(options: ReplayOptions, engine: sa.Engine, undo: contextlib.ExitStack) -> ReplayOptions:
    """With a samples file, from which the requests are stored. Raises RunConflict before anything is sent."""
    from storage.runs import check_new

    if options.run_id is not None:
        check_new(engine, options.run_id)
    if options.samples is not None:
        return options
    folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="burstgate-run-"))
    return dataclasses.replace(options, samples=Path(folder) / "samples.jsonl")


def _store_run(engine: sa.Engine, options: ReplayOptions, summary: Summary, store_requests: bool | None) -> None:
    """Keep a run; its requests, too, where nobody else records them."""
    from replay.sample import read_samples, record_of
    from replay.scrape import is_burstgate
    from storage.runs import Run, store_run

    run_id, started_at = summary.run_id, summary.started_at
    if run_id is None or started_at is None or options.samples is None:
        print("burstgate: not stored: nothing was sent", file=sys.stderr)
        return
    asked = store_requests if store_requests is not None else not is_burstgate(str(summary.target))
    stored = Run(
        run_id, started_at, str(summary.target), options.model, summary.sent, summary.ok, summary.verdict,
        msgspec.json.encode(options, enc_hook=str).decode(), msgspec.json.encode(summary).decode(),
    )  # fmt: skip
    samples = read_samples(options.samples) if asked else iter(())
    records = (
        record_of(
            each, run_id=run_id, started_at=started_at, model=options.model, endpoint=options.endpoint,
            stream=options.stream,
        )
        for each in samples
    )  # fmt: skip
    inserted = store_run(engine, stored, records)
    kept = f"with {inserted:,} requests" if asked else "its requests are the gateway's to record"
    print(f"burstgate: stored as run {run_id}, {kept}", file=sys.stderr)


@app.command()
def report(
    samples: Annotated[list[Path], typer.Argument(help="Samples files of one run.")],
    summary: Annotated[
        list[Path] | None,
        typer.Option(help="Summary that replay wrote with --json, for what no sample tells; repeatable."),
    ] = None,
    json: Json = False,
    html: Html = None,
    slo: SloText = None,
    min_goodput: MinGoodput = None,
    max_lag: MaxLag = MAX_LAG_S,
    max_error_rate: MaxErrorRate = None,
) -> None:
    """Make a replay's report again from its samples files, of all shards together; exit status as of replay."""
    from itertools import chain

    from replay.metrics import Summary, Workload, merge_workloads, parse_slo, summarize
    from replay.page import page
    from replay.report import render, summary_json
    from replay.sample import read_samples
    from replay.verdict import Limits, judged

    try:
        bounds = None if slo is None else parse_slo(slo)
        limits = Limits(max_lag, max_error_rate=max_error_rate, min_goodput=min_goodput)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    told: list[Workload] = []
    for path in summary or ():
        try:
            told.append(msgspec.json.decode(path.read_bytes(), type=Summary))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a summary, as replay --json writes it: {error}") from None
    workload = merge_workloads(told) if told else Workload()
    found = judged(summarize(chain.from_iterable(map(read_samples, samples)), workload, bounds), limits)
    if html is not None:
        with _whole(html) as stream:
            stream.write(page(found))
    if json:
        print(summary_json(found).decode(), end="")
    else:
        Console(highlight=False).print(render(found))
    _exit_by_verdict(found, quiet=json)


@app.command()
def runs(
    run_id: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    json: Json = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List the replays that were kept with `replay --store`, the newest first."""
    from storage.runs import read_runs

    with _database(config, data_dir, database_url) as engine:
        found = read_runs(engine, run_id)
    if run_id is not None and not found:
        raise ValueError(f"run id {run_id!r}: expected one that is stored, `burstgate runs` lists them")
    if json:
        whole = [
            {**dataclasses.asdict(each), "options": msgspec.Raw(each.options.encode()),
             "summary": msgspec.Raw(each.summary.encode())}
            for each in found
        ]  # fmt: skip
        print(msgspec.json.encode(whole).decode())
        return
    if not found:
        print("no run is stored", file=sys.stderr)
        return
    table = Table("run", "started", "target", "model", "sent", "ok", "verdict", box=None, pad_edge=False)
    for each in found:
        started = datetime.datetime.fromtimestamp(each.started_at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        table.add_row(each.run_id, started, each.target, each.model, f"{each.sent:,}", f"{each.ok:,}", each.verdict)
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Option(help="Trace whose lengths are sent and whose own arrivals are compared.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Base URL of a live target.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask a live target for.")] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="Preset of a simulated machine, or default; with burstgate simulate's flags for it, as --kv-blocks."
        ),
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="Costs of the simulated machine, fitted to samples or steps.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Requests a second to measure, as 1,2,4.")] = None,
    first: Annotated[float | None, typer.Option("--from", help="Lowest rate of a geometric ladder.")] = None,
    last: Annotated[float | None, typer.Option("--to", help="Its highest rate.")] = None,
    steps: Annotated[int, typer.Option(help="How many rates it has.")] = 6,
    shapes: Annotated[str, typer.Option(help="Gamma shapes of the gaps to compare with Poisson.")] = "0.5,0.25",
    duration: Annotated[float | None, typer.Option(help="Seconds of arrivals a cell.  [default: 60]")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests a cell, instead of a duration.")] = None,
    seeds: Annotated[int, typer.Option(help="Cells of each kind; figures are medians over them.")] = 3,
    seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    profile: Annotated[
        Path | None, typer.Option(help="Workload profile whose lengths are sent, without a trace.")
    ] = None,
    request_tokens: Annotated[
        int | None, typer.Option(help="Of every request.  [default: the trace's, the profile's, or 512]")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(help="Of every answer.  [default: the trace's, the profile's, or 128]")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Bounds in seconds, as ttft=0.5,tpot=0.05,e2e=10; itl of a live target only.")
    ] = None,
    max_lag: Annotated[
        float, typer.Option(help="A live cell is invalid where the replay's own lag (p99) is more seconds.")
    ] = MAX_LAG_S,
    all: Annotated[bool, typer.Option("--all", help="Measure every rate, past the knee too.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which a client leaves.")] = None,
    cool_down: Annotated[float, typer.Option(help="Seconds of rest before each cell of a live target.")] = 0.0,
    idle_timeout: Annotated[float, typer.Option(help="Most seconds to wait for a live target to be idle.")] = 120.0,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(help="Metrics of a vLLM behind the target; repeatable.  [default: TARGET/metrics]"),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the API key.")] = None,
    format: Format = None,
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line a cell.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with charts.")] = None,
    quiet: Annotated[bool, typer.Option(help="No line a cell.")] = False,
) -> None:
    """Find what bursts cost: the same mean rate as Poisson, Gamma and a trace's arrivals, rate by rate to the knee."""
    from replay.metrics import parse_slo
    from replay.sweep import SweepOptions, Workload, as_csv, ladder, numbers, progress_text
    from replay.sweep import sweep as measured
    from replay.sweep_report import page, render

    _known_format(format)
    for file in (json, csv, html):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: no such directory")
    try:
        if (rates is None) == (first is None or last is None):
            raise ValueError("rates: expected --rates, or --from and --to")
        options = SweepOptions(
            rates_rps=numbers(rates, "rates") if rates is not None else ladder(first or 0.0, last or 0.0, steps),
            shapes=numbers(shapes, "shapes"),
            duration_s=60.0 if duration is None and requests is None else duration,
            requests=requests, seeds=seeds, seed=seed, is_full=all, slo=None if slo is None else parse_slo(slo),
        )  # fmt: skip
        if timeout is not None and not 0 < timeout < 1e9:
            raise ValueError(f"timeout: expected seconds > 0, got {timeout:g}")
        run_cell, name = _sweep_target(
            context.args, target, model, simulate, fit, timeout, cool_down, idle_timeout, metrics_url or (), endpoint,
            api_key_env, max_lag,
        )  # fmt: skip
        if target is None and options.slo is not None and options.slo.itl_s is not None:
            raise ValueError("slo: itl: expected with --target only; the simulator keeps no gaps between chunks")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows, lengths = _sweep_rows(trace, format, profile, request_tokens, response_tokens, seed)
    found = measured(
        options, Workload(rows, has_gaps=trace is not None), run_cell, target=name, lengths=lengths,
        on_cell=lambda cell: None if quiet else print(progress_text(cell), flush=True),
    )  # fmt: skip
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(render(found))
    if json is not None:
        with _whole(json) as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    if csv is not None:
        with _whole(csv) as stream:
            stream.write(as_csv(found.cells).encode())
    if html is not None:
        with _whole(html) as stream:
            stream.write(page(found))
    if found.stopped_by is not None:
        raise _fail(found.stopped_by)
    if found.is_interrupted or not found.is_valid:
        raise typer.Exit(130 if found.is_interrupted else 3)


def _sweep_target(
    flags: list[str],
    target: str | None,
    model: str | None,
    preset: str | None,
    fit: Path | None,
    timeout_s: float | None,
    cool_down_s: float,
    idle_timeout_s: float,
    metrics_url: Sequence[str],
    endpoint: Any,
    api_key_env: str | None,
    max_lag_s: float,
) -> tuple[Any, str]:
    """What runs a sweep's cells, and its name. Raises ValueError naming the option."""
    from replay.cells import live_cells, virtual_cells

    if (target is None) == (preset is None):
        raise ValueError("target: expected either --target or --simulate")
    if preset is not None:
        from replay.simulator.__main__ import machine_config

        machine = machine_config(None if preset == "default" else preset, fit, flags, prog="burstgate sweep")
        return virtual_cells(machine, timeout_s), " ".join(["simulated", preset, *flags])
    if flags or fit is not None:
        raise ValueError(f"{flags[0] if flags else '--fit'}: it needs --simulate")
    if model is None:
        raise ValueError("model: expected with --target, got none")
    if not (0 <= cool_down_s < 1e6 and 0 <= idle_timeout_s < 1e6):
        raise ValueError(f"cool-down, idle timeout: expected seconds >= 0, got {cool_down_s:g}, {idle_timeout_s:g}")
    from replay.runner import ReplayOptions

    assert target is not None
    options = ReplayOptions(
        target=target, model=model, endpoint=endpoint, api_key_env=api_key_env, timeout_s=timeout_s or 600.0,
        metrics_urls=tuple(metrics_url), max_lag_s=max_lag_s,
    )  # fmt: skip
    cells = live_cells(options, idle_timeout_s=idle_timeout_s, cool_down_s=cool_down_s)
    return cells, f"{model} at {target}"


def _sweep_rows(
    trace: Path | None,
    format: str | None,
    profile: Path | None,
    request_tokens: int | None,
    response_tokens: int | None,
    seed: int,
) -> tuple[list[Any], str]:
    """The rows that a sweep sends, and where they are from."""
    from replay.schedule import PlanOptions, plan
    from replay.sweep import MAX_REQUESTS
    from traces.codec import read_trace
    from traces.generation import fixed_lengths, plain_profile
    from traces.generation import generate as generated
    from traces.profile import decode_profile

    if trace is not None and profile is not None:
        raise ConfigError("--profile: expected without a trace, whose lengths are sent")
    try:
        fixed = plain_profile(
            fixed_lengths(
                512 if request_tokens is None else request_tokens, 128 if response_tokens is None else response_tokens
            )
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if trace is not None:
        rows = list(plan(read_trace(trace, format=format), PlanOptions(limit=MAX_REQUESTS, seed=seed)))
        name = f"rows of {trace}"
    elif profile is not None:
        try:
            fitted = decode_profile(profile.read_bytes())
        except ValueError as error:
            raise ValueError(f"{profile}: {error}") from None
        rows = list(plan(generated(fitted, seed=seed, rows=100_000), PlanOptions(ties="keep")))
        name = f"lengths of {profile}"
    else:
        rows = list(plan(generated(fixed, seed=seed, rows=2, rate_rps=1.0), PlanOptions(ties="keep")))
        name = f"{rows[0].request_tokens} prompt and {rows[0].response_tokens} answer tokens"
    given = {"request_tokens": request_tokens, "response_tokens": response_tokens}
    given = {key: tokens for key, tokens in given.items() if tokens is not None}
    if given and (trace is not None or profile is not None):
        rows = [msgspec.structs.replace(row, **given) if row.is_sendable else row for row in rows]
        name += "".join(f", {key.replace('_', ' ')} {tokens}" for key, tokens in given.items())
    return rows, name


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context) -> None:
    """Run a vLLM-like server on a simulated GPU, or a trace through one (--trace); `--help` lists the flags."""
    from replay.simulator.__main__ import main as simulator

    raise typer.Exit(simulator(context.args))


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo-out"),
) -> None:
    """Simulated vLLM, gateway on SQLite, a bursty trace replayed through it, and what was recorded."""
    from proxy.demo import run_demo

    run_demo(directory, Console(highlight=False))


@app.command()
def version() -> None:
    """Print the version."""
    print(importlib.metadata.version("burstgate"))


EXPECTED = (
    ConfigError,
    DatabaseUrlError,
    DatabaseUnavailable,
    SchemaError,
    TraceFormatError,
    ValueError,
    OSError,
)
"""Errors whose text is for the user."""

_USAGE: tuple[type[Exception], ...] = (ConfigError, DatabaseUrlError)


# Newer typers carry their own copy of click, and name few of its classes; this base is the same in either.
_WrongCall: type[Exception] = typer.BadParameter.__mro__[2]


def _wrong_call(error: Any) -> str:
    """One line for a command line that can not be parsed; nothing where its help has been shown."""
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"burstgate: {text}{hint}" if text and type(error).__name__ != "NoArgsIsHelpError" else ""


def main() -> None:
    """Run the command; every expected error is one line on standard error."""
    from replay.runner import ReplayError

    try:
        status = app(prog_name="burstgate", standalone_mode=False)
    except _WrongCall as error:
        if line := _wrong_call(error):
            print(line, file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (*EXPECTED, ReplayError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"burstgate: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _USAGE) else 1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
