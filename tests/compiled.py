"""Whether the tests run against a compiled data plane (see docs/operating.md), and what then can not be tested."""

from __future__ import annotations

import pytest

import proxy.exchange

IS_COMPILED = not (proxy.exchange.__file__ or "").endswith(".py")

needs_source = pytest.mark.skipif(
    IS_COMPILED, reason="puts something else in place of a class or constant, which compiled code does not notice"
)
