"""Commands for the life of data: archive, prune."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.commands.common import (
    Config,
    DatabaseUrl,
    DataDir,
    app,
    duration_s,
    load_config,
    open_archive,
    open_database,
    stamp_s,
)
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    from storage.retention import DayRows


@app.command()
def archive(
    to: Annotated[str | None, typer.Option("--to", help="Folder or URL.  [default: retention.archive]")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="Days that ended by then: ISO 8601 or epoch seconds.  [default: all that are over]"),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the rows in the database, too.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Move whole days from the database into a Parquet archive. Killed at any point, it goes on where it was."""
    from storage.retention import SETTLED_S, days_before, prune

    place = to or load_config(config).settings.retention.archive
    if place is None:
        raise ConfigError("--to: name a folder or a URL, or set retention.archive")
    target = open_archive(place)
    settled_s = time.time() - SETTLED_S
    before_s = stamp_s(before, None, "--before")
    with open_database(config, data_dir, database_url) as engine:
        days = days_before(engine, settled_s if before_s is None else min(before_s, settled_s))
        done = prune(engine, [day for day in days if day.rows], target, keep=keep, on_day=_say_day)
    kept = "still" if keep else "no longer"
    _say(f"{target.shown}: {len(done.days):,} days, {done.archived:,} rows there, {kept} in the database")


@app.command("prune")
def prune_(
    older_than: Annotated[str | None, typer.Option(help="Days that ended that long ago, as 30d.")] = None,
    max_size: Annotated[str | None, typer.Option(help="The oldest days, until so much is left, as 50GB.")] = None,
    archive: Annotated[
        str | None, typer.Option(help="Folder or URL where each day goes first.  [default: retention.archive]")
    ] = None,
    no_archive: Annotated[
        bool, typer.Option("--no-archive", help="Whatever retention.archive says, the rows are gone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which days would go.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="SQLite: write the file anew, and smaller; the recorder waits meanwhile.")
    ] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Take the oldest days out of the database, by age, by size or by both. Imported data sets stay."""
    from proxy.settings import parse_size
    from storage import retention

    if older_than is None and max_size is None and not vacuum:
        raise ConfigError("prune: name --older-than, --max-size, both, or --vacuum")
    if archive is not None and no_archive:
        raise ConfigError("--no-archive: expected without --archive")
    max_age_s = None if older_than is None else duration_s(older_than, "--older-than")
    max_bytes = None if max_size is None else parse_size(max_size, "--max-size")
    place = None if no_archive else archive or load_config(config).settings.retention.archive
    with open_database(config, data_dir, database_url) as engine:
        if max_age_s is not None or max_bytes is not None:
            days = retention.due_days(engine, time.time(), max_age_s=max_age_s, max_bytes=max_bytes, sized=dry_run)
            if dry_run:
                for day in days:
                    print(f"{day}  {day.rows:>12,} rows  {_shown_size(day.size_bytes)}")
                _say(f"{len(days):,} days, {sum(day.rows for day in days):,} rows would go; nothing was changed")
                return
            done = retention.prune(engine, days, open_archive(place), on_day=_say_day)
            into = f", archived in {place}" if place else ""
            _say(
                f"{len(done.days):,} days, {done.rows:,} rows taken out{into};"
                f" {_shown_size(done.bytes_before)} -> {_shown_size(done.bytes_after)} in use"
            )
            if done.keeps_file_size and done.rows and not vacuum:
                _say("the file keeps its size and uses the space again; burstgate prune --vacuum gives it back")
        if vacuum:
            retention.vacuum(engine)
            _say("vacuumed")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_day(day: DayRows, rows: int, archived: int) -> None:
    _say(f"{day}: {rows:,} rows taken out" + (f", {archived:,} in the archive" if archived else ""))


def _shown_size(size_bytes: int | None) -> str:
    from proxy.settings import show_size

    return "" if size_bytes is None else show_size(size_bytes)
