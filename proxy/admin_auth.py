"""Who may do what at the control plane: plain ASGI middleware in front of every route, those to come included.

Roles: viewer < operator < admin. Whatever is not named in `RULES` takes a viewer to read and an operator to change.
`/healthz` is open, `/metrics` with `control.open_metrics` too. Who is who: `Authorization: Bearer TOKEN`, or the cookie
of a session that `/login` gave for a token. Sessions live in this process, at most `SESSION_S`, and end with their
token.

A token is asked for wherever the control plane does not listen on loopback. On loopback it is not, unless
`control.require_token` says so; there a request's Host must be loopback's or one of `control.hosts`, or else a page of
any site could ask by a name that it makes point here (DNS rebinding).

Cross-site requests: what changes something is refused when its Origin is another host's, or Sec-Fetch-Site says that it
comes from elsewhere; with a cookie it needs an Origin or the header `x-burstgate-request`, which no form can send.

Guessing: a wrong token costs one hash and one lookup like a right one. After `PER_ADDRESS` wrong ones from an address,
or `PER_ALL` in all, within `WINDOW_S`, there are no logins for the rest of it; valid bearer tokens go on working.
"""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

from proxy.config_error import ConfigError
from proxy.errors import GatewayError, error_body
from proxy.keeper import KeyKeeper, configured_tokens
from proxy.settings import Settings
from storage.key_file import CachedKey

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RULES: tuple[tuple[str, str, str], ...] = (
    # path and all below it, role to read, role to change
    ("/api/v1/keys", "admin", "admin"),
    ("/api/v1/config", "viewer", "admin"),
)
_RANK = {"viewer": 0, "operator": 1, "admin": 2}
_SAFE = ("GET", "HEAD", "OPTIONS")
SESSION_S = 12 * 3600.0
MAX_SESSIONS = 1000
WINDOW_S = 60.0
PER_ADDRESS = 10
PER_ALL = 100
MAX_ADDRESSES = 4096
MAX_LOGIN_BYTES = 4096
COOKIE = "burstgate_session"
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>burstgate: log in</title><style>body{font:16px system-ui;max-width:24rem;margin:15vh auto;padding:0 1rem}
input,button{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;margin:.5rem 0}:root{color-scheme:light dark}
</style><h1>burstgate</h1><form method="post" action="/login"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button></form><p role="alert">MESSAGE</p>"""


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own, without asking anybody."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def needs_token(settings: Settings) -> bool:
    """Whether everybody must show a token."""
    return settings.control.require_token or not is_loopback(settings.control_host)


def check_reachable(settings: Settings) -> None:
    """Raises ConfigError where tokens are needed and there are none: nobody could get in, or everybody."""
    if not needs_token(settings):
        return
    list(configured_tokens(settings))  # whose problems are said here
    keeper = KeyKeeper(settings)
    try:
        keeper.look()
    finally:
        keeper.close()
    if not keeper.has_admins:
        host = settings.control_host
        where = "control.require_token" if is_loopback(host) else f"control_host: {host}"
        raise ConfigError(
            f"{where}: expected an administrator's token (burstgate keys admin create, control.tokens_file or "
            "control.token_env), found none"
        )


def needed_role(method: str, path: str) -> str:
    """The least role for a request."""
    for prefix, reads, changes in RULES:
        if path == prefix or path.startswith(prefix + "/"):
            return reads if method in _SAFE else changes
    return "viewer" if method in _SAFE else "operator"


class Attempts:
    """Counts wrong tokens in windows of `WINDOW_S`, in bounded memory."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._all = 0
        self._by_address: OrderedDict[str, int] = OrderedDict()

    def is_over(self, address: str, now_s: float) -> bool:
        """There were too many."""
        self._turn(now_s)
        return self._all >= PER_ALL or self._by_address.get(address, 0) >= PER_ADDRESS

    def failed(self, address: str, now_s: float) -> None:
        """One more."""
        self._turn(now_s)
        self._all += 1
        self._by_address[address] = self._by_address.pop(address, 0) + 1
        if len(self._by_address) > MAX_ADDRESSES:
            self._by_address.popitem(last=False)

    def _turn(self, now_s: float) -> None:
        if now_s - self._start_s >= WINDOW_S:
            self._start_s = now_s
            self._all = 0
            self._by_address.clear()


