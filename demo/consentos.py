"""A small, realistic ConsentOS database, for the demo, the tests and the bench.

The true counts are computed here in plain Python from the generated rows. Tests compare them with
the counts of the pipeline's SQL.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

Row = dict[str, Any]

DAY = timedelta(hours=24)
SCANS = 40  # in the last 24 hours, and as many before
CONSENTS = 2_500  # likewise
TRADES = ("Atlas", "Birch", "Cedar", "Delta", "Ember")
BRANDS = ("fjord", "grove", "harbour", "iris", "juno", "kestrel")
OFFERS = ("shop", "blog")
PEOPLE = ("Ada Berg", "Ben Costa", "Cleo Dahl", "Dov Evans", "Eve Fuchs", "Finn Gray")
AGENTS = ("Mozilla/5.0 (X11; Linux x86_64)", "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0)")
LOCALES = ("en", "de", "fr")
COOKIES = (("_ga", "analytics"), ("cart", "necessary"), ("fr", "marketing"))

MARKABLE = """
SELECT quote_ident(table_name),
       quote_ident(column_name) || ' = ' || CASE
           WHEN data_type IN ('json', 'jsonb') THEN 'to_json(marked.value)::' || data_type
           ELSE 'marked.value' END
FROM information_schema.columns
JOIN information_schema.tables USING (table_catalog, table_schema, table_name)
WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'
  AND table_name <> 'alembic_version' AND NOT starts_with(table_name, 'telemetry_')
  AND data_type IN ('text', 'character varying', 'character', 'json', 'jsonb')
ORDER BY table_name, ordinal_position
"""
"""Table and assignment of each column that can hold text."""

MARK = """
UPDATE {table} AS target SET {assignments}
FROM (SELECT ctid, :marker || '-' || row_number() OVER () AS value FROM {table}) AS marked
WHERE target.ctid = marked.ctid
"""


@dataclass(frozen=True)
class Truth:
    """The counts that a correct heartbeat has, before they become buckets."""

    orgs: int
    users: int
    sites: int
    scans_last_24h: int
    consents_last_24h: int
    tcf_v22_sites: int
    auto_blocking_sites: int
    scanner_scheduled_sites: int


def create_tables(connection: Connection) -> None:
    """Create ConsentOS's tables as of its revision 0009, including `alembic_version`."""
    ddl = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # psycopg accepts several statements only without parameters.
    connection.exec_driver_sql(ddl, execution_options={"no_parameters": True})


def populate(connection: Connection, seed: int = 20260502, *, now: datetime | None = None) -> Truth:
    """Fill the tables with generated rows and return the true counts.

    Every event is before `now` (by default the current time), and at least an hour before or after
    the moment at which the last 24 hours begin. The same seed and `now` give the same rows.
    """
    company = _Company(random.Random(seed), now or datetime.now(UTC))  # noqa: S311 - reproducible
    for table, rows in company.tables.items():
        _insert(connection, table, rows)
    return company.truth()


def mark(connection: Connection, marker: str) -> int:
    """Write `marker` into every text and JSON value of every row of ConsentOS's tables.

    A row number after it keeps unique columns unique.

    Returns:
        The number of columns with the marker; columns of empty tables do not count.
    """
    assignments: dict[str, list[str]] = {}
    for table, assignment in connection.execute(text(MARKABLE)):
        assignments.setdefault(table, []).append(assignment)
    marked = 0
    for table, columns in assignments.items():
        update = text(MARK.format(table=table, assignments=", ".join(columns)))
        if connection.execute(update, {"marker": marker}).rowcount:
            marked += len(columns)
    return marked


def _insert(connection: Connection, table: str, rows: Sequence[Row]) -> None:
    columns = rows[0]
    values = ", ".join(f":{column}" for column in columns)
    insert = text(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})")  # noqa: S608 - constants
    connection.execute(insert, [_storable(row) for row in rows])


def _storable(row: Row) -> Row:
    return {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}


