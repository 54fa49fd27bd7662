"""The maintainers' commands: releases, counting again, and invented installs."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import UUID

import pytest
import typer
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url

from app.collector import daily, recount, store, suspects
from app.collector.__main__ import cli, main
from app.collector.suspects import Selector
from app.payload import parse
from tests.conftest import Databases
from tests.guard import __path__ as guard
from tests.support import attack, warm
from tests.support.attack import TODAY
from tests.support.collector import NOWHERE, changed, query
from tests.support.processes import ROOT

YESTERDAY = TODAY.date() - timedelta(days=1)
FIRST = YESTERDAY - timedelta(days=attack.DAYS - 1)
PAGE = ROOT / "docs" / "collector.md"
Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


def opened(url: str) -> Engine:
    return create_engine(url, poolclass=NullPool)


def named(url: str) -> str:
    name = make_url(url).database
    assert name
    return name


@pytest.fixture(scope="module")
def small_fleet(databases: Databases, collector_template: str) -> Iterator[str]:
    """The name of a database with the heartbeats of a small fleet, whose days are counted."""
    with databases.copy_of(collector_template) as url:
        attack.store_fleet(opened(url), installs=60, days=attack.DAYS, until=YESTERDAY)
        with databases.copy_of(named(url)) as counted:
            attack.set_clock(opened(counted), TODAY)
            recount.catch_up(opened(counted))
            yield named(counted)


@pytest.fixture
def url(databases: Databases, small_fleet: str) -> Iterator[str]:
    """A collector with a small fleet that is counted, at TODAY."""
    with databases.copy_of(small_fleet) as copy:
        attack.set_clock(opened(copy), TODAY)
        yield copy


@pytest.fixture
def empty(databases: Databases, collector_template: str) -> Iterator[str]:
    """A collector without a heartbeat, at TODAY."""
    with databases.copy_of(collector_template) as copy:
        attack.set_clock(opened(copy), TODAY)
        yield copy


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, as ``python -m app.collector`` does."""

    def command(url: str, line: str) -> Done:
        monkeypatch.setenv("COLLECTOR_DATABASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["app.collector", *shlex.split(line)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return command


def numbers(url: str) -> Rows:
    return query(url, "SELECT * FROM daily ORDER BY day, metric, version, edition, value")


def requested(url: str) -> Rows:
    return query(url, "SELECT since FROM recount")


def active(url: str, version: str) -> dict[date, int]:
    rows = query(
        url,
        "SELECT day, sum(installs)::integer FROM daily"
        f" WHERE metric = '{daily.ACTIVE_2D}' AND version = '{version}' GROUP BY day",
    )
    return dict(rows)


def bring(url: str, bodies: list[str], at: datetime, *, established_days: int = 1) -> None:
    with opened(url).begin() as connection:
        heartbeats = [parse(body) for body in bodies]
        store.insert(connection, heartbeats, at=at, established_days=established_days)


def invented(count: int, first: int = 0, **fields: object) -> list[str]:
    return [changed(instance_id=identity(n), **fields) for n in range(first, first + count)]


def identity(number: int) -> str:
    return f"{number:08x}-7e62-4a4e-9b6f-1a4e2d2dfd99"


# Releases


def test_a_version_is_other_on_past_days_once_removed_and_named_again_once_added(
    url: str, run: Command
) -> None:
    before, of_041, other = numbers(url), active(url, "0.4.1"), active(url, "other")
    assert of_041
    assert not other
    (on,) = query(url, "SELECT released_on::text FROM release WHERE version = '0.4.1'")[0]

    removed = run(url, "releases remove 0.4.1")
    assert removed.code == 0, removed.err
    assert f"The days from {on} to {YESTERDAY} are counted again." in removed.out
    assert active(url, "0.4.1") == {}
    assert active(url, "other") == of_041

    added = run(url, f"releases add 0.4.1 --on {on}")
    assert added.code == 0, added.err
    assert numbers(url) == before
    assert requested(url) == []


def test_a_version_is_named_from_the_day_of_its_release_on_however_a_day_is_counted(
    url: str, run: Command
) -> None:
    used = active(url, "0.3.0")
    on = min(used) + timedelta(days=9)
    assert run(url, f"releases add 0.3.0 --on {on}").code == 0
    assert min(active(url, "0.3.0")) == on
    assert active(url, "other") == {day: n for day, n in used.items() if day < on}
    assert run(url, "recount").code == 0
    assert min(active(url, "0.3.0")) == on


@pytest.mark.parametrize("moved", [-4, 4])
def test_a_changed_date_counts_from_the_earlier_of_both_days_on(
    url: str, run: Command, moved: int
) -> None:
    on: date = query(url, "SELECT released_on FROM release WHERE version = '0.4.0'")[0][0]
    to = on + timedelta(days=moved)
    done = run(url, f"releases add 0.4.0 --on {to} --later")
    assert done.code == 0
    assert "A web process begins within a minute." in done.out
    assert requested(url) == [(min(on, to),)]


def test_a_release_that_is_listed_already_has_nothing_counted_again(url: str, run: Command) -> None:
    on = query(url, "SELECT released_on FROM release WHERE version = '0.4.0'")[0][0]
    done = run(url, f"releases add 0.4.0 --on {on} --later")
    assert done.code == 0
    assert "already listed" in done.out
    assert requested(url) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("0.9 --on 2026-11-01", "VERSION must be N.N.N"),
        ("v0.9.0 --on 2026-11-01", "VERSION must be N.N.N"),
        ("0.9.0-rc1 --on 2026-11-01", "VERSION must be N.N.N"),
        ("0.9.0-dev --on 2026-11-01", "ends in -dev"),
        ("0.9.0 --on 2026-11-14", "must not be later than tomorrow"),
        ("0.9.0 --on yesterday", "write a day as 2026-11-20"),
        ("0.9.0", "Missing option '--on'"),
    ],
)
def test_what_is_not_a_release_is_refused(
    empty: str, run: Command, words: str, sentence: str
) -> None:
    done = run(empty, f"releases add {words}")
    assert done.code == 2
    assert sentence in done.err
    assert query(empty, "SELECT * FROM release") == []


