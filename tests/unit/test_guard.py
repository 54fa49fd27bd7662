"""A process stops only at a point that exists: a misspelt one fails before the process starts."""

import pytest

from tests.support.processes import minimal


def test_a_point_that_exists_is_passed_on() -> None:
    point = "app.outbox:claim:return"
    assert minimal({"GUARD_POINT": point})["GUARD_POINT"] == point


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        ("app.inbox:claim:call", "there is no module app.inbox"),
        ("app.outbox:grab:call", "app.outbox has no function grab"),
        ("app.outbox:claim:exit", "the event is neither call nor return"),
    ],
    ids=["module", "function", "event"],
)
def test_a_point_that_does_not_exist_is_rejected_at_once(point: str, reason: str) -> None:
    with pytest.raises(LookupError, match=f"^GUARD_POINT={point}: {reason}$"):
        minimal({"GUARD_POINT": point})
