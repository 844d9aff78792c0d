"""Commands that run the gateway and look after it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from proxy.commands.common import (
    Config,
    DatabaseUrl,
    DataDir,
    Json,
    Upstreams,
    app,
    config_app,
    db_app,
    load_config,
    load_steered,
    open_database,
    prepare_data_dir,
)
from proxy.config_error import ConfigError

if TYPE_CHECKING:
    from proxy.settings import Settings


@app.command()
def serve(
    upstream: Upstreams = None,
    host: Annotated[str | None, typer.Option(help="Address of the gateway.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway.  [default: 8080]")] = None,
    control_host: Annotated[
        str | None, typer.Option(help="Address of the control plane.  [default: 127.0.0.1]")
    ] = None,
    control_port: Annotated[int | None, typer.Option(help="Port of the control plane.  [default: 8081]")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    workers: Annotated[int | None, typer.Option(help="Gateway worker processes.  [default: 1]")] = None,
    config: Config = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="The dashboard and the admin API show, and change nothing.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only find out whether it would start.")] = False,
) -> None:
    """Run the gateway: workers, recorder and control plane. SIGHUP reloads, SIGUSR2 restarts without downtime."""
    from proxy.handover import take_handover
    from proxy.settings import show_value
    from proxy.steering import begin
    from proxy.supervisor import Supervisor, settings_after
    from storage.engine import open_engine

    flags = {
        "upstreams": tuple(upstream) if upstream else None,
        "host": host,
        "port": port,
        "control_host": control_host,
        "control_port": control_port,
        "data_dir": data_dir,
        "database_url": database_url,
        "workers": workers,
        "control.read_only": read_only or None,
    }

    def load() -> Settings:
        settings = load_steered(config, **flags).settings
        if not settings.upstreams:
            raise ConfigError("upstreams: name at least one, as in --upstream http://127.0.0.1:8000")
        if settings.telemetry.otlp_endpoint is not None:
            from proxy.otel import check_exporter

            check_exporter()
        return settings

    lines = Console(stderr=True, highlight=False)

    def say(line: str, shown: str | None = None) -> None:
        """To the operator; shown: as text, else after `burstgate:`."""
        with contextlib.suppress(OSError):  # a terminal that was closed
            if is_json:
                logging.getLogger("burstgate.supervisor").info(line)
            elif shown is not None:
                lines.print(shown)
            else:
                print(f"burstgate: {line}", file=sys.stderr, flush=True)

    is_json = False

    def check_security(settings: Settings) -> None:
        """What a start would fail on, in one line. Raises ConfigError."""
        from proxy.admin_auth import check_reachable
        from proxy.tls import server_tls
        from proxy.upstream import read_api_key

        server_tls("tls.cert_file", settings.tls.cert_file, settings.tls.key_file)
        server_tls("tls.control_cert_file", settings.tls.control_cert_file, settings.tls.control_key_file)
        for each in settings.upstreams:
            read_api_key(each)
        check_reachable(settings)

    handover = None if check else take_handover()
    if handover is None and not check:
        begin(load_config(config, **flags).settings.data_dir)
    settings = load() if handover is None else settings_after(handover, load, say)
    if settings.log.format == "json":
        from proxy.logs import configure_logging

        configure_logging("supervisor", settings.log)
        logging.getLogger("burstgate.supervisor").setLevel(logging.INFO)
        is_json = True
    if handover is None:  # else the trial run has done it: from here on, nothing may fail
        prepare_data_dir(settings)
        open_engine(settings.database).dispose()
        check_security(settings)
    if check:
        for module in ("proxy.app", "proxy.record", "proxy.control"):
            importlib.import_module(module)
        print("ok")
        return
    supervisor = Supervisor(settings, say=say, load=load)
    supervisor.catch_signals()
    if handover is not None:
        supervisor.take_over(handover)
    else:
        gateway, control = supervisor.start()
        for name, what in (
            ("gateway", f"{gateway} -> {', '.join(map(str, settings.upstreams))}"),
            ("control", f"{control} (/metrics, /api/v1/status, /api/v1/doctor)"),
            ("recording", show_value(settings.database)),
        ):
            say(f"{name} {what}", f"{name:<9} {what}")
    supervisor.run()


@app.command()
def record(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Run the recorder alone: journal in, database out."""
    from proxy.logs import configure_logging
    from proxy.record import open_recorder, run_recorder

    settings = load_config(config, data_dir=data_dir, database_url=database_url).settings
    prepare_data_dir(settings)
    configure_logging("recorder", settings.log)
    run_recorder(open_recorder(settings), settings)


@config_app.command("show")
def config_show(config: Config = None, data_dir: DataDir = None, upstream: Upstreams = None) -> None:
    """Print every setting, its value and where it came from."""
    from proxy.settings import describe

    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for row in describe(load_steered(config, data_dir=data_dir, upstreams=tuple(upstream) if upstream else None)):
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True).print(table)


@config_app.command("check")
def config_check(config: Config = None) -> None:
    """Validate the settings; a problem is one line and exit status 2."""
    load_config(config)
    print("ok")


@db_app.command("upgrade")
def db_upgrade(
    revision: Annotated[str, typer.Argument()] = "head",
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Bring the schema up to REVISION."""
    from storage.engine import current

    with open_database(config, data_dir, database_url, revision=revision) as engine:
        print(current(engine) or "(no schema)")


@db_app.command("downgrade")
def db_downgrade(
    revision: str, data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None
) -> None:
    """Take the schema back to REVISION; `base` drops the tables with all rows."""
    from storage.engine import current, downgrade

    with open_database(config, data_dir, database_url) as engine:
        downgrade(engine, revision)
        print(current(engine) or "(no schema)")


@db_app.command("current")
def db_current(data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None) -> None:
    """Print the schema's revision."""
    from storage.engine import current

    with open_database(config, data_dir, database_url) as engine:
        print(current(engine) or "(no schema)")


@app.command()
def doctor(
    data_dir: DataDir = None, database_url: DatabaseUrl = None, config: Config = None, json: Json = False
) -> None:
    """Check an installation, live or stopped: is every request accounted for?"""
    from proxy.doctor import diagnose

    checks = list(diagnose(load_config(config, data_dir=data_dir, database_url=database_url).settings))
    if json:
        print(msgspec.json.encode(checks).decode())
    else:
        for check in checks:
            print(f"{'ok  ' if check.is_ok else 'FAIL'} {check.name}: {check.detail}")
    if any(check.is_ok is False for check in checks):
        raise typer.Exit(1)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo-out"),
) -> None:
    """Simulated vLLM, gateway on SQLite, a bursty trace replayed through it, and what was recorded."""
    from proxy.demo import run_demo

    run_demo(directory, Console(highlight=False))


@app.command()
def version() -> None:
    """Print the version."""
    print(importlib.metadata.version("burstgate"))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def burstgate(
    _is_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An OpenAI-compatible gateway for vLLM fleets that records every request as a BurstGPT trace."""
