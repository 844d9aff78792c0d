"""`burstgate serve`: starts the workers, the recorder and the control plane, and keeps them running.

The supervisor owns the listening sockets (SO_REUSEPORT; one a worker, or more after the workers became fewer), so that
a connection that arrives while a worker is being replaced waits in its queue and is not refused. None of them is closed
before the end: closing one resets the connections in its queue. A process that dies is started again, after a pause
that grows with quick deaths.

SIGHUP     the configuration is loaded again; what can change while running goes to every process over its standard
           input, what can not is named; another number of workers is a new set of workers.
SIGUSR2    zero-downtime restart: once a trial run has found that code and configuration load, the supervisor executes
           its own command line anew (proxy/handover.py). The new program starts new processes on the same sockets.
SIGTERM,   the workers stop first (they finish what is in flight, up to `timeouts.drain_s`), then the recorder (it
SIGINT     empties the journal), then the control plane. A second one cuts short what is waited for, a third kills.

A new set of processes takes over when all of it is ready; only then are the old ones asked to end, and they serve what
they have up to `drain_s`. When one of the new does not come up, the new ones go and the old ones stay.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

from proxy.config_error import ConfigError
from proxy.handover import Handover, Preflight, command_line, execute
from proxy.process import Child
from proxy.settings import NEED_RESTART, NEED_STOP, Settings, changes, keep, validate

READY_TIMEOUT_S = 30.0
QUICK_DEATH_S = 5.0
MAX_PAUSE_S = 5.0
TICK_S = 0.05
CUT_S = 2.0
"""What a process has to end after it has been asked for the second time."""
RECORDER_HANDOVER_S = 5.0
"""What a recorder has to finish its round; killing it loses nothing."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def listen(host: str, port: int, *, shares: int, setting: str) -> list[socket.socket]:
    """`shares` listening sockets on one address. Raises ConfigError when it is taken or not ours."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"{setting}: {host}: {error.strerror}") from None
    except UnicodeError:  # a label too long for a name
        raise ConfigError(f"{setting}: {host!r}: not a host name") from None
    sockets: list[socket.socket] = []
    try:
        # A first bind without SO_REUSEPORT: with it, another gateway's port would be shared without a word.
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            address = probe.getsockname()
        for _ in range(shares):
            sockets.append(_bound(family, address))
            sockets[-1].listen(4096)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ConfigError(f"{setting}: can not listen on {host}:{port}: {error.strerror}") from None
    return sockets


def _bound(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)  # type: ignore[arg-type]
    except OSError:
        sock.close()
        raise
    return sock


class Supervisor:
    """All processes of one installation.

    say: takes lines for the operator. load: the configuration as it is now; raises ConfigError.
    """

    def __init__(
        self, settings: Settings, *, say: Callable[[str], None], load: Callable[[], Settings] | None = None
    ) -> None:
        self._settings = settings
        self._say = say
        self._load = load or (lambda: settings)
        self._stops_asked = 0
        self._is_reload_asked = False
        self._is_restart_asked = False
        self._has_terminal = os.isatty(0)
        self._gateways: list[socket.socket] = []
        self._control_sockets: list[socket.socket] = []
        self._workers: list[Child] = []
        self._recorder = Child("recorder", "proxy.record", settings)
        self._control: Child | None = None
        self._upcoming: list[Child] = []
        """A new set of workers (after a restart with a control plane) that is not ready yet."""
        self._upcoming_deadline_s = 0.0
        self._leaving: list[Child] = []
        self._preflight: Preflight | None = None
        self._is_taking_over = False

    def start(self) -> tuple[str, str]:
        """Start everything; returns the URLs of the gateway and the control plane.

        Raises ConfigError when an address is taken or a process does not come up, OSError.
        """
        settings = self._settings
        self._gateways = listen(settings.host, settings.port, shares=settings.workers, setting="port")
        try:
            self._control_sockets = listen(
                settings.control_host, settings.control_port, shares=1, setting="control_port"
            )
            self._workers = self._new_workers()
            self._control = self._new_control()
            for child in self._children():
                child.start()
            deadline_s = time.monotonic() + READY_TIMEOUT_S
            for child in self._children():
                while not child.is_ready and not self._stops_asked:
                    child.look()
                    if not child.is_running or time.monotonic() >= deadline_s:
                        raise ConfigError(f"the {child.name} did not start; its reason is above")
                    time.sleep(0.01)
        except (ConfigError, OSError):
            self.stop()
            raise
        tls = settings.tls
        return (
            _url(self._gateways[0], is_tls=tls.cert_file is not None),
            _url(self._control_sockets[0], is_tls=tls.control_cert_file is not None),
        )

    def take_over(self, handover: Handover) -> None:
        """Instead of `start`, after a restart: `run` replaces what is left by what this program starts."""
        self._gateways = [socket.socket(fileno=fd) for fd in handover.gateways]
        self._control_sockets = [socket.socket(fileno=handover.control)]
        for left in handover.workers:
            sockets = tuple(self._gateways[place] for place in left.sockets)
            self._workers.append(Child(left.name, "proxy.app", self._settings, sockets))
        self._control = self._new_control()
        self._leaving = [Child(left.name, "", self._settings) for left in handover.leaving]
        recorder = [handover.recorder] if self._settings.recorder else []
        lefts = (*recorder, handover.control_plane, *handover.workers, *handover.leaving)
        for child, left in zip((*self._children(), *self._leaving), lefts, strict=True):
            child.adopt(left)
        self._is_taking_over = True

    def _new_workers(self) -> list[Child]:
        count = self._settings.workers
        return [
            Child(f"worker {index}", "proxy.app", self._settings, tuple(self._gateways[index::count]))
            for index in range(count)
        ]

    def _new_control(self) -> Child:
        url = _url(self._gateways[0], is_tls=self._settings.tls.cert_file is not None)
        return Child("control plane", "proxy.control", self._settings, tuple(self._control_sockets), gateway_url=url)

    def _children(self) -> list[Child]:
        recorder = [self._recorder] if self._settings.recorder else []
        return [*recorder, *([self._control] if self._control is not None else []), *self._workers]

    def catch_signals(self) -> None:
        """From here on, the signals above mean what they mean; before, each of them ends the process."""

        def note(signum: int, frame: FrameType | None) -> None:
            if signum == signal.SIGHUP:
                self._is_reload_asked = True
            elif signum == signal.SIGUSR2:
                self._is_restart_asked = True
            else:
                self._stops_asked += 1

        for signum in _SIGNALS:
            signal.signal(signum, note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # `_execute` blocks them

    def run(self) -> None:
        """Keep everything running until SIGTERM or SIGINT."""
        self.catch_signals()
        if self._is_taking_over and not self._stops_asked:
            self._recorder.ask_to_end(RECORDER_HANDOVER_S, signal.SIGUSR1)  # what it leaves waits in the journal
            self._replace(with_control=True)
        while not self._stops_asked:
            self.tend()
            time.sleep(TICK_S)
        self.stop()

    def tend(self) -> None:
        """One look at everything, and what there is to do. Does not wait for anything."""
        for child in self._children():
            self._keep_running(child)
        self._tend_upcoming()
        self._tend_leaving()
        if self._is_reload_asked and not self._upcoming:
            self._is_reload_asked = False
            if self._has_terminal and not os.isatty(0):  # the terminal was closed: nobody could stop it any more
                self._stops_asked += 1
                return
            self._reload()
        self._tend_restart()
        self._tell_settings()

    def _keep_running(self, child: Child) -> None:
        if child.is_running:
            child.look()
            child.kill_if_late()
            return
        now_s = time.monotonic()
        if child.process is not None:
            was_asked = child.kill_at_s is not None
            code = child.reap()
            child.quick_deaths = child.quick_deaths + 1 if now_s - child.started_s < QUICK_DEATH_S else 0
            pause_s = min(MAX_PAUSE_S, 0.1 * (2**child.quick_deaths - 1))
            child.restart_at_s = now_s if was_asked else now_s + pause_s
            if not was_asked:
                self._say(f"the {child.name} ended with status {code}; starting it again")
        if now_s >= child.restart_at_s:
            child.settings = self._settings
            try:
                child.start()
            except OSError as error:
                self._say(f"the {child.name} can not be started: {error.strerror}")
                child.restart_at_s = now_s + MAX_PAUSE_S

    def _tell_settings(self) -> None:
        for child in self._children():
            is_behind = child.is_ready and child.is_running and child.settings is not self._settings
            if is_behind and not child.tell(self._settings):
                self._say(f"the {child.name} does not take new settings; starting it again")
                child.ask_to_end(self._drain_s)

    @property
    def _drain_s(self) -> float:
        """What a worker has to end: its own limit, and time to close."""
        return self._settings.timeouts.drain_s + 5

    # Reload -----------------------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        try:
            loaded = self._load()
        except (ConfigError, OSError) as error:
            self._say(f"not reloaded, the configuration stays as it is: {error}")
            return
        old = self._settings
        new = keep(old, loaded, (*NEED_STOP, *NEED_RESTART))
        changed = ", ".join(map(str, changes(old, new)))
        if changed:
            self._settings = new
        self._say(f"reloaded: {changed or 'nothing changes'}")
        self._say_kept(new, loaded)
        if new.workers != len(self._workers):
            self._replace(with_control=False)

    def _say_kept(self, kept: Settings, loaded: Settings) -> None:
        for change in changes(kept, loaded):
            what = "a stop and a start" if change.group in NEED_STOP else "a restart (SIGUSR2)"
            self._say(f"{change} needs {what}")

    # A new set of processes -------------------------------------------------------------------------------------------

    def _replace(self, *, with_control: bool) -> None:
        """Start a new set of workers, and a control plane, beside the old."""
        try:
            first = self._gateways[0]
            while len(self._gateways) < self._settings.workers:
                # The worker listens on it, once it can accept; until then no connection lands here.
                self._gateways.append(_bound(first.family, first.getsockname()))
            self._upcoming = self._new_workers() + ([self._new_control()] if with_control else [])
            self._upcoming_deadline_s = time.monotonic() + READY_TIMEOUT_S
            for child in self._upcoming:
                child.start()
        except OSError as error:
            self._give_up(str(error.strerror))

    def _tend_upcoming(self) -> None:
        if not self._upcoming:
            return
        for child in self._upcoming:
            child.look()
            if not child.is_running or time.monotonic() >= self._upcoming_deadline_s:
                self._give_up(f"the {child.name} did not start, its reason is above")
                return
        if not all(child.is_ready for child in self._upcoming):
            return
        old = self._workers
        self._workers = [child for child in self._upcoming if child.module == "proxy.app"]
        for child in self._upcoming:
            if child.module == "proxy.control":
                old = [*old, *([self._control] if self._control is not None else [])]
                self._control = child
        self._upcoming = []
        self._let_go(old)
        what = f"restarted as version {importlib.metadata.version('burstgate')}" if self._is_taking_over else "reloaded"
        self._say(f"{what}: new workers ({len(self._workers)}) serve, the old ones finish what they have")
        self._is_taking_over = False

    def _give_up(self, reason: str) -> None:
        what = "not restarted" if self._is_taking_over else "workers not replaced"
        self._say(f"{what}, the old ones go on: {reason}")
        self._let_go(self._upcoming)
        self._upcoming = []
        self._is_taking_over = False
        self._settings = self._settings.model_copy(update={"workers": len(self._workers)})
        used = {sock for child in self._workers for sock in child.sockets}
        for sock in [sock for sock in self._gateways if sock not in used]:
            # With the new workers' end nobody would accept from it.
            self._gateways.remove(sock)
            sock.close()

    def _let_go(self, children: Sequence[Child]) -> None:
        for child in children:
            child.ask_to_end(self._drain_s)
        self._leaving += children

    def _tend_leaving(self) -> None:
        for child in self._leaving:
            child.kill_if_late()
            if not child.is_running:
                child.reap()
        self._leaving = [child for child in self._leaving if child.process is not None]

    # Restart ----------------------------------------------------------------------------------------------------------

    def _tend_restart(self) -> None:
        now_s = time.monotonic()
        try:
            if self._preflight is None and self._is_restart_asked and not self._upcoming:
                self._is_restart_asked = False
                self._preflight = Preflight(command_line(), now_s + Preflight.TIMEOUT_S)
            if self._preflight is None or self._upcoming:
                return
            went_well = self._preflight.result(now_s)
            if went_well is None:
                return
            self._preflight = None
            if went_well:
                self._execute()
            else:
                self._say("not restarted, everything goes on as it was: the reason is above")
        except OSError as error:
            self._say(f"not restarted, everything goes on as it was: {error.strerror}")

    def _execute(self) -> None:
        """Become the new program. Returns when a stop was asked meanwhile. Raises OSError."""
        # They wait for the new program: a signal that comes before it catches them would end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if not self._stops_asked:
                execute(self._handover(), command_line())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _handover(self) -> Handover:
        assert self._control is not None
        return Handover(
            settings=json.loads(self._settings.model_dump_json()),
            gateways=tuple(sock.fileno() for sock in self._gateways),
            control=self._control_sockets[0].fileno(),
            workers=tuple(child.leave(self._gateways) for child in self._workers),
            recorder=self._recorder.leave(),
            control_plane=self._control.leave(),
            leaving=tuple(child.leave() for child in self._leaving),
        )

    # Stop -------------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop everything, the data plane first."""
        if self._preflight is not None:
            self._preflight.cancel()
        for sock in (*self._gateways, *self._control_sockets):
            sock.close()
        workers = [*self._workers, *self._upcoming, *self._leaving]
        self._end(workers, self._drain_s)
        self._end([self._recorder], 30.0)
        self._end([self._control] if self._control is not None else [], 5.0)

    def _end(self, children: Sequence[Child], timeout_s: float) -> None:
        """Ask them to end, and wait. Asked again by the operator, ask them again, and give them `CUT_S`; then kill."""
        asked = self._stops_asked
        is_cut = False
        for child in children:
            child.ask_to_end(timeout_s)
        while any(child.is_running for child in children):
            if self._stops_asked > asked:
                asked = self._stops_asked
                for child in children:
                    child.ask_to_end(0.0 if is_cut else CUT_S)
                is_cut = True
            for child in children:
                child.kill_if_late()
            time.sleep(0.01)
        for child in children:
            child.reap()


def settings_after(handover: Handover, load: Callable[[], Settings], say: Callable[[str], None]) -> Settings:
    """What a program that takes over works with: the configuration as it is now, but for what only a start can change.

    Raises ConfigError when neither it nor the running settings can be used.
    """
    fixed = validate({group: handover.settings[group] for group in NEED_STOP if group in handover.settings}, {})
    try:
        loaded = load()
    except ConfigError as error:  # changed since the trial run
        say(f"the configuration stays as it is: {error}")
        return validate(handover.settings, {})
    kept = keep(fixed, loaded, NEED_STOP)
    for change in changes(kept, loaded):
        say(f"{change} needs a stop and a start")
    return kept


def _url(sock: socket.socket, *, is_tls: bool) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
