"""The diagram of a row's states in docs/architecture.md matches the code."""

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine

from app import outbox
from app.models import STATES
from app.outbox import Claim
from app.retry import Delivered, Rejected, RetryAt
from tests.support.database import outbox_row, run

TOKEN = UUID(int=1)
NEVER_HELD = UUID(int=2)
LATER = datetime(2999, 1, 1, tzinfo=UTC)

Change = Callable[[Connection, Claim], object]

CHANGES: dict[str, Change] = {
    "claim": lambda connection, _: outbox.claim(connection, timedelta(minutes=1)),
    "deliver": lambda connection, claim: outbox.settle(connection, claim, Delivered(), None),
    "reject": lambda connection, claim: outbox.settle(connection, claim, Rejected(), "HTTP 400"),
    "try again": lambda connection, claim: outbox.settle(
        connection, claim, RetryAt(LATER, None), "refused"
    ),
    "release": outbox.release,
    "discard": lambda connection, claim: outbox.discard(connection, claim, "sent elsewhere"),
    "reclaim": lambda connection, _: outbox.reclaim(connection, 0.0),
    "expire": lambda connection, _: outbox.expire(connection),
    "carry": lambda connection, claim: outbox.carry(connection, claim.day),
    "discard all": lambda connection, _: outbox.discard_all(connection),
    "discard future": lambda connection, _: outbox.discard_future(connection),
    "discard foreign": lambda connection, _: outbox.discard_foreign(connection),
}


def put(db: Engine, state: str) -> Claim:
    """Leave one row in the outbox, in ``state``, at a time at which only its state matters."""
    run(db, "TRUNCATE telemetry_outbox, telemetry_attempt")
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, created_at,"
        " next_attempt_at, expires_at, lease_token, lease_until, finished_at)"
        " SELECT gen_random_uuid(), current_date, instance.id, '{}', :state, now(), now(),"
        " now() + interval '1 hour', CASE WHEN :state = 'sending' THEN CAST(:token AS uuid) END,"
        " CASE WHEN :state = 'sending' THEN now() END,"
        " CASE WHEN :state NOT IN ('pending', 'sending') THEN now() END FROM instance",
        state=state,
        token=TOKEN,
    )
    row = outbox_row(db)
    return Claim(row["id"], row["day"], TOKEN, row["payload"], row["instance_id"], 1)


@pytest.fixture
def observed(db: Engine) -> set[tuple[str, str]]:
    """Every move that some function makes from some state."""
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), NULL)")
    moves: set[tuple[str, str]] = set()
    for state in STATES:
        for name, change in CHANGES.items():
            claim = put(db, state)
            if name == "expire":
                run(db, "UPDATE telemetry_outbox SET expires_at = now()")
            if name == "discard future":
                future = "expires_at = now() + interval '26 hours', attempts = 1"
                run(db, f"UPDATE telemetry_outbox SET {future}")
            if name == "discard foreign":
                run(db, "UPDATE instance SET id = gen_random_uuid()")
            with db.begin() as connection:
                change(connection, claim)
            after = outbox_row(db)["state"]
            if after != state:
                moves.add((state, after))
    return moves


def test_the_diagram_shows_the_moves_that_the_code_makes_and_no_others(
    observed: set[tuple[str, str]],
) -> None:
    page = Path(__file__).parents[2] / "docs" / "architecture.md"
    drawn = set(re.findall(r"^ +(\w+) --> (\w+) :", page.read_text(), re.MULTILINE))
    assert drawn == observed


@pytest.mark.parametrize("change", ["deliver", "reject", "try again", "release", "discard"])
def test_no_change_is_made_under_a_token_that_is_not_the_rows(db: Engine, change: str) -> None:
    run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now(), NULL)")
    claim = put(db, "sending")
    stranger = replace(claim, token=NEVER_HELD)
    before = outbox_row(db)
    with db.begin() as connection:
        assert CHANGES[change](connection, stranger) is False
    assert outbox_row(db) == before
