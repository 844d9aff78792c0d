"""The one definition of each latency. The gateway and the replayer both call these; all take monotonic nanoseconds."""

from __future__ import annotations


def ttft_s(sent_ns: int, first_chunk_ns: int | None) -> float | None:
    """Time to first token: first content chunk minus request sent, in seconds; None when no content came."""
    return None if first_chunk_ns is None else (first_chunk_ns - sent_ns) / 1e9


def tpot_s(first_chunk_ns: int | None, last_chunk_ns: int | None, output_tokens: int | None) -> float | None:
    """Time per output token: (last chunk - first chunk) / (output tokens - 1), in seconds; None under 2 tokens."""
    if first_chunk_ns is None or last_chunk_ns is None or output_tokens is None or output_tokens < 2:
        return None
    return (last_chunk_ns - first_chunk_ns) / 1e9 / (output_tokens - 1)


def e2e_s(sent_ns: int, last_byte_ns: int) -> float:
    """End to end: last byte minus request sent, in seconds."""
    return (last_byte_ns - sent_ns) / 1e9
