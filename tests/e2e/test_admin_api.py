"""The admin API against its own OpenAPI document: schemathesis asks what the document allows, and what it forbids.

Nothing answers 500; statuses, content types and bodies are those that the document names. Behind the control plane are
rows, a key and a journal; it has no supervisor, so that what would change settings is refused.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from proxy.control import build_control
from proxy.sessions import load_key_secret
from proxy.settings import InjectionSettings, Settings
from storage.engine import open_engine
from storage.key_file import KeyLimits
from storage.keys import KeyWanted, create_key
from tests.proxy.test_control import Installation, serving
from traces.record import Outcome

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("admin"))
    for outcome in (Outcome.OK, Outcome.UPSTREAM_ERROR, Outcome.CLIENT_GONE, Outcome.OK):
        made.request(outcome)
    made.record()
    made.request(None)
    secret = load_key_secret(made.settings.data_dir, None)
    engine = open_engine(made.settings.database)
    create_key(engine, KeyWanted("alice", "t", None, KeyLimits(1.0, 2.0, 3)), secret, time.time())
    engine.dispose()
    yield made
    made.journal.close()


@pytest.fixture(scope="module")
def admin(recorded: Installation) -> Iterator[schemathesis.BaseSchema]:
    """Its document, at a control plane that injects nothing."""
    allowed = recorded.settings.model_copy(update={"injection": InjectionSettings(allowed=False)})
    with serving(allowed) as client:
        yield schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def operations() -> Iterator[tuple[str, str]]:
    """Method and path of each route that the document names."""
    for path, methods in build_control(Settings(upstreams=("http://a:1",))).openapi()["paths"].items():
        for method in methods:
            if path != "/api/v1/live":  # which does not end
                yield method.upper(), path


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
@pytest.mark.parametrize(("method", "path"), list(operations()))
def test_a_route_keeps_to_its_document(
    admin: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    operation = admin[path][method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        answer = case.call()
        assert answer.status_code != 500  # 503 is an answer: there is no supervisor here
        case.validate_response(answer, checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # it takes nothing that could be wrong
        ask()
