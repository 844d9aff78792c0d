"""The dashboard in a real browser, in front of a gateway under load: what an operator sees and does."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from storage.query import Filter
from tests.e2e.harness import Installation, ScriptedUpstream, Simulator, burstgate, wait_until

CHROMIUM = Path("/usr/bin/chromium")
# Without these it looks for hosts of its own, many at a time.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WICKED = "<img src=x onerror=alert(1)>"
"""A model's name: it comes from anybody."""
BROKEN = (
    b'HTTP/1.1 500 Internal Server Error\r\ncontent-length: 45\r\n\r\n{"error": {"message": "", "type": "Broken!"}}\n'
)
# A machine that is busy with other things is not to trip the guard rails.
INJECTION = {"allowed": True, "max_rate_rps": 50, "max_share": 1, "stop_failure_rate": 1, "stop_ttft_p95_s": 0}
VIEWS = ("live", "history", "failures", "act", "config", "audit")


class Load:
    """Clients in threads: streams of the model `small` at some requests/s, each 20th for a model that always fails."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._is_over = threading.Event()
        self._client = httpx.Client(timeout=20.0)
        self._pool = ThreadPoolExecutor(16)
        self._thread = threading.Thread(target=self._run)
        self.rate_rps = 12.0

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._pool.shutdown()
        self._client.close()

    def ask(self, model: str) -> int:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "stream": True}
        return self._client.post(self._url, json=body).status_code

    def _run(self) -> None:
        for number in itertools.count():
            if self._is_over.wait(1 / self.rate_rps):
                return
            self._pool.submit(self.ask, WICKED if number % 20 == 3 else "small")


class World:
    def __init__(self, gateway: Installation, load: Load, upstreams: list[str]) -> None:
        self.gateway = gateway
        self.load = load
        self.upstreams = upstreams

    def get(self, path: str, **query: Any) -> Any:
        return httpx.get(f"{self.gateway.control_url}/api/v1/{path}", params=query, timeout=20.0).json()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("dashboard")
    with Simulator("--models", "small") as one, Simulator("--models", "small") as two, ScriptedUpstream(BROKEN) as bad:
        upstreams = [{"url": one.url, "name": "gpu-a", "models": ["small"]}, {"url": two.url, "name": "gpu-b",
                     "models": ["small"]}, {"url": bad.url, "name": "broken", "models": [WICKED]}]  # fmt: skip
        (folder / "burstgate.yaml").write_text(
            json.dumps({"upstreams": upstreams, "injection": INJECTION, "gateway": "wall"})
        )
        flags = ("--config", str(folder / "burstgate.yaml"))
        with (
            Installation(data_dir=folder / "data", flags=flags) as gateway,
            Load(gateway.gateway_url) as load,
        ):
            yield World(gateway, load, ["gpu-a", "gpu-b", "broken"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs a Chromium at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


class Shown:
    """A page of the dashboard. What the browser complains of is kept: errors, and breaches of the page's policy."""

    def __init__(self, browser: Any, world: World, hash: str = "live", width: int = 1280, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True, **context)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{world.gateway.control_url}/#{hash}")

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.said.append(message.text)


@pytest.fixture
def show(browser: Any, world: World) -> Iterator[Callable[..., Any]]:
    opened: list[Shown] = []

    def make(hash: str = "live", **options: Any) -> Any:
        opened.append(Shown(browser, world, hash, **options))
        return opened[-1].page

    yield make
    for each in opened:
        each.context.close()
    # What the API refuses, a browser says on its console, too.
    assert [text for each in opened for text in each.said if "status of 400" not in text] == []
    ours = (world.gateway.control_url, "data:", "blob:")
    assert [url for each in opened for url in each.asked if not url.startswith(ours)] == [], "nothing from elsewhere"


def drawn(page: Any, title: str) -> str:
    """The first line of a chart, as it is drawn; waited for."""
    figure = page.locator("figure.chart", has=page.get_by_role("heading", name=title, exact=True))
    figure.scroll_into_view_if_needed()
    line = figure.locator(".scatterlayer path.js-line, .barlayer path").first
    line.wait_for(state="attached")
    path: str = line.get_attribute("d")
    return path


