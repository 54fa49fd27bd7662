"""A new field, made up here, goes all the way: by the recipe of CONTRIBUTING, to the page.

An operator reads what is new before any of it leaves; a fleet of which a third has upgraded is
counted whole; and a collector that is upgraded after its senders loses nothing.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import Engine

from tests.conftest import ROLE, Clock
from tests.support import warm
from tests.support.collector import Collector, query, run, serving
from tests.support.database import count, one
from tests.support.database import run as change
from tests.support.processes import GUARD, ROOT, Process, Processes, line, minimal
from tests.support.published import EXAMPLE
from tests.support.receiver import Receiver
from tests.support.steps import until_worked_off

FIELD = "scans_failed_last_24h"
RECIPE = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a payload field\n")[2]
(MODEL,) = re.findall(
    r"^ *```python\n(.*?)^ *```$", RECIPE.partition("\n## ")[0], re.DOTALL | re.MULTILINE
)

Change = tuple[str, str, str]
"""A file, what stands in it once, and what takes its place."""

BY_HAND: tuple[Change, ...] = (
    (
        "app/payload.py",
        "SCHEMAS: Mapping[int, type[Heartbeat]] = {1: Heartbeat1}\n",
        re.sub(r"^   ", "", MODEL, flags=re.MULTILINE),
    ),
    ("app/payload.py", "    counts: Counts\n    tcf_v22", "    counts: Counts2\n    tcf_v22"),
    ("app/payload.py", "at: datetime) -> Heartbeat1:", "at: datetime) -> Heartbeat2:"),
    ("app/payload.py", "return Heartbeat1(\n", "return Heartbeat2(\n"),
    ("app/facts.py", "import Census, Counts,", "import Census, Counts2,"),
    ("app/facts.py", "counts=Counts(", f"counts=Counts2({FIELD}=bucket(row.{FIELD}),"),
    (
        "app/facts.py",
        "        current_setting('server_version_num')",
        (
            "        (SELECT count(*) FROM (SELECT FROM scan_jobs WHERE status = 'failed' AND"
            " created_at > now() - interval '24 hours' AND created_at <= now()"
            f" LIMIT 10000) AS f) AS {FIELD},\n        current_setting('server_version_num')"
        ),
    ),
)
"""What the recipe has a developer write: two files."""

NAMED_BY_A_TEST: tuple[Change, ...] = (
    (
        "app/collector/tables.py",
        "LABELS = {\n",
        f'LABELS = {{\n    "counts.{FIELD}": "Failed scans",\n',
    ),
    ("docs/telemetry.md", "(heartbeat.v1.schema", "(heartbeat.v2.schema"),
    ("docs/telemetry.md", '"telemetry_schema": 1', '"telemetry_schema": 2'),
    ("docs/telemetry.md", '"100-1k"\n', f'"100-1k",\n    "{FIELD}": "0"\n'),
    ("docs/telemetry.md", "consentos-telemetry/1`", "consentos-telemetry/2`"),
    ("README.md", '"telemetry_schema": 1', '"telemetry_schema": 2'),
    ("README.md", '"1k-10k"\n', f'"1k-10k",\n    "{FIELD}": "0"\n'),
    ("docs/privacy.md", "one JSON body of 22 fields", "one JSON body of 23 fields"),
    ("app/grants.py", '"scan_jobs": {"SELECT": ("', '"scan_jobs": {"SELECT": ("status", "'),
    ("docs/privacy.md", "reads 24 columns", "reads 25 columns"),
    ("docs/telemetry.md", "read 24 columns", "read 25 columns"),
    ("docs/guarantees.md", "can read 24 columns", "can read 25 columns"),
)
"""What a failing test then names."""

TESTS = (
    "tests/unit/test_docs.py",
    "tests/unit/test_view.py::test_every_field_that_is_counted_has_a_label_on_the_page",
)


def apply(project: Path, changes: Iterable[Change]) -> None:
    for name, old, new in changes:
        file = project / name
        code = file.read_text()
        assert code.count(old) == 1, (name, old)
        file.write_text(code.replace(old, new))


def python(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env=minimal({"PYTHONPATH": str(project)}),
        capture_output=True,
        text=True,
        check=False,
    )


def failing(project: Path) -> set[str]:
    """Return the tests of the project's pages that fail, without their parameters."""
    words = ["-q", "--numprocesses", "0", *TESTS]
    ended = warm.pytest(words, minimal({}), directory=project)
    assert ended.returncode in {0, 1}, ended.stdout
    return set(re.findall(r"^FAILED \S+::(\w+)", ended.stdout, re.MULTILINE))


def copied(project: Path, to: Path) -> Path:
    shutil.copytree(project, to, ignore=shutil.ignore_patterns(".*"))
    return to


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as it is after what the recipe has a developer write."""
    project = copied(ROOT, tmp_path_factory.mktemp("written") / "project")
    apply(project, BY_HAND)
    made = python(project, "docs/generate.py")
    assert made.returncode == 0, made.stderr
    return project


@pytest.fixture(scope="module")
def upgraded(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a schema 2."""
    project = copied(written, tmp_path_factory.mktemp("upgraded") / "project")
    apply(project, NAMED_BY_A_TEST)
    return project


