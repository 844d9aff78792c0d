"""The moments that swings are fitted by, against closed forms and against what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from traces.arrivals import arrival_times_s, steady, take_until
from traces.swings import HOLDS_S, Swing, have_common_levels, level_blocks, level_excess, renewal_variance, within_peak


@pytest.mark.parametrize("shape", [0.1, 0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("length", [0.05, 0.3, 1.0, 10.0, 300.0])
def test_variance_of_a_renewal_process(shape: float, length: float) -> None:
    windows = 20_000
    stamps = take_until(arrival_times_s(steady(1.0, shape).segments(), np.random.default_rng(1)))(length * windows)
    counts = np.bincount((stamps / length).astype(np.int64), minlength=windows)[:windows]
    # Of few, large counts the sample's variance is known less well.
    assert counts.var() == pytest.approx(renewal_variance(length, shape), rel=0.08)


@pytest.mark.parametrize(
    ("length", "shape", "expected"),
    [
        (0.0, 0.5, 0.0),
        (7.0, 1.0, 7.0),
        (0.25, 1e6, 0.25 * 0.75),  # a clock: one tick or none
        (3.0, 1e6, 0.0),
        (1e4, 0.25, 4e4 - 2.5),
    ],
)
def test_variance_of_known_renewals(length: float, shape: float, expected: float) -> None:
    assert renewal_variance(length, shape) == pytest.approx(expected, rel=1e-3, abs=2e-3)


def test_excess_of_one_swing_is_its_closed_form_and_of_two_is_more_than_their_sum() -> None:
    windows_s = np.array([0.1, 1.0, 10.0, 1000.0])
    v, h = 0.7, 10.0
    ratio = windows_s / h
    closed = 2 * v * (ratio - 1 + np.exp(-ratio)) / ratio**2
    assert level_excess(np.array([v]), np.array([h]), windows_s) == pytest.approx(closed, rel=2e-3)
    both = level_excess(np.array([v, 0.5]), np.array([h, 1.0]), windows_s)
    assert (both > closed + level_excess(np.array([0.5]), np.array([1.0]), windows_s)).all()


@pytest.mark.parametrize("swing", [Swing(10.0, 0.4), Swing(10.0, 3.0), Swing(10.0, 3.0, True), Swing(10.0, 0.0)])
def test_levels_have_their_mean_variance_and_hold(swing: Swing) -> None:
    block = level_blocks([swing], np.random.SeedSequence(0).spawn(len(HOLDS_S)))
    # On a grid of 1 s, hour by hour.
    levels = []
    for hour in range(60):
        part = block(hour * 3600.0, (hour + 1) * 3600.0)
        assert part.starts_s[0] == hour * 3600.0
        assert (np.diff(part.starts_s) >= 0).all()
        levels.append(part.values[np.searchsorted(part.starts_s, hour * 3600.0 + np.arange(3600), side="right") - 1])
    values = np.concatenate(levels)
    # 21,600 holds; the variance of a Gamma variable's square is large.
    assert values.mean() == pytest.approx(1, abs=4 * math.sqrt(2 * max(swing.variance, 1e-9) / 21_600) + 1e-12)
    assert values.var() == pytest.approx(swing.variance, rel=0.12, abs=1e-12)
    if swing.variance:
        later = np.mean((values[:-10] - 1) * (values[10:] - 1)) / values.var()
        assert later == pytest.approx(math.exp(-1), abs=0.05)
    if swing.is_on_off:
        assert set(values) == {0.0, 4.0}


def test_swings_of_one_seed_hold_and_change_together() -> None:
    seeds = np.random.SeedSequence(1).spawn(len(HOLDS_S))
    small, large = (level_blocks([Swing(300.0, variance)], seeds) for variance in (0.1, 2.0))
    large(1800.0, 3600.0)
    small(0.0, 3600.0)
    one, two = small(3600.0, 7200.0), large(3600.0, 7200.0)
    assert np.array_equal(one.starts_s, two.starts_s)
    assert np.array_equal(np.argsort(one.values[1:]), np.argsort(two.values[1:]))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[9, 0, 9, 0], [9, 0, 9, 0]], True),
        ([[9, 9, 0, 0], [9, 0, 9, 0]], False),
        ([[9, 0, 9, 0]], False),
        ([[9, 0, 9, 0], [1, 1, 1, 1]], False),
        ([[0, 0], [0, 0]], False),
    ],
)
def test_whether_services_swing_together(counts: list[list[int]], expected: bool) -> None:
    assert have_common_levels([np.array(each, dtype=np.float64) for each in counts]) == expected


def test_a_peak_that_no_slab_holds_is_flattened() -> None:
    swings = (Swing(1.0, 999.0), Swing(10.0, 99.0), Swing(60.0, 0.0))
    flat = within_peak(swings)
    assert math.prod(1 + swing.variance for swing in flat) == pytest.approx(1e3)
    assert [swing.hold_s for swing in flat] == [1.0, 10.0, 60.0]
    assert flat[0].variance > flat[1].variance > flat[2].variance == 0.0
    assert within_peak(swings[1:]) == swings[1:]
