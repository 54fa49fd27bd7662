"""A process may be killed at any point: nothing is lost, nothing is doubled."""

import os
import socket
import sys
import time
from datetime import date, datetime, timedelta
from signal import SIGKILL

import psutil
import pytest
from dramatiq.brokers.redis import RedisBroker
from redis import Redis
from sqlalchemy import Engine, text

from app import database
from tests.command import command
from tests.conftest import Clock
from tests.database import attempts, count, one, outbox_row, run
from tests.faults.conftest import (
    DAY_BEGINS,
    MORE_THAN_A_BACKOFF,
    MORE_THAN_A_LEASE,
    eventually,
)
from tests.faults.test_receiver import stay_silent
from tests.processes import Process, Processes, Stopped
from tests.receiver import Receiver, answer
from workers.broker import NAMESPACE, QUEUE

HONCHO = f"exec {sys.executable} -m honcho -e /dev/null start worker scheduler"

OTHER_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)

NEXT_DAY_BEGINS = "2026-05-03T02:30:00Z"

YESTERDAY, TODAY = date(2026, 5, 2), date(2026, 5, 3)


def kill(stopped: Stopped, db: Engine) -> None:
    """Kill a process where it stands, and wait until Postgres has rolled back what it had begun."""
    stopped.kill()
    eventually(lambda: one(db, OTHER_SESSIONS) == 0)


def take_back(processes: Processes, clock: Clock, db: Engine) -> Process:
    """Start a worker anew and have it take back what a dead one held, as soon as it may."""
    worker = processes.start("worker")
    clock(MORE_THAN_A_LEASE)
    processes.wake("sweep")
    worker.wait_for("telemetry.failed stage=drain")
    assert "its lease lapsed" in worker.output()
    assert outbox_row(db)["state"] == "pending"
    return worker


def recover(processes: Processes, clock: Clock, db: Engine) -> Process:
    """Start a worker anew, and let time pass until it has sent what the dead one held."""
    worker = take_back(processes, clock, db)
    clock(MORE_THAN_A_BACKOFF)
    processes.wake("drain")
    worker.wait_for("telemetry.attempt")
    assert outbox_row(db)["state"] == "sent"
    assert "Traceback" not in worker.output()
    return worker


def none_waits(processes: Processes) -> bool:
    """Whether every message has been worked off."""
    with Redis.from_url(processes.environment["REDIS_URL"]) as client:
        broker = RedisBroker(client=client, namespace=NAMESPACE, middleware=[])
        return bool(broker.do_qsize(QUEUE) == 0)


def outcomes(db: Engine) -> list[str | None]:
    """Return the outcome of each attempt, in their order."""
    return [attempt["outcome"] for attempt in attempts(db)]


def states(db: Engine) -> dict[date, str]:
    """Return each day's state."""
    with db.begin() as connection:
        rows = connection.execute(text("SELECT day, state FROM telemetry_outbox"))
        return {row.day: row.state for row in rows}


def left(receiver: Receiver, db: Engine, *, times: int) -> bool:
    """Whether the bytes of the only row, and no others, have come so many times."""
    body = outbox_row(db)["payload"].encode()
    return [request.body for request in receiver.requests] == [body] * times


