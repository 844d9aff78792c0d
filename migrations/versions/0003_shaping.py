"""What shaping did to a request, and how a shadow's output compares. The downgrade drops the columns."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_COLUMNS: tuple[tuple[str, sa.types.TypeEngine[Any], str], ...] = (
    ("shaping_rule", sa.Text(), "the shaping rule that held or refused it; NULL where none did"),
    ("shaping_class", sa.Text(), "the class in which that rule counted it"),
    ("agreement", sa.Double(), "of a shadow: how much of its output equals its primary's, 0 to 1"),
)


def upgrade() -> None:
    for name, kind, comment in _COLUMNS:
        op.add_column("requests", sa.Column(name, kind, nullable=True, comment=comment))


def downgrade() -> None:
    for name, _, _ in reversed(_COLUMNS):
        op.drop_column("requests", name)
