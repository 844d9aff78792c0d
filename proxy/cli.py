"""The `burstgate` command: parses, wires, reports. Exit status 0 good, 1 failed, 2 wrong usage or configuration.

Of a replay also 3, when it was itself the bottleneck; of a comparison, when it cannot be told.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from proxy.commands import analysis, data, injection, keys, load, operate, service, traces
from proxy.commands.common import app
from proxy.config_error import ConfigError
from storage.errors import ArchiveError, DatabaseUnavailable, DatabaseUrlError, SchemaError
from traces.codec import TraceFormatError

__all__ = ["app", "main"]
_COMMANDS = (service, traces, analysis, load, injection, data, keys, operate)
"""Whose import makes the commands."""

EXPECTED = (
    ConfigError,
    DatabaseUrlError,
    DatabaseUnavailable,
    ArchiveError,
    SchemaError,
    TraceFormatError,
    ValueError,
    OSError,
)
"""Errors whose text is for the user."""

_USAGE: tuple[type[Exception], ...] = (ConfigError, DatabaseUrlError)

# Newer typers carry their own copy of click, and name few of its classes; this base is the same in either.
_WrongCall: type[Exception] = typer.BadParameter.__mro__[2]


def _wrong_call(error: Any) -> str:
    """One line for a command line that can not be parsed; nothing where its help has been shown."""
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"burstgate: {text}{hint}" if text and type(error).__name__ != "NoArgsIsHelpError" else ""


def main() -> None:
    """Run the command; every expected error is one line on standard error."""
    from replay.runner import ReplayError

    try:
        status = app(prog_name="burstgate", standalone_mode=False)
    except _WrongCall as error:
        if line := _wrong_call(error):
            print(line, file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (*EXPECTED, ReplayError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"burstgate: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _USAGE) else 1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
