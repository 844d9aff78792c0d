"""What the documentation shows is run: blocks marked ```console run, page by page, in order, in a folder of their own.

A line `$ COMMAND` is run by bash, `$ COMMAND &` stays until the page's end. The lines below it must come in what it
writes, in this order, numbers and spacing aside; `...` stands for lines that are not shown. A page's ports are
replaced by free ones.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.harness import BURSTGATE, Process, clean_environment, wait_until
from tests.test_docs import PAGES

_BLOCK = re.compile(r"^```console run\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"(?<=127\.0\.0\.1:)80\d\d|(?<=--port )80\d\d")
RUN = [page for page in PAGES if _BLOCK.search(page.read_text())]


def shown(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands with the lines that are shown for them."""
    for block in _BLOCK.findall(page.read_text()):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            yield command, [line for line in lines if line.strip() not in ("", "...")]


def shape(line: str) -> str:
    """Without what differs from run to run."""
    return " ".join(re.sub(r"\d[\d,.]*", "0", line).split())


def has_lines(output: str, expected: list[str]) -> bool:
    lines = iter([shape(line) for line in output.splitlines()])
    return all(any(found.startswith(shape(line)) for found in lines) for line in expected)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("output", "expected", "fits"),
    [
        ("a 1\nb  2.5 s\nc", ["a 7", "b 3 s"], True),
        ("b 1\na 2", ["a 1", "b 2"], False),
        ("exit 1", ["exit 0"], False),
        ("verdict GOOD: x", ["verdict MISSED"], False),
    ],
)
def test_comparison(output: str, expected: list[str], fits: bool) -> None:
    assert (has_lines(output, expected) and exits(output) == exits("\n".join(expected), exits(output))) is fits


def exits(text: str, default: list[str] | None = None) -> list[str]:
    """The exit statuses shown: these numbers count."""
    return re.findall(r"^exit \d+$", text, re.MULTILINE) or default or []


def test_there_are_pages_to_run() -> None:
    assert "cookbook.md" in {page.name for page in RUN}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_do_what_is_shown(page: Path, tmp_path: Path) -> None:
    ports: dict[str, str] = {}

    def here(text: str) -> str:
        return _PORT.sub(lambda match: ports.setdefault(match[0], str(free_port())), text)

    here("127.0.0.1:8080 127.0.0.1:8081")
    environment = clean_environment(
        {"BURSTGATE_PORT": ports["8080"], "BURSTGATE_CONTROL_PORT": ports["8081"], "COLUMNS": "120"}
    )
    environment["PATH"] = f"{Path(BURSTGATE).parent}:{environment['PATH']}"
    with ExitStack() as background:
        for command, expected in shown(page):
            if command.endswith(" &"):
                process = Process(["bash", "-c", f"exec {here(command.removesuffix(' &'))}"], environment, tmp_path)
                background.callback(process.kill_tree)
                wait_until(lambda: has_lines(process.output, expected), 30.0, f"{command}: {expected}")  # noqa: B023
                continue
            done = subprocess.run(
                ["bash", "-c", here(command)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                timeout=120, check=False,
            )  # fmt: skip
            output = done.stdout + done.stderr
            assert done.returncode == 0, f"{command}\n{output}"
            assert has_lines(output, expected), f"{command}\n{output}"
            assert exits(output) == exits("\n".join(expected)), f"{command}\n{output}"
