"""The design's rules on imports, checked: which room may use which, and one file for each outside system."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "wire": set[str](),
    "traces": set[str](),
    "migrations": {"storage"},
    "storage": {"traces", "wire", "migrations"},
    "replay": {"storage", "traces", "wire"},
    "proxy": {"replay", "storage", "traces", "wire"},
}
"""Each room, and the rooms that it may import. migrations/ is a part of storage/ that has its own folder."""
MODULES = sorted(path for room in BELOW for path in (ROOT / room).rglob("*.py"))
ROOTS = {"proxy.app", "proxy.control", "proxy.cli"}
"""Composition roots; no other module imports one, so that whatever it needs is handed to it."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import, wherever it stands; `from package import module` names the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                if (ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")).exists():
                    yield node.lineno, f"{node.module}.{alias.name}"


ALL = [(path, line, name) for path in MODULES for line, name in imports(path)]


def users(system: str) -> set[str]:
    """The files that import an outside system."""
    return {str(path.relative_to(ROOT)) for path, _, name in ALL if name == system or name.startswith(f"{system}.")}


def test_every_room_has_modules() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == BELOW.keys()


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room}/ may not import {name}; it may import {sorted(BELOW[room])}"
        for path, line, name in ALL
        for room in [path.relative_to(ROOT).parts[0]]
        if (other := name.split(".")[0]) in BELOW and other != room and other not in BELOW[room]
    ]
    assert wrong == []


def test_migrations_know_the_engine_only() -> None:
    """Each migration stands for itself: one that imported today's schema would change with it."""
    found = {(path.parent.name, name) for path, _, name in ALL if path.is_relative_to(ROOT / "migrations")}
    ours = {(folder, name) for folder, name in found if name.split(".")[0] in BELOW}
    assert {name for folder, name in ours if folder == "versions"} <= {"storage.schema"}
    assert {name for folder, name in ours if folder == "migrations"} <= {"storage.schema", "storage.engine"}
    assert users("migrations") == {"storage/engine.py"}


def test_tests_are_imported_by_tests_only() -> None:
    assert users("tests") == users("benchmarks") == set()


@pytest.mark.parametrize(
    ("system", "files"),
    [
        ("httptools", {"wire/http1.py", "proxy/server.py"}),
        ("opentelemetry", {"proxy/otel.py"}),
        (
            "prometheus_client",
            {
                "proxy/telemetry.py",
                "proxy/series.py",
                "proxy/otel.py",
                "proxy/control.py",
                "proxy/glance.py",
                "replay/scaling.py",
                "replay/scrape.py",
                "replay/simulator/*",
            },
        ),
        ("alembic", {"storage/engine.py", "migrations/env.py", "migrations/versions/*"}),
        ("fastapi", {"proxy/app.py", "proxy/control.py", "proxy/control_*.py", "replay/simulator/server.py"}),
        ("uvicorn", {"proxy/app.py", "proxy/control.py", "replay/simulator/server.py", "replay/simulator/__main__.py"}),
        ("typer", {"proxy/cli.py", "proxy/commands/*"}),
        ("redis", {"proxy/shared_limits.py"}),
        ("tokenizers", {"replay/tokenizer.py"}),
        ("ray", {"replay/ray_senders.py"}),
        ("textual", {"proxy/top.py"}),
        ("yaml", {"proxy/settings.py"}),
        ("pydantic", {"proxy/settings.py", "proxy/control_*.py"}),
        ("fsspec", {"storage/archive.py"}),
        ("mmap", {"storage/counters.py", "storage/journal.py", "proxy/sessions.py"}),
    ],
)
def test_outside_system_has_its_files(system: str, files: set[str]) -> None:
    strangers = {each for each in users(system) if not any(Path(each).match(pattern) for pattern in files)}
    assert strangers == set()


@pytest.mark.parametrize(
    ("room", "systems"),
    [
        ("traces", {"sqlalchemy", "fastapi", "uvicorn", "asyncio", "httpx", "socket"}),
        ("wire", {"sqlalchemy", "fastapi", "uvicorn", "polars", "numpy", "httpx"}),
        ("storage", {"fastapi", "uvicorn", "httpx", "asyncio"}),
        ("replay", {"sqlalchemy", "alembic", "psycopg"}),
        ("proxy", {"sqlite3", "psycopg", "alembic"}),
    ],
)
def test_room_keeps_out(room: str, systems: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room}/ imports {name}"
        for path, line, name in ALL
        if path.is_relative_to(ROOT / room) and name.split(".")[0] in systems
    ]
    assert wrong == []


PURE = ["wire/sse.py", "wire/openai.py", "wire/shapes.py", "wire/accounting.py", "wire/latency.py", "wire/http1.py",
        "traces/record.py", "traces/batch.py", "storage/frame.py", "storage/entries.py",
        "proxy/balance.py", "proxy/request_head.py", "proxy/answer_head.py", "proxy/estimates.py",
        "proxy/errors.py", "proxy/shaping.py", "proxy/pacing.py", "proxy/faults.py", "proxy/guard_rails.py",
        "proxy/agreement.py", "proxy/access.py", "replay/timeline.py", "replay/verdict.py"]  # fmt: skip


@pytest.mark.parametrize("file", PURE)
def test_pure_file_touches_neither_clock_nor_network_nor_files(file: str) -> None:
    io = {"time", "os", "socket", "asyncio", "random", "pathlib", "logging", "threading", "subprocess", "ssl"}
    assert {name.split(".")[0] for path, _, name in ALL if path == ROOT / file} & io == set()


def test_composition_roots_are_imported_by_nobody() -> None:
    wrong = [f"{path.relative_to(ROOT)}:{line}: imports {name}" for path, line, name in ALL if name in ROOTS]
    assert wrong == []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_init_files_hold_no_code(path: Path) -> None:
    assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_file_begins_with_its_contract(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES} - {ROOT / "migrations" / "versions"}  # Alembic reads files there
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # Memory and start-up time of each worker; and what is not loaded can not fail.
        (
            "proxy.app",
            {
                "sqlalchemy",
                "polars",
                "alembic",
                "numpy",
                "psycopg",
                "sqlite3",
                "typer",
                "rich",
                "httpx",
                "opentelemetry.sdk",
                "redis",
            },
        ),
        ("proxy.supervisor", {"sqlalchemy", "polars", "alembic", "numpy", "psycopg", "fastapi", "uvicorn"}),
        ("proxy.record", {"fastapi", "uvicorn", "polars"}),
        ("replay.simulator.server", {"sqlalchemy", "polars", "alembic"}),
        ("replay.ahead", {"tokenizers", "jinja2", "sqlalchemy"}),
        ("traces.record", {"polars", "numpy", "sqlalchemy"}),
    ],
)
def test_process_loads_only_what_it_needs(module: str, absent: set[str]) -> None:
    program = f"import {module}, sys; print(*sorted(set({sorted(absent)!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
