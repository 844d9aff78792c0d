"""The control plane's door: a real server, and people who try to get in."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from proxy.admin_auth import COOKIE, MAX_ADDRESSES, PER_ADDRESS, PER_ALL, Attempts, check_reachable, is_loopback
from proxy.config_error import ConfigError
from proxy.control import build_control
from proxy.settings import ControlSettings, Settings
from storage.engine import open_engine, upgrade

TOKENS = {role: f"{role}-{'t' * 20}" for role in ("viewer", "operator", "admin")}


class Door:
    """A control plane, and a client of it."""

    def __init__(self, client: httpx.Client, settings: Settings, app: Any) -> None:
        self.client = client
        self.settings = settings
        self.app = app

    def ask(self, method: str, path: str, role: str | None = None, **more: Any) -> httpx.Response:
        headers = {**({"authorization": f"Bearer {TOKENS[role]}"} if role else {}), **more.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **more)

    @contextlib.contextmanager
    def control(self, **changes: Any) -> Iterator[None]:
        """Other settings of the control plane for a while, as a reload makes them."""
        was = self.app.state.settings
        new = was.model_copy(update={"control": was.control.model_copy(update=changes)})
        self.app.state.settings = self.app.state.keeper.settings = new
        self.app.state.keeper.look()
        yield
        self.app.state.settings = self.app.state.keeper.settings = was
        self.app.state.keeper.look()


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Door]:
    engine = open_engine(settings.database)
    upgrade(engine)
    engine.dispose()
    app = build_control(settings)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20.0) as client:
                yield Door(client, settings, app)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A control plane as it is beyond loopback."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "tokens").write_text("".join(f"{role} {token}  # {role}\n" for role, token in TOKENS.items()))
    control = ControlSettings(tokens_file=directory / "tokens")
    settings = Settings(upstreams=("http://u:1",), data_dir=directory, control_host="0.0.0.0", control=control)
    with serving(settings) as door:
        yield door


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One on loopback, as it comes."""
    with serving(Settings(upstreams=("http://u:1",), data_dir=tmp_path_factory.mktemp("local"))) as door:
        yield door


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """Each test begins without cookies."""
    for name in ("guarded", "local"):
        if name in request.fixturenames:
            request.getfixturevalue(name).client.cookies.clear()


# Roles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("GET", "/healthz", None),
        ("GET", "/login", None),
        ("GET", "/metrics", "viewer"),
        ("GET", "/api/v1/status", "viewer"),
        ("GET", "/api/v1/doctor", "viewer"),
        ("GET", "/api/v1/whoami", "viewer"),
        ("GET", "/openapi.json", "viewer"),
        ("GET", "/", "viewer"),
        ("GET", "/what/comes/next", "viewer"),
        ("POST", "/api/v1/what/comes/next", "operator"),
        ("DELETE", "/api/v1/what/comes/next", "operator"),
        ("PUT", "/what/comes/next", "operator"),
        ("PATCH", "/api/v1/x", "operator"),
        ("GET", "/api/v1/config", "viewer"),
        ("PUT", "/api/v1/config", "admin"),
        ("POST", "/api/v1/config/apply", "admin"),
        ("GET", "/api/v1/keys", "admin"),
        ("POST", "/api/v1/keys", "admin"),
        ("DELETE", "/api/v1/keys/key_1", "admin"),
        ("POST", "/api/v1/keys/key_1/rotate", "admin"),
    ],
)
def test_each_route_has_its_least_role(guarded: Door, method: str, path: str, least: str | None) -> None:
    order = [None, "viewer", "operator", "admin"]
    for role in order:
        status = guarded.ask(method, path, role).status_code
        if order.index(role) >= order.index(least):
            assert status not in (401, 403), (role, status)
        else:
            assert status == (401 if role is None else 403), (role, status)


