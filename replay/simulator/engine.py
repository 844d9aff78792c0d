"""Continuous batching on a simulated GPU, sans-IO: the caller owns the clock and the requests, this owns the batch.

The rules are those of vLLM's v1 scheduler:
- The KV cache is counted in blocks (see `blocks`). A sequence holds the blocks of its computed tokens.
- A step first gives every decoding sequence one token, then spends what is left of the token budget on prompts, oldest
  first, a long prompt in chunks over several steps. The chunk that ends a prompt produces the first token.
- Admission is first come, first served: when a slot is free and the whole prompt's blocks are, which it then gets at
  once. It stops at the first sequence that does not fit, and in a step that preempted.
- With prefix caching, a prompt shares the leading blocks that are in the cache and computes the rest, the last token at
  least. A block is in the cache from the step that computes it.
- When a decoding sequence needs a block and none is free, the youngest running sequence is preempted: it gives up its
  blocks, goes back to the head of the queue and is computed again, prompt and output so far, when it is readmitted.
- A step lasts what `SimulatorConfig.step_s` says.

The running set is always in order of arrival, so the oldest is never preempted for another and always advances: every
sequence finishes. Same calls, same results.

Between two events nothing but the counts change. `skip` runs such steps at once, and leaves the engine as `step` would:
same times to the last bit, same blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from replay.simulator.blocks import BlockPool
from replay.simulator.config import SimulatorConfig

BLOCK_TOKENS = 16
"""vLLM's block size, and the default of `SimulatorConfig.block_size`."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to run. `output_tokens` 0 is a pooling request: it finishes when its prompt is computed."""

    id: int
    prompt_tokens: int
    output_tokens: int
    arrived_s: float = 0.0
    """On the caller's clock, the one of `Engine.step`."""
    block_hashes: Sequence[int] = ()
    """Of the prompt's full blocks, from its beginning, >= 0; each covers all before it. Fewer, or none, share less."""


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
    started: tuple[int, ...] = ()
    """Ids of the sequences that produce their first token."""
    cached: tuple[tuple[int, int], ...] = ()
    """Ids of `admitted` that found a part of their prompt in the cache, with its tokens."""
    decode_sequences: int = 0
    """Sequences that compute a token which they produced before."""
    context_tokens: int = 0
    """Tokens that the batch had in the KV cache when the step began."""


class _Sequence:
    __slots__ = (
        "arrived_s",
        "blocks",
        "computed",
        "generated",
        "hashes",
        "id",
        "named",
        "output_tokens",
        "prompt_tokens",
        "queued_s",
    )

    def __init__(self, request: SequenceRequest) -> None:
        self.id = request.id
        self.prompt_tokens = request.prompt_tokens
        self.output_tokens = request.output_tokens
        self.arrived_s = request.arrived_s
        self.hashes = request.block_hashes
        self.queued_s: float | None = None
        self.blocks = 0
        """All that it holds."""
        self.named: list[int] = []
        """Hashes of those that others can find."""
        self.computed = 0
        self.generated = 0


def blocks_for(tokens: int, block_size: int = BLOCK_TOKENS) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


