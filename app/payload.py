"""The heartbeat: a closed schema in which raw numbers and free text cannot be built.

Pure: facts come in as arguments, one canonical line of JSON comes out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

SCHEMA_VERSION = 1
"""The schema of this module's ``Heartbeat``; the notice is given once for each."""

Bucket = Literal["0", "1-10", "10-100", "100-1k", "1k-10k", "10k+"]
Edition = Literal["ce", "ee"]
Platform = Literal["linux", "darwin", "win32", "other"]

TOP_BUCKET = 10_000
"""The count at which the last bucket begins; nothing needs to be counted further."""

_BUCKETS: tuple[tuple[int, Bucket], ...] = (
    (TOP_BUCKET, "10k+"),
    (1_000, "1k-10k"),
    (100, "100-1k"),
    (10, "10-100"),
    (1, "1-10"),
    (0, "0"),
)

NIL_INSTANCE = UUID(int=0)
"""Stands for the instance in a preview where none exists yet."""


def bucket(count: int) -> Bucket:
    """Return the half-open bucket that holds ``count``: 10 is in ``10-100``.

    Raises:
        ValueError: ``count`` is negative.
    """
    for lower, name in _BUCKETS:
        if count >= lower:
            return name
    raise ValueError("a count is never negative")


def _only(kind: type) -> BeforeValidator:
    """Refuse what merely equals a literal: to Python, 1 is 1.0 is true."""

    def check(value: object) -> object:
        if type(value) is not kind:
            raise PydanticCustomError("type", "Input is of the wrong type")
        return value

    return BeforeValidator(check)


def _instant(value: str) -> str:
    datetime.fromisoformat(value)
    return value


# Rust's `[0-9]`, never `\d`, which would let other scripts' digits through.
InstanceId = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
]
SentAt = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00$"),
    AfterValidator(_instant),
]
Version = Annotated[
    str,
    StringConstraints(
        pattern=r"^[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}(-dev|-(alpha|beta|rc)\.[0-9]{1,5})?$"
    ),
]
PythonVersion = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}$")]
PostgresVersion = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,5}\.[0-9]{1,5}$")]
Deployment = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Counts(_Closed):
    """How much the install holds, in buckets."""

    orgs: Bucket = Field(description="Organisations that are not deleted.")
    sites: Bucket = Field(description="Sites that are not deleted.")
    users: Bucket = Field(description="Users that are not deleted.")
    scans_last_24h: Bucket = Field(description="Cookie scans created in the last 24 hours.")
    consents_last_24h: Bucket = Field(description="Consents recorded in the last 24 hours.")


class Features(_Closed):
    """Which features are in use: booleans are exact, counts are in buckets."""

    tcf_v22_sites: Bucket = Field(
        description="Live sites whose configuration, inherited or own, enables TCF 2.2."
    )
    auto_blocking_sites: Bucket = Field(
        description="Live sites whose configuration, inherited or own, blocks until opt-in."
    )
    scanner_scheduled_sites: Bucket = Field(
        description="Live sites that have a scan schedule of their own."
    )
    geoip_header_configured: bool = Field(
        description="Whether GEOIP_COUNTRY_HEADER is set; never its value."
    )
    geoip_maxmind_configured: bool = Field(
        description="Whether GEOIP_MAXMIND_DB_PATH is set; never its value."
    )
    rate_limit_enabled: bool = Field(description="The flag RATE_LIMIT_ENABLED.")
    compliance_ee: bool = Field(description="Whether the edition is `ee`.")


class Stack(_Closed):
    """What the install runs on."""

    postgres_version: PostgresVersion = Field(
        description="Major and minor version of the Postgres server, from two numbers."
    )
    redis_present: Annotated[Literal[True], _only(bool)] = Field(
        description="Always true: the worker and the scheduler need Redis to run."
    )