def test_refusals_are_in_the_envelope(guarded: Door) -> None:
    answer = guarded.ask("GET", "/api/v1/status")
    assert answer.json()["error"]["type"] == "token_required"
    assert answer.headers["www-authenticate"] == "Bearer"
    answer = guarded.ask("POST", "/api/v1/x", "viewer")
    assert answer.json()["error"]["message"] == "expected the role operator, the token has viewer"


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/keys/", "/api//v1/keys", "//api/v1/keys", "/api/v1/./keys", "/api/v1/x/../keys", "/API/v1/keys",
        "/api/v1/%6beys", "/healthz/../api/v1/keys", "/healthz%2f..%2fapi/v1/keys", "/login/../api/v1/keys",
        "/api/v1/keys?x=/healthz", "/healthz;/api/v1/keys", "/login;x",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_around_the_role(guarded: Door, path: str) -> None:
    """Whoever has no token gets nothing, and a viewer never the keys."""
    for role, expected in ((None, (401,)), ("viewer", (307, 403, 404))):
        connection = http.client.HTTPConnection("127.0.0.1", guarded.client.base_url.port or 0)
        with contextlib.closing(connection):
            headers = {"authorization": f"Bearer {TOKENS[role]}"} if role else {}
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            assert answer.status in expected
            assert b"key_id" not in answer.read()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_scheme_names_are_of_any_case(guarded: Door, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {TOKENS['viewer']}"}
    assert guarded.ask("GET", "/api/v1/whoami", headers=headers).json() == {"name": "tokens:1", "role": "viewer"}


@pytest.mark.parametrize("value", ["Basic dmlld2Vy", TOKENS["admin"], "Bearer", "", f"Bearer\t{TOKENS['admin']}"])
def test_other_schemes_are_none(guarded: Door, value: str) -> None:
    assert guarded.ask("GET", "/api/v1/status", headers={"authorization": value}).status_code == 401


def test_a_second_authorization_header_is_refused(guarded: Door) -> None:
    headers = [("authorization", "Bearer x"), ("authorization", f"Bearer {TOKENS['admin']}")]
    assert guarded.client.get("/api/v1/status", headers=headers).status_code == 400


def test_read_only(guarded: Door) -> None:
    with guarded.control(read_only=True):
        answer = guarded.ask("POST", "/api/v1/keys", "admin", json={"name": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "read_only")
        assert guarded.ask("GET", "/api/v1/status", "viewer").status_code == 200
        assert guarded.ask("POST", "/login", data={"token": TOKENS["viewer"]}).status_code == 303


def test_open_metrics(guarded: Door) -> None:
    assert guarded.ask("GET", "/metrics").status_code == 401
    with guarded.control(open_metrics=True):
        assert guarded.ask("GET", "/metrics").status_code == 200
        assert guarded.ask("GET", "/api/v1/status").status_code == 401


def test_answers_are_not_to_be_framed_or_kept(guarded: Door) -> None:
    headers = guarded.ask("GET", "/api/v1/status", "viewer").headers
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


# Keys over the API ----------------------------------------------------------------------------------------------------


def test_a_keys_life_over_the_api(guarded: Door) -> None:
    made = guarded.ask("POST", "/api/v1/keys", "admin", json={"name": "alice", "tenant": "t", "requests_per_s": 2})
    assert made.status_code == 201
    key, token = made.json()["key"], made.json()["token"]
    assert key["limits"] == {"requests_per_s": 2.0, "tokens_per_s": None, "concurrency": None}
    rotated = guarded.ask("POST", f"/api/v1/keys/{key['key_id']}/rotate", "admin", json={"grace_s": 5})
    assert rotated.status_code == 201
    new = rotated.json()["key"]
    listed = guarded.ask("GET", "/api/v1/keys", "admin")
    states = {each["key_id"]: each["state"] for each in listed.json()}
    assert (states[key["key_id"]], states[new["key_id"]]) == ("rotated", "valid")
    assert token not in listed.text
    assert rotated.json()["token"] not in listed.text
    assert guarded.ask("DELETE", f"/api/v1/keys/{new['key_id']}", "admin").json()["state"] == "revoked"
    assert new["key_id"] not in (guarded.settings.data_dir / "keys.cache").read_text()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/v1/keys", {"name": ""}, 400),
        ("POST", "/api/v1/keys", {"name": "a", "expires_in_s": -1}, 400),
        ("POST", "/api/v1/keys", {"name": "a", "concurrency": 0}, 400),
        ("POST", "/api/v1/keys", {"name": "a", "role": "admin", "tenant": "t"}, 400),
        ("POST", "/api/v1/keys", {"name": "a", "role": "root"}, 422),
        ("POST", "/api/v1/keys", {}, 422),
        ("POST", "/api/v1/keys/key_none/rotate", {"grace_s": 1}, 409),
        ("POST", "/api/v1/keys/key_none/rotate", {"grace_s": -1}, 400),
        ("DELETE", "/api/v1/keys/key_none", None, 409),
    ],
)
def test_bad_requests_about_keys(guarded: Door, method: str, path: str, body: Any, status: int) -> None:
    assert guarded.ask(method, path, "admin", json=body).status_code == status


