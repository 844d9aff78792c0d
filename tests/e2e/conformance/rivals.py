"""Runs the suite against burstgate and its rivals, and writes `docs/conformance.md`.

    python -m tests.e2e.conformance.rivals [--only burstgate,envoy] [--areas framing] [--out docs/conformance.md]

Each gateway is started twice in front of the suite's upstream: as anyone runs it, and with short timers and a small
limit on bodies where it has such settings. Rivals are installed by `benchmarks/gateway` into `.bench/`. A gateway's
report stays in `.bench/conformance/NAME.json`, and the page is drawn from all that are there: one gateway, or some
areas of it, can be run again by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gateway import rivals as bench
from benchmarks.gateway.install import BENCH, PACKAGES, ROOT, environment
from benchmarks.gateway.processes import BenchError, free_ports, running
from benchmarks.gateway.rivals import Command, Site
from tests.e2e.conformance.conftest import TIGHT
from tests.e2e.conformance.world import BODY_BYTES, CHUNK_S, CONNECT_S, FEATURES, FIRST_BYTE_S, TOTAL_S

RESULTS = BENCH / "conformance"
AREAS = {
    "bytes": "Bytes",
    "disconnects": "Disconnects",
    "timers": "Timers",
    "framing": "HTTP framing",
    "headers": "Headers",
    "smuggling": "No smuggling",
    "backpressure": "Backpressure",
}
"""In the order in which they are run: what a gateway has buffered may keep it busy for minutes, so that comes last."""
SUITE_S = 1800


@dataclass(frozen=True)
class Gateway:
    """How one is started, and what it has."""

    title: str
    version: Callable[[], str]
    command: Callable[[Site, bool], Command]
    """For a place; True: with short timers and limits."""
    offers: frozenset[str]
    settings: str
    """What differs from a default start, for the page."""


def burstgate(site: Site, tight: bool) -> Command:
    command = bench.burstgate(site)
    return Command(command.argv, {name: str(value) for name, value in TIGHT.items()} if tight else {})


def envoy(site: Site, tight: bool) -> Command:
    """The benchmark's, made kinder: it speaks HTTP/1.0, and its limit on heads is the suite's."""
    command = bench.envoy(site)
    path = site.folder / "envoy.json"
    config = json.loads(path.read_text())
    (listener,) = config["static_resources"]["listeners"]
    (cluster,) = config["static_resources"]["clusters"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_protocol_options"] = {"accept_http_10": True}
    manager |= {
        "max_request_headers_kb": 64,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
    }
    if tight:
        route = manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
        cluster["connect_timeout"] = f"{CONNECT_S}s"
        route["idle_timeout"] = f"{CHUNK_S}s"
        route["max_stream_duration"] = {"max_stream_duration": f"{TOTAL_S}s"}
    path.write_text(json.dumps(config, indent=1))
    return command


def vllm_router(site: Site, tight: bool) -> Command:
    """The benchmark's, without what would hide single answers: retries and the circuit breaker."""
    command = bench.vllm_router(site)
    more = ["--disable-retries", "--disable-circuit-breaker"]
    if tight:
        more += ["--request-timeout-secs", str(int(TOTAL_S)), "--max-payload-size", str(BODY_BYTES)]
    return Command((*command.argv, *more), command.env)


def litellm(site: Site, tight: bool) -> Command:
    """The benchmark's, without retries and cooldowns."""
    command = bench.litellm(site)
    path = site.folder / "litellm.json"
    config = json.loads(path.read_text())
    config["router_settings"] = {"num_retries": 0, "disable_cooldowns": True}
    config["litellm_settings"]["num_retries"] = 0
    if tight:
        config["litellm_settings"]["request_timeout"] = FIRST_BYTE_S
        config["model_list"][0]["litellm_params"] |= {"timeout": FIRST_BYTE_S, "stream_timeout": CHUNK_S}
    path.write_text(json.dumps(config, indent=1))
    return command


def fastapi(site: Site, tight: bool) -> Command:
    """In LiteLLM's environment, which has FastAPI, uvicorn and aiohttp."""
    upstream = f"http://127.0.0.1:{site.upstream_port}"
    script = Path(__file__).with_name("fastapi_proxy.py")
    return Command((str(environment("litellm") / "python"), str(script), str(site.port), upstream))


def pinned(name: str) -> Callable[[], str]:
    """The version that the benchmark installs."""
    return lambda: PACKAGES[name][0].rpartition("=")[2]


