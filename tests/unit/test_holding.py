"""What a receiver says it holds is read closely: it is a stranger's answer."""

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.holding import LONGEST_BODY, PAGE, Holding, NotAHoldingError, nothing, page

ID = UUID(int=7)
FIRST, SECOND = "2026-05-02T02:30:00+00:00", "2026-05-03T02:30:00+00:00"


def heartbeats(*times: str) -> list[dict[str, Any]]:
    return [{"sent_at": at, "received_at": at, "body": f"body of {at}"} for at in times]


def answer(**changed: Any) -> bytes:
    """Return the answer of a collector, with some members changed, or removed where ``...``."""
    tree = {
        "instance_id": str(ID),
        "first_seen": FIRST,
        "last_seen": SECOND,
        "retention_days": 400,
        "heartbeats": heartbeats(FIRST, SECOND),
        "more": False,
        **changed,
    }
    return json.dumps({key: value for key, value in tree.items() if value is not ...}).encode()


def test_an_answer_is_read_with_its_bodies_as_they_are() -> None:
    found = page(answer(), ID, None)
    bodies = {FIRST: f"body of {FIRST}", SECOND: f"body of {SECOND}"}
    assert (found.holding, found.more) == (Holding(400, bodies), False)


def test_a_later_collector_may_say_more() -> None:
    assert page(answer(later="something"), ID, None) == page(answer(), ID, None)


def test_none_is_held_after_the_last() -> None:
    assert page(answer(heartbeats=[]), ID, SECOND).holding.bodies == {}


@pytest.mark.parametrize(
    ("changed", "after"),
    [
        ({"instance_id": str(UUID(int=8))}, None),
        ({"instance_id": ...}, None),
        ({"retention_days": ...}, None),
        ({"retention_days": "400"}, None),
        ({"retention_days": -1}, None),
        ({"retention_days": 10**30}, None),
        ({"heartbeats": ...}, None),
        ({"heartbeats": None}, None),
        ({"heartbeats": heartbeats(SECOND, FIRST)}, None),
        ({"heartbeats": heartbeats(FIRST, FIRST)}, None),
        ({"heartbeats": heartbeats("2026-05-02")}, None),
        ({"heartbeats": heartbeats("2026-13-02T02:30:00+00:00")}, None),
        ({"heartbeats": heartbeats("2026-05-02T02:30:00+00:00\x1b[31m")}, None),
        ({"heartbeats": [{"sent_at": FIRST, "body": {}}]}, None),
        ({"heartbeats": [{"sent_at": FIRST, "body": "x" * (LONGEST_BODY + 1)}]}, None),
        (
            {
                "heartbeats": [
                    {"sent_at": f"{year:04}-01-01T00:00:00+00:00", "body": ""}
                    for year in range(1, PAGE + 2)
                ]
            },
            None,
        ),
        ({}, FIRST),
        ({}, SECOND),
        ({"heartbeats": [], "more": True}, None),
        ({"more": "yes"}, None),
        ({"more": ...}, None),
    ],
)
def test_another_answer_is_refused(changed: dict[str, Any], after: str | None) -> None:
    with pytest.raises(NotAHoldingError):
        page(answer(**changed), ID, after)


def test_nothing_is_held_where_the_collector_says_so() -> None:
    said = b'{"error": "Nothing is held under this id.", "retention_days": 400}'
    assert nothing(said) == Holding(400, {})


@pytest.mark.parametrize(
    "said", [b"", b"<html>", b"{}", b'{"error": "Not Found"}', b'{"retention_days": 400}', b"[]"]
)
def test_another_404_is_refused(said: bytes) -> None:
    with pytest.raises(NotAHoldingError):
        nothing(said)


@given(st.binary() | st.recursive(st.none(), st.lists).map(lambda tree: json.dumps(tree).encode()))
def test_whatever_it_is_it_is_read_or_refused(said: bytes) -> None:
    for read in (lambda: page(said, ID, None), lambda: nothing(said)):
        with pytest.raises(NotAHoldingError):
            read()


@pytest.mark.parametrize("said", [b"[" * 100_000, b"1" * 100_000, b'{"a":' * 50_000, b"\xff" * 9])
def test_however_deep_or_long_it_is_it_is_refused(said: bytes) -> None:
    with pytest.raises(NotAHoldingError):
        page(said, ID, None)
