"""Reads a database in sessions of its own, and counts the statements of other sessions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Pool, event, text

from app.payload import SCHEMA_VERSION

MIGRATIONS = Path(__file__).parents[2] / "migrations" / "telemetry"
REVISIONS = tuple(sorted(each.name[:4] for each in MIGRATIONS.glob("0*.py")))
"""Each revision of the telemetry's tables that a released version has left in a database."""
HEAD = REVISIONS[-1]

CONSENTOS_0005 = """
CREATE TABLE instance (
    id uuid PRIMARY KEY,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    last_telemetry_at timestamptz
)
"""
"""What ConsentOS's own migration 0005 does: if the table is there already, it fails."""


def one(db: Engine, statement: str, **parameters: object) -> Any:
    """Return the only value of a query."""
    with db.begin() as connection:
        return connection.execute(text(statement), parameters).scalar_one()


def count(db: Engine, table: str) -> int:
    """Return how many rows a table has."""
    return int(one(db, f"SELECT count(*) FROM {table}"))


def run(db: Engine, statement: str, **parameters: object) -> None:
    """Run a statement and commit it."""
    with db.begin() as connection:
        connection.execute(text(statement), parameters)


def give_notice(db: Engine, at: str | None = None) -> None:
    """Record that the operator got the notice of the newest schema, by default two days ago."""
    run(
        db,
        "INSERT INTO telemetry_notice"
        " VALUES (:schema, coalesce(CAST(:at AS timestamptz), now() - interval '2 days'))",
        schema=SCHEMA_VERSION,
        at=at,
    )


def waiting_for_locks(db: Engine) -> int:
    """Return how many sessions wait for what another one has locked."""
    waits = "datname = current_database() AND wait_event_type = 'Lock'"
    return int(one(db, f"SELECT count(*) FROM pg_stat_activity WHERE {waits}"))


def outbox_row(db: Engine) -> dict[str, Any]:
    """Return the outbox's only row, its payload as the text that is stored."""
    statement = "SELECT *, payload::text AS payload FROM telemetry_outbox"
    with db.begin() as connection:
        return dict(connection.execute(text(statement)).mappings().one())


def attempts(db: Engine) -> list[dict[str, Any]]:
    """Return all attempts in the order of their numbers."""
    with db.begin() as connection:
        found = connection.execute(text("SELECT * FROM telemetry_attempt ORDER BY outbox_id, n"))
        return [dict(row) for row in found.mappings()]


@dataclass
class Cost:
    """The statements that the database got, with their parameters."""

    connections: int = 0
    commits: int = 0
    transactions: list[list[tuple[str, Any]]] = field(default_factory=list)

    @property
    def statements(self) -> list[str]:
        return [statement for asked in self.transactions for statement, _ in asked]

    @property
    def each(self) -> list[int]:
        """The number of statements in each transaction, without BEGIN and COMMIT."""
        return [len(asked) for asked in self.transactions]


@contextmanager
def counted() -> Iterator[Cost]:
    """Count the statements to any database until the block ends."""
    cost = Cost()

    def connect(*_: object) -> None:
        cost.connections += 1

    def begin(*_: object) -> None:
        cost.transactions.append([])

    def execute(*given: Any) -> None:
        (_, _, statement, parameters, *_) = given
        cost.transactions[-1].append((statement, parameters))

    def commit(*_: object) -> None:
        cost.commits += 1

    listeners: list[tuple[type, str, Any]] = [
        (Pool, "connect", connect),
        (Engine, "begin", begin),
        (Engine, "before_cursor_execute", execute),
        (Engine, "commit", commit),
    ]
    for listener in listeners:
        event.listen(*listener)
    try:
        yield cost
    finally:
        for listener in listeners:
            event.remove(*listener)


def plan_of(
    connection: Connection, statement: str, parameters: Any = None, *, analyze: bool = False
) -> list[dict[str, Any]]:
    """Return every node of the plan of a statement, which is run if it is to be analyzed."""
    explain = f"EXPLAIN (FORMAT JSON, ANALYZE {analyze}) {statement}"
    (explained,) = connection.exec_driver_sql(explain, parameters).scalar_one()
    return list(_nodes(explained["Plan"]))


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _nodes(inner)
