"""Whether the collector lives and is ready is said over HTTP, in the log and to Prometheus."""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from app.collector import bounded, daily, health, recount, store
from app.collector.outcomes import OUTCOMES
from app.payload import parse
from migrations import known, migrate
from tests.support.collector import (
    BODY,
    NOWHERE,
    Collector,
    changed,
    command,
    of,
    query,
    run,
    serving,
)
from tests.support.metrics import samples
from tests.support.ports import free_port

QUICK = """
from app.collector import health, inbox, housekeeping
from app.collector.__main__ import main

health.EVERY_SECONDS = 0.1
housekeeping.EVERY_SECONDS = 0.1
{}
main()
"""


def quick(*lines: str) -> list[str]:
    """Return the command line of a collector that looks often, with ``lines`` run before."""
    return [sys.executable, "-c", QUICK.format("\n".join(lines)), "serve"]


def reasons(collector: Collector) -> list[str]:
    """Return why a collector says that it is not ready; none where it is."""
    response = collector.client.get("/readyz")
    assert response.headers["cache-control"] == "no-store"
    if response.status_code == 200:
        assert response.json() == {"ready": True}
        return []
    assert response.status_code == 503
    assert set(response.json()) == {"ready", "reasons"}
    assert response.json()["ready"] is False
    found: list[str] = response.json()["reasons"]
    return found


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(collector: Collector) -> None:
    response = collector.client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"alive": True})
    assert response.headers["cache-control"] == "no-store"


def test_a_collector_without_any_install_is_ready(own: Collector) -> None:
    lives(own)
    assert reasons(own) == []
    assert own.log() == [f"collector.ready port={own.port}"]


def test_neither_answer_needs_the_token(migrated: str, tmp_path: Path) -> None:
    token = "opensesame-opensesame"  # noqa: S105 - for this test
    with serving(migrated, tmp_path / "log", COLLECTOR_TOKEN=token) as own:
        assert own.client.get("/").status_code == 401
        lives(own)
        assert reasons(own) == []


# A collector that starts although it cannot work


def altered(url: str, words: str) -> None:
    """Change a setting of a database, also of one that is read-only."""
    able = make_url(url).update_query_dict({"options": "-c default_transaction_read_only=off"})
    name = make_url(url).database
    query(able.render_as_string(hide_password=False), f"ALTER DATABASE {name} {words}")


def at_revision(url: str, revision: str) -> None:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        migrate(connection, "collector", revision)


def named(url: str, revision: str) -> None:
    query(url, f"UPDATE collector_alembic_version SET version_num = '{revision}'")


def newer(url: str) -> None:
    at_revision(url, "head")
    named(url, "9999")


def read_only(url: str) -> None:
    at_revision(url, "head")
    altered(url, "SET default_transaction_read_only = on")