class _Company:
    """The rows of every table, parents before children, and their true counts."""

    def __init__(self, rng: random.Random, now: datetime) -> None:
        self._rng = rng
        self._now = now
        self._configs: dict[UUID | None, Row] = {}  # by organisation, site group or site
        self.tables: dict[str, list[Row]] = {}
        for trade in TRADES:
            self._add_organisation(trade)
        for moment in (self._lately, self._earlier):
            for _ in range(SCANS):
                self._add_scan(moment())
            for _ in range(CONSENTS):
                self._add_consent(moment())

    def truth(self) -> Truth:
        live = [s for s in self._existing("sites") if s["is_active"] and s["id"] in self._configs]
        return Truth(
            orgs=len(self._existing("organisations")),
            users=len(self._existing("users")),
            sites=len(self._existing("sites")),
            scans_last_24h=self._in_last_24h("scan_jobs", "created_at"),
            consents_last_24h=self._in_last_24h("consent_records", "consented_at"),
            tcf_v22_sites=sum(self._resolve(s, "tcf_enabled", default=False) is True for s in live),
            auto_blocking_sites=sum(
                self._resolve(s, "blocking_mode", default="opt_in") == "opt_in" for s in live
            ),
            scanner_scheduled_sites=sum(
                self._configs[s["id"]]["scan_schedule_cron"] is not None for s in live
            ),
        )

    def _existing(self, table: str) -> list[Row]:
        return [row for row in self.tables[table] if row["deleted_at"] is None]

    def _in_last_24h(self, table: str, column: str) -> int:
        return sum(row[column] > self._now - DAY for row in self.tables[table])

    def _resolve(self, site: Row, setting: str, *, default: object) -> object:
        """Return the value of the first layer that sets it: site, site group, organisation."""
        for owner in (site["id"], site["site_group_id"], site["organisation_id"]):
            layer = self._configs.get(owner, {})
            if layer.get(setting) is not None:
                return layer[setting]
        return default

    def _add_organisation(self, trade: str) -> None:
        gone = self._earlier() if trade == TRADES[-1] else None
        org = self._add(
            "organisations",
            name=f"{trade} Ltd",
            slug=trade.lower(),
            contact_email=f"privacy@{trade.lower()}.example",
            deleted_at=gone,
        )
        self._perhaps_configure(0.6, "org_configs", "organisation_id", org)
        for person in PEOPLE:
            self._add_user(person, trade, org)
        self._add(
            "api_keys", organisation_id=org, name="CI", key_hash=self._token(), scopes=["scan"]
        )
        groups = [self._add_group(market, org) for market in ("Retail", "Press")]
        for brand in BRANDS:
            for offer in OFFERS:
                self._add_site(f"{offer}.{brand}-{trade}.example".lower(), org, groups)

    def _add_user(self, person: str, trade: str, org: UUID) -> None:
        self._add(
            "users",
            organisation_id=org,
            email=f"{person}@{trade}.example".replace(" ", ".").lower(),
            full_name=person,
            password_hash=f"$2b$12${self._token()}",
            deleted_at=self._earlier() if self._chance(0.2) else None,
        )

    def _add_group(self, market: str, org: UUID) -> UUID:
        group = self._add(
            "site_groups", organisation_id=org, name=market, description=f"Everything {market}"
        )
        self._perhaps_configure(0.7, "site_group_configs", "site_group_id", group)
        return group

    def _add_site(self, domain: str, org: UUID, groups: Sequence[UUID]) -> None:
        site = self._add(
            "sites",
            organisation_id=org,
            site_group_id=self._rng.choice([None, *groups]),
            domain=domain,
            display_name=domain.partition(".")[0].title(),
            other_domains=[f"www.{domain}"],
            is_active=self._chance(0.85),
            deleted_at=self._earlier() if self._chance(0.15) else None,
        )
        cron = self._rng.choice([None, "", "0 3 * * *", "30 4 * * 1"])
        self._perhaps_configure(0.85, "site_configs", "site_id", site, scan_schedule_cron=cron)
        for locale in LOCALES:
            self._add("translations", site_id=site, locale=locale, title="Cookies", body="Accept?")
        for name, category in COOKIES:
            self._add(
                "cookies", site_id=site, name=name, domain=domain, category=category, description=""
            )

    def _perhaps_configure(
        self, chance: float, table: str, column: str, owner: UUID, **more: object
    ) -> None:
        """With this chance, give the owner a configuration layer, mostly of NULLs."""
        if not self._chance(chance):
            return
        layer = {
            column: owner,
            "tcf_enabled": self._rng.choice([None, None, True, False]),
            "blocking_mode": self._rng.choice([None, None, "opt_in", "opt_out", "informational"]),
            "banner_copy": {"title": "We value your privacy", "button": "Accept all"},
            "privacy_policy_url": "https://www.example/privacy",
            **more,
        }
        self._add(table, **layer)
        self._configs[owner] = layer

    def _add_scan(self, created_at: datetime) -> None:
        self._add(
            "scan_jobs",
            site_id=self._rng.choice(self.tables["sites"])["id"],
            status="completed",
            pages_scanned=self._rng.randint(1, 50),
            result={"cookies": ["_ga", "cart"]},
            error_message=None,
            notes="nightly",
            created_at=created_at,
        )

    def _add_consent(self, consented_at: datetime) -> None:
        self._add(
            "consent_records",
            site_id=self._rng.choice(self.tables["sites"])["id"],
            visitor_id=self._token(),
            action=self._rng.choice(["accept_all", "reject_all", "custom"]),
            categories=["necessary", "analytics"],
            tc_string=f"CQ{self._token()}",
            ip_hash=self._token(),
            user_agent=self._rng.choice(AGENTS),
            page_url="https://www.example/",
            country_code="DE",
            consented_at=consented_at,
        )

    def _add(self, table: str, **columns: object) -> UUID:
        key = UUID(int=self._rng.getrandbits(128), version=4)
        self.tables.setdefault(table, []).append({"id": key, **columns})
        return key

    def _chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def _token(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def _lately(self) -> datetime:
        return self._now - timedelta(minutes=self._rng.uniform(5, 23 * 60))

    def _earlier(self) -> datetime:
        return self._now - timedelta(days=self._rng.uniform(1.1, 60))
