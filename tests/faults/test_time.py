"""Sleeping processes, wrong clocks, time zones, midnights and leap days: one heartbeat a day."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Engine

from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import attempts, count, one, outbox_row, run
from tests.support.freezing import frozen
from tests.support.processes import Process, Processes
from tests.support.receiver import Receiver, answer, late
from tests.support.steps import (
    DAY_BEGINS,
    MORE_THAN_A_BACKOFF,
    MORE_THAN_A_LEASE,
    ahead,
    bodies,
    days,
    do,
    eventually,
    left,
    outcomes,
    put_a_row,
    until_worked_off,
    without_harm,
    worked_off,
)

THREE_DAYS_LATER = "2026-05-05T09:00:00Z"
JUST_AFTER_HALF_PAST_TWO = "2026-05-02T02:30:02Z"
BEFORE_THE_TICK = timedelta(seconds=5)
A_FEW_SECONDS = timedelta(seconds=20)


def waiting(processes: Processes) -> set[tuple[str, str]]:
    """Return the wake-ups that no worker has done yet, each with its minute in UTC."""
    with Redis.from_url(processes.environment["REDIS_URL"]) as client:
        messages = [json.loads(each) for each in client.hvals(f"{processes.queue}.msgs")]
    times = [datetime.fromisoformat(each["options"]["scheduled_at"]) for each in messages]
    minutes = [f"{at.astimezone(UTC):%Y-%m-%dT%H:%M}" for at in times]
    return {(each["actor_name"], at) for each, at in zip(messages, minutes, strict=True)}


@contextmanager
def scheduler_asleep(processes: Processes, moment: str) -> Iterator[tuple[Process, float]]:
    """Start a scheduler just before its tick of ``moment``; freeze it after its first wake-ups.

    Give it, and the time at which that tick has passed. It goes on when the block ends.
    """
    scheduler = processes.start("scheduler", GUARD_CLOCK=ahead(moment, -BEFORE_THE_TICK))
    tick = time.monotonic() + BEFORE_THE_TICK.total_seconds()
    eventually(lambda: not worked_off(processes))
    with frozen(scheduler.pid):
        assert time.monotonic() < tick, "it came before the scheduler could be stopped"
        yield scheduler, tick + 1


@pytest.mark.usefixtures("noticed")
class TestAsleep:
    """The processes are frozen while time goes on."""

    def test_a_scheduler_asleep_over_half_past_two_has_it_sent_when_it_wakes(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        run(db, "UPDATE telemetry_notice SET noticed_at = '2026-05-01T12:00:00Z'")
        clock("2026-05-02T02:29:30Z")
        waking = "2026-05-02T02:45:00Z"
        with scheduler_asleep(processes, waking) as (scheduler, tick_is_over):
            worker = processes.start("worker", LOG_LEVEL="DEBUG", GUARD_CLOCK=ahead(waking))
            worker.wait_for("Received message sweep()")
            eventually(lambda: time.monotonic() > tick_is_over)
            assert (count(db, "telemetry_outbox"), receiver.connections) == (0, 0)
            clock(waking)
        worker.wait_for("telemetry.attempt")
        assert days(db) == {"2026-05-02": "sent"}
        assert left(receiver, db, times=1)
        assert "heartbeat()" not in worker.output()  # its minute is over: the sweep has done it
        assert without_harm(worker, scheduler)

    def test_all_asleep_for_three_days_send_one_heartbeat_and_not_three(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        clock(DAY_BEGINS)
        with scheduler_asleep(processes, THREE_DAYS_LATER) as (scheduler, tick_is_over):
            worker = processes.start("worker", GUARD_CLOCK=ahead(THREE_DAYS_LATER))
            worker.wait_for("telemetry.attempt")
            with frozen(worker.pid):
                eventually(lambda: time.monotonic() > tick_is_over)
                clock(THREE_DAYS_LATER)
        worker.wait_for("telemetry.attempt", 2)
        do(processes, "heartbeat", "sweep", "drain")
        assert days(db) == {"2026-05-02": "sent", "2026-05-05": "sent"}
        assert len(receiver.requests) == 2
        assert without_harm(worker, scheduler)

    @pytest.mark.usefixtures("pending")
    def test_what_was_pending_three_days_ago_expires_and_only_todays_leaves(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        old = outbox_row(db)
        clock(THREE_DAYS_LATER)
        worker = processes.start("worker")
        do(processes, "drain", "sweep", "drain", "sweep")
        assert days(db) == {"2026-05-02": "expired", "2026-05-05": "sent"}
        (sent,) = bodies(receiver)
        assert json.loads(sent)["sent_at"].startswith("2026-05-05T09:00:")
        assert worker.lines("telemetry.expired") == [
            f"telemetry.expired id={old['id']} day=2026-05-02 level=WARNING"
        ]
        assert outcomes(db) == ["sent"]
        assert without_harm(worker)

    @pytest.mark.usefixtures("pending")
    def test_a_worker_stopped_for_three_days_in_mid_post_does_not_try_that_day_again(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        reply, wanted = late(answer(503))
        receiver.answers = [reply, answer(202)]
        worker = processes.start("worker")
        processes.wake("drain")
        receiver.wait_for(1)
        with frozen(worker.pid):
            clock(THREE_DAYS_LATER)
            wanted.set()
        worker.wait_for("telemetry.attempt")
        do(processes, "sweep")
        assert days(db) == {"2026-05-02": "expired", "2026-05-05": "sent"}
        first, second = bodies(receiver)
        assert json.loads(first)["sent_at"] < "2026-05-03" < json.loads(second)["sent_at"]
        assert worker.lines("telemetry.expired")
        assert without_harm(worker)


@pytest.mark.parametrize(
    ("zone", "half_past_two"),
    [
        ("Asia/Tokyo", "2026-03-08T02:30"),
        ("America/New_York", "2026-03-08T02:30"),  # before the night's own 02:30, which is skipped
        ("UTC", "2028-02-29T02:30"),
    ],
)
def test_the_scheduler_wakes_the_heartbeat_at_half_past_two_utc(
    processes: Processes, zone: str, half_past_two: str
) -> None:
    begin = ahead(f"{half_past_two}:00Z", -timedelta(seconds=2))
    scheduler = processes.start("scheduler", TZ=zone, GUARD_CLOCK=begin)
    eventually(lambda: ("heartbeat", half_past_two) in waiting(processes))
    eventually(lambda: ("sweep", half_past_two) in waiting(processes))
    assert without_harm(scheduler)


@pytest.mark.parametrize(
    ("zone", "half_past_two_there"),
    [
        ("Asia/Tokyo", "2026-03-07T17:30"),
        ("America/New_York", "2026-03-07T07:30"),  # the night before the one without a 02:30
    ],
)
def test_the_scheduler_does_not_wake_the_heartbeat_at_half_past_two_local_time(
    processes: Processes, zone: str, half_past_two_there: str
) -> None:
    begin = ahead(f"{half_past_two_there}:00Z", -timedelta(seconds=2))
    scheduler = processes.start("scheduler", TZ=zone, GUARD_CLOCK=begin)
    eventually(lambda: ("sweep", half_past_two_there) in waiting(processes))
    # The actors of a tick are sent in this order: heartbeat, sweep.
    assert {actor for actor, _ in waiting(processes)} == {"sweep"}
    assert without_harm(scheduler)


def just_now(moment: datetime) -> bool:
    """Whether a time lies in these seconds, by the database's clock of these tests."""
    begin = datetime.fromisoformat(JUST_AFTER_HALF_PAST_TWO)
    return begin <= moment < begin + A_FEW_SECONDS


