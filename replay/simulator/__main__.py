"""`python -m replay.simulator`: runs the simulated vLLM server. Every flag is a field of SimulatorConfig."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from replay.simulator.server import SimulatorConfig, serve

_TYPES: dict[str, type[int] | type[float]] = {"int": int, "float": float}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replay.simulator",
        description="A vLLM-like OpenAI server on a simulated GPU: any model name, no weights, no GPU.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument(
        "--fast", action="store_true", help="steps take no time and nothing waits; the other flags still apply"
    )
    for entry in fields(SimulatorConfig):
        default, unit, text = entry.default, entry.metadata["unit"], entry.metadata["help"]
        flag, name = f"--{entry.name.replace('_', '-')}", str(entry.type)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{text} (default: {_shown(default, unit)})"}
        if name == "bool":
            parser.add_argument(flag, action="store_true", **options)
        elif name in _TYPES:
            parser.add_argument(flag, type=_TYPES[name], metavar=unit.upper() or "N", **options)
        else:
            parser.add_argument(flag, nargs="+", metavar="NAME", **options)
    return parser


def _shown(default: Any, unit: str) -> str:
    if isinstance(default, bool):
        return "off"
    if isinstance(default, tuple):
        return " ".join(default)
    return f"{default} {unit}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; the process's exit status: 2 for a wrong flag, value or address."""
    given = vars(_parser().parse_args(arguments))
    host, port, fast = given.pop("host"), given.pop("port"), given.pop("fast")
    if "models" in given:
        given["models"] = tuple(given["models"])
    try:
        config = SimulatorConfig.fast(**given) if fast else SimulatorConfig(**given)
        serve(config, host, port, announce=lambda line: print(line, flush=True))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