def row_of(page: Any, table: str, name: str) -> Any:
    return page.get_by_role("region", name=table, exact=True).locator("tr", has_text=name)


def test_live_moves(show: Callable[..., Any]) -> None:
    page = show()
    page.wait_for_selector("#stream[data-state=live]")
    first = drawn(page, "Arrivals")
    page.wait_for_function(
        "before => document.querySelector('.scatterlayer path.js-line').getAttribute('d') !== before", arg=first
    )
    for title in ("In flight", "Tokens", "Time to first token", "Time per output token", "Failures by outcome"):
        assert drawn(page, title)
    tile = page.locator("#live-tiles .tile").first
    assert float(tile.locator(".figure").inner_text().split()[0]) > 1
    assert "up" in row_of(page, "Upstreams", "gpu-a").inner_text()
    # Also a name with markup in it is text.
    row_of(page, "Models", "small").wait_for()
    row_of(page, "Upstreams", WICKED).wait_for()
    assert page.locator("main img").count() == 0
    assert page.locator("header #gateway").inner_text() == "wall"


def test_a_drain_and_back_each_confirmed(show: Callable[..., Any], world: World) -> None:
    page = show()
    button = page.get_by_role("button", name="Drain gpu-a")
    button.click()
    dialog = page.locator("dialog#confirm")
    assert "gpu-a gets no new requests" in dialog.inner_text()
    dialog.get_by_role("button", name="Cancel").click()
    assert not world.get("upstreams")[0]["drain"], "a cancelled drain does nothing"
    button.click()
    dialog.get_by_role("button", name="Drain", exact=True).click()
    dialog.wait_for(state="hidden")
    assert "gpu-a drains" in page.locator("#toast").inner_text()
    assert world.get("upstreams")[0]["drain"]
    row_of(page, "Upstreams", "gpu-a").get_by_text("draining").wait_for()
    page.get_by_role("button", name="Undrain gpu-a").click()
    dialog.get_by_role("button", name="Undrain", exact=True).click()
    row_of(page, "Upstreams", "gpu-a").get_by_text("draining").wait_for(state="detached")
    assert not world.get("upstreams")[0]["drain"]
    # And it is written down.
    page.goto(f"{world.gateway.control_url}/#audit")
    row_of(page, "Audit trail", "config.apply").first.wait_for()
    page.goto(f"{world.gateway.control_url}/#config")
    row_of(page, "Changes", "upstream gpu-a was changed").first.wait_for()
    row_of(page, "Changes", "(in force)").wait_for()
    row_of(page, "Settings", "injection.max_rate_rps").wait_for()
    page.get_by_role("button", name="Roll back to revision 0").click()
    dialog.get_by_role("button", name="Roll back", exact=True).click()
    row_of(page, "Changes", "back to revision 0").wait_for()


def test_an_injection_from_start_to_stop(show: Callable[..., Any], world: World) -> None:
    page = show("act")
    form = page.locator("#inject")
    form.get_by_label("Model").fill("small")
    form.get_by_label("Rate, requests/s").fill("500")
    form.get_by_role("button", name="Start").click()
    dialog = page.locator("dialog#confirm")
    assert "500 requests/s on average" in dialog.inner_text()
    dialog.get_by_role("button", name="Start", exact=True).click()
    dialog.get_by_text("Refused: ").wait_for()
    assert "max_rate_rps" in dialog.inner_text(), "the API's own words"
    dialog.get_by_role("button", name="Cancel").click()
    form.get_by_label("Rate, requests/s").fill("20")
    form.get_by_label("Duration, s").fill("200")
    form.get_by_label("Prompt, tokens").fill("20")
    form.get_by_label("Answer, tokens").fill("5")
    form.get_by_role("button", name="Start").click()
    dialog.get_by_role("button", name="Start", exact=True).click()
    dialog.wait_for(state="hidden")
    stop = page.get_by_role("button", name="Stop injection")
    stop.wait_for()
    wait_until(lambda: world.get("injections")[0]["ok"] > 20, 60.0, "it sends")
    page.goto(f"{world.gateway.control_url}/#live")
    page.wait_for_function("() => state.points.some(point => point.injected_rps > 5)")
    assert drawn(page, "Injected against live")
    page.goto(f"{world.gateway.control_url}/#act")
    stop.click()
    dialog.get_by_role("button", name="Stop", exact=True).click()
    dialog.wait_for(state="hidden")
    assert world.get("injections")[0]["ended_at"] is not None
    row_of(page, "Injections", "stopped").wait_for()


