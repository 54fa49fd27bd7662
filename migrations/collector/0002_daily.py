"""What the page is drawn from: each install as it was last heard of, and numbers for each day."""

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = """
CREATE TABLE install (
    instance_id uuid PRIMARY KEY,
    first_seen timestamptz NOT NULL,
    last_seen timestamptz NOT NULL,
    body jsonb NOT NULL,
    CONSTRAINT install_seen CHECK (first_seen <= last_seen)
);
COMMENT ON TABLE install IS
    'Each install as its last heartbeat told; when it was seen is by this collector''s clock.';
CREATE INDEX install_last_seen ON install (last_seen);

CREATE TABLE daily (
    day date NOT NULL,
    metric text NOT NULL,
    version text NOT NULL,
    edition text NOT NULL,
    value text NOT NULL,
    installs integer NOT NULL CHECK (installs > 0),
    PRIMARY KEY (metric, day, version, edition, value)
);
COMMENT ON TABLE daily IS
    'How many installs of a version and an edition had a value on a day; it holds no id.';

CREATE TABLE measured (
    day date PRIMARY KEY,
    as_of timestamptz NOT NULL
);
COMMENT ON TABLE measured IS
    'When the numbers of a day were counted last.';

CREATE INDEX heartbeat_received ON heartbeat (received_at);
"""

FILL = """
INSERT INTO install (instance_id, first_seen, last_seen, body)
SELECT DISTINCT ON (instance_id)
    instance_id, min(received_at) OVER (PARTITION BY instance_id), received_at, body
FROM heartbeat
ORDER BY instance_id, received_at DESC, sent_at DESC
"""


def upgrade() -> None:
    """Make the tables, and fill in the installs that are known."""
    op.execute(TABLES)
    op.execute(FILL)


def downgrade() -> None:
    """Drop what ``upgrade`` made; every heartbeat stays."""
    op.execute("DROP INDEX heartbeat_received")
    op.execute("DROP TABLE measured, daily, install")
