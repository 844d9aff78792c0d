"""A request's body that is sent on while it comes."""

from __future__ import annotations

import asyncio
from collections import deque

from proxy.server import ClientConnection

UPLOAD_AHEAD_BYTES = 256 * 1024
"""Of such a body, what may wait for the upstream before the client is held back."""


class Upload:
    """A body on its way through: what the client has sent and the upstream has not taken yet."""

    __slots__ = ("_connection", "_parts", "_waiter", "is_whole", "size")

    def __init__(self, connection: ClientConnection, parts: list[bytes]) -> None:
        self._connection = connection
        self._parts = deque(parts)
        self._waiter: asyncio.Future[None] | None = None
        self.size = sum(map(len, parts))
        self.is_whole = False

    def push(self, data: bytes) -> None:
        """A piece."""
        self._parts.append(data)
        self.size += len(data)
        if self.size > UPLOAD_AHEAD_BYTES:
            self._connection.hold()
        self._wake()

    def end(self) -> None:
        """There will be no more."""
        self.is_whole = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Upload:
        return self

    async def __anext__(self) -> bytes:
        while not self._parts:
            if self.is_whole:
                raise StopAsyncIteration
            self._connection.release()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        part = self._parts.popleft()
        self.size -= len(part)
        return part
