"""What a replay is asked for, checked; the plan of its rows; and which of several senders sends which of them.

Sharding: a row belongs to a shard by the BLAKE2 hash of its session's id, a row without a session by its index, so that
a session's turns have one sender and every process finds the same answer by itself. Shards of shards divide what is
left of that number, so `--shard 1/4` is the same quarter however many processes send it. The due times are those of the
whole plan, and prompts follow from (seed, row): nothing that is sent depends on how many send it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from replay.arrivals import ArrivalOptions
from replay.client import FAMILIES, Endpoint
from replay.metrics import Slo
from replay.prompts import PromptOptions
from replay.rows import open_rows
from replay.schedule import Planned, PlanOptions, Ties, plan
from replay.source import SourceOptions
from replay.verdict import MAX_LAG_S, Limits

Sessions = Literal["independent", "ordered", "think-time"]
Late = Literal["send", "drop"]

MAX_SENDERS = 1024
MAX_START_AHEAD_S = 86_400.0

_RUN_ID = re.compile(r"[!-~]{1,100}")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index`, from 0, of `count`. Raises ValueError naming the value and the rule."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAX_SENDERS:
            raise ValueError(f"shard: expected i/n with 0 <= i < n <= {MAX_SENDERS}, got {self.index}/{self.count}")


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Of `i/n`, or of `auto/n` with Kubernetes' JOB_COMPLETION_INDEX. Raises ValueError naming value and rule."""
    index, slash, count = text.partition("/")
    if index == "auto":
        index = environment.get("JOB_COMPLETION_INDEX", "")
        if not index:
            raise ValueError("shard: expected JOB_COMPLETION_INDEX in the environment with auto/n, got none")
    if not slash or not re.fullmatch(r"[0-9]{1,9}", index) or not re.fullmatch(r"[0-9]{1,9}", count):
        raise ValueError(f"shard: expected i/n or auto/n, as 0/4, got {text!r}")
    return Shard(int(index), int(count))


