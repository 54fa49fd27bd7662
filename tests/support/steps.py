"""The times, steps and observations that the tests of faults share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from redis import Redis
from sqlalchemy import Connection, Engine, text

from tests.conftest import Clock
from tests.support.database import attempts, give_notice, outbox_row, run
from tests.support.processes import READY, Process, Processes, Stopped
from tests.support.receiver import Receiver

TODAY, TOMORROW = "2026-05-02", "2026-05-03"
"""The day of most of these tests, and the next."""

DAY_BEGINS = f"{TODAY}T02:30:00Z"
TOMORROW_BEGINS = f"{TOMORROW}T02:30:00Z"

MORE_THAN_A_LEASE = "2026-05-02T02:32:00Z"
"""A time at which every lease of the day's first moment is over, at a timeout of up to a minute."""

MORE_THAN_A_BACKOFF = "2026-05-02T02:34:00Z"
"""A time at which the first backoff after a lapsed lease is over."""


def eventually(holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"did not come to hold within {seconds} s"
        time.sleep(0.05)


# The clocks


def ahead(moment: str, by: timedelta = timedelta()) -> str:
    """Return the GUARD_CLOCK of a process that starts at ``moment``, or ``by`` apart from it."""
    return str((datetime.fromisoformat(moment) + by - datetime.now(UTC)).total_seconds())


def be_at(moment: str, processes: Processes, clock: Clock) -> None:
    """Set the clock of the database and of the processes that are started from now on."""
    clock(moment)
    processes.environment["GUARD_CLOCK"] = ahead(moment)


def come_near_half_past_two(processes: Processes, clock: Clock, db: Engine) -> None:
    """Set the clocks to some seconds before the first half past two after a notice."""
    give_notice(db, "2026-05-01T12:00Z")
    be_at("2026-05-02T02:29:54Z", processes, clock)


# The processes


def ready(processes: Processes, name: str = "worker", **environment: str) -> Process:
    """Start a line of the Procfile, a worker that waits to be woken, and wait until it is up."""
    process = processes.start(name, **environment)
    process.wait_for(READY[name])
    return process


def standing_at(
    point: str, processes: Processes, actor: str = "drain", name: str = "worker"
) -> Stopped:
    """Start a worker and have an actor of it stop at a point."""
    stopped = processes.start_to_stop_at(point, name)
    processes.wake(actor)
    stopped.wait()
    return stopped


def worked_off(processes: Processes) -> bool:
    """Whether no wake-up waits or is being worked on."""
    with Redis.from_url(processes.environment["REDIS_URL"]) as client:
        return not client.exists(f"{processes.queue}.msgs")


def until_worked_off(processes: Processes) -> None:
    """Wait until every wake-up has been worked off and acknowledged."""
    eventually(lambda: worked_off(processes))


def do(processes: Processes, *actors: str) -> None:
    """Run actors in a worker, one after the other, with all actors that they wake."""
    for actor in actors:
        processes.wake(actor)
        until_worked_off(processes)


def recover(processes: Processes, clock: Clock, db: Engine) -> None:
    """Let a sweep take back a lapsed lease and the backoff pass, until the row is sent."""
    clock(MORE_THAN_A_LEASE)
    processes.wake("sweep")
    eventually(lambda: outbox_row(db)["state"] != "sending")
    clock(MORE_THAN_A_BACKOFF)
    processes.wake("drain")
    eventually(lambda: outbox_row(db)["state"] == "sent")


def recover_by_another(
    processes: Processes, clock: Clock, db: Engine, name: str = "worker"
) -> None:
    """Start another worker, and have it take back and send what a dead one held."""
    assert outbox_row(db)["state"] == "sending"
    another = processes.start(name)
    recover(processes, clock, db)
    another.wait_for("its lease lapsed")
    another.wait_for("telemetry.attempt")
    assert without_harm(another)


def without_harm(*processes: Process) -> bool:
    """Whether processes have logged everything as events."""
    return not any("Traceback" in each.output() for each in processes)


# The receiver


def bodies(receiver: Receiver) -> list[bytes]:
    """Return the body of each request, in the order in which they came."""
    return [request.body for request in receiver.requests]


def left(receiver: Receiver, db: Engine, *, times: int) -> bool:
    """Whether the receiver got the bytes of the only row so many times, and nothing else."""
    return bodies(receiver) == [outbox_row(db)["payload"].encode()] * times


# The database


def days(db: Engine) -> dict[str, str]:
    """Return the state of each day that has a row."""
    with db.begin() as connection:
        rows = connection.execute(text("SELECT day, state FROM telemetry_outbox ORDER BY day"))
        return {str(row.day): row.state for row in rows}


def outcomes(db: Engine) -> list[str | None]:
    """Return the outcome of each attempt, in their order."""
    return [attempt["outcome"] for attempt in attempts(db)]


def put_a_row(db: Engine, day: str) -> None:
    """Put a heartbeat of a past day into the outbox, that has expired since."""
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, created_at, next_attempt_at,"
        " expires_at) SELECT gen_random_uuid(), t, gen_random_uuid(), '{}', t, t, t"
        " FROM CAST(:day AS timestamptz) AS t",
        day=day,
    )


@contextmanager
def locked(db: Engine, tables: str) -> Iterator[Connection]:
    """Lock tables as a migration of ConsentOS does, until the block ends."""
    with db.begin() as connection:
        connection.execute(text(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE"))
        yield connection
