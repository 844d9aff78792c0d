"""How an active fault run reaches the workers: a file in the data directory that holds for a few seconds.

The injector writes `faults.json` anew every second, as long as its guard rails let it. A worker looks at the file four
times a second, where `injection.allowed` says so, and applies what it holds until the moment it names. So faults end
within `LEASE_S` whatever dies: the injector, the control plane, or all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from proxy.faults import FaultPlan, Faults, Lease

if TYPE_CHECKING:
    from proxy.exchange import Gateway

log = logging.getLogger("burstgate.gateway")

LEASE_S = 3.0
LOOK_S = 0.25
_NAME = "faults.json"


def renew_lease(data_dir: Path, run_id: str, faults: FaultPlan) -> None:
    """The faults hold for LEASE_S from now. Raises OSError."""
    path = data_dir / _NAME
    part = path.with_name(f".{_NAME}.{os.getpid()}.part")
    part.write_bytes(msgspec.json.encode(Lease(run_id, time.time() + LEASE_S, faults)))
    part.replace(path)


def end_lease(data_dir: Path) -> None:
    """The faults end. Raises nothing: without renewing they do so by themselves."""
    with contextlib.suppress(OSError):
        (data_dir / _NAME).unlink()


def read_lease(data_dir: Path, now_s: float) -> Lease | None:
    """The faults that hold at a moment. Raises OSError or ValueError for a file that can not be read."""
    try:
        lease = msgspec.json.decode((data_dir / _NAME).read_bytes(), type=Lease)
    except FileNotFoundError:
        return None
    return lease if now_s < lease.until_s <= now_s + 2 * LEASE_S else None  # a clock set back must not prolong it


async def follow_leases(gateway: Gateway) -> None:
    """Keep a worker's faults as the file says, until cancelled."""
    held: FaultPlan | None = None
    while True:
        await asyncio.sleep(LOOK_S)
        settings = gateway.settings
        lease = None
        if settings.injection.allowed:
            try:
                lease = read_lease(settings.data_dir, time.time())
            except (OSError, ValueError) as error:
                log.error("faults.json can not be read, no faults are injected: %s", error)
        asked = None if lease is None else lease.faults
        if asked == held:
            continue
        held = asked
        if asked is None:
            gateway.faults = None
        else:
            # With one worker the same seed gives the same requests the same faults; several must not draw alike.
            seed = asked.seed if settings.workers == 1 else f"{asked.seed} {os.getpid()}"
            gateway.faults = Faults(asked, random.Random(seed).random)
