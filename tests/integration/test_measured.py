"""What docs/performance.md counts is true of the code, and the bench measures this code."""

import json
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from bench.report import RESULTS
from bench.watch import STAGES
from tests.conftest import Clock
from tests.support import warm
from tests.support.database import counted, give_notice
from tests.support.processes import minimal
from tests.support.receiver import Receiver
from tests.support.steps import DAY_BEGINS, TOMORROW_BEGINS


@pytest.fixture
def known_install(pipeline: Pipeline, clock: Clock, db: Engine) -> Pipeline:
    """An install that has written a heartbeat before."""
    give_notice(db, "2026-05-01")
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


def test_the_bench_sees_each_stage_of_a_heartbeat(
    administered: dict[str, str], redis_url: str, receiver: Receiver, db: Engine, tmp_path: Path
) -> None:
    give_notice(db)
    owner = administered["MIGRATION_DATABASE_URL"]
    variables = minimal({**administered, "DATABASE_URL": owner, "REDIS_URL": redis_url})
    found = tmp_path / "found.json"
    ended = warm.run([sys.executable, "-m", "bench.watch", str(found), "2"], variables)
    assert ended.returncode == 0, ended.stderr
    sent = [each for each in receiver.requests if b"consentos-telemetry/" in each.head]
    assert len(sent) >= 2

    samples = json.loads(found.read_text())
    stages = samples["stages"]
    assert [*stages] == [*STAGES]
    assert all(each > 0 for name in STAGES for each in stages[name])
    # They follow each other, so they take no longer than the whole.
    for number, whole in enumerate(samples["whole"]["ms"]):
        assert sum(stages[name][number] for name in STAGES) <= whole + 0.001
    assert all(len(each) == 2 for each in [*stages.values(), *samples["bare"].values()])