def test_a_token_of_the_database_works_until_it_is_revoked(guarded: Door) -> None:
    made = guarded.ask("POST", "/api/v1/keys", "admin", json={"name": "ops", "role": "operator"}).json()
    headers = {"authorization": f"Bearer {made['token']}"}
    assert guarded.ask("GET", "/api/v1/whoami", headers=headers).json() == {"name": "ops", "role": "operator"}
    login = guarded.ask("POST", "/login", data={"token": made["token"]})
    assert login.status_code == 303
    assert guarded.ask("GET", "/api/v1/status").status_code == 200  # by the cookie
    guarded.ask("DELETE", f"/api/v1/keys/{made['key']['key_id']}", "admin")
    assert guarded.ask("GET", "/api/v1/whoami", headers=headers).status_code == 401
    assert guarded.ask("GET", "/api/v1/status").status_code == 401  # and its session with it


def test_a_clients_key_is_no_token(guarded: Door) -> None:
    made = guarded.ask("POST", "/api/v1/keys", "admin", json={"name": "client"}).json()
    headers = {"authorization": f"Bearer {made['token']}"}
    assert guarded.ask("GET", "/api/v1/status", headers=headers).status_code == 401


# The browser ----------------------------------------------------------------------------------------------------------


def log_in(door: Door, role: str) -> httpx.Response:
    return door.ask("POST", "/login", data={"token": TOKENS[role]})


def test_a_page_without_a_login_goes_to_the_form(guarded: Door) -> None:
    answer = guarded.ask("GET", "/", headers={"accept": "text/html,*/*"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    form = guarded.ask("GET", "/login")
    assert 'name="token"' in form.text
    assert "frame-ancestors 'none'" in form.headers["content-security-policy"]


def test_a_login_and_its_end(guarded: Door) -> None:
    answer = log_in(guarded, "operator")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=Strict", "Path=/"))
    assert TOKENS["operator"] not in cookie
    assert guarded.ask("GET", "/api/v1/whoami").json()["role"] == "operator"
    value = guarded.client.cookies[COOKIE]
    assert guarded.ask("POST", "/logout").status_code == 303
    guarded.client.cookies.set(COOKIE, value)
    assert guarded.ask("GET", "/api/v1/whoami").status_code == 401


def test_the_cookie_is_for_tls_only_where_there_is_tls(guarded: Door) -> None:
    assert "Secure" not in log_in(guarded, "viewer").headers["set-cookie"]  # tests/proxy/test_tls.py has the other half


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({}, False),
        ({"origin": "SELF"}, True),
        ({"x-burstgate-request": "1"}, True),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "SELF.evil.example"}, False),
        ({"origin": "https://evil.example", "x-burstgate-request": "1"}, False),
        ({"sec-fetch-site": "cross-site", "x-burstgate-request": "1"}, False),
        ({"sec-fetch-site": "same-site", "x-burstgate-request": "1"}, False),
        ({"sec-fetch-site": "same-origin", "origin": "SELF"}, True),
    ],
)
def test_another_sites_page_can_not_use_the_cookie(guarded: Door, headers: dict[str, str], is_let_in: bool) -> None:
    log_in(guarded, "operator")
    own = str(guarded.client.base_url).rstrip("/")
    sent = {name: value.replace("SELF", own) for name, value in headers.items()}
    answer = guarded.ask("POST", "/api/v1/nothing", headers=sent)
    assert answer.status_code == (404 if is_let_in else 403)


@pytest.mark.parametrize("cookie", ["", "x", "a" * 5000, "a=b;c"])
def test_an_invented_session_is_none(guarded: Door, cookie: str) -> None:
    answer = guarded.ask("GET", "/api/v1/status", headers={"cookie": f"{COOKIE}={cookie}"})
    assert answer.status_code == 401


