"""The image, the compose file and the systemd unit, as far as they can be tried without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.settings import Settings, load_settings
from tests.e2e.harness import clean_environment
from tests.proxy.test_control import Installation, serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
UID = 65532


def instructions() -> Iterator[tuple[str, str]]:
    for line in DOCKERFILE.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word and not word.startswith("#"):
            yield word, rest.strip()


def values(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


# The image ------------------------------------------------------------------------------------------------------------


def test_image_is_what_the_chart_and_the_compose_file_expect() -> None:
    assert {base.split()[0] for base in values("FROM")} == {"python:3.12-slim"}
    assert values("USER") == [f"{UID}:{UID}"]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert values("VOLUME") == ["/data"]
    assert re.search(r"://(?!HOST|127\.0\.0\.1)", DOCKERFILE) is None  # no registry, no index


def test_image_has_all_rooms_and_nothing_that_is_not_sent() -> None:
    copied = {word for rest in values("COPY") if not rest.startswith("--from") for word in rest.split()[:-1]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    sent = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == sent
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= copied
    assert wheel["hooks"]["custom"]["path"] in copied


def test_build_tools_are_locked() -> None:
    script = (DEPLOY / "install.sh").read_text()
    found = re.search(r"keep = /\^\(([^)]+)\)==/", script)
    assert found is not None
    lock = (ROOT / "requirements-dev.lock").read_text()
    assert [name for name in found[1].split("|") if f"\n{name}==" not in lock] == []


def test_health_check_asks_the_control_plane(tmp_path: Path) -> None:
    (check,) = values("HEALTHCHECK")
    command = [sys.executable, *yaml.safe_load(check[check.index("[") :])[1:]]
    installation = Installation(tmp_path)
    with serving(installation.settings) as client:
        environment = {**os.environ, "BURSTGATE_CONTROL_PORT": str(client.base_url.port)}
        assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 1
    installation.journal.close()


def run(command: list[str], **more: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    output: str = done.stdout
    return output


@pytest.mark.slow
def test_installed_as_in_the_image_it_runs_unprivileged_and_writes_to_its_data_only() -> None:
    """The Dockerfile's steps in a clean folder; not compiled, which `make test-compiled` tries."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        environment = {**clean_environment({"HATCH_BUILD_HOOKS_ENABLE": "0", "PYTHON": sys.executable})}
        environment.pop("PYTHONPATH", None)
        steps = [rest.split() for rest in values("RUN") if "install.sh" in rest]
        assert [step[2] for step in steps] == ["dependencies", "package"]
        for _, script, step, target in steps:
            run(["sh", str(ROOT / script), step, f"{root}{target}"], env=environment, cwd=root)
        data = root / "data"
        data.mkdir(0o750)
        who: dict[str, Any] = {}
        python = Path(sys.executable).resolve()
        if os.geteuid() == 0 and all(folder.stat().st_mode & 0o001 for folder in python.parents):  # not in root's home
            os.chown(data, UID, UID)
            who = {"user": UID, "group": UID, "extra_groups": ()}
        set_there = {
            name: value.replace("/data", str(data)).replace("/opt", f"{root}/opt")
            for name, value in (pair.split("=", 1) for rest in values("ENV")[1:] for pair in rest.split())
        }
        burstgate = f"{root}/opt/burstgate/bin/burstgate"
        inside: dict[str, Any] = {"env": set_there, "cwd": data, **who}
        before = sorted(path for path in (root / "opt").rglob("*"))
        assert run([burstgate, "version"], **inside).strip() == "0.1.0"
        assert run([burstgate, "serve", "--upstream", "http://127.0.0.1:9", "--check"], **inside) == "ok\n"
        assert re.fullmatch(r"\d{4}\n", run([burstgate, "db", "upgrade"], **inside))
        assert (data / "burstgate.db").exists()
        assert sorted(path for path in (root / "opt").rglob("*")) == before
        assert not list((root / "opt").rglob("site-packages/pip"))
    finally:
        shutil.rmtree(root)


# Compose --------------------------------------------------------------------------------------------------------------


def env_file(name: str) -> dict[str, str]:
    """The example of a file with secrets."""
    lines = (DEPLOY / f"{name}.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line)


def test_what_compose_mounts_is_there() -> None:
    for service in COMPOSE["services"].values():
        for mount in service.get("volumes", []):
            source, *_ = mount.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
            else:
                assert source in COMPOSE["volumes"]
        if "env_file" in service:
            assert env_file(service["env_file"])


def test_secrets_are_in_ignored_files_only() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/deploy/compose/*.env" in ignored
    assert "change-me" not in (DEPLOY / "compose.yaml").read_text()


def test_only_the_gateway_is_published_beyond_loopback() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports["gateway"][0] == "8080:8080"
    rest = [*ports["gateway"][1:], *(port for name in ports if name != "gateway" for port in ports[name])]
    assert all(port.startswith("127.0.0.1:") for port in rest)


def test_the_composed_gateway_loads_its_settings() -> None:
    gateway = COMPOSE["services"]["gateway"]
    environment = {**env_file(gateway["env_file"]), "BURSTGATE_UPSTREAMS": "http://simulator:8000"}
    settings = load_settings(config=DEPLOY / "compose" / "burstgate.yaml", environment=environment).settings
    assert settings.control.token_env in environment
    assert settings.control_host == "0.0.0.0"
    postgres = env_file(COMPOSE["services"]["postgres"]["env_file"])
    assert settings.database == "postgresql://{POSTGRES_USER}:{POSTGRES_PASSWORD}@postgres/{POSTGRES_DB}".format(
        **postgres
    )
    assert int(gateway["stop_grace_period"].removesuffix("s")) >= settings.timeouts.drain_s + 45


def test_our_containers_are_confined() -> None:
    for name in ("gateway", "simulator"):
        service = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


# systemd --------------------------------------------------------------------------------------------------------------

UNIT = DEPLOY / "systemd" / "burstgate.service"


def test_the_unit_gives_time_to_stop() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert found is not None
    assert int(found[1]) > Settings().timeouts.drain_s + 5 + 30 + 5


def test_systemd_takes_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "burstgate.service"
    unit.write_text(UNIT.read_text().replace("/opt/burstgate/bin/burstgate", shutil.which("true") or "/bin/true"))
    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # Exposure from 0 to 10; a unit without any of it has 9.6.
    run([analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)])
