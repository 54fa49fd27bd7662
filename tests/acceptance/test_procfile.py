"""The Procfile's own processes, started and ended as a platform does."""

import signal
import subprocess
from urllib.parse import urlsplit

import pytest
from sqlalchemy import Engine

from app import __version__, database
from app.payload import parse
from app.pipeline import Pipeline
from tests.support.command import python
from tests.support.database import CONSENTOS_0005, HEAD, attempts, count, outbox_row, run
from tests.support.processes import HONCHO, READY, WAYS, Processes, line
from tests.support.receiver import Receiver

either_way = pytest.mark.parametrize("way", WAYS)
"""Has a test be about each way to run an install."""


@pytest.mark.usefixtures("due")
@either_way
class TestUnderHoncho:
    def test_the_schedulers_own_sweep_has_the_days_heartbeat_written_and_sent(
        self, processes: Processes, receiver: Receiver, db: Engine, way: str
    ) -> None:
        honcho = processes.run(f"{HONCHO} {way}")
        (request,) = receiver.wait_for(1)
        honcho.wait_for("telemetry.attempt")
        row = outbox_row(db)
        assert row["state"] == "sent"
        assert parse(request.body).instance_id == str(row["instance_id"])
        assert [attempt["outcome"] for attempt in attempts(db)] == ["sent"]

    def test_the_log_gives_back_the_body_byte_for_byte(
        self, processes: Processes, receiver: Receiver, db: Engine, way: str
    ) -> None:
        honcho = processes.run(f"{HONCHO} {way}")
        (request,) = receiver.wait_for(1)
        honcho.wait_for("telemetry.attempt")
        as_documented = f"grep telemetry.payload {honcho.log} | sed 's/.*telemetry.payload //'"
        found = subprocess.run(as_documented, shell=True, capture_output=True, check=True)  # noqa: S602 - the documented pipe
        assert found.stdout == request.body + b"\n"
        assert found.stdout.decode() == outbox_row(db)["payload"] + "\n"

    def test_a_stop_in_idleness_is_clean_and_prompt(self, processes: Processes, way: str) -> None:
        honcho = processes.run(f"{HONCHO} {way}")
        honcho.wait_for("telemetry.attempt")
        honcho.signal(signal.SIGTERM)
        assert honcho.wait(10) == 143
        for name in way.split():
            assert f"{name}.1 stopped (rc=0)" in honcho.output()
        assert "Traceback" not in honcho.output()


@pytest.mark.usefixtures("due")
class TestOneByOne:
    @either_way
    def test_the_log_is_on_stdout_with_the_event_first(
        self, processes: Processes, receiver: Receiver, way: str
    ) -> None:
        name, *others = way.split()
        worker = processes.run(f"{line(name)} 2>/dev/null")
        for other in others:
            processes.start(other)
        (request,) = receiver.wait_for(1)
        worker.wait_for("telemetry.attempt")
        (enabled,) = worker.lines("telemetry.enabled")
        assert f" version=0.2.0 edition=ce release={__version__}" in enabled
        assert worker.lines("telemetry.queued")
        assert worker.lines("telemetry.payload") == [f"telemetry.payload {request.body.decode()}"]

    @pytest.mark.parametrize("name", READY)
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
    def test_a_request_to_stop_is_followed_within_ten_seconds(
        self, processes: Processes, name: str, number: signal.Signals, *, group: bool
    ) -> None:
        process = processes.start(name, LOG_LEVEL="INFO")
        process.wait_for(READY[name])
        process.signal(number, group=group)
        assert process.wait(10) == 0
        assert "Traceback" not in process.output()

    def test_a_platforms_spelling_of_the_database_url_will_do(
        self, processes: Processes, environment: dict[str, str], receiver: Receiver
    ) -> None:
        url = environment["DATABASE_URL"].replace("postgresql+psycopg:", "postgres:")
        assert urlsplit(url).scheme == "postgres"
        processes.start("worker", DATABASE_URL=url)
        processes.start("scheduler", DATABASE_URL=url)
        receiver.wait_for(1)


