"""From a restart on, off means off; and no install is counted before its notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from redis import Redis
from sqlalchemy import Engine

from app import database
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import attempts, count, one, outbox_row, run
from tests.support.processes import Process, Processes
from tests.support.receiver import Receiver, answer, stay_silent
from tests.support.steps import (
    MORE_THAN_A_LEASE,
    TODAY,
    TOMORROW,
    TOMORROW_BEGINS,
    bodies,
    days,
    do,
    left,
    locked,
    outcomes,
    without_harm,
)

OFF = {"TELEMETRY_ENABLED": "false"}
DO_NOT_TRACK = {"DO_NOT_TRACK": "1"}
A_TEST = {"ENVIRONMENT": "test"}
MISSPELT = {"TELEMETRY_ENABELD": "true"}


def logs_off(worker: Process) -> bool:
    """Whether a worker has logged that telemetry is off, and why."""
    (line,) = worker.lines("telemetry.disabled")
    return line.startswith("telemetry.disabled reason=")


def discarded(worker: Process, reason: str) -> bool:
    """Whether a worker has logged once that it discarded today's heartbeat, and why."""
    (line,) = worker.lines("telemetry.discarded")
    return f"day={TODAY} reason={reason}" in line


@contextmanager
def nothing_of_consentos_readable(db: Engine) -> Iterator[None]:
    """Lock every table of ConsentOS, so that every read of one waits and fails."""
    tables = one(
        db,
        "SELECT string_agg(format('%I', tablename), ', ') FROM pg_tables"
        " WHERE schemaname = 'public' AND tablename NOT LIKE 'telemetry%'",
    )
    with locked(db, tables):
        yield


def restart(processes: Processes, worker: Process, **environment: str) -> Process:
    """Kill a worker and start one in another environment, with a trace of its own.

    The wake-up that the killed one held is lost; Dramatiq would give it back after a minute.
    """
    worker.end()
    with Redis.from_url(processes.environment["REDIS_URL"]) as client:
        client.flushdb()
    processes.trace.unlink(missing_ok=True)
    return processes.start("worker", **environment)


def connected_to(processes: Processes, url: str) -> bool:
    """Whether a process has connected to a port since the last restart."""
    return f"('127.0.0.1', {urlsplit(url).port})" in processes.trace.read_text()


def left_alone(processes: Processes, receiver: Receiver) -> bool:
    """Whether the endpoint has not been connected to since the restart, while Redis has."""
    redis = processes.environment["REDIS_URL"]
    return connected_to(processes, redis) and not connected_to(processes, receiver.url)


