"""A process may be killed at any point: nothing is lost, nothing is doubled."""

import os
import socket
from datetime import timedelta
from signal import SIGKILL

import psutil
import pytest
from sqlalchemy import Engine

from app import database
from tests.conftest import Clock
from tests.support.command import command
from tests.support.database import count, one, outbox_row
from tests.support.ports import free_port
from tests.support.processes import HONCHO, WAYS, Process, Processes, Stopped
from tests.support.receiver import Receiver, answer, stay_silent
from tests.support.steps import (
    DAY_BEGINS,
    MORE_THAN_A_BACKOFF,
    MORE_THAN_A_LEASE,
    TODAY,
    TOMORROW,
    TOMORROW_BEGINS,
    be_at,
    come_near_half_past_two,
    days,
    eventually,
    left,
    outcomes,
    ready,
    recover_by_another,
    standing_at,
    until_worked_off,
    without_harm,
)

OTHER_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


def kill(stopped: Stopped, db: Engine) -> None:
    """Kill a stopped process, and wait until Postgres has rolled back its transaction."""
    stopped.kill()
    eventually(lambda: one(db, OTHER_SESSIONS) == 0)


@pytest.fixture
def collector(processes: Processes, collector_database: str, receiver: Receiver) -> Engine:
    """The database of a collector, to which the receiver forwards every request."""
    port = free_port()
    settings = {"COLLECTOR_DATABASE_URL": collector_database, "PORT": str(port)}
    assert processes.start("release", "Procfile.collector", **settings).wait(30) == 0
    processes.start("web", "Procfile.collector", **settings).wait_for("collector.ready")

    def pass_on(connection: socket.socket) -> None:
        request = receiver.requests[-1]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as onward:
            onward.sendall(request.head + b"\r\n\r\n" + request.body)
            connection.sendall(onward.makefile("rb").read())

    receiver.answers = [pass_on]
    return database.engine(collector_database)


