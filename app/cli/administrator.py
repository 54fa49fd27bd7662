"""The database as its administrator: the commands that change it need more rights than workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from app import database, log
from app.cli.entry import CommandError, explained
from app.database import PATIENCE_OF_AN_OWNER
from app.settings import Settings


@contextmanager
def administrator(settings: Settings) -> Iterator[Engine]:
    """Yield the engine for MIGRATION_DATABASE_URL, or for DATABASE_URL if that is not set."""
    with explained():
        try:
            yield database.engine(settings.require_admin(), patience=PATIENCE_OF_AN_OWNER)
        except DBAPIError as error:
            if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
                raise
            cause = log.cause(error)
            raise CommandError(
                f"{cause[0].upper()}{cause[1:]}: MIGRATION_DATABASE_URL must name a role with that"
                " right."
            ) from error
