"""All statistics of one trace: what `burstgate analyze` says, in the terminal, as JSON, as a page and as CSV.

`analyze` gathers the trace's table, computes one part after the other and drops each column when no part needs it any
more, so that the table and one part's work are held at a time. Figures are None where they are not defined; none is
ever NaN or infinite.

Arrivals are described for all requests and for each log type, as the BurstGPT paper has them; periods and lengths for
all requests and for each of the largest services, a model and a log type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import numpy as np
import polars as pl

from traces.burstiness import (
    DETRENDED_WINDOW_S,
    FIT_SCHEMA,
    FIT_WINDOW_S,
    Arrivals,
    DaySlot,
    Episodes,
    FitSummary,
    burst_episodes,
    describe_arrivals,
    fit_windows,
    summarize_fits,
    work_day_slots,
)
from traces.conversations import Conversations, describe_conversations
from traces.failures import FailureReport, bin_width_s, describe_failures
from traces.latency import LatencyReport, describe_latency
from traces.lengths import LengthReport, describe_lengths
from traces.load import Load, arrival_rates_rps, in_flight_at_arrivals, load_over_time
from traces.periodicity import Periodicity, describe_periodicity
from traces.record import LogType, Origin
from traces.table import READS, Service, collect, services, view

FIELDS: Final = READS
"""The fields of a record that an analysis reads."""
MOST_SERVICES: Final = 8
MOST_FITS: Final = 200_000
"""Windows of 5 minutes that are fitted one by one; of more (two years of them), every fifth, seventh, ..."""
BOUNDS: Final = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "elapsed_s", "queue": "queue_s"}
"""Names of objectives, and the columns that they bound."""

Step = Callable[[str], None]


class Options(msgspec.Struct, frozen=True):
    """zone: IANA name of the clock that days and hours are of. slo: the share of valid requests that must not fail.
    bounds_s: a column of BOUNDS to the most seconds that a good request may take. most_services: the largest ones, that
    periods and lengths are described of one by one. all_origins: False leaves out what is not a client's where a trace
    has clients' requests and others (replays, injected bursts, shadows)."""

    zone: str = "UTC"
    slo: float = 0.999
    bounds_s: dict[str, float] = {}
    most_services: int = MOST_SERVICES
    all_origins: bool = False


class Source(msgspec.Struct, frozen=True):
    """What was read. dropped: reason to rows that have no place in time; blanked: column to values taken as unknown.
    origins: who caused the requests, most first. requests: those that the statistics are of, of the clients alone where
    others were left out."""

    rows_read: int
    requests: int
    dropped: dict[str, int]
    blanked: dict[str, int]
    origins: dict[str, int]


class FitBin(msgspec.Struct, frozen=True):
    """The 20-minute windows that begin in one bin of time; quantiles are linear between those that have an alpha."""

    start_s: float
    windows: int
    fitted: int
    alpha_p10: float | None
    alpha_p50: float | None
    alpha_p90: float | None


class ArrivalPart(msgspec.Struct, frozen=True):
    """When requests came: all of them (`log_type` None), or those of one log type.

    windows, work_day, over_time: from windows of FIT_WINDOW_S. detrended: from windows of DETRENDED_WINDOW_S, with the
    rate's trend taken out: CVs of all of them, alphas of MOST_FITS evenly spaced ones where there are more.
    """

    log_type: LogType | None
    arrivals: Arrivals
    windows: FitSummary
    detrended: FitSummary
    work_day: tuple[DaySlot, ...]
    bin_s: float | None
    over_time: tuple[FitBin, ...]


class ServiceLengths(msgspec.Struct, frozen=True):
    """The token lengths of all requests (`service` None), or of one service."""

    service: Service | None
    lengths: LengthReport


class Analysis(msgspec.Struct, frozen=True):
    """Everything of one trace."""

    source: Source
    options: Options
    arrivals: tuple[ArrivalPart, ...]
    episodes: Episodes
    periodicity: tuple[Periodicity, ...]
    lengths: tuple[ServiceLengths, ...]
    conversations: Conversations
    load: Load | None
    failures: FailureReport
    latency: LatencyReport
    warnings: tuple[str, ...]
    """What a reader is to mind, in words."""


WINDOW_SCHEMA: Final[dict[str, pl.DataType]] = {"log_type": pl.String(), "window_s": pl.Int64(), **FIT_SCHEMA}


@dataclass(frozen=True, slots=True)
class Analyzed:
    """An analysis, and every window that was fitted: WINDOW_SCHEMA, `log_type` null for all requests together."""

    analysis: Analysis
    windows: pl.DataFrame


