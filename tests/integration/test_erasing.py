"""``forget --remote`` has the receiver delete each id under which something may have left."""

from sqlalchemy import Engine

from app import control
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.support.database import give_notice, one
from tests.support.receiver import Receiver, answer
from tests.support.steps import DAY_BEGINS


def test_an_id_that_was_rotated_away_is_erased_too(
    pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver
) -> None:
    give_notice(db, "2026-05-01")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()
    pipeline.drain()
    former = one(db, "SELECT id FROM instance")
    current = control.rotate(db, enabled=True).current
    receiver.requests.clear()
    receiver.answers = [answer(204)]
    erased = control.erase(db, Settings.load())
    assert erased == sorted([former, current])
    asked = [request.head.split(b" ")[1].decode() for request in receiver.requests]
    assert asked == [f"/v1/installs/{each}" for each in erased]
