"""The database's tables, as SQLAlchemy Core metadata.

`requests` holds one row a request: `TraceRecord`'s fields in its order, so that a row, a journal frame and a batch are
the same thing in three places. Rules: enums are stored as their text; durations are double precision seconds, stamps
are epoch seconds with microseconds kept, counts are 64-bit; unknown is NULL. `prefix_blocks` is packed, little-endian,
eight bytes a block.

The key is (received_at, request_id): a request id exists once because its record carries one `received_at`, and time
leads because every reader asks for a stretch of time. SQLite keeps the rows in the key's own tree (WITHOUT ROWID).
PostgreSQL partitions by UTC day, `requests_YYYYMMDD`, with no default partition: a row of a day without its partition
is an error, never a row in a place where retention does not look. Ids compare byte by byte in both (collation C).

The migrations in `migrations/versions` are what makes a database; a test holds this file and them together.
"""

from __future__ import annotations

import datetime
import math
import re
from typing import Any

import sqlalchemy as sa

REQUESTS_COMMENTS: dict[str, str] = {
    "request_id": "UUIDv7 text; the key under which a record exists once",
    "received_at": "when the gateway received the request, epoch seconds, microseconds kept",
    "session_id": "the conversation; NULL when the request belongs to none",
    "elapsed_s": "submission to last byte, seconds",
    "model": "the model as the client asked for it",
    "request_tokens": "prompt tokens; NULL when unknown",
    "response_tokens": "output tokens, as observed, also on failures; NULL when unknown",
    "log_type": "Conversation log or API log",
    "outcome": "ok, or how the request failed",
    "client_request_id": "the client's own X-Request-Id",
    "served_model": "the model as the upstream answered",
    "status": "HTTP status sent to the client; NULL when none was sent",
    "error_type": "the upstream's own error type, or the gateway's",
    "ttft_s": "first content chunk minus request sent, seconds",
    "tpot_s": "(last chunk - first chunk) / (output tokens - 1), seconds; NULL under 2 tokens",
    "queue_s": "time held by shaping, seconds",
    "endpoint": "path of the request, without its query",
    "stream": "whether the client asked for a stream",
    "upstream": "the upstream that answered",
    "attempts": "upstream attempts made",
    "finish_reason": "why generation stopped, as the upstream says",
    "cached_tokens": "prompt tokens served from the prefix cache; NULL when unknown",
    "max_tokens": "the output limit that the client set; NULL when none",
    "token_source": "where the counts come from: usage, estimated, none",
    "prefix_blocks": "keyed hashes of prompt-prefix blocks, packed little-endian unsigned 64-bit",
    "origin": "who caused the request: client, replay, injected, shadow, imported",
    "run_id": "the replay or injection run; for imported rows the data set's name",
    "shadow_of": "request_id of the request that this one mirrors",
    "tenant": "the tenant that the request was accounted to",
    "gateway": "name of the gateway that recorded it",
    "shaping_rule": "the shaping rule that held or refused it; NULL where none did",
    "shaping_class": "the class in which that rule counted it",
    "agreement": "of a shadow: how much of its output equals its primary's, 0 to 1",
}

_BINARY_ORDER_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_REQUIRED_COLUMNS = frozenset(
    ("request_id", "received_at", "log_type", "outcome", "endpoint", "stream", "attempts", "token_source", "origin")
)
_DAY_S = 86_400
_PARTITION = re.compile(r"requests_\d{8}")


_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "request_id": _BINARY_ORDER_TEXT,
    "stream": sa.Boolean(),
    "prefix_blocks": sa.LargeBinary(),
    **dict.fromkeys(("received_at", "elapsed_s", "ttft_s", "tpot_s", "queue_s", "agreement"), sa.Double()),
    **dict.fromkeys(
        ("request_tokens", "response_tokens", "status", "attempts", "cached_tokens", "max_tokens"), sa.BigInteger()
    ),
}

metadata = sa.MetaData()

requests = sa.Table(
    "requests",
    metadata,
    *(
        sa.Column(name, _TYPES.get(name, sa.Text()), nullable=name not in _REQUIRED_COLUMNS, comment=comment)
        for name, comment in REQUESTS_COMMENTS.items()
    ),
    sa.PrimaryKeyConstraint("received_at", "request_id", name="requests_pkey"),
    comment="one row a request",
    sqlite_with_rowid=False,
    postgresql_partition_by="RANGE (received_at)",
)
_HAS_SESSION = requests.c.session_id.is_not(None)
_IS_FAILURE = sa.literal_column("outcome") != sa.literal_column("'ok'")
sa.Index(
    "requests_session",
    requests.c.session_id,
    requests.c.received_at,
    sqlite_where=_HAS_SESSION,
    postgresql_where=_HAS_SESSION,
)
sa.Index(  # what failures are looked for by stands in it, so that those that are not wanted are never read
    "requests_failures",
    requests.c.received_at,
    requests.c.request_id,
    requests.c.origin,
    requests.c.outcome,
    requests.c.model,
    sqlite_where=_IS_FAILURE,
    postgresql_where=_IS_FAILURE,
)

