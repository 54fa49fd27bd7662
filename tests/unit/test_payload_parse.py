"""From a body to the heartbeat that it is: by the model of its schema, and no field twice."""

import json
from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app import payload
from app.payload import NEWEST, SCHEMA_VERSION, NotAHeartbeatError, parse
from tests.support.published import EXAMPLE

FIELDS: dict[str, Any] = json.loads(EXAMPLE)


class Stricter(payload.Heartbeat1):
    """Another schema, with a field more."""

    colour: Literal["red", "blue"]


class Looser(payload.Heartbeat1):
    """A schema with a field that may be left out."""

    colour: Literal["red", "blue"] = "red"


@pytest.fixture
def schemas(monkeypatch: pytest.MonkeyPatch) -> dict[int, type[payload.Heartbeat]]:
    """The schemas, with two more."""
    known = cast("dict[int, type[payload.Heartbeat]]", payload.SCHEMAS)
    monkeypatch.setitem(known, SCHEMA_VERSION + 1, Stricter)
    monkeypatch.setitem(known, SCHEMA_VERSION + 2, Looser)
    return known


@pytest.mark.parametrize("reverse", [False, True])
def test_a_heartbeat_is_read_by_the_model_of_its_schema_wherever_it_names_it(
    schemas: dict[int, type[payload.Heartbeat]], *, reverse: bool
) -> None:
    for number, model in schemas.items():
        fields = {**FIELDS, "telemetry_schema": number}
        if model is Stricter:
            fields["colour"] = "red"
        order = sorted(fields.items(), reverse=True) if reverse else fields.items()
        assert type(parse(json.dumps(dict(order)))) is model


@pytest.mark.usefixtures("schemas")
def test_a_field_that_comes_twice_is_not_hidden_by_one_that_is_left_out() -> None:
    left_out = json.dumps({**FIELDS, "telemetry_schema": SCHEMA_VERSION + 2})
    assert type(parse(left_out)) is Looser
    for field in ('"edition": "ce", ', '"edition": null, ', '"\\u0065dition": 1, '):
        twice = left_out.replace('"edition"', f'{field}"edition"')
        with pytest.raises(NotAHeartbeatError, match="names a field twice"):
            parse(twice)


pieces = st.sampled_from(
    ['"', "\\", "\\u0022", ",", ":", "{", "}", "null", "1", " ", "\n", '"edition":"ce",', "é", "\0"]
)


@given(st.integers(0, len(EXAMPLE)), st.integers(0, 20), st.lists(pieces, max_size=4))
def test_whatever_is_changed_a_body_is_accepted_if_its_model_takes_it_and_no_field_comes_twice(
    at: int, dropped: int, put: list[str]
) -> None:
    body = EXAMPLE[:at] + "".join(put) + EXAMPLE[at + dropped :]
    try:
        expected = None if twins(body) else NEWEST.model_validate_json(body)
    except (ValueError, ValidationError):
        expected = None
    try:
        found = parse(body)
    except NotAHeartbeatError:
        found = None
    assert found == expected


def twins(body: str) -> bool:
    """Return whether any object of a body names a field twice."""
    found = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        found.append(len(dict(pairs)) != len(pairs))

    json.loads(body, object_pairs_hook=look)
    return any(found)
