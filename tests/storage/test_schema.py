from __future__ import annotations

import pytest

from storage.schema import is_partition, partition_bounds_s, partition_name, requests, utc_day, writers
from traces.batch import SCHEMA


def test_requests_has_the_fields_of_the_record_in_its_order() -> None:
    assert [column.name for column in requests.columns] == list(SCHEMA)


def test_every_column_says_what_it_means() -> None:
    assert [column.name for table in (requests, writers) for column in table.columns if not column.comment] == []


@pytest.mark.parametrize(
    ("epoch_s", "name", "bounds_s"),
    [
        (0.0, "requests_19700101", (0, 86_400)),
        (86_399.999999, "requests_19700101", (0, 86_400)),
        (86_400.0, "requests_19700102", (86_400, 172_800)),
        (-0.000001, "requests_19691231", (-86_400, 0)),
        (1_709_164_800.0, "requests_20240229", (1_709_164_800, 1_709_251_200)),
        (-62_135_596_800.0, "requests_00010101", (-62_135_596_800, -62_135_510_400)),
    ],
)
def test_partition_of_a_stamp(epoch_s: float, name: str, bounds_s: tuple[int, int]) -> None:
    assert partition_name(utc_day(epoch_s)) == name
    assert partition_bounds_s(utc_day(epoch_s)) == bounds_s


@pytest.mark.parametrize("epoch_s", [253_402_300_800.0, 1e300, -62_135_596_801.0])
def test_a_day_without_a_name_is_refused(epoch_s: float) -> None:
    with pytest.raises(ValueError, match="received_at: expected a day in the years 1 to 9999"):
        partition_name(utc_day(epoch_s))


@pytest.mark.parametrize(
    ("table", "expected"),
    [("requests_20240229", True), ("requests", False), ("requests_2024", False), ("x_requests_20240229", False)],
)
def test_is_partition(table: str, expected: bool) -> None:
    assert is_partition(table) is expected
