"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

from app.cli import (
    actions,  # noqa: F401 - adds its commands
    questions,  # noqa: F401 - adds its commands
)
from app.cli.entry import main

__all__ = ["main"]
