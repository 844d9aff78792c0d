"""Clients' API keys and administrators' tokens, as keyed hashes. The downgrade drops every key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_keys",
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


def downgrade() -> None:
    op.drop_table("api_keys")