def parse_bounds(text: str) -> dict[str, float]:
    """`ttft=0.5,e2e=10` as columns and seconds. Raises ValueError naming the part that is wrong."""
    bounds_s: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in BOUNDS or BOUNDS[name] in bounds_s:
            raise ValueError(f"slo: expected each of {', '.join(BOUNDS)} at most once, as ttft=0.5, got {part!r}")
        try:
            bound_s = float(value)
        except ValueError:
            bound_s = -1.0
        if not 0 < bound_s < 1e9:
            raise ValueError(f"slo: {name}: expected seconds above 0, got {value!r}")
        bounds_s[BOUNDS[name]] = bound_s
    return bounds_s


def check_options(options: Options) -> ZoneInfo:
    """The options' time zone. Raises ValueError naming the option that is wrong."""
    try:
        zone = ZoneInfo(options.zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"timezone: expected an IANA time zone, got {options.zone!r}") from None
    if not 0 < options.slo < 1:
        raise ValueError(f"availability: expected a share above 0 and below 1, such as 0.999, got {options.slo:g}")
    if options.most_services < 1:
        raise ValueError(f"services: expected 1 or more, got {options.most_services}")
    return zone


def analyze(batches: Iterable[pl.DataFrame], options: Options | None = None, on_step: Step | None = None) -> Analyzed:
    """Every statistic of a trace given in batches, sorted or not.

    on_step: is told what is being done, before it is. Raises ValueError for options that are out of range.
    """
    options = options or Options()
    zone = check_options(options)
    say = on_step or (lambda _: None)
    table, source = _read(batches, options, say)
    stamps_s = view(table["received_at"])

    with ThreadPoolExecutor(1) as beside:  # half of the work, in numpy and scipy, which release the interpreter's lock
        arrivals = beside.submit(_arrivals, table.select("received_at", "log_type"), zone)
        say("conversations")
        conversations = describe_conversations(table)
        table = table.drop("session")
        say("bursts")
        episodes = burst_episodes(stamps_s)
        say("weeks, hours and periods")
        periodicity = describe_periodicity(table, zone, most_services=options.most_services)
        say("lengths")
        lengths = _lengths(table, options.most_services)
        failures, latency = _failures_and_latency(table, episodes, options, say)
        table = table.select("received_at", "elapsed_s", "request_tokens", "response_tokens")
        say("arrivals")
        parts, windows = arrivals.result()
    say("load")  # which takes the most memory
    load = load_over_time(table)
    analysis = Analysis(
        source=source,
        options=options,
        arrivals=parts,
        episodes=episodes,
        periodicity=periodicity,
        lengths=lengths,
        conversations=conversations,
        load=load,
        failures=failures,
        latency=latency,
        warnings=_warnings(source, parts[0].arrivals, load),
    )
    return Analyzed(analysis, windows)


def analyze_failures(
    batches: Iterable[pl.DataFrame], options: Options | None = None, on_step: Step | None = None
) -> tuple[Source, FailureReport]:
    """Only the failures of a trace; as `analyze`."""
    options = options or Options()
    check_options(options)
    say = on_step or (lambda _: None)
    table, source = _read(batches, options, say)
    say("bursts")
    episodes = burst_episodes(view(table["received_at"]))
    say("failures")
    return source, _failures(table, in_flight_at_arrivals(table), episodes, options)


def _read(batches: Iterable[pl.DataFrame], options: Options, say: Step) -> tuple[pl.DataFrame, Source]:
    def counted() -> Iterable[pl.DataFrame]:
        rows = 0
        for batch in batches:
            rows += batch.height
            say(f"reading: {rows:,} rows")
            yield batch

    say("reading")
    found = collect(counted())
    table = found.table
    counts = table["origin"].value_counts(sort=True).cast({"origin": pl.String})
    origins = {name: n for name, n in counts.iter_rows() if name is not None}
    if not options.all_origins and len(origins) > 1 and Origin.CLIENT in origins:
        table = table.filter(pl.col("origin") == Origin.CLIENT.value)
    return table, Source(
        rows_read=found.rows_read,
        requests=table.height,
        dropped=found.dropped,
        blanked={name: n for name, n in found.blanked.items() if n},
        origins=origins,
    )


