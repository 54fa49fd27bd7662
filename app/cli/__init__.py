"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

import sys

try:
    from app.cli import (  # noqa: F401 - each module registers its commands on import
        audit,
        identity,
        preview,
        send,
        status,
        tables,
    )
    from app.cli.entry import main
except KeyboardInterrupt:  # the libraries take a second to load
    sys.stderr.write("consentos-telemetry: Interrupted.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
