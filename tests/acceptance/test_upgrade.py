"""An upgrade to a schema 2, made up here: what is new is read before any of it leaves."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.conftest import Clock
from tests.database import count, run
from tests.faults.steps import until_worked_off
from tests.processes import GUARD, ROOT, Process, Processes, line, minimal
from tests.receiver import Receiver

SCHEMA_2 = '''\
class MadeUpStack(Stack):
    """What the install runs on."""

    made_up: bool = Field(description="Whether a test made this field up.")


class Heartbeat2(Heartbeat):
    """One heartbeat of schema 2."""

    telemetry_schema: Annotated[Literal[2], _only(int)] = Field(description="Version.")
    stack: MadeUpStack


SCHEMAS: Mapping[int, type[BaseModel]] = {1: Heartbeat, 2: Heartbeat2}
'''

CHANGES = (
    ("SCHEMA_VERSION = 1\n", "SCHEMA_VERSION = 2\n"),
    ("SCHEMAS: Mapping[int, type[BaseModel]] = {1: Heartbeat}\n", SCHEMA_2),
    ("return Heartbeat(\n        telemetry_schema=1,", "return Heartbeat2(\n telemetry_schema=2,"),
    ("stack=Stack(", "stack=MadeUpStack(made_up=True,"),
    ("model: type[BaseModel] = Heartbeat,", "model: type[BaseModel] = Heartbeat2,"),
)
"""What a developer would change in ``app/payload.py``."""


@pytest.fixture
def upgraded(tmp_path: Path) -> Path:
    """The project as it would be with a schema 2."""
    for part in ("app", "workers", "migrations"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    payload = tmp_path / "app" / "payload.py"
    code = payload.read_text()
    for old, new in CHANGES:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    payload.write_text(code)
    return tmp_path


def test_what_is_new_is_read_before_it_leaves(
    processes: Processes,
    upgraded: Path,
    clock: Clock,
    receiver: Receiver,
    db: Engine,
) -> None:
    run(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01')")
    clock("2026-05-02T02:30:00Z")
    before = processes.start("worker")
    work(processes, before, "telemetry.payload")
    before.signal(signal.SIGTERM)
    assert before.wait() == 0

    clock("2026-05-03T02:31:00Z")  # the heartbeat of which nobody wrote
    after = processes.run(f"cd {upgraded} && {line('worker')}", PYTHONPATH=f"{GUARD}:{upgraded}")
    work(processes, after, "telemetry.notice")
    (notice,) = after.lines("telemetry.notice")
    assert "schema=2 " in notice
    assert " new=stack.made_up " in notice
    assert " first=2026-05-04T02:30:00+00:00 " in notice

    processes.wake("sweep")
    until_worked_off(processes)
    shown = command(processes, upgraded, "preview", "--diff")
    assert shown.stdout.startswith("Beside the heartbeat of 2026-05-02, the last that was sent:\n")
    added = [line for line in shown.stdout.splitlines() if line.startswith(("+", "-"))]
    assert added == ["+ stack.made_up = true    Whether a test made this field up."]
    assert "~ telemetry_schema = 1 -> 2\n" in shown.stdout
    assert count(db, "telemetry_outbox") == len(receiver.requests) == 1

    clock("2026-05-04T02:30:00Z")
    work(processes, after, "telemetry.payload")
    assert re.search(rb"User-Agent: consentos-telemetry/2\r\n", receiver.requests[1].head)
    assert b'"redis_present":true,"made_up":true}' in receiver.requests[1].body

    assert command(processes, upgraded, "audit", "--verify").returncode == 0
    told = command(processes, ROOT, "audit", "--verify")
    assert told.returncode == 1
    assert "its body names a telemetry_schema that is unknown here" in told.stdout
    assert "2026-05-02" not in told.stdout


def work(processes: Processes, worker: Process, words: str) -> None:
    """Have a worker sweep until it has said something."""
    processes.wake("sweep")
    worker.wait_for(words)


def command(processes: Processes, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of the commands of the project that is in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "app", *words],
        cwd=directory,
        env=minimal(processes.environment),
        capture_output=True,
        text=True,
        check=False,
    )
