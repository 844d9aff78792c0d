"""What the control plane's routes answer, in its OpenAPI document: msgspec's types, and OpenAI's envelope for errors.

Routes answer with bytes that msgspec has made, of which FastAPI knows nothing. A route says
`responses=answers(Type, 404)`; `document(app)` gathers the types under `components` and adds what may happen at every
route.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_REF = "#/components/schemas/{name}"
_MEANINGS = {
    400: "what was sent is wrong",
    401: "a token is asked for, or is not known",
    403: "not with this token's role, from this site, or while the control plane is read-only",
    404: "there is no such thing",
    409: "not as things stand",
    413: "too much at once",
    415: "expected application/json",
    422: "what was sent is wrong",
    429: "too many wrong tokens",
    500: "it failed",
    503: "the database, or the supervisor, is away",
}
_EVERYWHERE = (400, 401, 403, 429)
"""What the gate in front of every route may say (proxy/admin_auth.py)."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: int | str | None


class Error(msgspec.Struct, frozen=True):
    """OpenAI's error envelope."""

    error: ErrorDetail


def schema(kind: Any) -> dict[str, Any]:
    """A type's JSON schema, with those that it refers to under `$defs`."""
    (found,), defined = msgspec.json.schema_components((kind,), ref_template=_REF)
    return {**found, "$defs": defined}


def _content(kind: Any, media: str = "application/json") -> dict[str, Any]:
    return {media: {"schema": {"type": "string"} if kind is str else schema(kind)}}


def answers(kind: Any, *errors: int, status: int = 200, media: str = "application/json") -> dict[int | str, Any]:
    """A route's `responses`. kind: of the body; `str` for text. errors: the statuses of its own."""
    good: dict[int | str, Any] = {status: {"description": "as asked for", "content": _content(kind, media)}}
    return good | {each: _error(each) for each in errors}


def takes(kind: Any) -> dict[str, Any]:
    """A route's `openapi_extra`, where it reads its body itself."""
    return {"requestBody": {"required": True, "content": _content(kind)}}


def _error(status: int) -> dict[str, Any]:
    return {"description": _MEANINGS[status], "content": _content(Error)}


def document(app: FastAPI) -> None:
    """Let the application's OpenAPI document say all of it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
            schemas: dict[str, Any] = made.setdefault("components", {}).setdefault("schemas", {})
            for operation in (each for path in made["paths"].values() for each in path.values()):
                said = operation["responses"]
                said.pop("422", None)  # FastAPI's own envelope, which is not ours
                takes_something = operation.get("parameters") or "requestBody" in operation
                for status in (*_EVERYWHERE, *((422,) if takes_something else ())):
                    said.setdefault(str(status), _error(status))
                operation["responses"] = dict(sorted(said.items()))
            _lift(made["paths"], schemas)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            made["components"]["schemas"] = dict(sorted(schemas.items()))
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _lift(part: Any, schemas: dict[str, Any]) -> None:
    """Move all `$defs` under the components. Raises ValueError for two types of one name."""
    if isinstance(part, dict):
        for name, kind in part.pop("$defs", {}).items():
            known = schemas.setdefault(name, kind)
            if known != kind and ("enum" not in kind or set(known.get("enum", ())) != set(kind["enum"])):
                raise ValueError(f"two types of the admin API are named {name}")
        for each in part.values():
            _lift(each, schemas)
    elif isinstance(part, list):
        for each in part:
            _lift(each, schemas)
