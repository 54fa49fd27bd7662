"""The notice, the outbox and its attempts; and ``instance``, where there is no ConsentOS."""

import re

from alembic import op
from sqlalchemy import Connection, text

from migrations import MigrationRefusedError

revision = "0001"
down_revision = None

INSTANCE_SINCE = "0005"
OURS = "made by consentos-telemetry"

INSTANCE = f"""
CREATE TABLE instance (
    id uuid PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    last_telemetry_at timestamptz
);
COMMENT ON TABLE instance IS '{OURS}';
"""

TABLES = """
CREATE TABLE telemetry_notice (
    schema integer PRIMARY KEY,
    noticed_at timestamptz NOT NULL
);
COMMENT ON TABLE telemetry_notice IS
    'When the operator was told what a payload schema sends; no heartbeat is due before that.';

CREATE TABLE telemetry_outbox (
    id uuid PRIMARY KEY,
    day date NOT NULL UNIQUE,
    instance_id uuid NOT NULL,
    payload json NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    drains integer NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL,
    next_attempt_at timestamptz NOT NULL,
    not_before timestamptz,
    expires_at timestamptz NOT NULL,
    lease_token uuid,
    lease_until timestamptz,
    finished_at timestamptz,
    last_error text,
    CONSTRAINT telemetry_outbox_state CHECK (
        state IN ('pending', 'sending', 'sent', 'rejected', 'expired', 'discarded')
    ),
    CONSTRAINT telemetry_outbox_leased CHECK (
        (state = 'sending') = (lease_token IS NOT NULL)
        AND (lease_token IS NULL) = (lease_until IS NULL)
    ),
    CONSTRAINT telemetry_outbox_finished CHECK (
        (state IN ('sent', 'rejected', 'expired', 'discarded')) = (finished_at IS NOT NULL)
    ),
    CONSTRAINT telemetry_outbox_counted CHECK (drains >= 0 AND attempts >= 0)
);
COMMENT ON TABLE telemetry_outbox IS
    'Every heartbeat, before and after it leaves: payload is the exact body, byte for byte.';
CREATE INDEX telemetry_outbox_pending ON telemetry_outbox (next_attempt_at)
    WHERE state = 'pending';
CREATE INDEX telemetry_outbox_sending ON telemetry_outbox (lease_until)
    WHERE state = 'sending';

CREATE TABLE telemetry_attempt (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    outbox_id uuid NOT NULL REFERENCES telemetry_outbox (id) ON DELETE CASCADE,
    n integer NOT NULL CHECK (n >= 1),
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    outcome text CHECK (outcome IN ('sent', 'retryable', 'rejected')),
    http_status integer,
    error text,
    endpoint text NOT NULL,
    duration_ms integer,
    UNIQUE (outbox_id, n),
    CONSTRAINT telemetry_attempt_finished CHECK ((outcome IS NULL) = (finished_at IS NULL))
);
COMMENT ON TABLE telemetry_attempt IS
    'Every POST, recorded before it starts; no outcome: in flight when the process died.';
"""

# json has no equality, so the text is compared.
FREEZE = """
CREATE FUNCTION telemetry_outbox_frozen() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.id, NEW.day, NEW.instance_id, NEW.payload::text)
        IS DISTINCT FROM (OLD.id, OLD.day, OLD.instance_id, OLD.payload::text)
    THEN
        RAISE EXCEPTION 'id, day, instance_id and payload of telemetry_outbox never change'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER telemetry_outbox_frozen BEFORE UPDATE ON telemetry_outbox
    FOR EACH ROW EXECUTE FUNCTION telemetry_outbox_frozen();
"""


def upgrade() -> None:
    """Adopt or make ``instance``, then make the tables of telemetry."""
    connection = op.get_bind()
    if not _exists(connection, "instance"):
        _refuse_beside_an_older_consentos(connection)
        op.execute(INSTANCE)
    op.execute(TABLES)
    op.execute(FREEZE)


def downgrade() -> None:
    """Drop what ``upgrade`` made; ``instance`` only where its comment says that it is ours."""
    op.execute("DROP TABLE telemetry_attempt, telemetry_outbox, telemetry_notice")
    op.execute("DROP FUNCTION telemetry_outbox_frozen()")
    comment = text("SELECT obj_description(to_regclass('instance'), 'pg_class')")
    if op.get_bind().scalar(comment) == OURS:
        op.execute("DROP TABLE instance")


def _exists(connection: Connection, table: str) -> bool:
    return bool(connection.scalar(text("SELECT to_regclass(:t) IS NOT NULL"), {"t": table}))


def _refuse_beside_an_older_consentos(connection: Connection) -> None:
    """ConsentOS's migration 0005 makes ``instance`` with a bare CREATE TABLE: leave it the name."""
    revisions: list[str] = []
    numbered = _exists(connection, "alembic_version")
    if numbered:
        revisions = list(connection.scalars(text("SELECT version_num FROM alembic_version")))
        # Another application's history has hashes for revisions; ConsentOS's are four digits.
        numbered = all(re.fullmatch(r"\d{4}", number) for number in revisions)
    if not numbered and not _exists(connection, "organisations"):
        return
    reached = max(revisions, default="none") if numbered else "unknown"
    if reached.isdigit() and reached >= INSTANCE_SINCE:
        raise MigrationRefusedError(
            f"ConsentOS's database is at revision {reached}, which has a table 'instance', but the "
            "table is missing: restore it first."
        )
    raise MigrationRefusedError(
        f"ConsentOS's database is at revision {reached}, and its table 'instance' comes with "
        f"{INSTANCE_SINCE}: upgrade ConsentOS first."
    )
