"""Who did what to a running installation, and when: lines appended to `audit.jsonl` in the data directory.

One JSON object a line: `at` (ISO 8601, UTC), `actor`, `action`, `detail`. A line is one write to a file opened for
appending and is synced before the action goes on; lines of several processes do not mix. Nothing is ever changed or
removed here. The file is the owner's alone (0600). No secret, prompt or answer goes into it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

_NAME = "audit.jsonl"


class AuditEntry(msgspec.Struct, frozen=True):
    """One action."""

    at: datetime.datetime
    actor: str
    action: str
    """As `injection.start`."""
    detail: dict[str, Any]


def append_audit(data_dir: Path, actor: str, action: str, detail: Mapping[str, Any]) -> None:
    """Add a line. Raises OSError."""
    entry = AuditEntry(datetime.datetime.now(datetime.UTC), actor, action, dict(detail))
    descriptor = os.open(data_dir / _NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, msgspec.json.encode(entry) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_audit(data_dir: Path) -> Iterator[AuditEntry]:
    """The entries, oldest first; what a power cut left of a line is passed over. Raises OSError."""
    decoder = msgspec.json.Decoder(AuditEntry)
    try:
        file = (data_dir / _NAME).open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
