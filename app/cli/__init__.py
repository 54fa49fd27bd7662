"""The operator's commands: ``consentos-telemetry``, and ``python -m app``."""

import sys

try:
    # Each module registers its commands on import; `--help` lists them in this order.
    from app.cli import status, audit, preview, send, identity, tables  # noqa: F401, I001 - as above
    from app.cli.entry import main
except KeyboardInterrupt:  # the libraries take a second to load
    sys.stderr.write("consentos-telemetry: Interrupted.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
