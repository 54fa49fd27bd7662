"""Heartbeats in a partition a week, so that a week is dropped and not deleted row by row.

The table so far becomes the partition of everything before some Monday, at most two weeks ahead.
"""

from datetime import UTC, datetime, timedelta

from alembic import op
from sqlalchemy import Connection, text

revision = "0005"
down_revision = "0004"

LIMIT = "heartbeat_before"
"""The constraint that no heartbeat of the table so far is of that Monday or later."""

COLUMNS = """
    instance_id uuid NOT NULL,
    sent_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    body jsonb NOT NULL,
    PRIMARY KEY (instance_id, sent_at)
"""

# What was moved goes back, but for what was deleted since: it has no install any more, or a newer
# one.
BACK = """
ALTER TABLE heartbeat DROP CONSTRAINT IF EXISTS {limit};
CREATE TABLE IF NOT EXISTS heartbeat_default ({columns});
INSERT INTO heartbeat SELECT * FROM heartbeat_default AS ahead WHERE EXISTS (
    SELECT FROM install
    WHERE install.instance_id = ahead.instance_id AND first_seen <= ahead.received_at
) ON CONFLICT DO NOTHING;
DROP TABLE heartbeat_default;
"""

BEGIN = """
CREATE TABLE heartbeat_default ({columns});
ALTER TABLE heartbeat ADD CONSTRAINT {limit} CHECK (sent_at < '{monday}') NOT VALID;
"""

# Senders whose clock is ahead by weeks. Until all is done they are answered 500, and try again.
MOVE = """
WITH ahead AS (DELETE FROM heartbeat WHERE sent_at >= '{monday}' RETURNING *)
INSERT INTO heartbeat_default SELECT * FROM ahead
"""

CHECK = "ALTER TABLE heartbeat VALIDATE CONSTRAINT {limit}"

PARTITION = """
ALTER TABLE heartbeat RENAME TO {before};
ALTER INDEX heartbeat_pkey RENAME TO {before}_pkey;
ALTER INDEX heartbeat_received RENAME TO {before}_received;
CREATE TABLE heartbeat ({columns}) PARTITION BY RANGE (sent_at);
CREATE INDEX heartbeat_received ON heartbeat (received_at);
CREATE INDEX heartbeat_default_received ON heartbeat_default (received_at);
COMMENT ON TABLE heartbeat IS
    'Every heartbeat once, as the schema reads it: no address, no header, no raw body.';
COMMENT ON TABLE heartbeat_default IS
    'Heartbeats whose sent_at is in no week that has a partition: of clocks that are wrong.';
-- As in BACK.
DELETE FROM heartbeat_default AS ahead WHERE NOT EXISTS (
    SELECT FROM install
    WHERE install.instance_id = ahead.instance_id AND first_seen <= ahead.received_at
);
ALTER TABLE heartbeat ATTACH PARTITION {before} FOR VALUES FROM (MINVALUE) TO ('{monday}');
ALTER TABLE heartbeat ATTACH PARTITION heartbeat_default DEFAULT;
ALTER TABLE {before} DROP CONSTRAINT {limit};
"""

# A process of the release before may still be running. It deletes what is old by its ctid, which
# repeats across partitions: that would delete new heartbeats. It logs a failure instead.
GUARD = """
CREATE FUNCTION heartbeat_no_ctid() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_query() ~ 'ctid' THEN
        RAISE EXCEPTION 'A ctid repeats across the partitions of heartbeat.';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER heartbeat_no_ctid BEFORE DELETE ON heartbeat
    FOR EACH STATEMENT EXECUTE FUNCTION heartbeat_no_ctid();
"""

DOWN = """
ALTER TABLE heartbeat RENAME TO heartbeat_by_week;
ALTER INDEX heartbeat_pkey RENAME TO heartbeat_by_week_pkey;
ALTER INDEX heartbeat_received RENAME TO heartbeat_by_week_received;
CREATE TABLE heartbeat ({columns});
COMMENT ON TABLE heartbeat IS
    'Every heartbeat once, as the schema reads it: no address, no header, no raw body.';
INSERT INTO heartbeat SELECT instance_id, sent_at, received_at, body FROM heartbeat_by_week;
CREATE INDEX heartbeat_received ON heartbeat (received_at);
DROP TABLE heartbeat_by_week;
DROP FUNCTION heartbeat_no_ctid();
"""


def prepare(connection: Connection) -> None:
    """Do what takes long, while heartbeats are taken, and from the beginning each time it is run.

    Two passes over the table, of which neither keeps a heartbeat waiting.
    """
    undo(connection)
    for statement in _statements():
        with connection.begin():
            _bound(connection)
            connection.execute(text(statement))


def undo(connection: Connection) -> None:
    """Take back what ``prepare`` has done, wherever it was interrupted."""
    with connection.begin():
        _bound(connection)
        connection.execute(text(BACK.format(limit=LIMIT, columns=COLUMNS)))


def upgrade() -> None:
    """Put the table so far, and that of clocks that are ahead, into one that is partitioned."""
    _bound(op.get_bind())
    if _limit() is None:  # the table was made a moment ago
        for statement in _statements():
            op.execute(statement)
    monday = _limit()
    assert monday is not None  # noqa: S101 - for mypy: it was added above
    before = f"heartbeat_before_{monday.astimezone(UTC):%Y%m%d}"
    op.execute(PARTITION.format(limit=LIMIT, columns=COLUMNS, monday=monday, before=before))
    if op.get_bind().scalar(text(f"SELECT NOT EXISTS (SELECT FROM {before})")):  # noqa: S608 - a name of our own
        op.execute(f"DROP TABLE {before}")
    op.execute(GUARD)


def downgrade() -> None:
    """Put every heartbeat into one table again."""
    op.execute(DOWN.format(columns=COLUMNS))


def _bound(connection: Connection) -> None:
    # Heartbeats wait behind whoever waits for a lock, and give up after 4 seconds.
    connection.execute(text("SET LOCAL lock_timeout = '1s'"))
    connection.execute(text("SET LOCAL statement_timeout = 0"))


def _statements() -> list[str]:
    today = datetime.now(UTC).date()
    monday = today + timedelta(days=14 - today.weekday())
    names = {"limit": LIMIT, "columns": COLUMNS, "monday": f"{monday} 00:00:00+00"}
    return [statement.format(**names) for statement in (BEGIN, MOVE, CHECK)]


def _limit() -> datetime | None:
    """Return the Monday before which the constraint says that all heartbeats are."""
    found: datetime | None = op.get_bind().scalar(
        text(
            "SELECT CAST(substring(pg_get_expr(conbin, conrelid) FROM $$'(.*?)'$$) AS timestamptz)"
            " FROM pg_constraint WHERE conname = :limit AND convalidated"
            " AND conrelid = to_regclass('heartbeat')"
        ),
        {"limit": LIMIT},
    )
    return found
