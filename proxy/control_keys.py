"""The admin API for keys: made, listed, revoked, rotated. A key is in the answer that makes it, and only there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import sqlalchemy as sa
from fastapi import APIRouter, Request, Response

from proxy.control_schema import answers
from proxy.errors import GatewayError, error_body
from proxy.keeper import KeyKeeper
from proxy.request_head import LOG_TYPES
from storage.errors import DatabaseUnavailable, DatabaseUrlError
from storage.key_file import KeyLimits, Role
from storage.keys import ApiKey, KeyConflict, KeyWanted, create_key, list_keys, revoke_key, rotate_key


@dataclass
class NewKey:
    """A key that is wanted. expires_in_s: seconds from now; without it, never. role: for an administrator's token."""

    name: str
    tenant: str | None = None
    expires_in_s: float | None = None
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    concurrency: int | None = None
    log_type: Literal["conversation", "api"] | None = None
    role: Role | None = None


@dataclass
class Rotation:
    """How long the old key stays valid, seconds."""

    grace_s: float = 86_400.0


class MadeKey(msgspec.Struct, frozen=True):
    """A key, and its token, which nobody will see again."""

    key: ApiKey
    token: str


def keys_router(keeper: KeyKeeper) -> APIRouter:
    """Routes below /api/v1."""
    router = APIRouter(prefix="/api/v1", tags=["keys"])

    def engine_of_keys() -> sa.Engine:
        engine = keeper.engine()
        if engine is None:
            raise DatabaseUnavailable("database: not there yet: the recorder makes it")
        return engine

    async def done(act: Callable[[], object], status: int = 200) -> Response:
        """What it returns, or its error in OpenAI's envelope; workers know of it at once."""

        def work() -> object:
            value = act()
            keeper.look()
            return value

        try:
            value = await asyncio.to_thread(work)
        except KeyConflict as error:
            problem = GatewayError(409, "key_conflict", str(error))
        except ValueError as error:
            problem = GatewayError(400, "invalid_request_error", str(error))
        except (DatabaseUnavailable, DatabaseUrlError, OSError) as error:
            problem = GatewayError(503, "database_unavailable", str(error))
        else:
            return Response(msgspec.json.encode(value), status, media_type="application/json")
        return Response(error_body(problem), problem.status, media_type="application/json")

    @router.get("/whoami", responses=answers(dict[str, str]))
    async def whoami(request: Request) -> dict[str, str]:
        """Who is asking: the token's name and its role."""
        return {"name": request.scope["burstgate.user"], "role": request.scope["burstgate.role"]}

    @router.get("/keys", responses=answers(list[ApiKey], 503))
    async def listed() -> Response:
        """Every key, the newest first."""
        return await done(lambda: list_keys(engine_of_keys(), time.time()))

    @router.post("/keys", status_code=201, responses=answers(MadeKey, 409, 503, status=201))
    async def create(wanted: NewKey) -> Response:
        """Make a key."""
        now_s = time.time()
        expires_at = None if wanted.expires_in_s is None else now_s + wanted.expires_in_s
        limits = KeyLimits(wanted.requests_per_s, wanted.tokens_per_s, wanted.concurrency)
        log_type = None if wanted.log_type is None else LOG_TYPES[wanted.log_type]
        key = KeyWanted(wanted.name, wanted.tenant, expires_at, limits, log_type, wanted.role)
        return await done(lambda: MadeKey(*create_key(engine_of_keys(), key, keeper.secret, now_s)), 201)

    @router.post("/keys/{key_id}/rotate", status_code=201, responses=answers(MadeKey, 409, 503, status=201))
    async def rotate(key_id: str, rotation: Rotation) -> Response:
        """Make a key's successor; the old one ends after the grace period."""
        grace_s = rotation.grace_s
        return await done(
            lambda: MadeKey(*rotate_key(engine_of_keys(), key_id, keeper.secret, grace_s=grace_s, now_s=time.time())),
            201,
        )

    @router.delete("/keys/{key_id}", responses=answers(ApiKey, 409, 503))
    async def revoke(key_id: str) -> Response:
        """End a key now."""
        return await done(lambda: revoke_key(engine_of_keys(), key_id, time.time()))

    return router