def fastapi_versions() -> str:
    """As they lie in LiteLLM's environment."""
    ask = "import importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in NAMES))"
    ask = ask.replace("NAMES", "('fastapi', 'aiohttp', 'uvicorn')")
    done = subprocess.run([environment("litellm") / "python", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip()


GATEWAYS = {
    "burstgate": Gateway("burstgate", lambda: importlib.metadata.version("burstgate"), burstgate, FEATURES, "none"),
    "envoy": Gateway(
        "Envoy", pinned("envoy"), envoy, frozenset({"request-id", "connect-timer", "chunk-timer", "total-timer"}),
        "a router only; `accept_http_10`; heads of 64 KiB; request ids kept and returned; no route timeout",
    ),
    "vllm-router": Gateway(
        "vllm-router", pinned("vllm-router"), vllm_router, frozenset({"body-limit", "total-timer"}),
        "retries and circuit breaker off, because the suite's upstream fails on purpose",
    ),
    "litellm": Gateway(
        "LiteLLM", pinned("litellm"), litellm, frozenset({"first-byte-timer", "chunk-timer"}),
        "proxy mode to an OpenAI-compatible backend; retries and cooldowns off; no database",
    ),
    "fastapi": Gateway(
        "FastAPI + aiohttp", fastapi_versions, fastapi, frozenset(),
        "the short proxy in `tests/e2e/conformance/fastapi_proxy.py`",
    ),
}  # fmt: skip


@contextlib.contextmanager
def started(name: str, upstream_port: int, folder: Path) -> Iterator[tuple[int, int]]:
    """Both of a gateway's processes; their ports."""
    with contextlib.ExitStack() as stack:
        ports = free_ports(2)
        for port, kind in zip(ports, ("main", "tight"), strict=True):
            place = folder / kind
            place.mkdir(parents=True)
            command = GATEWAYS[name].command(Site(place, port, upstream_port), kind == "tight")
            stack.enter_context(running(f"{name}-{kind}", command.argv, cores="0-1023", folder=place, env=command.env))
        yield ports[0], ports[1]


def run_suite(name: str, areas: Sequence[str]) -> None:
    """Leaves the gateway's report in RESULTS; what was known of other areas stays."""
    gateway = GATEWAYS[name]
    folder = RESULTS / f"run-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    report = folder / "report.json"
    (upstream_port,) = free_ports(1)
    with started(name, upstream_port, folder) as (main, tight):
        argv = [
            sys.executable, "-m", "pytest", *(f"tests/e2e/conformance/test_{area}.py" for area in areas),
            "-q", "--tb=no", "-p", "no:cacheprovider",
            "--gateway-url", f"http://127.0.0.1:{main}", "--tight-url", f"http://127.0.0.1:{tight}",
            "--upstream-port", str(upstream_port), "--offers", ",".join(sorted(gateway.offers)),
            "--gateway-wait", "120", "--report", str(report),
        ]  # fmt: skip
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=SUITE_S, check=False)
    (folder / "pytest.log").write_text(done.stdout + done.stderr)
    cases = json.loads(report.read_text()) if report.is_file() else []
    problem = "" if any(found["result"] == "pass" for found in cases) else "refused to start"
    result = {
        "version": gateway.version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "problem": problem,
        "cases": cases,
    }
    file = RESULTS / f"{name}.json"
    if file.is_file():
        result["cases"] = [one for one in json.loads(file.read_text())["cases"] if one["area"] not in areas] + cases
    file.write_text(json.dumps(result, indent=1) + "\n")
    counts = Counter(found["result"] for found in cases)
    print(f"{name}: {problem or dict(counts)}", file=sys.stderr)


def cell(text: str, limit: int = 150) -> str:
    """Text inside a table of Markdown."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def summary(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table area x gateway."""
    yield "| area | " + " | ".join(GATEWAYS[name].title for name in results) + " |"
    yield "|---|" + "---:|" * len(results)
    for area, title in [*AREAS.items(), ("", "all")]:
        cells = []
        for result in results.values():
            if result["problem"]:
                cells.append(result["problem"])
                continue
            found = [one["result"] for one in result["cases"] if area in ("", one["area"])]
            cells.append(f"{found.count('pass')}/{len(found) - found.count('not offered')}")
        bold = "" if area else "**"
        yield f"| {title} | " + " | ".join(f"{bold}{text}{bold}" for text in cells) + " |"


def aborts(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of measured times."""
    yield "| measured | " + " | ".join(GATEWAYS[name].title for name in results) + " |"
    yield "|---|" + "---:|" * len(results)
    rows = {
        "abort_ms": "slowest abort of those that came, ms",
        "slowest_event_ms": "slowest of ten events, ms",
        "buffered_mib": "taken from a sender that nobody reads, MiB",
    }
    for key, title in rows.items():
        cells = []
        for result in results.values():
            found = [one["measured"][key] for one in result["cases"] if key in one["measured"]]
            cells.append(f"{max(found):g}" if found else "")
        yield f"| {title} | " + " | ".join(cells) + " |"


def failures(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One line for each failing case of each gateway."""
    for name, result in results.items():
        failed = [one for one in result["cases"] if one["result"] == "fail"]
        missing = sorted(FEATURES - GATEWAYS[name].offers)
        yield f"\n### {GATEWAYS[name].title}: {len(failed)} failing\n"
        if missing:
            yield f"Not offered, and not asked: {', '.join(missing)}.\n"
        if failed:
            yield "| area | case | what must hold | observed |\n|---|---|---|---|"
        for one in failed:
            row = (AREAS[one["area"]], one["name"], one["must_hold"], one["observed"])
            yield "| " + " | ".join(map(cell, row)) + " |"


PAGE = """\
# Conformance

What a gateway must do beside being fast: pass bytes on unchanged, abort upstream when a client leaves, keep its timers,
speak HTTP/1.1 to odd clients, keep one connection's headers out of the other, never let a request be read in two ways,
and hold a fast sender back for a slow reader. `tests/e2e/conformance/` asks that of any gateway, over raw sockets,
with an upstream of its own behind it that follows a script and keeps what it received byte for byte.

```console
$ pytest tests/e2e/conformance                                       # burstgate, started by the suite
$ pytest tests/e2e/conformance --gateway-url http://127.0.0.1:9000 --upstream-port 9100 --report report.json
$ python -m tests.e2e.conformance.rivals                             # all of this page
```

For another gateway: start it in front of `http://127.0.0.1:9100`, where the suite's upstream will listen, with one
model `bench-model`; `--tight-url` names a second one with a connect, first-byte and chunk timer of 1 s, a total timer
of 3 s and a limit of 1 MiB on bodies; `--offers` says which features it has (default: all), and cases of the others
count as not offered.

{summary}

Passed of asked. {aborts_intro}

{aborts}

| gateway | version | run on | other than its defaults |
|---|---|---|---|
{versions}

How to read it: most of these cases are HTTP (RFC 9110 and 9112), some are taste, and the statement says what was
asked. An upstream that fails before its head must become 502 or 503. Where something is odd but not wrong, such as a
line that ends with LF, a gateway may serve it or refuse it, and only the upstream's view counts. LiteLLM is no proxy of
bytes: it reads and writes each request anew, so that equality of bytes is not among its aims; it is in the table
because people put it in this place.

## Failing cases
{failures}
"""


def write_page(file: Path) -> None:
    """From the reports that are there. Raises BenchError when there is none."""
    results = {name: json.loads(path.read_text()) for name in GATEWAYS if (path := RESULTS / f"{name}.json").is_file()}
    if not results:
        raise BenchError(f"{RESULTS}: no report there")
    versions = [
        f"| {GATEWAYS[name].title} | {result['version']} | {result['date']} | {GATEWAYS[name].settings} |"
        for name, result in results.items()
    ]
    text = PAGE.format(
        summary="\n".join(summary(results)),
        aborts_intro="Times and sizes, of the same runs, on a machine of two cores that did other things as well:",
        aborts="\n".join(aborts(results)),
        versions="\n".join(versions),
        failures="\n".join(failures(results)).rstrip(),
    )
    file.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.conformance.rivals", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default=",".join(GATEWAYS), help=f"of {', '.join(GATEWAYS)}; empty: draw the page only"
    )
    parser.add_argument("--areas", default=",".join(AREAS), help=f"of {', '.join(AREAS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "conformance.md")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    if unknown := [name for name in names if name not in GATEWAYS]:
        parser.error(f"--only: {unknown[0]!r} is not among {', '.join(GATEWAYS)}")
    areas = arguments.areas.split(",")
    if unknown := [area for area in areas if area not in AREAS]:
        parser.error(f"--areas: {unknown[0]!r} is not among {', '.join(AREAS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        for name in names:
            run_suite(name, areas)
        write_page(arguments.out)
    except BenchError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
