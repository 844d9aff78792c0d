"""Pseudonymised traces: what a site can hand out, row by row, without who and where.

Every field of the record is named here with what becomes of it; one that is not is left out. With a key drawn for each
export (and never kept) the same name becomes the same pseudonym inside it, and another in the next:

    request_id session_id shadow_of client_request_id  pseudonyms of one kind: a session that is named after its
                                                       first request, and a shadow after its primary, stay so
    tenant run_id                                      pseudonyms, each of its own kind
    prefix_blocks                                      keyed hashes of the blocks: what was shared stays shared
    model served_model                                 kept, or `model-1`, `model-2` ... as they appear
    received_at                                        rounded down to `coarsen_s`, moved by whole days
    endpoint                                           kept where it is one of the API's own, else `/other`
    upstream gateway shaping_rule shaping_class        left out
    everything else                                    kept

Kept are counts, durations and outcomes as recorded, `error_type` and `finish_reason` in the upstream's words: whoever
has the original rows can tell which is which by these. It hides names, and does not make rows unrecognisable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

import polars as pl

from traces.batch import SCHEMA, complete_batch

KEY_BYTES: Final = 32
DAY_S: Final = 86_400
_IDS: Final = ("request_id", "session_id", "shadow_of", "client_request_id")
_KINDS: Final = {**dict.fromkeys(_IDS, b"id"), "tenant": b"tenant", "run_id": b"run"}
_MODELS: Final = ("model", "served_model")
_KEPT: Final = (
    "elapsed_s", "request_tokens", "response_tokens", "log_type", "outcome", "status", "error_type", "ttft_s", "tpot_s",
    "queue_s", "stream", "attempts", "finish_reason", "cached_tokens", "max_tokens", "token_source", "origin",
    "agreement",
)  # fmt: skip
_ENDPOINTS: Final = (
    "", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling", "/classify",
    "/tokenize", "/detokenize", "/v1/models", "/v1/audio/transcriptions", "/v1/audio/translations",
)  # fmt: skip


class Anonymizer:
    """Takes a trace's batches in their order and gives each one's pseudonymised rows, as many and in the same order."""

    def __init__(self, key: bytes, *, coarsen_s: float = 1.0, shift_days: int = 0, hide_models: bool = False) -> None:
        """key: KEY_BYTES of fresh randomness. coarsen_s: 0 keeps the stamps. Raises ValueError."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"key: expected {KEY_BYTES} bytes, got {len(key)}")
        if not 0 <= coarsen_s <= DAY_S:
            raise ValueError(f"coarsen: expected 0 to {DAY_S} seconds, got {coarsen_s:g}")
        self._key = key
        self._coarsen_s = coarsen_s
        self._shift_s = shift_days * DAY_S
        self._hides_models = hide_models
        self._models: dict[str, str] = {}

    @property
    def said(self) -> dict[str, object]:
        """What an export says of it. The days it was moved by stay unsaid: they would undo the move."""
        return {"coarsen_s": self._coarsen_s, "is_shifted": self._shift_s != 0, "hides_models": self._hides_models}

    def __call__(self, batch: pl.DataFrame) -> pl.DataFrame:
        """One batch's rows."""
        stamps = pl.col("received_at")
        if self._coarsen_s:
            stamps = (stamps / self._coarsen_s).floor() * self._coarsen_s
        columns = [
            *(batch[name] for name in _KEPT),
            *(self._renamed(batch[name], self._pseudonyms(kind)) for name, kind in _KINDS.items()),
            *(self._renamed(batch[name], self._model) if self._hides_models else batch[name] for name in _MODELS),
            self._blocks(batch["prefix_blocks"]),
            batch.select(stamps + self._shift_s).to_series(),
            batch.select(
                pl.when(pl.col("endpoint").is_in(_ENDPOINTS))
                .then("endpoint")
                .otherwise(pl.lit("/other"))
                .alias("endpoint")
            ).to_series(),
        ]
        return complete_batch(pl.DataFrame(columns))

    @staticmethod
    def _renamed(values: pl.Series, rename: Callable[[str], str]) -> pl.Series:
        names = {old: rename(old) for old in values.drop_nulls().unique(maintain_order=True)}
        if not names:
            return values
        return values.replace_strict(names, default=None, return_dtype=pl.String())

    def _pseudonyms(self, kind: bytes) -> Callable[[str], str]:
        return lambda text: self._hash(text.encode("utf-8", "surrogatepass"), kind, 16).hex()

    def _model(self, name: str) -> str:
        return self._models.setdefault(name, f"model-{len(self._models) + 1}")

    def _blocks(self, blocks: pl.Series) -> pl.Series:
        if blocks.null_count() == len(blocks):
            return blocks
        every = blocks.explode().drop_nulls().unique()
        fresh = {old: int.from_bytes(self._hash(old.to_bytes(8, "little"), b"block", 8), "little") for old in every}
        return pl.Series(
            blocks.name,
            [None if each is None else [fresh[block] for block in each] for each in blocks.to_list()],
            dtype=SCHEMA["prefix_blocks"],
        )

    def _hash(self, value: bytes, kind: bytes, size: int) -> bytes:
        return hashlib.blake2b(value, key=self._key, person=kind, digest_size=size).digest()
