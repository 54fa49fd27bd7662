"""A small but believable ConsentOS database, for the demo and for the tests.

The true counts are computed here in plain Python from the generated rows, so that they can judge
what the telemetry's SQL counts.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

Row = dict[str, Any]

SCANS = 40  # in the last 24 hours; as many are older
CONSENTS = 2_500  # likewise
TRADES = ("Atlas", "Birch", "Cedar", "Delta", "Ember")
BRANDS = ("fjord", "grove", "harbour", "iris", "juno", "kestrel")
OFFERS = ("shop", "blog")
PEOPLE = ("Ada Berg", "Ben Costa", "Cleo Dahl", "Dov Evans", "Eve Fuchs", "Finn Gray")
AGENTS = ("Mozilla/5.0 (X11; Linux x86_64)", "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0)")
LOCALES = ("en", "de", "fr")


@dataclass(frozen=True)
class Truth:
    """What a correct heartbeat counts, before the counts become buckets."""

    orgs: int
    users: int
    sites: int
    scans_last_24h: int
    consents_last_24h: int
    tcf_v22_sites: int
    auto_blocking_sites: int
    scanner_scheduled_sites: int


def create_tables(connection: Connection) -> None:
    """Create ConsentOS's tables as of its revision 0009, `alembic_version` among them."""
    ddl = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # Only without parameters does psycopg accept several statements at once.
    connection.exec_driver_sql(ddl, execution_options={"no_parameters": True})


def populate(connection: Connection, seed: int = 20260502, *, now: datetime | None = None) -> Truth:
    """Fill the tables with generated rows and return the true counts.

    Every event lies before `now` (by default the present) and at least an hour away from where
    the last 24 hours begin. The same seed and `now` give the same rows.
    """
    company = _Generator(random.Random(seed), now or datetime.now(UTC))
    company.generate()
    for table, rows in company.tables.items():
        _insert(connection, table, rows)
    return company.truth()


def mark(connection: Connection, marker: str) -> int:
    """Put the marker into every text and JSON value of every row that ConsentOS owns.

    Returns:
        The number of columns that hold the marker now. The columns of an empty table do not count.
    """
    columns: dict[str, list[str]] = {}
    for table, expression in connection.execute(text(MARKABLE)):
        columns.setdefault(table, []).append(expression)
    marked = 0
    for table, expressions in columns.items():
        update = text(
            f"UPDATE {table} AS t SET {', '.join(expressions)} "  # noqa: S608
            "FROM (SELECT ctid, :marker || '-' || row_number() OVER () AS value FROM " + table + ") AS m "
            "WHERE t.ctid = m.ctid"
        )
        if connection.execute(update, {"marker": marker}).rowcount:
            marked += len(expressions)
    return marked


MARKABLE = """
SELECT quote_ident(table_name),
       quote_ident(column_name) || ' = ' || CASE
           WHEN data_type IN ('json', 'jsonb') THEN 'to_json(m.value)::' || data_type
           ELSE 'm.value' END
FROM information_schema.columns JOIN information_schema.tables
     USING (table_catalog, table_schema, table_name)
WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'
  AND table_name <> 'alembic_version' AND NOT starts_with(table_name, 'telemetry_')
  AND data_type IN ('text', 'character varying', 'character', 'json', 'jsonb')
ORDER BY table_name, ordinal_position
"""
"""Table and assignment for each column that can hold text; the value ends in a row number."""


class _Generator:
    """Rows of every table, parents before children, and the truth about them."""

    def __init__(self, rng: random.Random, now: datetime) -> None:
        self._rng = rng
        self._now = now
        self.tables: dict[str, list[Row]] = {}

    def generate(self) -> None:
        self._add("instance", created_at=self._earlier(), updated_at=self._earlier())
        for number, trade in enumerate(TRADES, start=1):
            self._organisation(trade, deleted=number == len(TRADES))
        for _ in range(SCANS):
            self._scan(self._recently())
            self._scan(self._earlier())
        for _ in range(CONSENTS):
            self._consent(self._recently())
            self._consent(self._earlier())

    def truth(self) -> Truth:
        live = [
            (site, self._layers(site))
            for site in self._existing("sites")
            if site["is_active"] and self._config("site_configs", site_id=site["id"])
        ]
        return Truth(
            orgs=len(self._existing("organisations")),
            users=len(self._existing("users")),
            sites=len(self._existing("sites")),
            scans_last_24h=self._since_yesterday("scan_jobs", "created_at"),
            consents_last_24h=self._since_yesterday("consent_records", "consented_at"),
        )