@dataclass(frozen=True, slots=True)
class _Session:
    token: bytes
    """Hash of the token that it was opened with."""
    ends_s: float
    """Monotonic."""


class AdminGate:
    """The middleware. settings: as they are now."""

    def __init__(self, app: App, *, keeper: KeyKeeper, settings: Callable[[], Settings]) -> None:
        self._app = app
        self._keeper = keeper
        self._settings = settings
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._attempts = Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = {name.lower() for name, _ in message["headers"]}
                extra = [header for header in _HEADERS if header[0] not in named]
                if scope["path"].startswith("/api/") and b"cache-control" not in named:
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        path = scope["path"]
        method = scope["method"]
        if path == "/healthz" and method in _SAFE:
            await self._app(scope, receive, hardened)
            return
        try:
            headers = _read_headers(scope)
            self._check_site(scope, headers)
            if path == "/login":
                await self._login(scope, headers, receive, hardened)
                return
            if path == "/logout" and method == "POST":
                self._sessions.pop(_session_key(headers), None)
                cookie = self._cookie(scope, "", 0)
                await _answer(hardened, 303, b"", (b"location", b"/login"), (b"set-cookie", cookie))
                return
            user = self._user(scope, headers)
            self._check_right(method, path, user)
        except GatewayError as error:
            wants_page = method == "GET" and "text/html" in _accepts(scope)
            if error.status == 401 and wants_page:
                await _answer(hardened, 303, b"", (b"location", b"/login"))
            else:
                more = [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
                if error.status == 429:
                    more = [(b"retry-after", b"%d" % WINDOW_S)]
                await _answer(hardened, error.status, error_body(error), (b"content-type", b"application/json"), *more)
            return
        scope["burstgate.user"] = user.name if user is not None else "local"
        scope["burstgate.role"] = user.role if user is not None else "admin"
        await self._app(scope, receive, hardened)

    # Who, and whether ------------------------------------------------------------------------------------------------

    def _user(self, scope: Scope, headers: dict[str, str]) -> CachedKey | None:
        """Whose request it is; None for somebody who needs no token. Raises GatewayError."""
        settings = self._settings()
        now_s = time.time()
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = self._keeper.admin(token.strip().encode(), now_s)
            if key is not None:
                return key
            self._wrong(_address(scope))
            raise GatewayError(401, "invalid_token", "the token is not known, has expired or was revoked")
        if session := self._sessions.get(_session_key(headers)):
            key = self._keeper.admin_of(session.token, now_s)
            if key is not None and time.monotonic() < session.ends_s:
                if scope["method"] not in _SAFE and not {"origin", "x-burstgate-request"} & headers.keys():
                    raise GatewayError(403, "cross_site", "expected an Origin, or the header x-burstgate-request")
                return key
            self._sessions.pop(_session_key(headers), None)
        is_open = scope["path"] == "/metrics" and scope["method"] in _SAFE and settings.control.open_metrics
        if needs_token(settings):
            if is_open:
                return CachedKey("", "anyone", b"", role="viewer")
            raise GatewayError(401, "token_required", "expected Authorization: Bearer TOKEN, or a login at /login")
        name = _host_name(headers["host"])
        if not is_loopback(name) and name not in settings.control.hosts and not is_open:
            raise GatewayError(403, "host_not_allowed", "this name is not one of the control plane's (control.hosts)")
        return None

    def _check_right(self, method: str, path: str, user: CachedKey | None) -> None:
        if method not in _SAFE and self._settings().control.read_only:
            raise GatewayError(403, "read_only", "the control plane is read-only (control.read_only)")
        wanted = needed_role(method, path)
        if user is not None and (user.role is None or _RANK[user.role] < _RANK[wanted]):
            raise GatewayError(403, "role_required", f"expected the role {wanted}, the token has {user.role}")

    def _check_site(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse what another site's page sends."""
        if scope["method"] in _SAFE:
            return
        origin = headers.get("origin")
        if origin is not None:
            is_ours = urlsplit(origin).netloc.lower() == headers["host"].lower()
        else:
            is_ours = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        if not is_ours:
            raise GatewayError(403, "cross_site", "expected a request from the control plane's own pages")

    def _wrong(self, address: str) -> None:
        """A token was wrong. Raises GatewayError when there were too many."""
        now_s = time.monotonic()
        if self._attempts.is_over(address, now_s):
            raise GatewayError(429, "too_many_attempts", "too many wrong tokens, try again in a minute")
        self._attempts.failed(address, now_s)

    # Sessions --------------------------------------------------------------------------------------------------------

    async def _login(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """The form, and what it sends. Raises GatewayError."""
        if scope["method"] in ("GET", "HEAD"):
            await _page(send, 200, "")
            return
        if scope["method"] != "POST":
            raise GatewayError(405, "method_not_allowed", "expected GET or POST")
        address = _address(scope)
        if self._attempts.is_over(address, time.monotonic()):
            await _page(send, 429, "Too many wrong tokens. Try again in a minute.")
            return
        body = await _read_body(receive)
        token = parse_qs(body.decode("latin-1")).get("token", [""])[0].strip().encode()
        key = self._keeper.admin(token, time.time())
        if key is None:
            self._attempts.failed(address, time.monotonic())
            await _page(send, 401, "This token is not known, has expired or was revoked.")
            return
        name = secrets.token_urlsafe(32)
        self._sessions[sha256(name.encode()).digest()] = _Session(key.hash, time.monotonic() + SESSION_S)
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        cookie = self._cookie(scope, name, int(SESSION_S))
        await _answer(send, 303, b"", (b"location", b"/"), (b"set-cookie", cookie))

    def _cookie(self, scope: Scope, value: str, age_s: int) -> bytes:
        secure = "; Secure" if scope["scheme"] == "https" else ""
        return f"{COOKIE}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={age_s}{secure}".encode()


def _read_headers(scope: Scope) -> dict[str, str]:
    """By lower-case name. Raises GatewayError where what decides is not said once."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        if name in found and name in ("host", "origin", "authorization"):
            raise GatewayError(400, "invalid_http", f"expected one {name} header")
        found[name] = raw_value.decode("latin-1")
    if "host" not in found:
        raise GatewayError(400, "invalid_http", "expected a Host header")
    return found


def _accepts(scope: Scope) -> str:
    return " ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept")


def _address(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _host_name(host: str) -> str:
    """Of a Host header, without its port."""
    return host.partition("]")[0].strip("[") if host.startswith("[") else host.partition(":")[0].lower()


def _session_key(headers: dict[str, str]) -> bytes:
    for pair in headers.get("cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return sha256(value.encode()).digest()
    return b""


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise GatewayError(400, "invalid_http", "the request broke off")
        body += message.get("body", b"")
        if len(body) > MAX_LOGIN_BYTES:
            raise GatewayError(413, "request_too_large", f"a login has at most {MAX_LOGIN_BYTES} bytes")
        if not message.get("more_body"):
            return bytes(body)


async def _page(send: Send, status: int, message: str) -> None:
    policy = b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    more = ((b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", policy))
    extra = ((b"retry-after", b"%d" % WINDOW_S),) if status == 429 else ()
    body = _PAGE.replace("MESSAGE", message).encode()
    await _answer(send, status, body, *more, *extra, (b"cache-control", b"no-store"))


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    lines = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