def test_a_range_is_chosen_shown_and_exported(show: Callable[..., Any], world: World) -> None:
    wait_until(lambda: len(world.gateway.rows()) > 60, 60.0, "rows in the database")
    page = show("history")
    assert drawn(page, "Requests")
    page.get_by_role("button", name="6 hours").click()
    page.wait_for_selector("button[data-preset='6h'][aria-pressed=true]")
    now_s = int(time.time())
    start_s, end_s = now_s - 3600, now_s - 2
    as_local = "at => local(at)"  # as the page writes it into its fields
    page.locator("#view-history input[name=from]").fill(page.evaluate(as_local, start_s))
    page.locator("#view-history input[name=to]").fill(page.evaluate(as_local, end_s))
    page.locator("#view-history").get_by_role("button", name="Show", exact=True).click()
    page.wait_for_function(f"() => location.hash === '#history?from={start_s}&to={end_s}'")
    time.sleep(2.5)  # what ended in the range is in the database
    for name, read in (("burstgpt", pl.read_csv), ("parquet", pl.read_parquet)):
        page.locator("#export select[name=format]").select_option(name)
        with page.expect_download() as download:
            page.get_by_role("link", name="Download this range").click()
        found = read(io.BytesIO(Path(download.value.path()).read_bytes()))
        rows = world.gateway.rows(Filter(start_s=start_s, end_s=end_s, origins=("client",)))
        assert found.height == len(rows) > 50
    assert found["request_id"].to_list() == [row.request_id for row in rows]
    page.reload()
    # The time, not the text: a field leaves out the seconds of a full minute.
    page.wait_for_function(
        "end => new Date(document.querySelector('#view-history input[name=to]').value) / 1e3 === end", arg=end_s
    )
    page.get_by_role("button", name="1 hour").click()
    row_of(page, "Models", "small").first.wait_for()


def test_a_failure_opens_its_record(show: Callable[..., Any], world: World) -> None:
    world.load.ask(WICKED)
    wait_until(lambda: world.get("requests", failures=True) != [], 60.0, "a failure in the database")
    page = show("failures")
    table = page.get_by_role("region", name="Failed requests")
    table.get_by_role("button").first.click()
    dialog = page.locator("dialog#record")
    text = dialog.inner_text()
    assert f"upstream_error: {WICKED}" in text
    assert "request_id" in text
    assert "not known" in text, "of what is unknown that is said"
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    form = page.locator("#failure-filter")
    form.get_by_label("Outcome").select_option("truncated")
    form.get_by_role("button", name="Show").click()
    page.get_by_text("No failures in this range").wait_for()
    form.get_by_label("Outcome").select_option("")
    form.get_by_label("Model").fill(WICKED)
    form.get_by_role("button", name="Show").click()
    table.get_by_role("button").first.wait_for()
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_fits_in_both_themes(show: Callable[..., Any], world: World, theme: str, width: int) -> None:
    page = show(width=width, color_scheme=theme)
    page.wait_for_selector("#stream[data-state=live]")
    for view in VIEWS:
        page.goto(f"{world.gateway.control_url}/#{view}")
        page.wait_for_selector(f"#view-{view}:not([aria-busy])")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{view} scrolls down only"
    back = "getComputedStyle(document.body).backgroundColor"
    assert (page.evaluate(back) == "rgb(243, 245, 247)") == (theme == "light")
    switch = page.get_by_role("button", name="Theme: auto")
    switch.click()
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(back) == "rgb(15, 19, 22)"
    page.reload()
    page.wait_for_selector("#stream[data-state=live]")
    assert page.evaluate(back) == "rgb(15, 19, 22)", "the choice is kept"