@pytest.mark.usefixtures("noticed")
@pytest.mark.parametrize(
    ("who", "hours"),
    [("worker", 1), ("worker", -1), ("worker", 24), ("scheduler", 1), ("scheduler", -24)],
)
def test_a_process_whose_clock_is_wrong_sends_as_by_the_databases_clock(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine, who: str, hours: int
) -> None:
    meanwhile: list[dict[str, Any]] = []

    def sweep_elsewhere() -> None:
        Pipeline(Settings.load()).sweep()
        meanwhile.append(outbox_row(db))

    receiver.during = sweep_elsewhere
    clock(JUST_AFTER_HALF_PAST_TWO)
    wrong = {who: timedelta(hours=hours)}
    worker, scheduler = (
        processes.start(
            name, GUARD_CLOCK=ahead(JUST_AFTER_HALF_PAST_TWO, wrong.get(name, timedelta()))
        )
        for name in ("worker", "scheduler")
    )
    worker.wait_for("telemetry.attempt", seconds=10)
    until_worked_off(processes)
    (attempt,), (during,), row = attempts(db), meanwhile, outbox_row(db)
    assert days(db) == {"2026-05-02": "sent"}
    assert during["state"] == "sending"
    assert during["lease_until"] == attempt["started_at"] + timedelta(seconds=5 + 30)
    assert left(receiver, db, times=1)
    assert just_now(datetime.fromisoformat(json.loads(row["payload"])["sent_at"]))
    assert just_now(attempt["started_at"])
    assert just_now(attempt["finished_at"])
    assert just_now(row["finished_at"])
    assert just_now(one(db, "SELECT last_telemetry_at FROM instance"))
    assert without_harm(worker, scheduler)


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("hours", [24, -24])
def test_a_date_to_retry_after_is_read_by_the_databases_clock(
    processes: Processes, clock: Clock, receiver: Receiver, db: Engine, hours: int
) -> None:
    asked = datetime.fromisoformat(DAY_BEGINS) + timedelta(hours=2)
    receiver.answers = [answer(429, f"Retry-After: {format_datetime(asked, usegmt=True)}")]
    clock(DAY_BEGINS)
    worker = processes.start("worker", GUARD_CLOCK=ahead(DAY_BEGINS, timedelta(hours=hours)))
    do(processes, "drain")
    row = outbox_row(db)
    assert row["state"] == "pending"
    assert row["next_attempt_at"] == row["not_before"]
    assert asked <= row["not_before"] < asked + timedelta(seconds=2)
    clock("2026-05-02T04:28:00Z")
    do(processes, "sweep")
    assert len(receiver.requests) == 1
    receiver.answers = [answer(202)]
    clock("2026-05-02T04:30:03Z")
    do(processes, "sweep")
    assert days(db) == {"2026-05-02": "sent"}
    assert len(receiver.requests) == 2
    assert without_harm(worker)