def check_start_at(start_at_s: float, now_s: float) -> None:
    """Raises ValueError for a zero in the past, or more than a day ahead. Both in epoch seconds."""
    if not 0 < start_at_s - now_s <= MAX_START_AHEAD_S:
        raise ValueError(
            f"start at: expected a time within the next {MAX_START_AHEAD_S / 3600:g} hours,"
            f" got {start_at_s:.3f}, which is {start_at_s - now_s:+.3f} s from now"
        )


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What to replay, at what, and how. Raises ValueError naming the option, the value and the rule."""

    target: str
    """http[s]://HOST[:PORT][/PREFIX]; a trailing /v1 is understood."""
    model: str
    """To ask for; empty is each row's own, by the source's map of models."""
    speed: float = 1.0
    limit: int | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    """Which rows of the trace; its speed and seed are set from here."""
    arrivals: ArrivalOptions = field(default_factory=ArrivalOptions)
    """When they are due, if not as the trace says."""
    warmup_s: float = 0.0
    """Of the replay: what is due before is sent, and in none of the figures."""
    seed: int = 0
    ties: Ties = "spread"
    endpoint: Endpoint = "chat"
    stream: bool = True
    """Of chat and completions."""
    prompts: PromptOptions = field(default_factory=PromptOptions)
    format: str | None = None
    """Of the trace; None finds it out."""
    api_key_env: str | None = None
    """The environment variable that holds the key, so that no secret is an argument."""
    run_id: str | None = None
    """None makes one."""
    samples: Path | None = None
    json: Path | None = None
    html: Path | None = None
    metrics_urls: tuple[str, ...] = ()
    """Of the servers' metrics; none is the target's /metrics."""
    slo: Slo | None = None
    min_goodput: float | None = None
    """Of `slo`: see `replay.verdict`, as for the next two."""
    max_lag_s: float = MAX_LAG_S
    max_in_flight: int | None = None
    timeout_s: float = 600.0
    """A request's, from its start to its last byte."""
    max_error_rate: float | None = None
    quiet: bool = False
    sessions: Sessions = "independent"
    """Whether a session's turn waits for the one before: see `replay.turns`."""
    late: Late = "send"
    late_after_s: float = 1.0
    """With `late` "drop": a row that is later than this when its turn comes is counted and not sent."""
    processes: int | None = None
    """Sender processes on this host; None decides by the offered rate where that is known."""
    shard: Shard | None = None
    """Of the plan; None is all of it."""
    start_at_s: float | None = None
    """Schedule zero in epoch seconds; None is when the first prompts are ready."""
    ray: str | None = None
    """Address of the Ray cluster whose nodes send; `auto` finds a running one, `local` starts one here."""
    senders: int | None = None
    """Actors on that cluster; None is one a node."""
    injection_token: bytes | None = field(default=None, repr=False)
    """Of a gateway's own injector: its requests are `injected` and not `replay`."""

    def __post_init__(self) -> None:
        self.plan_options()
        if self.arrivals.process != "trace" and self.speed != 1:
            raise ValueError(f"speed: expected 1 with the process {self.arrivals.process}, got {self.speed:g}")
        if self.endpoint not in FAMILIES:
            raise ValueError(f"endpoint: expected chat, completions or embeddings, got {self.endpoint!r}")
        if self.endpoint == "embeddings" and self.prompts.history != "none":
            raise ValueError(f"history: expected none with the endpoint embeddings, got {self.prompts.history}")
        if self.api_key_env is not None and "authorization" in (name.lower() for name, _ in self.prompts.extra_headers):
            raise ValueError("header authorization: expected without an API key, which is sent in it, got both")
        if self.run_id is not None and not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"run id: expected 1 to 100 visible ASCII characters, got {self.run_id!r}")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max in flight: expected requests >= 1, got {self.max_in_flight}")
        if not 0 < self.timeout_s < 1e9:
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout_s:g}")
        if self.min_goodput is not None and self.slo is None:
            raise ValueError("min goodput: expected with an slo, got no slo")
        if self.slo is not None and not self.stream and self.slo.bounds().keys() - {"e2e"}:
            raise ValueError(
                "slo: expected only e2e where answers are not streamed, got a bound on first or next tokens"
            )
        self.limits()
        if self.sessions not in get_args(Sessions):
            raise ValueError(f"sessions: expected one of {', '.join(get_args(Sessions))}, got {self.sessions!r}")
        if self.late not in get_args(Late):
            raise ValueError(f"late: expected send or drop, got {self.late!r}")
        if not 0 <= self.late_after_s < 1e9:
            raise ValueError(f"late after: expected seconds >= 0, got {self.late_after_s:g}")
        for name, number in (("processes", self.processes), ("senders", self.senders)):
            if number is not None and not 1 <= number <= MAX_SENDERS:
                raise ValueError(f"{name}: expected 1 to {MAX_SENDERS}, got {number}")
        if self.senders is not None and self.ray is None:
            raise ValueError(f"senders: expected with a Ray address only, got {self.senders} without one")
        if self.ray is not None:
            for name, value in (("processes", self.processes), ("shard", self.shard), ("start at", self.start_at_s)):
                if value is not None:
                    raise ValueError(f"{name}: expected without a Ray address, which has its own senders, got both")
        many = self.senders or self.processes or 1
        if self.max_in_flight is not None and self.max_in_flight < many:
            raise ValueError(
                f"max in flight: expected at least 1 for each of {many} senders, which share it,"
                f" got {self.max_in_flight}"
            )

    def plan_options(self) -> PlanOptions:
        """The schedule's part."""
        return PlanOptions(self.speed, 0.0, None, self.limit, self.ties, self.seed, self.warmup_s)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that will be asked for, as far as that is known beforehand."""
        return (self.model,) if self.model else tuple(dict.fromkeys(self.source.model_map.values()))

    def limits(self) -> Limits:
        """The verdict's part."""
        return Limits(self.max_lag_s, max_error_rate=self.max_error_rate, min_goodput=self.min_goodput)


def plan_file(trace: Path | None, options: ReplayOptions) -> Iterator[Planned]:
    """The schedule of a trace file, or of a profile's rows, read as it is asked for. Raises as `replay` does."""
    source = dataclasses.replace(options.source, speed=options.speed, seed=options.seed)
    return plan(open_rows(trace, source, options.arrivals, format=options.format), options.plan_options())


def rows_of(planned: Iterable[Planned], shards: Sequence[Shard]) -> Iterator[Planned]:
    """The rows of a shard, of a shard of a shard and so on; of the whole plan without any."""
    parts = [(shard.index, shard.count) for shard in shards if shard.count > 1]
    if not parts:
        yield from planned
        return
    for row in planned:
        number = _number_of(row)
        for index, count in parts:
            number, place = divmod(number, count)
            if place != index:
                break
        else:
            yield row


def _number_of(row: Planned) -> int:
    if row.session_id is None:
        return row.index
    return int.from_bytes(hashlib.blake2b(row.session_id.encode(errors="surrogatepass"), digest_size=8).digest())