@pytest.mark.usefixtures("pending")
class TestAWorkerThatSends:
    @pytest.mark.parametrize(
        "point", ["app.outbox:begin:call", "app.outbox:claim:return", "app.sender:tries:call"]
    )
    def test_killed_between_the_claim_and_the_post_nothing_has_left_and_it_leaves_later(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, point: str
    ) -> None:
        stopped = standing_at(point, processes)
        kill(stopped, db)
        assert receiver.connections == 0
        assert count(db, "telemetry_attempt") == 0
        if outbox_row(db)["state"] == "sending":
            recover_by_another(processes, clock, db)
        else:  # the claim had not been committed
            worker = processes.start("worker")
            processes.wake("drain")
            worker.wait_for("telemetry.attempt")
        assert left(receiver, db, times=1)
        assert outcomes(db) == ["sent"]

    @pytest.mark.parametrize("name", ["worker", "solo"])
    def test_killed_with_an_attempt_on_record_the_record_shows_one_too_many_and_none_too_few(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, name: str
    ) -> None:
        stopped = standing_at("app.sender:post:call", processes, name=name)
        kill(stopped, db)
        assert receiver.connections == 0
        assert outcomes(db) == [None]
        recover_by_another(processes, clock, db, name)
        assert left(receiver, db, times=1)
        assert outcomes(db) == [None, "sent"]

    def test_killed_between_the_answer_and_the_settle_it_leaves_again_and_is_collected_once(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        collector: Engine,
    ) -> None:
        stopped = standing_at("app.delivery:_settle:call", processes)
        kill(stopped, db)
        assert count(collector, "heartbeat") == 1
        recover_by_another(processes, clock, db)
        assert left(receiver, db, times=2)
        assert count(collector, "heartbeat") == 1
        row = outbox_row(db)
        shown = command(processes.environment, "audit", str(row["id"]))
        body, table = shown.out.removesuffix("\n"), shown.err
        assert body == row["payload"]
        first, second = (line for line in table.splitlines() if receiver.url in line)
        assert "in flight when the process died" in first
        assert "sent (HTTP 202)" in second

    @pytest.mark.parametrize(
        "point",
        ["app.outbox:record:return", "app.instance:stamp:return", "app.outbox:settle:return"],
    )
    def test_killed_during_the_settle_nothing_half_done_is_seen_and_it_is_sent_again(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, point: str
    ) -> None:
        stopped = standing_at(point, processes)
        kill(stopped, db)
        assert len(stopped.process.lines("telemetry.payload")) == 1
        assert stopped.process.lines("telemetry.attempt") == []
        assert outbox_row(db)["state"] == "sending"
        assert outcomes(db) == [None]
        assert one(db, "SELECT last_telemetry_at FROM instance") is None
        recover_by_another(processes, clock, db)
        assert left(receiver, db, times=2)
        assert outcomes(db) == [None, "sent"]

    def test_killed_after_the_settle_it_is_not_sent_again(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        stopped = standing_at("app.delivery:_log_attempt:call", processes)
        kill(stopped, db)
        worker = processes.start("worker", LOG_LEVEL="DEBUG")
        clock(MORE_THAN_A_BACKOFF)
        for actor in ("heartbeat", "sweep", "drain"):
            processes.wake(actor)
        # The three are done, and the drain that the heartbeat wakes.
        worker.wait_for("Acknowledging message", count=4)
        assert left(receiver, db, times=1)
        assert outbox_row(db)["state"] == "sent"
        assert outcomes(db) == ["sent"]

    def test_whose_master_is_killed_ends_its_post_on_record_and_a_new_one_sends_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        worker = ready(processes, TELEMETRY_TIMEOUT_SECONDS="60")
        (child,) = psutil.Process(worker.pid).children()
        processes.wake("drain")
        receiver.wait_for(1)
        os.kill(worker.pid, SIGKILL)
        child.wait(10)
        assert "error=stopped" in worker.lines("telemetry.attempt")[0]
        assert outbox_row(db)["state"] == "pending"
        anew = processes.start("worker")
        clock(MORE_THAN_A_BACKOFF)
        processes.wake("drain")
        anew.wait_for("telemetry.attempt")
        assert left(receiver, db, times=2)
        assert outbox_row(db)["state"] == "sent"
        assert outcomes(db) == ["retryable", "sent"]

    @pytest.mark.parametrize("way", WAYS)
    def test_killed_with_all_of_honchos_family_a_new_family_sends_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, way: str
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        family = processes.run(f"{HONCHO} {way}")
        receiver.wait_for(1)  # woken by the scheduler's first sweep
        family.end()
        assert outbox_row(db)["state"] == "sending"
        assert outcomes(db) == [None]
        clock(MORE_THAN_A_LEASE)
        anew = processes.run(f"{HONCHO} {way}")
        anew.wait_for("telemetry.failed stage=drain")
        clock(MORE_THAN_A_BACKOFF)
        processes.wake("sweep")
        anew.wait_for("telemetry.attempt")
        assert without_harm(anew)
        assert left(receiver, db, times=2)
        assert outbox_row(db)["state"] == "sent"
        assert outcomes(db) == [None, "sent"]


class TestAWorkerThatWrites:
    @pytest.mark.usefixtures("noticed")
    @pytest.mark.parametrize("point", ["app.instance:ensure:return", "app.outbox:write:return"])
    def test_killed_in_the_middle_leaves_neither_instance_nor_row_and_another_writes_both(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, point: str
    ) -> None:
        clock(DAY_BEGINS)
        stopped = standing_at(point, processes, "heartbeat")
        kill(stopped, db)
        assert count(db, "instance") == count(db, "telemetry_outbox") == 0
        worker = processes.start("worker")
        processes.wake("sweep")
        worker.wait_for("telemetry.attempt")
        assert count(db, "instance") == 1
        assert left(receiver, db, times=1)

    def test_killed_between_the_notice_and_its_record_the_notice_is_logged_again(
        self, processes: Processes, db: Engine
    ) -> None:
        stopped = standing_at("app.pipeline:_give_notice:return", processes, "sweep")
        kill(stopped, db)
        assert len(stopped.process.lines("telemetry.notice")) == 1
        assert count(db, "telemetry_notice") == 0
        processes.wake("sweep")
        processes.start("worker").wait_for("telemetry.notice")
        eventually(lambda: count(db, "telemetry_notice") == 1)


class TestAScheduler:
    def test_one_of_two_is_killed_and_the_other_one_goes_on(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        come_near_half_past_two(processes, clock, db)
        worker = processes.start("worker")
        one_of_two, other = (processes.start("scheduler") for _ in range(2))
        for scheduler in (one_of_two, other):
            scheduler.wait_for("telemetry.scheduled", count=2)
        one_of_two.end()
        worker.wait_for("telemetry.attempt")
        assert left(receiver, db, times=1)
        assert days(db) == {TODAY: "sent"}
        assert without_harm(other, worker)

    @pytest.mark.usefixtures("noticed")
    @pytest.mark.parametrize("when", ["call", "return"], ids=["before", "after"])
    def test_killed_at_its_tick_a_new_one_makes_up_for_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, when: str
    ) -> None:
        be_at(DAY_BEGINS, processes, clock)
        worker = processes.start("worker", LOG_LEVEL="DEBUG")
        # The heartbeat comes first, then the sweep: neither is sent, or the heartbeat only.
        processes.start_to_stop_at(f"workers.scheduler:_is_sent:{when}", "scheduler").kill()
        be_at(MORE_THAN_A_LEASE, processes, clock)
        anew = processes.start("scheduler")
        worker.wait_for("Received message sweep")
        until_worked_off(processes)
        assert left(receiver, db, times=1)
        assert days(db) == {TODAY: "sent"}
        assert without_harm(anew, worker)


@pytest.mark.usefixtures("pending")
class TestARowThatKillsItsWorkerEveryTime:
    @staticmethod
    def start(processes: Processes) -> Process:
        point = "app.sender:post:call"
        return processes.start("worker", GUARD_POINT=point, GUARD_ACTION="die")

    @staticmethod
    def drain(worker: Process, processes: Processes, db: Engine) -> None:
        processes.wake("drain")
        assert worker.wait(30) != 0
        assert outbox_row(db)["state"] == "sending"

    @staticmethod
    def wait_once_taken_back(
        worker: Process, processes: Processes, clock: Clock, db: Engine
    ) -> timedelta:
        """Let its lease lapse and a sweep take it back; return how long it then waits."""
        lapses = outbox_row(db)["lease_until"]
        clock(lapses.isoformat())
        processes.wake("sweep")
        worker.wait_for("telemetry.failed stage=drain")
        wait: timedelta = outbox_row(db)["next_attempt_at"] - lapses
        return wait

    def test_is_tried_ever_more_rarely_and_ends_with_its_day_and_the_next_day_goes_out(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        self.drain(self.start(processes), processes, db)
        another = self.start(processes)
        wait = self.wait_once_taken_back(another, processes, clock, db)
        assert wait >= timedelta(minutes=1)
        clock(outbox_row(db)["next_attempt_at"].isoformat())
        self.drain(another, processes, db)
        healthy = processes.start("worker")
        wait = self.wait_once_taken_back(healthy, processes, clock, db)
        assert wait >= timedelta(minutes=2)
        clock(TOMORROW_BEGINS)
        processes.wake("sweep")
        healthy.wait_for("telemetry.attempt")
        assert len(healthy.lines("telemetry.expired")) == 1
        assert days(db) == {TODAY: "expired", TOMORROW: "sent"}
        assert sorted(outcomes(db), key=str) == [None, None, "sent"]
        assert receiver.connections == 1
        assert without_harm(healthy)

    def test_does_not_hold_up_the_next_day_while_its_dead_worker_still_holds_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        dying = self.start(processes)
        dying.wait_for("ready for action")
        clock("2026-05-03T02:29:45Z")
        self.drain(dying, processes, db)
        worker = processes.start("worker")
        clock(TOMORROW_BEGINS)
        processes.wake("heartbeat")
        worker.wait_for("telemetry.attempt")
        assert days(db) == {TODAY: "sending", TOMORROW: "sent"}
        clock("2026-05-03T02:32:00Z")
        processes.wake("sweep")
        worker.wait_for("telemetry.expired")
        assert days(db) == {TODAY: "expired", TOMORROW: "sent"}
        assert receiver.connections == 1
        assert without_harm(worker)
