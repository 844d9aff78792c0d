"""The dashboard's files over HTTP: types, caching, policy, and that they name nothing elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import plotly
import pytest

from proxy.settings import Settings
from tests.proxy.test_control import serving


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    settings = Settings(upstreams=("http://user-a:8000",), data_dir=tmp_path_factory.mktemp("data"))
    with serving(settings) as client:
        yield client


def files(client: httpx.Client) -> list[str]:
    return [f"/{address}" for address in re.findall(r'(?:href|src)="(dashboard/[^"]+)"', client.get("/").text)]


def test_the_page_is_fresh_and_fetches_from_here_only(client: httpx.Client) -> None:
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["cache-control"] == "no-store"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert page.headers["x-frame-options"] == "DENY"
    assert re.findall(r'(?:href|src)="https?:', page.text) == []
    assert not re.search(r"<script[^>]*>[^<]|\son\w+=", page.text), "no script in the page itself"


def test_files_are_packed_and_kept_under_an_address_of_what_they_hold(client: httpx.Client) -> None:
    found = {address.rsplit("/", 1)[1]: client.get(address) for address in files(client)}
    assert sorted(found) == ["dashboard.css", "dashboard.js", "plotly.min.js"]
    for name, answer in found.items():
        assert answer.status_code == 200
        kind = "text/css" if name.endswith("css") else "text/javascript"
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["content-encoding"] == "gzip"
        plain = client.get(answer.url.path, headers={"accept-encoding": "identity"})
        assert plain.content == answer.content
        assert "content-encoding" not in plain.headers
    assert f"/plotly-{plotly.__version__}/" in found["plotly.min.js"].url.path
    assert b"Plotly" in found["plotly.min.js"].content
    assert "innerHTML" not in found["dashboard.js"].text


@pytest.mark.parametrize("path", ["index.html", "0/dashboard.js", "../control.py", "%2e%2e/control.py", ""])
def test_nothing_else_is_a_file_of_the_page(client: httpx.Client, path: str) -> None:
    assert client.get(f"/dashboard/{path}").status_code == 404
