"""What is counted once a day: how often an install was heard of, and which names are told."""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = """
ALTER TABLE install
    ADD COLUMN days_heard integer NOT NULL DEFAULT 1 CHECK (days_heard > 0),
    ADD COLUMN established_on date,
    ADD COLUMN former_seen timestamptz,
    ADD COLUMN former_body jsonb,
    ADD COLUMN excluded text,
    ADD CONSTRAINT install_former CHECK ((former_seen IS NULL) = (former_body IS NULL));
COMMENT ON COLUMN install.days_heard IS
    'On how many days it was heard of, by this collector''s clock.';
COMMENT ON COLUMN install.established_on IS
    'The day on which that was often enough for it to be counted.';
COMMENT ON COLUMN install.former_seen IS
    'When it was heard of last before the day on which it was last seen, and former_body is what it'
    ' told then: as it was at the end of the day before.';
COMMENT ON COLUMN install.excluded IS
    'Why a maintainer has taken it out of all numbers.';
CREATE INDEX install_live ON install (last_seen) INCLUDE (established_on)
    WHERE excluded IS NULL AND right(body ->> 'version', 4) <> '-dev';

CREATE TABLE release (
    version text PRIMARY KEY,
    released_on date NOT NULL
);
COMMENT ON TABLE release IS
    'The versions that are named; all others are counted together.';

CREATE UNLOGGED TABLE replay (
    instance_id uuid PRIMARY KEY,
    seen timestamptz NOT NULL,
    body jsonb NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE replay IS
    'Each install as it was at the end of the day that is being counted again; made anew when lost.'
    ' The nil id has the day.';

CREATE TABLE recount (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    since date NOT NULL,
    replayed date,
    CONSTRAINT recount_replayed CHECK (replayed >= since - 31)
);
COMMENT ON TABLE recount IS
    'The days that have to be counted again, from the first of them on, and how far that has come.';

-- The numbers so far were of whoever had sent once, under whatever name: they are counted again.
INSERT INTO recount (since) SELECT min(received_at AT TIME ZONE 'UTC')::date FROM heartbeat
HAVING count(*) > 0;
TRUNCATE daily, measured;
"""

FILL = """
UPDATE install
SET days_heard = days.heard, established_on = days.third
FROM (
    SELECT instance_id, count(*) AS heard, (array_agg(day ORDER BY day))[3] AS third
    FROM (
        SELECT DISTINCT instance_id, (received_at AT TIME ZONE 'UTC')::date AS day FROM heartbeat
    ) AS heard_on
    GROUP BY instance_id
) AS days
WHERE install.instance_id = days.instance_id
"""


def upgrade() -> None:
    """Add what is counted by, and have all days counted again from the heartbeats that are kept."""
    for statement in (TABLES, FILL):
        op.execute(statement)


def downgrade() -> None:
    """Take it away again; every heartbeat stays, and the days are counted as they were before."""
    op.execute(
        "DROP TABLE release, replay, recount;"
        "ALTER TABLE install DROP COLUMN days_heard, DROP COLUMN established_on,"
        " DROP COLUMN former_seen, DROP COLUMN former_body, DROP COLUMN excluded;"
        "TRUNCATE daily, measured"
    )
