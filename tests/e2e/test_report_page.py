"""The report of an analysis in a real browser: nothing fails, every figure is drawn, both themes, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from replay.analysis_page import page
from tests.traces.test_analysis import analyzed, trace
from traces.analysis import MOST_SERVICES, Options, analyze
from traces.batch import complete_batch
from traces.record import LogType, Outcome

CHROMIUM = Path("/usr/bin/chromium")
# Without these it looks for hosts of its own, many at a time.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a Chromium at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_bytes(page(analyzed(trace(3000), Options(bounds_s={"ttft_s": 0.5})).analysis))
    return path


def test_a_long_trace_of_many_services_is_a_page_of_six_megabytes_at_most() -> None:
    """Eight years, 30 models in both log types of which the largest are shown, long names, many failures' kinds."""
    rng = np.random.default_rng(0)
    n = 60_000
    stamps_s = np.sort(rng.random(n)) * 8 * 366 * 86_400 + 1e9

    def some(prefix: str, kinds: int) -> list[str]:
        return [f"{prefix}-{number:02}-{'x' * 60}" for number in rng.integers(kinds, size=n)]

    rows = pl.DataFrame(
        {
            "received_at": stamps_s,
            "session_id": [str(number) for number in rng.integers(n // 3, size=n)],
            "elapsed_s": rng.exponential(20_000, n),
            "model": some("model", 30),
            "request_tokens": np.ceil(rng.lognormal(7, 2, n)).astype(np.int64),
            "response_tokens": np.ceil(rng.lognormal(5, 2, n)).astype(np.int64),
            "log_type": rng.choice([each.value for each in LogType], n),
            "outcome": rng.choice([each.value for each in Outcome], n),
            "status": rng.integers(200, 600, n),
            "error_type": some("error", 40),
            "endpoint": some("/endpoint", 40),
            "upstream": some("upstream", 40),
            **{name: rng.exponential(1, n) for name in ("ttft_s", "tpot_s", "queue_s")},
        }
    )
    options = Options(bounds_s={"ttft_s": 0.5, "tpot_s": 1.0})
    found = analyze([complete_batch(rows.with_columns(request_id=pl.lit("r")))], options)
    assert len(found.analysis.lengths) == 1 + MOST_SERVICES
    assert len(page(found.analysis)) < 6e6


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_nothing_fails(browser: Any, report: Path, theme: str, width: int) -> None:
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900}, offline=True)
    try:
        shown = context.new_page()
        said: list[str] = []
        shown.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.goto(report.as_uri(), timeout=120_000)
        plots = shown.query_selector_all(".plot")
        assert len(plots) > 25
        for plot in plots:
            plot.scroll_into_view_if_needed()
            shown.wait_for_function("plot => plot.querySelector('.main-svg .subplot')", arg=plot, timeout=60_000)
            box, drawn = plot.bounding_box(), plot.query_selector(".main-svg").bounding_box()
            assert drawn["width"] == pytest.approx(box["width"], abs=2), "it has its card's width"
        # Marks, not just axes: lines, bars, boxes or the picture of a heat map.
        empty = shown.evaluate(
            "() => [...document.querySelectorAll('.plot')].filter(plot => !plot.querySelector("
            "'.scatterlayer path, .barlayer path, .boxlayer path, .heatmaplayer image')).length"
        )
        assert empty == 0
        assert said == []
        assert shown.evaluate("() => document.documentElement.scrollWidth") <= width, "it scrolls down only"
        back = shown.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (theme == "light")
        text = shown.evaluate("() => document.querySelector('.main-svg text').style.fill")
        assert text == {"light": "rgb(28, 33, 38)", "dark": "rgb(228, 232, 236)"}[theme]
    finally:
        context.close()


def test_a_table_comes_unpacked(browser: Any, report: Path) -> None:
    shown = browser.new_page(accept_downloads=True)
    try:
        shown.goto(report.as_uri(), timeout=120_000)
        with shown.expect_download(timeout=60_000) as waited:
            shown.click("a[download]")
        assert waited.value.suggested_filename.endswith(".csv")
        head, *rows = Path(waited.value.path()).read_text().splitlines()
        assert "," in head
        assert rows
    finally:
        shown.close()


def test_a_theme_that_changes_redraws(browser: Any, report: Path) -> None:
    shown = browser.new_page(color_scheme="light")
    try:
        shown.goto(report.as_uri(), timeout=120_000)
        shown.wait_for_selector(".main-svg text", timeout=60_000)
        shown.emulate_media(color_scheme="dark")
        shown.wait_for_function(
            "() => document.querySelector('.main-svg text').style.fill === 'rgb(228, 232, 236)'", timeout=60_000
        )
    finally:
        shown.close()