def test_keys_alone_reach_everything(show: Callable[..., Any]) -> None:
    page = show("act")
    page.wait_for_selector("#stream[data-state=live]")
    page.get_by_role("button", name="Drain gpu-b").wait_for()
    focused = (
        "[document.activeElement.tagName, document.activeElement.innerText || document.activeElement.name].join(' ')"
    )
    visible = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focused).strip())
        assert page.evaluate(visible) or reached[-1].startswith("BODY"), f"no focus ring: {reached[-1]}"
        if reached[-1].startswith("BUTTON Drain"):
            break
    assert reached[0] == "A To the content"
    wanted = ["A Live", "A Audit", "INPUT model", "INPUT rate_rps", "BUTTON Start …", "BUTTON Drain …"]
    assert [each for each in reached if each in wanted] == wanted
    # The button keeps the focus while the table is written anew each second; a dialog gives it back.
    time.sleep(1.2)
    page.keyboard.press("Enter")
    page.locator("dialog#confirm").wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate(focused).strip() == "BUTTON Drain …"


def test_the_page_says_when_the_stream_is_away_and_comes_back(show: Callable[..., Any], world: World) -> None:
    page = show()
    page.wait_for_selector("#stream[data-state=live]")
    control = world.gateway.pid("control")
    os.kill(control, signal.SIGSTOP)
    try:
        page.get_by_role("alert").get_by_text("The live stream is away").wait_for()
        assert page.locator("#stream").inner_text() == "away"
    finally:
        os.kill(control, signal.SIGCONT)
    page.wait_for_selector("#stream[data-state=live]")
    page.locator("#banner").wait_for(state="hidden")


def test_a_burst_is_marked(show: Callable[..., Any], world: World) -> None:
    page = show()
    page.wait_for_function("() => state.live && state.live.baseline_rps !== null", timeout=90_000)
    world.load.rate_rps = 80.0
    try:
        page.locator("#burst").wait_for()
        assert "Burst: " in page.locator("#toast").inner_text()
        page.locator(".chart .annotation", has_text="burst").first.wait_for()
    finally:
        world.load.rate_rps = 12.0


@pytest.mark.parametrize(("role", "is_read_only"), [("viewer", False), ("admin", True)])
def test_who_may_only_look_sees_no_buttons(browser: Any, tmp_path: Path, role: str, is_read_only: bool) -> None:
    made = burstgate("keys", "admin", "create", "wall", "--role", role, "--data-dir", tmp_path)
    token = made.stdout.split()[-1]
    env = {"BURSTGATE_CONTROL__REQUIRE_TOKEN": "true", "BURSTGATE_INJECTION__ALLOWED": "true"}
    flags = ("--read-only",) if is_read_only else ()
    with (
        Simulator("--models", "small") as simulator,
        Installation(simulator.url, data_dir=tmp_path, env=env, flags=flags) as gateway,
        contextlib.closing(browser.new_context()) as context,
    ):
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(gateway.control_url)
        assert page.url.endswith("/login")
        page.get_by_label("Token").fill("not one")
        page.get_by_role("button").click()
        assert page.url.endswith("/login")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button").click()
        page.wait_for_selector("#stream[data-state=live]")
        row_of(page, "Upstreams", "up").first.wait_for()
        assert page.get_by_role("button", name="Drain").count() == 0
        for view, words in (("act", "read-only" if is_read_only else "Your role is viewer"), ("config", "Settings")):
            page.goto(f"{gateway.control_url}/#{view}")
            page.locator("main", has_text=words).wait_for()
        assert page.locator("#inject").get_by_role("button").all() == [] or not page.locator("#inject").is_visible()
        assert page.get_by_role("button", name="Roll back").count() == 0
        # What the page does not offer, the session can not do either.
        refused = page.evaluate(
            "async () => (await fetch('/api/v1/injections', {method: 'POST', body: '{}',"
            " headers: {'content-type': 'application/json'}})).status"
        )
        assert refused == 403
