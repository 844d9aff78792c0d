"""The control plane's routes for settings and upstreams: show, validate, apply, roll back.

A change is a revision of proxy/steering.py. It is checked against the settings in force, written, and the supervisor is
asked to load its configuration again; the answer comes when every worker says that it works with it, or names those
that do not. What the supervisor refuses is taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from proxy.config_error import ConfigError
from proxy.control_schema import answers
from proxy.settings import (
    NEED_RESTART,
    NEED_STOP,
    Settings,
    UpstreamSettings,
    changes,
    setting_keys,
    show_setting,
    show_value,
    value_of,
)
from proxy.steering import Revision, StaleRevision, change, check_changes, read_revisions, roll_back
from proxy.view import UpstreamStatus, WorkerView, digest_of, read_views
from wire.http import parse_base_url

APPLY_TIMEOUT_S = 5.0
SAME_S = 1.0
_POLL_S = 0.02


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Changes(_Body):
    """Settings to change."""

    values: dict[str, Any] = Field(description="dotted keys and values; null takes a key back to the configuration")
    keep: bool = Field(False, description="the change outlives a stop and a start")
    note: str = Field("", max_length=500, description="why, for the history")
    expected: int | None = Field(None, ge=0, description="the revision that the change is meant for; another is a 409")


class NewUpstream(_Body):
    """An upstream to add: its settings, as in the configuration file."""

    upstream: dict[str, Any] = Field(description="url, and optionally name, weight, models, drain, ca_file, ...")
    keep: bool = False


class UpstreamChange(_Body):
    """What changes of an upstream."""

    weight: float | None = Field(None, gt=0, le=100)
    drain: bool | None = None
    models: list[str] | None = None
    keep: bool = False


class SettingRow(msgspec.Struct, frozen=True):
    """One setting, as it is shown."""

    key: str
    value: str
    changes: Literal["live", "restart", "stop"]
    """What it takes to change it."""
    is_steered: bool
    """Changed through the control plane."""


class ConfigView(msgspec.Struct, frozen=True):
    """Every setting, as it is in force."""

    revision: int
    """0: nothing was changed through the control plane."""
    digest: str
    settings: tuple[SettingRow, ...]


class RevisionView(msgspec.Struct, frozen=True):
    """A revision without secrets."""

    number: int
    at: float
    actor: str
    note: str
    values: dict[str, str]
    kept: tuple[str, ...]


class Applied(msgspec.Struct, frozen=True):
    """What came of a change."""

    revision: int
    changed: tuple[str, ...]
    workers_late: tuple[int, ...]
    """Process ids of the workers that do not work with it yet."""
    took_s: float


class Validated(msgspec.Struct, frozen=True):
    """What a change would do."""

    ok: bool
    changes: tuple[str, ...]


class UpstreamAtWorker(msgspec.Struct, frozen=True):
    """As one worker sees it."""

    pid: int
    view: UpstreamStatus


class UpstreamView(msgspec.Struct, frozen=True):
    """An upstream, and what each worker makes of it."""

    name: str
    url: str
    weight: float
    drain: bool
    in_flight: int
    workers: tuple[UpstreamAtWorker, ...]


def _reply(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json", status_code=status)


def _row(settings: Settings, key: str, steered: dict[str, Any]) -> SettingRow:
    group = key.partition(".")[0]
    needs: Literal["live", "restart", "stop"] = "live"
    if group in NEED_STOP:
        needs = "stop"
    elif group in NEED_RESTART:
        needs = "restart"
    return SettingRow(key, show_setting(key, value_of(settings, key)), needs, key in steered)


def _shown(revision: Revision) -> RevisionView:
    values = {key: show_setting(key, value) for key, value in revision.values.items()}
    return RevisionView(revision.number, revision.at, revision.actor, revision.note, values, tuple(revision.kept))


def _name_of(upstream: UpstreamSettings) -> str:
    return upstream.name or parse_base_url(upstream.url).text


def _seen(views: Sequence[WorkerView], name: str) -> tuple[UpstreamAtWorker, ...]:
    return tuple(UpstreamAtWorker(view.pid, each) for view in views for each in view.upstreams if each.name == name)


class Steering:
    """Changes to a running installation.

    current: the settings in force, as this process was told. reload: asks the supervisor to load its configuration;
    None where there is no supervisor, and nothing can be changed. audit: takes (actor, action, detail).
    """

    def __init__(
        self,
        current: Callable[[], Settings],
        reload: Callable[[], None] | None,
        audit: Callable[[str, str, dict[str, Any]], None],
    ) -> None:
        self.current = current
        self._reload = reload
        self._audit = audit
        self._turn = asyncio.Lock()

    async def apply(self, changed: Changes, actor: str) -> Applied:
        """Apply and wait; what came of it. Raises HTTPException."""
        async with self._turn:
            before = self.current()
            wanted = self._checked(changed)
            data_dir = before.data_dir
            try:
                made = await asyncio.to_thread(
                    change, data_dir, changed.values,
                    actor=actor, note=changed.note, keep=changed.keep, expected=changed.expected,
                )  # fmt: skip
            except StaleRevision as error:
                raise HTTPException(409, str(error)) from None
            self._audit(actor, "config.apply", {"revision": made.number, "keys": sorted(changed.values)})
            keys = [key for key, value in changed.values.items() if value is not None]
            return await self._took(before, made, wanted, keys, goes_back=len(keys) < len(changed.values))

    async def back(self, number: int, actor: str) -> Applied:
        """Back to a revision. Raises HTTPException."""
        async with self._turn:
            self._must_reload()
            before = self.current()
            try:
                made = await asyncio.to_thread(roll_back, before.data_dir, number, actor=actor)
            except KeyError:
                raise HTTPException(404, f"revision {number} is not kept any more") from None
            self._audit(actor, "config.rollback", {"revision": made.number, "to": number})
            wanted = check_changes(before, made.values)
            return await self._took(before, made, wanted, list(made.values), goes_back=True)

    def _must_reload(self) -> Callable[[], None]:
        if self._reload is None:
            raise HTTPException(
                503, "this control plane runs without its supervisor: nothing can be changed through it"
            )
        return self._reload

    def _checked(self, changed: Changes) -> Settings:
        self._must_reload()
        try:
            return check_changes(self.current(), changed.values)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from None

    async def _took(
        self, before: Settings, made: Revision, wanted: Settings, keys: list[str], *, goes_back: bool
    ) -> Applied:
        """Reload and wait until these keys are as wanted.

        goes_back: others go back to the configuration, of which only the supervisor knows what it says; they are waited
        for by the settings being other ones, but no longer than `SAME_S`: they may be the same.
        """
        begun_s = time.monotonic()

        def is_there(now: Settings) -> bool:
            if goes_back and now is before and time.monotonic() < begun_s + SAME_S:
                return False
            return all(value_of(now, key) == value_of(wanted, key) for key in keys)

        self._must_reload()()
        deadline_s = begun_s + APPLY_TIMEOUT_S
        while not is_there(self.current()):
            if time.monotonic() > deadline_s:
                await asyncio.to_thread(roll_back, before.data_dir, made.number - 1, actor="control plane")
                raise HTTPException(409, "the supervisor did not take the change, which was taken back: see its log")
            await asyncio.sleep(_POLL_S)
        late = await self._wait_for_workers(deadline_s)
        changed = tuple(map(str, changes(before, self.current())))
        return Applied(made.number, changed, tuple(late), time.monotonic() - begun_s)

    async def _wait_for_workers(self, deadline_s: float) -> list[int]:
        """The process ids of the workers that do not work with the settings in force."""
        while True:
            digest = digest_of(self.current())
            views = await asyncio.to_thread(read_views, self.current().data_dir)
            late = [view.pid for view in views if view.settings != digest]
            if not late or time.monotonic() > deadline_s:
                return late
            await asyncio.sleep(_POLL_S)


def config_router(steering: Steering, actor_of: Callable[[Request], str]) -> APIRouter:
    """`/api/v1/config` and `/api/v1/upstreams`. actor_of: who asks, for the history."""
    router = APIRouter(prefix="/api/v1", tags=["configuration"])

    @router.get("/config", summary="Every setting, and the revision in force", responses=answers(ConfigView))
    def show() -> Response:
        settings = steering.current()
        revisions = read_revisions(settings.data_dir)
        steered = revisions[-1].values if revisions else {}
        return _reply(
            ConfigView(
                revisions[-1].number if revisions else 0,
                digest_of(settings),
                tuple(_row(settings, key, steered) for key in setting_keys()),
            )
        )

    @router.get("/config/history", summary="What was changed, newest first", responses=answers(list[RevisionView]))
    def history() -> Response:
        return _reply([_shown(each) for each in reversed(read_revisions(steering.current().data_dir))])

    @router.post("/config/validate", summary="Would these changes do? Nothing is changed", responses=answers(Validated))
    def check(changed: Changes) -> Response:
        settings = steering.current()
        try:
            wanted = check_changes(settings, changed.values)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from None
        return _reply(Validated(True, tuple(map(str, changes(settings, wanted)))))

    @router.post("/config", summary="Apply changes to every worker", responses=answers(Applied, 409, 503))
    async def apply(changed: Changes, request: Request) -> Response:
        return _reply(await steering.apply(changed, actor_of(request)))

    @router.post(
        "/config/rollback/{revision}",
        summary="Back to an earlier revision; 0 is the configuration alone",
        responses=answers(Applied, 404, 409, 503),
    )
    async def rollback(revision: Annotated[int, Path(ge=0)], request: Request) -> Response:
        return _reply(await steering.back(revision, actor_of(request)))

    @router.get("/upstreams", summary="Each upstream, as each worker sees it", responses=answers(list[UpstreamView]))
    async def upstreams() -> Response:
        settings = steering.current()
        views = await asyncio.to_thread(read_views, settings.data_dir)
        return _reply(
            [
                UpstreamView(
                    _name_of(upstream), show_value(upstream.url), upstream.weight, upstream.drain,
                    sum(each.view.in_flight for each in seen), seen,
                )
                for upstream in settings.upstreams
                for seen in [_seen(views, _name_of(upstream))]
            ]
        )  # fmt: skip

    def as_given(upstream: UpstreamSettings) -> dict[str, Any]:
        return upstream.model_dump(mode="json", exclude_defaults=True)

    async def with_upstreams(wanted: list[dict[str, Any]], keep: bool, note: str, request: Request) -> Response:
        return _reply(
            await steering.apply(
                Changes(values={"upstreams": wanted}, keep=keep, note=note, expected=None), actor_of(request)
            )
        )

    def place_of(name: str) -> int:
        for place, upstream in enumerate(steering.current().upstreams):
            if _name_of(upstream) == name:
                return place
        raise HTTPException(404, f"no upstream is named '{name}'")

    @router.post("/upstreams", summary="Add an upstream", responses=answers(Applied, 409, 503))
    async def add(new: NewUpstream, request: Request) -> Response:
        wanted = [as_given(each) for each in steering.current().upstreams]
        return await with_upstreams([*wanted, new.upstream], new.keep, "an upstream was added", request)

    @router.patch("/upstreams/{name:path}", summary="Weight, drain, models", responses=answers(Applied, 404, 409, 503))
    async def alter(name: str, changed: UpstreamChange, request: Request) -> Response:
        place = place_of(name)
        wanted = [as_given(each) for each in steering.current().upstreams]
        wanted[place] |= changed.model_dump(exclude_none=True, exclude={"keep"})
        return await with_upstreams(wanted, changed.keep, f"upstream {name} was changed", request)

    @router.delete(
        "/upstreams/{name:path}",
        summary="Remove an upstream; what it has in flight goes on",
        responses=answers(Applied, 404, 409, 503),
    )
    async def remove(name: str, request: Request, keep: Annotated[bool, Query()] = False) -> Response:
        place = place_of(name)
        wanted = [as_given(each) for each in steering.current().upstreams]
        if len(wanted) == 1:
            raise HTTPException(409, "the last upstream can not be removed")
        del wanted[place]
        return await with_upstreams(wanted, keep, f"upstream {name} was removed", request)

    return router
