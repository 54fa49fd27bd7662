"""The heartbeat: closed schemas in which raw numbers and free text cannot be built.

Pure: facts come in as arguments, one canonical line of JSON comes out.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Literal, Self, get_args
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import CoreSchema

Bucket = Literal["0", "1-10", "10-100", "100-1k", "1k-10k", "10k+"]
Edition = Literal["ce", "ee"]
Platform = Literal["linux", "darwin", "win32", "other"]

TOP_BUCKET = 10_000
"""The count at which the last bucket begins; counting stops there."""

_BUCKETS: tuple[tuple[int, Bucket], ...] = (
    (TOP_BUCKET, "10k+"),
    (1_000, "1k-10k"),
    (100, "100-1k"),
    (10, "10-100"),
    (1, "1-10"),
    (0, "0"),
)

NIL_INSTANCE = UUID(int=0)
"""The instance id in a preview before the first heartbeat."""


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
    """What a heartbeat of every schema has; its own schema is a subclass that ``SCHEMAS`` names."""

    model_config = ConfigDict(title="Heartbeat")

    telemetry_schema: int = Field(
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

    @field_validator("telemetry_schema")
    @classmethod
    def _its_own(cls, version: int) -> int:
        if SCHEMAS.get(version) is not cls:
            raise PydanticCustomError("literal_error", f"Input should be {_known()}")
        return version

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> dict[str, Any]:
        """Say which version it is, as a literal would."""
        schema = handler(core_schema)
        version = next(version for version, model in SCHEMAS.items() if model is cls)
        named = handler.resolve_ref_schema(schema)["properties"]
        named["telemetry_schema"] = {"const": version, **named["telemetry_schema"]}
        return schema

    def canonical(self) -> str:
        """Return the body: ASCII JSON on one line, fields in the order of this schema."""
        return self.model_dump_json()


class Heartbeat1(Heartbeat):
    """One heartbeat of one self-hosted ConsentOS, schema 1."""

    python_version: PythonVersion = Field(description="Version of the Python that runs this.")
    platform: Platform = Field(description="Operating system of the worker.")
    deployment: Deployment = Field(
        description="The operator's own label from CONSENTOS_DEPLOYMENT, or `unknown`."
    )
    counts: Counts
    features: Features
    stack: Stack


SCHEMAS: Mapping[int, type[Heartbeat]] = {1: Heartbeat1}
"""Every schema by its version. An old schema is never removed."""

SCHEMA_VERSION = max(SCHEMAS)
"""The schema of new heartbeats; the notice is given once for each schema."""

NEWEST = SCHEMAS[SCHEMA_VERSION]


_BEGINNING = re.compile(r'\s*{\s*"telemetry_schema"\s*:\s*([0-9]{1,9})\b', re.ASCII)


def _known() -> str:
    return " or ".join(map(str, SCHEMAS))


@dataclass(frozen=True)
class Flaw:
    """A field that its schema does not allow: its dotted name, a sentence, the kind of error."""

    field: str
    problem: str
    kind: str

    @classmethod
    def of(cls, error: ErrorDetails) -> Self:
        """Convert pydantic's error; no value of the body is copied."""
        # Field names are untrusted too, and the message of a ValueError may contain the value.
        names = (re.sub(r"[^A-Za-z0-9_]", "?", str(name))[:64] for name in error["loc"])
        problem = "Value is not possible" if error["type"] == "value_error" else error["msg"]
        return cls(".".join(names), problem[:200], error["type"])


class NotAHeartbeatError(ValueError):
    """A body matches no schema; the sentence and the flaws contain no value of it."""

    def __init__(
        self, sentence: str, flaws: Iterable[Flaw] = (), *, version: int | None = None
    ) -> None:
        """Store the ``sentence``, and the ``flaws`` against schema ``version``, if any."""
        super().__init__(sentence)
        self.flaws = [*flaws]
        self.version = version


class UnknownSchemaError(NotAHeartbeatError):
    """The ``telemetry_schema`` of a body is not in ``SCHEMAS``."""


class NewerSchemaError(UnknownSchemaError):
    """The ``telemetry_schema`` of a body is newer than any in ``SCHEMAS``."""


def parse(body: str | bytes) -> Heartbeat:
    """Parse a body by the schema that it names.

    Raises:
        NewerSchemaError: the body names a newer schema than these.
        UnknownSchemaError: it names another unknown number, or not a number.
        NotAHeartbeatError: it is not UTF-8, is not a JSON object, has a field twice, or does not
            match its schema.
    """
    try:
        text = body if isinstance(body, str) else body.decode()
    except UnicodeDecodeError:
        raise NotAHeartbeatError("The body is not UTF-8.") from None
    return _parse_at_once(text) or _parse_in_steps(text)