@pytest.fixture
def collector(processes: Processes, collector_database: str, receiver: Receiver) -> Engine:
    """The database of a collector, to which the receiver passes on what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
        "point", ["app.outbox:begin:call", "app.outbox:claim:return", "app.sender:deliver:call"]
    )
    def test_killed_between_the_claim_and_the_post_nothing_has_left_and_it_leaves_later(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, point: str
    ) -> None:
        stopped = processes.start_to_stop_at(point)
        processes.wake("drain")
        kill(stopped, db)
        assert receiver.connections == 0
        assert count(db, "telemetry_attempt") == 0
        if outbox_row(db)["state"] == "sending":
            recover(processes, clock, db)
        else:  # the claim had not been committed
            worker = processes.start("worker")
            processes.wake("drain")
            worker.wait_for("telemetry.attempt")
        assert left(receiver, db, times=1)
        assert outcomes(db) == ["sent"]

    def test_killed_with_an_attempt_on_record_the_record_tells_one_too_many_and_none_too_few(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        stopped = processes.start_to_stop_at("app.sender:post:call")
        processes.wake("drain")
        kill(stopped, db)
        assert receiver.connections == 0
        assert outcomes(db) == [None]
        recover(processes, clock, db)
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
        stopped = processes.start_to_stop_at("app.delivery:_settle:call")
        processes.wake("drain")
        kill(stopped, db)
        assert count(collector, "heartbeat") == 1
        recover(processes, clock, db)
        assert left(receiver, db, times=2)
        assert count(collector, "heartbeat") == 1
        row = outbox_row(db)
        shown = command(processes.environment, "audit", str(row["id"]))
        body, _, table = shown.out.partition("\n")
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
        stopped = processes.start_to_stop_at(point)
        processes.wake("drain")
        kill(stopped, db)
        assert len(stopped.process.lines("telemetry.payload")) == 1
        assert stopped.process.lines("telemetry.attempt") == []
        assert outbox_row(db)["state"] == "sending"
        assert outcomes(db) == [None]
        assert one(db, "SELECT last_telemetry_at FROM instance") is None
        recover(processes, clock, db)
        assert left(receiver, db, times=2)
        assert outcomes(db) == [None, "sent"]

    def test_killed_after_the_settle_it_is_not_sent_again(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        stopped = processes.start_to_stop_at("app.delivery:_log_attempt:call")
        processes.wake("drain")
        kill(stopped, db)
        worker = processes.start("worker", LOG_LEVEL="DEBUG")
        clock(MORE_THAN_A_BACKOFF)
        for actor in ("heartbeat", "sweep", "drain"):
            processes.wake(actor)
        # Each of the three is done, and the drain that the heartbeat wakes.
        worker.wait_for("Acknowledging message", count=4)
        assert left(receiver, db, times=1)
        assert outbox_row(db)["state"] == "sent"
        assert outcomes(db) == ["sent"]

    def test_whose_master_is_killed_ends_its_post_on_record_and_a_new_one_sends_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        worker = processes.start("worker", TELEMETRY_TIMEOUT_SECONDS="60")
        worker.wait_for("ready for action")
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

    def test_killed_with_all_of_honchos_family_a_new_family_sends_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [stay_silent, answer(202)]
        family = processes.run(HONCHO)
        receiver.wait_for(1)  # woken by the scheduler's first sweep
        family.end()
        assert outbox_row(db)["state"] == "sending"
        assert outcomes(db) == [None]
        clock(MORE_THAN_A_LEASE)
        anew = processes.run(HONCHO)
        anew.wait_for("telemetry.failed stage=drain")
        clock(MORE_THAN_A_BACKOFF)
        processes.wake("sweep")
        anew.wait_for("telemetry.attempt")
        assert "Traceback" not in anew.output()
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
        stopped = processes.start_to_stop_at(point)
        processes.wake("heartbeat")
        kill(stopped, db)
        assert count(db, "instance") == count(db, "telemetry_outbox") == 0
        worker = processes.start("worker")
        processes.wake("sweep")
        worker.wait_for("telemetry.attempt")
        assert count(db, "instance") == 1
        assert left(receiver, db, times=1)

    def test_killed_between_the_notice_and_its_record_the_notice_is_told_again(
        self, processes: Processes, db: Engine
    ) -> None:
        stopped = processes.start_to_stop_at("app.pipeline:_give_notice:return")
        processes.wake("sweep")
        kill(stopped, db)
        assert len(stopped.process.lines("telemetry.notice")) == 1
        assert count(db, "telemetry_notice") == 0
        processes.wake("sweep")
        processes.start("worker").wait_for("telemetry.notice")
        eventually(lambda: count(db, "telemetry_notice") == 1)


def be_at(moment: str, processes: Processes, clock: Clock) -> None:
    """Have it be a time, for the database and for the processes that are started from now on."""
    clock(moment)
    ahead = datetime.fromisoformat(moment).timestamp() - time.time()
    processes.environment["GUARD_CLOCK"] = str(ahead)


def come_near_half_past_two(processes: Processes, clock: Clock, db: Engine) -> None:
    """Have it be some seconds before half past two, for the first time after a notice."""
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01T12:00Z')")
    be_at("2026-05-02T02:29:54Z", processes, clock)


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
        assert states(db) == {YESTERDAY: "sent"}
        assert "Traceback" not in other.output() + worker.output()

    @pytest.mark.usefixtures("noticed")
    @pytest.mark.parametrize("when", ["call", "return"], ids=["before", "after"])
    def test_killed_at_its_tick_a_new_one_makes_up_for_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine, when: str
    ) -> None:
        be_at(DAY_BEGINS, processes, clock)
        worker = processes.start("worker", LOG_LEVEL="DEBUG")
        # The heartbeat comes first, then the sweep: neither is sent, or the heartbeat only.
        processes.start_to_stop_at(f"__main__:_try_to_send:{when}", "scheduler").kill()
        be_at(MORE_THAN_A_LEASE, processes, clock)
        anew = processes.start("scheduler")
        worker.wait_for("Received message sweep")
        eventually(lambda: none_waits(processes))
        assert left(receiver, db, times=1)
        assert states(db) == {YESTERDAY: "sent"}
        assert "Traceback" not in anew.output() + worker.output()


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
        """Have it taken back as its lease lapses; return how long it then has to wait."""
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
        clock(NEXT_DAY_BEGINS)
        processes.wake("sweep")
        healthy.wait_for("telemetry.attempt")
        assert len(healthy.lines("telemetry.expired")) == 1
        assert states(db) == {YESTERDAY: "expired", TODAY: "sent"}
        assert sorted(outcomes(db), key=str) == [None, None, "sent"]
        assert receiver.connections == 1
        assert "Traceback" not in healthy.output()

    def test_does_not_hold_up_the_next_day_while_its_dead_worker_still_holds_it(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        dying = self.start(processes)
        dying.wait_for("ready for action")
        clock("2026-05-03T02:29:45Z")
        self.drain(dying, processes, db)
        worker = processes.start("worker")
        clock(NEXT_DAY_BEGINS)
        processes.wake("heartbeat")
        worker.wait_for("telemetry.attempt")
        assert states(db) == {YESTERDAY: "sending", TODAY: "sent"}
        clock("2026-05-03T02:32:00Z")
        processes.wake("sweep")
        worker.wait_for("telemetry.expired")
        assert states(db) == {YESTERDAY: "expired", TODAY: "sent"}
        assert receiver.connections == 1
        assert "Traceback" not in worker.output()
