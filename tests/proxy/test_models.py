from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from proxy.models import merge


def listed(*names: str, **about: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps({"id": name, **about}).encode()) for name in names}


@pytest.mark.parametrize(
    ("answers", "aliases", "data"),
    [
        ([], {}, []),
        ([{}], {"x": "m"}, []),
        ([listed("m", "n")], {}, [{"id": "m"}, {"id": "n"}]),
        ([listed("m", by=1), listed("n", "m", by=2)], {}, [{"id": "m", "by": 1}, {"id": "n", "by": 2}]),
        ([listed("m", by=1)], {"x": "m"}, [{"id": "m", "by": 1}, {"id": "x", "by": 1, "root": "m"}]),
        ([listed("m", root="own")], {"é\n": "m"}, [{"id": "m", "root": "own"}, {"id": "é\n", "root": "m"}]),
        ([listed("m", "n")], {"m": "n"}, [{"id": "m", "root": "n"}, {"id": "n"}]),  # as it is routed
        ([listed("m")], {"x": "elsewhere"}, [{"id": "m"}]),
    ],
)
def test_merging(answers: list[dict[str, msgspec.Raw]], aliases: dict[str, str], data: list[dict[str, Any]]) -> None:
    assert json.loads(merge(answers, aliases)) == {"object": "list", "data": data}
