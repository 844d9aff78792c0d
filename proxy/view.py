"""What a worker says of itself once a second: a small file that the control plane reads.

`data_dir/run/worker-PID.json`, replaced whole, removed at the worker's end. A view counts while its process lives.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from proxy.settings import Settings


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One upstream, as one worker sees it."""

    name: str
    state: str
    """Of `proxy.health.State`."""
    in_flight: int
    weight: float
    """As configured; what it has of it while it starts slowly is `share`."""
    share: float
    models: tuple[str, ...] | None
    """None: not known."""
    error: str | None
    """What failed last, however long ago."""
    failures: int
    """Failed requests in a row."""


class WorkerView(msgspec.Struct, frozen=True):
    """One worker."""

    pid: int
    at: float
    """Epoch seconds."""
    settings: str
    """Digest of the settings that it works with."""
    in_flight: int
    upstreams: tuple[UpstreamStatus, ...]


def digest_of(settings: Settings) -> str:
    """A short name for settings: equal ones have the same."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]


def _directory(data_dir: Path) -> Path:
    return data_dir / "run"


def write_view(data_dir: Path, view: WorkerView) -> None:
    """Replace the worker's view. Raises OSError."""
    directory = _directory(data_dir)
    directory.mkdir(exist_ok=True)
    part = directory / f".worker-{view.pid}.part"
    part.write_bytes(msgspec.json.encode(view))
    part.replace(directory / f"worker-{view.pid}.json")


def remove_view(data_dir: Path, pid: int) -> None:
    """At the worker's end."""
    with contextlib.suppress(OSError):
        (_directory(data_dir) / f"worker-{pid}.json").unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_views(data_dir: Path) -> list[WorkerView]:
    """Of every worker that lives, by process id."""
    views = []
    for path in sorted(_directory(data_dir).glob("worker-*.json")):
        try:
            view = msgspec.json.decode(path.read_bytes(), type=WorkerView)
        except (OSError, msgspec.DecodeError):
            continue
        if _lives(view.pid):
            views.append(view)
        else:
            path.unlink(missing_ok=True)
    return sorted(views, key=lambda view: view.pid)
