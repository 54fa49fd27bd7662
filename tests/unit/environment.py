"""Settings as a process would read them that was started with these variables."""

import pytest

from app.settings import Disabled, Settings

MARKER = "7731"
"""Stands in every wrong value, and must stand in nothing that is reported about it."""


RELEASED = {"ENVIRONMENT": "production", "APP_VERSION": "1.2.3"}


def load(**variables: str | None) -> Settings:
    """Read the environment with ``variables`` (None is not set), beside those of a release."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**RELEASED, **variables}.items():
            if value is not None:
                patch.setenv(name, value)
        return Settings.load()


def reason(settings: Settings) -> str | None:
    """Return why telemetry is off, or None where it is on."""
    return settings.gate.reason if isinstance(settings.gate, Disabled) else None


def reported(settings: Settings) -> str:
    """Return all that these settings say to an operator or to a developer."""
    return "\n".join([repr(settings), str(settings), repr(settings.gate), *settings.warnings])
