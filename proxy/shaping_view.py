"""What a worker's shaping counts by rule, as control planes read it: `shaping.json` in its writer's directory."""

from __future__ import annotations

from typing import Final

import msgspec

SHAPING_VIEW: Final = "shaping.json"


class RuleView(msgspec.Struct, frozen=True):
    """One rule in one worker."""

    name: str
    held: int
    rejected: int
    waiting: int
    limit: int | None
    """The adaptive limit, the lowest of its classes'."""


class PacingView(msgspec.Struct, frozen=True):
    """Pacing in one worker, over its last leavings."""

    asked_cv: float | None
    came_cv: float | None
    achieved_cv: float | None
    mean_delay_s: float
    forced: int


class ShapingView(msgspec.Struct, frozen=True):
    """What control planes read of a worker."""

    rules: tuple[RuleView, ...]
    pacing: PacingView | None
    is_shared: bool
    """Limits come from Redis now."""
