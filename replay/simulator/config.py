"""What a simulated server is: its speed, its memory, its limits. One frozen value, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


def _setting(default: Any, unit: str, help: str) -> Any:
    return field(default=default, metadata={"unit": unit, "help": help})


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """A simulated vLLM server. The defaults are about one 8B model on one data-centre GPU.

    Raises ValueError naming the field, its value and the rule it breaks.
    """

    prefill_tokens_per_s: float = _setting(20_000.0, "tokens/s", "prompt tokens computed per second")
    step_base_s: float = _setting(0.008, "s", "duration of a step, whatever is in it")
    step_per_seq_s: float = _setting(0.00005, "s", "what each decoding sequence adds to a step")
    step_per_context_token_s: float = _setting(0.0, "s", "what each token already in the step's KV cache adds to it")
    kv_capacity_tokens: int = _setting(400_000, "tokens", "KV-cache capacity, in whole blocks")
    block_size: int = _setting(16, "tokens", "size of a KV-cache block")
    num_gpu_blocks_override: int = _setting(0, "blocks", "KV-cache blocks; 0: as many as kv_capacity_tokens holds")
    enable_prefix_caching: bool = _setting(False, "", "share the KV-cache blocks of equal prompt beginnings")
    max_num_seqs: int = _setting(256, "sequences", "most sequences that run at once; more wait")
    max_num_waiting: int = _setting(0, "sequences", "most sequences that wait, more are refused; 0: no limit")
    max_batched_tokens: int = _setting(8192, "tokens", "token budget of one step, prefill and decode together")
    max_model_len: int = _setting(16_384, "tokens", "context length: prompt and output together")
    mean_output_tokens: float = _setting(128.0, "tokens", "mean answer length where the request does not force one")
    seed: int = _setting(0, "", "seed of every answer's text and length, and of a trace's ties")
    models: tuple[str, ...] = _setting(("simulated",), "names", "models listed by /v1/models; any name is accepted")
    embedding_dimensions: int = _setting(64, "numbers", "length of an embedding")
    prompt_tokens_details: bool = _setting(False, "", "report cached tokens in usage (--enable-prompt-tokens-details)")

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "mean_output_tokens"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a finite number > 0")
        for name in ("step_base_s", "step_per_seq_s", "step_per_context_token_s"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "a finite number >= 0")
        for name in ("max_num_seqs", "max_model_len", "embedding_dimensions", "block_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_num_waiting", "num_gpu_blocks_override"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("models", bool(self.models) and all(self.models), "at least one name, none of them empty")
        # vLLM refuses to start on the same two: a step must hold every decoding sequence, the cache one whole context.
        self._require(
            "max_batched_tokens",
            self.max_batched_tokens >= self.max_num_seqs,
            f"at least max_num_seqs={self.max_num_seqs}",
        )
        self._require(
            "num_gpu_blocks_override" if self.num_gpu_blocks_override else "kv_capacity_tokens",
            self.num_blocks * self.block_size >= self.max_model_len,
            f"blocks of {self.block_size} for at least max_model_len={self.max_model_len}",
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"simulator: {name}: expected {rule}, got {getattr(self, name)!r}")

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.num_gpu_blocks_override or self.kv_capacity_tokens // self.block_size

    def step_s(self, prefill_tokens: int, decode_sequences: int, context_tokens: int) -> float:
        """Seconds that a step lasts.

        prefill_tokens: prompt tokens computed in it, recomputation included.
        decode_sequences: sequences that compute the one token which they produced before.
        context_tokens: tokens that these sequences, of both kinds, had in the KV cache when the step began.
        """
        return (
            self.step_base_s
            + prefill_tokens / self.prefill_tokens_per_s
            + decode_sequences * self.step_per_seq_s
            + context_tokens * self.step_per_context_token_s
        )

    @classmethod
    def fast(cls, **overrides: Any) -> SimulatorConfig:
        """A server whose steps take no time and whose queue hardly fills: what is left is the cost of HTTP."""
        preset = cls(
            prefill_tokens_per_s=1e12,
            step_base_s=0.0,
            step_per_seq_s=0.0,
            kv_capacity_tokens=1 << 30,
            max_num_seqs=16_384,
            max_batched_tokens=1 << 24,
        )
        return replace(preset, **overrides)


def setting_names() -> tuple[str, ...]:
    """The fields of a SimulatorConfig, in order."""
    return tuple(entry.name for entry in fields(SimulatorConfig))
