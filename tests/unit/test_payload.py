"""The payload is a closed schema: what is not in it cannot be built, by whatever route."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.payload import (
    TOP_BUCKET,
    Bucket,
    Census,
    Counts,
    Edition,
    Facts,
    Features,
    Heartbeat,
    bucket,
    compose,
    fields,
    json_schema,
)

NAMES: tuple[Bucket, ...] = get_args(Bucket)
FIELDS = [name for name, _ in fields()]
COUNTED = [name for name in FIELDS if name.startswith("counts.") or name.endswith("_sites")]
BOOLEANS = [name for name in FIELDS if name.endswith(("_configured", "_enabled", "_ee"))]
TEXTS = [
    *("instance_id", "sent_at", "version", "edition", "python_version", "platform"),
    *("deployment", "stack.postgres_version"),
]

FACTS = Facts(
    census=Census(
        counts=Counts(
            orgs="1-10", sites="10-100", users="0", scans_last_24h="10k+", consents_last_24h="0"
        ),
        tcf_v22_sites="100-1k",
        auto_blocking_sites="1k-10k",
        scanner_scheduled_sites="0",
        server_version_num=160_002,
    ),
    version="0.1.0",
    edition="ce",
    deployment="docker-compose",
    python=(3, 12, 7),
    platform="linux",
    geoip_header_configured=True,
    geoip_maxmind_configured=False,
    rate_limit_enabled=True,
)
INSTANCE = UUID("0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99")
AT = datetime(2026, 5, 2, 2, 30, tzinfo=UTC)

aware = st.datetimes(
    min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29), timezones=st.timezones()
)
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


def heartbeat() -> Heartbeat:
    return compose(FACTS, instance_id=INSTANCE, at=AT)


def with_value(name: str, value: Any) -> dict[str, Any]:
    """Return a good heartbeat, as data, whose field ``name`` holds ``value``."""
    tree = heartbeat().model_dump()
    *sections, last = name.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[last] = value
    return tree


def from_python(tree: Mapping[str, Any]) -> Heartbeat:
    return Heartbeat.model_validate(tree)


def from_json(tree: Mapping[str, Any]) -> Heartbeat:
    return Heartbeat.model_validate_json(json.dumps(tree))


def conforms(value: Any, schema: Mapping[str, Any]) -> bool:
    """Check a value against the published JSON Schema, as a stranger to this code would."""
    match schema:
        case {"$ref": reference}:
            return conforms(value, json_schema()["$defs"][reference.rpartition("/")[2]])
        case {"properties": properties, "additionalProperties": False, "required": required}:
            known = set(value) == set(required) == set(properties)
            return known and all(conforms(value[name], properties[name]) for name in properties)
        case {"const": one}:
            return value == one and type(value) is type(one)
        case {"enum": several}:
            return value in several
        case {"pattern": pattern, "type": "string"}:
            return isinstance(value, str) and bool(re.fullmatch(pattern, value))
        case {"type": "boolean"}:
            return isinstance(value, bool)
    raise AssertionError(f"the schema has a field that is not closed: {schema}")


@pytest.mark.parametrize(
    ("count", "name"),
    [
        *((0, "0"), (1, "1-10"), (9, "1-10"), (10, "10-100"), (99, "10-100")),
        *((100, "100-1k"), (999, "100-1k"), (1_000, "1k-10k"), (9_999, "1k-10k")),
        *((10_000, "10k+"), (10_001, "10k+"), (10**30, "10k+")),
    ],
)
def test_a_bucket_holds_its_lower_boundary_and_not_its_upper(count: int, name: str) -> None:
    assert bucket(count) == name


@given(st.integers(0, 20_000), st.integers(0, 20_000))
def test_more_is_never_in_a_lower_bucket(one: int, other: int) -> None:
    assert NAMES.index(bucket(min(one, other))) <= NAMES.index(bucket(max(one, other)))


@given(st.integers(min_value=TOP_BUCKET))
def test_nothing_needs_to_be_counted_beyond_the_top_bucket(count: int) -> None:
    assert bucket(count) == bucket(TOP_BUCKET) == NAMES[-1]


@given(st.integers(max_value=-1))
def test_a_negative_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="never negative"):
        bucket(count)


def test_every_field_is_a_bucket_a_boolean_a_text_or_a_constant() -> None:
    constants = ["telemetry_schema", "stack.redis_present"]
    assert sorted([*COUNTED, *BOOLEANS, *TEXTS, *constants]) == sorted(FIELDS)


@pytest.mark.parametrize("build", [from_python, from_json])
@pytest.mark.parametrize("section", ["", "counts.", "features.", "stack."])
def test_an_unknown_field_cannot_be_built_at_any_depth(
    section: str, build: Callable[[Mapping[str, Any]], Heartbeat]
) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        build(with_value(f"{section}site_domains", "0"))


@pytest.mark.parametrize("build", [from_python, from_json])
@pytest.mark.parametrize(
    "value", [0, 7, 12_345, 1.5, "7", "12345", "1–10", " 0", "0 ", "٠", "10K+"]
)
@pytest.mark.parametrize("name", COUNTED)
def test_a_raw_number_or_another_spelling_is_no_bucket(
    name: str, value: object, build: Callable[[Mapping[str, Any]], Heartbeat]
) -> None:
    with pytest.raises(ValidationError):
        build(with_value(name, value))


@pytest.mark.parametrize("build", [from_python, from_json])
@pytest.mark.parametrize("value", [0, 1, 1.0, "true", "false", "", None])
@pytest.mark.parametrize("name", BOOLEANS)
def test_a_text_or_a_number_is_no_boolean(
    name: str, value: object, build: Callable[[Mapping[str, Any]], Heartbeat]
) -> None:
    with pytest.raises(ValidationError):
        build(with_value(name, value))


@pytest.mark.parametrize("build", [from_python, from_json])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("telemetry_schema", value) for value in (True, 1.0, "1", 0, 2)),
        *(("stack.redis_present", value) for value in (1, 1.0, "true", False)),
    ],
)
def test_a_constant_has_one_value_of_one_type(
    name: str, value: object, build: Callable[[Mapping[str, Any]], Heartbeat]
) -> None:
    with pytest.raises(ValidationError):
        build(with_value(name, value))


@pytest.mark.parametrize("build", [from_python, from_json])
@pytest.mark.parametrize(
    "spoil", ["{}\n", "\n{}", " {}", "{} ", "{}\0", "{};drop", "é{}", "{}\u200b"]
)
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "telemetry_schema"])
def test_nothing_can_be_added_to_a_good_value(
    name: str, spoil: str, build: Callable[[Mapping[str, Any]], Heartbeat]
) -> None:
    place: Any = heartbeat().model_dump()
    for part in name.split("."):
        place = place[part]
    with pytest.raises(ValidationError):
        build(with_value(name, spoil.format(place)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("instance_id", text) for text in (str(INSTANCE).upper(), INSTANCE.hex, "me", INSTANCE)),
        ("sent_at", "2026-05-02T02:30:00"),
        ("sent_at", "2026-05-02T02:30:00Z"),
        ("sent_at", "2026-05-02T02:30:00.123456+00:00"),
        ("sent_at", "2026-05-02T04:30:00+02:00"),
        ("sent_at", "2026-05-02 02:30:00+00:00"),
        ("sent_at", "2026-02-30T02:30:00+00:00"),
        ("sent_at", "2026-05-02T02:61:00+00:00"),
        ("sent_at", "٢٠٢٦-05-02T02:30:00+00:00"),
        ("sent_at", AT),
        *(("version", text) for text in ("1.2", "v1.2.3", "1.2.3-RC.1", "1.2.3+acme", "1.2.٣")),
        *(("version", text) for text in ("1.2.3-beta", "1.2.3-dev.1", "123456.0.0", "")),
        *(("edition", text) for text in ("CE", "Ee", "pro", "", None)),
        *(("python_version", text) for text in ("3.12", "3.12.7rc1", "3.12.7 (main)", "3.١.7")),
        *(("platform", text) for text in ("Linux", "freebsd14", "linux2", "cygwin", "")),
        *(
            ("deployment", text)
            for text in ("Docker", "-a", "a_b", "a.b", "a" * 33, "", "é", "a b")
        ),
        *(("stack.postgres_version", text) for text in ("16", "16.2 (Debian)", "16.2.1", 16.2)),
    ],
)
def test_a_text_has_its_form_and_no_other(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        from_python(with_value(name, value))


@given(st.sampled_from(FIELDS), anything)
def test_no_value_outside_the_published_schema_can_be_built(name: str, value: object) -> None:
    try:
        built = from_python(with_value(name, value))
    except ValidationError:
        return
    assert conforms(json.loads(built.canonical()), json_schema())


@given(
    facts=st.builds(
        Facts,
        census=st.builds(
            Census,
            counts=st.builds(Counts, **dict.fromkeys(Counts.model_fields, st.sampled_from(NAMES))),
            tcf_v22_sites=st.sampled_from(NAMES) | st.text(),
            auto_blocking_sites=st.sampled_from(NAMES) | st.integers(),
            scanner_scheduled_sites=st.sampled_from(NAMES),
            server_version_num=st.integers(90_000, 200_000) | st.integers(),
        ),
        version=st.from_regex(r"\d+\.\d+\.\d+(-\w+)?", fullmatch=True) | st.text(),
        edition=st.sampled_from(get_args(Edition)) | st.text(),
        deployment=st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True) | st.text(),
        python=st.tuples(st.integers(-1), st.integers(-1), st.integers(-1)),
        platform=st.text(),
        geoip_header_configured=st.booleans() | anything,
        geoip_maxmind_configured=st.booleans(),
        rate_limit_enabled=st.booleans(),
    ),
    instance_id=st.uuids(),
    at=aware,
)
def test_whatever_the_facts_are_a_body_conforms_or_is_not_composed(
    facts: Facts, instance_id: UUID, at: datetime
) -> None:
    try:
        body = compose(facts, instance_id=instance_id, at=at).canonical()
    except ValidationError:
        return
    assert conforms(json.loads(body), json_schema())


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(10, 99))
def test_versions_of_python_and_postgres_are_made_of_numbers(
    major: int, minor: int, patch: int, postgres: int
) -> None:
    census = replace(FACTS.census, server_version_num=postgres * 10_000 + patch)
    facts = replace(FACTS, python=(major, minor, patch), census=census)
    composed = compose(facts, instance_id=INSTANCE, at=AT)
    assert composed.python_version == f"{major}.{minor}.{patch}"
    assert composed.stack.postgres_version == f"{postgres}.{patch}"


@given(st.text())
def test_a_platform_that_is_not_known_by_name_is_other(name: str) -> None:
    platform = compose(replace(FACTS, platform=name), instance_id=INSTANCE, at=AT).platform
    assert platform == (name if name in {"linux", "darwin", "win32"} else "other")


@given(aware)
def test_sent_at_is_the_same_instant_in_whole_seconds_of_utc(at: datetime) -> None:
    sent_at = compose(FACTS, instance_id=INSTANCE, at=at).sent_at
    assert sent_at.endswith("+00:00")
    assert timedelta() <= at - datetime.fromisoformat(sent_at) < timedelta(seconds=1)


def test_the_edition_and_the_compliance_feature_agree() -> None:
    features = {
        edition: compose(replace(FACTS, edition=edition), instance_id=INSTANCE, at=AT).features
        for edition in get_args(Edition)
    }
    assert not features["ce"].compliance_ee
    assert features["ee"].compliance_ee


@given(st.uuids(), aware)
def test_the_body_is_one_line_of_ascii_in_the_order_of_the_schema(id_: UUID, at: datetime) -> None:
    body = compose(FACTS, instance_id=id_, at=at).canonical()
    assert body.isascii()
    assert body.isprintable()
    assert body == json.dumps(json.loads(body), separators=(",", ":"))
    assert Heartbeat.model_validate_json(body).canonical() == body


def test_the_order_in_which_a_heartbeat_is_built_does_not_change_its_body() -> None:
    tree = heartbeat().model_dump()
    backwards = {
        name: dict(reversed(value.items())) if isinstance(value, dict) else value
        for name, value in reversed(tree.items())
    }
    assert from_python(backwards).canonical() == heartbeat().canonical()


@pytest.mark.parametrize("name", Heartbeat.model_fields)
def test_a_heartbeat_cannot_be_changed_once_it_is_built(name: str) -> None:
    built = heartbeat()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(built, name, getattr(built, name))


@pytest.mark.parametrize("name", Features.model_fields)
def test_a_section_of_a_heartbeat_cannot_be_changed_either(name: str) -> None:
    features = heartbeat().features
    with pytest.raises(ValidationError, match="frozen"):
        setattr(features, name, getattr(features, name))