writers = sa.Table(
    "writers",
    metadata,
    sa.Column("writer_id", sa.Text(), primary_key=True, comment="the journal writer: one gateway worker's life"),
    sa.Column("gateway", sa.Text(), nullable=False, comment="name of the gateway it worked for"),
    sa.Column("accepted", sa.BigInteger(), nullable=False, comment="requests that it took on"),
    sa.Column("dropped", sa.JSON(), nullable=False, comment="records it dropped, by reason"),
    sa.Column("recorded", sa.BigInteger(), nullable=False, comment="records of it that reached the database"),
    sa.Column("finished", sa.Boolean(), nullable=False, comment="whether it has ended and its journal was read whole"),
    comment="the accounting behind accepted = in database + in journal + dropped",
)

pruned = sa.Table(
    "pruned",
    metadata,
    sa.Column("day", sa.Date(), primary_key=True, comment="the UTC day of the requests"),
    sa.Column("gateway", sa.Text(), primary_key=True, comment="name of the gateway that recorded them; empty for none"),
    sa.Column("rows", sa.BigInteger(), nullable=False, comment="requests taken out of the database"),
    sa.Column("archived", sa.BigInteger(), nullable=False, comment="those of them that the archive had before"),
    comment="requests that retention took out",
)

segments = sa.Table(
    "segments",
    metadata,
    sa.Column("writer_id", sa.Text(), primary_key=True, comment="the journal writer"),
    sa.Column("segment", sa.BigInteger(), primary_key=True, autoincrement=False, comment="number of its segment file"),
    sa.Column("offset_bytes", sa.BigInteger(), nullable=False, comment="frames that end at or before it are recorded"),
    comment="how far each journal segment has been recorded",
)

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("name", sa.Text(), primary_key=True, comment="the data set; run_id of its rows in requests"),
    sa.Column("format", sa.Text(), nullable=False, comment="format of the file it came from"),
    sa.Column("day_zero", sa.Date(), nullable=False, comment="the local day on which its Timestamp 0 lies"),
    sa.Column("timezone", sa.Text(), nullable=False, comment="IANA time zone of day_zero"),
    sa.Column("stamps", sa.Text(), nullable=False, comment="how it spells Timestamp: int or float"),
    sa.Column("rows", sa.BigInteger(), nullable=False, comment="rows of the file"),
    sa.Column("imported_at", sa.Double(), nullable=False, comment="when it was first imported, epoch seconds"),
    comment="traces that came from files",
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_id", sa.Text(), primary_key=True, comment="the replay; run_id of its rows in requests"),
    sa.Column("started_at", sa.Double(), nullable=False, comment="schedule zero, epoch seconds"),
    sa.Column("target", sa.Text(), nullable=False, comment="base URL that it was sent to"),
    sa.Column("model", sa.Text(), nullable=False, comment="the model that it asked for"),
    sa.Column("sent", sa.BigInteger(), nullable=False, comment="requests tried and measured"),
    sa.Column("ok", sa.BigInteger(), nullable=False, comment="those that ended well"),
    sa.Column("verdict", sa.Text(), nullable=False, comment="good, missed or invalid"),
    sa.Column("options", sa.JSON(), nullable=False, comment="what was asked for"),
    sa.Column("summary", sa.JSON(), nullable=False, comment="what came out"),
    comment="replays that were stored",
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("key_id", sa.Text(), primary_key=True, comment="the key; not a secret"),
    sa.Column("name", sa.Text(), nullable=False, comment="whose it is, for people"),
    sa.Column("role", sa.Text(), nullable=True, comment="viewer, operator or admin; NULL for a client's key"),
    sa.Column("tenant", sa.Text(), nullable=True, comment="the tenant that its requests are accounted to"),
    sa.Column("prefix", sa.Text(), nullable=False, comment="how the key begins"),
    sa.Column("hash", sa.Text(), nullable=False, unique=True, comment="HMAC-SHA256 of the key, hexadecimal"),
    sa.Column("secret_id", sa.Text(), nullable=False, comment="which secret the hash was made with"),
    sa.Column("created_at", sa.Double(), nullable=False, comment="epoch seconds"),
    sa.Column("expires_at", sa.Double(), nullable=True, comment="epoch seconds; NULL: never"),
    sa.Column("revoked_at", sa.Double(), nullable=True, comment="epoch seconds; NULL: not revoked"),
    sa.Column("rotated_at", sa.Double(), nullable=True, comment="when a successor was made, epoch seconds"),
    sa.Column("successor", sa.Text(), nullable=True, comment="key_id of that successor"),
    sa.Column("requests_per_s", sa.Double(), nullable=True, comment="limit; NULL: none of its own"),
    sa.Column("tokens_per_s", sa.Double(), nullable=True, comment="limit; NULL: none of its own"),
    sa.Column("concurrency", sa.BigInteger(), nullable=True, comment="limit; NULL: none of its own"),
    sa.Column("log_type", sa.Text(), nullable=True, comment="log type of its requests where they say none"),
    sa.Column("last_used_day", sa.Date(), nullable=True, comment="UTC day of its last use; NULL: never used"),
    sa.Column("version", sa.BigInteger(), nullable=False, comment="how often the row was changed"),
    comment="clients' keys and administrators' tokens",
)


