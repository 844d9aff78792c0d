"""Continuous batching on a simulated GPU, sans-IO: the caller owns the clock and the requests, this owns the batch.

The rules are those of vLLM's v1 scheduler, without prefix caching:
- The KV cache is counted in blocks of 16 tokens. A sequence holds the blocks of its computed tokens.
- A step first gives every decoding sequence one token, then spends what is left of the token budget on prompts, oldest
  first, a long prompt in chunks over several steps. The chunk that ends a prompt produces the first token.
- Admission is first come, first served: when a slot is free and the whole prompt's blocks are. It stops at the first
  sequence that does not fit, and in a step that preempted.
- When a decoding sequence needs a block and none is free, the youngest running sequence is preempted: it gives up its
  blocks, goes back to the head of the queue and is computed again, prompt and output so far, when it is readmitted.
- A step lasts `base + prompt tokens / prefill rate + decoding sequences * per sequence`.

The running set is always in order of arrival, so the oldest is never preempted for another and always advances: every
sequence finishes. Same calls, same results.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from replay.simulator.config import SimulatorConfig

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to run. `output_tokens` 0 is a pooling request: it finishes when its prompt is computed."""

    id: int
    prompt_tokens: int
    output_tokens: int
    arrived_s: float = 0.0
    """On the caller's clock, the one of `Engine.step`."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step does. The tokens exist when the step ends, `duration_s` after its start."""

    duration_s: float
    produced: tuple[int, ...]
    """Ids of the sequences that produce a token each, in batch order."""
    finished: tuple[int, ...]
    """Ids of the sequences that end with this step, after their token."""
    preempted: tuple[int, ...]
    """Ids that went back to the queue, each once."""
    admitted: tuple[tuple[int, float], ...]
    """Ids that left the queue for the first time, with the seconds that they spent in it."""
    prompt_tokens: int
    """Prompt tokens computed, recomputation included."""


class _Sequence:
    __slots__ = ("arrived_s", "blocks", "computed", "generated", "id", "output_tokens", "prompt_tokens", "queued_s")

    def __init__(self, request: SequenceRequest) -> None:
        self.id = request.id
        self.prompt_tokens = request.prompt_tokens
        self.output_tokens = request.output_tokens
        self.arrived_s = request.arrived_s
        self.queued_s: float | None = None
        self.blocks = 0
        self.computed = 0
        self.generated = 0


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


class Engine:
    """The batch of one simulated GPU."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self.total_blocks = config.kv_capacity_tokens // BLOCK_TOKENS
        self.free_blocks = self.total_blocks
        self._running: dict[int, _Sequence] = {}
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return 1.0 - self.free_blocks / self.total_blocks

    def add(self, request: SequenceRequest) -> None:
        """Puts a sequence at the end of the queue.

        Raises ValueError when it has no prompt, when its id is in use, or when it would not fit in an empty cache.
        """
        if request.prompt_tokens < 1 or request.output_tokens < 0:
            raise ValueError(
                f"sequence {request.id}: expected a prompt of at least 1 token and an output of at least 0,"
                f" got {request.prompt_tokens} and {request.output_tokens}"
            )
        if request.id in self._running or request.id in self._waiting:
            raise ValueError(f"sequence {request.id}: this id is in use")
        # The last token's own KV is never computed.
        needed = blocks_for(request.prompt_tokens + max(request.output_tokens - 1, 0))
        if needed > self.total_blocks:
            raise ValueError(
                f"sequence {request.id}: its {request.prompt_tokens} + {request.output_tokens} tokens need {needed}"
                f" KV-cache blocks, and there are {self.total_blocks}"
            )
        self._waiting[request.id] = _Sequence(request)

    def abort(self, sequence_id: int) -> bool:
        """Takes a sequence out and frees its blocks; False when it is not here (any more)."""
        sequence = self._running.pop(sequence_id, None) or self._waiting.pop(sequence_id, None)
        if sequence is None:
            return False
        self.free_blocks += sequence.blocks
        return True

    def step(self, now_s: float) -> Step:
        """Runs one step that starts at `now_s`; of no duration and empty when idle."""
        config = self._config
        produced: list[int] = []
        finished: list[int] = []
        preempted: list[int] = []
        prefilling: list[_Sequence] = []
        decoding = 0

        for sequence in list(self._running.values()):
            if not sequence.blocks:
                continue  # preempted for an older one, earlier in this step
            computed = sequence.computed
            if not sequence.generated or computed < sequence.prompt_tokens + sequence.generated - 1:
                prefilling.append(sequence)
                continue
            if computed == sequence.blocks * BLOCK_TOKENS:
                if not self._make_room(sequence, preempted):
                    continue
                self.free_blocks -= 1
                sequence.blocks += 1
            sequence.computed = computed + 1
            sequence.generated += 1
            decoding += 1
            produced.append(sequence.id)
            if sequence.generated == sequence.output_tokens:
                finished.append(sequence.id)

        budget = config.max_batched_tokens - decoding
        prompt_tokens = 0
        for sequence in prefilling:
            if budget > prompt_tokens:
                prompt_tokens += self._prefill(sequence, budget - prompt_tokens, produced, finished)
        admitted: list[tuple[int, float]] = []
        while self._waiting and not preempted and budget > prompt_tokens and len(self._running) < config.max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            blocks = blocks_for(sequence.prompt_tokens + sequence.generated)
            if blocks > self.free_blocks:
                break
            del self._waiting[sequence.id]
            self._running[sequence.id] = sequence
            self.free_blocks -= blocks
            sequence.blocks = blocks
            if sequence.queued_s is None:
                sequence.queued_s = max(0.0, now_s - sequence.arrived_s)
                admitted.append((sequence.id, sequence.queued_s))
            prompt_tokens += self._prefill(sequence, budget - prompt_tokens, produced, finished)

        for sequence_id in finished:
            self.free_blocks += self._running.pop(sequence_id).blocks
        duration_s = 0.0
        if decoding or prompt_tokens:
            duration_s = (
                config.step_base_s + prompt_tokens / config.prefill_tokens_per_s + decoding * config.step_per_seq_s
            )
        return Step(duration_s, tuple(produced), tuple(finished), tuple(preempted), tuple(admitted), prompt_tokens)

    def _make_room(self, sequence: _Sequence, preempted: list[int]) -> bool:
        """Preempts the youngest until a block is free; False when `sequence` itself had to go."""
        while self.free_blocks == 0:
            _, youngest = self._running.popitem()
            self.free_blocks += youngest.blocks
            youngest.blocks = 0
            youngest.computed = 0
            self._waiting[youngest.id] = youngest
            self._waiting.move_to_end(youngest.id, last=False)
            preempted.append(youngest.id)
            if youngest is sequence:
                return False
        return True

    def _prefill(self, sequence: _Sequence, budget: int, produced: list[int], finished: list[int]) -> int:
        """Computes up to `budget` of the tokens that a sequence lacks; their number."""
        target = sequence.prompt_tokens + sequence.generated
        tokens = min(budget, target - sequence.computed)
        sequence.computed += tokens
        if sequence.computed == target:
            if sequence.output_tokens:
                sequence.generated += 1
                produced.append(sequence.id)
            if sequence.generated == sequence.output_tokens:
                finished.append(sequence.id)
        return tokens
