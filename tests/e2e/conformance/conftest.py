"""Options and fixtures: which gateway, which port, and the report.

`pytest tests/e2e/conformance` starts burstgate in front of the suite's upstream. With `--gateway-url` and
`--upstream-port` it starts nothing: the gateway at that URL must forward to that port of 127.0.0.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.conformance.world import BODY_BYTES, CHUNK_S, CONNECT_S, FEATURES, FIRST_BYTE_S, TOTAL_S, World
from tests.e2e.harness import Installation

RESULTS = pytest.StashKey[list[dict[str, Any]]]()
HERE = Path(__file__).parent
TIGHT = {
    "BURSTGATE_TIMEOUTS__CONNECT_S": CONNECT_S,
    "BURSTGATE_TIMEOUTS__FIRST_BYTE_S": FIRST_BYTE_S,
    "BURSTGATE_TIMEOUTS__CHUNK_S": CHUNK_S,
    "BURSTGATE_TIMEOUTS__TOTAL_S": TOTAL_S,
    "BURSTGATE_LIMITS__BODY": BODY_BYTES,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--gateway-url", help="a gateway that forwards to --upstream-port; none: burstgate is started")
    group.addoption("--tight-url", help="the same gateway with short timers and limits (default: --gateway-url)")
    group.addoption("--upstream-port", type=int, default=0, help="where the suite's upstream listens")
    group.addoption(
        "--offers", default=",".join(sorted(FEATURES)), help="features the gateway has; for the others, no case"
    )
    group.addoption("--gateway-wait", type=float, default=60.0, help="seconds until the gateway must answer")
    group.addoption("--report", help="a JSON file for the results")


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        pytest.exit(f"--gateway-url: expected http://HOST:PORT, got {url!r}", pytest.ExitCode.USAGE_ERROR)
    return parts.hostname, parts.port


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The gateway under test with its upstream."""
    config = request.config
    url = config.getoption("gateway_url", None)
    world = World(config.getoption("upstream_port", 0))
    try:
        if url is not None:
            world.main = _address(url)
            world.tight = _address(config.getoption("tight_url", None) or url)
            offers = config.getoption("offers")
            world.offers = frozenset(offers.split(",")) if offers else frozenset()
            if unknown := world.offers - FEATURES:
                rule = f"--offers: {', '.join(sorted(unknown))}: expected some of {', '.join(sorted(FEATURES))}"
                pytest.exit(rule, pytest.ExitCode.USAGE_ERROR)
            for tight in (False, True):
                within_s = config.getoption("gateway_wait")
                try:
                    world.run(world.wait_until_served(tight=tight, within_s=within_s), within_s + 30.0)
                except AssertionError as error:
                    host, port = world.tight if tight else world.main
                    pytest.exit(f"http://{host}:{port}: {error}", pytest.ExitCode.TESTS_FAILED)
            yield world
            return
        upstream = f"http://127.0.0.1:{world.upstream.port}"
        env = {name: str(value) for name, value in TIGHT.items()}
        with (
            Installation(upstream, data_dir=tmp_path_factory.mktemp("main")) as main,
            Installation(upstream, data_dir=tmp_path_factory.mktemp("tight"), env=env) as tight_one,
        ):
            world.main, world.tight = _address(main.gateway_url), _address(tight_one.gateway_url)
            yield world
    finally:
        world.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    if HERE in item.path.parents and (report.when == "call" or not report.passed):
        results = item.config.stash.setdefault(RESULTS, [])
        results.append(_result(item, call, report))
    return report


def _result(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> dict[str, Any]:
    """One case: what must hold is the row's own sentence, else the test's docstring."""
    assert isinstance(item, pytest.Function)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    row = parameters.get("row")
    observed = ""
    if call.excinfo is not None:
        lines = str(call.excinfo.value).strip().splitlines() or [""]
        observed = lines[0] if call.excinfo.errisinstance(AssertionError) else call.excinfo.exconly().splitlines()[0]
    name = item.name.removeprefix("test_").replace("_", "-")
    if row is not None:
        name = f"{name.split('[')[0]}: {item.callspec.id}"
    return {
        "area": item.path.stem.removeprefix("test_"),
        "name": name,
        "must_hold": getattr(row, "must_hold", None) or (item.function.__doc__ or "").strip().splitlines()[0],
        "result": "not offered" if report.skipped else "pass" if report.passed else "fail",
        "observed": observed,
        "took_s": round(report.duration, 4),
        "measured": dict(report.user_properties),
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("report", None)
    if file is not None:
        Path(file).write_text(json.dumps(session.config.stash.get(RESULTS, []), indent=1) + "\n")