def _step_keys() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column(
            "step_s",
            sa.BigInteger(),
            primary_key=True,
            autoincrement=False,
            comment="seconds added up: 60, 300, 3600, 21600",
        ),
        sa.Column(
            "at", sa.BigInteger(), primary_key=True, autoincrement=False, comment="start of the step, epoch seconds"
        ),
        sa.Column("origin", sa.Text(), primary_key=True, comment="as in requests"),
        sa.Column("model", sa.Text(), primary_key=True, comment="as in requests; empty: unknown, or refused as wrong"),
    )


rollups = sa.Table(
    "rollups",
    metadata,
    *_step_keys(),
    sa.Column("upstream", sa.Text(), primary_key=True, comment="as in requests; empty: none"),
    sa.Column("outcome", sa.Text(), primary_key=True, comment="as in requests"),
    sa.Column("requests", sa.BigInteger(), nullable=False, comment="how many"),
    sa.Column("request_tokens", sa.BigInteger(), nullable=False, comment="sum of the known ones"),
    sa.Column("response_tokens", sa.BigInteger(), nullable=False, comment="sum of the known ones"),
    comment="requests added up by minute, five minutes, hour and six hours",
    sqlite_with_rowid=False,
)

rollup_latencies = sa.Table(
    "rollup_latencies",
    metadata,
    *_step_keys(),
    sa.Column(
        "kind",
        sa.Text(),
        primary_key=True,
        comment="ttft, tpot or e2e, of requests that ended well; all_ttft, ...: of all models",
    ),
    sa.Column(
        "bucket", sa.BigInteger(), primary_key=True, autoincrement=False, comment="n: up to 2^(n/4) ms; 79: above"
    ),
    sa.Column("requests", sa.BigInteger(), nullable=False, comment="how many"),
    comment="histograms of latency by the same steps",
    sqlite_with_rowid=False,
)

rollup_dirty = sa.Table(
    "rollup_dirty",
    metadata,
    sa.Column("at", sa.BigInteger(), nullable=False, comment="start of the minute, epoch seconds"),
    sa.Index("rollup_dirty_at", "at"),
    comment="minutes with requests that are not yet in rollups; a minute may be there more than once",
)


def utc_day(epoch_s: float) -> int:
    """The UTC day of a stamp, counted from 1970-01-01."""
    return math.floor(epoch_s / _DAY_S)


def partition_name(day: int) -> str:
    """Name of a UTC day's partition, `requests_YYYYMMDD`. Raises ValueError outside the years 1 to 9999."""
    try:
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=day)
    except OverflowError:
        raise ValueError(f"received_at: expected a day in the years 1 to 9999, got day {day} from 1970-01-01") from None
    return f"requests_{date:%Y%m%d}" if date.year >= 1000 else f"requests_{date.year:04}{date:%m%d}"


def partition_bounds_s(day: int) -> tuple[int, int]:
    """The half-open range of `received_at` that the day's partition holds, epoch seconds."""
    return day * _DAY_S, (day + 1) * _DAY_S


def is_partition(table_name: str) -> bool:
    """Whether a table is a day of `requests` rather than a table of `metadata`."""
    return _PARTITION.fullmatch(table_name) is not None