def test_guessing_at_the_form_ends(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"admin {TOKENS['admin']}\n")
    control = ControlSettings(tokens_file=tmp_path / "tokens", require_token=True)
    with serving(Settings(upstreams=("http://u:1",), data_dir=tmp_path, control=control)) as door:
        found = [door.ask("POST", "/login", data={"token": f"wrong-{n}"}).status_code for n in range(PER_ADDRESS + 2)]
        assert found == [401] * PER_ADDRESS + [429] * 2
        assert door.ask("POST", "/login", data={"token": TOKENS["admin"]}).status_code == 429
        wrong = door.ask("GET", "/api/v1/status", headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.headers["retry-after"]) == (429, "60")
        assert door.ask("GET", "/api/v1/status", "admin").status_code == 200  # a scrape goes on
        forwarded = door.ask("POST", "/login", data={"token": "w"}, headers={"x-forwarded-for": "1.2.3.4"})
        assert forwarded.status_code == 429  # an address is not for a header to say


def test_a_login_is_of_bounded_size(guarded: Door) -> None:
    assert guarded.ask("POST", "/login", content=b"token=" + b"x" * 100_000).status_code == 413


def test_attempts_are_counted_by_address_and_in_all() -> None:
    attempts = Attempts()
    for number in range(PER_ADDRESS):
        assert not attempts.is_over("a", 100.0 + number)
        attempts.failed("a", 100.0 + number)
    assert attempts.is_over("a", 110.0)
    assert not attempts.is_over("b", 110.0)
    assert not attempts.is_over("a", 160.0)
    for number in range(PER_ALL):
        attempts.failed(f"x{number}", 160.0)
    assert attempts.is_over("b", 161.0)
    for number in range(MAX_ADDRESSES * 2):
        attempts.failed(f"y{number}", 161.0)
    assert len(attempts._by_address) <= MAX_ADDRESSES


# On loopback ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200), ("localhost", 200), ("LOCALHOST:8081", 200), ("[::1]:8081", 200), ("127.8.9.1", 200),
        ("evil.example", 403), ("evil.example:8081", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403), ("", 403), ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_a_name_that_points_here_is_not_enough(local: Door, host: str, status: int) -> None:
    assert local.ask("GET", "/api/v1/status", headers={"host": host}).status_code == status
    assert local.ask("GET", "/healthz", headers={"host": host}).status_code == 200


def test_names_can_be_allowed(local: Door) -> None:
    with local.control(hosts=("gate.example",)):
        assert local.ask("GET", "/api/v1/status", headers={"host": "gate.example:8081"}).status_code == 200


def test_a_local_script_needs_nothing_and_another_sites_page_gets_nothing(local: Door) -> None:
    assert local.ask("POST", "/api/v1/nothing").status_code == 404
    assert local.ask("POST", "/api/v1/nothing", headers={"origin": "https://evil.example"}).status_code == 403
    assert local.ask("POST", "/api/v1/nothing", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert local.ask("GET", "/api/v1/whoami").json() == {"name": "local", "role": "admin"}


def test_a_wrong_token_is_wrong_on_loopback_too(local: Door) -> None:
    assert local.ask("GET", "/api/v1/status", headers={"authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("127.3.2.1", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("gate.example", False), ("", False), ("::ffff:10.0.0.1", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# The start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "control_host", "more", "problem"),
    [
        (None, "127.0.0.1", {}, None),
        (None, "0.0.0.0", {}, "control_host: 0.0.0.0: expected an administrator's token"),
        (None, "127.0.0.1", {"require_token": True}, "control.require_token: expected an administrator's token"),
        ("", "0.0.0.0", {}, "found none"),
        ("# nobody\n\n", "0.0.0.0", {}, "found none"),
        (f"viewer {TOKENS['viewer']}", "0.0.0.0", {}, None),
        ("root 0123456789abcdef0", "0.0.0.0", {}, r"tokens:1: expected viewer, operator, admin and a token"),
        ("\nadmin short", "0.0.0.0", {}, r"tokens:2: expected"),
        (None, "0.0.0.0", {"token_env": "NO_SUCH_VARIABLE_HERE"}, "control.token_env: NO_SUCH_VARIABLE_HERE: expected"),
    ],
)
def test_beyond_loopback_it_starts_with_a_token_only(
    tmp_path: Path, tokens: str | None, control_host: str, more: dict[str, Any], problem: str | None
) -> None:
    if tokens is not None:
        (tmp_path / "tokens").write_text(tokens)
        more = {**more, "tokens_file": tmp_path / "tokens"}
    settings = Settings(data_dir=tmp_path, control_host=control_host, control=ControlSettings(**more))
    if problem is None:
        check_reachable(settings)
    else:
        with pytest.raises(ConfigError, match=problem) as raised:
            check_reachable(settings)
        assert "0123456789abcdef0" not in str(raised.value)
        assert "short" not in str(raised.value)
