"""Runs Alembic's migrations from code: one history for the pipeline, one for the collector.

Each history has its own version table. ``alembic_version``, in the same database as the pipeline,
belongs to ConsentOS and is never changed here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from time import sleep
from typing import Any, Literal, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from migrations import host, repair

History = Literal["telemetry", "collector"]

BASE = "base"
"""In place of a revision: there are no tables."""

SEVERAL = "several"
"""In place of a revision: the version table has more than one row, as after a double restore."""


TRIES = 20
"""How often a migration of the collector retries while others hold a lock that it needs."""
BETWEEN_SECONDS = 1.0

T = TypeVar("T")


class MigrationRefusedError(Exception):
    """A migration refuses the state of the database; the message says what to do."""


@dataclass(frozen=True)
class Migrated:
    """The revisions before and after (``base`` for none), and what was repaired, in words."""

    before: str
    after: str
    missing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def migrate(connection: Connection, history: History, to: str = "head") -> Migrated:
    """Bring ``history`` to the revision ``to`` (``base`` removes it all), in one transaction.

    The ``prepare`` of a collector revision takes long, so it runs before, in its own transactions.
    Concurrent migrations wait for each other. Incomplete tables of telemetry are repaired.

    Raises:
        MigrationRefusedError: see the message.
    """
    config = _config(history)
    config.attributes["connection"] = connection
    if history == "collector":
        with _turn(connection.engine):
            return _migrate_online(connection, config, to)
    if to != "base":
        with _alone(connection):
            refusal = host.give_back_instance(connection)
        if refusal:
            raise MigrationRefusedError(refusal)
    return _migrate(connection, history, config, to)


def _migrate(connection: Connection, history: History, config: Config, to: str) -> Migrated:
    with _alone(connection):
        before = revision(connection, history)
        if before not in {*known(history), BASE, SEVERAL}:
            raise MigrationRefusedError(
                f"The tables of {history} are at revision {before}, which is unknown to this"
                " release: a newer release created them. Run that release."
            )
        if history == "telemetry":
            lacking, kept = _telemetry(connection, config, to)
        else:
            lacking, kept = [], []
            _run(config, to)
        if to == "base":
            connection.execute(text(f"DROP TABLE IF EXISTS {history}_alembic_version"))
        return Migrated(before, revision(connection, history), lacking, kept)


def _config(history: History) -> Config:
    config = Config()
    here = Path(__file__).parent
    config.set_main_option("script_location", str(here).replace("%", "%%"))
    config.set_main_option("version_locations", str(here / history).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes["version_table"] = f"{history}_alembic_version"
    return config


@cache
def known(history: History) -> tuple[str, ...]:
    """Return the revisions that this release knows, the newest first."""
    scripts = ScriptDirectory.from_config(_config(history)).walk_revisions()
    return tuple(script.revision for script in scripts)


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Open a transaction during which no other migration runs."""
    with connection.begin():
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry'))"))
        yield


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """Wait until no other migration runs, and block others during several transactions.

    The lock belongs to a transaction, because a session lock does not work through a pooler.
    """
    with engine.connect() as connection, connection.begin():
        connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtext('consentos-telemetry collector'))")
        )
        yield


def _migrate_online(connection: Connection, config: Config, to: str) -> Migrated:
    """Run the preparations, which take long, and migrate.

    On failure the preparations are undone: left in place, they would refuse heartbeats later.
    """
    revisions = [] if to == "base" else _with_preparation(connection, config, to)

    def prepare_and_migrate() -> Migrated:
        for each in revisions:
            each.prepare(connection)
        return _migrate(connection, "collector", config, to)

    try:
        return _patiently(connection, prepare_and_migrate)
    except BaseException:
        with suppress(DBAPIError):  # the first error is the one to report
            for each in revisions:
                _patiently(connection, partial(each.undo, connection))
        raise


def _patiently(connection: Connection, work: Callable[[], T]) -> T:
    """Return the result of ``work``; retry it while others hold a lock for too long."""
    for _ in range(TRIES):
        try:
            return work()
        except DBAPIError as error:
            connection.rollback()
            if not isinstance(error.orig, LockNotAvailable):
                raise
        sleep(BETWEEN_SECONDS)
    return work()


def _with_preparation(connection: Connection, config: Config, to: str) -> list[Any]:
    """Return the modules of the pending revisions up to ``to`` that have a ``prepare``."""
    with connection.begin():
        found = revision(connection, "collector")
    if found not in known("collector") or found == "0001":
        return []  # no data, or too little to take long
    scripts = [*ScriptDirectory.from_config(config).iterate_revisions(to, found)][::-1]
    return [script.module for script in scripts if hasattr(script.module, "prepare")]


def _run(config: Config, to: str) -> None:
    command.downgrade(config, to) if to == "base" else command.upgrade(config, to)


def _telemetry(connection: Connection, config: Config, to: str) -> tuple[list[str], list[str]]:
    """Run telemetry's migrations, and repair incomplete tables.

    Returns what was missing, and how many rows were kept; both are empty without a repair.
    """
    if to != "base" and (refusal := host.unready(connection)):
        raise MigrationRefusedError(refusal)
    try:
        with connection.begin_nested():
            _run(config, to)
            if to != "base" and not (to == "head" and repair.missing(connection)):
                return [], []
    except (DBAPIError, CommandError) as error:
        if not _half_there(error):
            raise
    try:
        if to == "base":
            repair.clear(connection)
            return [], []
        lacking = repair.missing(connection) or ["its revision in telemetry_alembic_version"]
        return lacking, repair.rebuild(connection, lambda: _run(config, to))
    except repair.NotRepairableError as error:
        raise MigrationRefusedError(
            f"The tables of telemetry are incomplete and cannot be repaired: {error}. Fix"
            " that by hand, then run this again."
        ) from error


def _half_there(error: DBAPIError | CommandError) -> bool:
    """Whether a migration failed because something exists, is missing, or depends on a table.

    These are SQLSTATE 2BP01 and class 42, except 42501, which is about rights.
    """
    state = getattr(error.orig, "sqlstate", None) if isinstance(error, DBAPIError) else "42"
    return state is not None and state.startswith(("42", "2BP01")) and state != "42501"


def revision(connection: Connection, history: History) -> str:
    """Return the database's revision, ``base`` for none, or ``several``."""
    context = MigrationContext.configure(
        connection, opts={"version_table": f"{history}_alembic_version"}
    )
    heads = context.get_current_heads()
    return SEVERAL if len(heads) > 1 else next(iter(heads), BASE)
