"""``audit`` shows the whole outbox, and of each row the bytes that left."""

import json
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.command import command, commands
from tests.support.database import attempts, give_notice, one, run
from tests.support.receiver import Receiver, answer

ODD = '{"telemetry_schema" : 1,\t"b":  [ 2,1 ], "a": "\\u0000 [red]\\u00e9[/]", "a": 1e2}'


@pytest.fixture
def three_days(pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver) -> list[str]:
    """A day that was sent, one that was rejected and one that waits; their ids in that order."""
    give_notice(db, "2026-01-01")
    receiver.answers = [answer(202), answer(400), answer(429, "Retry-After: 3600")]
    for day in ("2026-05-02", "2026-05-03", "2026-05-04"):
        clock(f"{day}T02:30:00Z")
        assert pipeline.write_heartbeat()
        pipeline.drain()
    ids = "SELECT array_agg(id::text ORDER BY day) FROM telemetry_outbox"
    found: list[str] = one(db, ids)
    return found


def test_the_newest_day_comes_first_with_every_attempt(
    environment: dict[str, str], three_days: list[str], db: Engine
) -> None:
    shown, listed = commands(environment, "audit", "audit --json")
    assert (shown.code, shown.err) == (0, "")
    places = [shown.out.index(row_id) for row_id in three_days]
    assert places == sorted(places, reverse=True)
    for words in ("1. 2026-05-02 02:30:", "sent (HTTP 202)", "rejected (HTTP 400)", "(HTTP 429)"):
        assert words in shown.out
    reported = listed.json
    assert [row["id"] for row in reported] == three_days[::-1]
    assert [row["state"] for row in reported] == ["pending", "rejected", "sent"]
    assert [row["tries"][0]["http_status"] for row in reported] == [429, 400, 202]
    assert {each["outbox_id"] for row in reported for each in row["tries"]} == set(three_days)
    assert len(attempts(db)) == 3


def test_a_row_begins_with_the_bytes_that_were_sent_and_a_machine_gets_them_too(
    environment: dict[str, str], three_days: list[str], receiver: Receiver
) -> None:
    sent, rejected = f"audit {three_days[0]}", f"audit {three_days[1]} --json"
    shown, listed = commands(environment, sent, rejected)
    assert shown.code == 0
    assert shown.out.encode() == receiver.requests[0].body + b"\n"
    assert "sent (HTTP 202)" in shown.err
    assert receiver.url in shown.err
    reported = listed.json
    assert reported["payload"].encode() == receiver.requests[1].body
    assert [each["n"] for each in reported["tries"]] == [1]


def test_not_a_byte_of_what_is_stored_is_tidied_up(environment: dict[str, str], db: Engine) -> None:
    row_id = uuid4()
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, created_at, next_attempt_at,"
        " expires_at) VALUES (:id, '2026-05-02', :id, :payload, now(), now(), now())",
        id=row_id,
        payload=ODD,
    )
    shown = command(environment, "audit", str(row_id))
    assert shown.out.split("\n", 1)[0] == ODD


def test_an_unknown_id_and_an_invalid_one_are_distinguished(
    environment: dict[str, str],
) -> None:
    unknown, malformed = commands(environment, f"audit {uuid4()}", "audit yesterday")
    assert (unknown.code, unknown.out) == (1, "")
    assert unknown.sentence.startswith("No row of the outbox has the id")
    assert (malformed.code, malformed.out) == (2, "")


def test_a_row_is_named_by_its_day_too_or_as_the_last_of_which_anything_left(
    environment: dict[str, str], three_days: list[str], pipeline: Pipeline, clock: Clock
) -> None:
    clock("2026-05-05T02:30:00Z")
    assert pipeline.write_heartbeat()
    rejected, last = three_days[1:]
    *lines, unsent = commands(
        environment,
        *("audit 2026-05-03", f"audit {rejected}", "audit last", f"audit {last}"),
        "audit 2026-05-05 --json",
    )
    by_day, by_id, by_last, by_its_id = [ended.out for ended in lines]
    assert by_day == by_id != by_last == by_its_id
    assert (unsent.code, unsent.json["state"], unsent.json["tries"]) == (0, "pending", [])


def test_a_row_that_is_not_there_is_reported_in_a_sentence(environment: dict[str, str]) -> None:
    last, day, impossible = commands(
        environment, "audit last", "audit 2026-05-02", "audit 2026-02-30"
    )
    assert (last.code, last.out) == (day.code, day.out) == (1, "")
    assert last.sentence == "No heartbeat has been attempted yet."
    assert day.sentence == "No row of the outbox has the day 2026-05-02."
    assert (impossible.code, impossible.out) == (2, "")


class TestExport:
    def test_writes_each_row_on_a_line_with_its_attempts_the_oldest_first(
        self, environment: dict[str, str], three_days: list[str], receiver: Receiver, tmp_path: Path
    ) -> None:
        file = tmp_path / "export"
        written, listed = commands(environment, f"audit --export {file}", "audit --json")
        printed = command(environment, "audit", "--export", "-")
        assert (written.code, written.out) == (0, "")
        assert written.err == f"3 heartbeats with 3 attempts written to {file}.\n"
        assert (printed.code, printed.out) == (0, file.read_text())
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows == listed.json[::-1]
        assert [row["id"] for row in rows] == three_days
        assert [row["payload"].encode() for row in rows] == [r.body for r in receiver.requests]

    def test_leaves_a_file_that_exists_as_it_is(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        file = tmp_path / "export"
        file.write_text("precious")
        refused = command(environment, "audit", "--export", str(file))
        assert (refused.code, refused.out) == (1, "")
        assert refused.sentence == f"{file} cannot be written: File exists."
        assert file.read_text() == "precious"

    def test_of_an_empty_outbox_is_an_empty_file(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        file = tmp_path / "export"
        written = command(environment, "audit", "--export", str(file))
        assert written.err == f"0 heartbeats with 0 attempts written to {file}.\n"
        assert file.read_text() == ""

    @pytest.mark.parametrize(
        ("arguments", "url", "code"),
        [("", "postgresql://operator@127.0.0.1:1/consentos", 1), (" last", None, 2)],
    )
    def test_that_cannot_be_made_leaves_no_file_to_take_for_one(
        self,
        environment: dict[str, str],
        tmp_path: Path,
        arguments: str,
        url: str | None,
        code: int,
    ) -> None:
        file = tmp_path / "export"
        here = {**environment, "DATABASE_URL": url or environment["DATABASE_URL"]}
        assert command(here, "audit", "--export", str(file), *arguments.split()).code == code
        assert not file.exists()


def test_an_empty_outbox_is_an_empty_list(environment: dict[str, str]) -> None:
    reported = command(environment, "audit", "--json", TELEMETRY_ENABLED="false")
    assert (reported.code, reported.json) == (0, [])


def test_a_post_that_goes_on_is_not_reported_as_one_that_died(
    pipeline: Pipeline, environment: dict[str, str], clock: Clock, db: Engine, receiver: Receiver
) -> None:
    give_notice(db, "2026-01-01")
    clock("2026-05-02T02:30:00Z")
    pipeline.write_heartbeat()
    meanwhile: list[str] = []
    receiver.during = lambda: meanwhile.append(command(environment, "audit").out)
    pipeline.drain()
    assert "in flight" in meanwhile[0]
    assert "died" not in meanwhile[0]
