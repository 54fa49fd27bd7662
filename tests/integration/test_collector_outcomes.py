"""A newer schema is not lost by the collector's fault, and how requests end is counted."""

import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import ProgrammingError

from app.collector import intake, store
from app.collector.limit import Busiest
from app.collector.outcomes import BUSIEST, OUTCOMES, Outcomes
from app.payload import NEWEST, SCHEMA_VERSION
from tests.support import metrics
from tests.support.collector import BODY, INSTANCE, Collector, changed, head, of, query, serving
from tests.support.ports import free_port

NEWER = changed(telemetry_schema=SCHEMA_VERSION + 1, invented="opensesame")


def counted(url: str) -> dict[str, int]:
    return dict(query(url, "SELECT outcome, requests FROM ingest"))


def test_a_newer_schema_is_503_to_be_sent_again_and_is_not_stored(own: Collector) -> None:
    response = own.post(NEWER)
    assert (response.status_code, response.headers["retry-after"]) == (503, "21600")
    assert response.json() == {
        "error": f"This collector does not support telemetry_schema {SCHEMA_VERSION + 1} yet;"
        " try again later."
    }
    assert own.rows() == []
    assert own.post(BODY).status_code == 202


@pytest.mark.parametrize(
    ("version", "named"),
    [(999_999_999, " 999999999"), (1_000_000_000, ""), (10**4_000, "")],
)
def test_a_number_is_named_only_where_it_could_be_that_of_a_schema(
    version: int, named: str
) -> None:
    with pytest.raises(intake.NewerSchemaError) as refused:
        intake.parse(changed(telemetry_schema="n").replace('"n"', str(version)).encode())
    words = f"This collector does not support telemetry_schema{named} yet; try again later."
    assert str(refused.value) == words


def test_a_newer_schema_is_stored_once_the_collector_knows_it(
    own: Collector, tmp_path: Path
) -> None:
    newer = changed(telemetry_schema=SCHEMA_VERSION + 1)
    assert own.post(newer).status_code == 503
    with serving(own.url, tmp_path / "upgraded", [sys.executable, "-c", UPGRADED, "serve"]) as then:
        assert then.post(newer).status_code == 202
        assert then.post(of(1)).status_code == 202


UPGRADED = f"""
from app import payload
from app.collector.__main__ import main

class Next(payload.{NEWEST.__name__}):
    pass

payload.SCHEMAS[payload.SCHEMA_VERSION + 1] = Next
main()
"""


def test_a_newer_schema_is_one_line_a_minute_with_its_number_alone(own: Collector) -> None:
    for _ in range(5):
        own.post(NEWER)
    assert own.log()[1:] == [f"collector.newer_schema schema={SCHEMA_VERSION + 1}"]


def test_the_next_minute_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = [0.0, 59.0, 60.0, 119.0, 121.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[0])
    counts = Outcomes()
    while times:
        counts.newer_schema(None if len(times) == 1 else 10 * len(times))
        times.pop(0)
    assert caplog.messages == [
        f"collector.newer_schema schema={schema}" for schema in (50, 30, "?")
    ]


def test_every_way_in_which_a_request_can_end_is_counted_when_the_process_ends(
    migrated: str, tmp_path: Path
) -> None:
    with serving(
        migrated, tmp_path / "log", COLLECTOR_CLIENT_RATE="10", COLLECTOR_CLIENT_INSTALLS="2"
    ) as own:
        with socket.create_connection(("127.0.0.1", own.port)) as connection:
            connection.sendall(head("Content-Length: 100") + b"{")
        for body in (BODY, of(1), BODY, NEWER, "{}", BODY.ljust(20_000)):
            own.post(body)
        own.post(BODY, content_type="text/plain")
        own.held(INSTANCE)
        own.forget(INSTANCE)
        own.post(BODY)  # a moment after it was deleted
        for _ in range(4):
            own.post(of(2))
        assert own.forget(INSTANCE).status_code == 429
    assert counted(migrated) == {
        "accepted": 2,
        "duplicate": 1,
        "newer schema": 1,
        "invalid": 3,
        "too large": 1,
        "rate-limited": 3,
        "too many ids": 1,
        "unavailable": 1,
        BUSIEST: 12,
    }
    assert set(counted(migrated)) == {*OUTCOMES, BUSIEST}
    days = "SELECT DISTINCT day = CAST(now() AT TIME ZONE 'UTC' AS date) FROM ingest"
    assert query(migrated, days) == [(True,)]


OFTEN = """
from app.collector import housekeeping
from app.collector.__main__ import main

housekeeping.EVERY_SECONDS = 0.1
main()
"""


def test_while_it_runs_the_counts_are_added_to_those_of_other_processes(
    migrated: str, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", OFTEN, "serve"]
    with serving(migrated, tmp_path / "a", argv) as a, serving(migrated, tmp_path / "b", argv) as b:
        for number in range(20):
            assert (a, b)[number % 2].post(of(number)).status_code == 202
            time.sleep(0.02)
        deadline = time.monotonic() + 10
        while counted(migrated) != {"accepted": 20}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert counted(migrated) == {"accepted": 20}


def test_what_cannot_be_added_is_kept_for_the_next_time(migrated: str) -> None:
    engine = store.connect(migrated)
    counts = Outcomes(Busiest())
    counts.count("accepted")
    counts.count_client("192.0.2.1")
    query(migrated, "ALTER TABLE ingest RENAME TO hidden")
    with pytest.raises(ProgrammingError):
        counts.write(engine)
    counts.count("accepted")
    counts.count_client("192.0.2.1")
    query(migrated, "ALTER TABLE hidden RENAME TO ingest")
    counts.write(engine)
    counts.write(engine)
    engine.dispose()
    assert counted(migrated) == {"accepted": 2, BUSIEST: 1}


def test_threads_that_count_at_once_lose_nothing(migrated: str) -> None:
    engine = store.connect(migrated)
    counts = Outcomes()

    def count() -> None:
        for _ in range(2_000):
            counts.count("accepted")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counts.write(engine)
    counts.write(engine)
    engine.dispose()
    assert counted(migrated) == {"accepted": 8_000}


def test_a_table_of_outcomes_that_is_held_keeps_no_heartbeat_waiting_and_not_the_end(
    migrated: str, tmp_path: Path
) -> None:
    with (
        create_engine(migrated, poolclass=NullPool).begin() as holder,
        serving(migrated, tmp_path / "log", [sys.executable, "-c", OFTEN, "serve"]) as own,
    ):
        holder.execute(text("LOCK TABLE ingest IN EXCLUSIVE MODE"))
        for number in range(5):
            assert own.post(of(number)).status_code == 202
            time.sleep(0.1)
        own.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert own.process.wait(10) == 0
        assert time.monotonic() - began < 5


def test_a_heartbeat_that_comes_twice_at_once_is_one_accepted_and_one_duplicate(
    migrated: str, tmp_path: Path
) -> None:
    port = free_port()
    with serving(migrated, tmp_path / "log", COLLECTOR_METRICS_PORT=str(port)) as own:
        with create_engine(own.url, poolclass=NullPool).begin() as holder:
            holder.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
            threads = [threading.Thread(target=own.post, args=(BODY,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 10
            while metrics.waiting(port) < len(threads):
                assert time.monotonic() < deadline
        for thread in threads:
            thread.join()
    assert counted(migrated) == {"accepted": 1, "duplicate": 2}
