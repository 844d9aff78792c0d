"""Requests added up by minute and hour. The downgrade drops the sums; requests stay."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def _step_keys() -> tuple[sa.Column[object], ...]:
    return (
        sa.Column(
            "step_s", sa.BigInteger(), primary_key=True, autoincrement=False, comment="seconds added up: 60, 3600"
        ),
        sa.Column(
            "at", sa.BigInteger(), primary_key=True, autoincrement=False, comment="start of the step, epoch seconds"
        ),
        sa.Column("origin", sa.Text(), primary_key=True, comment="as in requests"),
        sa.Column("model", sa.Text(), primary_key=True, comment="as in requests; empty: unknown, or refused as wrong"),
    )


def upgrade() -> None:
    op.create_table(
        "rollups",
        *_step_keys(),
        sa.Column("upstream", sa.Text(), primary_key=True, comment="as in requests; empty: none"),
        sa.Column("outcome", sa.Text(), primary_key=True, comment="as in requests"),
        sa.Column("requests", sa.BigInteger(), nullable=False, comment="how many"),
        sa.Column("request_tokens", sa.BigInteger(), nullable=False, comment="sum of the known ones"),
        sa.Column("response_tokens", sa.BigInteger(), nullable=False, comment="sum of the known ones"),
        comment="requests added up by minute and hour",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "rollup_latencies",
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
        comment="histograms of latency by minute and hour",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "rollup_dirty",
        sa.Column("at", sa.BigInteger(), nullable=False, comment="start of the minute, epoch seconds"),
        comment="minutes with requests that are not yet in rollups; a minute may be there more than once",
    )
    op.create_index("rollup_dirty_at", "rollup_dirty", ["at"])
    if op.get_bind().dialect.name == "postgresql":
        minute = "CAST(floor(received_at / 60) AS BIGINT) * 60"
    else:
        minute = "(CAST(received_at / 60 AS INTEGER) - (CAST(received_at / 60 AS INTEGER) * 60 > received_at)) * 60"
    op.execute(f"INSERT INTO rollup_dirty (at) SELECT DISTINCT {minute} FROM requests")


def downgrade() -> None:
    op.drop_table("rollup_dirty")
    op.drop_table("rollup_latencies")
    op.drop_table("rollups")