class Heartbeat(_Closed):
    """One heartbeat of one self-hosted ConsentOS, schema 1."""

    telemetry_schema: Annotated[Literal[1], _only(int)] = Field(
        description="Version of this schema, raised by a breaking change."
    )
    instance_id: InstanceId = Field(
        description="Random UUID made on this install; it names the install, never a person."
    )
    sent_at: SentAt = Field(
        description="When the heartbeat was written into the outbox, in UTC and whole seconds."
    )
    version: Version = Field(description="Version of ConsentOS, from APP_VERSION.")
    edition: Edition = Field(description="Community (`ce`) or enterprise (`ee`) edition.")
    python_version: PythonVersion = Field(description="Version of the Python that runs this.")
    platform: Platform = Field(description="Operating system of the worker.")
    deployment: Deployment = Field(
        description="The operator's own label from CONSENTOS_DEPLOYMENT, or `unknown`."
    )
    counts: Counts
    features: Features
    stack: Stack

    def canonical(self) -> str:
        """Return the body: ASCII JSON on one line, fields in the order of this schema."""
        return self.model_dump_json()


SCHEMAS: Mapping[int, type[BaseModel]] = {1: Heartbeat}
"""Every schema that a stored body may have: one that is superseded stays, to read old rows by."""


def fault(body: str) -> str | None:
    """Return what keeps ``body`` from being one that its schema allows, or None where nothing does.

    The schema is that of the version which the body names; no value of the body is repeated.
    """
    try:
        version = json.loads(body)["telemetry_schema"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "its body is no JSON object that names a telemetry_schema"
    model = SCHEMAS.get(version) if type(version) is int else None
    if model is None:
        return "its body names a telemetry_schema that is unknown here"
    try:
        canonical = model.model_validate_json(body).model_dump_json()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # A field's name comes from the body as well.
        names = (re.sub(r"[^A-Za-z0-9_]", "?", str(name))[:64] for name in first["loc"])
        where = ".".join(names) or "it"
        return f"its body is not of schema {version}: {where} ({first['type']})"
    return None if body == canonical else "its body is not written in the canonical form"


def flat(body: str) -> dict[str, Any]:
    """Return a body's values by their dotted names, in its order; nothing of what is no object."""
    value = json.loads(body)
    return dict(_flat(value, "")) if isinstance(value, dict) else {}


def _flat(part: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True, kw_only=True)
class Census:
    """What ConsentOS's database says, already in buckets: no raw count is kept."""

    counts: Counts
    tcf_v22_sites: Bucket
    auto_blocking_sites: Bucket
    scanner_scheduled_sites: Bucket
    server_version_num: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a heartbeat is composed of, but for whose it is and when it is written."""

    census: Census
    version: str
    edition: Edition
    deployment: str
    python: tuple[int, int, int]
    platform: str
    geoip_header_configured: bool
    geoip_maxmind_configured: bool
    rate_limit_enabled: bool


def compose(facts: Facts, *, instance_id: UUID, at: datetime) -> Heartbeat:
    """Compose the heartbeat of ``instance_id``, written ``at`` (an aware time).

    Raises:
        pydantic.ValidationError: a fact does not fit the schema.
    """
    census = facts.census
    return Heartbeat(
        telemetry_schema=1,
        instance_id=str(instance_id),
        sent_at=at.astimezone(UTC).isoformat(timespec="seconds"),
        version=facts.version,
        edition=facts.edition,
        python_version=_dotted(*facts.python),
        platform=_platform(facts.platform),
        deployment=facts.deployment,
        counts=census.counts,
        features=Features(
            tcf_v22_sites=census.tcf_v22_sites,
            auto_blocking_sites=census.auto_blocking_sites,
            scanner_scheduled_sites=census.scanner_scheduled_sites,
            geoip_header_configured=facts.geoip_header_configured,
            geoip_maxmind_configured=facts.geoip_maxmind_configured,
            rate_limit_enabled=facts.rate_limit_enabled,
            compliance_ee=facts.edition == "ee",
        ),
        stack=Stack(
            # Since Postgres 10 the number is major * 10000 + minor.
            postgres_version=_dotted(*divmod(census.server_version_num, 10_000)),
            redis_present=True,
        ),
    )


def _dotted(*numbers: int) -> str:
    return ".".join(str(number) for number in numbers)


def _platform(name: str) -> Platform:
    match name:
        case "linux" | "darwin" | "win32":
            return name
    return "other"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the heartbeat."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Heartbeat.model_json_schema(),
    }


def fields(model: type[BaseModel] = Heartbeat, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the meaning of every field, in the order of the body."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""
