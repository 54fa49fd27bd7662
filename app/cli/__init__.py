"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

from app.cli import (
    doing,  # noqa: F401 - adds its commands
    looking,  # noqa: F401 - adds its commands
)
from app.cli.entry import main

__all__ = ["main"]
