"""The analysis as a page: it stands alone, every figure has its sentence and its CSV, the paper's come first."""

from __future__ import annotations

import base64
import gzip
import math

import polars as pl
import pytest

from replay.analysis_page import page, picture
from tests.replay.test_page import EVIL, Page
from tests.traces.test_analysis import RUBBISH, analyzed, numbers, record, trace
from traces.analysis import Analysis, Options
from traces.charts import charts
from traces.record import LogType, Outcome, TraceRecord


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    records = [*trace(4000), *(record(1e9 + n, model=EVIL, outcome=Outcome.REJECTED) for n in range(9))]
    return analyzed(records, Options(bounds_s={"ttft_s": 0.5})).analysis


def test_nothing_is_loaded_from_anywhere_and_it_is_small(analysis: Analysis) -> None:
    data = page(analysis)
    assert len(data) < 6_000_000
    found = Page(data)
    links = {value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")}
    assert links
    assert all(str(link).startswith("data:application/gzip;base64,") for link in links)
    assert [each["title"] for each in found.data("figures")][:2] == [
        "Burstiness over the work day: alpha(t)",
        "Pace over the work day: beta(t)",
    ]


def test_every_figure_has_a_sentence_and_its_table(analysis: Analysis) -> None:
    drawn = [chart for chart in charts(analysis) if not chart.is_empty]
    assert len(drawn) > 25
    assert len({chart.name for chart in drawn}) == len(drawn)
    for chart in drawn:
        assert chart.note.endswith((".", "%"))
        figure = picture(chart)
        csv = gzip.decompress(base64.b64decode(figure["csv"].removeprefix("data:application/gzip;base64,")))
        assert csv == chart.table.write_csv().encode()
        assert figure["traces"]
        assert all(map(math.isfinite, numbers(figure["traces"])))
        assert {chart.x, chart.y, chart.by or chart.x, chart.value or chart.y, *(chart.band or ())} <= set(
            chart.table.columns
        )


def test_text_from_outside_is_text(analysis: Analysis) -> None:
    found = Page(page(analysis))
    assert [name for name, _ in found.scripts] == ["figures", None, None]
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert any("<script>" in text for text in found.text), "the name is in a table"


def test_a_heat_map_has_each_day_in_its_place() -> None:
    days = (0, 1, 1, 8, 8, 8)  # of Thursday, 1970-01-01
    chart = next(
        each for each in charts(analyzed([record(day * 86_400.0) for day in days]).analysis) if each.name == "weeks"
    )
    (heat,) = picture(chart)["traces"]
    assert heat["y"] == ["1969-12-29", "1970-01-05"]
    assert heat["z"] == [[None, None, None, 1, 2, 0, 0], [0, 0, 0, 0, 3, None, None]]


def test_work_day_is_by_log_type(analysis: Analysis) -> None:
    chart = charts(analysis)[0]
    assert set(chart.table["service"]) == {"all", *LogType}
    shown = chart.table.filter(pl.col("alpha").is_not_null())
    assert shown.height == sum(slot.alpha is not None for part in analysis.arrivals for slot in part.work_day)


@pytest.mark.parametrize("records", RUBBISH.values(), ids=RUBBISH)
def test_rubbish_has_its_page(records: list[TraceRecord]) -> None:
    analysis = analyzed(records).analysis
    for chart in charts(analysis):
        if not chart.is_empty:
            assert all(map(math.isfinite, numbers(picture(chart)["traces"])))
    found = Page(page(analysis))
    assert any(text.startswith("Not drawn") for text in found.text)
    assert not any(word in text.split() for text in found.text for word in ("None", "nan", "inf"))
