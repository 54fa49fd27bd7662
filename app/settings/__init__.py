"""The environment, read once at the edge of a process into frozen settings.

A wrong value of a telemetry variable never raises: it is replaced by its default and stored as a
problem. A problem with a variable that decides whether, where, when or what is sent means off. No
message contains a value: it may be a secret or the operator's own text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from importlib.util import find_spec
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.settings import proxy as proxies
from app.settings.proxy import Choice
from app.settings.urls import Endpoint, Postgres, PostgresUrl, RedisUrl, is_loopback
from app.settings.words import WRONG, Boolean, Lower, Upper, word

DEFAULT_ENDPOINT = "https://telemetry.consentos.dev/v1/heartbeat"
QUIET_ENVIRONMENTS = frozenset({"development", "dev", "local", "test", ""})
PLAIN_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class SettingsError(Exception):
    """A variable that the process needs is missing or wrong."""


@dataclass(frozen=True)
class Enabled:
    """Telemetry is on."""


@dataclass(frozen=True)
class Disabled:
    """Telemetry is off; ``reason`` is a sentence that contains no value."""

    reason: str


class Environment(BaseSettings):
    """Variables by their exact upper-case names; no ``.env`` file is read."""

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
        """Read the environment; a wrong value is replaced by its default and becomes a problem."""
        try:
            return cls()
        except ValidationError as error:
            problems = {str(e["loc"][0]): _sentence(e["type"], e["msg"]) for e in error.errors()}
        defaults = {name.upper(): field.default for name, field in cls.model_fields.items()}
        settings = cls(**{name: defaults[name] for name in problems})
        settings._problems = problems
        return settings

    def refuse_what_is_wrong(self) -> None:
        """Refuse to work with a default in place of a wrong value.

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
    """Return what is wrong; pydantic's words are used only where they cannot contain the value."""
    if kind == WRONG:
        return message
    match kind:
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return message.replace("Input should", "must")
        case "literal_error":
            return message.replace("Input should", "must")
        case _:
            number = "_parsing" in kind or kind == "finite_number"
            return "must be a number" if number else "is not valid"


