"""Faults on demand: what a request asks the simulator to do wrong. Pure.

It asks in an `x-sim-fault` header or query parameter, whose value is a list of `name` or `name=value`, separated by
commas: `multi=4, cut=1`.

| fault | what happens |
|---|---|
| `status=503` | the answer is this error status, 400 to 599 |
| `reset_before` | the connection is reset before the first byte |
| `reset_after=3` | ... after 3 events; in a unary response after half of the body |
| `stall_before` | nothing is sent until the client leaves |
| `stall_after=3` | nothing more is sent after 3 events, or after half of a unary body |
| `late_headers=2.0` | the headers come this many seconds late |
| `no_usage` | `stream_options` is ignored, as old servers do |
| `cut=1` | every event is written in pieces, cut at odd byte positions |
| `multi=4` | an event holds up to 4 tokens |
| `cached=48` | so many prompt tokens are reported as cached, and usage has `prompt_tokens_details` |
"""

from __future__ import annotations

import http
import math
from dataclasses import dataclass
from urllib.parse import parse_qs

from replay.simulator.requests import ApiError

_KEY = "x-sim-fault"
_MAX_DELAY_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do wrong; by default nothing."""

    status: int | None = None
    reset_before: bool = False
    reset_after: int | None = None
    stall_before: bool = False
    stall_after: int | None = None
    late_headers: float = 0.0
    """Seconds."""
    no_usage: bool = False
    cut: bool = False
    multi: int = 1
    cached: int | None = None
    """Tokens."""


NO_FAULT = Fault()


def find_fault(headers: list[tuple[bytes, bytes]], query: bytes) -> Fault:
    """The fault that a request asks for; the header wins. Raises ApiError naming what it cannot read."""
    for name, value in headers:
        if name == b"x-sim-fault":
            return parse_fault(value.decode("latin-1"))
    if b"x-sim-fault" in query:
        return parse_fault(",".join(parse_qs(query.decode("latin-1"), keep_blank_values=True).get(_KEY, [])))
    return NO_FAULT


def parse_fault(text: str) -> Fault:
    """The fault that a text describes. Raises ApiError naming the word, its value and the rule."""
    given: dict[str, bool | int | float] = {}
    for word in text.split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        if not name:
            continue
        if name in ("reset_before", "stall_before", "no_usage", "cut"):
            given[name] = value in ("", "1") or _number(name, value, 0, 1) == 1
        elif name in ("reset_after", "stall_after", "cached"):
            given[name] = int(_number(name, value, 0, 1 << 31))
        elif name == "multi":
            given[name] = int(_number(name, value, 1, 1 << 31))
        elif name == "late_headers":
            given[name] = _number(name, value, 0, _MAX_DELAY_S, whole=False)
        elif name == "status":
            status = int(_number(name, value, 400, 599))
            if status not in {entry.value for entry in http.HTTPStatus}:
                raise _refused(name, value, "a status that HTTP defines")
            given[name] = status
        else:
            raise _refused(name, value, f"one of {', '.join(Fault.__dataclass_fields__)}")
    return Fault(**given)  # type: ignore[arg-type]  # each value's type was set with its name


def _number(name: str, text: str, least: float, most: float, *, whole: bool = True) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or (whole and not value.is_integer()):
        raise _refused(name, text, f"{'an integer' if whole else 'a number'} from {least:g} to {most:g}")
    return value


def _refused(name: str, value: str, rule: str) -> ApiError:
    return ApiError(f"{_KEY}: {name}: expected {rule}, got {value!r}", param=_KEY)
