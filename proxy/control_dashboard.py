"""The dashboard: one page at `/` and its files, all of which lie in this package and in plotly's wheel.

The page is never cached; its files have what they hold (plotly: its version) in their address and are kept for a year.
Nothing is fetched from elsewhere, which a Content-Security-Policy says to the browser, too.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import importlib.metadata
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import APIRouter, HTTPException, Request, Response

_FOLDER: Final = Path(__file__).parent / "dashboard"
_TYPES: Final = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
# plotly.js styles its elements by attributes and a style element of its own, and draws icons from data.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_KEPT: Final = "private, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    body: bytes
    packed: bytes
    """The same through gzip."""


def _load(path: Path) -> _File:
    body = path.read_bytes()
    return _File(_TYPES[path.suffix], body, gzip.compress(body, 6, mtime=0))


@functools.cache
def _plotly() -> _File:
    """Its 5 MB are read and packed when somebody first looks."""
    with importlib.resources.as_file(importlib.resources.files("plotly") / "package_data" / "plotly.min.js") as path:
        return _load(path)


@functools.cache
def _page() -> tuple[bytes, dict[str, _File]]:
    """The page, and its small files by address."""
    text = (_FOLDER / "index.html").read_text(encoding="utf-8")
    files = {}
    for name in ("dashboard.css", "dashboard.js"):
        file = _load(_FOLDER / name)
        address = f"{hashlib.sha256(file.body).hexdigest()[:12]}/{name}"
        text = text.replace(f'"dashboard/{name}"', f'"dashboard/{address}"')
        files[address] = file
    text = text.replace('"dashboard/plotly.min.js"', f'"dashboard/{_plotly_address()}"')
    return text.replace("VERSION", html.escape(importlib.metadata.version("burstgate"))).encode(), files


def _plotly_address() -> str:
    return f"plotly-{importlib.metadata.version('plotly')}/plotly.min.js"


def dashboard_router() -> APIRouter:
    """`/`, `/dashboard/...`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/", include_in_schema=False)
    def page() -> Response:
        """The dashboard."""
        headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
        return Response(_page()[0], media_type="text/html", headers=headers)

    @router.get("/dashboard/{address:path}", include_in_schema=False)
    def file(address: str, request: Request) -> Response:
        """A file of the page."""
        found = _plotly() if address == _plotly_address() else _page()[1].get(address)
        if found is None:
            raise HTTPException(404, "no such file of the dashboard: load the page again")
        headers = {"content-type": found.media_type, "cache-control": _KEPT, "vary": "accept-encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(found.packed, headers={**headers, "content-encoding": "gzip"})
        return Response(found.body, headers=headers)

    return router
