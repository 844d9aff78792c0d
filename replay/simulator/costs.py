"""What a step costs on a GPU: rough presets from data sheets, and a fit to the steps of a measured run. Pure.

    step_s = step_base_s + prefill tokens / prefill_tokens_per_s
           + decoding sequences * step_per_seq_s + context tokens * step_per_context_token_s

The presets are a roofline, good for orders of magnitude and for comparing loads, not for buying hardware. Their numbers
come from the vendors' data sheets (dense BF16 rate, memory bandwidth, memory) and the models' published shapes:

    step_base_s              weights / (bandwidth * 0.8), 1 ms for the scheduler and the launch, and with tensor
                             parallelism 2 all-reduces of 15 us a layer
    prefill_tokens_per_s     FLOP/s * 0.45 / (2 * parameters)
    step_per_seq_s           as much arithmetic as a prompt token, and 20 us for sampling and bookkeeping
    step_per_context_token_s KV bytes a token / (bandwidth * 0.8)
    kv_capacity_tokens       (memory * 0.9 - weights - 2 GB a GPU) / KV bytes a token

The shares 0.8 and 0.45 are what well-tuned kernels reach. Attention's share of a prefill is left out but for reading
the context. A fit (`fit_costs`) replaces the four cost settings by what a server really did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

ROW_FIELDS = ("prefill_tokens", "decode_sequences", "context_tokens", "step_s")
_BANDWIDTH_SHARE = 0.8
_ARITHMETIC_SHARE = 0.45
_OVERHEAD_S = 0.001
_ALL_REDUCE_S = 15e-6
_BOOKKEEPING_S = 20e-6
_RESERVE_BYTES = 2e9
_LEAST_S = 1e-12
"""A prompt token that costs nothing would be an infinite rate."""


@dataclass(frozen=True, slots=True)
class _Gpu:
    flops: float
    bytes_per_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class _Model:
    parameters: float
    layers: int
    kv_heads: int
    head_size: int = 128

    @property
    def weight_bytes(self) -> float:
        return 2 * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head_size


_H100 = _Gpu(989e12, 3.35e12, 80e9)
_A100 = _Gpu(312e12, 2.039e12, 80e9)
_L4 = _Gpu(121e12, 0.3e12, 24e9)
# Llama 3.1, in BF16.
_8B = _Model(8.03e9, 32, 8)
_70B = _Model(70.6e9, 80, 8)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """The cost settings of a SimulatorConfig."""

    prefill_tokens_per_s: float
    step_base_s: float
    step_per_seq_s: float
    step_per_context_token_s: float

    def settings(self) -> dict[str, float]:
        """By the names of SimulatorConfig's fields."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _preset(gpu: _Gpu, model: _Model, gpus: int, max_model_len: int) -> Mapping[str, float | int | bool]:
    bandwidth = gpus * gpu.bytes_per_s * _BANDWIDTH_SHARE
    prefill_s = 2 * model.parameters / (gpus * gpu.flops * _ARITHMETIC_SHARE)
    all_reduce_s = 2 * model.layers * _ALL_REDUCE_S if gpus > 1 else 0.0
    costs = StepCosts(
        prefill_tokens_per_s=1 / prefill_s,
        step_base_s=model.weight_bytes / bandwidth + _OVERHEAD_S + all_reduce_s,
        step_per_seq_s=prefill_s + _BOOKKEEPING_S,
        step_per_context_token_s=model.kv_bytes_per_token / bandwidth,
    )
    kv_bytes = gpus * (gpu.memory_bytes * 0.9 - _RESERVE_BYTES) - model.weight_bytes
    return MappingProxyType(
        {
            **costs.settings(),
            "kv_capacity_tokens": int(kv_bytes / model.kv_bytes_per_token),
            "max_model_len": max_model_len,
            "enable_prefix_caching": True,
        }
    )


