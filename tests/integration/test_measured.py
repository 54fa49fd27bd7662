"""The figures of docs/performance.md that do not depend on the machine are those of the code."""

import json

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from bench.report import RESULTS
from tests.conftest import Clock
from tests.support.database import counted, run
from tests.support.steps import DAY_BEGINS, TOMORROW_BEGINS


@pytest.fixture
def known_install(pipeline: Pipeline, clock: Clock, db: Engine) -> Pipeline:
    """An install that has written a heartbeat before."""
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01')")
    clock(DAY_BEGINS)
    assert pipeline.write_heartbeat()
    return pipeline


def test_a_write_makes_the_round_trips_that_the_page_names(
    known_install: Pipeline, clock: Clock
) -> None:
    clock(TOMORROW_BEGINS)
    with counted() as cost:
        assert known_install.write_heartbeat()
    (statements,) = cost.each
    result = json.loads((RESULTS / "counting.json").read_text())
    assert result["round_trips"] == statements + len(("BEGIN", "COMMIT"))
