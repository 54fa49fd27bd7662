"""ConsentOS's revision is stored with each heartbeat, so that an old APP_VERSION is noticed."""

import logging

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import give_notice, one, outbox_row, run
from tests.support.receiver import Receiver

STALE = (
    "ConsentOS's database has changed from revision 0009 to 0010, and APP_VERSION is still 0.2.0:"
    " set it to ConsentOS's version"
)


@pytest.fixture(autouse=True)
def logged(
    caplog: pytest.LogCaptureFixture, db: Engine, environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> pytest.LogCaptureFixture:  # fmt: skip
    environment["APP_VERSION"] = "0.2.0"
    monkeypatch.setenv("APP_VERSION", "0.2.0")
    give_notice(db, "2026-05-01")
    caplog.set_level(logging.INFO, "telemetry")
    return caplog


def warnings(logged: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in logged.records if "telemetry.warning" in r.getMessage()]


def upgrade_consentos(db: Engine) -> None:
    run(db, "UPDATE alembic_version SET version_num = '0010'")


@pytest.fixture
def first(clock: Clock, db: Engine, logged: pytest.LogCaptureFixture) -> Pipeline:
    """A worker that has written a day's heartbeat before ConsentOS is upgraded."""
    pipeline = Pipeline(Settings.load())
    clock("2026-05-02T02:30:01Z")
    assert pipeline.write_heartbeat()
    assert warnings(logged) == []
    upgrade_consentos(db)
    return pipeline


def test_a_row_has_the_revision_and_the_body_has_not(
    pipeline: Pipeline, receiver: Receiver, clock: Clock, db: Engine
) -> None:
    clock("2026-05-02T02:30:01Z")
    pipeline.write_heartbeat()
    pipeline.drain()
    assert outbox_row(db)["host_revision"] == "0009"
    (request,) = receiver.requests
    assert b"0009" not in request.body


def test_a_version_that_stays_behind_an_upgrade_is_warned_about_every_day_until_it_is_set(
    first: Pipeline, clock: Clock, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in (3, 4):
        clock(f"2026-05-0{day}T02:30:01Z")
        assert first.write_heartbeat()
        assert warnings(logged)[-1] == f'telemetry.warning reason="{STALE}" day=2026-05-0{day}'
    assert len(warnings(logged)) == 2
    monkeypatch.setenv("APP_VERSION", "0.3.0")
    clock("2026-05-05T02:30:01Z")
    assert Pipeline(Settings.load()).write_heartbeat()
    assert len(warnings(logged)) == 2


@pytest.mark.usefixtures("first")
def test_status_says_so_before_the_next_heartbeat_is_written(environment: dict[str, str]) -> None:
    assert STALE in command(environment, "status", "--json").json["warnings"]
    renewed = command(environment, "status", "--json", APP_VERSION="0.3.0")
    assert not [each for each in renewed.json["warnings"] if "APP_VERSION" in each]
    off = command(environment, "status", "--json", TELEMETRY_ENABLED="false")
    assert not [each for each in off.json["warnings"] if "APP_VERSION" in each]


def test_a_consentos_that_has_not_changed_is_not_warned_about(
    pipeline: Pipeline, clock: Clock, logged: pytest.LogCaptureFixture
) -> None:
    for day in (2, 3, 4):
        clock(f"2026-05-0{day}T02:30:01Z")
        assert pipeline.write_heartbeat()
    assert warnings(logged) == []


def test_several_revisions_are_stored_joined_and_no_revision_as_null(
    pipeline: Pipeline, clock: Clock, db: Engine
) -> None:
    run(db, "INSERT INTO alembic_version VALUES ('0011')")
    clock("2026-05-02T02:30:01Z")
    assert pipeline.write_heartbeat()
    run(db, "DELETE FROM alembic_version")
    clock("2026-05-03T02:30:01Z")
    assert pipeline.write_heartbeat()
    kept = "SELECT array_agg(host_revision ORDER BY day) FROM telemetry_outbox"
    assert one(db, kept) == ["0009,0011", None]