def test_a_release_of_tomorrow_can_be_listed_today(empty: str, run: Command) -> None:
    assert run(empty, "releases add 0.9.0-rc.1 --on 2026-11-13").code == 0
    listed = run(empty, "releases list --json")
    assert json.loads(listed.out) == [{"version": "0.9.0-rc.1", "released_on": "2026-11-13"}]
    assert "0.9.0-rc.1" in run(empty, "releases list").out


def test_a_version_that_is_not_listed_cannot_be_removed(empty: str, run: Command) -> None:
    done = run(empty, "releases remove 0.9.0")
    assert (done.code, done.err) == (1, "This version is not listed.\n")


# Unlisted


def test_what_is_counted_as_other_is_shown_with_its_installs_the_most_first(
    empty: str, run: Command
) -> None:
    run(empty, "releases add 0.4.0 --on 2026-11-01")
    now = TODAY - timedelta(hours=1)
    bring(empty, invented(3, 0, version="0.4.0", deployment="helm"), now)
    bring(empty, invented(2, 100, version="0.5.0", deployment="our-lab"), now)
    bring(empty, invented(4, 200, version="9.9.9", deployment="spam", python_version="4.7.1"), now)
    bring(empty, invented(5, 300, version="0.6.0-dev"), now)
    # None of these is counted.
    bring(empty, invented(6, 400, version="7.7.7"), now, established_days=3)
    bring(empty, invented(6, 500, version="7.7.7"), now - timedelta(days=2))
    bring(empty, invented(6, 600, version="7.7.7"), now)
    taken_out = " ".join(f"--id {identity(n)}" for n in range(600, 606))
    assert run(empty, f"exclude {taken_out} --why test --yes").code == 0

    found = json.loads(run(empty, "unlisted --json").out)
    assert found["dev_builds"] == 5
    fields = found["fields"]
    assert [*fields] == ["version", "python_version", "deployment", "stack.postgres_version"]
    assert fields["version"]["values"] == [
        {"value": "9.9.9", "installs": 4},
        {"value": "0.5.0", "installs": 2},
    ]
    assert fields["deployment"]["values"] == [
        {"value": "spam", "installs": 4},
        {"value": "our-lab", "installs": 2},
    ]
    assert fields["python_version"]["values"] == [{"value": "4.7", "installs": 4}]
    assert fields["stack.postgres_version"]["values"] == []

    shown = run(empty, "unlisted").out
    assert "releases add 9.9.9 --on YYYY-MM-DD" in shown
    assert "Development builds, which are counted separately: 5 installs." in shown
    assert "7.7.7" not in shown


