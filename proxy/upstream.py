"""The upstreams of a worker: their connections, their load, and which are passed over for a while."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence

from proxy.balance import UpstreamView, choose
from wire.http import HttpClient

PASS_OVER_NS = 1_000_000_000
"""How long an upstream that refused a connection is passed over while another will do."""


class Upstream:
    """One vLLM server, as one worker sees it."""

    __slots__ = ("client", "down_until_ns", "in_flight", "name")

    def __init__(self, url: str, *, connect_timeout_s: float, idle_s: float, tls: ssl.SSLContext | None = None) -> None:
        self.client = HttpClient(url, connect_timeout_s=connect_timeout_s, idle_s=idle_s, tls=tls)
        self.name = self.client.url.text
        self.in_flight = 0
        self.down_until_ns = 0

    def connect_failed(self) -> None:
        """Pass it over for a while."""
        self.down_until_ns = time.monotonic_ns() + PASS_OVER_NS


class Fleet:
    """All upstreams."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = tuple(upstreams)
        self._turn = 0

    def pick(self, excluded: frozenset[int] = frozenset()) -> int | None:
        """The index of the upstream for the next request; None when all are excluded."""
        upstreams = self.upstreams
        if len(upstreams) == 1:
            return None if excluded else 0
        self._turn += 1
        views = [UpstreamView(upstream.in_flight, upstream.down_until_ns) for upstream in upstreams]
        return choose(views, time.monotonic_ns(), excluded=excluded, turn=self._turn)

    def close(self) -> None:
        """Close idle connections."""
        for upstream in self.upstreams:
            upstream.client.close()
