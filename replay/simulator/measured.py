"""Measured steps out of a replay's samples, for who has no log of a server's steps: samples file in, rows to fit out.

A sample says when its first and its last token came. Between them the server ran one step a token, and what else was
in those steps is known from the other samples: so each request is one row, the mean of its decoding steps.

    prefill_tokens     prompts whose first token came in between, over the steps
    decode_sequences   tokens that all requests decoded in between, over the steps
    context_tokens     the tokens that these had in the KV cache, over the steps
    step_s             its time per output token

A request decodes evenly but for the steps that also compute a prompt, which last longer by what the prompt costs. That
is known from a fit, so the rows are made and fitted ROUNDS times; in the first, all steps count as equally long.

A request that was alone until its first token adds a row of its own: one step that computed its prompt, of the length
of its TTFT. The rows are weighted by their steps. What is not in the samples is taken for none: prefix-cache hits,
preemptions, other clients. Where there were any, the fit is worse.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from replay.simulator.costs import StepCosts, fit_costs, read_step_rows

MAX_ROWS: Final = 4000
"""Requests of which rows are made, spread over the run; each is held against all others."""

ROUNDS: Final = 4

Array = NDArray[np.float64]


class _Line(msgspec.Struct):
    """What a line of `burstgate replay --samples` or of `burstgate simulate --output` says about steps."""

    due_s: float
    outcome: str
    sent_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    request_tokens: int | None = None
    request_tokens_got: int | None = None
    request_tokens_asked: int | None = None
    response_tokens: int | None = None
    response_tokens_got: int | None = None
    response_tokens_asked: int | None = None
    cached_tokens: int = 0


def fit_file(path: Path) -> StepCosts:
    """The costs that fit a file of steps (CSV) or of samples (JSON lines) best.

    Raises ValueError naming file, line and rule, or what is too little to tell the costs apart; OSError when the file
    cannot be read.
    """
    with path.open("rb") as stream:
        is_samples = stream.read(64).lstrip().startswith(b"{")
    try:
        return fit_samples(read_samples(path)) if is_samples else fit_costs(read_step_rows(path))
    except ValueError as error:
        place = "" if str(error).startswith(str(path)) else f"{path}: "
        raise ValueError(f"{place}{error}") from None


def read_samples(path: Path) -> Array:
    """The requests of a samples file that ended well; shape (n, 5): sent, first token and last token, in seconds,
    prompt tokens computed and answer tokens.

    Raises ValueError naming file, line and rule; OSError when the file cannot be read.
    """
    decoder = msgspec.json.Decoder(_Line)
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: expected a sample as JSON: {error}") from None
            prompt = _first_known(sample.request_tokens, sample.request_tokens_got, sample.request_tokens_asked)
            answer = _first_known(sample.response_tokens, sample.response_tokens_got, sample.response_tokens_asked)
            if sample.outcome != "ok" or sample.ttft_s is None or prompt is None or not answer:
                continue
            sent_s = sample.due_s if sample.sent_s is None else sample.sent_s
            first_s = sent_s + sample.ttft_s
            last_s = first_s + (sample.tpot_s or 0.0) * (answer - 1)
            found.append((sent_s, first_s, last_s, prompt - sample.cached_tokens, answer))
    return np.array(found, np.float64).reshape(-1, 5)


def fit_samples(samples: Array) -> StepCosts:
    """The costs that fit samples best. samples: as `read_samples` gives them. Raises ValueError as `fit_costs` does."""
    costs = fit_costs(*rows_of_samples(samples))
    for _ in range(ROUNDS - 1):
        costs = fit_costs(*rows_of_samples(samples, 1 / costs.prefill_tokens_per_s))
    return costs


def rows_of_samples(samples: Array, prefill_s: float = 0.0) -> tuple[Array, Array]:
    """Mean steps for `fit_costs` and the weight of each: shapes (m, 4) and (m,).

    samples: shape (n, 5), as `read_samples` gives them.
    prefill_s: what a prompt token is known to cost.
    """
    samples = samples[np.argsort(samples[:, 1], kind="stable")]
    sent_s, first_s, last_s, prompts, answers = samples.T
    steps = np.maximum(answers - 1, 0.0)
    # A clock that stands still while prompts are computed: on it the steps of a batch are about equally long.
    spent_s = np.concatenate(([0.0], np.cumsum(prompts) * prefill_s))
    begin_s, end_s = (at_s - spent_s[np.searchsorted(first_s, at_s, side="right")] for at_s in (first_s, last_s))
    spans_s = np.where(end_s > begin_s, end_s - begin_s, np.inf)
    rows: list[tuple[float, float, float, float]] = []
    weights: list[float] = []
    decoding = np.flatnonzero((steps > 0) & (end_s > begin_s))
    for i in decoding[:: -(-len(decoding) // MAX_ROWS) or 1]:
        # Half a step later than the tokens: the prompts that were computed together with its own stay out.
        half_s = (last_s[i] - first_s[i]) / steps[i] / 2
        low, high = np.searchsorted(first_s, (first_s[i] + half_s, last_s[i] + half_s), side="right")
        begins = np.clip((begin_s[i] - begin_s) / spans_s, 0.0, 1.0)
        ends = np.clip((end_s[i] - begin_s) / spans_s, 0.0, 1.0)
        shares = ends - begins
        decoded = float(shares @ steps)
        # The m-th decoding step of a request finds its prompt and m - 1 tokens in the cache.
        context = float((shares * steps) @ (prompts - 0.5 + steps * (begins + ends) / 2))
        rows.append(
            (float(prompts[low:high].sum()) / steps[i], decoded / steps[i], context / steps[i], 2 * half_s)
        )  # fmt: skip
        weights.append(float(steps[i]))
    # Alone: the request sent before it had ended when it was sent, and none was sent until its first token.
    order = np.argsort(sent_s, kind="stable")
    busy_until_s = -np.inf
    for i, after in pairwise([*order.tolist(), -1]):
        if busy_until_s < sent_s[i] and (after < 0 or sent_s[after] >= first_s[i]):
            rows.append((prompts[i], 0.0, 0.0, first_s[i] - sent_s[i]))
            weights.append(1.0)
        busy_until_s = max(busy_until_s, last_s[i])
    return np.array(rows, np.float64).reshape(-1, 4), np.array(weights, np.float64)


def _first_known(*counts: int | None) -> int | None:
    return next((count for count in counts if count is not None), None)
