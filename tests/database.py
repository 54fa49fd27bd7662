"""Looks at a database from outside, in sessions of its own."""

from typing import Any

from sqlalchemy import Engine, text


def one(db: Engine, statement: str, **parameters: object) -> Any:
    """Return the only value of a query."""
    with db.begin() as connection:
        return connection.execute(text(statement), parameters).scalar_one()


def count(db: Engine, table: str) -> int:
    """Return how many rows a table has."""
    return int(one(db, f"SELECT count(*) FROM {table}"))  # noqa: S608 - the test's own words


def run(db: Engine, statement: str, **parameters: object) -> None:
    """Run a statement and commit it."""
    with db.begin() as connection:
        connection.execute(text(statement), parameters)


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