def test_what_the_recipe_leaves_open_is_named_by_a_test(written: Path, tmp_path: Path) -> None:
    project = copied(written, tmp_path / "project")
    assert (project / "docs/heartbeat.v2.schema.json").exists()
    assert failing(project) >= {
        "test_every_field_that_is_counted_has_a_label_on_the_page",
        "test_the_body_that_a_page_shows_is_of_the_newest_schema",
        "test_the_page_links_the_newest_schema",
        "test_the_page_shows_the_user_agent_of_the_newest_schema",
        "test_the_privacy_page_says_how_many_fields_there_are",
    }
    columns = [each for each in NAMED_BY_A_TEST if "24 columns" in each[1]]
    apply(project, [each for each in NAMED_BY_A_TEST if each not in columns])
    assert failing(project) == {"test_a_page_says_how_many_columns_of_consentos_are_read"}
    apply(project, columns)
    assert failing(project) == set()


def test_a_published_schema_cannot_be_changed_in_place(tmp_path: Path) -> None:
    project = copied(ROOT, tmp_path / "project")
    stack = '    """What the install runs on."""\n'
    added = f'{stack}\n    made_up: bool = Field(description="Made up.")\n'
    apply(project, [("app/payload.py", stack, added)])
    published = (project / "docs/heartbeat.v1.schema.json").read_bytes()

    refused = python(project, "docs/generate.py")

    assert refused.returncode == 1
    assert refused.stderr.startswith("Schema 1 is published: restore its model in app/payload.py")
    assert "add schema 2 after it" in refused.stderr
    assert (project / "docs/heartbeat.v1.schema.json").read_bytes() == published
    assert "test_a_schema_is_as_it_was_published" in failing(project)


# The senders


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


def start(processes: Processes, project: Path, **variables: str) -> Process:
    """Start a worker of the project that is in a directory."""
    path = f"{GUARD}:{project}"
    return processes.run(f"cd {project} && {line('worker')}", PYTHONPATH=path, **variables)


