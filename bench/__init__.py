"""What the telemetry costs its host, measured: ``make bench``."""