@pytest.mark.usefixtures("noticed")
class TestTheCalendar:
    def test_a_heartbeat_retried_after_midnight_keeps_its_day_and_its_bytes(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503, "Retry-After: 90"), answer(202)]
        clock("2026-05-02T23:59:00Z")
        worker = processes.start("worker")
        do(processes, "sweep")
        assert days(db) == {"2026-05-02": "pending"}
        clock("2026-05-03T00:02:00Z")
        do(processes, "heartbeat", "sweep")
        assert days(db) == {"2026-05-02": "sent"}
        assert left(receiver, db, times=2)
        tries = [(str(each["started_at"].date()), each["http_status"]) for each in attempts(db)]
        assert tries == [("2026-05-02", 503), ("2026-05-03", 202)]
        assert without_harm(worker)

    def test_what_is_written_after_midnight_is_yesterdays_and_leaves_todays_to_come(
        self, processes: Processes, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        clock("2026-05-03T00:30:00Z")
        worker = processes.start("worker")
        do(processes, "sweep", "heartbeat")
        assert days(db) == {"2026-05-02": "sent"}
        assert outbox_row(db)["expires_at"] == datetime(2026, 5, 3, 2, 30, tzinfo=UTC)
        clock("2026-05-03T02:30:00Z")
        do(processes, "heartbeat", "sweep")
        assert days(db) == {"2026-05-02": "sent", "2026-05-03": "sent"}
        assert len(set(bodies(receiver))) == len(receiver.requests) == 2
        assert without_harm(worker)

    @pytest.mark.parametrize(
        "dates",
        [
            ("2028-02-28", "2028-02-29", "2028-03-01"),
            ("2027-02-28", "2027-03-01"),
            ("2027-12-31", "2028-01-01"),
        ],
        ids=["leap day", "no leap day", "end of the year"],
    )
    def test_each_day_sends_one_heartbeat(
        self,
        processes: Processes,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        dates: tuple[str, ...],
    ) -> None:
        worker = processes.start("worker")
        for date in dates:
            clock(f"{date}T02:30:00Z")
            do(processes, "heartbeat", "sweep")
            clock(f"{date}T23:59:58Z")
            do(processes, "sweep", "heartbeat")
        assert days(db) == dict.fromkeys(dates, "sent")
        sent_at = [json.loads(body)["sent_at"] for body in bodies(receiver)]
        assert [at[:16] for at in sent_at] == [f"{date}T02:30" for date in dates]
        assert without_harm(worker)


@pytest.mark.usefixtures("pending")
class TestTheDatabasesClock:
    """The database's clock decides, and an administrator may set it."""

    @pytest.fixture
    def lines(self, caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
        """Give the lines of the log so far that begin with some words."""
        caplog.set_level("INFO", "telemetry")
        return lambda start: [line for line in caplog.messages if line.startswith(start)]

    @staticmethod
    def all_at_once() -> None:
        """Do everything that a worker does, in one that has just started."""
        worker = Pipeline(Settings.load())
        worker.sweep()
        worker.write_heartbeat()
        worker.drain()

    @pytest.mark.parametrize("back_to", ["2026-05-02T01:30:00Z", "2026-05-01T12:00:00Z"])
    def test_set_back_after_a_send_it_gets_no_second_one(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine, back_to: str
    ) -> None:
        put_a_row(db, "2026-05-01")
        pipeline.drain()
        for moment in (back_to, DAY_BEGINS, "2026-05-03T02:29:50Z"):
            clock(moment)
            self.all_at_once()
        assert days(db) == {"2026-05-01": "expired", "2026-05-02": "sent"}
        assert len(receiver.requests) == 1
        clock("2026-05-03T02:30:00Z")
        self.all_at_once()
        assert days(db)["2026-05-03"] == "sent"

    @pytest.mark.parametrize("to", ["2026-05-02T01:30:00Z", MORE_THAN_A_LEASE])
    def test_set_in_mid_post_it_changes_nothing_where_nobody_else_has_the_row(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine, to: str
    ) -> None:
        put_a_row(db, "2026-05-01")
        receiver.during = lambda: clock(to)
        pipeline.drain()
        self.all_at_once()
        assert days(db) == {"2026-05-01": "expired", "2026-05-02": "sent"}
        assert outcomes(db) == ["sent"]
        assert len(receiver.requests) == 1

    def test_set_past_the_days_end_in_mid_post_it_ends_that_day_and_begins_the_next(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.during = lambda: clock("2026-05-03T02:31:00Z")
        pipeline.drain()
        self.all_at_once()
        assert days(db) == {"2026-05-02": "sent", "2026-05-03": "sent"}
        assert len(set(bodies(receiver))) == len(receiver.requests) == 2

    def test_the_days_end_between_two_tries_leaves_no_second_try(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        receiver.answers = [answer(503), answer(202)]
        receiver.during = lambda: clock("2026-05-03T02:30:00Z")
        clock("2026-05-03T02:29:50Z")
        pipeline.drain()
        assert len(receiver.requests) == 1
        self.all_at_once()
        assert days(db) == {"2026-05-02": "expired", "2026-05-03": "sent"}
        assert len(set(bodies(receiver))) == len(receiver.requests) == 2

    def test_set_past_the_lease_in_mid_post_it_lets_the_late_finisher_change_nothing(
        self,
        pipeline: Pipeline,
        clock: Clock,
        receiver: Receiver,
        db: Engine,
        lines: Callable[[str], list[str]],
    ) -> None:
        def jump() -> None:
            receiver.during = lambda: None
            clock(MORE_THAN_A_LEASE)
            assert not Pipeline(Settings.load()).sweep()
            taken_back.append(outbox_row(db))

        taken_back: list[dict[str, Any]] = []
        receiver.during = jump
        pipeline.drain()
        assert [outbox_row(db)] == taken_back
        assert taken_back[0]["state"] == "pending"
        (attempt,) = attempts(db)
        assert attempt["outcome"] == "sent"
        assert len(lines("telemetry.lease_lost")) == 1
        clock(MORE_THAN_A_BACKOFF)
        self.all_at_once()
        assert days(db) == {"2026-05-02": "sent"}
        assert left(receiver, db, times=1)
        assert lines("telemetry.payload") == [f"telemetry.payload {outbox_row(db)['payload']}"]

    def test_set_back_while_a_heartbeat_waits_it_holds_it_back_and_does_not_lose_it(
        self, pipeline: Pipeline, clock: Clock, receiver: Receiver, db: Engine
    ) -> None:
        clock("2026-05-02T01:30:00Z")
        assert not pipeline.sweep()
        pipeline.drain()
        assert receiver.connections == 0
        clock(DAY_BEGINS)
        self.all_at_once()
        assert days(db) == {"2026-05-02": "sent"}
        assert len(receiver.requests) == 1
