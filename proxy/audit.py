"""Who did what to the gateway, and when: one line of JSON each in `data_dir/audit.jsonl`, only appended."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec


class AuditEntry(msgspec.Struct, frozen=True):
    """One act."""

    at: float
    """Epoch seconds."""
    actor: str
    action: str
    """As `config.apply` or `injection.start`."""
    detail: dict[str, Any]
    """Without secrets, prompts and answers."""


def append_audit(data_dir: Path, actor: str, action: str, detail: Mapping[str, Any]) -> None:
    """Add a line, whole or not at all. Raises OSError."""
    line = msgspec.json.encode(AuditEntry(time.time(), actor, action, dict(detail))) + b"\n"
    descriptor = os.open(data_dir / "audit.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_audit(data_dir: Path, limit: int = 100) -> list[AuditEntry]:
    """The newest entries, newest first; lines that are none are left out. Raises OSError."""
    try:
        with (data_dir / "audit.jsonl").open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - limit * 4096))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in reversed(lines):
        try:
            entries.append(msgspec.json.decode(line, type=AuditEntry))
        except msgspec.DecodeError:
            continue
        if len(entries) == limit:
            break
    return entries
