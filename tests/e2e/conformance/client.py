"""A raw HTTP/1.1 client for the suite: it sends bytes as they are, and reads answers strictly.

It never repairs: an answer whose end does not come is `is_whole=False`, and a connection that closes without an answer
is status 0.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from typing import Self

from tests.e2e.conformance.upstream import Headers, reset, split_head

NO_BODY = (204, 304)
ANSWER_S = 8.0
"""An answer that takes longer hangs: no case's upstream is silent for as long without the case knowing."""


@dataclass(slots=True)
class Answer:
    """What came back for one request."""

    status: int = 0
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    is_whole: bool = False
    interim: list[int] = field(default_factory=list)
    """The 1xx that came first."""
    trailers: Headers = field(default_factory=list)
    version: bytes = b""
    is_chunked: bool = False

    def values(self, name: bytes) -> list[bytes]:
        """Of every header with this name, in their order."""
        return [value for found, value in self.headers if found.lower() == name]

    def __str__(self) -> str:
        if not self.status:
            return "the connection closed without an answer"
        whole = "" if self.is_whole else ", cut off"
        return f"{self.status} with {len(self.body):,} bytes{whole}"


class Client:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, host: str, port: int, receive_bytes: int | None = None) -> Self:
        """receive_bytes: the socket's receive buffer, for a client that reads slowly."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_bytes or 2**24)
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()
        await asyncio.sleep(0)

    async def send(self, data: bytes) -> None:
        """Write, as far as the gateway takes it; what it does not want any more is left out."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            return  # it has refused, and its answer says why

    async def send_slowly(self, data: bytes, size: int = 1, pause_s: float = 0.0) -> None:
        """Write in pieces of `size` bytes."""
        for at in range(0, len(data), size):
            await self.send(data[at : at + size])
            await asyncio.sleep(pause_s)

    def leave(self, *, politely: bool) -> None:
        """Close with a FIN, or with a RST."""
        if politely:
            self._writer.close()
        else:
            reset(self._writer.transport)

    def half_close(self) -> None:
        """End the sending side only."""
        self._writer.write_eof()

    async def head(self) -> Answer:
        """The next head, 1xx left out; status 0 when the connection closes first. Raises AssertionError on a hang."""
        answer = Answer()
        while True:
            try:
                async with asyncio.timeout(ANSWER_S):
                    raw = await self._reader.readuntil(b"\r\n\r\n")
            except TimeoutError:
                raise AssertionError(f"no answer within {ANSWER_S:g} s, and the connection stays open") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                return answer
            version, _, rest = raw.split(b"\r\n", 1)[0].partition(b" ")
            is_http = version.startswith(b"HTTP/1.") and rest[:3].isdigit()
            assert is_http, f"not an HTTP/1 answer: {raw[:60]!r}"
            status = int(rest[:3])
            if 100 <= status < 200:
                answer.interim.append(status)
                continue
            answer.version, answer.status, answer.headers = version, status, split_head(raw)
            return answer

    async def answer(self, *, is_head: bool = False) -> Answer:
        """The next answer, with its body. Raises AssertionError on a hang."""
        answer = await self.head()
        if answer.status:
            await self.read_body(answer, is_head=is_head)
        return answer

    async def read_body(self, answer: Answer, *, is_head: bool = False) -> None:
        """Read the rest of an answer. Raises AssertionError on a hang, and on a body that is no HTTP."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._read_parts(answer, parts, is_head)
            answer.is_whole = True
        except TimeoutError:
            raise AssertionError(f"{answer.status}, and no end of its body within {ANSWER_S:g} s") from None
        except asyncio.IncompleteReadError as error:
            parts.append(error.partial)
        except ConnectionError:
            pass
        answer.body = b"".join(parts)

    async def _read_parts(self, answer: Answer, parts: list[bytes], is_head: bool) -> None:
        lengths = answer.values(b"content-length")
        codings = answer.values(b"transfer-encoding")
        assert not (lengths and codings), "the answer has Content-Length and Transfer-Encoding"
        assert len(lengths) < 2, f"the answer has {len(lengths)} Content-Length headers"
        if is_head or answer.status in NO_BODY:
            return
        if codings:
            assert codings == [b"chunked"], f"the answer has Transfer-Encoding {codings}"
            answer.is_chunked = True
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                await self._take(size, parts)
                end = await self._reader.readexactly(2)
                assert end == b"\r\n", f"a chunk of the answer ends with {end!r}"
            while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
                answer.trailers += split_head(b"\r\n" + line)
        elif lengths:
            await self._take(int(lengths[0]), parts)
        else:
            while data := await self._reader.read(65536):
                parts.append(data)

    async def _take(self, count: int, parts: list[bytes]) -> None:
        while count:
            data = await self._reader.read(min(count, 65536))
            if not data:
                raise asyncio.IncompleteReadError(b"", count)
            parts.append(data)
            count -= len(data)

    async def wait_for(self, mark: bytes) -> bytes:
        """What comes, up to and with a mark. Raises AssertionError when it does not come."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._reader.readuntil(mark)
        except TimeoutError:
            raise AssertionError(f"{mark!r} was not passed on within {ANSWER_S:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise AssertionError(f"the connection closed before {mark!r}") from None

    async def is_closed(self, within_s: float = 3.0) -> bool:
        """The gateway closes the connection; some linger for a second (RFC 9112, 9.6)."""
        try:
            async with asyncio.timeout(within_s):
                while await self._reader.read(65536):
                    pass
                return True
        except TimeoutError:
            return False
        except ConnectionError:
            return True
