"""When a day was counted first, and whether its numbers say who is still active after 90 days."""

from alembic import op

revision = "0006"
down_revision = "0005"

COLUMNS = """
ALTER TABLE measured
    ADD COLUMN counted_at timestamptz,
    ADD COLUMN metrics smallint NOT NULL DEFAULT 1;
ALTER TABLE measured ALTER COLUMN counted_at SET DEFAULT now();
COMMENT ON COLUMN measured.counted_at IS
    'When the day was counted first; null for a day that was counted before this was stored.';
COMMENT ON COLUMN measured.metrics IS
    'Which metrics the day has: 2 since retained_90 is counted, 1 before.';
"""


def upgrade() -> None:
    """Add both columns; days that were counted before have no value of their own."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Remove both columns, and the numbers that only this revision knows."""
    op.execute(
        "ALTER TABLE measured DROP COLUMN counted_at, DROP COLUMN metrics;"
        "DELETE FROM daily WHERE metric = 'retained_90'"
    )
