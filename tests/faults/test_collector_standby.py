"""The page is read from a hot standby: a real one, that streams from the embedded Postgres."""

import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from app.collector.phrases import long_date, moment
from app.collector.reading import BEHIND, Mark, Reached, behind
from demo import servers
from tests.browser.collector import seed
from tests.conftest import RUNNER
from tests.support import replica
from tests.support.breakable import Server
from tests.support.collector import BODY, INSTANCE, Collector, query, run, serving
from tests.support.replica import Replica
from tests.support.room import room

pytestmark = pytest.mark.xdist_group("standby")
"""One runner has a standby, which is enough for a machine."""

QUICK = """
from datetime import timedelta

from app.collector import answers, reading
from app.collector.__main__ import main

reading.EVERY_SECONDS = 0.3
reading.BEHIND = timedelta(seconds=2)
answers.LIVE_SECONDS = 0.2
answers.CHECK_SECONDS = 0.1
{}
main()
"""
SECONDS = 3.0
"""What a page may take whose standby does not answer: 2 seconds, and what it takes anyway."""
AT_ONCE = 1.8
"""Less than that: the standby was not waited for."""
FORMS = ("/", "/v1/stats.json", "/v1/stats.csv")


def quick(*lines: str) -> list[str]:
    """Return the command line of a collector that looks often, with ``lines`` run before."""
    return [sys.executable, "-c", QUICK.format("\n".join(lines)), "serve"]


