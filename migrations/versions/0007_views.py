"""Sums of five minutes and six hours; failures found by origin, outcome and model. The downgrade drops both."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_SUMS = {
    "rollups": ("origin, model, upstream, outcome", ("requests", "request_tokens", "response_tokens")),
    "rollup_latencies": ("origin, model, kind, bucket", ("requests",)),
}
_COMMENTS = {
    "rollups": (
        "requests added up by minute, five minutes, hour and six hours",
        "requests added up by minute and hour",
    ),
    "rollup_latencies": ("histograms of latency by the same steps", "histograms of latency by minute and hour"),
}
_STEPS = ("seconds added up: 60, 300, 3600, 21600", "seconds added up: 60, 3600")
_FAILURES = sa.text("outcome != 'ok'")


def upgrade() -> None:
    for table, (keys, sums) in _SUMS.items():
        for base_s, step_s in ((60, 300), (3600, 21_600)):
            at = f"at - ((at % {step_s}) + {step_s}) % {step_s}"
            added = ", ".join(f"CAST(SUM({name}) AS BIGINT)" for name in sums)
            op.execute(
                f"INSERT INTO {table} (step_s, at, {keys}, {', '.join(sums)})"
                f" SELECT {step_s}, {at}, {keys}, {added} FROM {table} WHERE step_s = {base_s}"
                f" GROUP BY {at}, {keys}"
            )
    _comment(0)
    _index(["received_at", "request_id", "origin", "outcome", "model"])


def downgrade() -> None:
    _index(["received_at"])
    _comment(1)
    for table in _SUMS:
        op.execute(f"DELETE FROM {table} WHERE step_s IN (300, 21600)")


def _index(columns: list[str]) -> None:
    op.drop_index("requests_failures", "requests")
    op.create_index("requests_failures", "requests", columns, sqlite_where=_FAILURES, postgresql_where=_FAILURES)


def _comment(which: int) -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table, comments in _COMMENTS.items():
            op.execute(f"COMMENT ON TABLE {table} IS '{comments[which]}'")
            op.execute(f"COMMENT ON COLUMN {table}.step_s IS '{_STEPS[which]}'")
