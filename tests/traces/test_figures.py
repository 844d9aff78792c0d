"""Pictures of figures: one a chart, of the size and kind asked for, whatever the trace and its names."""

from __future__ import annotations

import builtins
import io
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.traces.test_analysis import RUBBISH, analyzed, record, trace
from traces.analysis import Options
from traces.charts import Chart, charts
from traces.record import Outcome

pytest.importorskip("matplotlib", reason="needs the extra figures")

from traces.figures import DPI, WIDTH_INCHES, FiguresMissing, check_available, draw


def picture(chart: Chart, form: str) -> bytes:
    stream = io.BytesIO()
    draw(chart, stream, form)
    return stream.getvalue()


@pytest.fixture(scope="module")
def drawable() -> list[Chart]:
    """The largest of each kind, and those of time."""
    evil = [record(1e9 + n, model="$\\alpha_$ <b>&" + "x" * 80, outcome=Outcome.REJECTED) for n in range(60)]
    found = analyzed([*trace(800), *evil], Options(bounds_s={"ttft_s": 0.5})).analysis
    kinds = {(chart.mark, chart.is_time): chart for chart in charts(found) if not chart.is_empty}
    return list(kinds.values())


def test_a_png_is_a_column_wide_and_the_same_again(drawable: list[Chart]) -> None:
    assert {chart.mark for chart in drawable} == {"line", "step", "bar", "box", "heat"}
    for chart in drawable:
        data = picture(chart, "png")
        assert data.startswith(b"\x89PNG\r\n")
        assert int.from_bytes(data[16:20]) == int(WIDTH_INCHES * DPI)
    assert picture(drawable[0], "png") == picture(drawable[0], "png")


def test_an_svg_has_its_axes_and_names_as_text(drawable: list[Chart]) -> None:
    for chart in drawable:
        text = " ".join(ElementTree.fromstring(picture(chart, "svg")).itertext())
        for label in (chart.x_label, chart.y_label):
            assert label in text
    bars = next(chart for chart in drawable if chart.mark == "bar" and not chart.is_time)
    assert "$\\alpha_$" in " ".join(ElementTree.fromstring(picture(bars, "svg")).itertext()) or bars.x != "group"


@pytest.mark.parametrize("name", ["one row", "giant gap"])
def test_rubbish_has_pictures(name: str) -> None:
    kinds = {chart.mark: chart for chart in charts(analyzed(RUBBISH[name]).analysis) if not chart.is_empty}
    for chart in kinds.values():
        assert picture(chart, "png").startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(FiguresMissing, match=r"pip install 'burstgate\[figures\]'"):
        check_available()
