"""Commands that describe traces: analyze, failures, compare."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from proxy.commands.common import (
    ArchiveUrl,
    Config,
    DatabaseUrl,
    DataDir,
    DayZero,
    Format,
    From,
    JsonFile,
    LogTypes,
    Models,
    Origins,
    Outcomes,
    Runs,
    Sessions,
    Timezone,
    To,
    TraceOrDatabase,
    app,
    check_format,
    check_timezone,
    matching_rows,
    open_database,
    parse_operand,
    progress,
    selection_of,
    stamp_s,
    whole_file,
    write_json,
)
from proxy.config_error import ConfigError
from storage.errors import DatabaseUnavailable, SchemaError

if TYPE_CHECKING:
    from traces.analysis import Analyzed
    from traces.shadow import ShadowOptions

Objective = Annotated[
    float, typer.Option("--availability", help="Share of valid requests that must not fail: the error budget.")
]


@app.command()
def analyze(
    trace: TraceOrDatabase = None,
    json: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page that opens offline.")] = None,
    csv_dir: Annotated[Path | None, typer.Option(help="Folder for each figure's numbers as CSV.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as pictures for papers; needs burstgate[figures].")
    ] = None,
    figure_format: Annotated[str, typer.Option(help="Of the pictures: png or svg.")] = "png",
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
    archive: ArchiveUrl = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Burstiness, periods, lengths, conversations, load, failures and latency of a trace file or of the database."""
    from traces.analysis import Options, check_options, parse_bounds
    from traces.analysis import analyze as analyzed
    from traces.analysis_report import render
    from traces.figures import FORMATS, FiguresMissing, check_available

    check_format(format)
    check_timezone(timezone)
    if figure_format not in FORMATS:
        raise ConfigError(f"--figure-format: expected one of {', '.join(FORMATS)}, got {figure_format!r}")
    try:
        if figures is not None:
            check_available()
        bounds_s = {} if slo is None else parse_bounds(slo)
        options = Options(
            zone=timezone or "UTC",
            slo=availability,
            bounds_s=bounds_s,
            most_services=services,
            all_origins=bool(origin or run_id),
        )
        check_options(options)
    except FiguresMissing as error:
        raise ConfigError(f"--figures: {error}") from None
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    for path in (json, html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: no such directory")
    selection = selection_of(
        model, session, outcome, origin, log_type, run_id,
        stamp_s(start, timezone, "--from"), stamp_s(end, timezone, "--to"),
    )  # fmt: skip
    with (
        progress() as say,
        matching_rows(
            trace, selection, format, timezone, day_zero, (config, data_dir, database_url), archive
        ) as batches,
    ):
        found = analyzed(batches, options, say)
    if json != Path("-"):
        render(found.analysis, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    if json is not None:
        write_json(json, found.analysis)
    if html is not None:
        from replay.analysis_page import page

        with whole_file(html) as stream:
            stream.write(page(found.analysis))
    if csv_dir is not None:
        _write_tables(csv_dir, found)
    if figures is not None:
        _write_pictures(figures, figure_format, found)


def _write_tables(folder: Path, found: Analyzed) -> None:
    """A CSV for each figure, and windows.csv with every window that was fitted."""
    from traces.charts import charts

    folder.mkdir(parents=True, exist_ok=True)
    tables = {chart.name: chart.table for chart in charts(found.analysis)}
    for name, table in (*tables.items(), ("windows", found.windows)):
        with whole_file(folder / f"{name}.csv") as stream:
            stream.write(table.write_csv().encode())  # polars' own error does not say that the disk is full


def _write_pictures(folder: Path, form: str, found: Analyzed) -> None:
    """A picture of each figure that has something to show."""
    from traces.charts import charts
    from traces.figures import draw

    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts(found.analysis):
        if not chart.is_empty:
            with whole_file(folder / f"{chart.name}.{form}") as stream:
                draw(chart, stream, form)


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
    archive: ArchiveUrl = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Where, when and under what load requests fail, of a trace file or of the database; in a pager on a terminal."""
    from traces.analysis import Options, analyze_failures, check_options
    from traces.analysis_report import render_failures

    check_format(format)
    check_timezone(timezone)
    try:
        options = Options(zone=timezone or "UTC", slo=availability, all_origins=bool(origin or run_id))
        check_options(options)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    selection = selection_of(
        model, session, outcome, origin, log_type, run_id,
        stamp_s(start, timezone, "--from"), stamp_s(end, timezone, "--to"),
    )  # fmt: skip
    with (
        progress() as say,
        matching_rows(
            trace, selection, format, timezone, day_zero, (config, data_dir, database_url), archive
        ) as batches,
    ):
        source, found = analyze_failures(batches, options, say)
    if json is not None:
        write_json(json, found)
    if json != Path("-"):
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        with console.pager() if sys.stdout.isatty() else contextlib.nullcontext():
            render_failures(source, found, console)


@app.command()
def compare(
    a: Annotated[
        str | None,
        typer.Argument(help="A trace file, or of the database as from=2026-11-01,to=2026-11-08,origin=client."),
    ] = None,
    b: Annotated[str | None, typer.Argument(help="The other one, set against the first.")] = None,
    shadow: Annotated[
        str | None, typer.Option(help="Instead of A and B: a shadow target's requests against their primaries.")
    ] = None,
    start: From = None,
    end: To = None,
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
    finish_tolerance: Annotated[float, typer.Option(help="--shadow: share of other finish reasons.")] = 0.05,
    agreement_tolerance: Annotated[float, typer.Option(help="--shadow: disagreement of the outputs.")] = 0.05,
    format: Format = None,
    timezone: Timezone = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Is B as A? Arrivals, lengths, sessions, failures, latency. Or: does a shadow target answer as production does?

    Exit status: 0 the same, 1 different, 2 a trace cannot be read or wrong usage, 3 too few requests to tell.
    """
    from traces.analysis_report import render_comparison
    from traces.compare import Options, check_options
    from traces.compare import compare as compared
    from traces.table import collect

    check_format(format)
    check_timezone(timezone)
    if shadow is not None:
        if a is not None or b is not None:
            raise ConfigError("--shadow: expected without A and B, whose place it takes")
        from traces.shadow import ShadowOptions

        told = ShadowOptions(
            seed=seed, rounds=rounds, confidence=confidence, failure_tolerance=failure_tolerance,
            length_tolerance=length_tolerance, finish_tolerance=finish_tolerance, latency_tolerance=latency_tolerance,
            agreement_tolerance=agreement_tolerance,
        )  # fmt: skip
        within = (stamp_s(start, timezone, "--from"), stamp_s(end, timezone, "--to"))
        _exit_by_verdict(_compare_shadow(shadow, told, within, (config, data_dir, database_url), json))
        return
    if a is None or b is None:
        raise ConfigError("expected two traces A and B, or --shadow TARGET")
    if start is not None or end is not None:
        raise ConfigError("--from, --to: expected with --shadow; of A and B as from=...,to=...")
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
    with progress() as say:
        try:
            for operand in (a, b):
                say(f"reading {operand}")
                path, selection = parse_operand(operand, timezone)
                with matching_rows(
                    path, selection, format, timezone, None, (config, data_dir, database_url)
                ) as batches:
                    tables.append(collect(batches).table)
        except OSError as error:  # status 1 says that the traces differ
            raise ConfigError(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from None
        except (ValueError, DatabaseUnavailable, SchemaError) as error:
            raise ConfigError(str(error)) from None
        say("comparing")
        found = compared(tables[0], tables[1], options)
    if json is not None:
        write_json(json, found)
    if json != Path("-"):
        render_comparison(found, a, b, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    _exit_by_verdict(found.verdict)


def _exit_by_verdict(verdict: str) -> None:
    if status := {"same": 0, "different": 1, "unknown": 3}[verdict]:
        raise typer.Exit(status)


def _compare_shadow(
    target: str,
    options: ShadowOptions,
    within: tuple[float | None, float | None],
    database: tuple[Path | None, Path | None, str | None],
    json: Path | None,
) -> str:
    """Show a shadow target's differences; returns the verdict. Raises ConfigError."""
    from storage.query import read_pairs, read_shadow_targets
    from traces.analysis_report import render_shadow
    from traces.shadow import check_options, compare_shadow

    try:
        check_options(options)
        with progress() as say, open_database(*database) as engine:
            say("joining")
            found = compare_shadow(read_pairs(engine, target, start_s=within[0], end_s=within[1]), target, options)
            known = read_shadow_targets(engine) if not found.pairs else []
    except OSError as error:  # status 1 says that they differ
        raise ConfigError(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from None
    except (ValueError, DatabaseUnavailable, SchemaError) as error:
        raise ConfigError(str(error)) from None
    if not found.pairs and target not in known:
        raise ConfigError(f"--shadow: no request to {target!r} is recorded; there are {', '.join(known) or 'none'}")
    if json is not None:
        write_json(json, found)
    if json != Path("-"):
        render_shadow(found, Console(highlight=False, width=None if sys.stdout.isatty() else 150))
    return found.verdict
