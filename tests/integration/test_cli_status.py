"""``status`` says whether telemetry is on, what happened last and what comes next."""

import pytest
from sqlalchemy import Engine

from app import __version__
from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import PASSWORD, Ended, command, commands
from tests.support.database import give_notice, one, outbox_row, run
from tests.support.receiver import Receiver, answer

UNREACHABLE = f"postgresql://operator:{PASSWORD}@127.0.0.1:1/consentos"
NOTICED_AT = "2026-05-01T12:00:00Z"


@pytest.fixture
def noticed(db: Engine) -> None:
    give_notice(db, NOTICED_AT)


def line(ended: Ended, start: str) -> str:
    """Return the words of the only line of a text that begins with ``start``."""
    (found,) = [line for line in ended.out.splitlines() if line.startswith(start)]
    return found.removeprefix(start).strip()


def test_a_fresh_install_is_on_and_says_when_it_will_first_send(
    environment: dict[str, str], clock: Clock, receiver: Receiver
) -> None:
    clock("2026-05-02T09:00:00Z")
    here = {**environment, "TELEMETRY_ENDPOINT": f"{receiver.url}?token={PASSWORD}"}
    shown, reported = commands(here, "status", "status --json")
    assert (shown.code, shown.err, reported.code) == (0, "", 0)
    assert line(shown, "telemetry") == "on"
    assert line(shown, "endpoint") == receiver.url
    assert line(shown, "version") == "0.2.0"
    assert line(shown, "edition") == "ce"
    assert line(shown, "release") == __version__
    assert line(shown, "schedule") == "daily at 02:30 UTC"
    assert line(shown, "instance").startswith("none yet")
    assert line(shown, "notice") == "not given yet"
    assert line(shown, "last success") == "never"
    assert line(shown, "next send") == "2026-05-03 02:30:00Z"
    assert line(shown, "pending") == "nothing"
    assert line(shown, "last error") == "none"
    assert reported.json == {
        "release": __version__,
        "enabled": True,
        "reason": None,
        "warnings": [],
        "endpoint": receiver.url,
        "version": "0.2.0",
        "edition": "ce",
        "schedule": "daily at 02:30 UTC",
        "instance_id": None,
        "noticed_at": None,
        "last_success": None,
        "next_send": "2026-05-03T02:30:00+00:00",
        "pending": [],
        "last_error": None,
        "overdue": False,
        "cannot_write": None,
        "lacking_rights": [],
        "excess_rights": [],
        "redis_trouble": "REDIS_URL is not set",
        "last_sweep_seconds_ago": None,
    }
    assert receiver.connections == 0


