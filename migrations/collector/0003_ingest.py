"""What was deleted a moment ago, by marks that no id can be read from; how requests ended."""

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

CREATE TABLE ingest (
    day date NOT NULL,
    outcome text NOT NULL,
    requests bigint NOT NULL CHECK (requests > 0),
    PRIMARY KEY (day, outcome)
);
COMMENT ON TABLE ingest IS
    'How many requests to keep a heartbeat ended in which way on a day; it holds no id.';
"""


def upgrade() -> None:
    """Make the tables, and the key."""
    op.execute(TABLES)


def downgrade() -> None:
    """Drop what ``upgrade`` made; every heartbeat stays."""
    op.execute("DROP TABLE forgotten, forgotten_key, ingest")
