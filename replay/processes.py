"""Sender processes on this host: started, told what to send and when, listened to.

Each is a new interpreter with one end of a socket pair, over which go pickles behind their length in 4 bytes:

    to the child     a Job; then its zero in monotonic nanoseconds (one clock for the whole host); PRESS at any time
    to the parent    READY; Progress now and then; at last its SenderResult, or the exception that kept it from sending

Rules: a child is in a process group of its own and ignores SIGINT, so that Ctrl-C reaches the coordinator alone, which
presses for all. A child whose coordinator is gone ends at once. One that ends without a result is lost: `SenderLost`.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from replay.client import ReplayError
from replay.options import plan_file, rows_of
from replay.report import Progress
from replay.sender import Job, Sender, SenderResult, Stop, fast_loop

PROGRESS_S = 0.5
READY = "ready"
PRESS = "press"

_LENGTH_BYTES = 4
_GRACE_S = 5.0
"""For a child that has said all and is to end."""
_PROGRAM = "import sys; from replay.processes import main; main(int(sys.argv[1]))"


class SenderLost(Exception):
    """A sender ended without a result. One line for the user."""


class RemoteSender(Protocol):
    """A sender elsewhere, as the coordinator sees it."""

    name: str
    lead_s: float
    """How far ahead a zero must lie for it to hear of it in time."""
    progress: Progress | None
    """Its latest."""

    async def prepare(self, job: Job) -> bool:
        """Have it prepare; True once it is ready, False when a press ended it first.

        Raises SenderLost, and what kept it from starting: ReplayError, ValueError, OSError.
        """
        ...

    async def go(self, zero_ns: int, zero_s: float) -> None:
        """Tell the zero: this host's monotonic nanoseconds, and the same moment in this host's epoch seconds."""
        ...

    def press(self) -> None:
        """As `Stop.press`."""
        ...

    async def result(self) -> SenderResult:
        """When it is through. Raises SenderLost."""
        ...

    async def close(self) -> None:
        """End it, whatever it does."""
        ...


class ChildSender:
    """A RemoteSender in a process of this host's. Made in a running loop."""

    lead_s = 0.05

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self.name = f"{socket.gethostname()}:{self._process.pid}"
        self.progress: Progress | None = None
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._unsaid: list[Any] = []
        """Before there is a writer."""
        self._ready = asyncio.Event()
        self._result: asyncio.Task[SenderResult] | None = None

    async def prepare(self, job: Job) -> bool:
        """As RemoteSender's."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._result = asyncio.create_task(self._listen(reader))
        for message in (job, *self._unsaid):
            self._say(message)
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait([ready, self._result], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._result.done():
            self._result.result()  # raises what kept it from starting
        return self._ready.is_set()

    async def go(self, zero_ns: int, zero_s: float) -> None:
        """As RemoteSender's; the monotonic clock is the whole host's."""
        self._say(zero_ns)

    def press(self) -> None:
        """As RemoteSender's."""
        self._say(PRESS)

    async def result(self) -> SenderResult:
        """As RemoteSender's."""
        assert self._result is not None  # prepared before
        return await self._result

    async def close(self) -> None:
        """As RemoteSender's."""
        if self._result is not None:
            self._result.cancel()
            await asyncio.wait([self._result])
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        try:
            await asyncio.to_thread(self._process.wait, _GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _say(self, message: Any) -> None:
        if self._writer is None:
            self._unsaid.append(message)
        elif not self._writer.is_closing():
            self._writer.write(_framed(message))

    async def _listen(self, reader: asyncio.StreamReader) -> SenderResult:
        try:
            while True:
                message = await _read(reader)
                if isinstance(message, SenderResult):
                    return message
                if isinstance(message, Exception):
                    raise message
                if message == READY:
                    self._ready.set()
                else:
                    self.progress = message
        except (EOFError, ConnectionError):
            status = await asyncio.to_thread(self._process.wait)
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise SenderLost(f"sender process {self.name} {how}") from None


def _framed(message: Any) -> bytes:
    data = pickle.dumps(message)
    return len(data).to_bytes(_LENGTH_BYTES) + data


async def _read(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError at the end, ConnectionError."""
    data = await reader.readexactly(_LENGTH_BYTES)
    return pickle.loads(await reader.readexactly(int.from_bytes(data)))


def main(number: int) -> None:
    """A sender process. number: of the file that is its end of the socket pair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_serve(socket.socket(fileno=number)))


async def _serve(end: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=end)
    stop = Stop()
    zero: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def ready() -> int:
        writer.write(_framed(READY))
        return await zero

    async def listen() -> None:
        try:
            while True:
                message = await _read(reader)
                if message == PRESS:
                    stop.press()
                elif not zero.done():
                    zero.set_result(message)
        except (EOFError, ConnectionError):  # nobody is left to send for
            stop.press()
            stop.press()

    async def tell(sender: Sender) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            writer.write(_framed(sender.progress()))

    try:
        job: Job = await _read(reader)
    except (EOFError, ConnectionError):
        writer.close()
        return
    try:
        planned = rows_of(plan_file(job.trace, job.options), job.shards)
        run_id = job.options.run_id or ""
        sender = Sender(planned, job.options, run_id=run_id, api_key=job.api_key, stop=stop, learned=job.learned)
        helpers = [asyncio.create_task(listen()), asyncio.create_task(tell(sender))]
        try:
            said: SenderResult | Exception = await sender.run(ready)
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.wait(helpers)
    except (ReplayError, ValueError, OSError) as error:
        said = error
    writer.write(_framed(said))
    try:
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        pass
