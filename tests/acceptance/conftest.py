"""A ConsentOS whose operator has read the notice, so that today's heartbeat is due."""

import pytest
from sqlalchemy import Engine

from tests.support.database import give_notice


@pytest.fixture
def due(db: Engine) -> None:
    """Make the notice two days old."""
    give_notice(db)