def until(what: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def standby(embedded: servers.Servers | None) -> Iterator[Replica]:
    """A standby of the server that this runner's databases are on."""
    if embedded is None:
        pytest.skip("a server named by TEST_DATABASE_URL has no standby")
    with replica.running(embedded, room() / f"standby-{RUNNER}") as running:
        yield running


@pytest.fixture
def primary(embedded: servers.Servers | None, standby: Replica) -> Server:
    assert embedded is not None
    assert standby
    return Server(embedded, replica.pid_of(embedded), lambda: True)


@pytest.fixture
def counted(collector_database: str) -> str:
    """The URL of a collector's database that has counted ten days."""
    seed(collector_database, installs=60, days=10, until=datetime.now(UTC))
    return collector_database


def replayed(standby: Replica, url: str) -> None:
    """Wait until the standby has all that the primary has."""
    [(lsn,)] = query(url, "SELECT pg_current_wal_lsn()")
    until(lambda: standby.run(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'"))


@contextmanager
def reading(url: str, by: str, output: Path, *lines: str) -> Iterator[Collector]:
    """Run a collector whose page is read by another URL."""
    with serving(url, output, quick(*lines), COLLECTOR_READ_DATABASE_URL=by) as own:
        yield own


@contextmanager
def served(url: str, standby: Replica, output: Path, *lines: str) -> Iterator[Collector]:
    """Run a collector whose page is read from the standby, which has all that there is."""
    replayed(standby, url)
    with reading(url, standby.url(url), output, *lines) as own:
        yield own


def sessions(standby: Replica, url: str) -> int:
    """Return how many sessions a database has had at the standby."""
    name = make_url(url).database
    found = standby.run(f"SELECT sessions FROM pg_stat_database WHERE datname = '{name}'")
    return int(str(found))


def active(own: Collector) -> object:
    return own.client.get("/v1/stats.json").json()["live"]["active"]


def document(own: Collector) -> dict[str, object]:
    found: dict[str, object] = own.client.get("/v1/stats.json").json()
    return found


def said(own: Collector, path: str = "/") -> str:
    return own.client.get(path).text


def gone(own: Collector) -> list[str]:
    return [line for line in own.log() if line.startswith("collector.standby_gone")]


def unmark(url: str) -> None:
    """Change a number of a counted day, so that it is seen where the page is read."""
    query(url, "UPDATE daily SET installs = 4000 WHERE metric = 'active_7d'")
    query(url, "UPDATE measured SET as_of = now()")


def test_the_page_is_read_from_the_standby_and_says_as_of_when_it_is(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    with served(counted, standby, tmp_path / "log") as own:
        assert document(own)["standby_as_of"] is None
        assert "copy of the database" not in said(own)
        before = active(own)
        with standby.paused():
            began = datetime.now(UTC)
            query(counted, "DELETE FROM install")
            unmark(counted)
            until(lambda: document(own)["standby_as_of"], 10)

            shown = document(own)
            assert active(own) == before != 0
            as_of = datetime.fromisoformat(str(shown["standby_as_of"]))
            assert began - timedelta(seconds=5) < as_of < began + timedelta(seconds=1)
            assert shown["live"]["as_of"] == shown["standby_as_of"]  # type: ignore[index]  # a document of JSON
            sentence = f"all numbers are as of {moment(as_of)}"
            for path in ("/", "/?edition=ce"):
                assert sentence in said(own, path)
            assert "Counting has stopped" not in said(own)
        until(lambda: document(own)["standby_as_of"] is None)
        until(lambda: active(own) == 0)
        assert "copy of the database" not in said(own)
        assert gone(own) == []


def test_a_standby_that_has_not_the_last_days_shows_no_old_number_as_new(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    query(counted, "DELETE FROM measured WHERE day > current_date - 4")
    query(counted, "UPDATE measured SET as_of = as_of - interval '4 days'")
    last = long_date(datetime.now(UTC).date() - timedelta(days=4))
    idle = "from app.collector import housekeeping", "housekeeping._run = print"
    with served(counted, standby, tmp_path / "log", *idle) as own, standby.paused():
        query(counted, "INSERT INTO measured SELECT current_date - 1, now()")
        until(lambda: "copy of the database" in said(own))
        found = re.sub(r"\s+", " ", said(own))
        assert f"Counting has stopped in this copy: the last day that was counted is {last}" in (
            found
        )


def test_a_primary_that_is_idle_does_not_make_its_standby_late(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    with served(counted, standby, tmp_path / "log") as own:
        time.sleep(4)  # twice what it may be behind, and nothing is committed
        assert document(own)["standby_as_of"] is None
        assert gone(own) == []


def test_the_page_is_served_while_the_primary_is_frozen(
    counted: str, standby: Replica, primary: Server, tmp_path: Path
) -> None:
    with served(counted, standby, tmp_path / "log") as own:
        before = active(own)
        with primary.frozen():
            time.sleep(1)
            for form in FORMS:
                began = time.monotonic()
                assert own.client.get(f"{form}?days=365&edition=ce").status_code == 200
                assert own.client.get(form).status_code == 200
                assert time.monotonic() - began < AT_ONCE
            # Nobody knows what the primary has by now.
            until(lambda: "copy of the database" in said(own))
            assert active(own) == before
        until(lambda: document(own)["standby_as_of"] is None)


def test_a_standby_that_is_killed_costs_no_page_and_is_read_again_when_it_is_back(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    with served(counted, standby, tmp_path / "log") as own:
        assert active(own) != 0
        with standby.down():
            for form in FORMS:
                began = time.monotonic()
                assert own.client.get(form).status_code == 200
                assert time.monotonic() - began < AT_ONCE
            query(counted, "DELETE FROM install")
            until(lambda: active(own) == 0)  # by the primary
            assert len(gone(own)) == 1
        until(lambda: "collector.standby_back" in own.log())
        before = sessions(standby, counted)
        until(lambda: sessions(standby, counted) > before)
        with standby.paused():
            unmark(counted)
            until(lambda: document(own)["standby_as_of"])
        assert len(gone(own)) == 1


def test_a_standby_that_is_frozen_costs_one_request_two_seconds_and_no_other_anything(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    # The look shall not be the one that notices.
    seldom = "reading.EVERY_SECONDS = 10"
    with served(counted, standby, tmp_path / "log", seldom) as own:
        assert own.client.get("/").status_code == 200
        with standby.frozen():
            took = []
            for number in range(30):
                began = time.monotonic()
                assert own.client.get(f"/?version=1.2.{number}").status_code == 200
                took.append(time.monotonic() - began)
            assert max(took) < SECONDS
            # One waits; a second may have begun before that was known.
            assert len([each for each in took if each > 1.5]) <= 2
            [line] = gone(own)
            assert line == 'collector.standby_gone reason="it does not answer"'
        until(lambda: "collector.standby_back" in own.log(), 20)


def test_taking_reading_and_deleting_by_id_never_ask_the_standby(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    with served(counted, standby, tmp_path / "log") as own, standby.paused():
        assert own.post(BODY).status_code == 202
        assert own.held(INSTANCE).status_code == 200
        assert own.forget(INSTANCE).status_code == 204
        assert own.held(INSTANCE).status_code == 404
        assert own.client.get("/readyz").status_code == 200
    with served(counted, standby, tmp_path / "again") as own, standby.frozen():
        own.let_the_forgotten_come_again()
        assert own.client.get("/healthz").status_code == 200  # it has started
        began = time.monotonic()
        assert own.post(BODY).status_code == 202
        assert own.held(INSTANCE).status_code == 200
        assert own.client.get("/readyz").status_code == 200
        assert time.monotonic() - began < AT_ONCE


def test_a_standby_that_has_not_replayed_a_migration_is_not_read(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    [(needed,)] = query(counted, "SELECT version_num FROM collector_alembic_version")
    query(counted, "UPDATE collector_alembic_version SET version_num = '0001'")
    replayed(standby, counted)
    with standby.paused():
        query(counted, f"UPDATE collector_alembic_version SET version_num = '{needed}'")
        with reading(counted, standby.url(counted), tmp_path / "log") as own:
            query(counted, "DELETE FROM install")
            until(lambda: active(own) == 0)
            reason = f"its tables are at revision 0001 and this release needs {needed}"
            assert gone(own) == [f'collector.standby_gone reason="{reason}"']
            assert own.client.get("/readyz").status_code == 200
            standby.run("SELECT pg_wal_replay_resume()")
            until(lambda: "collector.standby_back" in own.log())


@pytest.mark.parametrize(
    ("meanwhile", "state"),
    [
        ("connection.execute(text('SELECT pg_sleep(4)'))", "active"),
        ("time.sleep(4)", "idle in transaction"),
    ],
    ids=["in a statement", "between two statements"],
)
def test_what_conflicts_with_the_replay_is_asked_of_the_primary(
    counted: str, standby: Replica, tmp_path: Path, meanwhile: str, state: str
) -> None:
    # A lock of the primary's is replayed while the page is read at the standby.
    slow = (
        "import time",
        "from app.collector import daily",
        "span = daily.span",
        "def slowly(connection):",
        "    found = span(connection)",
        "    if connection.scalar(text('SELECT pg_is_in_recovery() /* slowly */')):",
        f"        {meanwhile}",
        "    return found",
        "from sqlalchemy import text",
        "daily.span = slowly",
    )
    with served(counted, standby, tmp_path / "log", *slow) as own:
        engine = create_engine(counted)
        with ThreadPoolExecutor(1) as asked:
            answer = asked.submit(own.client.get, "/v1/stats.json?edition=ce")
            reads = (
                f"SELECT count(*) FROM pg_stat_activity WHERE state = '{state}'"
                " AND query ~ 'pg_sleep|slowly' AND pid <> pg_backend_pid()"
            )
            until(lambda: standby.run(reads) == 1)
            with engine.begin() as connection:
                connection.execute(text("ALTER TABLE measured ADD COLUMN more integer"))
            assert answer.result().status_code == 200
        engine.dispose()
        name = make_url(counted).database
        conflicts = f"SELECT confl_lock FROM pg_stat_database_conflicts WHERE datname = '{name}'"
        until(lambda: standby.run(conflicts) == 1)
        assert gone(own) == []
        assert own.failures("stage=page") == []


def test_a_check_whose_connection_conflicts_with_the_replay_leaves_the_standby_in_use(
    counted: str, standby: Replica, tmp_path: Path
) -> None:
    # The words of a hot standby's Postgres to who was about to connect.
    cancelled = (
        "from threading import current_thread",
        "from psycopg import OperationalError",
        "connect = reading.bounded._Bounded.connect",
        "def connecting(*given, **named):",
        "    if current_thread().name == 'reading' and 'standby' in str(named):",
        "        checks.append(1)",
        "        if len(checks) > 1:",
        "            print('conflict', flush=True)",
        "            raise OperationalError('connection failed: FATAL:  canceling statement'",
        "                                   ' due to conflict with recovery')",
        "    return connect(*given, **named)",
        "checks = []",
        "reading.bounded._Bounded.connect = connecting",
    )
    with served(counted, standby, tmp_path / "log", *cancelled) as own:
        with standby.paused():
            query(counted, "DELETE FROM install")
            checks = own.log().count("conflict")
            until(lambda: own.log().count("conflict") > checks + 2)
            assert active(own) != 0  # the primary has none
        assert gone(own) == []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nobody", "it cannot be reached"),
        ("silent", "it does not answer"),
        ("locked", "it refuses the login"),
        ("primary", "it is not a standby"),
    ],
)
def test_what_is_no_standby_is_not_read_and_nothing_of_its_url_is_logged(
    counted: str, locked_url: str, tmp_path: Path, what: str, reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = {
            "nobody": "postgresql://someone:opensesame@127.0.0.1:1/nowhere",
            "silent": f"postgresql://someone:opensesame@127.0.0.1:{port}/nowhere",
            "locked": locked_url,
            "primary": f"{counted}&application_name=opensesame",
        }[what]
        with reading(counted, url, tmp_path / "log") as own:
            assert own.client.get("/healthz").status_code == 200  # it has started
            for form in FORMS:
                began = time.monotonic()
                assert own.client.get(form).status_code == 200
                assert time.monotonic() - began < AT_ONCE
            until(lambda: gone(own))
            time.sleep(1)  # for more looks
            assert gone(own) == [f'collector.standby_gone reason="{reason}"']
            user, password = make_url(locked_url).username, make_url(locked_url).password
            for secret in ("someone", "opensesame", "127.0.0.1", "nowhere", user, password):
                assert str(secret) not in "\n".join(own.log())


def test_without_a_standby_or_with_the_primary_s_own_url_the_primary_is_read(
    counted: str, tmp_path: Path
) -> None:
    with (
        serving(counted, tmp_path / "without", quick()) as without,
        reading(counted, counted, tmp_path / "own") as with_its_own,
    ):
        for each in (without, with_its_own):
            assert document(each)["standby_as_of"] is None
            assert gone(each) == []


# How far a standby has come

T = datetime(2026, 5, 2, 12, tzinfo=UTC)
MARKS = [Mark(100, T, 0.0), Mark(100, T + timedelta(minutes=5), 300.0)]


def at(minutes: float) -> datetime:
    return T + timedelta(minutes=minutes)


@pytest.mark.parametrize(
    ("lsn", "committed", "marks", "seen", "expected"),
    [
        (100, at(-60), MARKS, 305.0, None),  # idle for an hour, and all is replayed
        (100, at(-60), MARKS, 400.0, at(5)),  # the primary has not said anything since
        (150, at(6.5), MARKS, 400.0, None),  # it has not, but has sent what it committed then
        (90, at(-2), MARKS, 305.0, at(-2)),  # all that is known is further
        (90, at(4.9), [], 305.0, None),
        (90, at(-2), [], 305.0, at(-2)),
        (110, None, [*MARKS, Mark(120, at(6), 360.0)], 365.0, at(5)),
    ],
)
def test_a_standby_is_as_of_the_last_that_it_is_known_to_have(
    lsn: int,
    committed: datetime | None,
    marks: list[Mark],
    seen: float,
    expected: datetime | None,
) -> None:
    assert timedelta(minutes=1) == BEHIND
    assert behind(Reached(lsn, committed, at(5)), marks, seen) == expected


def test_of_a_standby_that_says_nothing_it_is_not_known_as_of_when_it_is() -> None:
    with pytest.raises(LookupError):
        behind(Reached(90, None, T), MARKS, 1.0)


# The variable


@pytest.mark.parametrize("url", ["", "mysql://someone:opensesame@host/x", "opensesame"])
def test_an_invalid_url_is_refused_in_one_sentence_that_does_not_repeat_it(
    counted: str, url: str
) -> None:
    ended = run("web", COLLECTOR_DATABASE_URL=counted, COLLECTOR_READ_DATABASE_URL=url)
    assert ended.returncode == 2
    assert ended.stdout == ""
    [sentence] = ended.stderr.splitlines()
    assert sentence.startswith("COLLECTOR_READ_DATABASE_URL must be a URL like postgresql://")
    assert "opensesame" not in sentence
