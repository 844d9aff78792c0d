"""What repeats: requests by week and weekday, by hour of day, and the periods of the hourly counts.

Days and hours are those of a clock in a time zone. An hour that comes twice as clocks are set back is two samples of
its hour of day, one that is left out is none: a day has 23, 24 or 25 samples, each an hour long. Hours begin with the
clock's full hour, in zones that are half an hour off, too. A trace that spans more than `MAX_SPAN_S` has no place here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from traces.table import MAX_SPAN_S, Service, clock_s, pieces, services, view

HOUR_S: Final = 3600
MOST_SERVICES: Final = 20
ACF_HOURS: Final = 8 * 24
MIN_PERIODS: Final = 3
"""Times that a period must fit into the trace."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class Week(msgspec.Struct, frozen=True):
    """monday: its date, YYYY-MM-DD. requests: Monday to Sunday; None on days before the first and after the last
    request's."""

    monday: str
    requests: tuple[int | None, ...]


class Box(msgspec.Struct, frozen=True):
    """The totals of the hours at one hour of day: quantiles, linear between order statistics."""

    hour: int
    hours: int
    mean: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float


class Period(msgspec.Struct, frozen=True):
    """A period, known to about period_s^2 / span.

    power: this frequency's share of the variance. p_value: of a peak so high at any frequency, were there no period.
    autocorrelation: of the counts one period apart.
    """

    period_s: float
    power: float
    p_value: float
    autocorrelation: float


class Periodicity(msgspec.Struct, frozen=True):
    """One service, or all (`service` None).

    Boxes are over the whole hours between the first and the last request of the *trace*, those without a request of
    this service included; empty where it has no whole hour. peak_to_trough: the largest mean of requests at an hour of
    day over the smallest, None where that is 0. autocorrelation: at 0, 1, ... hours, of the square roots of the hourly
    counts; noise alone stays within +- autocorrelation_bound in 95 of 100 lags.
    """

    service: Service | None
    zone: str
    requests: int
    weeks: tuple[Week, ...]
    requests_by_hour: tuple[Box, ...]
    request_tokens_by_hour: tuple[Box, ...]
    response_tokens_by_hour: tuple[Box, ...]
    peak_to_trough: float | None
    autocorrelation: tuple[float, ...]
    autocorrelation_bound: float | None
    periods: tuple[Period, ...]


def describe_periodicity(
    table: pl.DataFrame, zone: ZoneInfo, *, level: float = 0.001, most_services: int = MOST_SERVICES
) -> tuple[Periodicity, ...]:
    """All requests first, then each of the `most_services` largest services; nothing for an empty or too long trace.

    table: of `traces.table`. level: the significance that a period needs (`dominant_periods`).
    """
    if not table.height or table["received_at"][-1] - table["received_at"][0] > MAX_SPAN_S:
        return ()
    columns = ("received_at", "request_tokens", "response_tokens")
    calendar = _calendar(view(table["received_at"]), zone)
    described = [_describe(None, table, calendar, zone, level)]
    described.extend(
        _describe(service, rows, calendar, zone, level) for service, rows in services(table, columns, most_services)
    )
    return tuple(described)


@dataclass(frozen=True, slots=True)
class _Calendar:
    """The hours from the trace's first request to its last: the first one's start, and the clock's hours of each."""

    first_s: float
    clock_hour: Ints
    has_whole_ends: tuple[bool, bool]


def _calendar(stamps_s: Array, zone: ZoneInfo) -> _Calendar:
    # The part of an hour by which the clock is off; the zone's at the start, so that every hour is 3600 s long.
    off_s = float(clock_s(stamps_s[:1], zone)[0] - stamps_s[0]) % HOUR_S
    first = np.floor((stamps_s[0] + off_s) / HOUR_S)
    hours = int(np.floor((stamps_s[-1] + off_s) / HOUR_S) - first) + 1
    starts_s = (first + np.arange(hours)) * HOUR_S - off_s
    # A request at an hour's first second, or in its last, makes it whole.
    whole = (bool(stamps_s[0] < starts_s[0] + 1), bool(stamps_s[-1] >= starts_s[-1] + HOUR_S - 1))
    return _Calendar(float(starts_s[0]), np.floor_divide(clock_s(starts_s, zone), HOUR_S).astype(np.int64), whole)


def _describe(
    service: Service | None, rows: pl.DataFrame, calendar: _Calendar, zone: ZoneInfo, level: float
) -> Periodicity:
    hours = len(calendar.clock_hour)
    stamps_s = view(rows["received_at"])
    tokens = [view(rows[name].fill_null(0)) for name in ("request_tokens", "response_tokens")]
    counts = np.zeros(hours, dtype=np.int64)
    sums = np.zeros((2, hours))
    for here in pieces(rows.height):
        # Rounding may put a stamp just below an hour's end into the hour after it.
        place = np.minimum(np.floor((stamps_s[here] - calendar.first_s) / HOUR_S).astype(np.int64), hours - 1)
        counts += np.bincount(place, minlength=hours)
        for number, each in enumerate(tokens):
            sums[number] += np.bincount(place, each[here], hours)
    first, last = (0 if calendar.has_whole_ends[0] else 1), (hours if calendar.has_whole_ends[1] else hours - 1)
    whole = slice(first, max(first, last))
    hour_of_day = calendar.clock_hour[whole] % 24
    token_boxes = [_boxes(hour_of_day, each[whole]) for each in sums]
    boxes = _boxes(hour_of_day, counts[whole].astype(np.float64))
    peak, trough = (of((box.mean for box in boxes), default=0.0) for of in (max, min))
    acf = autocorrelation(np.sqrt(counts[whole]), ACF_HOURS)
    return Periodicity(
        service=service,
        zone=str(zone),
        requests=rows.height,
        weeks=_weeks(calendar.clock_hour, counts),
        requests_by_hour=boxes,
        request_tokens_by_hour=token_boxes[0],
        response_tokens_by_hour=token_boxes[1],
        peak_to_trough=peak / trough if trough else None,
        autocorrelation=tuple(acf.tolist()),
        autocorrelation_bound=1.96 / len(counts[whole]) ** 0.5 if len(acf) else None,
        periods=dominant_periods(counts[whole], HOUR_S, level=level),
    )