NEWEST = known("collector")[0]
RUN = "run `python -m app.collector migrate`"
Change = Callable[[str], None]
CAUSES: dict[str, tuple[Change, Change, str]] = {
    "unmigrated": (
        lambda _: None,
        lambda url: at_revision(url, "head"),
        f"the tables are missing and this release needs {NEWEST}: {RUN}",
    ),
    "older": (
        lambda url: at_revision(url, "0002"),
        lambda url: at_revision(url, "head"),
        f"the tables are at revision 0002 and this release needs {NEWEST}: {RUN}",
    ),
    "newer": (
        newer,
        lambda url: named(url, NEWEST),
        "the tables are at revision 9999, of a newer release: run that release",
    ),
    "read-only": (
        read_only,
        lambda url: altered(url, "RESET default_transaction_read_only"),
        "the database is read-only",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_collector_that_starts_before_its_database_is_ready_says_why_and_recovers(
    collector_database: str, tmp_path: Path, cause: str
) -> None:
    break_it, mend, sentence = CAUSES[cause]
    break_it(collector_database)
    with serving(collector_database, tmp_path / "log", quick("inbox.RETRY_SECONDS = 1")) as own:
        lives(own)
        assert reasons(own) == [sentence]
        assert own.post(BODY).status_code == 503
        time.sleep(0.5)  # for more looks
        lines = [line for line in own.log() if line.startswith("collector.not_ready")]
        assert lines == [f'collector.not_ready reason="{sentence}"']

        mend(collector_database)

        wait_until(lambda: own.post(BODY).status_code == 202)
        wait_until(lambda: reasons(own) == [])
        wait_until(lambda: "collector.recovered" in own.log())
        time.sleep(0.5)  # for more looks
        assert own.log().count("collector.recovered") == 1
        assert len(own.rows()) == 1


def test_a_wrong_password_is_a_sentence_without_it(locked_url: str, tmp_path: Path) -> None:
    with serving(locked_url, tmp_path / "log", quick()) as own:
        lives(own)
        assert reasons(own) == ["COLLECTOR_DATABASE_URL: the database refuses the password"]
        assert own.post(BODY).status_code == 503
        output = "\n".join(own.log())
        assert output.count("collector.not_ready") == 1
    url = make_url(locked_url)
    for secret in (url.password, url.username):
        assert secret
        assert secret not in output


def test_a_database_that_is_away_is_named_and_nothing_of_its_url(tmp_path: Path) -> None:
    with serving(NOWHERE, tmp_path / "log") as own:
        lives(own)
        assert reasons(own) == ["the database cannot be reached"]
        assert 'collector.not_ready reason="the database cannot be reached"' in own.log()
        for secret in ("someone", "opensesame", "127.0.0.1", "nowhere"):
            assert secret not in "\n".join(own.log())


def test_a_server_that_never_answers_keeps_no_one_waiting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://someone:opensesame@127.0.0.1:{silent.getsockname()[1]}/x"
        with serving(url, tmp_path / "log") as own:
            began = time.monotonic()
            lives(own)
            assert reasons(own) == ["the database does not answer"]
            assert time.monotonic() - began < 3


# A collector that stops being able to work


@contextmanager
def held(url: str, *statements: str) -> Iterator[None]:
    """Run statements in a transaction that stays open until the block ends."""
    with create_engine(url, poolclass=NullPool).begin() as holder:
        for statement in statements:
            holder.execute(text(statement))
        yield


def test_a_database_that_answers_too_late_does_not_answer(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", quick()) as own:
        with held(own.url, "LOCK TABLE measured IN ACCESS EXCLUSIVE MODE"):
            wait_until(lambda: reasons(own) == ["the database does not answer"])
            lives(own)
        wait_until(lambda: reasons(own) == [])


def test_a_commit_that_fails_is_a_reason_until_one_goes_well(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", quick()) as own:
        query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
        assert reasons(own) == []
        assert own.post(BODY).status_code == 503
        assert reasons(own) == [
            "the last heartbeat could not be stored: see collector.failed in the log"
        ]
        query(own.url, "ALTER TABLE hidden RENAME TO heartbeat")
        assert own.post(BODY).status_code == 202
        assert reasons(own) == []


def test_a_commit_that_failed_long_ago_is_forgotten_so_that_requests_may_come_again(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log", quick("health.FAILED_SECONDS = 1")) as own:
        query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
        own.post(BODY)
        assert reasons(own) != []
        wait_until(lambda: reasons(own) == [])


def test_a_full_inbox_is_a_reason(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", quick("inbox.CAPACITY = 2")) as own:
        threads = [threading.Thread(target=own.post, args=(of(number),)) for number in range(2)]
        with held(own.url, "LOCK TABLE heartbeat IN EXCLUSIVE MODE"):
            for thread in threads:
                thread.start()
            full = "the inbox is full: more heartbeats arrive than the database stores"
            wait_until(lambda: reasons(own) == [full], 3)
        for thread in threads:
            thread.join()
        assert reasons(own) == []


def heard(url: str, at: datetime, *bodies: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        store.insert(connection, [parse(body) for body in bodies], established_days=1, at=at)


def test_a_last_day_that_is_not_counted_is_a_reason_until_it_is(
    migrated: str, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    heard(migrated, now - timedelta(days=3), BODY)
    last = (now - timedelta(days=4)).date()
    reason = f"{daily.finished(now)} is not counted: the last day that is counted is {last}"
    with serving(migrated, tmp_path / "idle", quick("housekeeping._run = print")) as own:
        assert reasons(own) == [reason]
        assert own.post(of(1)).status_code == 202
    with serving(migrated, tmp_path / "log", quick()) as own:
        wait_until(lambda: reasons(own) == [])


@pytest.mark.parametrize(("hours", "late"), [(24.9, False), (25.1, True), (200, True)])
def test_a_day_may_be_counted_for_an_hour_after_its_end(
    migrated: str,
    hours: float,
    late: bool,  # noqa: FBT001 - as pytest gives it
) -> None:
    day = datetime(2026, 5, 2, 12, tzinfo=UTC)
    heard(migrated, day, BODY)
    engine = store.connect(migrated)
    recount.catch_up(engine, now=day + timedelta(days=1))
    engine.dispose()
    counted_until = daily.begins(day.date() + timedelta(days=1))
    now = counted_until + timedelta(hours=hours)
    with bounded.connect(migrated).connect() as connection:
        found = health.look_by(connection, now=now)
    assert (found.trouble, found.counted_until) == (None, counted_until)
    assert found.not_counted == (
        f"{daily.finished(now)} is not counted: the last day that is counted is 2026-05-02"
        if late
        else None
    )


def test_a_collector_that_has_never_counted_has_to_within_an_hour_of_its_first_day(
    migrated: str,
) -> None:
    heard(migrated, datetime(2026, 5, 2, 12, tzinfo=UTC), BODY)
    with bounded.connect(migrated).connect() as connection:
        for now, late in (
            (datetime(2026, 5, 3, 0, 59, tzinfo=UTC), False),
            (datetime(2026, 5, 3, 1, 1, tzinfo=UTC), True),
        ):
            assert bool(health.look_by(connection, now=now).not_counted) is late


def test_a_count_that_is_under_way_is_named_with_its_progress(migrated: str) -> None:
    now = datetime.now(UTC)
    since = daily.finished(now) - timedelta(days=9)
    heard(migrated, daily.begins(since), BODY)
    replayed = since - recount.BEFORE + timedelta(days=20)
    query(migrated, f"INSERT INTO recount (since, replayed) VALUES ('{since}', '{replayed}')")
    found = health.look(bounded.connect(migrated))
    assert found.not_counted == (
        f"{daily.finished(now)} is not counted:"
        f" the days since {since} are being counted again, 51% done"
    )


def test_a_crowd_that_asks_gets_what_was_found_last(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log") as own:
        connected = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
        [(before,)] = query(own.url, connected)
        began = time.monotonic()
        for _ in range(100):
            assert reasons(own) == []
        looks = (time.monotonic() - began) / health.EVERY_SECONDS + 1
        [(after,)] = query(own.url, connected)
        assert after - before <= looks + 3


def test_what_goes_to_and_fro_is_one_line_a_minute(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", quick()) as own:
        for _ in range(3):
            named(own.url, "9999")
            wait_until(lambda: reasons(own) != [])
            named(own.url, NEWEST)
            wait_until(lambda: reasons(own) == [])
        wait_until(lambda: "collector.recovered" in own.log())
        lines = [line.partition(" ")[0] for line in own.log()]
        assert lines == ["collector.ready", "collector.not_ready", "collector.recovered"]


def test_a_collector_that_was_ready_goes_on_while_its_tables_are_migrated(own: Collector) -> None:
    assert own.post(BODY).status_code == 202
    named(own.url, "9999")
    assert own.post(of(1)).status_code == 202


def test_it_ends_at_once_while_a_look_is_under_way(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://someone:opensesame@127.0.0.1:{silent.getsockname()[1]}/x"
        with serving(url, tmp_path / "log") as own:
            lives(own)
            began = time.monotonic()
            own.process.send_signal(signal.SIGTERM)
            assert own.process.wait(10) == 0
            assert time.monotonic() - began < 5


# Metrics

EVERYWHERE = "0.0.0.0"  # noqa: S104 - for the tests of where it listens


def test_metrics_count_requests_by_outcome_and_commits(migrated: str, tmp_path: Path) -> None:
    port = free_port()
    with serving(migrated, tmp_path / "log", quick(), COLLECTOR_METRICS_PORT=str(port)) as own:
        for body in (BODY, of(1), BODY, "{}", changed(telemetry_schema=99, opensesame=1)):
            own.post(body)
        time.sleep(0.5)  # for the counts to be added to the table, and begun anew
        assert own.post(of(2)).status_code == 202
        found = samples(port)
    requests = {
        outcome: found[f"consentos_collector_requests_total/{outcome}"] for outcome in OUTCOMES
    }
    expected = {"accepted": 3, "duplicate": 1, "invalid": 1, "newer schema": 1}
    assert {outcome: count for outcome, count in requests.items() if count} == expected
    assert found["consentos_collector_commit_seconds_count"] == 4
    assert 0 < found["consentos_collector_commit_seconds_sum"] < 10
    assert found["consentos_collector_inbox_waiting"] == 0
    assert found["consentos_collector_ready"] == 1
    assert found["process_open_fds"] > 0
    assert "consentos_collector_counted_age_seconds" not in found
    labels = {name.partition("/")[2] for name in found} - {""}
    assert {label for label in labels if not label.replace(".", "").isdigit()} == {
        *OUTCOMES,
        "+Inf",
    }


def test_metrics_say_how_old_the_last_counted_day_is_and_whether_it_is_ready(
    migrated: str, tmp_path: Path
) -> None:
    port = free_port()
    now = datetime.now(UTC)
    heard(migrated, now - timedelta(days=4), BODY)
    with serving(migrated, tmp_path / "log", quick(), COLLECTOR_METRICS_PORT=str(port)) as own:
        age = "consentos_collector_counted_age_seconds"
        wait_until(lambda: reasons(own) == [] and age in samples(port))
        until = daily.begins(daily.finished(datetime.now(UTC)) + timedelta(days=1))
        passed = (datetime.now(UTC) - until).total_seconds()
        assert samples(port)[age] == pytest.approx(passed, abs=5)
        named(own.url, "9999")
        wait_until(lambda: samples(port)["consentos_collector_ready"] == 0)


def listening(process: psutil.Process) -> dict[int, str]:
    """Return the address of each port on which a process listens."""
    return {
        each.laddr.port: each.laddr.ip
        for each in process.net_connections()
        if each.status == psutil.CONN_LISTEN
    }


def test_metrics_are_off_by_default_and_then_on_loopback_alone(
    migrated: str, tmp_path: Path
) -> None:
    with serving(migrated, tmp_path / "log") as own:
        assert set(listening(psutil.Process(own.process.pid))) == {own.port}
        assert own.client.get("/metrics").status_code == 404
    port = free_port()
    # The page is on every address.
    argv = [*command("web"), "--host", EVERYWHERE]
    with serving(migrated, tmp_path / "log", argv, COLLECTOR_METRICS_PORT=str(port)) as own:
        assert listening(psutil.Process(own.process.pid))[port] == "127.0.0.1"
        assert own.client.get("/metrics").status_code == 404
    argv = [*command("web"), "--metrics-host", EVERYWHERE]
    with serving(migrated, tmp_path / "log", argv, COLLECTOR_METRICS_PORT=str(port)) as own:
        assert listening(psutil.Process(own.process.pid))[port] == EVERYWHERE


def test_a_metrics_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        own = str(free_port())
        ended = run("web", COLLECTOR_DATABASE_URL=NOWHERE, PORT=own, COLLECTOR_METRICS_PORT=port)
    sentence = f"Cannot listen on port {port} for metrics: Address already in use.\n"
    assert (ended.returncode, ended.stderr) == (1, sentence)
