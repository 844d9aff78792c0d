"""Faults for testing clients: which request meets which one. Pure; what is done about it is `proxy.exchange`'s.

    status_429, status_500, status_503   an answer in OpenAI's error envelope, of type `injected_fault`
    reset       the connection is cut by a reset before an answer
    stall       nothing happens for `stall_s`, then the request goes its way
    truncate    the answer is cut off after its first piece; one that comes in one piece, in its middle

Each is a share of the requests of the models and tenants named, or of all. With failure shares by log type, as a
recorded failure model has them, these say how many requests of a log type fail, and the faults' own shares only in what
proportions. Never of an injected request, and never counted against an upstream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Final

import msgspec

FAULT_STATUSES: Final[dict[str, int]] = {"status_429": 429, "status_500": 500, "status_503": 503}
KINDS: Final = (*FAULT_STATUSES, "reset", "stall", "truncate")
MAX_STALL_S: Final = 3600.0


class FaultPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is asked for. Raises ValueError naming the field, the rule and the value."""

    status_429: float = 0.0
    status_500: float = 0.0
    status_503: float = 0.0
    reset: float = 0.0
    stall: float = 0.0
    truncate: float = 0.0
    stall_s: float = 5.0
    models: tuple[str, ...] = ()
    """As clients ask for them; none is all."""
    tenants: tuple[str, ...] = ()
    seed: int = 0
    failure_shares: dict[str, float] | None = None
    """Of all requests by log type; None: the shares above are of all requests themselves."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not 0 <= getattr(self, kind) <= 1:
                raise ValueError(f"faults: {kind}: expected a share of 0 to 1, got {getattr(self, kind):g}")
        if not 0 < sum(self.shares) <= 1 + 1e-9:
            raise ValueError(f"faults: expected shares whose sum is above 0 and at most 1, got {sum(self.shares):g}")
        if not 0 < self.stall_s <= MAX_STALL_S:
            raise ValueError(f"faults: stall_s: expected seconds above 0 to {MAX_STALL_S:g}, got {self.stall_s:g}")
        if self.seed < 0:
            raise ValueError(f"faults: seed: expected an integer >= 0, got {self.seed}")
        for log_type, share in (self.failure_shares or {}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"faults: failure_shares: {log_type}: expected a share of 0 to 1, got {share:g}")

    @property
    def shares(self) -> tuple[float, ...]:
        """By kind, in the order of KINDS."""
        return tuple(getattr(self, kind) for kind in KINDS)

    @property
    def total(self) -> float:
        """The largest share of requests that meet a fault."""
        return sum(self.shares) if self.failure_shares is None else max(self.failure_shares.values(), default=0.0)


class Lease(msgspec.Struct, frozen=True):
    """What an active fault run tells the workers, again and again: the faults hold until a moment near at hand."""

    run_id: str
    until_s: float
    """Epoch seconds."""
    faults: FaultPlan


class Faults:
    """An active run's draws. uniform: draws from [0, 1), of a sequence of this worker's own."""

    def __init__(self, plan: FaultPlan, uniform: Callable[[], float]) -> None:
        self.stall_s = plan.stall_s
        self._models = frozenset(plan.models)
        self._tenants = frozenset(plan.tenants)
        whole = sum(plan.shares)
        self._bounds = [bound / whole for bound in accumulate(plan.shares)]
        self._whole = whole
        self._by_log_type: Mapping[str, float] | None = plan.failure_shares
        self._uniform = uniform

    def draw(self, model: str | None, tenant: str | None, log_type: str) -> str | None:
        """The fault that a request meets, one of KINDS; None for most. One draw for each request selected."""
        if (self._models and model not in self._models) or (self._tenants and tenant not in self._tenants):
            return None
        share = self._whole if self._by_log_type is None else self._by_log_type.get(log_type, 0.0)
        drawn = self._uniform()
        if drawn >= share:
            return None
        return KINDS[min(bisect_right(self._bounds, drawn / share), len(KINDS) - 1)]
