"""ConsentOS telemetry: one anonymous heartbeat a day, through an outbox its operator can read."""
