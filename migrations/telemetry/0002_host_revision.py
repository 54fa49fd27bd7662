"""ConsentOS's revision beside each heartbeat; attempts numbered by their row, with no sequence."""

from alembic import op

revision = "0002"
down_revision = "0001"

UPGRADE = """
ALTER TABLE telemetry_outbox ADD COLUMN host_revision text;
COMMENT ON COLUMN telemetry_outbox.host_revision IS
    'ConsentOS''s alembic_version when the row was written; never sent.';

ALTER TABLE telemetry_attempt
    DROP COLUMN id,
    DROP CONSTRAINT telemetry_attempt_outbox_id_n_key,
    ADD PRIMARY KEY (outbox_id, n);
"""

DOWNGRADE = """
ALTER TABLE telemetry_attempt
    DROP CONSTRAINT telemetry_attempt_pkey,
    ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ADD UNIQUE (outbox_id, n);

ALTER TABLE telemetry_outbox DROP COLUMN host_revision;
"""


def upgrade() -> None:
    """Give a row ConsentOS's revision, and an attempt a key that a restore cannot leave behind."""
    op.execute(UPGRADE)


def downgrade() -> None:
    """Give an attempt its own number again."""
    op.execute(DOWNGRADE)
