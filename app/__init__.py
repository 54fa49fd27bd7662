"""ConsentOS telemetry: one heartbeat a day, through an outbox its operator can read."""
