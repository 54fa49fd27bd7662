"""When the database fails, at any moment, nothing is lost or sent twice, and the log says so."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from threading import Event, Thread

import pytest
from sqlalchemy import Engine, make_url, text

from app import grants, report
from app.database import PATIENCE
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.breakable import Server
from tests.support.database import attempts, count, one, outbox_row, run
from tests.support.processes import Process, Processes
from tests.support.receiver import Receiver, answer
from tests.support.relay import Relay
from tests.support.steps import (
    DAY_BEGINS,
    bodies,
    do,
    eventually,
    locked,
    outcomes,
    put_a_row,
    ready,
    recover,
    standing_at,
    until_worked_off,
    without_harm,
    worked_off,
)

FULL_DISK = "RAISE EXCEPTION 'made' USING ERRCODE = 'disk_full'"
"""What Postgres does instead; an error of another kind takes the same way through the code."""

SETTLE = "OLD.lease_token IS NOT NULL AND NEW.lease_token IS NULL"
"""What the end of a lease looks like to a trigger."""

COMMIT = rb"COMMIT\x00"
"""The end of a transaction, as Postgres is sent it; its beginning may name READ COMMITTED."""


def send_again(processes: Processes, worker: Process, db: Engine) -> None:
    """Wake the sender of a row that waits, and see it sent."""
    assert outbox_row(db)["state"] == "pending"
    processes.wake("drain")
    worker.wait_for("telemetry.attempt")


def assert_sent(db: Engine, receiver: Receiver, *ended: str | None) -> None:
    """Assert that the row is sent, how its attempts ended, and that each sent its stored bytes."""
    row = outbox_row(db)
    assert (row["state"], row["attempts"]) == ("sent", len(ended))
    assert outcomes(db) == list(ended)
    assert set(bodies(receiver)) == {row["payload"].encode()}


def failures(worker: Process) -> list[str]:
    """Return the stage and error of each failure; assert that the log holds no traceback."""
    assert without_harm(worker)
    return [
        line.removeprefix("telemetry.failed ").removesuffix(" level=WARNING")
        for line in worker.lines("telemetry.failed")
    ]


def once(db: Engine, event: str, fault: str, *, when: str = "true") -> None:
    """Have Postgres execute ``fault`` the first time that ``event`` happens to a row."""
    run(db, "CREATE SEQUENCE faults")
    run(db, "GRANT USAGE ON SEQUENCE faults TO PUBLIC")
    run(
        db,
        "CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('faults') = 1 THEN {fault}; END IF; RETURN NEW; END $$",
    )
    run(
        db,
        f"CREATE TRIGGER fault BEFORE {event} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION fault()",
    )


@pytest.fixture
def role(db: Engine, processes: Processes, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A role of this test's own, by which new pipelines and processes connect."""
    url = make_url(processes.environment["DATABASE_URL"])
    name = f"{url.database}_pipeline"
    with db.begin() as connection:
        grants.apply(connection, name, url.password)
    as_role = url.set(username=name).render_as_string(hide_password=False)
    processes.environment["DATABASE_URL"] = as_role
    monkeypatch.setenv("DATABASE_URL", as_role)
    yield name
    run(db, f"DROP OWNED BY {name}")
    run(db, f"DROP ROLE {name}")


