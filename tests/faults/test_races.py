"""Processes that race for the same work do it once, and a process that is late changes nothing."""

import pytest
from sqlalchemy import Engine

from tests.conftest import Clock
from tests.support.database import attempts, count, one, outbox_row, waiting_for_locks
from tests.support.freezing import frozen
from tests.support.processes import Process, Processes, Stopped
from tests.support.receiver import Receiver, answer, late
from tests.support.steps import (
    DAY_BEGINS,
    MORE_THAN_A_LEASE,
    come_near_half_past_two,
    eventually,
    left,
    outcomes,
    recover_by_another,
    standing_at,
    until_worked_off,
    without_harm,
)


def go_on_together(first: Stopped, actor: str, processes: Processes, db: Engine) -> Process:
    """Let another worker wait for a lock of the first one, and then let both go on."""
    with frozen(first.process.pid):
        second = processes.start("worker")
        processes.wake(actor)
        eventually(lambda: waiting_for_locks(db))
    first.go_on()
    until_worked_off(processes)
    return second


class TestTheFirstBootsOfTwoWorkersAtOnce:
    def test_give_one_notice(self, processes: Processes, db: Engine) -> None:
        first = standing_at("app.notice:record:return", processes, "sweep")
        second = go_on_together(first, "sweep", processes, db)
        output = first.process.output() + second.output()
        assert count(db, "telemetry_notice") == 1
        assert output.count("telemetry.notice ") == 1
        assert without_harm(first.process, second)

    @pytest.mark.usefixtures("noticed")
    def test_make_one_instance_and_one_heartbeat(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        clock(DAY_BEGINS)
        first = standing_at("app.outbox:write:call", processes, "heartbeat")
        second = go_on_together(first, "heartbeat", processes, db)
        output = first.process.output() + second.output()
        assert count(db, "instance") == count(db, "telemetry_outbox") == 1
        assert output.count("telemetry.queued ") == 1
        assert left(receiver, db, times=1)
        assert outcomes(db) == ["sent"]
        assert without_harm(first.process, second)


def test_two_schedulers_and_three_workers_send_one_heartbeat_a_day(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine
) -> None:
    come_near_half_past_two(processes, clock, db)
    schedulers = [processes.start("scheduler") for _ in range(2)]
    workers = [processes.start("worker") for _ in range(3)]
    receiver.wait_for(1)
    for time in ("02T02:31:00", "02T12:00:00", "03T00:00:00", "03T02:29:00"):
        until_worked_off(processes)
        clock(f"2026-05-{time}Z")
        for actor in ("heartbeat", "sweep", "drain") * 3:
            processes.wake(actor)
    until_worked_off(processes)
    output = "".join(process.output() for process in schedulers + workers)
    assert count(db, "instance") == count(db, "telemetry_outbox") == 1
    assert output.count("telemetry.queued ") == output.count("telemetry.payload ") == 1
    assert left(receiver, db, times=1)
    assert outbox_row(db)["state"] == "sent"
    assert outcomes(db) == ["sent"]
    assert without_harm(*schedulers, *workers)


@pytest.mark.usefixtures("pending")
class TestALeaseThatLapsesInMidPost:
    @pytest.mark.parametrize(
        ("status", "outcome"), [(202, "sent"), (400, "rejected"), (503, "retryable")]
    )
    def test_lets_the_late_finisher_change_nothing_but_its_attempt(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        status: int,
        outcome: str,
    ) -> None:
        reply, wanted = late(answer(status))
        receiver.answers = [reply, answer(202)]
        processes.environment["TELEMETRY_TIMEOUT_SECONDS"] = "30"
        first = processes.start("worker")
        processes.wake("drain")
        receiver.wait_for(1)
        with frozen(first.pid):
            recover_by_another(processes, clock, db)
        row, (_, second), stamp = outbox_row(db), attempts(db), last_sent(db)
        wanted.set()
        first.wait_for("telemetry.lease_lost")
        assert outbox_row(db) == row
        assert attempts(db)[1] == second
        assert outcomes(db) == [outcome, "sent"]
        assert left(receiver, db, times=2)
        assert last_sent(db) == stamp
        assert without_harm(first)


def last_sent(db: Engine) -> object:
    return one(db, "SELECT last_telemetry_at FROM instance")


@pytest.mark.usefixtures("pending")
class TestASettleAndAReclaimAtOnce:
    def test_a_row_that_is_being_settled_is_passed_over(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        settling = standing_at("app.outbox:settle:return", processes)
        clock(MORE_THAN_A_LEASE)
        with frozen(settling.process.pid):
            sweeping = processes.start("worker", LOG_LEVEL="DEBUG")
            processes.wake("sweep")
            sweeping.wait_for("Acknowledging message")
            assert outbox_row(db)["state"] == "sending"
        settling.go_on()
        settling.process.wait_for("telemetry.attempt")
        assert outbox_row(db)["state"] == "sent"
        assert outcomes(db) == ["sent"]
        assert left(receiver, db, times=1)
        for worker in (settling.process, sweeping):
            assert worker.lines("telemetry.failed") == worker.lines("telemetry.lease_lost") == []
        assert without_harm(settling.process, sweeping)

    def test_a_settle_that_waits_for_a_reclaim_finds_its_lease_lost(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        settling = standing_at("app.delivery:_settle:call", processes)
        clock(MORE_THAN_A_LEASE)
        with frozen(settling.process.pid):
            reclaiming = standing_at("app.outbox:reclaim:return", processes, "sweep")
        settling.go_on()
        eventually(lambda: waiting_for_locks(db))
        reclaiming.go_on()
        settling.process.wait_for("telemetry.lease_lost")
        row = outbox_row(db)
        assert (row["state"], row["last_error"]) == ("pending", "its lease lapsed")
        assert outcomes(db) == ["sent"]
        assert left(receiver, db, times=1)
        assert without_harm(settling.process, reclaiming.process)
