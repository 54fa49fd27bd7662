"""From facts to the body: buckets, versions made of numbers, one canonical line."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import get_args
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.payload import (
    NEWEST,
    TOP_BUCKET,
    Bucket,
    Census,
    Counts,
    Edition,
    Facts,
    bucket,
    compose,
    parse,
)
from tests.support.published import DOCUMENTED, EXAMPLE, conforms

NAMES: tuple[Bucket, ...] = get_args(Bucket)
INSTANCE = UUID("0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99")
AT = datetime(2026, 5, 2, 2, 30, tzinfo=UTC)
FACTS = Facts(
    census=Census(
        counts=Counts(**json.loads(EXAMPLE)["counts"]),
        tcf_v22_sites="1-10",
        auto_blocking_sites="10-100",
        scanner_scheduled_sites="1-10",
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

aware = st.datetimes(timezones=st.timezones()).filter(lambda at: 1 < at.year < 9999)
names = st.sampled_from(NAMES)


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


def test_the_facts_of_the_documented_install_compose_the_documented_payload() -> None:
    heartbeat = compose(FACTS, instance_id=INSTANCE, at=AT)
    assert heartbeat == parse(DOCUMENTED)


@given(
    facts=st.builds(
        Facts,
        census=st.builds(
            Census,
            counts=st.builds(Counts, **dict.fromkeys(Counts.model_fields, names)),
            tcf_v22_sites=names | st.text(),
            auto_blocking_sites=names | st.integers(),
            scanner_scheduled_sites=names | st.none(),
            server_version_num=st.integers(100_000, 200_000) | st.integers(),
        ),
        version=st.from_regex(r"\d+\.\d+\.\d+(-(rc|dev)(\.\d+)?)?", fullmatch=True) | st.text(),
        edition=st.sampled_from(get_args(Edition)) | st.text(),
        deployment=st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True) | st.text(),
        python=st.tuples(*[st.integers(-1)] * 3),
        platform=st.text(),
        geoip_header_configured=st.booleans() | st.text(),
        geoip_maxmind_configured=st.booleans() | st.integers(),
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
    assert conforms(json.loads(body))


@given(*[st.integers(0, 99_999)] * 3)
def test_the_version_of_python_is_made_of_three_numbers(major: int, minor: int, patch: int) -> None:
    facts = replace(FACTS, python=(major, minor, patch))
    composed = compose(facts, instance_id=INSTANCE, at=AT)
    assert composed.python_version == f"{major}.{minor}.{patch}"


@given(st.integers(10, 99_999), st.integers(0, 9_999))
def test_the_version_of_postgres_is_made_of_one_number(major: int, minor: int) -> None:
    census = replace(FACTS.census, server_version_num=major * 10_000 + minor)
    composed = compose(replace(FACTS, census=census), instance_id=INSTANCE, at=AT)
    assert composed.stack.postgres_version == f"{major}.{minor}"


@given(st.text() | st.sampled_from(["linux", "darwin", "win32", "Linux", "freebsd14"]))
def test_a_platform_that_is_not_known_by_name_is_other(name: str) -> None:
    platform = compose(replace(FACTS, platform=name), instance_id=INSTANCE, at=AT).platform
    assert platform == (name if name in {"linux", "darwin", "win32"} else "other")


@given(aware)
def test_sent_at_is_the_same_instant_in_whole_seconds_of_utc(at: datetime) -> None:
    sent_at = compose(FACTS, instance_id=INSTANCE, at=at).sent_at
    assert sent_at.endswith("+00:00")
    passed = at.astimezone(UTC) - datetime.fromisoformat(sent_at)
    assert timedelta() <= passed < timedelta(seconds=1)


@pytest.mark.parametrize("edition", get_args(Edition))
def test_the_compliance_feature_agrees_with_the_edition(edition: Edition) -> None:
    composed = compose(replace(FACTS, edition=edition), instance_id=INSTANCE, at=AT)
    assert composed.features.compliance_ee == (edition == "ee")


@given(st.uuids(), aware)
def test_the_body_is_one_line_of_ascii_in_the_order_of_the_schema(id_: UUID, at: datetime) -> None:
    body = compose(FACTS, instance_id=id_, at=at).canonical()
    assert body.isascii()
    assert body.isprintable()
    assert body == json.dumps(json.loads(body), separators=(",", ":"))
    assert list(json.loads(body)) == list(NEWEST.model_fields)


def test_the_order_in_which_a_heartbeat_is_built_does_not_change_its_body() -> None:
    tree = json.loads(EXAMPLE)
    backwards = {
        name: dict(reversed(value.items())) if isinstance(value, dict) else value
        for name, value in reversed(tree.items())
    }
    body = NEWEST.model_validate(tree).canonical()
    assert NEWEST.model_validate(backwards).canonical() == body
