"""The command that injects bursts and faults, by the control plane's API."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from proxy.commands.common import Config, ControlUrl, Json, app, control_url, fail
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    import httpx

    from proxy.injection import Plan, Status

WATCH_S = 0.5


@app.command()
def inject(
    plan: Annotated[Path | None, typer.Argument(help="A plan in YAML or JSON; the flags win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask for.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace whose window is sent.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Workload profile that requests are made from.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    shape: Annotated[
        float | None, typer.Option(help="Gamma shape of the gaps: 1 is Poisson, lower is burstier.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="k-ramp: 2 to 64 requests/s and back.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of the source's time.")] = None,
    start: Annotated[float | None, typer.Option(help="Skip this many seconds of the source's time.")] = None,
    requests: Annotated[int | None, typer.Option(help="At most this many.")] = None,
    request_tokens: Annotated[int | None, typer.Option(help="Of each prompt.  [default: 512]")] = None,
    response_tokens: Annotated[int | None, typer.Option(help="Of each answer.  [default: 128]")] = None,
    speed: Annotated[float | None, typer.Option(help="Divides the source's time.")] = None,
    amplify: Annotated[float | None, typer.Option(help="Multiplies the source's rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Of its requests' records.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until it ends; Ctrl-C stops it.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the injection that runs.")] = False,
    control: ControlUrl = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Inject a burst or faults into a running gateway; without a plan, --watch and --stop the one that runs.

    Exit status: 0 good, 1 stopped, refused or failed, 2 wrong usage.
    """
    import httpx

    flags = {
        "model": model, "trace": trace, "profile": profile, "rate_rps": rate, "shape": shape, "preset": preset,
        "duration_s": duration, "start_s": start, "requests": requests, "request_tokens": request_tokens,
        "response_tokens": response_tokens, "speed": speed, "amplify": amplify, "seed": seed, "run_id": run_id,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    if stop and (plan is not None or given or watch):
        raise ConfigError("--stop: expected by itself, got it with a plan or --watch")
    if not stop and not watch and plan is None and not given:
        raise ConfigError("expected a plan, --rate and the like, --watch or --stop")
    asked = None
    if plan is not None or given:
        try:
            asked = _asked(plan, given)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    with httpx.Client(base_url=control_url(control, config), headers={"x-burstgate-actor": _whoami()}) as client:
        try:
            if stop:
                status = _ask(client, "DELETE", "/api/v1/injections")
            elif asked is not None:
                status = _ask(client, "POST", "/api/v1/injections", msgspec.json.encode(asked))
            else:
                status = _running(client)
            if watch:
                status = _watched(client, status, quiet=json)
        except httpx.HTTPError as error:
            raise fail(f"{client.base_url}: the control plane does not answer: {error}") from None
    print(msgspec.json.encode(status).decode() if json else _line(status))
    if watch and status.state != "completed":
        raise typer.Exit(1)


def _asked(path: Path | None, given: dict[str, Any]) -> Plan:
    """The plan of a file and flags; files it names are found from its own folder. Raises ValueError, OSError."""
    from proxy.injection import Plan, decode_plan

    fields: dict[str, Any] = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    if path is not None:
        fields = {**msgspec.to_builtins(decode_plan(path.read_bytes(), str(path))), **fields}
    try:
        plan = msgspec.convert(fields, Plan)
    except msgspec.ValidationError as error:
        raise ValueError(f"plan: {str(error).removeprefix('plan: ')}") from None
    folder = Path() if path is None else path.parent
    own = {
        name: str(((Path() if name in given else folder) / file).absolute()) for name, file in plan.files()
    }  # the control plane works elsewhere
    return msgspec.structs.replace(plan, **own)


def _whoami() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}".encode("ascii", "replace").decode()


def _ask(client: httpx.Client, method: str, path: str, body: bytes | None = None) -> Status:
    """The status that comes back; a refusal is one line and exit status 1."""
    from proxy.injection import Status

    headers = {} if body is None else {"content-type": "application/json"}
    answer = client.request(method, path, content=body, headers=headers, timeout=30.0)
    return msgspec.json.decode(_checked(answer), type=Status)


def _checked(answer: httpx.Response) -> bytes:
    if answer.is_success:
        return answer.content
    try:
        reason = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {answer.status_code} of {answer.url}: expected burstgate's control plane"
    raise fail(" ".join(reason.split()), 2 if answer.status_code in (400, 413, 415) else 1)


def _running(client: httpx.Client) -> Status:
    """The one that runs, else the newest."""
    from proxy.injection import Status

    found = msgspec.json.decode(_checked(client.get("/api/v1/injections", timeout=30.0)), type=list[Status])
    if not found:
        raise fail("no injection of this control plane")
    return next((each for each in found if not each.is_over), found[0])


def _watched(client: httpx.Client, status: Status, *, quiet: bool) -> Status:
    """Follow it to its end."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    path = f"/api/v1/injections/{status.run_id}"
    try:
        said_s = 0.0
        while not status.is_over:
            now_s = time.monotonic()
            if not quiet and now_s - said_s >= (WATCH_S if console.is_terminal else 5.0):
                said_s = now_s
                console.print(_line(status), end="\r" if console.is_terminal else "\n", soft_wrap=True, markup=False)
            time.sleep(WATCH_S)
            status = _ask(client, "GET", path)
    except KeyboardInterrupt:
        print("stopping it", file=sys.stderr)
        status = _ask(client, "DELETE", path)
    if console.is_terminal and not quiet:
        print(file=sys.stderr)
    return status


def _line(status: Status) -> str:
    """How it stands, in one line."""
    parts = [f"{status.run_id} {status.state}"]
    if status.plan.has_load:
        parts.append(
            f"{status.elapsed_s:.0f} s: {status.sent:,} sent, {status.ok:,} ok, {status.failed:,} failed,"
            f" {status.in_flight:,} in flight"
        )
        if status.rate_rps is not None:
            parts.append(f"{status.rate_rps:.1f} requests/s")
        if status.lag_max_s is not None:
            parts.append(f"lag up to {status.lag_max_s * 1000:.1f} ms")
    if (read := status.readings) is not None:
        live = f"live {read['live_rps'] or 0:.1f} requests/s"
        if read["live_failure_rate"] is not None:
            live += f", {read['live_failure_rate']:.1%} failed"
        if read["live_ttft_p95_s"] is not None:
            live += f", first token p95 {read['live_ttft_p95_s']:.2f} s"
        parts.append(live)
    if status.reason is not None:
        parts.append(status.reason)
    return "; ".join(parts)