def allow(processes: Processes, project: Path, database_url: str) -> None:
    """Give the role what the upgrade needs, as its notes say."""
    granted = subprocess.run(
        [sys.executable, "-m", "app", "grants", "--role", ROLE, "--apply"],
        cwd=project,
        env=minimal({**processes.environment, "MIGRATION_DATABASE_URL": database_url}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert granted.returncode == 0, granted.stderr


@pytest.fixture
def ready(processes: Processes, upgraded: Path, db: Engine, database_url: str) -> Path:
    """The upgraded project, with its rights, and its notice given long ago."""
    allow(processes, upgraded, database_url)
    change(db, "INSERT INTO telemetry_notice VALUES (2, '2026-05-01')")
    return upgraded


def test_what_is_new_is_read_before_it_leaves(
    processes: Processes,
    upgraded: Path,
    clock: Clock,
    receiver: Receiver,
    db: Engine,
    database_url: str,
) -> None:
    change(db, "INSERT INTO telemetry_notice VALUES (1, '2026-05-01')")
    clock("2026-05-02T02:30:00Z")
    before = processes.start("worker")
    work(processes, before, "telemetry.payload")
    before.signal(signal.SIGTERM)
    assert before.wait() == 0

    lacking = command(processes, upgraded, "preview")
    assert lacking.returncode == 1
    assert "scan_jobs" in lacking.stderr
    allow(processes, upgraded, database_url)

    clock("2026-05-03T02:31:00Z")  # the heartbeat of which nobody wrote
    after = start(processes, upgraded)
    work(processes, after, "telemetry.notice")
    (notice,) = after.lines("telemetry.notice")
    assert "schema=2 " in notice
    assert f" new=counts.{FIELD} " in notice
    assert " first=2026-05-04T02:30:00+00:00 " in notice

    processes.wake("sweep")
    until_worked_off(processes)
    shown = command(processes, upgraded, "preview", "--diff")
    assert shown.stdout.startswith(
        "Changes since the heartbeat of 2026-05-02, the last one sent:\n"
    )
    added = [line for line in shown.stdout.splitlines() if line.startswith(("+", "-"))]
    assert added == [f'+ counts.{FIELD} = "0"    Scans of the last 24 hours that failed.']
    assert "~ telemetry_schema = 1 -> 2\n" in shown.stdout
    assert count(db, "telemetry_outbox") == len(receiver.requests) == 1

    clock("2026-05-04T02:30:00Z")
    work(processes, after, "telemetry.payload")
    assert re.search(rb"User-Agent: consentos-telemetry/2\r\n", receiver.requests[1].head)
    assert f'"{FIELD}":"0"}}'.encode() in receiver.requests[1].body

    assert command(processes, upgraded, "audit", "--verify").returncode == 0
    reported = command(processes, ROOT, "audit", "--verify")
    assert reported.returncode == 1
    assert "its body has an unknown telemetry_schema" in reported.stdout
    assert "2026-05-02" not in reported.stdout


# The collector

SERVE = (sys.executable, "-P", "-m", "app.collector", "serve")
"""The Procfile's line, but for where Python looks first: in PYTHONPATH."""


def body_of(number: int, schema: int) -> str:
    tree: dict[str, Any] = json.loads(EXAMPLE)
    tree |= {"telemetry_schema": schema, "instance_id": str(UUID(int=number + 1))}
    if schema > 1:
        tree["counts"][FIELD] = "1-10" if number % 3 else "0"
    return json.dumps(tree)


def until(found: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def reported(collector: Collector, form: str) -> httpx.Response:
    response = collector.client.get(form)
    assert response.status_code == 200, response.text
    return response


YESTERDAY = """
    UPDATE heartbeat SET received_at = received_at - interval '1 day';
    UPDATE install SET first_seen = first_seen - interval '1 day',
        last_seen = last_seen - interval '1 day', established_on = established_on - 1
"""
"""Has all come a day before it came: a day is counted after its end."""


def active(collector: Collector) -> int:
    days = reported(collector, "/v1/stats.json").json()["days"]
    return days[-1]["movements"]["active_2d"] or 0 if days else 0


def test_a_fleet_of_which_a_third_has_upgraded_is_counted_whole(
    processes: Processes,
    ready: Path,
    clock: Clock,
    db: Engine,
    collector_database: str,
    tmp_path: Path,
) -> None:
    assert run("release", COLLECTOR_DATABASE_URL=collector_database).returncode == 0
    with serving(
        collector_database,
        tmp_path / "1.log",
        SERVE,
        PYTHONPATH=str(ready),
        COLLECTOR_ESTABLISHED_DAYS="1",
    ) as own:
        assert [own.post(body_of(n, 1)).status_code for n in range(60)] == [202] * 60
        assert [own.post(body_of(n, 2)).status_code for n in range(60, 89)] == [202] * 29

        # The thirtieth is a real one.
        clock("2026-05-02T02:30:00Z")
        endpoint = f"http://127.0.0.1:{own.port}/v1/heartbeat"
        sender = start(processes, ready, TELEMETRY_ENDPOINT=endpoint)
        work(processes, sender, "telemetry.payload")
        sent = one(db, "SELECT payload::text FROM telemetry_outbox")

        stored = [body for *_, body in own.rows()]
        assert json.loads(sent) in stored
        schemas = [body["telemetry_schema"] for body in stored]
        assert (schemas.count(1), schemas.count(2)) == (60, 30)

    query(collector_database, YESTERDAY)
    with serving(collector_database, tmp_path / "2.log", SERVE, PYTHONPATH=str(ready)) as own:
        until(lambda: active(own) == 90)
        values = reported(own, "/v1/stats.json").json()["values"]
        assert values[f"counts.{FIELD}"] == {
            "groups": [{"value": "1-10", "installs": 20}, {"value": "0", "installs": 10}],
            "folded_installs": None,
            "reported_by": 30,
        }
        assert values["counts.users"]["reported_by"] == 90
        assert f",counts.{FIELD},1-10,20,30\r\n" in reported(own, "/v1/stats.csv").text
        assert "Failed scans (of 30 installs that report it)" in reported(own, "/").text


def test_a_collector_that_is_upgraded_after_its_senders_loses_nothing(
    processes: Processes,
    ready: Path,
    clock: Clock,
    db: Engine,
    collector_database: str,
    tmp_path: Path,
) -> None:
    assert run("release", COLLECTOR_DATABASE_URL=collector_database).returncode == 0
    clock("2026-05-02T02:30:00Z")
    with serving(collector_database, tmp_path / "1.log") as own:
        endpoint = f"http://127.0.0.1:{own.port}/v1/heartbeat"
        sender = start(processes, ready, TELEMETRY_ENDPOINT=endpoint)
        work(processes, sender, "telemetry.attempt")
        until_worked_off(processes)
        assert own.rows() == []
    (attempt,) = sender.lines("telemetry.attempt")
    assert " outcome=retryable status=503 " in attempt
    assert one(db, "SELECT state FROM telemetry_outbox") == "pending"
    asked = one(db, "SELECT next_attempt_at - created_at FROM telemetry_outbox")
    assert timedelta(hours=6) <= asked < timedelta(hours=6, minutes=10)

    clock("2026-05-02T06:30:00Z")
    with serving(
        collector_database, tmp_path / "2.log", SERVE, PYTHONPATH=str(ready), PORT=str(own.port)
    ) as new:
        clock("2026-05-02T08:45:00Z")
        work(processes, sender, "telemetry.payload")
        (row,) = new.rows()
    assert row[3]["telemetry_schema"] == 2
    assert one(db, "SELECT state FROM telemetry_outbox") == "sent"
    assert row[3] == json.loads(one(db, "SELECT payload::text FROM telemetry_outbox"))
