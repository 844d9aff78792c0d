"""`python -m replay.simulator`: the simulated vLLM, live over HTTP or, with --trace, on a virtual clock.

Every flag of the simulated machine is a field of SimulatorConfig; a preset and a fit are other defaults for some of
them, and a flag that is given wins. A trace is run to its end as fast as the host can: the report goes to standard
output.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from replay.simulator.config import SimulatorConfig

if TYPE_CHECKING:
    from replay.simulator.virtual import VirtualOptions

_TYPES: dict[str, type[int] | type[float]] = {"int": int, "float": float}
_ALIASES = {"max_batched_tokens": "--max-num-batched-tokens", "num_gpu_blocks_override": "--kv-blocks"}
"""Other spellings of a flag: vLLM's own names, and a short one."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from replay.simulator.costs import PRESETS, ROW_FIELDS

    parser = _Parser(
        prog="burstgate simulate",
        description="A vLLM-like OpenAI server on a simulated GPU: any model name, no weights, no GPU. With --trace, a"
        " trace is run through it on a virtual clock instead.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: 8000)")
    parser.add_argument(
        "--fast", action="store_true", help="steps take no time and nothing waits; the other flags still apply"
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="costs and memory that roughly imitate a GPU and the size of a model"
    )
    parser.add_argument(
        "--fit",
        type=Path,
        metavar="FILE",
        help="costs fitted to a measured run: the samples of `burstgate replay --samples`, or a CSV of steps with the"
        f" columns {','.join(ROW_FIELDS)}",
    )
    _add_machine(parser.add_argument_group("the simulated machine"))
    trace = parser.add_argument_group("a trace on a virtual clock")
    for flag, arguments in _TRACE_FLAGS.items():
        trace.add_argument(flag, **arguments)
    return parser


def _add_machine(group: argparse._ActionsContainer) -> None:
    for entry in fields(SimulatorConfig):
        default, unit, text = entry.default, entry.metadata["unit"], entry.metadata["help"]
        flags = [f"--{entry.name.replace('_', '-')}", *filter(None, [_ALIASES.get(entry.name)])]
        name = str(entry.type)
        options: dict[str, Any] = {
            "dest": entry.name,
            "default": argparse.SUPPRESS,
            "help": f"{text} (default: {_shown(default, unit)})",
        }
        if name == "bool":
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        elif name in _TYPES:
            group.add_argument(*flags, type=_TYPES[name], metavar=unit.upper() or "N", **options)
        else:
            group.add_argument(*flags, nargs="+", metavar="NAME", **options)


_TRACE_FLAGS: dict[str, dict[str, Any]] = {
    "--trace": {"type": Path, "metavar": "FILE", "help": "the trace to run, in any format that burstgate reads"},
    "--format": {"help": "format of the trace; known by its contents otherwise"},
    "--speed": {"type": float, "default": 1.0, "metavar": "FACTOR", "help": "divides the trace's time"},
    "--limit": {"type": int, "metavar": "ROWS", "help": "at most this many rows"},
    "--start": {"type": float, "default": 0.0, "metavar": "S", "help": "skip this many seconds of trace time"},
    "--duration": {"type": float, "metavar": "S", "help": "seconds of trace time to take"},
    "--ties": {
        "choices": ("spread", "keep"),
        "default": "spread",
        "help": "spread equal whole-second stamps inside their second, or keep them",
    },
    "--timeout": {"type": float, "metavar": "S", "help": "a client leaves after this long"},
    "--hash-block-tokens": {
        "type": int,
        "default": 512,
        "metavar": "TOKENS",
        "help": "prompt tokens that one of the trace's prefix blocks stands for",
    },
    "--output": {"type": Path, "metavar": "FILE", "help": "write one JSON line a request"},
    "--json": {"action": "store_true", "help": "print the report as JSON"},
}


def _shown(default: Any, unit: str) -> str:
    if isinstance(default, bool):
        return "off"
    if isinstance(default, tuple):
        return " ".join(default)
    return f"{default} {unit}".rstrip()


def machine_config(preset: str | None, fit: Path | None, arguments: list[str], *, prog: str) -> SimulatorConfig:
    """The simulated machine that a preset, a fit and the simulator's flags for it describe.

    Raises ValueError naming the flag or the setting, the value and the rule; OSError for a fit that cannot be read.
    """
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    _add_machine(parser)
    return _config(preset, fit, vars(parser.parse_args(arguments)))


def machine_flags() -> tuple[str, ...]:
    """The flags that `machine_config` takes."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_machine(parser)
    return tuple(flag for action in parser._actions for flag in action.option_strings)


def _config(preset: str | None, fit: Path | None, given: dict[str, Any], *, is_fast: bool = False) -> SimulatorConfig:
    """The simulated machine. Raises ValueError or OSError naming the flag's field or the file."""
    from replay.simulator.costs import PRESETS

    own = {entry.name: given[entry.name] for entry in fields(SimulatorConfig) if entry.name in given}
    if "models" in own:
        own["models"] = tuple(own["models"])
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(sorted(PRESETS))}, got {preset!r}")
    settings: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
    if fit is not None:
        from replay.simulator.measured import fit_file

        settings |= fit_file(fit).settings()
    settings |= own
    return SimulatorConfig.fast(**settings) if is_fast else SimulatorConfig(**settings)


def _trace_options(config: SimulatorConfig, given: dict[str, Any]) -> VirtualOptions:
    """How the trace is run. Raises ValueError naming the option."""
    from replay.schedule import PlanOptions
    from replay.simulator.virtual import VirtualOptions
    from traces.codec import FORMATS

    if given["format"] is not None and given["format"] not in FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, got {given['format']!r}")
    return VirtualOptions(
        PlanOptions(
            speed=given["speed"],
            start_s=given["start"],
            duration_s=given["duration"],
            limit=given["limit"],
            ties=given["ties"],
            seed=config.seed,
        ),
        given["timeout"],
        given["hash_block_tokens"],
    )


def _run_trace(config: SimulatorConfig, options: VirtualOptions, given: dict[str, Any]) -> None:
    from replay.simulator.report import as_json, as_text
    from replay.simulator.virtual import RequestsFile, simulate
    from traces.codec import read_trace

    began_s = time.monotonic()
    batches = read_trace(given["trace"], format=given["format"])
    if given["output"] is None:
        summary = simulate(batches, config, options)
    else:
        with RequestsFile(given["output"]) as output:
            summary = simulate(batches, config, options, output.write)
    print(as_json(summary) if given["json"] else as_text(summary, config, time.monotonic() - began_s))


def main(arguments: list[str] | None = None) -> int:
    """Runs it; the process's exit status: 2 for a wrong flag, value or address, 1 for a trace that can not be run."""
    status = 2
    try:
        given = vars(_parser().parse_args(arguments))
        config = _config(given["preset"], given["fit"], given, is_fast=given["fast"])
        if given["trace"] is not None:
            options = _trace_options(config, given)
            status = 1
            _run_trace(config, options, given)
            return 0
        _refuse_trace_flags(given)
        from replay.simulator.server import serve

        serve(config, given["host"], given["port"], announce=lambda line: print(line, flush=True))
    except OSError as error:
        text = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"burstgate: {text}", file=sys.stderr)
        return status
    except ValueError as error:
        print(f"burstgate: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        return 130
    return 0


def _refuse_trace_flags(given: dict[str, Any]) -> None:
    for flag, arguments in _TRACE_FLAGS.items():
        if given[flag[2:].replace("-", "_")] not in (None, False, arguments.get("default")):
            raise ValueError(f"{flag}: it needs --trace")


if __name__ == "__main__":
    sys.exit(main())