PRESETS: Mapping[str, Mapping[str, float | int | bool]] = MappingProxyType(
    {
        "h100-8b": _preset(_H100, _8B, 1, 131_072),
        "a100-8b": _preset(_A100, _8B, 1, 131_072),
        "l4-8b": _preset(_L4, _8B, 1, 16_384),
        "h100-70b-tp4": _preset(_H100, _70B, 4, 131_072),
        "a100-70b-tp4": _preset(_A100, _70B, 4, 131_072),
    }
)
"""Settings of SimulatorConfig by name: GPU, size of a Llama 3.1 in BF16, GPUs under tensor parallelism."""


def fit_costs(rows: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> StepCosts:
    """The costs that fit measured steps best: least squares, none of them negative.

    rows: shape (n, 4), n >= 4, the columns of ROW_FIELDS: tokens, sequences, tokens and seconds, all >= 0.
    weights: shape (n,), > 0: how many steps each row is the mean of; None is one each.
    Raises ValueError naming the first row that is out of range, or what is too little to tell the costs apart.
    The fit is exact least squares under the constraint: of the fits to each subset of the four terms, the best one
    without a negative coefficient (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23).
    """
    if rows.ndim != 2 or rows.shape[1] != len(ROW_FIELDS):
        raise ValueError(f"step rows: expected {len(ROW_FIELDS)} columns, {', '.join(ROW_FIELDS)}, got {rows.shape}")
    wrong = np.argwhere(~(np.isfinite(rows) & (rows >= 0)))
    if wrong.size:
        row, column = wrong[0]
        raise ValueError(
            f"step row {row + 1}: {ROW_FIELDS[column]}: expected a finite number >= 0, got {rows[row, column]:g}"
        )
    terms = np.column_stack((np.ones(len(rows)), rows[:, :3]))
    # Tokens and sequences differ by orders of magnitude; scaled to one size, the rank can be judged.
    scale = np.abs(terms).max(axis=0, initial=0.0)
    scale[scale == 0] = 1.0
    if len(rows) < 4 or np.linalg.matrix_rank(terms / scale) < 4:
        raise ValueError(
            f"step rows: {len(rows)} rows can not tell the four costs apart: expected steps that differ in prefill"
            " tokens, in decoding sequences and in context tokens, independently of each other"
        )
    root = np.sqrt(np.ones(len(rows)) if weights is None else weights)
    terms, seconds = terms * root[:, None], rows[:, 3] * root
    best, best_error = np.zeros(4), math.inf
    for size in range(1, 5):
        for chosen in combinations(range(4), size):
            columns = list(chosen)
            found = np.linalg.lstsq(terms[:, columns] / scale[columns], seconds, rcond=None)[0] / scale[columns]
            error = float(np.sum((terms[:, columns] @ found - seconds) ** 2))
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(4), error
                best[columns] = found
    base_s, prefill_s, sequence_s, context_s = best.tolist()
    return StepCosts(1 / max(prefill_s, _LEAST_S), base_s, sequence_s, context_s)


def read_step_rows(path: Path) -> NDArray[np.float64]:
    """The rows of a CSV file whose header is ROW_FIELDS; shape (n, 4).

    Raises ValueError naming file, line, value and rule, OSError when the file cannot be read.
    """
    rows = []
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        header = next(lines, "").strip()
        if header.replace(" ", "") != ",".join(ROW_FIELDS):
            raise ValueError(f"{path}:1: expected the header {','.join(ROW_FIELDS)}, got {header[:100]!r}")
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            try:
                row = [float(cell) for cell in line.split(",")]
            except ValueError:
                row = []
            if len(row) != len(ROW_FIELDS) or not all(0 <= cell < math.inf for cell in row):
                raise ValueError(f"{path}:{number}: expected 4 finite numbers >= 0, got {line.strip()[:100]!r}")
            rows.append(row)
    return np.array(rows, np.float64).reshape(-1, len(ROW_FIELDS))
