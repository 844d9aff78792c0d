"""The first schema: requests, writers, segments, datasets.

PostgreSQL partitions `requests` by UTC day; the days' partitions are made by whoever writes the first row of a day.
The downgrade drops every table with its rows: there is no schema before this one that could hold them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    binary_order_text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "requests",
        sa.Column(
            "request_id",
            binary_order_text,
            nullable=False,
            comment="UUIDv7 text; the key under which a record exists once",
        ),
        sa.Column(
            "received_at",
            sa.Double(),
            nullable=False,
            comment="when the gateway received the request, epoch seconds, microseconds kept",
        ),
        sa.Column("session_id", sa.Text(), comment="the conversation; NULL when the request belongs to none"),
        sa.Column("elapsed_s", sa.Double(), comment="submission to last byte, seconds"),
        sa.Column("model", sa.Text(), comment="the model as the client asked for it"),
        sa.Column("request_tokens", sa.BigInteger(), comment="prompt tokens; NULL when unknown"),
        sa.Column(
            "response_tokens",
            sa.BigInteger(),
            comment="output tokens, as observed, also on failures; NULL when unknown",
        ),
        sa.Column("log_type", sa.Text(), nullable=False, comment="Conversation log or API log"),
        sa.Column("outcome", sa.Text(), nullable=False, comment="ok, or how the request failed"),
        sa.Column("client_request_id", sa.Text(), comment="the client's own X-Request-Id"),
        sa.Column("served_model", sa.Text(), comment="the model as the upstream answered"),
        sa.Column("status", sa.BigInteger(), comment="HTTP status sent to the client; NULL when none was sent"),
        sa.Column("error_type", sa.Text(), comment="the upstream's own error type, or the gateway's"),
        sa.Column("ttft_s", sa.Double(), comment="first content chunk minus request sent, seconds"),
        sa.Column(
            "tpot_s",
            sa.Double(),
            comment="(last chunk - first chunk) / (output tokens - 1), seconds; NULL under 2 tokens",
        ),
        sa.Column("queue_s", sa.Double(), comment="time held by shaping, seconds"),
        sa.Column("endpoint", sa.Text(), nullable=False, comment="path of the request, without its query"),
        sa.Column("stream", sa.Boolean(), nullable=False, comment="whether the client asked for a stream"),
        sa.Column("upstream", sa.Text(), comment="the upstream that answered"),
        sa.Column("attempts", sa.BigInteger(), nullable=False, comment="upstream attempts made"),
        sa.Column("finish_reason", sa.Text(), comment="why generation stopped, as the upstream says"),
        sa.Column(
            "cached_tokens",
            sa.BigInteger(),
            comment="prompt tokens served from the prefix cache; NULL when unknown",
        ),
        sa.Column("max_tokens", sa.BigInteger(), comment="the output limit that the client set; NULL when none"),
        sa.Column(
            "token_source",
            sa.Text(),
            nullable=False,
            comment="where the counts come from: usage, estimated, none",
        ),
        sa.Column(
            "prefix_blocks",
            sa.LargeBinary(),
            comment="keyed hashes of prompt-prefix blocks, packed little-endian unsigned 64-bit",
        ),
        sa.Column(
            "origin",
            sa.Text(),
            nullable=False,
            comment="who caused the request: client, replay, injected, shadow, imported",
        ),
        sa.Column(
            "run_id",
            sa.Text(),
            comment="the replay or injection run; for imported rows the data set's name",
        ),
        sa.Column("shadow_of", sa.Text(), comment="request_id of the request that this one mirrors"),
        sa.Column("tenant", sa.Text(), comment="the tenant that the request was accounted to"),
        sa.Column("gateway", sa.Text(), comment="name of the gateway that recorded it"),
        sa.PrimaryKeyConstraint("received_at", "request_id", name="requests_pkey"),
        comment="one row a request",
        sqlite_with_rowid=False,
        postgresql_partition_by="RANGE (received_at)",
    )
    has_session = sa.text("session_id IS NOT NULL")
    op.create_index(
        "requests_session",
        "requests",
        ["session_id", "received_at"],
        sqlite_where=has_session,
        postgresql_where=has_session,
    )
    is_failure = sa.text("outcome <> 'ok'")
    op.create_index(
        "requests_failures", "requests", ["received_at"], sqlite_where=is_failure, postgresql_where=is_failure
    )
    op.create_table(
        "writers",
        sa.Column("writer_id", sa.Text(), primary_key=True, comment="the journal writer: one gateway worker's life"),
        sa.Column("gateway", sa.Text(), nullable=False, comment="name of the gateway it worked for"),
        sa.Column("accepted", sa.BigInteger(), nullable=False, comment="requests that it took on"),
        sa.Column("dropped", sa.JSON(), nullable=False, comment="records it dropped, by reason"),
        sa.Column("recorded", sa.BigInteger(), nullable=False, comment="records of it that reached the database"),
        sa.Column(
            "finished", sa.Boolean(), nullable=False, comment="whether it has ended and its journal was read whole"
        ),
        comment="the accounting behind accepted = in database + in journal + dropped",
    )
    op.create_table(
        "segments",
        sa.Column("writer_id", sa.Text(), primary_key=True, comment="the journal writer"),
        sa.Column(
            "segment", sa.BigInteger(), primary_key=True, autoincrement=False, comment="number of its segment file"
        ),
        sa.Column(
            "offset_bytes", sa.BigInteger(), nullable=False, comment="frames that end at or before it are recorded"
        ),
        comment="how far each journal segment has been recorded",
    )
    op.create_table(
        "datasets",
        sa.Column("name", sa.Text(), primary_key=True, comment="the data set; run_id of its rows in requests"),
        sa.Column("format", sa.Text(), nullable=False, comment="format of the file it came from"),
        sa.Column("day_zero", sa.Date(), nullable=False, comment="the local day on which its Timestamp 0 lies"),
        sa.Column("timezone", sa.Text(), nullable=False, comment="IANA time zone of day_zero"),
        sa.Column("stamps", sa.Text(), nullable=False, comment="how it spells Timestamp: int or float"),
        sa.Column("rows", sa.BigInteger(), nullable=False, comment="rows of the file"),
        sa.Column("imported_at", sa.Double(), nullable=False, comment="when it was first imported, epoch seconds"),
        comment="traces that came from files",
    )


def downgrade() -> None:
    op.drop_table("datasets")
    op.drop_table("segments")
    op.drop_table("writers")
    op.drop_table("requests")
