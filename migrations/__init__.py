"""Alembic's migrations, run from code: the pipeline's tables and the collector's, apart.

Each history has a version table of its own. ConsentOS keeps ``alembic_version`` in the same
database as the pipeline, and nobody but ConsentOS touches that one.
"""

from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

History = Literal["telemetry", "collector"]


class MigrationRefusedError(Exception):
    """The database is in a state that a migration will not touch; the message says what to do."""


def migrate(connection: Connection, history: History, to: str = "head") -> tuple[str, str]:
    """Bring ``history`` to the revision ``to`` (``base`` removes it all), in one transaction.

    Two migrations at once wait for each other. Returns the revisions before and after (``base``
    for none).

    Raises:
        MigrationRefusedError: see the message.
    """
    config = Config()
    here = Path(__file__).parent
    config.set_main_option("script_location", str(here).replace("%", "%%"))
    config.set_main_option("version_locations", str(here / history).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    config.attributes["version_table"] = f"{history}_alembic_version"
    with connection.begin():
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry'))"))
        before = revision(connection, history)
        if to == "base":
            command.downgrade(config, to)
            connection.execute(text(f"DROP TABLE IF EXISTS {history}_alembic_version"))
        else:
            command.upgrade(config, to)
        return before, revision(connection, history)


def revision(connection: Connection, history: History) -> str:
    """Return the revision that the database is at, or ``base`` for none."""
    context = MigrationContext.configure(
        connection, opts={"version_table": f"{history}_alembic_version"}
    )
    return context.get_current_revision() or "base"
