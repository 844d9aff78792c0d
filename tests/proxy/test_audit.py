from __future__ import annotations

import multiprocessing
from pathlib import Path

from proxy.audit import append_audit, read_audit


def _append(data_dir: Path, actor: str) -> None:
    for number in range(50):
        append_audit(data_dir, actor, "test", {"number": number, "text": "x" * 300})


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    assert list(read_audit(tmp_path)) == []
    append_audit(tmp_path, "user-a", "injection.start", {"run_id": "r"})
    append_audit(tmp_path, "user-b", "injection.end", {})
    found = list(read_audit(tmp_path))
    assert [(each.actor, each.action, each.detail) for each in found] == [
        ("user-a", "injection.start", {"run_id": "r"}),
        ("user-b", "injection.end", {}),
    ]
    assert found[0].at <= found[1].at
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    append_audit(tmp_path, "user-a", "one", {})
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"at":"2026-\n')
    append_audit(tmp_path, "user-a", "two", {})
    assert [each.action for each in read_audit(tmp_path)] == ["one", "two"]


def test_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path, f"user-{name}")) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = list(read_audit(tmp_path))
    for name in "abc":
        assert [each.detail["number"] for each in found if each.actor == f"user-{name}"] == list(range(50))