class Settings(Environment):
    """The variables of the pipeline, the workers and the operator's commands."""

    database_url: PostgresUrl | None = None
    migration_database_url: PostgresUrl | None = None
    redis_url: RedisUrl | None = None
    telemetry_enabled: Boolean = True
    do_not_track: str = ""
    environment: str = "development"
    # Its query may contain a token, so it is not shown.
    telemetry_endpoint: Endpoint = Field(default=DEFAULT_ENDPOINT, repr=False)
    telemetry_timeout_seconds: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 10.0
    telemetry_spread_seconds: Annotated[int, Field(ge=0, le=3600)] = 900
    telemetry_retention_days: Annotated[int, Field(ge=0, le=36_500)] = 365
    consentos_deployment: Annotated[
        str, word(r"[a-z0-9][a-z0-9-]{0,31}", "1 to 32 of a-z, 0-9 and -")
    ] = "unknown"
    consentos_edition: Annotated[Literal["ce", "ee"], Lower] | None = None
    app_version: Annotated[
        str,
        # ConsentOS's git tags begin with a v.
        BeforeValidator(lambda value: str(value).removeprefix("v")),
        word(
            r"\d{1,5}\.\d{1,5}\.\d{1,5}(-dev|-(alpha|beta|rc)\.\d{1,5})?",
            "N.N.N, optionally with -dev, -alpha.N, -beta.N or -rc.N",
        ),
    ] = "0.0.0-dev"
    geoip_country_header: str = ""
    geoip_maxmind_db_path: str = ""
    rate_limit_enabled: Boolean = True
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Upper] = "INFO"

    _proxies: Mapping[str, str] = PrivateAttr(default_factory=lambda: proxies.variables(os.environ))
    _misspelt: tuple[str, ...] = PrivateAttr(default_factory=lambda: tuple(_misspelt(os.environ)))

    def require_admin(self) -> str:
        """Return the database URL for commands that need more rights than the pipeline has.

        Raises:
            SettingsError: MIGRATION_DATABASE_URL is wrong, or neither it nor DATABASE_URL is set.
        """
        given = "migration_database_url" in self.model_fields_set
        return self.require("migration_database_url" if given else "database_url")

    def require_endpoint(self) -> str:
        """Return the endpoint for a request that an operator makes, whether telemetry is on or off.

        Raises:
            SettingsError: TELEMETRY_ENDPOINT is wrong, or a variable looks like a misspelt
                TELEMETRY_ENDPOINT: the default would be the wrong receiver.
        """
        if problem := self._problems.get("TELEMETRY_ENDPOINT"):
            raise SettingsError(f"TELEMETRY_ENDPOINT {problem}.")
        for unknown in self._misspelt:
            if "TELEMETRY_ENDPOINT" in unknown:
                raise SettingsError(f"{unknown}.")
        return self.telemetry_endpoint

    @property
    def gate(self) -> Enabled | Disabled:
        """Whether telemetry is on; anything that cannot be parsed means off."""
        reasons = list(self._reasons_for_off())
        return Disabled("; ".join(reasons)) if reasons else Enabled()

    def _reasons_for_off(self) -> Iterator[str]:
        if not self.telemetry_enabled:
            yield "TELEMETRY_ENABLED is false"
        if self.do_not_track.lower() not in {"", "0", "false"}:
            yield "DO_NOT_TRACK is set"
        if "environment" not in self.model_fields_set:
            yield "ENVIRONMENT is not set, which means development"
        elif self.environment.strip().lower() in QUIET_ENVIRONMENTS:
            yield "ENVIRONMENT is empty or a development one"
        elif not PLAIN_WORD.fullmatch(self.environment):
            yield "ENVIRONMENT must be one plain word, without quotes, spaces or a comment"
        for variable, problem in self._problems.items():
            if variable not in _FALLBACKS and variable not in _CONNECTIONS:
                yield f"{variable} {problem}"
        yield from self._misspelt

    @property
    def warnings(self) -> tuple[str, ...]:
        """Problems that the operator should fix, but that do not turn telemetry off."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        for variable, instead in _FALLBACKS.items():
            if variable in self._problems:
                yield f"{variable} {self._problems[variable]}; {instead} instead"
        if "app_version" not in self.model_fields_set:
            yield "APP_VERSION is not set, so 0.0.0-dev is sent: set it to ConsentOS's version"
        url = urlsplit(self.telemetry_endpoint)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            yield "TELEMETRY_ENDPOINT uses plain http: anyone on the network path can read it"
        yield from self._proxy.warnings

    @property
    def proxy(self) -> str | None:
        """The URL of the proxy for a POST, or None; it may contain a password."""
        return self._proxy.url

    @property
    def _proxy(self) -> Choice:
        return proxies.choose(self._proxies, self.telemetry_endpoint)

    @property
    def namespace(self) -> str:
        """The prefix of this install's keys in Redis: different for each database and schema.

        Raises:
            SettingsError: DATABASE_URL is wrong or not set.
        """
        database = Postgres.read(self.require("database_url")).identity
        return f"consentos-telemetry-{sha256(database.encode()).hexdigest()[:8]}"

    @property
    def endpoint_without_query(self) -> str:
        """The endpoint to show and store: its query may contain a token."""
        return urlunsplit((*urlsplit(self.telemetry_endpoint)[:3], "", ""))

    @property
    def edition(self) -> Literal["ce", "ee"]:
        """The edition that is set, or ``ee`` if ConsentOS's package ``ee`` can be imported."""
        return self.consentos_edition or ("ee" if find_spec("ee") else "ce")


_CONNECTIONS = frozenset({"DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL"})
_FALLBACKS = {
    "CONSENTOS_DEPLOYMENT": "unknown is sent",
    "CONSENTOS_EDITION": "the detected edition is sent",
    "APP_VERSION": "0.0.0-dev is sent",
    "LOG_LEVEL": "INFO is used",
}
_VARIABLES = frozenset(name.upper() for name in Settings.model_fields)
_SWITCHES = tuple(name for name in _VARIABLES if name.startswith(("TELEMETRY_", "DO_NOT_")))


def _misspelt(names: Iterable[str]) -> Iterator[str]:
    """Yield a reason for each name that looks like a telemetry variable but is not one.

    A misspelt TELEMETRY_ENDPIONT must not send to the default endpoint, and a misspelt
    TELEMTRY_ENABLED must not leave telemetry on.
    """
    for name in sorted(set(names) - _VARIABLES):
        near = get_close_matches(name.upper(), _SWITCHES, n=1, cutoff=0.85)
        if near or name.upper().startswith("TELEMETRY_"):
            shown = re.sub(r"[^A-Za-z0-9_]", "?", name)[:64]
            hint = get_close_matches(name.upper(), _SWITCHES, n=1, cutoff=0.0)
            yield f"{shown} is not a telemetry variable (did you mean {hint[0]}?)"
