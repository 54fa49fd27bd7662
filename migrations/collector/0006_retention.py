"""When a day was counted first, and whether its numbers say who is still active after 90 days."""

from alembic import op

revision = "0006"
down_revision = "0005"

COLUMNS = """
ALTER TABLE measured
    ADD COLUMN counted_at timestamptz,
    ADD COLUMN retention_as_of timestamptz;
ALTER TABLE measured ALTER COLUMN counted_at SET DEFAULT now();
COMMENT ON COLUMN measured.counted_at IS
    'When the day was counted first; null for a day that was counted before this was stored.';
COMMENT ON COLUMN measured.retention_as_of IS
    'The same as as_of if that count had retained_90: a former release does not count it.';
"""


def upgrade() -> None:
    """Add both columns; days that were counted before have no value of their own."""
    op.execute(COLUMNS)


def downgrade() -> None:
    """Remove both columns, and the numbers that only this revision knows."""
    op.execute(
        "ALTER TABLE measured DROP COLUMN counted_at, DROP COLUMN retention_as_of;"
        "DELETE FROM daily WHERE metric = 'retained_90'"
    )
