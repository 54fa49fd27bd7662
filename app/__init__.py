"""ConsentOS telemetry: one heartbeat a day, through an outbox its operator can read."""

__version__ = "0.1.0"
"""Written by hand here alone; `make docs` copies it to the deploy files."""
