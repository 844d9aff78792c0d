"""The documentation says what the code does: settings, commands, metrics.

`python -m tests.test_docs` prints docs/configuration.md anew.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from proxy.cli import app
from proxy.settings import ENV_PREFIX, Settings, setting_keys, show_value
from replay.simulator.__main__ import machine_flags

ROOT = Path(__file__).parent.parent
_INTRO = """# Configuration

Every key can be set in a YAML file (`--config FILE`), in the environment and, for those with one, by a flag of
`burstgate serve`. Later ones win: default, file, environment, flag. Groups are nested in the file (`journal:` then
`budget: 1GiB`) and joined by two underscores in the environment. Sizes take units (`64MiB`). An unknown key is an error
that names the nearest known one. `burstgate config show` prints every value and where it came from, `burstgate config
check` validates.

| key | default | environment | meaning |
|---|---|---|---|
"""


def _field(model: type[BaseModel], key: str) -> tuple[Any, str]:
    *groups, name = key.split(".")
    for group in groups:
        annotation = model.model_fields[group].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    field = model.model_fields[name]
    default = "the host's name" if field.default_factory is not None else show_value(field.default)
    return default, field.description or ""


def configuration_page() -> str:
    rows = []
    for key in setting_keys():
        default, text = _field(Settings, key)
        environment = ENV_PREFIX + key.replace(".", "__").upper()
        rows.append(f"| `{key}` | {default} | `{environment}` | {text} |\n")
    return _INTRO + "".join(rows)


def test_the_configuration_page_lists_every_setting() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_page()


def _commands(page: Path) -> Iterator[list[str]]:
    """The `burstgate ...` commands in a page's shell blocks."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.removeprefix("$ ").strip()
            if text.startswith(("burstgate ", ".venv/bin/burstgate ")):
                yield shlex.split(text, comments=True)[1:]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_exist_with_the_flags_shown(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in _commands(page):
        command: Any = root
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{page.name}: no such command: {words}"
        if command.name == "simulate":
            continue  # its flags are the simulator's own; tests/replay checks them
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        if command.name == "sweep":
            known |= set(machine_flags())  # of the simulated machine, passed through
        flags = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert flags <= known | {"--help"}, f"{page.name}: {command.name}: unknown {flags - known}"


def test_each_threat_has_its_test() -> None:
    rows = [row for row in (ROOT / "docs" / "security.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(tests/[^`]+)`", row.rsplit(" | ", 1)[1])
        assert tests, row
        for path, _, name in (test.partition("::") for test in tests):
            assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).exists(), (path, name)


def test_readme_shows_commands() -> None:
    assert {words[0] for words in _commands(ROOT / "README.md")} >= {"serve", "export", "replay", "doctor", "stats"}


if __name__ == "__main__":
    print(configuration_page(), end="")
