"""The only module that reads ConsentOS's tables. It returns buckets, never raw counts."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, text

from app.payload import Census, Counts, bucket

# Each count stops at 10,000, the top bucket. The number is a literal, because a parameter in LIMIT
# can lead to a generic plan. ORDER BY makes the planner read the consents by their index even if
# the table has no statistics. An upper bound in the same query would undo that, so rows from the
# future, which come last, are removed outside it. scan_jobs has no index on created_at, so its cost
# grows with the table, up to statement_timeout. A setting of a site that is NULL is inherited from
# its group, then from its organisation, then from ConsentOS's defaults.
_CENSUS = text(
    """
    WITH live AS NOT MATERIALIZED (
        SELECT
            coalesce(site.tcf_enabled, grp.tcf_enabled, org.tcf_enabled, false) AS tcf,
            coalesce(site.blocking_mode, grp.blocking_mode, org.blocking_mode, 'opt_in') AS mode,
            site.scan_schedule_cron AS cron
        FROM sites
        JOIN site_configs AS site ON site.site_id = sites.id
        LEFT JOIN site_group_configs AS grp ON grp.site_group_id = sites.site_group_id
        LEFT JOIN org_configs AS org ON org.organisation_id = sites.organisation_id
        WHERE sites.deleted_at IS NULL AND sites.is_active
    )
    SELECT
        (SELECT count(*) FROM (
            SELECT FROM organisations WHERE deleted_at IS NULL LIMIT 10000) AS o) AS orgs,
        (SELECT count(*) FROM (
            SELECT FROM sites WHERE deleted_at IS NULL LIMIT 10000) AS s) AS sites,
        (SELECT count(*) FROM (
            SELECT FROM users WHERE deleted_at IS NULL LIMIT 10000) AS u) AS users,
        (SELECT count(*) FROM (
            SELECT FROM scan_jobs
            WHERE created_at > now() - interval '24 hours' AND created_at <= now()
            LIMIT 10000) AS j) AS scans_last_24h,
        (SELECT count(*) FROM (
            SELECT consented_at FROM consent_records
            WHERE consented_at > now() - interval '24 hours'
            ORDER BY consented_at LIMIT 10000) AS c
            WHERE consented_at <= now()) AS consents_last_24h,
        (SELECT count(*) FROM (
            SELECT FROM live WHERE tcf LIMIT 10000) AS t) AS tcf_v22_sites,
        (SELECT count(*) FROM (
            SELECT FROM live WHERE mode = 'opt_in' LIMIT 10000) AS b) AS auto_blocking_sites,
        (SELECT count(*) FROM (
            SELECT FROM live WHERE cron IS NOT NULL LIMIT 10000) AS n) AS scanner_scheduled_sites,
        current_setting('server_version_num')::integer AS server_version_num
    """
)


class NotConsentOSError(Exception):
    """A table to be read is not ConsentOS's own; ``sentence`` names it."""

    def __init__(self, sentence: str) -> None:
        """Store the sentence, which contains only names of tables and schemas."""
        super().__init__(sentence)
        self.sentence = sentence


_OF_CONSENTOS = (
    "organisations", "users", "sites", "site_configs", "site_group_configs", "org_configs",
    "scan_jobs", "consent_records", "instance", "alembic_version",
)  # fmt: skip

_FOUND = text(
    """
    SELECT relname, relkind IN ('r', 'p') AS is_table, nspname AS schema,
        (SELECT string_agg(version_num, ',' ORDER BY version_num) FROM alembic_version) AS revision
    FROM unnest(CAST(:tables AS text[])) AS known (name)
    JOIN pg_class ON pg_class.oid = to_regclass(known.name)
    JOIN pg_namespace ON pg_namespace.oid = relnamespace
    ORDER BY nspname, relname
    """
)


def host_revision(connection: Connection) -> str | None:
    """Return the revision of ConsentOS's database from ``alembic_version``, or None if it is empty.

    First check that the tables are ConsentOS's: a view may hide rows, and a table that is found in
    another schema belongs to another program.

    Raises:
        NotConsentOSError: one of them is not.
        sqlalchemy.exc.DBAPIError: there is no ``alembic_version``, or the role may not read it.
    """
    found = connection.execute(_FOUND, {"tables": [*_OF_CONSENTOS]}).all()
    for relation in found:
        if not relation.is_table:
            raise NotConsentOSError(f"{relation.schema}.{relation.relname} is not a table")
    if len({relation.schema for relation in found}) > 1:
        raise NotConsentOSError(
            f"the tables are found in different schemas ({_by_schema(found)}): set the role's"
            " search_path so that ConsentOS's come first"
        )
    revision: str | None = found[0].revision
    return revision


def _by_schema(found: Iterable[Row[*tuple[Any, ...]]]) -> str:
    places: dict[str, list[str]] = defaultdict(list)
    for relation in found:
        places[relation.schema].append(relation.relname)
    return "; ".join(f"{schema}: {', '.join(names)}" for schema, names in places.items())


def census(connection: Connection) -> Census:
    """Count ConsentOS's tables inside the caller's transaction.

    Raises:
        sqlalchemy.exc.DBAPIError: a table or column is missing, locked, or too slow to count.
    """
    row = connection.execute(_CENSUS).one()
    return Census(
        counts=Counts(
            orgs=bucket(row.orgs),
            sites=bucket(row.sites),
            users=bucket(row.users),
            scans_last_24h=bucket(row.scans_last_24h),
            consents_last_24h=bucket(row.consents_last_24h),
        ),
        tcf_v22_sites=bucket(row.tcf_v22_sites),
        auto_blocking_sites=bucket(row.auto_blocking_sites),
        scanner_scheduled_sites=bucket(row.scanner_scheduled_sites),
        server_version_num=row.server_version_num,
    )