def _arrivals(table: pl.DataFrame, zone: ZoneInfo) -> tuple[tuple[ArrivalPart, ...], pl.DataFrame]:
    parts = []
    windows = [pl.DataFrame(schema=WINDOW_SCHEMA)]
    present = table["log_type"].value_counts(sort=True)["log_type"].drop_nulls().to_list()
    for name in (None, *(present if len(present) > 1 else ())):
        rows = (
            table if name is None else table.lazy().filter(pl.col("log_type") == name).select("received_at").collect()
        )
        stamps_s = view(rows["received_at"])
        fits = fit_windows(stamps_s, threads=1)
        detrended = fit_windows(stamps_s, window_s=DETRENDED_WINDOW_S, detrend=True, most_fits=MOST_FITS, threads=1)
        bin_s, over_time = _fits_over_time(fits)
        parts.append(
            ArrivalPart(
                log_type=None if name is None else LogType(name),
                arrivals=describe_arrivals(stamps_s),
                windows=summarize_fits(fits),
                detrended=summarize_fits(detrended),
                work_day=work_day_slots(fits, zone),
                bin_s=bin_s,
                over_time=over_time,
            )
        )
        for window_s, found in ((FIT_WINDOW_S, fits), (DETRENDED_WINDOW_S, detrended)):
            labels = (pl.lit(name, pl.String()).alias("log_type"), pl.lit(window_s, pl.Int64()).alias("window_s"))
            windows.append(found.with_columns(labels).select(list(WINDOW_SCHEMA)))
    return tuple(parts), pl.concat(windows)


def _fits_over_time(fits: pl.DataFrame) -> tuple[float | None, tuple[FitBin, ...]]:
    if not fits.height:
        return None, ()
    bin_s = max(bin_width_s(fits["start_s"][-1] - fits["start_s"][0]), 86_400.0)
    binned = (
        fits.group_by(start_s=(pl.col("start_s") / bin_s).floor() * bin_s)
        .agg(
            pl.len(),
            pl.col("alpha").count().alias("fitted"),
            *(pl.col("alpha").quantile(share, "linear").alias(f"p{share}") for share in (0.1, 0.5, 0.9)),
        )
        .sort("start_s")
    )
    return bin_s, tuple(FitBin(*row) for row in binned.iter_rows())


def _lengths(table: pl.DataFrame, most: int) -> tuple[ServiceLengths, ...]:
    columns = ("outcome", "request_tokens", "response_tokens")
    found = [ServiceLengths(None, describe_lengths(table))]
    found.extend(ServiceLengths(service, describe_lengths(rows)) for service, rows in services(table, columns, most))
    return tuple(found)


def _failures_and_latency(
    table: pl.DataFrame, episodes: Episodes, options: Options, say: Step
) -> tuple[FailureReport, LatencyReport]:
    say("failures")
    in_flight = in_flight_at_arrivals(table)
    failures = _failures(table, in_flight, episodes, options)
    say("latency")
    return failures, describe_latency(table, in_flight=in_flight, bounds_s=options.bounds_s)


def _failures(
    table: pl.DataFrame, in_flight: np.ndarray[tuple[int], np.dtype[np.int32]], episodes: Episodes, options: Options
) -> FailureReport:
    times_s = np.array([(each.start_s, each.end_s) for each in episodes.episodes], dtype=np.float64).reshape(-1, 2)
    return describe_failures(
        table,
        in_flight=in_flight,
        arrival_rate_rps=arrival_rates_rps(view(table["received_at"])),
        episodes=times_s,
        zone=options.zone,
        slo=options.slo,
    )


def source_warnings(source: Source) -> tuple[str, ...]:
    """What a reader is to mind of what was read, in words."""
    found = [f"{n:,} rows left out: {reason}" for reason, n in source.dropped.items()]
    found += [
        f"{name}: {n:,} values taken as unknown: negative, not a number or too large"
        for name, n in source.blanked.items()
    ]
    if len(source.origins) > 1:
        if source.requests == sum(source.origins.values()):
            told = ", ".join(f"{name} {n:,}" for name, n in source.origins.items())
            found.append(f"requests of several origins together ({told}): --origin takes one")
        else:
            told = ", ".join(f"{name} {n:,}" for name, n in source.origins.items() if name != Origin.CLIENT)
            found.append(f"only the clients' own requests are in this; left out: {told} (--origin takes them)")
    return tuple(found)


def _warnings(source: Source, arrivals: Arrivals, load: Load | None) -> tuple[str, ...]:
    found = list(source_warnings(source))
    if load is None and source.requests:
        found.append("no request has an elapsed time above 0: nothing is known of what was in flight")
    if arrivals.requests > 1 and arrivals.zero_gaps > arrivals.requests / 2:
        found.append(f"{arrivals.zero_gaps / (arrivals.requests - 1):.0%} of the gaps are 0: stamps are coarse")
    return tuple(found)
