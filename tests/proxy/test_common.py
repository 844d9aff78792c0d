"""What the commands' selections leave out, and when: `proxy.commands.common`."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.commands.common import matching_rows, parse_operand, selection_of
from storage.export import export_batches
from storage.query import Filter
from traces.batch import batch_from_records
from traces.record import OWN_ORIGINS, Origin, TraceRecord


@pytest.mark.parametrize(
    ("origins", "runs", "left_out"),
    [
        (None, None, OWN_ORIGINS),
        (["client"], None, ()),
        (["injected"], None, ()),
        (None, ["burst-1"], ()),  # who names a run asks for it, whoever caused it
    ],
)
def test_the_gateways_own_requests_are_in_statistics_only_when_asked_for(
    origins: list[str] | None, runs: list[str] | None, left_out: tuple[Origin, ...]
) -> None:
    found = selection_of(None, None, None, origins, None, runs, None, None)
    assert found == Filter(origins=tuple(origins or ()), run_ids=tuple(runs or ()), without_origins=left_out)


@pytest.mark.parametrize(("operand", "left_out"), [("from=1", OWN_ORIGINS), ("origin=injected", ())])
def test_so_are_they_in_comparisons(operand: str, left_out: tuple[Origin, ...]) -> None:
    assert parse_operand(operand, None)[1].without_origins == left_out


def test_a_file_of_injected_requests_is_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "injected.jsonl"
    export_batches([batch_from_records([TraceRecord("a", 1.0, origin=Origin.INJECTED)])], path, format="jsonl")
    selection = selection_of(None, None, None, None, None, None, None, None)
    with matching_rows(path, selection, None, None, None, (None, None, None)) as batches:
        assert sum(batch.height for batch in batches) == 1
