"""Each attempt stays on record if the database server crashes."""

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from tests.support.breakable import Server
from tests.support.database import one, outbox_row, run
from tests.support.freezing import frozen
from tests.support.receiver import Receiver
from tests.support.steps import outcomes


@pytest.mark.usefixtures("pending")
def test_an_attempt_outlives_a_server_that_does_not_wait_for_its_disk(
    pipeline: Pipeline, postgres: Server, receiver: Receiver, db: Engine
) -> None:
    name = one(db, "SELECT current_database()")
    run(db, f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    # Only this process writes the commits that no session waits for; frozen, it writes none.
    writer = postgres.child("walwriter")
    with frozen(writer.pid):
        receiver.during = writer.kill  # Postgres then drops its memory and restarts
        pipeline.drain()
    assert outcomes(db) == ["sent"]
    assert outbox_row(db)["state"] == "sent"
    assert len(receiver.requests) == 1
