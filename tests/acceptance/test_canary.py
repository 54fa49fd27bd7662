"""A ConsentOS full of markers: none gets into the outbox, onto the wire, or before an eye."""

import subprocess
import sys

import pytest
from sqlalchemy import Engine

from demo import consentos
from tests.support.database import count, one
from tests.support.processes import ROOT, Processes, minimal
from tests.support.receiver import Receiver

MARKER = "CANARY"


def everything_in(db: Engine, table: str) -> str:
    return str(one(db, f"SELECT coalesce(string_agg(t::text, ' '), '') FROM {table} AS t"))


def output_of(processes: Processes, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", *command],
        env=minimal(processes.environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.usefixtures("due")
def test_no_text_of_consentos_or_of_its_operator_ever_leaves(
    processes: Processes, receiver: Receiver, db: Engine
) -> None:
    with db.begin() as connection:
        assert consentos.mark(connection, MARKER) > 30
    assert MARKER in everything_in(db, "sites")
    processes.environment |= {
        "GEOIP_COUNTRY_HEADER": MARKER,
        "GEOIP_MAXMIND_DB_PATH": f"/{MARKER}",
        "CONSENTOS_DEPLOYMENT": f"{MARKER} jane@acme.example",
        "CONSENTOS_EDITION": MARKER,
        "APP_VERSION": f"1.0.0+{MARKER}",
        "LOG_LEVEL": "DEBUG",
        "SECRET_KEY": MARKER,
        "TELEMETRY_ENDPOINT": f"{receiver.url}?token={MARKER}",
    }
    worker = processes.start("worker")
    scheduler = processes.start("scheduler")
    (request,) = receiver.wait_for(1)
    worker.wait_for("telemetry.attempt")
    # The endpoint's own query is the operator's to choose, and goes nowhere but there.
    head = request.head.replace(f"?token={MARKER} HTTP".encode(), b" HTTP")
    seen = [
        head.decode(),
        request.body.decode(),
        everything_in(db, "telemetry_outbox"),
        everything_in(db, "telemetry_attempt"),
        worker.output(),
        scheduler.output(),
        *(
            output_of(processes, *command)
            for command in (["status"], ["preview"], ["audit"], ["audit", "--json"], ["send"])
        ),
    ]
    assert [text for text in seen if MARKER in text] == []
    assert count(db, "telemetry_outbox") == 1
    assert b'"deployment":"unknown"' in request.body
    assert b'"version":"0.0.0-dev"' in request.body
    assert b'"geoip_header_configured":true' in request.body


@pytest.mark.usefixtures("due")
def test_a_failure_to_count_shows_no_text_of_consentos(processes: Processes, db: Engine) -> None:
    with db.begin() as connection:
        consentos.mark(connection, MARKER)
        connection.exec_driver_sql("ALTER TABLE site_configs ALTER tcf_enabled TYPE text")
    worker = processes.start("worker")
    processes.start("scheduler")
    worker.wait_for("telemetry.failed stage=collect")
    assert MARKER not in worker.output() + output_of(processes, "preview")
    assert "Traceback" not in worker.output()
