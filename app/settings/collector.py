"""The collector's environment variables."""

from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from app.settings import Environment
from app.settings.urls import LAST_PORT, PostgresUrl
from app.settings.words import wrong

LEAST_RETENTION_DAYS = 32
"""The shortest retention: an install counts as lost after 30 silent days, and must be stored until
the day after that."""


def _retention(days: int) -> int:
    if 0 < days < LEAST_RETENTION_DAYS:
        raise wrong(f"must be 0, to keep all, or {LEAST_RETENTION_DAYS} or more")
    return days


LEAST_TOKEN = 16


def _token(value: SecretStr) -> SecretStr:
    if not value.get_secret_value():
        raise wrong("is empty: set a token, or unset the variable")
    if len(value.get_secret_value()) < LEAST_TOKEN:
        raise wrong(f"must have at least {LEAST_TOKEN} characters")
    return value


class CollectorSettings(Environment):
    """The collector's variables."""

    collector_database_url: PostgresUrl | None = None
    collector_read_database_url: PostgresUrl | None = None
    collector_retention_days: Annotated[int, Field(ge=0, le=36_500), AfterValidator(_retention)] = (
        400
    )
    collector_established_days: Annotated[int, Field(ge=1, le=30)] = 3
    collector_client_rate: Annotated[int, Field(ge=0, le=1_000_000)] = 60
    collector_client_installs: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    collector_metrics_port: Annotated[int, Field(ge=1, le=LAST_PORT)] | None = None
    collector_token: Annotated[SecretStr, AfterValidator(_token)] | None = None
    port: Annotated[int, Field(ge=1, le=LAST_PORT)] = 8000

    @property
    def standby(self) -> str | None:
        """The URL of the standby that the page is read from, if there is one."""
        url = self.collector_read_database_url
        if url is None or url == self.collector_database_url:
            return None
        return url.get_secret_value()
