"""The report of an analysis in a real browser: nothing fails, every figure is drawn, both themes, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replay.analysis_page import page
from tests.traces.test_analysis import analyzed, trace
from traces.analysis import Options

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
