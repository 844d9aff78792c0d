"""Commands that watch a running installation, by the control plane's API."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.commands.common import Config, ControlUrl, app, control_url, fail
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    from proxy.glance import Control, Glance


@app.command()
def top(
    control: ControlUrl = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a token, where one is asked for.")] = None,
    interval: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print two readings' difference as text, and end.")] = False,
    config: Config = None,
) -> None:
    """Requests, tokens, in flight, TTFT and failures of a running gateway, by upstream and model, as they happen."""
    from proxy.glance import Control, as_text

    try:
        found = Control(control_url(control, config), _token(token_file))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if once:
        print(as_text(asyncio.run(_glanced(found, interval))))
        return
    if not sys.stdout.isatty():
        raise ConfigError("top: expected a terminal; elsewhere use --once")
    try:
        from proxy.top import Top
    except ImportError as error:
        raise fail(f"top needs the package textual (pip install burstgate[top]), or --once: {error}") from None
    Top(found, interval).run()


def _token(path: Path | None) -> str | None:
    if path is None:
        return None
    text = path.read_text(encoding="utf-8").strip()
    if not text or not text.isascii() or any(char.isspace() for char in text):
        raise ConfigError(f"--token-file: {path}: expected one token, found {'none' if not text else 'something else'}")
    return text


async def _glanced(control: Control, interval_s: float) -> Glance:
    """Two readings' difference. A control plane that is away is one line and exit status 1."""
    from proxy.glance import ControlAway, glance

    try:
        before = await control.read()
        await asyncio.sleep(interval_s)
        return glance(before, await control.read())
    except ControlAway as error:
        raise fail(f"{control.url}: the control plane is away: {error}") from None
    finally:
        await control.close()
