"""Stored replays: runs. The downgrade drops the table; the runs' requests stay."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "runs",
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


def downgrade() -> None:
    op.drop_table("runs")
