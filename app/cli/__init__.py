"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

import sys

try:
    from app.cli import (
        actions,  # noqa: F401 - adds its commands
        questions,  # noqa: F401 - adds its commands
    )
    from app.cli.entry import main
except KeyboardInterrupt:  # the libraries take a second to load
    sys.stderr.write("consentos-telemetry: Interrupted.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
