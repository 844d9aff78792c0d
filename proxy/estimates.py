"""Token counts where no usage came."""

from __future__ import annotations

from typing import ClassVar


class Estimates:
    """How many tokens a request body has, learned from those whose usage came back.

    Used only where an answer began and no usage arrived. Before anything is learned, 4 bytes count as a token.
    """

    MAX_MODELS: ClassVar[int] = 256

    def __init__(self) -> None:
        self._tokens_per_byte: dict[str | None, float] = {}

    def learn(self, model: str | None, body_bytes: int, request_tokens: int) -> None:
        """One request whose usage is known."""
        ratio = request_tokens / body_bytes
        old = self._tokens_per_byte.get(model)
        if old is not None or len(self._tokens_per_byte) < self.MAX_MODELS:
            self._tokens_per_byte[model] = ratio if old is None else 0.9 * old + 0.1 * ratio

    def request_tokens(self, model: str | None, body_bytes: int) -> int | None:
        """The estimate, at least 1; None for a body that was not read."""
        return max(1, round(body_bytes * self._tokens_per_byte.get(model, 0.25))) if body_bytes else None
