"""Commands that move traces: export, import, convert, count, fit, generate."""

from __future__ import annotations

import datetime
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from proxy.commands.common import (
    FILE_BATCH_ROWS,
    ArchiveUrl,
    Config,
    DatabaseUrl,
    DataDir,
    DayZero,
    Format,
    From,
    Json,
    LogTypes,
    Models,
    Origins,
    Outcomes,
    Runs,
    Sessions,
    Timezone,
    To,
    app,
    check_format,
    check_timezone,
    duration_s,
    open_archive,
    open_database,
    read_profile_file,
    rows_of,
    selection_of,
    stamp_s,
    whole_file,
)
from proxy.config_error import ConfigError
from traces.codec import FORMATS, TraceClock, TraceFormatError

if TYPE_CHECKING:
    pass


@app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - is standard output.")],
    format: Format = None,
    failures: Annotated[str, typer.Option(help="keep or drop failed requests.")] = "keep",
    relabel_model: Annotated[str | None, typer.Option(help="Name every row's model so.")] = None,
    salt: Annotated[str | None, typer.Option(help="For the same block ids again.  [default: a new one]")] = None,
    stamps: Annotated[str | None, typer.Option(help="int or float Timestamps.")] = None,
    anonymize: Annotated[
        bool, typer.Option("--anonymize", help="Pseudonyms for ids, sessions, tenants; no upstream, no gateway.")
    ] = False,
    coarsen: Annotated[
        str, typer.Option(help="With --anonymize: stamps in steps of this, as 60s; 0s keeps them.")
    ] = "1s",
    shift_days: Annotated[int, typer.Option(help="With --anonymize: move all stamps by whole days.")] = 0,
    anonymize_models: Annotated[
        bool, typer.Option("--anonymize-models", help="With --anonymize: model-1, model-2, ... for the models.")
    ] = False,
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
    """Write recorded requests as a trace, with a JSON sidecar that says what was done."""
    from storage import export as exports

    check_format(format)
    check_timezone(timezone)
    if failures not in ("keep", "drop"):
        raise ConfigError(f"--failures: expected keep or drop, got {failures!r}")
    if stamps not in (None, "int", "float"):
        raise ConfigError(f"--stamps: expected int or float, got {stamps!r}")
    selection = selection_of(
        model, session, outcome, origin, log_type, run_id,
        stamp_s(start, timezone, "--from"), stamp_s(end, timezone, "--to"),
    )  # fmt: skip
    anonymizer = None
    if anonymize:
        from traces.anonymize import KEY_BYTES, Anonymizer

        try:
            anonymizer = Anonymizer(
                secrets.token_bytes(KEY_BYTES),
                coarsen_s=duration_s(coarsen, "--coarsen"),
                shift_days=shift_days,
                hide_models=anonymize_models,
            )
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
    elif (coarsen, shift_days, anonymize_models) != ("1s", 0, False):
        raise ConfigError("--coarsen, --shift-days and --anonymize-models: expected with --anonymize")
    with open_database(config, data_dir, database_url) as engine:
        report = exports.export(
            engine,
            output,
            selection,
            archive=open_archive(archive),
            anonymize=anonymizer,
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

    check_format(format)
    check_timezone(timezone)
    clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone)
    with open_database(config, data_dir, database_url, revision="head") as engine:
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

    check_timezone(timezone)
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
    archive: ArchiveUrl = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Requests, rates, tokens and failures of a trace file or of the database."""
    from storage.query import matching
    from traces.batch import ahead
    from traces.codec import read_trace
    from traces.summary import FIELDS, render, summarize

    check_format(format)
    check_timezone(timezone)
    selection = selection_of(
        model, session, outcome, origin, log_type, run_id,
        stamp_s(start, timezone, "--from"), stamp_s(end, timezone, "--to"),
    )  # fmt: skip
    if trace is not None:
        if archive is not None:
            raise ConfigError("--archive: expected with the database, not with a trace file")
        fields = (*FIELDS, "origin", "run_id")
        batches = read_trace(trace, format=format, fields=fields, batch_rows=FILE_BATCH_ROWS)
        summary = summarize(matching(batch, selection) for batch in ahead(batches))
    else:
        with open_database(config, data_dir, database_url) as engine:
            summary = summarize(rows_of(engine, selection, archive, FIELDS))
    if json:
        print(msgspec.json.encode(summary).decode())
    else:
        render(summary, Console(highlight=False))


@app.command()
def fit(
    trace: Path,
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write, JSON; - is standard output.")],
    format: Format = None,
    timezone: Annotated[str, typer.Option(help="IANA name.")] = "UTC",
    day_zero: DayZero = None,
    privacy: Annotated[
        bool, typer.Option("--privacy", help="No number of fewer requests or sessions than --min-count.")
    ] = False,
    min_count: Annotated[int | None, typer.Option(help="With --privacy.  [default: 20]")] = None,
) -> None:
    """Make a workload profile of a trace: rates, burstiness, lengths and sessions, with no name and no id in it."""
    from traces.codec import read_trace
    from traces.profile import FIELDS, PRIVATE_COUNT, encode_profile, fit_profile

    check_format(format)
    check_timezone(timezone)
    if min_count is not None and not privacy:
        raise ConfigError("--min-count: it needs --privacy")
    if min_count is not None and min_count < 2:
        raise ConfigError(f"--min-count: expected 2 or more, got {min_count}")
    clock = TraceClock(day_zero.date() if day_zero is not None else datetime.date(1970, 1, 1), timezone)
    profile = fit_profile(
        read_trace(trace, format=format, clock=clock, fields=FIELDS, batch_rows=FILE_BATCH_ROWS),
        least=(min_count or PRIVATE_COUNT) if privacy else 1,
    )
    with whole_file(output) as stream:
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

    check_format(format)
    if profile is None and process in (None, "trace"):
        raise ConfigError("generate: name a --profile, a --process (constant, poisson, gamma, curve, modeled), or both")
    if duration is None and rows is None:
        raise ConfigError("generate: name a --duration, --rows, or both, so that the trace ends")
    if profile is not None and (request_tokens, response_tokens) != (None, None):
        raise ConfigError("--request-tokens: lengths are the profile's where one is given")
    start_s = stamp_s(start, None, "--start") or 0.0
    fitted = None if profile is None else read_profile_file(profile)
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
    with whole_file(output) as stream:
        writer = open_writer(stream, format=format)
        for batch in batches:
            writer.write(batch)
        report = writer.close()
    dropped = "".join(f", {n:,} dropped: {reason}" for reason, n in report.dropped.items())
    print(f"{output}: {report.rows_written:,} of {report.rows_in:,} rows as {format}{dropped}", file=sys.stderr)
