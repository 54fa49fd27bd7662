"""A process that runs day and night holds in memory what it needs, and nothing else."""

import json

import pytest
from sqlalchemy import Engine

from tests.support.command import python
from tests.support.database import outbox_row
from tests.support.processes import Processes

BOOT = {
    "worker": "import dramatiq.cli; from workers import broker; broker.connect();"
    "from workers import actors",
    "scheduler": "from workers import scheduler; scheduler.boot()",
    "solo": "from workers import scheduler, solo; scheduler.boot()",
}
"""What each line of the Procfile does before it waits."""

A_HEARTBEAT = "from workers import actors; actors.heartbeat(); actors.drain()"

NEVER = {
    "sqlalchemy.orm",
    "alembic",
    "typer",
    "click",
    "rich",
    "pygments",
    "starlette",
    "uvicorn",
    "app.cli",
    "app.report",
    "demo",
    "app.collector",
}
ONLY_TO_WORK = {"sqlalchemy", "psycopg", "httpx", "tenacity"}


def loaded(processes: Processes, *steps: str) -> set[str]:
    """Return the modules that a process has loaded after some steps."""
    tell = "import json, sys; print(json.dumps(list(sys.modules)))"
    (*_, modules) = python(processes.environment, "\n".join([*steps, tell])).splitlines()
    return set(json.loads(modules))


@pytest.mark.parametrize("name", BOOT)
def test_a_process_that_has_only_booted_has_loaded_neither_sqlalchemy_nor_httpx(
    processes: Processes, name: str
) -> None:
    modules = loaded(processes, BOOT[name])
    assert "workers.actors" in modules
    assert not modules & (NEVER | ONLY_TO_WORK)


@pytest.mark.usefixtures("due")
@pytest.mark.parametrize("name", ["worker", "solo"])
def test_a_heartbeat_is_written_and_sent_without_orm_and_command_line(
    processes: Processes, db: Engine, name: str
) -> None:
    modules = loaded(processes, BOOT[name], A_HEARTBEAT)
    assert outbox_row(db)["state"] == "sent"
    assert modules >= ONLY_TO_WORK
    assert not modules & NEVER
