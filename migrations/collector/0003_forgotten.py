"""What was deleted a moment ago: by a mark that no id can be read from."""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
CREATE TABLE forgotten (
    mark bytea PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE forgotten IS
    'Ids that were deleted a moment ago, each as a keyed hash: nothing is stored under them yet.';

CREATE TABLE forgotten_key (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    key bytea NOT NULL
);
COMMENT ON TABLE forgotten_key IS
    'The random key of the hashes in forgotten.';
INSERT INTO forgotten_key (key)
VALUES (uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
"""


def upgrade() -> None:
    """Make the tables, and the key."""
    op.execute(TABLES)


def downgrade() -> None:
    """Drop what ``upgrade`` made; every heartbeat stays."""
    op.execute("DROP TABLE forgotten, forgotten_key")