@pytest.mark.usefixtures("pending")
class TestRestarted:
    def test_before_the_claim_is_committed_the_row_stays_pending(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        stopped = standing_at("app.outbox:claim:return", processes)
        postgres.restart()
        stopped.go_on()
        stopped.process.wait_for("telemetry.failed stage=drain")
        assert receiver.connections == 0
        send_again(processes, stopped.process, db)
        assert_sent(db, receiver, "sent")
        assert len(failures(stopped.process)) == len(receiver.requests) == 1

    def test_between_the_claim_and_the_post_nothing_fails(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        stopped = standing_at("app.sender:tries:call", processes)
        postgres.restart()
        stopped.go_on()
        stopped.process.wait_for("telemetry.attempt")
        assert_sent(db, receiver, "sent")
        assert failures(stopped.process) == []

    def test_before_the_attempt_is_on_record_nothing_leaves_until_the_lease_lapses(
        self,
        postgres: Server,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        stopped = standing_at("app.outbox:begin:return", processes)
        postgres.restart()
        stopped.go_on()
        stopped.process.wait_for("telemetry.failed stage=drain")
        assert receiver.connections == count(db, "telemetry_attempt") == 0
        assert outbox_row(db)["state"] == "sending"
        recover(processes, clock, db)
        assert_sent(db, receiver, "sent")

    def test_during_the_post_its_outcome_is_recorded_all_the_same(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        receiver.during = postgres.restart
        worker = ready(processes)
        processes.wake("drain")
        worker.wait_for("telemetry.attempt")
        assert_sent(db, receiver, "sent")
        assert failures(worker) == []
        assert len(receiver.requests) == 1

    def test_during_the_settle_it_is_settled_by_the_next_try(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        stopped = standing_at("app.outbox:record:return", processes)
        postgres.restart()
        stopped.go_on()
        stopped.process.wait_for("telemetry.attempt")
        assert_sent(db, receiver, "sent")
        assert failures(stopped.process) == stopped.process.lines("telemetry.lease_lost") == []
        assert len(receiver.requests) == 1


@pytest.mark.usefixtures("pending")
class TestAway:
    def test_while_it_is_down_the_log_says_so_once_a_minute_and_afterwards_all_goes_on(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = ready(processes)
        with postgres.down():
            processes.wake("sweep")
            worker.wait_for("telemetry.failed stage=connect")
            do(processes, "drain", "sweep", "drain")
        assert failures(worker) == ['stage=connect error="the database cannot be reached"']
        send_again(processes, worker, db)
        do(processes, "sweep", "sweep")
        (recovered,) = worker.lines("telemetry.recovered")
        assert re.fullmatch(
            r"telemetry.recovered stage=connect after_seconds=\d+ level=INFO", recovered
        )
        assert_sent(db, receiver, "sent")
        assert len(receiver.requests) == 1

    def test_a_post_whose_outcome_cannot_be_recorded_for_long_is_repeated_with_the_same_bytes(
        self,
        postgres: Server,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        worker = ready(processes)
        with ExitStack() as away:
            receiver.during = lambda: away.enter_context(postgres.down())
            processes.wake("drain")
            worker.wait_for("telemetry.failed stage=drain")
            receiver.during = lambda: None
        assert len(worker.lines("telemetry.payload")) == 1
        assert "outcome=sent" in worker.lines("telemetry.attempt")[0]
        recover(processes, clock, db)
        assert_sent(db, receiver, None, "sent")
        assert len(receiver.requests) == 2

    def test_a_worker_whose_sessions_are_ended_again_and_again_goes_on_trying(
        self,
        role: str,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        worker = ready(processes)
        with ending_sessions(db, role):
            for _ in range(10):
                do(processes, "drain", "sweep")
        assert failures(worker)
        recover(processes, clock, db)
        # A session may end before an outcome is committed: that attempt has none.
        unrecorded = [None] * (len(attempts(db)) - 1)
        assert_sent(db, receiver, *unrecorded, "sent")
        assert 1 <= len(receiver.requests) <= len(attempts(db))

    def test_a_server_that_is_frozen_in_mid_settle_does_not_keep_a_worker_from_stopping(
        self,
        postgres: Server,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        stopped = standing_at("app.outbox:settle:call", processes)
        with postgres.frozen():
            stopped.go_on()
            stopped.process.signal(signal.SIGTERM)
            assert stopped.process.wait(10) == 0
        assert failures(stopped.process) == []
        assert outbox_row(db)["state"] == "sending"
        ready(processes)
        recover(processes, clock, db)
        assert_sent(db, receiver, None, "sent")

    def test_a_server_that_is_frozen_at_a_connection_is_given_up_after_five_seconds(
        self, postgres: Server, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = ready(processes)
        with postgres.frozen():
            processes.wake("drain")
            worker.wait_for("telemetry.failed stage=drain", seconds=8)
        assert failures(worker) == ['stage=drain error="the database does not answer"']
        send_again(processes, worker, db)
        assert_sent(db, receiver, "sent")


@pytest.mark.usefixtures("pending")
def test_a_connection_that_stays_open_and_answers_nothing_is_given_up_and_work_goes_on(
    relayed_database: Relay, processes: Processes, receiver: Receiver, db: Engine
) -> None:
    stopped = standing_at("app.outbox:begin:return", processes)
    with relayed_database.silent():
        stopped.go_on()
        stopped.process.wait_for("telemetry.failed stage=drain", seconds=2 * PATIENCE)
    assert failures(stopped.process) == ['stage=drain error="the database does not answer"']
    assert receiver.connections == 0
    run(db, "UPDATE telemetry_outbox SET state = 'pending', lease_token = NULL, lease_until = NULL")
    send_again(processes, stopped.process, db)
    eventually(lambda: outbox_row(db)["state"] == "sent")


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize(
    "seconds", [2.0, PATIENCE + 0.2], ids=["and come again", "until the connection is given up"]
)
def test_an_outcome_whose_packets_are_lost_is_recorded_when_the_network_is_back(
    relayed_database: Relay, processes: Processes, receiver: Receiver, db: Engine, seconds: float
) -> None:
    stopped = standing_at("app.outbox:settle:call", processes)
    with relayed_database.silent():
        stopped.go_on()
        time.sleep(seconds)
        assert outbox_row(db)["state"] == "sending"
        assert stopped.process.lines("telemetry.attempt") == []
    stopped.process.wait_for("telemetry.attempt")
    assert_sent(db, receiver, "sent")
    assert failures(stopped.process) == stopped.process.lines("telemetry.lease_lost") == []
    assert len(receiver.requests) == 1


@pytest.mark.usefixtures("pending")
def test_a_worker_whose_connections_all_answer_nothing_sends_when_one_does(
    relayed_database: Relay, processes: Processes, receiver: Receiver, db: Engine
) -> None:
    worker = ready(processes)
    with relayed_database.silent():
        for actor in ("sweep", "drain", "sweep", "drain"):
            processes.wake(actor)
        eventually(lambda: worked_off(processes), seconds=4 * PATIENCE)
        assert [line.split(" error=")[1] for line in failures(worker)] == [
            '"the database does not answer"'
        ]
    send_again(processes, worker, db)
    assert_sent(db, receiver, "sent")


@contextmanager
def ending_sessions(db: Engine, role: str) -> Iterator[None]:
    """End every session of a role, again and again, until the block ends."""
    over = Event()
    end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = :role"

    def go_on() -> None:
        while not over.wait(0.01):
            one(db, end, role=role)

    thread = Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class TestAReplyToACommitThatIsLost:
    @pytest.mark.usefixtures("noticed")
    def test_after_a_write_there_is_one_row(
        self,
        relayed_database: Relay,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        clock(DAY_BEGINS)
        worker = ready(processes)
        relayed_database.lose_the_reply_to(COMMIT)
        processes.wake("heartbeat")
        worker.wait_for("telemetry.failed stage=write")
        assert relayed_database.lost.is_set()
        worker.wait_for("telemetry.attempt")
        assert not Pipeline(Settings.load()).write_heartbeat()
        assert_sent(db, receiver, "sent")
        assert failures(worker) == ['stage=write error="the database cannot be reached"']
        assert len(receiver.requests) == 1

    @pytest.mark.usefixtures("pending")
    def test_after_a_claim_the_row_comes_back_with_its_lease(
        self,
        relayed_database: Relay,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        worker = ready(processes)
        relayed_database.lose_the_reply_to(COMMIT)
        processes.wake("drain")
        worker.wait_for("telemetry.failed stage=drain")
        assert outbox_row(db)["state"] == "sending"
        assert receiver.connections == count(db, "telemetry_attempt") == 0
        recover(processes, clock, db)
        assert_sent(db, receiver, "sent")
        assert len(receiver.requests) == 1

    @pytest.mark.usefixtures("pending")
    def test_after_a_begin_the_attempt_is_on_record_and_nothing_has_left(
        self,
        relayed_database: Relay,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        stopped = standing_at("app.outbox:begin:call", processes)
        relayed_database.lose_the_reply_to(COMMIT)
        stopped.go_on()
        stopped.process.wait_for("telemetry.failed stage=drain")
        assert outcomes(db) == [None]
        assert receiver.connections == 0
        recover(processes, clock, db)
        assert_sent(db, receiver, None, "sent")
        assert len(receiver.requests) == 1

    @pytest.mark.usefixtures("pending")
    @pytest.mark.parametrize(
        ("reply", "state"),
        [(answer(202), "sent"), (answer(429, "Retry-After: 7200"), "pending")],
        ids=["sent", "to be tried again"],
    )
    def test_after_a_settle_the_row_is_settled_and_logged_as_ever(
        self,
        relayed_database: Relay,
        receiver: Receiver,
        db: Engine,
        caplog: pytest.LogCaptureFixture,
        *,
        reply: bytes,
        state: str,
    ) -> None:
        caplog.set_level("INFO", "telemetry")
        receiver.answers = [reply]
        receiver.during = lambda: relayed_database.lose_the_reply_to(COMMIT)
        Pipeline(Settings.load()).drain()
        assert relayed_database.lost.is_set()
        row = outbox_row(db)
        assert (row["state"], row["drains"], row["attempts"]) == (state, 1, 1)
        (attempt,) = attempts(db)
        assert attempt["outcome"] == (state if state != "pending" else "retryable")
        assert len(receiver.requests) == 1
        logged = "-" if state != "pending" else row["next_attempt_at"].isoformat(timespec="seconds")
        assert f"outcome={attempt['outcome']} " in caplog.text
        assert f"next_attempt_at={logged}" in caplog.text
        assert "telemetry.lease_lost" not in caplog.text

    @pytest.mark.usefixtures("pending")
    def test_after_a_claim_is_given_back_no_lease_is_lost(
        self, relayed_database: Relay, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503)]
        receiver.during = lambda: run(db, "UPDATE telemetry_outbox SET expires_at = now()")
        stopped = standing_at("app.outbox:settle:call", processes)
        relayed_database.lose_the_reply_to(COMMIT)
        stopped.go_on()
        until_worked_off(processes)
        assert relayed_database.lost.is_set()
        assert outbox_row(db)["state"] == "pending"
        assert failures(stopped.process) == stopped.process.lines("telemetry.lease_lost") == []
        assert len(receiver.requests) == 1


MAY_NOT_SETTLE: dict[str, list[str | None]] = {
    "UPDATE ON telemetry_attempt": [None, "sent"],
    "UPDATE ON instance": ["sent"],
}
"""Rights without which a delivery is not settled, or only the instance not stamped; and how the
attempts end when the role has the right again."""


@pytest.mark.usefixtures("pending")
class TestRefusing:
    def test_while_it_is_read_only_nothing_leaves(
        self, role: str, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        database = one(db, "SELECT current_database()")
        worker = ready(processes)
        run(
            db, f'ALTER ROLE {role} IN DATABASE "{database}" SET default_transaction_read_only = on'
        )
        processes.wake("drain")
        worker.wait_for("telemetry.failed stage=drain")
        processes.wake("sweep")
        worker.wait_for("telemetry.failed stage=prune")
        assert len(failures(worker)) == 3
        assert all("in a read-only transaction" in failure for failure in failures(worker))
        assert receiver.connections == count(db, "telemetry_attempt") == 0
        run(db, f'ALTER ROLE {role} IN DATABASE "{database}" RESET default_transaction_read_only')
        send_again(processes, worker, db)
        assert_sent(db, receiver, "sent")

    def test_without_a_connection_left_it_says_so_and_sends_when_there_is_one(
        self, role: str, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = ready(processes)
        run(db, f"ALTER ROLE {role} CONNECTION LIMIT 0")
        processes.wake("drain")
        worker.wait_for("telemetry.failed")
        assert failures(worker) == ['stage=drain error="the database has no connection left"']
        run(db, f"ALTER ROLE {role} CONNECTION LIMIT -1")
        send_again(processes, worker, db)
        assert_sent(db, receiver, "sent")

    @pytest.mark.parametrize("right", ["UPDATE ON telemetry_outbox", "INSERT ON telemetry_attempt"])
    def test_a_role_that_may_not_record_may_not_send(
        self,
        role: str,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        *,
        right: str,
    ) -> None:
        run(db, f"REVOKE {right} FROM {role}")
        worker = ready(processes)
        processes.wake("drain")
        worker.wait_for("telemetry.failed")
        table = right.rsplit(maxsplit=1)[-1]
        assert failures(worker) == [
            (
                f'stage=drain error="permission denied for table {table}'
                ': run `python -m app grants --role ROLE --apply`"'
            )
        ]
        assert receiver.connections == count(db, "telemetry_attempt") == 0
        run(db, f"GRANT {right} TO {role}")
        recover(processes, clock, db)
        assert_sent(db, receiver, "sent")

    @pytest.mark.parametrize("right", MAY_NOT_SETTLE)
    def test_a_role_that_may_send_but_not_settle_is_logged_and_sends_the_same_bytes(
        self,
        role: str,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        *,
        right: str,
    ) -> None:
        run(db, f"REVOKE {right} FROM {role}")
        worker = ready(processes)
        processes.wake("drain")
        worker.wait_for(f"permission denied for table {right.rsplit(maxsplit=1)[-1]}")
        assert len(failures(worker)) == 1
        assert "outcome=sent" in worker.lines("telemetry.attempt")[0]
        assert len(worker.lines("telemetry.payload")) == 1
        run(db, f"GRANT {right} TO {role}")
        recover(processes, clock, db)
        assert_sent(db, receiver, *MAY_NOT_SETTLE[right])
        assert len(receiver.requests) == len(MAY_NOT_SETTLE[right])

    def test_a_settle_that_fails_once_is_tried_again(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        once(db, "UPDATE ON telemetry_outbox", FULL_DISK, when=SETTLE)
        pipeline.drain()
        assert one(db, "SELECT last_value FROM faults") == 2
        assert_sent(db, receiver, "sent")
        assert len(receiver.requests) == 1


FailAndMakeUp = Callable[[str], list[str]]
"""Takes the statement that ends a fault, and returns what failed before."""


@pytest.mark.usefixtures("noticed")
class TestAWriteThatFails:
    @pytest.fixture(autouse=True)
    def due(self, clock: Clock) -> None:
        """Half past two, and nothing written yet."""
        clock(DAY_BEGINS)

    @pytest.fixture
    def failed_and_made_up_for(self, processes: Processes, db: Engine) -> FailAndMakeUp:
        """Have a worker fail to write, one that starts later succeed, and the first one send."""

        def fail_and_make_up(mend: str) -> list[str]:
            worker = ready(processes)
            processes.wake("sweep")
            worker.wait_for("telemetry.failed")
            assert count(db, "telemetry_outbox") == count(db, "instance") == 0
            run(db, mend)
            assert Pipeline(Settings.load()).write_heartbeat()
            send_again(processes, worker, db)
            return failures(worker)

        return fail_and_make_up

    def test_because_a_column_is_missing_names_it_and_is_made_up_for(
        self, failed_and_made_up_for: FailAndMakeUp, receiver: Receiver, db: Engine
    ) -> None:
        run(db, "ALTER TABLE scan_jobs RENAME created_at TO moved")
        failed = failed_and_made_up_for("ALTER TABLE scan_jobs RENAME moved TO created_at")
        assert failed == ['stage=collect error="column \\"created_at\\" does not exist"']
        assert_sent(db, receiver, "sent")

    def test_because_a_right_is_missing_names_it_and_is_made_up_for(
        self,
        role: str,
        failed_and_made_up_for: FailAndMakeUp,
        receiver: Receiver,
        db: Engine,
    ) -> None:
        run(db, f"REVOKE INSERT ON telemetry_outbox FROM {role}")
        assert failed_and_made_up_for(f"GRANT INSERT ON telemetry_outbox TO {role}") == [
            (
                'stage=write error="permission denied for table telemetry_outbox'
                ': run `python -m app grants --role ROLE --apply`"'
            )
        ]
        assert_sent(db, receiver, "sent")

    def test_is_not_tried_with_every_sweep_but_the_sweep_does_the_rest(
        self, processes: Processes, db: Engine
    ) -> None:
        run(db, "ALTER TABLE sites RENAME TO moved")
        worker = ready(processes)
        for sweeps in (1, 2):
            put_a_row(db, day=f"2026-04-0{sweeps}")
            processes.wake("sweep")
            worker.wait_for("telemetry.expired", sweeps)
        until_worked_off(processes)
        assert len(failures(worker)) == 1

    def test_because_a_table_is_locked_makes_no_later_session_wait(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = ready(processes)
        next_migration = Thread(target=run, args=(db, "LOCK TABLE sites IN ACCESS EXCLUSIVE MODE"))
        with locked(db, "sites"):
            processes.wake("heartbeat")
            eventually(lambda: waiting_for(db, "sites") == 1)
            next_migration.start()
            eventually(lambda: waiting_for(db, "sites") == 2)
            worker.wait_for("telemetry.failed stage=collect", seconds=3)
            eventually(lambda: waiting_for(db, "sites") == 1)
        next_migration.join(1)
        assert not next_migration.is_alive()
        assert failures(worker) == ['stage=collect error="canceling statement due to lock timeout"']
        assert Pipeline(Settings.load()).write_heartbeat()
        send_again(processes, worker, db)
        assert_sent(db, receiver, "sent")


def waiting_for(db: Engine, table: str) -> int:
    """Return how many sessions wait for a lock on a table."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = to_regclass(:table)"
    return int(one(db, waiting, table=table))


SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE usename = :role"


class TestLocked:
    @pytest.mark.parametrize("state", ["pending", "sending"])
    def test_a_row_that_somebody_holds_does_not_keep_the_sweep_from_the_others(
        self, pipeline: Pipeline, db: Engine, state: str
    ) -> None:
        for day in ("2026-01-01", "2026-01-02"):
            put_a_row(db, day)
        if state == "sending":
            run(
                db,
                "UPDATE telemetry_outbox SET state = 'sending', lease_until = expires_at,"
                " lease_token = id",
            )
        first = "day = '2026-01-01'"
        with db.begin() as psql:
            psql.execute(text(f"SELECT FROM telemetry_outbox WHERE {first} FOR UPDATE"))
            pipeline.sweep()
            states = "SELECT string_agg(state, ' ' ORDER BY day) FROM telemetry_outbox"
            assert one(db, states) == f"{state} expired"
            assert count(db, "telemetry_notice") == 1
        pipeline.sweep()
        assert one(db, states) == "expired expired"

    @pytest.mark.usefixtures("pending")
    def test_a_row_that_somebody_holds_is_not_sent_and_not_waited_for(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        with db.begin() as psql:
            psql.execute(text("SELECT FROM telemetry_outbox FOR UPDATE"))
            pipeline.drain()
            assert receiver.connections == 0
        pipeline.drain()
        assert_sent(db, receiver, "sent")

    @pytest.mark.usefixtures("pending")
    def test_a_retry_after_is_kept_although_the_outbox_was_locked_when_it_came(
        self, pipeline: Pipeline, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(429, "Retry-After: 7200")]
        receiver.during = lock_for(db, "telemetry_outbox", 2.5)
        pipeline.drain()
        (attempt,) = attempts(db)
        assert (attempt["outcome"], attempt["http_status"]) == ("retryable", 429)
        assert outbox_row(db)["not_before"] == attempt["finished_at"] + timedelta(hours=2)

    @pytest.mark.usefixtures("pending")
    def test_a_worker_has_two_sessions_at_most_and_none_while_idle(
        self, role: str, processes: Processes, db: Engine
    ) -> None:
        def sessions() -> int:
            return int(one(db, SESSIONS, role=role))

        seen: set[int] = set()

        def over() -> bool:
            seen.add(sessions())
            return len(failures(worker)) >= len(("sweep", "write", "prune", "sweep", "prune"))

        worker = ready(processes)
        with locked(db, "telemetry_outbox"):
            for _ in range(3):
                processes.wake("sweep")
            eventually(over)
        assert max(seen) == 2
        processes.wake("sweep")
        worker.wait_for("telemetry.attempt")
        until_worked_off(processes)
        eventually(lambda: sessions() == 0)


def lock_for(db: Engine, table: str, seconds: float) -> Callable[[], None]:
    """Lock a table for a while, longer than a statement waits for a lock."""

    def hold() -> None:
        with locked(db, table) as connection:
            held.set()
            connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})

    held = Event()

    def lock() -> None:
        Thread(target=hold).start()
        assert held.wait(10)

    return lock


@pytest.mark.usefixtures("pending")
def test_a_row_that_is_deleted_during_its_post_is_not_written_again(
    pipeline: Pipeline, receiver: Receiver, db: Engine
) -> None:
    receiver.during = lambda: run(db, "DELETE FROM telemetry_outbox")
    pipeline.drain()
    assert one(db, "SELECT last_telemetry_at FROM instance") is not None
    assert not pipeline.write_heartbeat()
    pipeline.drain()
    assert len(receiver.requests) == 1


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize(("name", "value"), [("timezone", "Asia/Tokyo"), ("datestyle", "SQL, DMY")])
def test_the_databases_own_time_zone_and_date_format_change_nothing(
    pipeline: Pipeline, receiver: Receiver, db: Engine, name: str, value: str
) -> None:
    database = one(db, "SELECT current_database()")
    run(db, f"ALTER DATABASE \"{database}\" SET {name} = '{value}'")
    pipeline.drain()
    shown = report.status(pipeline)
    assert shown.last_success
    assert shown.last_success.isoformat().startswith("2026-05-02T02:30:0")
    assert shown.next_send
    assert shown.next_send.isoformat() == "2026-05-03T02:30:00+00:00"
    assert len(receiver.requests) == 1


@pytest.mark.usefixtures("noticed")
def test_what_keeps_a_heartbeat_from_being_written_is_shown(
    environment: dict[str, str], clock: Clock, db: Engine
) -> None:
    assert environment
    clock("2026-05-02T09:00:00Z")
    run(db, "ALTER TABLE scan_jobs RENAME TO moved")
    shown = report.status(Pipeline(Settings.load()))
    assert not shown.overdue  # no restart would help
    assert shown.cannot_write == 'relation "scan_jobs" does not exist'
