"""The environment, read once at the edge of a process into frozen settings.

A wrong value never raises where only telemetry is concerned: it is replaced by its default and told
as a problem, and a problem with anything that decides whether, where, when or what is sent means
off. No message repeats a value: it may be a secret or the operator's own text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Annotated, Literal, Self
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_ENDPOINT = "https://telemetry.consentos.dev/v1/heartbeat"
LAST_PORT = 65_535
QUIET_ENVIRONMENTS = frozenset({"development", "dev", "local", "test", ""})


class SettingsError(Exception):
    """A variable that the process cannot work without is missing or wrong."""


@dataclass(frozen=True)
class Enabled:
    """Telemetry is on."""


@dataclass(frozen=True)
class Disabled:
    """Telemetry is off, for ``reason``: a sentence without any of the operator's values."""

    reason: str


def _wrong(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("setting", "{sentence}", {"sentence": sentence})


def _boolean(value: object) -> bool:
    match str(value).lower():
        case "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
    raise _wrong("must be true or false (1/0, yes/no and on/off will do)")


def _split(url: str) -> SplitResult:
    """Split a URL whose port is a number; the library's own errors repeat parts of the value."""
    try:
        parts = urlsplit(url)
        usable = parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise _wrong("is not a URL that can be understood")
    return parts


_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,2048}")
# A name whose last label is a number is an address, or nothing (WHATWG URL, "ends in a number").
_HOST_NAME = re.compile(
    r"(?=.{1,253}$)(?!.*(?:^|\.)[0-9]+\.?$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _endpoint(value: str) -> str:
    if not _URL_CHARACTERS.fullmatch(value):
        raise _wrong("must be a URL of at most 2048 plain ASCII characters, without spaces")
    url = _split(value)
    if url.scheme not in {"http", "https"}:
        raise _wrong("must begin with https:// or http://")
    if "@" in url.netloc:
        raise _wrong("must not carry a user name or a password")
    host = url.hostname or ""
    if not (_HOST_NAME.fullmatch(host) or _is_address(host)):
        raise _wrong("must name a host")
    return value


# The password may hold anything but "@", as SQLAlchemy and so ConsentOS read it.
_POSTGRES_URL = re.compile(
    r"(?:postgres|postgresql|postgresql\+asyncpg|postgresql\+psycopg)://"
    r"(?P<login>[^@]*@)?"
    r"(?P<place>(?:\[[0-9a-fA-F:.]+\]|[^/:\[\]?]*)(?::(?P<port>[0-9]{1,5}))?(?:/[^?]*)?)"
    r"(?:\?(?P<query>.*))?"
)
_ASYNCPG_ONLY = frozenset(
    {
        "async_fallback",
        "command_timeout",
        "direct_tls",
        "max_cacheable_statement_size",
        "max_cached_statement_lifetime",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "statement_cache_size",
        "timeout",
    }
)


def _postgres_url(value: SecretStr) -> SecretStr:
    """Turn every spelling that ConsentOS and Procfile platforms use into SQLAlchemy's psycopg."""
    url = _POSTGRES_URL.fullmatch(value.get_secret_value())
    if not url or int(url["port"] or 0) > LAST_PORT:
        raise _wrong("must be a URL like postgresql://user:password@host:5432/database")
    query = [
        # asyncpg says `ssl` where libpq says `sslmode`, with the same words but for `true`.
        ("sslmode", "require" if word == "true" else word) if name == "ssl" else (name, word)
        for name, word in parse_qsl(url["query"] or "", keep_blank_values=True)
        if name not in _ASYNCPG_ONLY
    ]
    words = f"?{urlencode(query)}" if query else ""
    return SecretStr(f"postgresql+psycopg://{url['login'] or ''}{url['place']}{words}")


def _redis_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    if not url.startswith(("redis://", "rediss://")):
        raise _wrong("must begin with redis:// or rediss://")
    _split(url)
    return value


def _word(pattern: str, form: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise _wrong(f"must be {form}")
        return value

    return AfterValidator(check)


Boolean = Annotated[bool, BeforeValidator(_boolean)]
PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
Upper = BeforeValidator(lambda value: str(value).upper())
Lower = BeforeValidator(lambda value: str(value).lower())


class Environment(BaseSettings):
    """Variables by their exact, upper-case names; no ``.env`` file is read."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        case_sensitive=True,
        alias_generator=str.upper,
        hide_input_in_errors=True,
    )

    _problems: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls) -> Self:
        """Read the environment; a wrong value is replaced by its default and told as a problem."""
        try:
            return cls()
        except ValidationError as error:
            problems = {str(e["loc"][0]): _sentence(e["type"], e["msg"]) for e in error.errors()}
        defaults = {name.upper(): field.default for name, field in cls.model_fields.items()}
        settings = cls(**{name: defaults[name] for name in problems})
        settings._problems = problems
        return settings

    def refuse_what_is_wrong(self) -> None:
        """Refuse to work by a default where another value was meant.

        Raises:
            SettingsError: a variable has a wrong value.
        """
        for variable, problem in self._problems.items():
            raise SettingsError(f"{variable} {problem}.")

    def require(self, name: str) -> str:
        """Return the URL in the field ``name``.

        Raises:
            SettingsError: the variable is not set, or is not a URL of its kind.
        """
        variable = name.upper()
        if problem := self._problems.get(variable):
            raise SettingsError(f"{variable} {problem}.")
        value: SecretStr | None = getattr(self, name)
        if value is None:
            raise SettingsError(f"{variable} is not set.")
        return value.get_secret_value()


def _sentence(kind: str, message: str) -> str:
    """Say what is wrong; pydantic's own words serve only where they cannot repeat the value."""
    match kind:
        case "setting":
            return message
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return message.replace("Input should", "must")
        case "literal_error":
            return message.replace("Input should", "must")
        case _:
            number = "_parsing" in kind or kind == "finite_number"
            return "must be a number" if number else "cannot be understood"


class Settings(Environment):
    """What the pipeline, the workers and the operator's commands read from the environment."""

    database_url: PostgresUrl | None = None
    migration_database_url: PostgresUrl | None = None
    redis_url: RedisUrl | None = None
    telemetry_enabled: Boolean = True
    do_not_track: str = ""
    environment: str = "development"
    # Its query may carry a token, so it is not shown.
    telemetry_endpoint: Annotated[str, AfterValidator(_endpoint)] = Field(
        default=DEFAULT_ENDPOINT, repr=False
    )
    telemetry_timeout_seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 10.0
    telemetry_spread_seconds: Annotated[int, Field(ge=0, le=3600)] = 900
    telemetry_retention_days: Annotated[int, Field(ge=0, le=36_500)] = 365
    consentos_deployment: Annotated[
        str, _word(r"[a-z0-9][a-z0-9-]{0,31}", "1 to 32 of a-z, 0-9 and -")
    ] = "unknown"
    consentos_edition: Annotated[Literal["ce", "ee"], Lower] | None = None
    app_version: Annotated[
        str,
        _word(
            r"\d{1,5}\.\d{1,5}\.\d{1,5}(-dev|-(alpha|beta|rc)\.\d{1,5})?",
            "N.N.N, optionally with -dev, -alpha.N, -beta.N or -rc.N",
        ),
    ] = "0.0.0-dev"
    geoip_country_header: str = ""
    geoip_maxmind_db_path: str = ""
    rate_limit_enabled: Boolean = True
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Upper] = "INFO"

    _misspelt: tuple[str, ...] = PrivateAttr(default_factory=lambda: tuple(_misspelt(os.environ)))

    def require_admin(self) -> str:
        """Return the database's URL for what needs more rights than the pipeline has.

        Raises:
            SettingsError: MIGRATION_DATABASE_URL is wrong; or not set, and DATABASE_URL neither.
        """
        given = "migration_database_url" in self.model_fields_set
        return self.require("migration_database_url" if given else "database_url")

    @property
    def gate(self) -> Enabled | Disabled:
        """Whether telemetry is on; whatever cannot be understood means off."""
        reasons = list(self._reasons_for_off())
        return Disabled("; ".join(reasons)) if reasons else Enabled()

    def _reasons_for_off(self) -> Iterator[str]:
        if not self.telemetry_enabled:
            yield "TELEMETRY_ENABLED is false"
        if self.do_not_track.lower() not in {"", "0", "false"}:
            yield "DO_NOT_TRACK is set"
        if self.environment.strip().lower() in QUIET_ENVIRONMENTS:
            given = "environment" in self.model_fields_set
            kind = "names a development one" if given else "is not set, which means development"
            yield f"ENVIRONMENT {kind}"
        for variable, problem in self._problems.items():
            if variable not in _FALLBACKS and variable not in _CONNECTIONS:
                yield f"{variable} {problem}"
        yield from self._misspelt

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know although telemetry can work."""
        fallbacks = tuple(
            f"{variable} {self._problems[variable]}; {instead} instead"
            for variable, instead in _FALLBACKS.items()
            if variable in self._problems
        )
        url = urlsplit(self.telemetry_endpoint)
        if url.scheme == "http" and not _is_loopback(url.hostname or ""):
            return (*fallbacks, "TELEMETRY_ENDPOINT is plain http: anyone on the way can read it")
        return fallbacks

    @property
    def endpoint_without_query(self) -> str:
        """The endpoint as it may be shown and stored: a query may carry a token."""
        return urlunsplit((*urlsplit(self.telemetry_endpoint)[:3], "", ""))

    @property
    def edition(self) -> Literal["ce", "ee"]:
        """The edition given, or ``ee`` where ConsentOS's package ``ee`` can be found."""
        return self.consentos_edition or ("ee" if find_spec("ee") else "ce")


_CONNECTIONS = frozenset({"DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL"})
_FALLBACKS = {
    "CONSENTOS_DEPLOYMENT": "unknown is sent",
    "CONSENTOS_EDITION": "the edition found is sent",
    "APP_VERSION": "0.0.0-dev is sent",
    "LOG_LEVEL": "INFO is used",
}
_VARIABLES = frozenset(name.upper() for name in Settings.model_fields)
_SWITCHES = tuple(name for name in _VARIABLES if name.startswith(("TELEMETRY_", "DO_NOT_")))


def _misspelt(names: Iterable[str]) -> Iterator[str]:
    """Yield a reason for each name that was meant for telemetry and is none of its variables.

    A misspelt TELEMETRY_ENDPIONT must not send to the default, nor a misspelt TELEMTRY_ENABLED
    leave telemetry on.
    """
    for name in sorted(set(names) - _VARIABLES):
        near = get_close_matches(name.upper(), _SWITCHES, n=1, cutoff=0.85)
        if near or name.upper().startswith("TELEMETRY_"):
            shown = re.sub(r"[^A-Za-z0-9_]", "?", name)[:64]
            hint = get_close_matches(name.upper(), _SWITCHES, n=1, cutoff=0.0)
            yield f"{shown} is not a variable of telemetry (did you mean {hint[0]}?)"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


LEAST_RETENTION_DAYS = 32
"""An install is counted as lost on the day on which it has been silent for 30: until the day after
that one it must not be deleted."""


def _retention(days: int) -> int:
    if 0 < days < LEAST_RETENTION_DAYS:
        raise _wrong(f"must be 0, which keeps all, or {LEAST_RETENTION_DAYS} or more")
    return days


def _token(value: SecretStr) -> SecretStr:
    if not value.get_secret_value():
        raise _wrong("is empty: set one, or take the variable away")
    return value


class CollectorSettings(Environment):
    """What the collector reads from the environment."""

    collector_database_url: PostgresUrl | None = None
    collector_retention_days: Annotated[int, Field(ge=0, le=36_500), AfterValidator(_retention)] = (
        400
    )
    collector_client_rate: Annotated[int, Field(ge=0, le=1_000_000)] = 60
    collector_token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
