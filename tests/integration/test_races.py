"""Races between threads, on real connections."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import TypeVar
from uuid import UUID

import pytest
from sqlalchemy import Engine

from app import database, instance, outbox
from app.pipeline import Pipeline
from app.settings import Settings
from tests.support.database import count, give_notice, one, run
from tests.support.receiver import Receiver

Result = TypeVar("Result")


def at_once(times: int, what: Callable[[], Result]) -> list[Result]:
    """Call ``what`` in as many threads, all of which start together."""
    ready = Barrier(times)

    def call(_: int) -> Result:
        ready.wait(30)
        return what()

    with ThreadPoolExecutor(times) as threads:
        return list(threads.map(call, range(times)))


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_first_boots_at_once_make_one_instance(
    db: Engine, database_url: str, isolation: str
) -> None:
    name = one(db, "SELECT current_database()")
    run(db, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{isolation}'")

    own = database.engine(database_url)

    def boot() -> UUID:
        with own.begin() as connection:
            return instance.ensure(connection)

    assert len(set(at_once(16, boot))) == 1
    assert count(db, "instance") == 1


def test_workers_at_once_write_one_heartbeat(environment: dict[str, str], db: Engine) -> None:
    assert environment
    give_notice(db)
    wrote = at_once(16, lambda: Pipeline(Settings.load()).write_heartbeat())
    assert wrote.count(True) == 1
    assert count(db, "telemetry_outbox") == count(db, "instance") == 1


def test_workers_at_once_give_the_notice_once(environment: dict[str, str], db: Engine) -> None:
    assert environment
    at_once(6, lambda: Pipeline(Settings.load()).sweep())  # each waits for a lock for 1 s at most
    assert count(db, "telemetry_notice") == 1


def test_workers_at_once_claim_each_row_once(db: Engine) -> None:
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), NULL)")
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, created_at,"
        " next_attempt_at, expires_at)"
        " SELECT gen_random_uuid(), date '2000-01-01' + n, instance.id, '{}', now(), now(),"
        " now() + interval '1 day' FROM instance, generate_series(1, 500) AS n",
    )

    def work() -> list[UUID]:
        claimed: list[UUID] = []
        while True:
            with db.begin() as connection:
                claim = outbox.claim(connection, timedelta(minutes=1))
            if claim is None:
                return claimed
            claimed.append(claim.id)

    claims = Counter(row for rows in at_once(8, work) for row in rows)
    assert len(claims) == 500
    assert set(claims.values()) == {1}


def test_senders_at_once_send_a_heartbeat_once(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    assert environment
    give_notice(db)
    Pipeline(Settings.load()).write_heartbeat()
    at_once(8, lambda: Pipeline(Settings.load()).drain())
    assert len(receiver.requests) == 1


def test_a_reclaim_that_races_a_settle_changes_the_row_once(
    environment: dict[str, str], db: Engine
) -> None:
    assert environment
    give_notice(db)
    Pipeline(Settings.load()).write_heartbeat()
    with db.begin() as connection:
        claim = outbox.claim(connection, timedelta(0))
    assert claim
    with db.connect() as settling, db.connect() as reclaiming, settling.begin():
        assert outbox.release(settling, claim)
        # The row is locked by the settle, which has not committed: it is passed over.
        with reclaiming.begin():
            assert outbox.reclaim(reclaiming, 0.0) == []
    with db.begin() as connection:
        assert not outbox.release(connection, claim)