class Engine:
    """The batch of one simulated GPU."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._pool = BlockPool(config.num_blocks)
        self._running: dict[int, _Sequence] = {}
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()
        self.steps = 0
        self.peak_blocks = 0
        """Most blocks that were in use in a step."""
        self.block_seconds = 0.0
        """Blocks in use, integrated over the steps."""
        self.prefix_queries = 0
        """Prompt tokens looked for in the cache: each prompt once, when it is first admitted."""
        self.prefix_hits = 0
        """Those that were found."""

    @property
    def total_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._pool.total

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.free

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
    def is_full(self) -> bool:
        """Whether the queue has reached its limit, so that the caller should refuse a new sequence."""
        return 0 < self._config.max_num_waiting <= len(self._waiting)

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
        needed = blocks_for(request.prompt_tokens + max(request.output_tokens - 1, 0), self._config.block_size)
        if needed > self.total_blocks:
            raise ValueError(
                f"sequence {request.id}: its {request.prompt_tokens} + {request.output_tokens} tokens need {needed}"
                f" KV-cache blocks, and there are {self.total_blocks}"
            )
        self._waiting[request.id] = _Sequence(request)

    def generated_tokens(self, sequence_id: int) -> int | None:
        """Tokens that a sequence has produced; None when it is not here (any more)."""
        sequence = self._running.get(sequence_id) or self._waiting.get(sequence_id)
        return None if sequence is None else sequence.generated

    def abort(self, sequence_id: int) -> bool:
        """Takes a sequence out and frees its blocks; False when it is not here (any more)."""
        sequence = self._running.pop(sequence_id, None) or self._waiting.pop(sequence_id, None)
        if sequence is None:
            return False
        self._release(sequence)
        return True

    def step(self, now_s: float) -> Step:
        """Runs one step that starts at `now_s`; of no duration and empty when idle."""
        config, pool, block_size = self._config, self._pool, self._config.block_size
        produced: list[int] = []
        finished: list[int] = []
        started: list[int] = []
        preempted: list[int] = []
        prefilling: list[_Sequence] = []
        decoding = context_tokens = 0

        for sequence in list(self._running.values()):
            if not sequence.blocks:
                continue  # preempted for an older one, earlier in this step
            computed = sequence.computed
            if not sequence.generated or computed < sequence.prompt_tokens + sequence.generated - 1:
                prefilling.append(sequence)
                continue
            if computed == sequence.blocks * block_size:
                if not self._make_room(sequence, preempted):
                    continue
                pool.take(1)
                sequence.blocks += 1
            sequence.computed = computed + 1
            sequence.generated += 1
            context_tokens += computed
            decoding += 1
            produced.append(sequence.id)
            if sequence.generated == sequence.output_tokens:
                finished.append(sequence.id)

        budget = config.max_batched_tokens - decoding
        prompt_tokens = 0
        for sequence in prefilling:
            if budget > prompt_tokens:
                context_tokens += sequence.computed
                prompt_tokens += self._prefill(sequence, budget - prompt_tokens, produced, started, finished)
        admitted: list[tuple[int, float]] = []
        cached: list[tuple[int, int]] = []
        while budget > prompt_tokens and not preempted and self._waiting:
            sequence = next(iter(self._waiting.values()))
            hits = self._admissible(sequence)
            if hits is None:
                break
            self._admit(sequence, hits)
            if sequence.queued_s is None:
                sequence.queued_s = max(0.0, now_s - sequence.arrived_s)
                admitted.append((sequence.id, sequence.queued_s))
                self.prefix_queries += sequence.prompt_tokens if config.enable_prefix_caching else 0
                self.prefix_hits += sequence.computed
                if hits:
                    cached.append((sequence.id, sequence.computed))
            context_tokens += sequence.computed
            prompt_tokens += self._prefill(sequence, budget - prompt_tokens, produced, started, finished)

        duration_s = config.step_s(prompt_tokens, decoding, context_tokens) if decoding or prompt_tokens else 0.0
        self._account(duration_s, pool.total - pool.free)
        for sequence_id in finished:
            self._release(self._running.pop(sequence_id))
        return Step(
            duration_s,
            tuple(produced),
            tuple(finished),
            tuple(preempted),
            tuple(admitted),
            prompt_tokens,
            tuple(started),
            tuple(cached),
            decoding,
            context_tokens,
        )

    def skip(self, now_s: float, until_s: float) -> float:
        """Runs the steps that only decode, from one that starts at `now_s`; the time when the last of them ends.

        It stops before a step that starts at `until_s` or later, in which a sequence would end, be admitted or be
        preempted, or which would compute a prompt: that one is for `step`.
        """
        running = self._running.values()
        if not running or now_s >= until_s:
            return now_s
        step_s, block_size, pool = self._config.step_s, self._config.block_size, self._pool
        # How many sequences need a block in the first step, in the second, ...; it repeats from the block size on.
        needs = [0] * block_size
        decoding, context_tokens = len(running), 0
        left = pool.total * block_size  # more than any sequence has left
        for sequence in running:
            computed, generated = sequence.computed, sequence.generated
            room = sequence.blocks * block_size - computed
            # Where the budget cut a recomputation one token short, the sequence has its next block already.
            if not generated or computed < sequence.prompt_tokens + generated - 1 or room >= block_size:
                return now_s
            needs[room] += 1
            context_tokens += computed
            if sequence.output_tokens - generated < left:
                left = sequence.output_tokens - generated
        steps = left - 1
        if steps < 1 or (self._waiting and self._admissible(next(iter(self._waiting.values()))) is not None):
            return now_s
        free = pool.free
        done = 0
        while done < steps and now_s < until_s:
            needed = needs[done % block_size]
            if needed > free:
                break
            free -= needed
            duration_s = step_s(0, decoding, context_tokens)
            self._account(duration_s, pool.total - free)
            now_s += duration_s
            context_tokens += decoding
            done += 1
        pool.take(pool.free - free)
        for sequence in running:
            sequence.computed += done
            sequence.generated += done
            sequence.blocks = blocks_for(sequence.computed, block_size)
        return now_s

    def _account(self, duration_s: float, blocks: int) -> None:
        self.steps += 1
        self.block_seconds += blocks * duration_s
        if blocks > self.peak_blocks:
            self.peak_blocks = blocks

    def _admissible(self, sequence: _Sequence) -> int | None:
        """How many cached blocks the head of the queue would share if admitted now; None when it has to wait."""
        config, pool = self._config, self._pool
        if len(self._running) >= config.max_num_seqs:
            return None
        tokens = sequence.prompt_tokens + sequence.generated
        hits = 0
        if config.enable_prefix_caching:
            # The last token is always computed: its logits are the first token's.
            hits = pool.hits(sequence.hashes, (tokens - 1) // config.block_size)
        needed = blocks_for(tokens, config.block_size) - hits
        return hits if needed + pool.unused(sequence.hashes[:hits]) <= pool.free else None

    def _admit(self, sequence: _Sequence, hits: int) -> None:
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        block_size = self._config.block_size
        sequence.named = list(sequence.hashes[:hits])
        self._pool.share(sequence.named)
        sequence.computed = hits * block_size
        sequence.blocks = blocks_for(sequence.prompt_tokens + sequence.generated, block_size)
        self._pool.take(sequence.blocks - hits)

    def _release(self, sequence: _Sequence) -> None:
        self._pool.give_back(sequence.named, sequence.blocks - len(sequence.named))
        sequence.blocks = 0
        sequence.named = []

    def _make_room(self, sequence: _Sequence, preempted: list[int]) -> bool:
        """Preempts the youngest until a block is free; False when `sequence` itself had to go."""
        while self._pool.free == 0:
            _, youngest = self._running.popitem()
            self._release(youngest)
            youngest.computed = 0
            self._waiting[youngest.id] = youngest
            self._waiting.move_to_end(youngest.id, last=False)
            preempted.append(youngest.id)
            if youngest is sequence:
                return False
        return True

    def _prefill(
        self, sequence: _Sequence, budget: int, produced: list[int], started: list[int], finished: list[int]
    ) -> int:
        """Computes up to `budget` of the tokens that a sequence lacks; their number."""
        target = sequence.prompt_tokens + sequence.generated
        before = sequence.computed
        tokens = min(budget, target - before)
        sequence.computed = after = before + tokens
        if sequence.hashes and self._config.enable_prefix_caching:
            block_size = self._config.block_size
            for block_hash in sequence.hashes[before // block_size : after // block_size]:
                if self._pool.name(block_hash):
                    sequence.named.append(block_hash)
        if after == target:
            if sequence.output_tokens:
                if not sequence.generated:
                    started.append(sequence.id)
                sequence.generated += 1
                produced.append(sequence.id)
            if sequence.generated == sequence.output_tokens:
                finished.append(sequence.id)
        return tokens
