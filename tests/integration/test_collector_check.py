"""``check`` says what a maintainer has to look at, and nothing while all is well."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from app.collector import check, daily, recount, store
from app.collector.daily import begins
from app.collector.outcomes import BUSIEST
from app.payload import parse
from tests.support import warm
from tests.support.collector import EXAMPLE, NOWHERE, Collector, changed, of, query, serving

VERSION = str(EXAMPLE["version"])


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "app.collector", "check", *arguments]
    return warm.run(argv, {"COLUMNS": "100", **environment}, timeout=30)


def sentences(url: str) -> dict[str, list[str]]:
    """Return what is found in a database, by the word for each kind."""
    found: dict[str, list[str]] = {}
    for finding in check.check(url).findings:
        found.setdefault(finding.what, []).append(finding.sentence)
    return found


def body(number: int, at: datetime, version: str = VERSION) -> str:
    instance = f"{number:08x}-7e62-4a4e-9b6f-1a4e2d2dfd99"
    sent_at = at.astimezone(UTC).isoformat(timespec="seconds")
    return changed(instance_id=instance, sent_at=sent_at, version=version)


def heard(url: str, at: datetime, installs: Sequence[int], version: str = VERSION) -> None:
    """Store heartbeats of established installs."""
    heartbeats = [parse(body(number, at, version)) for number in installs]
    with create_engine(url, poolclass=NullPool).begin() as connection:
        store.insert(connection, heartbeats, established_days=1, at=at)


def count(url: str) -> None:
    """Count every day that is due."""
    engine = store.connect(url)
    recount.catch_up(engine)
    engine.dispose()


def now() -> datetime:
    return datetime.now(UTC)


def yesterday() -> date:
    return daily.finished(now())


def listed(url: str, version: str = VERSION) -> None:
    query(url, f"INSERT INTO release VALUES ('{version}', '2026-01-01')")


@pytest.fixture
def well(migrated: str) -> str:
    """A database with 30 installs that reported on each of 10 days and today; all is counted."""
    listed(migrated)
    for days in range(10, 0, -1):
        heard(migrated, begins(yesterday() - timedelta(days=days - 1)), range(30))
    heard(migrated, now(), range(30))
    count(migrated)
    return migrated


def test_if_all_is_well_it_prints_so_and_exits_0(well: str) -> None:
    ended = run(COLLECTOR_DATABASE_URL=well)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "All is well.\n", "")
    ended = run("--json", COLLECTOR_DATABASE_URL=well)
    assert (ended.returncode, json.loads(ended.stdout)) == (0, {"ok": True, "findings": []})


def test_a_collector_that_has_taken_nothing_yet_is_well(migrated: str) -> None:
    assert sentences(migrated) == {}


def silenced(url: str, hours: float) -> None:
    query(
        url,
        "UPDATE install SET first_seen = now() - interval '60 days',"
        f" last_seen = now() - interval '{hours} hours'",
    )


def test_silence_of_26_hours_is_found_and_less_is_not(well: str) -> None:
    silenced(well, 25.9)
    assert "silent" not in sentences(well)
    silenced(well, 26.1)
    assert sentences(well)["silent"] == ["No heartbeat was accepted for 26 hours."]


def test_a_stored_time_in_the_future_does_not_hide_silence(well: str) -> None:
    silenced(well, 50)
    query(
        well,
        "UPDATE install SET last_seen = now() + interval '400 days' WHERE instance_id ="
        " (SELECT min(CAST(instance_id AS text)) FROM install)::uuid",
    )
    assert sentences(well)["silent"] == ["No heartbeat was accepted for 50 hours."]


def test_a_collector_that_has_lost_all_its_installs_is_silent(migrated: str) -> None:
    query(migrated, "INSERT INTO ingest VALUES (current_date - 40, 'accepted', 7)")
    assert list(sentences(migrated)) == ["silent"]
    query(migrated, "INSERT INTO ingest VALUES (current_date, 'accepted', 1)")
    assert sentences(migrated) == {}


def test_a_last_day_that_is_not_counted_is_found(well: str) -> None:
    query(well, f"DELETE FROM measured WHERE day > '{yesterday() - timedelta(days=3)}'")
    assert sentences(well)["not counted"] == [
        (
            f"{yesterday()} is not counted: the last day that is counted is"
            f" {yesterday() - timedelta(days=3)}."
        )
    ]


def test_a_running_recount_is_reported_and_is_not_a_finding(well: str) -> None:
    since = yesterday() - timedelta(days=9)
    replayed = since - recount.BEFORE + timedelta(days=20)
    query(well, f"INSERT INTO recount (since, replayed) VALUES ('{since}', '{replayed}')")
    words = f"days since {since} are being counted again, 51% done."
    ended = run(COLLECTOR_DATABASE_URL=well)
    assert (ended.returncode, ended.stdout) == (0, f"All is well. The {words}\n")
    query(well, "TRUNCATE measured, daily")
    assert sentences(well) == {"not counted": [f"{yesterday()} is not counted: the {words}"]}


def active(url: str, day: date, *installs: int) -> None:
    """Have ``daily`` say how many installs were active on a day, in parts of several versions."""
    query(url, f"DELETE FROM daily WHERE metric = 'active_2d' AND day = '{day}'")
    for number, count_of_part in enumerate(installs):
        query(
            url,
            f"INSERT INTO daily VALUES ('{day}', 'active_2d', '0.{number}.0', 'ce', '',"
            f" {count_of_part})",
        )


@pytest.mark.parametrize(
    ("then", "today", "fell"),
    [
        ((100,), (70,), None),
        ((60, 40), (60, 9), "Active installs fell from 100 to 69 (31%) in the 7 days to {}."),
        ((20,), (13,), "Active installs fell from 20 to 13 (35%) in the 7 days to {}."),
        ((20,), (), "Active installs fell from 20 to 0 (100%) in the 7 days to {}."),
        ((19,), (1,), None),
        ((), (50,), None),
    ],
)
def test_a_fall_by_more_than_30_percent_in_a_week_is_found(
    well: str, then: tuple[int, ...], today: tuple[int, ...], fell: str | None
) -> None:
    active(well, yesterday() - timedelta(days=7), *then)
    active(well, yesterday(), *today)
    assert sentences(well).get("fell") == ([fell.format(yesterday())] if fell else None)


def ended_so(url: str, days_ago: int, **outcomes: int) -> None:
    for outcome, requests in outcomes.items():
        words = outcome.replace("rate_limited", "rate-limited").replace("_", " ")
        query(
            url,
            "INSERT INTO ingest VALUES (CAST(now() AT TIME ZONE 'UTC' AS date)"
            f" - {days_ago}, '{words}', {requests})",
        )


def test_refusals_of_more_than_5_percent_are_found_by_what_they_were(well: str) -> None:
    ended_so(well, 0, accepted=100, invalid=3, too_large=1, newer_schema=1)
    ended_so(well, 1, accepted=80, duplicate=10, rate_limited=2, too_many_ids=4)
    assert "refused" not in sentences(well)
    query(well, "UPDATE ingest SET requests = 4 WHERE outcome = 'invalid'")
    assert sentences(well)["refused"] == [
        (
            "11 of 201 requests since yesterday were refused:"
            " 4 invalid, 1 too large, 2 rate-limited, 4 too many ids."
        )
    ]


def test_refusals_of_the_day_before_yesterday_and_of_few_requests_are_not_found(well: str) -> None:
    ended_so(well, 2, invalid=1_000)
    ended_so(well, 1, invalid=5, accepted=14, newer_schema=50)
    assert "refused" not in sentences(well)
    ended_so(well, 0, unavailable=1)
    assert "refused" in sentences(well)


@pytest.mark.parametrize(("days_ago", "found"), [(0, True), (1, True), (2, False)])
def test_a_newer_schema_that_knocks_is_found(
    well: str,
    days_ago: int,
    found: bool,  # noqa: FBT001 - as pytest gives it
) -> None:
    ended_so(well, days_ago, newer_schema=1)
    assert ("newer schema" in sentences(well)) is found


ELSEWHERE = "192.0.2.0/24"


def believing(proxies: str, url: str, output: Path) -> AbstractContextManager[Collector]:
    """Run a collector that knows these proxies, and limits what a client may do."""
    return serving(url, output, COLLECTOR_CLIENT_RATE="1000", FORWARDED_ALLOW_IPS=proxies)


def brought(own: Collector, addresses: int, requests: int) -> None:
    """Have requests arrive of which a proxy says that they come from so many addresses."""
    for number in range(requests):
        forwarded = f"203.0.113.{number % addresses}"
        assert own.post(of(number), x_forwarded_for=forwarded).status_code == 202


def test_a_fleet_behind_a_proxy_that_is_not_named_is_found_in_two_processes_and_after_a_restart(
    migrated: str, tmp_path: Path
) -> None:
    with (
        believing(ELSEWHERE, migrated, tmp_path / "a") as one,
        believing(ELSEWHERE, migrated, tmp_path / "b") as other,
    ):
        brought(one, 30, 20)
        brought(other, 30, 15)
    with believing(ELSEWHERE, migrated, tmp_path / "c") as again:
        brought(again, 30, 14)
        assert "one client" not in sentences(migrated)
    assert "one client" not in sentences(migrated)  # 49 requests
    with believing(ELSEWHERE, migrated, tmp_path / "d") as again:
        brought(again, 1, 1)
    assert sentences(migrated)["one client"] == [
        (
            "46 of 50 requests since yesterday came from one address. If that is your proxy, name"
            " it in FORWARDED_ALLOW_IPS: all installs share its limits."
        )
    ]


def test_a_fleet_behind_a_proxy_that_is_named_is_no_finding_and_no_address_is_stored(
    migrated: str, tmp_path: Path
) -> None:
    with (
        believing("127.0.0.1", migrated, tmp_path / "a") as one,
        believing("127.0.0.1", migrated, tmp_path / "b") as other,
    ):
        brought(one, 30, 60)
        brought(other, 30, 30)
    with believing("127.0.0.1", migrated, tmp_path / "c") as again:
        brought(again, 30, 30)
    assert "one client" not in sentences(migrated)
    assert query(migrated, f"SELECT requests FROM ingest WHERE outcome = '{BUSIEST}'") == [(1,)]
    tables = query(migrated, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    stored = [query(migrated, f"SELECT CAST(t AS text) FROM {name} t") for (name,) in tables]
    assert "accepted" in str(stored)
    for trace in ("203.0.113", "127.0.0.1"):
        assert trace not in str(stored)
    assert "203.0.113" not in "".join((tmp_path / name).read_text() for name in "abc")


def test_without_limits_clients_are_not_counted(migrated: str, tmp_path: Path) -> None:
    with serving(
        migrated, tmp_path / "log", COLLECTOR_CLIENT_RATE="0", COLLECTOR_CLIENT_INSTALLS="0"
    ) as own:
        brought(own, 1, 60)
    assert "one client" not in sentences(migrated)


def test_half_of_the_requests_from_one_client_are_found_and_are_no_outcome(well: str) -> None:
    ended_so(well, 0, accepted=30, rate_limited=1, newer_schema=20)
    ended_so(well, 1, accepted=49)
    ended_so(well, 2, accepted=1_000)
    ended_so(well, 0, from_the_busiest_client=20)
    ended_so(well, 1, from_the_busiest_client=29)
    ended_so(well, 2, from_the_busiest_client=1_000)
    assert set(sentences(well)) == {"newer schema"}
    query(well, f"UPDATE ingest SET requests = 30 WHERE outcome = '{BUSIEST}' AND requests = 29")
    assert sentences(well)["one client"][0].startswith("50 of 100 requests since yesterday came")
    query(well, f"UPDATE ingest SET requests = 90 WHERE outcome = '{BUSIEST}' AND requests = 30")
    assert sentences(well)["one client"][0].startswith("100 of 100 requests")
    assert "refused" not in sentences(well)


def test_an_unlisted_version_on_5_installs_is_named(well: str) -> None:
    heard(well, now(), range(100, 105), "7.0.0")
    heard(well, now(), range(200, 204), "7.0.1")
    heard(well, now(), range(300, 310), "7.0.2-dev")
    heard(well, now() - timedelta(days=3), range(400, 410), "7.0.3")
    assert sentences(well) == {
        "unlisted version": [
            (
                "5 installs run 7.0.0, which is not listed: if it is yours, run"
                " `python -m app.collector releases add 7.0.0 --on DAY`."
            )
        ]
    }
    for without in ("excluded = 'invented'", "established_on = NULL"):
        query(well, f"UPDATE install SET {without} WHERE body ->> 'version' = '7.0.0'")
        assert sentences(well) == {}
        query(well, "UPDATE install SET excluded = NULL, established_on = current_date")
    listed(well, "7.0.0")
    assert sentences(well) == {}


def test_a_database_that_is_not_ready_is_one_sentence_and_nothing_else_is_looked_at(
    well: str,
) -> None:
    query(well, "UPDATE collector_alembic_version SET version_num = '9999'")
    sentence = "The tables are at revision 9999, of a newer release: run that release."
    ended = run(COLLECTOR_DATABASE_URL=well)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, f"{sentence}\n", "")
    ended = run("--json", COLLECTOR_DATABASE_URL=well)
    assert ended.returncode == 1
    assert json.loads(ended.stdout) == {
        "ok": False,
        "findings": [{"what": "not ready", "sentence": sentence}],
    }


def test_a_wrong_password_is_a_sentence_without_it(locked_url: str) -> None:
    ended = run(COLLECTOR_DATABASE_URL=locked_url)
    sentence = "COLLECTOR_DATABASE_URL: the database refuses the password.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, sentence, "")


def test_a_read_only_database_is_a_sentence(well: str) -> None:
    name = make_url(well).database
    query(well, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert sentences(well) == {"not ready": ["The database is read-only."]}


def test_each_finding_is_a_line_of_its_own(well: str) -> None:
    ended_so(well, 0, newer_schema=2)
    silenced(well, 30)
    ended = run(COLLECTOR_DATABASE_URL=well)
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        "No heartbeat was accepted for 30 hours.",
        (
            "2 requests since yesterday had a newer schema than this collector supports:"
            " upgrade it today to lose none of them."
        ),
    ]


def test_settings_that_are_missing_or_wrong_are_exit_2() -> None:
    missing = run()
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "COLLECTOR_DATABASE_URL is not set.\n"
    wrong = run(COLLECTOR_DATABASE_URL=NOWHERE, COLLECTOR_RETENTION_DAYS="opensesame")
    assert (wrong.returncode, wrong.stderr) == (2, "COLLECTOR_RETENTION_DAYS must be a number.\n")


def test_it_ends_within_ten_seconds_whatever_the_server_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://someone:opensesame@127.0.0.1:{silent.getsockname()[1]}/x"
        began = time.monotonic()
        ended = run(COLLECTOR_DATABASE_URL=url)
    assert time.monotonic() - began < 10
    assert (ended.returncode, ended.stdout) == (1, "The database does not answer.\n")


def test_it_does_not_wait_for_what_never_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(check, "_look", lambda _: os.read(reading, 1))
    began = time.monotonic()
    [finding] = check.check(NOWHERE, within=0.2).findings
    assert time.monotonic() - began < 5
    assert finding == check.Finding("not ready", "The database does not answer.")
    for descriptor in (writing, reading):
        os.close(descriptor)