def _parse_at_once(text: str) -> Heartbeat | None:
    """Return the heartbeat if it begins with its schema's version and has no field twice."""
    begun = _BEGINNING.match(text)
    model = SCHEMAS.get(int(begun[1])) if begun else None
    if model is None or text.count('"') != _quotes(model):
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError:
        return None  # _parse_in_steps finds the reason


@cache
def _quotes(model: type[BaseModel]) -> int | None:
    """Return how many quotes a body of ``model`` has; one with a field twice has more.

    None if the number varies: a field is optional, or may be a string or something else.
    """
    count = 0
    for field in model.model_fields.values():
        values = get_args(field.annotation)  # of a Literal
        kinds: set[Any] = {type(each) for each in values} or {field.annotation}
        inner = _quotes_of_value(kinds.pop())
        if inner is None or kinds or not field.is_required():
            return None
        count += 2 + inner
    return count


def _quotes_of_value(kind: type[Any]) -> int | None:
    if kind in {bool, int}:
        return 0
    if kind is str:
        return 2
    return _quotes(kind) if issubclass(kind, BaseModel) else None


def _parse_in_steps(text: str) -> Heartbeat:
    try:
        tree = json.loads(text, object_pairs_hook=_without_twins)
    except _TwinsError:
        raise NotAHeartbeatError("The body names a field twice.") from None
    except (ValueError, RecursionError):
        tree = None  # the model reports the error
    named = isinstance(tree, dict) and "telemetry_schema" in tree
    version = tree["telemetry_schema"] if named else None
    model = SCHEMAS.get(version) if type(version) is int else None
    try:
        heartbeat = (model or NEWEST).model_validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise _refusal(version, named=named)(
            f"This is not a heartbeat of telemetry_schema {_known()}.",
            map(Flaw.of, found),
            version=version if type(version) is int else None,
        ) from None
    if tree is None:  # pydantic accepts numbers that are too long for Python
        raise NotAHeartbeatError("The body cannot be read.")
    return heartbeat


def _refusal(version: object, *, named: bool) -> type[NotAHeartbeatError]:
    match version:
        case bool():
            return UnknownSchemaError
        case int():
            known, newer = version in SCHEMAS, version > SCHEMA_VERSION
            unknown = NewerSchemaError if newer else UnknownSchemaError
            return NotAHeartbeatError if known else unknown
    return UnknownSchemaError if named else NotAHeartbeatError


class _TwinsError(ValueError):
    """An object has a field twice: JSON readers differ in which of the two they use."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwinsError
    return found


def canonical(values: Mapping[str, Any]) -> str:
    """Return stored values as the body that was received; if no schema matches, as plain JSON."""
    text = json.dumps(values, separators=(",", ":"))
    try:
        return parse(text).canonical()
    except NotAHeartbeatError:
        return text


def fault(body: str) -> str | None:
    """Return why ``body`` does not match the schema that it names, or None if it does.

    The sentence contains no value of the body.
    """
    try:
        written = parse(body).canonical()
    except UnknownSchemaError:
        return "its body has an unknown telemetry_schema"
    except NotAHeartbeatError as error:
        if error.version:
            first = error.flaws[0]
            where = first.field or "it"
            return f"its body does not match schema {error.version}: {where} ({first.kind})"
        if error.flaws:
            return "its body is not a JSON object with a telemetry_schema"
        written = ""  # it has a field twice
    return None if body == written else "its body is not in canonical form"


def flat(body: str) -> dict[str, Any]:
    """Return a body's values by dotted name, in its order; an empty dict if it is not an object."""
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
    """The counts of ConsentOS's database, already in buckets: no raw count is stored."""

    counts: Counts
    tcf_v22_sites: Bucket
    auto_blocking_sites: Bucket
    scanner_scheduled_sites: Bucket
    server_version_num: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything in a heartbeat except the instance id and the time."""

    census: Census
    version: str
    edition: Edition
    deployment: str
    python: tuple[int, int, int]
    platform: str
    geoip_header_configured: bool
    geoip_maxmind_configured: bool
    rate_limit_enabled: bool


def compose(facts: Facts, *, instance_id: UUID, at: datetime) -> Heartbeat1:
    """Compose the heartbeat of ``instance_id``, written ``at`` (an aware time).

    Raises:
        pydantic.ValidationError: a fact does not fit the schema.
    """
    census = facts.census
    return Heartbeat1(
        telemetry_schema=SCHEMA_VERSION,
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


def json_schema(model: type[Heartbeat] = NEWEST) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a heartbeat."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(),
    }


def fields(model: type[BaseModel] = NEWEST, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield each field's dotted name and definition, in the order of the body."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def all_fields() -> dict[str, FieldInfo]:
    """Return the fields of all schemas by their dotted names: the newest's, then the older ones'.

    A name means the same in every schema that has it.
    """
    found: dict[str, FieldInfo] = {}
    for _, model in sorted(SCHEMAS.items(), reverse=True):
        found = {**found, **{name: field for name, field in fields(model) if name not in found}}
    return found
