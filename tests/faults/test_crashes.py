"""A process may be killed at any point: nothing is lost, nothing is doubled."""

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.database import count, outbox_row, run
from tests.processes import Processes
from tests.receiver import Receiver

DAY_BEGINS = "2026-05-02T02:30:00Z"
LEASE_IS_OVER = "2026-05-02T02:31:00Z"
BACKOFF_IS_OVER = "2026-05-02T02:33:00Z"


@pytest.fixture(autouse=True)
def written(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """Half past two, and the day's heartbeat waits to be sent."""
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01')")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()


def recover(processes: Processes, clock: Clock, db: Engine) -> None:
    """Start a worker anew, and let time pass until it has sent what the dead one held."""
    worker = processes.start("worker")
    clock(LEASE_IS_OVER)
    processes.wake("sweep")
    worker.wait_for("telemetry.failed stage=drain")
    assert outbox_row(db)["state"] == "pending"
    clock(BACKOFF_IS_OVER)
    processes.wake("drain")
    worker.wait_for("telemetry.attempt")
    assert outbox_row(db)["state"] == "sent"


@pytest.mark.parametrize(
    "point", ["app.outbox:begin:call", "app.outbox:claim:return", "app.sender:deliver:call"]
)
def test_killed_between_the_claim_and_the_post_nothing_has_left_and_it_leaves_later(
    processes: Processes,
    clock: Clock,
    receiver: Receiver,
    db: Engine,
    point: str,
) -> None:
    stopped = processes.start_to_stop_at(point)
    processes.wake("drain")
    stopped.kill()
    assert receiver.connections == 0
    assert count(db, "telemetry_attempt") == 0
    if outbox_row(db)["state"] == "sending":
        recover(processes, clock, db)
    else:  # the claim had not been committed
        processes.start("worker").wait_for("ready for action")
        processes.wake("drain")
    receiver.wait_for(1)