class TestFirstBoot:
    def test_the_notice_comes_and_no_heartbeat(
        self, processes: Processes, receiver: Receiver, db: Engine
    ) -> None:
        worker = processes.start("worker")
        processes.start("scheduler")
        worker.wait_for("telemetry.notice")
        assert count(db, "telemetry_outbox") == count(db, "instance") == 0
        assert receiver.connections == 0

    def test_the_release_line_makes_the_tables_and_may_be_run_again(
        self, processes: Processes, empty_database: str
    ) -> None:
        run(database.engine(empty_database), CONSENTOS_0005)
        for reported in (f"telemetry: base -> {HEAD}\n", f"telemetry: at {HEAD}\n"):
            release = processes.start("release", DATABASE_URL=empty_database)
            assert release.wait(30) == 0
            assert release.output() == reported

    def test_a_worker_before_the_release_says_what_to_do_and_stays(
        self, processes: Processes, empty_database: str
    ) -> None:
        worker = processes.start("worker", DATABASE_URL=empty_database)
        processes.start("scheduler", DATABASE_URL=empty_database)
        worker.wait_for("telemetry.failed stage=sweep")
        assert "python -m app migrate" in worker.output()
        assert "unhandled exception" not in worker.output()
        assert "Traceback" not in worker.output()


@pytest.mark.usefixtures("due")
@either_way
@pytest.mark.parametrize(
    "switch", [{"TELEMETRY_ENABLED": "false"}, {"DO_NOT_TRACK": "1"}, {"ENVIRONMENT": "test"}]
)
def test_off_no_process_opens_a_socket_to_the_endpoint_and_what_was_pending_is_discarded(
    pipeline: Pipeline,
    processes: Processes,
    receiver: Receiver,
    db: Engine,
    switch: dict[str, str],
    way: str,
) -> None:
    pipeline.write_heartbeat()
    worker, *_ = processes.start_all(way, **switch)
    worker.wait_for("telemetry.discarded")
    assert "reason=off" in worker.lines("telemetry.discarded")[0]
    (disabled,) = worker.lines("telemetry.disabled reason=")
    assert f" release={__version__}" in disabled
    assert outbox_row(db)["state"] == "discarded"
    sockets = processes.trace.read_text()
    assert f"('127.0.0.1', {urlsplit(processes.environment['REDIS_URL']).port})" in sockets
    assert str(receiver.port) not in sockets
    assert receiver.connections == 0


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("missing", ["DATABASE_URL", "REDIS_URL"])
def test_a_process_that_cannot_work_says_so_in_one_sentence(
    processes: Processes, name: str, missing: str
) -> None:
    del processes.environment[missing]
    process = processes.start(name)
    assert process.wait(20) != 0
    assert f"consentos-telemetry: {missing} is not set." in process.output()
    assert "Traceback" not in process.output()


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("option", ["socket_timeout=CANARY", "nonsense=CANARY", "db=CANARY"])
def test_a_redis_url_with_an_unknown_option_is_reported_without_it(
    processes: Processes, name: str, option: str
) -> None:
    url = processes.environment["REDIS_URL"]
    process = processes.start(name, REDIS_URL=f"{url}?{option}")
    assert process.wait(20) != 0
    assert "consentos-telemetry: REDIS_URL has an unknown option" in process.output()
    assert "CANARY" not in process.output()
    assert "Traceback" not in process.output()


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York", "UTC", ":nonsense"])
def test_the_schedule_is_half_past_two_utc_wherever_the_machine_is(
    processes: Processes, zone: str
) -> None:
    processes.environment["TZ"] = zone
    ticks = python(
        processes.environment,
        "import pendulum, workers.broker; workers.broker.connect(); from workers import actors;"
        "start = pendulum.now();"
        "tick = actors.heartbeat.options['periodic'].next_valid_date(start);"
        "print(tick.in_timezone('UTC').isoformat(), tick - start < pendulum.duration(days=1))",
    )
    assert ticks.split()[0].endswith("T02:30:00+00:00")
    assert ticks.split()[1] == "True"
