"""The difference between two bodies, by the names of their fields."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app import change
from app.change import Change
from app.payload import fields, flat, parse
from tests.support.published import EXAMPLE, with_value

BODY = parse(EXAMPLE).canonical()
FIELDS = [name for name, _ in fields()]

names = st.text(st.characters(exclude_characters="."), min_size=1, max_size=2)
values = st.none() | st.booleans() | st.integers() | st.text(max_size=2)
bodies = st.dictionaries(names, values | st.dictionaries(names, values, max_size=3), max_size=4)


def without(*gone: str) -> str:
    """Return the example's body as a schema without some fields would have it."""
    tree: dict[str, Any] = json.loads(BODY)
    for name in gone:
        section, _, last = name.rpartition(".")
        del (tree[section] if section else tree)[last]
    return json.dumps(tree)


def test_a_flat_body_has_every_field_of_the_schema_in_its_order() -> None:
    assert list(flat(BODY)) == FIELDS
    assert flat(BODY)["counts.sites"] == "10-100"
    assert flat(BODY)["stack.redis_present"] is True


def test_without_an_earlier_body_all_is_added() -> None:
    assert change.between(None, BODY) == Change(added=flat(BODY), removed={}, changed={})


def test_a_field_is_new_or_gone_or_has_another_value() -> None:
    earlier = without("counts.orgs", "platform")
    assert change.between(earlier, BODY) == Change(
        added={"platform": "linux", "counts.orgs": "1-10"}, removed={}, changed={}
    )
    assert change.between(BODY, earlier).removed == {"platform": "linux", "counts.orgs": "1-10"}
    grown = json.dumps(with_value("counts.sites", "100-1k"))
    assert change.between(BODY, grown) == Change({}, {}, {"counts.sites": ("10-100", "100-1k")})


@given(bodies, bodies)
def test_the_earlier_body_and_the_change_make_the_later_one(
    earlier: dict[str, Any], later: dict[str, Any]
) -> None:
    before, after = json.dumps(earlier), json.dumps(later)
    found = change.between(before, after)
    kept = {name: value for name, value in flat(before).items() if name not in found.removed}
    changed = {name: value for name, (_, value) in found.changed.items()}
    assert {**kept, **changed, **found.added} == flat(after)
    assert not found.changed.keys() & found.added.keys()
    assert all(old != new for old, new in found.changed.values())


@given(bodies)
def test_nothing_has_changed_between_a_body_and_itself(body: dict[str, Any]) -> None:
    assert change.between(json.dumps(body), json.dumps(body)) == Change({}, {}, {})


def test_the_fields_that_are_new_are_those_that_the_earlier_body_had_not() -> None:
    assert change.new_fields(None) == FIELDS
    assert change.new_fields(BODY) == []
    assert change.new_fields(without("stack.redis_present", "edition")) == [
        "edition",
        "stack.redis_present",
    ]
