"""The queries of every minute use the partial indexes of the outbox, even if it is large."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from app import outbox
from tests.support.database import counted, plan_of, run

YEARS = 10

Question = Callable[[Connection], Any]


def claim(connection: Connection) -> object:
    return outbox.claim(connection, timedelta(minutes=1))


def reclaim(connection: Connection) -> object:
    return outbox.reclaim(connection, 0)


@pytest.fixture(params=[False, True], ids=["never analyzed", "analyzed"])
def grown(db: Engine, request: pytest.FixtureRequest) -> Engine:
    """An outbox of years, whose last heartbeat is pending."""
    run(db, "ALTER TABLE telemetry_outbox SET (autovacuum_enabled = off)")
    run(
        db,
        "INSERT INTO instance (id, created_at, updated_at)"
        " VALUES (gen_random_uuid(), now(), now())",
    )
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, created_at,"
        " next_attempt_at, expires_at, finished_at)"
        " SELECT gen_random_uuid(), current_date - n, instance.id, '{}',"
        " CASE n WHEN 0 THEN 'pending' ELSE 'sent' END, now(), now(), now() + interval '1 day',"
        " CASE n WHEN 0 THEN NULL ELSE now() END"
        " FROM instance, generate_series(365 * :years, 0, -1) AS n",
        years=YEARS,
    )
    if request.param:
        run(db, "ANALYZE telemetry_outbox")
    return db


@pytest.mark.parametrize(
    ("question", "index"),
    [
        (outbox.until_due, "telemetry_outbox_pending"),
        (claim, "telemetry_outbox_pending"),
        (outbox.expire, "telemetry_outbox_pending"),
        (outbox.discard_all, "telemetry_outbox_pending"),
        (outbox.discard_foreign, "telemetry_outbox_pending"),
        (reclaim, "telemetry_outbox_sending"),
    ],
)
def test_it_is_found_by_its_partial_index(grown: Engine, question: Question, index: str) -> None:
    with grown.connect() as connection:
        with counted() as cost:
            question(connection)
        ((statement, parameters),) = cost.transactions[0]
        plan = plan_of(connection, statement, parameters)
    assert index in {node.get("Index Name") for node in plan}
    assert "telemetry_outbox" not in {
        node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"
    }
