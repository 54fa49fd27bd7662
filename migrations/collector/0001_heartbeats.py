"""The collector's one table: each heartbeat once, and nothing about who sent it."""

from alembic import op

revision = "0001"
down_revision = None

HEARTBEAT = """
CREATE TABLE heartbeat (
    instance_id uuid NOT NULL,
    sent_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    body jsonb NOT NULL,
    PRIMARY KEY (instance_id, sent_at)
);
COMMENT ON TABLE heartbeat IS
    'Every heartbeat once, as the schema reads it: no address, no header, no raw body.';
"""


def upgrade() -> None:
    """Make the table."""
    op.execute(HEARTBEAT)


def downgrade() -> None:
    """Drop the table and every heartbeat in it."""
    op.execute("DROP TABLE heartbeat")
