"""What retention took out of the database, by day and gateway. The downgrade drops the counts; the rows stay away."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pruned",
        sa.Column("day", sa.Date(), primary_key=True, comment="the UTC day of the requests"),
        sa.Column(
            "gateway", sa.Text(), primary_key=True, comment="name of the gateway that recorded them; empty for none"
        ),
        sa.Column("rows", sa.BigInteger(), nullable=False, comment="requests taken out of the database"),
        sa.Column("archived", sa.BigInteger(), nullable=False, comment="those of them that the archive had before"),
        comment="requests that retention took out",
    )


def downgrade() -> None:
    op.drop_table("pruned")