class TestAHeartbeat:
    @pytest.fixture
    def written(self, pipeline: Pipeline, clock: Clock, db: Engine) -> Pipeline:
        """The day's heartbeat has just been written."""
        give_notice(db, NOTICED_AT)
        clock("2026-05-02T02:30:00Z")
        assert pipeline.write_heartbeat()
        return pipeline

    @pytest.fixture
    def refused(self, written: Pipeline, receiver: Receiver) -> None:
        """One attempt was made, and the receiver wants to be left alone for an hour."""
        receiver.answers = [answer(429, "Retry-After: 3600")]
        written.drain()

    @pytest.mark.usefixtures("refused")
    def test_that_waits_is_shown_with_its_last_error_and_its_next_try(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        shown, listed = commands(environment, "status", "status --json")
        row, reported = outbox_row(db), listed.json
        again = f"{row['next_attempt_at']:%Y-%m-%d %H:%M:%S}Z"
        assert line(shown, "pending") == f"2026-05-02, 1 attempt, next attempt {again}"
        assert line(shown, "next send") == again
        assert line(shown, "last error").startswith("retryable (HTTP 429), 2026-05-02 02:30:0")
        assert line(shown, "instance") == str(row["instance_id"])
        assert line(shown, "notice") == "2026-05-01 12:00:00Z"
        (pending,) = reported["pending"]
        assert pending["payload"] == row["payload"]
        assert (pending["day"], pending["state"]) == ("2026-05-02", "pending")
        assert (
            pending["next_attempt_at"]
            == reported["next_send"]
            == row["next_attempt_at"].isoformat()
        )
        assert reported["last_error"]["http_status"] == 429
        assert reported["last_success"] is None

    @pytest.mark.usefixtures("refused")
    def test_that_waits_awaits_being_discarded_once_telemetry_is_off(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        off = {**environment, "TELEMETRY_ENABLED": "flase", "CONSENTOS_DEPLOYMENT": PASSWORD + "!"}
        shown, listed = commands(off, "status", "status --json")
        reported = listed.json
        assert line(shown, "telemetry").startswith("off: TELEMETRY_ENABLED must be true or false")
        assert line(shown, "pending") == "2026-05-02, 1 attempt, will be discarded"
        assert line(shown, "next send") == "never: telemetry is off"
        assert line(shown, "warning").startswith("CONSENTOS_DEPLOYMENT must be")
        assert (reported["enabled"], reported["next_send"], reported["overdue"]) == (
            False,
            None,
            False,
        )
        assert reported["reason"] in shown.out
        assert receiver.connections == 1

    @pytest.mark.usefixtures("written")
    def test_that_is_being_sent_is_in_progress(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        run(
            db,
            "UPDATE telemetry_outbox SET state = 'sending', drains = 1,"
            " lease_token = gen_random_uuid(), lease_until = now() + interval '40 s'",
        )
        shown = command(environment, "status")
        assert line(shown, "sending") == "2026-05-02, 0 attempts, being sent now"

    def test_that_was_sent_is_the_last_success(
        self, environment: dict[str, str], written: Pipeline, db: Engine
    ) -> None:
        written.drain()
        reported = command(environment, "status", "--json").json
        stamped = one(db, "SELECT last_telemetry_at FROM instance")
        assert reported["last_success"] == stamped.isoformat()
        assert reported["next_send"] == "2026-05-03T02:30:00+00:00"
        assert (reported["pending"], reported["last_error"]) == ([], None)


@pytest.mark.usefixtures("noticed")
class TestTheCheck:
    def test_fails_from_an_hour_after_a_half_past_two_that_nobody_wrote_for(
        self, environment: dict[str, str], clock: Clock
    ) -> None:
        clock("2026-05-02T03:29:00Z")
        assert command(environment, "status", "--check").code == 0
        clock("2026-05-02T03:30:00Z")
        overdue = command(environment, "status", "--check")
        assert overdue.code == 1
        assert line(overdue, "overdue")
        reported, checked = commands(environment, "status --json", "status --json --check")
        assert (reported.code, checked.code) == (0, 1)
        assert reported.json["overdue"]
        assert checked.json["overdue"]

    def test_passes_while_telemetry_is_off(self, environment: dict[str, str], clock: Clock) -> None:
        clock("2026-05-02T09:00:00Z")
        assert command(environment, "status", "--check", DO_NOT_TRACK="1").code == 0

    def test_passes_while_only_the_collector_is_down(
        self, environment: dict[str, str], pipeline: Pipeline, clock: Clock, receiver: Receiver
    ) -> None:
        clock("2026-05-02T02:30:00Z")
        receiver.answers = [answer(503, "Retry-After: 60")]
        pipeline.write_heartbeat()
        pipeline.drain()
        clock("2026-05-02T20:00:00Z")
        assert command(environment, "status", "--check").code == 0

    def test_passes_where_another_program_has_sent_the_days_heartbeat(
        self, environment: dict[str, str], clock: Clock, db: Engine
    ) -> None:
        clock("2026-05-02T09:00:00Z")
        run(
            db,
            "INSERT INTO instance VALUES (gen_random_uuid(), '2026-01-01', now(),"
            " '2026-05-02T02:30:04Z')",
        )
        assert command(environment, "status", "--check").code == 0

    def test_passes_before_a_first_half_past_two_after_the_notice(
        self, environment: dict[str, str], clock: Clock
    ) -> None:
        clock("2026-05-01T23:00:00Z")
        assert command(environment, "status", "--check").code == 0

    def test_is_no_judge_of_a_database_that_it_cannot_reach(
        self, environment: dict[str, str]
    ) -> None:
        gone = {**environment, "DATABASE_URL": UNREACHABLE}
        asked, checked, reported = commands(gone, "status", "status --check", "status --json")
        assert reported.json["enabled"]
        assert reported.json["error"] == "The database cannot be reached."
        assert asked.sentence == checked.sentence == "The database cannot be reached."
        assert (asked.code, checked.code) == (1, 0)
        # What needs no database is reported all the same.
        assert line(asked, "telemetry") == line(checked, "telemetry") == "on"

    def test_is_no_judge_without_a_database_to_ask(self, environment: dict[str, str]) -> None:
        ended = command(environment, "status", "--check", DATABASE_URL=None)
        assert (ended.code, ended.sentence) == (0, "DATABASE_URL is not set.")
        assert command(environment, "status", DATABASE_URL=None).code == 2
