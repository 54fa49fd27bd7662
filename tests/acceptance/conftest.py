"""A ConsentOS whose operator has read the notice, so that today's heartbeat is due."""

import pytest
from sqlalchemy import Engine

from tests.support.database import run


@pytest.fixture
def due(db: Engine) -> None:
    """Make the notice two days old."""
    run(db, "INSERT INTO telemetry_notice VALUES (1, now() - interval '2 days')")
