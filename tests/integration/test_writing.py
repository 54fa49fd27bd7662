"""One rule decides a write, and a write is all or nothing."""

from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from app.delivery import SENT_ELSEWHERE
from app.payload import parse
from app.pipeline import CollectError, Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import count, give_notice, one, outbox_row


@pytest.fixture
def noticed(db: Engine) -> None:
    give_notice(db, "2026-05-01T12:00:00Z")


@pytest.mark.usefixtures("noticed")
class TestTheDay:
    @pytest.mark.parametrize(
        ("now", "day"),
        [
            ("2026-05-02T02:30:00Z", "2026-05-02"),
            ("2026-05-02T23:59:59Z", "2026-05-02"),
            ("2026-05-03T01:00:00Z", "2026-05-02"),
            ("2028-02-29T02:30:00Z", "2028-02-29"),
            ("2028-03-01T02:29:59Z", "2028-02-29"),
        ],
    )
    def test_a_heartbeat_belongs_to_the_day_of_the_latest_half_past_two(
        self, pipeline: Pipeline, clock: Clock, db: Engine, now: str, day: str
    ) -> None:
        clock(now)
        assert pipeline.write_heartbeat()
        assert str(outbox_row(db)["day"]) == day

    def test_a_day_is_written_once_whoever_asks_and_however_often(
        self, pipeline: Pipeline, environment: dict[str, str], clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        assert environment
        asked = [each.write_heartbeat() for each in (pipeline, Pipeline(Settings.load())) * 3]
        assert asked.count(True) == 1
        assert count(db, "telemetry_outbox") == 1

    def test_the_next_day_is_written_from_the_next_half_past_two_on(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        pipeline.write_heartbeat()
        clock("2026-05-03T02:29:50Z")
        assert not pipeline.write_heartbeat()
        clock("2026-05-03T02:30:00Z")
        assert pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 2

    @pytest.mark.parametrize("state", ["rejected", "expired", "discarded", "sent"])
    def test_any_final_row_uses_up_its_day(
        self, pipeline: Pipeline, clock: Clock, db: Engine, state: str
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        pipeline.write_heartbeat()
        with db.begin() as connection:
            connection.execute(
                text("UPDATE telemetry_outbox SET state = :state, finished_at = now()"),
                {"state": state},
            )
        assert not pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 1

    def test_what_something_else_has_sent_is_not_sent_again(
        self,
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        clock("2026-05-02T09:00:00Z")
        with db.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(),"
                    " '2026-05-02T02:30:04Z')"
                )
            )
        assert not pipeline.write_heartbeat()
        assert not pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 0
        assert [r.levelname for r in caplog.records if SENT_ELSEWHERE in r.message] == ["WARNING"]

    def test_a_send_on_the_day_before_does_not_block_a_write(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T09:00:00Z")
        with db.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(),"
                    " '2026-05-02T02:29:59Z')"
                )
            )
        assert pipeline.write_heartbeat()


class TestTheNotice:
    def test_a_first_boot_gives_the_notice_and_writes_nothing(
        self,
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level("INFO", "telemetry")
        clock("2026-05-02T09:00:00Z")
        assert not pipeline.write_heartbeat()
        pipeline.sweep()
        assert not pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 0
        assert count(db, "instance") == 0
        (given,) = [r.message for r in caplog.records if r.message.startswith("telemetry.notice")]
        for word in (
            "counts.consents_last_24h",
            "/v1/heartbeat",
            "02:30",
            "TELEMETRY_ENABLED=false",
            " version=0.2.0 edition=ce ",
        ):
            assert word in given
        assert "first=2026-05-03T02:30:00+00:00" in given

    def test_it_is_given_once(
        self, pipeline: Pipeline, clock: Clock, db: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "telemetry")
        clock("2026-05-02T09:00:00Z")
        for _ in range(3):
            pipeline.sweep()
        assert count(db, "telemetry_notice") == 1
        assert sum("telemetry.notice" in r.message for r in caplog.records) == 1

    def test_the_half_past_two_after_it_is_the_first_that_counts(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:29:59Z")
        pipeline.sweep()
        clock("2026-05-02T02:30:00Z")
        assert pipeline.write_heartbeat()
        assert str(outbox_row(db)["day"]) == "2026-05-02"

    def test_one_for_another_schema_does_not_count(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        with db.begin() as connection:
            connection.execute(text("INSERT INTO telemetry_notice VALUES (7, '2026-01-01')"))
        assert not pipeline.write_heartbeat()


@pytest.mark.usefixtures("noticed")
class TestTheTransaction:
    def test_a_failure_leaves_neither_instance_nor_row(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        with db.begin() as connection:
            connection.execute(text("ALTER TABLE telemetry_outbox ADD CHECK (day < '2000-01-01')"))
        with pytest.raises(DBAPIError):
            pipeline.write_heartbeat()
        assert count(db, "instance") == 0
        assert count(db, "telemetry_outbox") == 0

    def test_what_is_missing_is_named_and_nothing_is_made_up(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        with db.begin() as connection:
            connection.execute(text("ALTER TABLE scan_jobs RENAME TO moved"))
        with pytest.raises(CollectError) as failure:
            pipeline.write_heartbeat()
        assert "scan_jobs" in str(failure.value.orig)
        assert count(db, "instance") == 0

    def test_after_a_failure_it_waits_before_it_counts_again(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        with db.begin() as connection:
            connection.execute(text("ALTER TABLE scan_jobs RENAME TO moved"))
        with pytest.raises(CollectError):
            pipeline.write_heartbeat()
        with db.begin() as connection:
            connection.execute(text("ALTER TABLE moved RENAME TO scan_jobs"))
        assert not pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 0

    def test_the_row_holds_a_valid_heartbeat_of_this_instance_and_this_moment(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        pipeline.write_heartbeat()
        row = outbox_row(db)
        heartbeat = parse(row["payload"])
        assert heartbeat.instance_id == str(one(db, "SELECT id FROM instance"))
        assert heartbeat.instance_id == str(row["instance_id"])
        assert heartbeat.sent_at == "2026-05-02T02:30:00+00:00"
        assert row["expires_at"] == datetime(2026, 5, 3, 2, 30, tzinfo=UTC)
        assert (row["state"], row["drains"], row["attempts"]) == ("pending", 0, 0)

    def test_an_install_keeps_its_id_and_the_oldest_row_is_the_instance(
        self, pipeline: Pipeline, clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        with db.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO instance VALUES (gen_random_uuid(), '2026-02-01', now(), NULL),"
                    " ('0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99', '2026-01-01', now(), NULL)"
                )
            )
        pipeline.write_heartbeat()
        assert str(outbox_row(db)["instance_id"]) == "0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99"
        assert count(db, "instance") == 2


@pytest.mark.usefixtures("noticed")
def test_an_install_sends_at_its_own_second_within_the_spread(
    environment: dict[str, str], clock: Clock, db: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment
    monkeypatch.setenv("TELEMETRY_SPREAD_SECONDS", "900")
    clock("2026-05-02T02:30:00Z")
    Pipeline(Settings.load()).write_heartbeat()
    first = outbox_row(db)["next_attempt_at"]
    with db.begin() as connection:
        connection.execute(text("DELETE FROM telemetry_outbox"))
    clock("2026-05-03T02:30:00Z")
    Pipeline(Settings.load()).write_heartbeat()
    second = outbox_row(db)["next_attempt_at"]
    assert (second - first).total_seconds() == 86_400
    assert 0 <= (first - datetime(2026, 5, 2, 2, 30, tzinfo=UTC)).total_seconds() < 900