@pytest.mark.usefixtures("pending")
class TestOff:
    def test_after_a_restart_a_heartbeat_that_waits_is_discarded_by_a_misspelt_switch_too(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = processes.start("worker", **MISSPELT)
        with nothing_of_consentos_readable(db):
            do(processes, "drain", "sweep", "heartbeat", "drain")
        assert days(db) == {TODAY: "discarded"}
        assert left_alone(processes, receiver)
        assert logs_off(worker)
        assert "did you mean TELEMETRY_ENABLED?" in worker.output()
        assert discarded(worker, "off")
        assert not worker.lines("telemetry.failed")
        assert without_harm(worker)

    @pytest.mark.parametrize("switch", [OFF, DO_NOT_TRACK])
    def test_what_a_killed_worker_was_sending_is_discarded_when_its_lease_is_over(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        database_url: str,
        switch: dict[str, str],
    ) -> None:
        receiver.answers = [stay_silent]
        worker = processes.start("worker")
        processes.wake("drain")
        receiver.wait_for(1)
        off = restart(processes, worker, **switch)
        with nothing_of_consentos_readable(database.engine(database_url)):
            do(processes, "drain", "sweep")
            assert days(db) == {TODAY: "sending"}
            clock(MORE_THAN_A_LEASE)
            do(processes, "sweep", "drain", "heartbeat")
        assert days(db) == {TODAY: "discarded"}
        assert len(receiver.requests) == receiver.connections == 1
        assert left_alone(processes, receiver)
        assert outcomes(db) == [None]
        assert logs_off(off)
        assert discarded(off, "off")
        assert ["stage=drain" in line for line in off.lines("telemetry.failed")] == [True]
        assert without_harm(worker, off)

    @pytest.mark.parametrize("switch", [OFF, A_TEST])
    def test_between_two_drains_the_second_sends_nothing(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        switch: dict[str, str],
    ) -> None:
        receiver.answers = [answer(503, "Retry-After: 90"), answer(202)]
        worker = processes.start("worker")
        do(processes, "drain")
        row = outbox_row(db)
        assert (row["state"], row["drains"], row["last_error"]) == ("pending", 1, "HTTP 503")
        off = restart(processes, worker, **switch)
        clock(MORE_THAN_A_LEASE)  # later than the Retry-After
        do(processes, "drain", "sweep", "heartbeat", "drain")
        assert days(db) == {TODAY: "discarded"}
        assert bodies(receiver) == [row["payload"].encode()]
        assert left_alone(processes, receiver)
        assert outbox_row(db)["attempts"] == len(attempts(db)) == 1
        assert logs_off(off)
        assert discarded(off, "off")
        assert without_harm(worker, off)

    def test_and_on_again_leaves_that_day_discarded_and_sends_the_next(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        off = processes.start("worker", **OFF)
        do(processes, "sweep")
        on = restart(processes, off)
        do(processes, "sweep", "heartbeat", "drain")
        assert days(db) == {TODAY: "discarded"}
        assert receiver.connections == 0
        clock(TOMORROW_BEGINS)
        do(processes, "heartbeat")
        assert days(db) == {TODAY: "discarded", TOMORROW: "sent"}
        assert len(receiver.requests) == 1
        assert without_harm(off, on)

    def test_in_one_process_and_not_in_another_at_most_one_request_leaves(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        workers = processes.start("worker"), processes.start("worker", **OFF)
        for worker in workers:
            worker.wait_for("ready for action")
        for _ in range(4):
            processes.wake("drain")
            processes.wake("sweep")
        do(processes, "sweep", "sweep")
        state = days(db)[TODAY]
        assert (state, len(receiver.requests)) in {("sent", 1), ("discarded", 0)}
        assert len(attempts(db)) == len(receiver.requests)
        assert without_harm(*workers)

    def test_in_one_process_it_does_not_end_what_another_is_sending(
        self,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TELEMETRY_ENABLED", "false")
        receiver.during = Pipeline(Settings.load()).sweep
        worker = processes.start("worker")
        do(processes, "drain", "sweep")
        assert days(db) == {TODAY: "sent"}
        assert len(receiver.requests) == len(attempts(db)) == 1
        assert without_harm(worker)


REPLACE = "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), NULL)"


@pytest.mark.usefixtures("pending")
class TestTheInstanceIsDeleted:
    @pytest.fixture
    def old_id(self, db: Engine) -> str:
        return str(outbox_row(db)["instance_id"])

    @staticmethod
    def next_day(processes: Processes, clock: Clock, db: Engine) -> str:
        """Let the next day's heartbeat be sent; return its instance id."""
        clock(TOMORROW_BEGINS)
        do(processes, "heartbeat", "sweep")
        assert days(db) == {TODAY: "discarded", TOMORROW: "sent"}
        return str(one(db, "SELECT instance_id FROM telemetry_outbox WHERE day = '2026-05-03'"))

    @pytest.mark.parametrize("replaced", [False, True])
    def test_while_a_heartbeat_waits_it_never_leaves_and_the_next_has_a_new_id(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        old_id: str,
        *,
        replaced: bool,
    ) -> None:
        run(db, "DELETE FROM instance")
        if replaced:
            run(db, REPLACE)
        worker = processes.start("worker")
        do(processes, "drain", "sweep", "drain", "heartbeat")
        assert days(db) == {TODAY: "discarded"}
        assert receiver.connections == 0
        assert discarded(worker, '"instance id rotated"')
        new_id = self.next_day(processes, clock, db)
        assert new_id != old_id
        (sent,) = bodies(receiver)
        assert new_id.encode() in sent
        assert without_harm(worker)

    @pytest.mark.parametrize("replaced", [False, True])
    def test_between_two_tries_the_second_never_leaves_and_the_next_day_has_a_new_id(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        old_id: str,
        *,
        replaced: bool,
    ) -> None:
        def delete() -> None:
            receiver.during = lambda: None
            run(db, "DELETE FROM instance")
            if replaced:
                run(db, REPLACE)

        receiver.during = delete
        receiver.answers = [answer(503), answer(202)]
        worker = processes.start("worker")
        do(processes, "drain", "drain", "sweep", "drain")
        assert days(db) == {TODAY: "discarded"}
        assert [attempt["http_status"] for attempt in attempts(db)] == [503]
        assert discarded(worker, '"instance id rotated"')
        assert self.next_day(processes, clock, db) != old_id
        first, second = bodies(receiver)
        assert old_id.encode() in first
        assert old_id.encode() not in second
        assert without_harm(worker)

    def test_and_a_worker_killed_with_it_in_mid_post_the_old_id_never_leaves_again(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, old_id: str
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        worker = processes.start("worker")
        processes.wake("drain")
        receiver.wait_for(1)
        run(db, "DELETE FROM instance")
        anew = restart(processes, worker)
        clock(MORE_THAN_A_LEASE)
        do(processes, "sweep", "drain")
        assert days(db) == {TODAY: "discarded"}
        assert self.next_day(processes, clock, db) != old_id
        assert [old_id.encode() in body for body in bodies(receiver)] == [True, False]
        assert without_harm(worker, anew)


class TestFirstBoot:
    @pytest.mark.parametrize(
        ("boot", "first_day"),
        [
            ("2026-05-02T02:29:00Z", TODAY),
            ("2026-05-02T02:30:00Z", TOMORROW),
            ("2026-05-02T12:00:00Z", TOMORROW),
            ("2026-05-03T00:15:00Z", TOMORROW),
        ],
    )
    def test_only_the_first_half_past_two_after_the_notice_counts(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        boot: str,
        first_day: str,
    ) -> None:
        clock(boot)
        worker = processes.start("worker")
        processes.start("scheduler")
        worker.wait_for("telemetry.notice")
        do(processes, "heartbeat", "sweep", "drain")
        assert count(db, "telemetry_outbox") == count(db, "instance") == 0
        assert f"first={first_day}T02:30:00+00:00" in worker.lines("telemetry.notice")[0]
        clock(f"{first_day}T02:30:00Z")
        do(processes, "heartbeat", "sweep")
        assert days(db) == {first_day: "sent"}
        assert left(receiver, db, times=1)
        assert len(worker.lines("telemetry.notice")) == 1
        assert without_harm(worker)

    def test_of_a_new_schema_gives_a_notice_of_its_own_and_waits_for_the_next_half_past_two(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        run(db, "INSERT INTO telemetry_notice VALUES (0, '2026-01-01')")
        clock("2026-05-02T09:00:00Z")
        worker = processes.start("worker")
        do(processes, "heartbeat", "sweep", "heartbeat", "sweep", "drain")
        assert count(db, "telemetry_outbox") == receiver.connections == 0
        (given,) = worker.lines("telemetry.notice")
        assert given.startswith("telemetry.notice schema=1 ")
        assert count(db, "telemetry_notice") == 2
        clock(TOMORROW_BEGINS)
        do(processes, "heartbeat", "sweep")
        assert days(db) == {TOMORROW: "sent"}
        assert len(receiver.requests) == 1
        assert without_harm(worker)


@pytest.mark.usefixtures("noticed")
def test_what_consentos_has_sent_itself_today_is_not_sent_again_and_is_reported_once(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine
) -> None:
    clock("2026-05-02T09:00:00Z")
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), '2026-05-02T02:31:00Z')")
    worker = processes.start("worker")
    do(processes, "heartbeat", "sweep", "drain", "heartbeat", "sweep")
    assert count(db, "telemetry_outbox") == receiver.connections == 0
    (warning,) = worker.lines("telemetry.warning")
    assert "this day's heartbeat has already been sent, and not from this outbox" in warning
    clock(TOMORROW_BEGINS)
    do(processes, "heartbeat", "sweep")
    assert days(db) == {TOMORROW: "sent"}
    assert len(receiver.requests) == 1
    assert without_harm(worker)
