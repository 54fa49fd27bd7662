"""The payload is a closed schema: unknown fields, raw numbers and free text cannot be built."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.payload import NEWEST, SCHEMA_VERSION, NotAHeartbeatError, fields, parse
from tests.support.published import EXAMPLE, conforms, with_value

FIELDS = [name for name, _ in fields()]
COUNTED = [name for name in FIELDS if name.startswith("counts.") or name.endswith("_sites")]
BOOLEANS = [name for name in FIELDS if name.endswith(("_configured", "_enabled", "_ee"))]
CONSTANTS = ["telemetry_schema", "stack.redis_present"]
TEXTS = [
    *("instance_id", "sent_at", "version", "edition", "python_version", "platform"),
    *("deployment", "stack.postgres_version"),
]
ARABIC_TWO = "\N{ARABIC-INDIC DIGIT TWO}"

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)


def assert_refused(tree: Mapping[str, Any], what: str = "") -> None:
    """Assert that a body is refused; ``what`` names it if that fails."""
    assert refuses(NEWEST.model_validate, tree, ValidationError), what
    assert refuses(parse, json.dumps(tree, default=str), NotAHeartbeatError), what


def refuses(read: Callable[[Any], object], what: object, error: type[Exception]) -> bool:
    try:
        read(what)
    except error:
        return True
    return False


def test_every_field_is_a_bucket_a_boolean_a_text_or_a_constant() -> None:
    assert sorted([*COUNTED, *BOOLEANS, *TEXTS, *CONSTANTS]) == sorted(FIELDS)


@given(st.sampled_from(FIELDS), anything)
def test_no_value_outside_the_published_schema_can_be_built(name: str, value: object) -> None:
    try:
        built = NEWEST.model_validate(with_value(name, value))
    except ValidationError:
        return
    assert conforms(json.loads(built.canonical()))


@pytest.mark.parametrize("section", ["", "counts.", "features.", "stack."])
def test_an_unknown_field_is_refused_at_any_depth(section: str) -> None:
    assert_refused(with_value(f"{section}site_domains", "0"))


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_cannot_be_left_out(name: str) -> None:
    tree: dict[str, Any] = json.loads(EXAMPLE)
    section, _, last = name.rpartition(".")
    del (tree[section] if section else tree)[last]
    assert_refused(tree)


@pytest.mark.parametrize(
    "value",
    [0, 7, 12_345, 1.5, True, None, "7", "12345", "1-9", " 0", "0 ", "0\n", "10K+", ARABIC_TWO],
)
def test_a_raw_number_or_another_spelling_is_no_bucket(value: object) -> None:
    for name in COUNTED:
        assert_refused(with_value(name, value), name)


@pytest.mark.parametrize("value", [0, 1, 1.0, "true", "false", "", None])
@pytest.mark.parametrize("name", BOOLEANS)
def test_a_text_or_a_number_is_no_boolean(name: str, value: object) -> None:
    assert_refused(with_value(name, value))


@pytest.mark.parametrize("value", [0, SCHEMA_VERSION + 1, -1, "1", "true", False, None])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_one_value(name: str, value: object) -> None:
    assert_refused(with_value(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("telemetry_schema", same) for same in (True, 1.0)), *((CONSTANTS[1], n) for n in (1, 1.0))],
)
def test_a_constant_has_one_type(name: str, value: object) -> None:
    assert_refused(with_value(name, value))


@pytest.mark.parametrize("form", ["{}\n", "\n{}", " {}", "{} ", "{}\0", "{};drop", "é{}"])
def test_nothing_can_be_added_to_a_good_text(form: str) -> None:
    for name in [*COUNTED, *TEXTS]:
        good: Any = json.loads(EXAMPLE)
        for part in name.split("."):
            good = good[part]
        assert_refused(with_value(name, form.format(good)), name)


@pytest.mark.parametrize(
    "instance_id",
    [
        "0A0B3A8A-7E62-4A4E-9B6F-1A4E2D2DFD99",
        "0a0b3a8a7e624a4e9b6f1a4e2d2dfd99",
        "{0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99}",
        "somebody@example.com",
        UUID("0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99").int,
        "",
    ],
)
def test_an_instance_id_is_a_uuid_in_its_one_spelling(instance_id: object) -> None:
    assert_refused(with_value("instance_id", instance_id))


@pytest.mark.parametrize(
    "sent_at",
    [
        "2026-05-02T02:30:00",
        "2026-05-02T02:30:00Z",
        "2026-05-02T02:30:00-00:00",
        "2026-05-02T04:30:00+02:00",
        "2026-05-02T02:30:00.123456+00:00",
        "2026-05-02T02:30+00:00",
        "2026-05-02 02:30:00+00:00",
        "2026-02-30T02:30:00+00:00",
        "2026-05-02T02:61:00+00:00",
        f"{ARABIC_TWO}026-05-02T02:30:00+00:00",
        datetime(2026, 5, 2, 2, 30, tzinfo=UTC).timestamp(),
    ],
)
def test_sent_at_is_a_time_in_whole_seconds_of_utc_in_its_one_spelling(sent_at: object) -> None:
    assert_refused(with_value("sent_at", sent_at))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("version", text) for text in ("", "1.2", "v1.2.3", "1.2.3-RC.1", "1.2.3+acme")),
        *(("version", text) for text in ("1.2.3-beta", "1.2.3-dev.1", "123456.0.0")),
        *(("version", text) for text in (f"1.2.{ARABIC_TWO}", f"1.2.3-rc.{ARABIC_TWO}")),
        *(("edition", text) for text in ("", "CE", "Ee", "pro", None)),
        *(("python_version", text) for text in ("3.12", "3.12.7rc1", "3.12.7 (main, Oct 1)")),
        *(("python_version", text) for text in (f"3.{ARABIC_TWO}.7", 3.12)),
        *(("platform", text) for text in ("", "Linux", "linux2", "cygwin", "freebsd14")),
        *(("deployment", text) for text in ("", "Docker", "-a", "a_b", "a.b", "a b", "é")),
        *(("deployment", text) for text in ("a" * 33, f"a{ARABIC_TWO}", "acme.example.com")),
        *(("stack.postgres_version", text) for text in ("16", "16.2 (Debian 16.2-1)", "16.2.1")),
        *(("stack.postgres_version", text) for text in (f"16.{ARABIC_TWO}", 16.2)),
    ],
)
def test_a_text_has_its_form_and_no_other(name: str, value: object) -> None:
    assert_refused(with_value(name, value))


@pytest.mark.parametrize("name", NEWEST.model_fields)
def test_a_heartbeat_cannot_be_changed_once_it_is_built(name: str) -> None:
    heartbeat = parse(EXAMPLE)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(heartbeat, name, getattr(heartbeat, name))


@pytest.mark.parametrize("name", [name for name in FIELDS if "." in name])
def test_a_section_of_a_heartbeat_cannot_be_changed_either(name: str) -> None:
    section, _, field = name.partition(".")
    part = getattr(parse(EXAMPLE), section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, field, getattr(part, field))