def _weeks(clock_hour: Ints, counts: Ints) -> tuple[Week, ...]:
    day = clock_hour // 24
    first = int(day[0])
    by_day = np.bincount(day - first, counts).astype(np.int64).tolist()
    # 1970-01-01 was a Thursday.
    lead = (first + 3) % 7
    cells: list[int | None] = [None] * lead + by_day + [None] * (-(lead + len(by_day)) % 7)
    return tuple(
        Week(_monday(first - lead + start), tuple(cells[start : start + 7])) for start in range(0, len(cells), 7)
    )


def _monday(day: int) -> str:
    # 0001-01-01 was a Monday; a clock west of UTC may still show the day before, which has no date.
    return (date(1970, 1, 1) + timedelta(days=max(day, -719_162))).isoformat()


def _boxes(hour_of_day: Ints, totals: Array) -> tuple[Box, ...]:
    boxes = []
    for hour in np.unique(hour_of_day).tolist():
        here = totals[hour_of_day == hour]
        p5, p25, p50, p75, p95 = np.quantile(here, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
        boxes.append(Box(hour, len(here), float(here.mean()), p5, p25, p50, p75, p95, float(here.max())))
    return tuple(boxes)


def autocorrelation(values: Array, most_lags: int) -> Array:
    """The sample autocorrelation at lags 0 to most_lags, at most a half of the values; empty for constant values.

    r(h) = sum (x_t - mean)(x_{t+h} - mean) / sum (x_t - mean)^2 (Box and Jenkins, Time Series Analysis, 2.1.5).
    """
    n = len(values)
    off = values - values.mean() if n else values
    if n < 4 or not off.any() or float(off @ off) <= 1e-20 * n * float(values @ values):
        return np.empty(0)
    size = 1 << (2 * n - 1).bit_length()
    product = np.fft.irfft(np.abs(np.fft.rfft(off, size)) ** 2, size)[: min(most_lags, n // 2) + 1]
    correlations: Array = product / product[0]
    return correlations


def dominant_periods(counts: Ints, bin_s: float, *, level: float = 0.001, most: int = 5) -> tuple[Period, ...]:
    """The periods that the counts of consecutive bins have, most power first.

    The periodogram is of the counts' square roots (which makes Poisson noise even), less their mean and linear trend.
    Bursts that last are red noise and no period: the noise has the spectrum of an AR(1) process (Torrence and Compo
    1998, BAMS 79, eq. 16) plus that of white noise, as the counts' autocorrelation at lags 1 and 2 has them, times the
    median / log 2 of the 301 ordinates over it around each frequency. Without a period an ordinate over the noise is
    exponential with mean 1 (Brockwell and Davis, Time Series: Theory and Methods, 10.3), and the p-value of the highest
    of q is 1 - (1 - e^-x)^q. As the noise is an estimate it is a little too small: at 0.001, 1 of 400 simulated series
    of red noise had a period. A period is a local maximum with a p-value of at most `level`, that fits MIN_PERIODS
    times into the trace, and one period apart the counts correlate beyond 1.96 / sqrt(n). Harmonics of a period, which
    say only that it is no sine, are listed where they pass. Nothing under 24 bins.
    """
    n = len(counts)
    if n < 24:
        return ()
    values = np.sqrt(counts)
    time = np.arange(n) - (n - 1) / 2
    off = values - values.mean()
    off -= time * float(time @ off) / float(time @ time)
    total = float(off @ off)
    if total <= 1e-20 * n * max(float(values @ values), 1e-300):
        return ()
    power = np.abs(np.fft.rfft(off)[1 : (n - 1) // 2 + 1]) ** 2
    acf = autocorrelation(values, n // 2)
    decay = float(np.clip(acf[2] / acf[1], 0, 0.999)) if acf[1] > 0 else 0.0
    share = min(1.0, float(acf[1]) / decay) if decay else 0.0
    turn = np.cos(2 * np.pi * np.arange(1, len(power) + 1) / n)
    shape = 1 - share + share * (1 - decay**2) / (1 + decay**2 - 2 * decay * turn)
    reach = min(301, len(power) // 2 * 2 - 1)
    padded = np.pad(power / shape, reach // 2, mode="reflect")
    medians = pl.Series(padded).rolling_median(reach).to_numpy()[reach - 1 :]
    noise = medians / np.log(2) * shape
    ratio = np.divide(power, noise, out=np.full(len(power), np.inf), where=noise > 0)
    p_values = -np.expm1(len(power) * np.log1p(-np.minimum(np.exp(-ratio), 1 - 1e-16)))
    found = []
    sides = np.pad(power, 1)
    is_peak = (power >= sides[:-2]) & (power >= sides[2:]) & (p_values <= level)
    for index in np.flatnonzero(is_peak).tolist():
        lag = n / (index + 1)
        if lag * MIN_PERIODS > n or round(lag) >= len(acf):
            continue
        near = float(acf[round(lag)])
        if near > 1.96 / n**0.5:
            found.append(Period(lag * bin_s, float(2 * power[index] / n / total), float(p_values[index]), near))
    return tuple(sorted(found, key=lambda period: -period.power)[:most])