def test_at_most_twenty_unlisted_values_are_shown_and_how_many_more_there_are(
    empty: str, run: Command
) -> None:
    for n in range(27):
        count = 2 if n < 3 else 1
        bring(empty, invented(count, 10 * n, deployment=f"lab-{n}"), TODAY - timedelta(hours=1))
    of = json.loads(run(empty, "unlisted --json").out)["fields"]["deployment"]
    assert len(of["values"]) == 20
    assert (of["more_values"], of["more_installs"]) == (7, 7)
    assert "and 7 more values on 7 installs" in run(empty, "unlisted").out


def test_no_word_of_a_stranger_is_markup(empty: str, run: Command) -> None:
    bring(empty, invented(1), TODAY - timedelta(hours=1))
    query(empty, """UPDATE install SET body = jsonb_set(body, '{deployment}', '"[red]a[/red]"')""")
    assert "[red]a[/red]" in run(empty, "unlisted").out


# Counting again


def spoil(url: str) -> None:
    """Leave wrong numbers, which only a recount of every day mends."""
    query(url, "UPDATE daily SET installs = installs + 1000")


def start(url: str, line: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.collector", *shlex.split(line)],
        env={"COLLECTOR_DATABASE_URL": url, "PYTHONPATH": str(next(iter(guard))), **variables},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_recount_corrects_every_day_and_reports_its_progress(url: str, run: Command) -> None:
    true = numbers(url)
    spoil(url)
    done = run(url, "recount --json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["since"], result["until"]) == (str(FIRST), str(YESTERDAY))
    assert f"recount: {FIRST} counted (" in done.err
    assert numbers(url) == true


def test_a_recount_leaves_the_days_before_it_as_they_are(url: str, run: Command) -> None:
    true = numbers(url)
    spoil(url)
    since = YESTERDAY - timedelta(days=3)
    done = run(url, f"recount --since {since}")
    assert f"The days from {since} to {YESTERDAY} are counted again." in done.out
    now = numbers(url)
    assert [row for row in now if row[0] >= since] == [row for row in true if row[0] >= since]
    assert all(row[-1] > 1000 for row in now if row[0] < since)


KILLS = (
    # At a point of the code, or after so many days.
    "app.collector.recount:_replay_next:return",
    33,
    "app.collector.daily:count:return",
    5,
    "app.collector.recount:step:return",
)


def test_a_recount_that_is_killed_at_any_point_goes_on_where_it_was(url: str) -> None:
    true = numbers(url)
    spoil(url)
    shown = [0]
    for kill in (*KILLS, None):
        point = {"GUARD_POINT": kill, "GUARD_ACTION": "die"} if isinstance(kill, str) else {}
        with start(url, "recount --since 2026-01-01", **point) as process:
            assert process.stderr
            for number, line in enumerate(process.stderr, start=1):
                found = re.search(r"\((\d+)%\)", line)
                assert found, line
                shown.append(int(found[1]))
                if number == kill:
                    process.kill()
        assert process.returncode == (-signal.SIGKILL if kill else 0)
        assert numbers(url) != true or not kill
    assert shown == sorted(shown)
    assert numbers(url) == true
    assert requested(url) == []


def test_a_recount_goes_on_while_a_web_process_counts_as_well(url: str) -> None:
    true = numbers(url)
    spoil(url)
    over = Event()

    def keep() -> None:
        engine = opened(url)
        while not over.is_set():
            recount.step(engine)

    threads = [Thread(target=keep) for _ in range(2)]
    with start(url, "recount --json") as process:
        for thread in threads:
            thread.start()
        out, err = process.communicate(timeout=60)
    over.set()
    for thread in threads:
        thread.join()
    assert process.returncode == 0, err
    assert json.loads(out)["until"] == str(YESTERDAY)
    assert numbers(url) == true


def test_days_whose_heartbeats_are_deleted_keep_their_numbers(url: str, run: Command) -> None:
    true = numbers(url)
    kept = FIRST + timedelta(days=3)
    query(url, f"DELETE FROM heartbeat WHERE received_at < '{kept}'")
    first = kept + recount.BEFORE
    done = run(url, f"recount --since {FIRST}")
    assert f"The days from {first} to {YESTERDAY} are counted again." in done.out
    assert "Earlier days keep their numbers" in done.out
    assert numbers(url) == true


def test_without_a_heartbeat_nothing_is_counted_again_and_no_number_is_lost(
    url: str, run: Command
) -> None:
    true = numbers(url)
    query(url, "TRUNCATE heartbeat")
    done = run(url, "recount")
    assert done.code == 1
    assert "No heartbeat is stored" in done.err
    assert run(url, "releases remove 0.3.0").code == 0
    assert requested(url) == []
    assert numbers(url) == true


# Suspects


def groups(url: str, run: Command, words: str = "") -> list[dict[str, Any]]:
    done = run(url, f"suspects --json {words}")
    assert done.code == 0, done.err
    found: list[dict[str, Any]] = json.loads(done.out)
    return found


def test_installs_with_one_body_within_an_hour_are_a_group_across_full_hours(
    empty: str, run: Command
) -> None:
    bring(empty, invented(12, 0), datetime(2026, 11, 2, 4, 40, tzinfo=UTC))
    bring(empty, invented(10, 100), datetime(2026, 11, 2, 5, 30, tzinfo=UTC), established_days=3)
    (group,) = groups(empty, run)
    assert (group["installs"], group["established"], group["excluded"]) == (22, 12, 0)
    assert group["first_seen_from"] == "2026-11-02T04:40:00+00:00"
    assert group["first_seen_to"] == "2026-11-02T05:30:00+00:00"
    assert group["exclude"] == (
        f"python -m app.collector exclude --body {group['body']}"
        " --first-seen-from 2026-11-02T04:40Z --first-seen-to 2026-11-02T05:31Z --why TEXT"
    )
    assert group["exclude"] in run(empty, "suspects").out


def test_installs_with_one_version_and_label_are_a_group_too(empty: str, run: Command) -> None:
    at = datetime(2026, 11, 2, 4, 40, tzinfo=UTC)
    bodies = [
        body
        for n in range(21)
        for body in invented(1, n, stack={**STACK, "postgres_version": f"{n}.1"})
    ]
    bring(empty, bodies, at)
    (group,) = groups(empty, run)
    assert (group["body"], group["installs"], group["would_exclude"]) == (None, 21, 21)


STACK = {"redis_present": True}


def test_few_installs_and_many_of_a_whole_day_are_no_group(empty: str, run: Command) -> None:
    bring(empty, invented(19, 0), datetime(2026, 11, 2, 4, tzinfo=UTC))
    for hour in range(5, 24):
        bring(empty, invented(9, 100 * hour), datetime(2026, 11, 3, hour, tzinfo=UTC))
    assert groups(empty, run) == []
    assert "No group of installs looks invented." in run(empty, "suspects").out
    assert [group["installs"] for group in groups(empty, run, "--at-least 19")] == [19]


def test_the_line_of_a_group_excludes_it_and_then_it_is_no_longer_listed(
    empty: str, run: Command
) -> None:
    bring(empty, invented(25), datetime(2026, 11, 2, 4, tzinfo=UTC))
    run(empty, f"exclude --id {identity(3)} --why 'I know it' --yes")
    (group,) = groups(empty, run)
    assert (group["installs"], group["excluded"], group["would_exclude"]) == (25, 1, 24)
    line = group["exclude"].removeprefix("python -m app.collector ")
    assert run(empty, f"{line} --yes").code == 0
    assert groups(empty, run) == []
    reasons = json.loads(run(empty, "exclude --list --json").out)
    assert [(each["why"], each["installs"]) for each in reasons] == [("TEXT", 24), ("I know it", 1)]
    assert "I know it" in run(empty, "exclude --list").out


# Excluding and including


def some(url: str) -> list[str]:
    """Return the ids of some installs that count."""
    rows = query(
        url,
        "SELECT instance_id::text FROM install WHERE established_on < '2026-10-20'"
        " ORDER BY instance_id LIMIT 8",
    )
    return [row[0] for row in rows]


def by_ids(url: str) -> str:
    return " ".join(f"--id {each}" for each in some(url))


def test_what_is_excluded_is_in_no_number_and_included_in_all_again(
    url: str, run: Command, databases: Databases, small_fleet: str
) -> None:
    before, ids = numbers(url), by_ids(url)
    with opened(url).connect() as connection:
        live = daily.live(connection).active

    done = run(url, f"exclude {ids} --why 'not real' --yes")
    assert done.code == 0, done.err
    assert "Excluded: 8 installs, 8 of them established." in done.out
    with opened(url).connect() as connection:
        fewer = daily.live(connection).active
    assert fewer < live
    # The numbers are those of a collector that never heard of them.
    with databases.copy_of(small_fleet) as other:
        attack.set_clock(opened(other), TODAY)
        gone = ", ".join(f"'{each}'" for each in some(url))
        for table in ("heartbeat", "install"):
            query(other, f"DELETE FROM {table} WHERE instance_id IN ({gone})")
        query(other, "TRUNCATE daily, measured")
        recount.catch_up(opened(other))
        assert numbers(url) == numbers(other) != before

    done = run(url, "include --why 'not real' --yes")
    assert done.code == 0, done.err
    assert numbers(url) == before
    with opened(url).connect() as connection:
        assert daily.live(connection).active == live


def test_a_dry_run_shows_what_would_be_excluded_and_changes_nothing(url: str, run: Command) -> None:
    before = numbers(url)
    done = run(url, f"exclude {by_ids(url)} --dry-run")
    assert done.code == 0
    assert "Not excluded and matching: 8 installs, 8 of them established." in done.out
    assert f" to {YESTERDAY}." in done.out
    assert query(url, "SELECT count(excluded) FROM install") == [(0,)]
    assert requested(url) == []
    assert numbers(url) == before


def test_nothing_is_excluded_before_the_maintainer_has_agreed(
    url: str, run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = tmp_path / "answer"
    for said, excluded in (("", 0), ("n\n", 0), ("y\n", 8)):
        answer.write_text(said)
        with answer.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            done = run(url, f"exclude {by_ids(url)} --why test --later")
        assert done.code == (0 if excluded else 1)
        assert query(url, "SELECT count(excluded) FROM install") == [(excluded,)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("exclude --why test --yes", "say which installs"),
        ("include --yes", "say which installs"),
        ("exclude --label spam --yes", "give the reason with --why TEXT"),
        ("exclude --label spam --why ' ' --yes", "give the reason with --why TEXT"),
        ("exclude --id 7 --why test --yes", "should be a valid UUID"),
        ("exclude --first-seen-from noon --why test --yes", "write a time as 2026-11-20T14:30Z"),
        ("recount --since noon", "write a day as 2026-11-20"),
        ("suspects --at-least 1", "should be greater than or equal to 2"),
    ],
)
def test_a_call_that_is_wrong_is_refused_with_a_sentence(
    url: str, run: Command, line: str, sentence: str
) -> None:
    done = run(url, line)
    assert done.code == 2
    assert sentence in done.err
    assert query(url, "SELECT count(excluded) FROM install") == [(0,)]


def test_every_option_of_a_selection_has_to_match(empty: str, run: Command) -> None:
    at = datetime(2026, 11, 2, 4, tzinfo=UTC)
    bring(empty, invented(2, 0, version="0.5.0", deployment="a"), at)
    bring(empty, invented(3, 10, version="0.5.0", deployment="b"), at)
    bring(empty, invented(4, 20, version="0.6.0", deployment="b"), at + timedelta(hours=1))
    for line, count in (
        ("--version 0.5.0", 5),
        ("--label b", 7),
        ("--version 0.5.0 --label b", 3),
        ("--first-seen-from 2026-11-02T05:00Z", 4),
        ("--first-seen-to 2026-11-02T05:00Z", 5),
        ("--first-seen-from 2026-11-02T06:00+02:00 --first-seen-to 2026-11-02T05:00", 5),
        (f"--label b --id {identity(0)} --id {identity(10)}", 1),
        ("--version 9.9.9", 0),
    ):
        done = run(empty, f"exclude {line} --dry-run")
        assert f"Not excluded and matching: {count} install" in done.out, line


def test_an_install_of_today_is_excluded_and_no_finished_day_is_counted_again(
    empty: str, run: Command
) -> None:
    bring(empty, invented(5), TODAY - timedelta(hours=1))
    done = run(empty, f"exclude --id {identity(0)} --why test --yes")
    assert "No finished day has to be counted again." in done.out
    assert requested(empty) == []
    with opened(empty).connect() as connection:
        assert daily.live(connection).active == 4


def test_an_excluded_install_goes_on_being_stored_and_may_be_read_and_deleted(
    empty: str, run: Command
) -> None:
    at = datetime(2026, 11, 10, 4, tzinfo=UTC)
    bring(empty, invented(1), at)
    assert run(empty, f"exclude --id {identity(0)} --why test --yes").code == 0
    later = [body.replace("2026-05-02", "2026-05-03") for body in invented(1)]
    bring(empty, later, at + timedelta(days=1))
    assert query(empty, "SELECT excluded FROM install") == [("test",)]
    recount.catch_up(opened(empty))
    assert numbers(empty) == []
    with opened(empty).begin() as connection:
        held = store.held(connection, UUID(identity(0)), after=None, limit=10)
        assert len(held) == 2
    with opened(empty).begin() as connection:
        store.forget(connection, UUID(identity(0)))
    assert query(empty, "SELECT * FROM install") == []


def test_an_exclusion_that_is_cut_off_has_requested_its_recount_and_can_be_repeated(
    empty: str, run: Command
) -> None:
    at = datetime(2026, 11, 5, 4, tzinfo=UTC)
    bring(empty, invented(suspects.AT_ONCE + 10), at)
    engine = opened(empty)
    recount.catch_up(engine)
    commits = iter([None, OSError("cut off")])

    @event.listens_for(engine, "commit")
    def cut_off(_: Connection) -> None:
        if error := next(commits, None):
            raise error

    with pytest.raises(OSError, match="cut off"):
        suspects.exclude(engine, Selector(first_seen_from=at), "test")
    assert query(empty, "SELECT count(excluded) FROM install") == [(suspects.AT_ONCE,)]
    assert requested(empty) == [(at.date(),)]
    assert run(empty, "exclude --first-seen-from 2026-11-05 --why test --yes").code == 0
    assert numbers(empty) == []


# Settings


def test_a_command_without_its_database_says_which_variable_is_missing(
    run: Command,
) -> None:
    done = run("", "releases list")
    assert done.code == 2
    assert "COLLECTOR_DATABASE_URL" in done.err
    done = run(NOWHERE, "unlisted")
    assert done.code == 1
    assert done.err == "The database of COLLECTOR_DATABASE_URL failed with OperationalError.\n"


# The page


def lines_of(example: str) -> list[str]:
    match = re.search(rf"<!-- {example} -->(.*?)<!-- /{example} -->", PAGE.read_text(), re.DOTALL)
    assert match
    return [line for line in match[1].splitlines() if line.startswith("python ")]


def as_shown(url: str, line: str) -> str:
    """Run a line of the page as a process; return what it prints."""
    python, *words = shlex.split(line)
    assert python == "python"
    done = warm.run([sys.executable, *words], {"COLLECTOR_DATABASE_URL": url}, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_after_an_attack_the_commands_of_the_page_bring_the_true_numbers_back(
    databases: Databases, collector_template: str, run: Command
) -> None:
    with databases.copy_of(collector_template) as true:
        attack.store_fleet(
            opened(true), installs=attack.INSTALLS, days=attack.DAYS, until=YESTERDAY
        )
        attack.set_clock(opened(true), TODAY)
        recount.catch_up(opened(true))
        with databases.copy_of(named(true)) as attacked:
            attack.store_attack(opened(attacked))
            attack.set_clock(opened(attacked), TODAY)
            # Yesterday is counted with the attack in it, as the days before it would have been.
            query(attacked, f"DELETE FROM measured WHERE day = '{YESTERDAY}'")
            recount.catch_up(opened(attacked))
            assert numbers(attacked) != numbers(true)
            listed, *excluding = lines_of("attack")
            assert len(excluding) < 5
            suggested = [group["exclude"] for group in groups(attacked, run)]
            assert [line.split(" --why")[0] for line in excluding[:-1]] == [
                line.split(" --why")[0] for line in suggested
            ]
            for line in (listed, *excluding):
                as_shown(attacked, line)
            assert numbers(attacked) == numbers(true)
            days = "SELECT day FROM measured ORDER BY day"
            assert query(attacked, days) == query(true, days)
            with opened(attacked).connect() as one, opened(true).connect() as other:
                assert daily.live(one)[1:] == daily.live(other)[1:]


def test_the_commands_of_the_page_name_a_version(url: str, run: Command) -> None:
    assert run(url, "releases remove 0.4.1").code == 0
    shown, named_then = lines_of("naming")
    assert active(url, "0.4.1") == {}
    assert "0.4.1" in as_shown(url, shown)
    as_shown(url, named_then)
    assert active(url, "0.4.1")
    assert active(url, "other") == {}


def test_the_page_names_every_command() -> None:
    page = PAGE.read_text()
    group = typer.main.get_command(cli)
    assert isinstance(group, typer.core.TyperGroup)
    commands = {*group.commands} - {"migrate", "serve", "check"}
    assert commands == {"releases", "unlisted", "recount", "suspects", "exclude", "include"}
    assert all(f"`{name}" in page for name in commands)


@pytest.mark.parametrize(
    "command",
    [
        *("releases add", "releases list", "releases remove"),
        *("unlisted", "recount", "suspects", "exclude", "include"),
    ],
)
def test_each_command_has_help_of_more_than_a_line(run: Command, command: str) -> None:
    done = run(NOWHERE, f"{command} --help")
    assert done.code == 0
    assert len(done.out.splitlines()) > 5
