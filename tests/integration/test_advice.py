"""The advice of the log and the commands if a table, a column or a right is missing."""

from typing import Any

import pytest
from psycopg import errors
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from app import advice, log
from app.pipeline import Pipeline
from migrations import host
from tests.conftest import ROLE, Clock
from tests.support.command import command
from tests.support.database import give_notice, run

NOTICED_AT = "2026-05-01T12:00:00Z"
GRANT = "run `python -m app grants --role ROLE --apply`"
MIGRATE = (
    "the tables of telemetry are missing or of another release; run `python -m app migrate` first"
)
UPGRADE = (
    "ConsentOS's database is at revision 0004, and telemetry needs 0005 or newer: upgrade ConsentOS"
)


def cause_of(pipeline: Pipeline) -> str:
    """Return what a sweep and a write log."""
    with pytest.raises(DBAPIError) as failure:  # noqa: PT012 - either of two calls may raise
        pipeline.sweep()
        pipeline.write_heartbeat()
    return log.cause(failure.value)


class TestWhatIsMissing:
    def test_the_migrate_command_is_named_for_a_table_of_telemetry(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        run(db, "DROP TABLE telemetry_attempt, telemetry_outbox")
        assert cause_of(pipeline) == MIGRATE

    def test_the_migrate_command_is_named_for_a_column_of_another_release(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        run(db, "ALTER TABLE telemetry_outbox DROP COLUMN not_before")
        assert cause_of(pipeline) == MIGRATE

    def test_no_word_of_the_message_decides(self, pipeline: Pipeline, db: Engine) -> None:
        run(db, "DROP TABLE instance")
        with pytest.raises(DBAPIError) as failure, pipeline.transaction() as connection:
            connection.exec_driver_sql('SELECT FROM "nessuna relazione"')
        assert log.cause(failure.value) == MIGRATE

    def test_a_table_that_is_not_telemetrys_is_named_as_postgres_does(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        assert db
        with pytest.raises(DBAPIError) as failure, pipeline.transaction() as connection:
            connection.exec_driver_sql("SELECT FROM telemetry_of_another_program")
        message = 'relation "telemetry_of_another_program" does not exist'
        assert log.cause(failure.value) == message

    def test_after_a_downgrade_of_consentos_the_advice_is_to_upgrade_it(
        self, pipeline: Pipeline, environment: dict[str, str], db: Engine
    ) -> None:
        run(db, "DROP TABLE instance")
        run(db, "UPDATE alembic_version SET version_num = '0004'")
        assert cause_of(pipeline) == UPGRADE
        for asked in ("status", "preview", "send"):
            assert command(environment, asked).sentence == f"{UPGRADE}."

    def test_the_revision_that_is_needed_is_the_migrations_own(self) -> None:
        assert advice.CONSENTOS_NEEDED == host.NEEDED


class TestAMissingGrant:
    @pytest.mark.parametrize("arguments", [("preview",), ("preview", "--diff")])
    def test_is_named_by_preview_with_the_command_that_gives_it(
        self, environment: dict[str, str], db: Engine, arguments: tuple[str, ...]
    ) -> None:
        run(db, f"REVOKE SELECT (id) ON sites FROM {ROLE}")
        assert command(environment, *arguments).sentence == (
            f"ConsentOS's tables cannot be counted: permission denied for table sites: {GRANT}."
        )

    def test_is_named_by_preview_for_a_table_of_telemetry(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        run(db, f"REVOKE SELECT ON telemetry_outbox FROM {ROLE}")
        assert command(environment, "preview", "--diff").sentence == (
            f"Permission denied for table telemetry_outbox: {GRANT}."
        )

    def test_is_named_in_the_log(self, pipeline: Pipeline, db: Engine) -> None:
        run(db, f"REVOKE SELECT ON telemetry_notice FROM {ROLE}")
        assert cause_of(pipeline) == f"permission denied for table telemetry_notice: {GRANT}"

    def test_of_a_table_that_is_not_needed_is_not_advised(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        run(db, "CREATE TABLE others (id integer)")
        with pytest.raises(DBAPIError) as failure, pipeline.transaction() as connection:
            connection.exec_driver_sql("SELECT FROM others")
        assert log.cause(failure.value) == "permission denied for table others"


def test_a_column_of_an_operators_own_that_must_not_be_null_is_named(
    pipeline: Pipeline, db: Engine, clock: Clock
) -> None:
    give_notice(db, NOTICED_AT)
    clock("2026-05-02T02:30:05Z")
    run(db, "ALTER TABLE instance ADD COLUMN region text NOT NULL")
    cause = "the column region of instance is NOT NULL and has no default"
    assert cause_of(pipeline) == cause


class _German:
    """The message about a missing table from a server whose lc_messages is German."""

    message_primary = "Relation »instance« existiert nicht"
    source_function = "parserOpenTable"


def test_a_message_in_another_language_is_shown_as_it_is_where_there_is_no_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error: Any = errors.UndefinedTable()
    monkeypatch.setattr(errors.UndefinedTable, "diag", _German())
    assert log.cause(error) == _German.message_primary
