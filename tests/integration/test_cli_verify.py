"""``audit --verify`` finds what is not as it was written, in the outbox and beside a log."""

import io
import json
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, text

from app import outbox, report
from app.delivery import lease
from app.payload import NEWEST
from app.pipeline import Pipeline
from app.verification import NOT_FROZEN, Problem
from tests.conftest import Clock
from tests.support.command import Ended, command, commands, commands_each_in
from tests.support.database import give_notice, run
from tests.support.processes import Processes
from tests.support.published import EXAMPLE
from tests.support.receiver import Receiver, answer

NOTICED_ON = "2026-01-01"
ID = UUID("0a0b3a8a-7e62-4a4e-9b6f-1a4e2d2dfd99")

PUT = """
INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, attempts, created_at,
    next_attempt_at, expires_at, finished_at)
VALUES (:id, :day, :instance_id, :body, :state, :attempts, :at, :at, :at,
    CASE WHEN :state <> 'pending' THEN CAST(:at AS timestamptz) END)
"""
TRY = """
INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome, endpoint)
SELECT :id, :n, now(), CASE WHEN outcome IS NOT NULL THEN now() END, outcome, 'http://a/'
FROM CAST(:outcome AS text) AS outcome
"""


def at(day: str) -> str:
    return f"{day}T02:30:00+00:00"


def body_of(day: str) -> str:
    """Return the canonical body of the published example, as of another day."""
    tree = {**json.loads(EXAMPLE), "sent_at": at(day)}
    return NEWEST.model_validate(tree).canonical()


def put(db: Engine, day: str, tries: dict[int, str | None] | None = None, **row: Any) -> UUID:
    """Put a row that was sent at the first try into the outbox, but for what is said of it."""
    tries = {1: "sent"} if tries is None else tries
    values = {
        "id": uuid4(),
        "day": day,
        "instance_id": ID,
        "body": body_of(day),
        "state": "sent",
        "at": at(day),
        "attempts": len(tries),
        **row,
    }
    run(db, PUT, **values)
    for n, outcome in tries.items():
        run(db, TRY, id=values["id"], n=n, outcome=outcome)
    row_id: UUID = values["id"]
    return row_id


@pytest.fixture
def every_state(
    pipeline: Pipeline, clock: Clock, db: Engine, receiver: Receiver
) -> list[tuple[str, list[str | None]]]:
    """A row for each state, and an attempt for each outcome, as the pipeline has left them."""
    give_notice(db, NOTICED_ON)

    def begin(day: str) -> None:
        clock(at(day))
        pipeline.sweep()
        assert pipeline.write_heartbeat()

    def die_in_mid_post() -> None:
        with pipeline.transaction() as connection:
            claim = outbox.claim(connection, lease(pipeline.settings))
            assert claim
            outbox.begin(connection, claim, lease(pipeline.settings), endpoint=receiver.url)

    def lose_the_lease() -> None:
        clock("2026-05-05T02:32:00Z")
        pipeline.sweep()

    receiver.answers = [answer(202), answer(400), answer(429, "Retry-After: 9999"), answer(202)]
    for day in ("2026-05-01", "2026-05-02", "2026-05-03"):
        begin(day)
        pipeline.drain()
    begin("2026-05-04")
    die_in_mid_post()
    clock("2026-05-04T02:32:00Z")
    begin("2026-05-05")
    receiver.during = lose_the_lease
    pipeline.drain()
    begin("2026-05-06")
    run(db, "DELETE FROM instance")
    pipeline.sweep()
    begin("2026-05-07")
    die_in_mid_post()
    clock("2026-05-08T02:30:00Z")
    assert pipeline.write_heartbeat()
    return [
        ("pending", []),
        ("sending", [None]),
        ("discarded", []),
        ("expired", ["sent"]),
        ("expired", [None]),
        ("expired", ["retryable"]),
        ("rejected", ["rejected"]),
        ("sent", ["sent"]),
    ]


def test_what_the_pipeline_leaves_behind_verifies_in_every_state(
    environment: dict[str, str],
    pipeline: Pipeline,
    every_state: list[tuple[str, list[str | None]]],
    receiver: Receiver,
    tmp_path: Path,
) -> None:
    rows = report.audit(pipeline).rows
    found = [(row["state"], [each["outcome"] for each in row["tries"]]) for row in rows]
    assert found == every_state
    log = tmp_path / "log"
    left = [receiver.requests[n].body for n in (0, 3)]
    log.write_bytes(b"".join(b"telemetry.payload %s\n" % body for body in left))
    off = {"TELEMETRY_ENABLED": "false"}
    shown, reported, beside, while_off = commands_each_in(
        environment,
        [
            ("audit --verify", {}),
            ("audit --verify --json", {}),
            (f"audit --verify --json --log {log}", {}),
            ("audit --verify", off),
        ],
    )
    assert {ended.code for ended in (shown, reported, beside, while_off)} == {0}
    assert shown.out.startswith("No problem in 8 heartbeats with 6 attempts.\n")
    assert shown.out == while_off.out
    counted: dict[str, Any] = {"rows": 8, "attempts": 6, "logged": None, "too_long": []}
    assert reported.json == {"verified": True, **counted, "problems": [], "remote": None}
    assert beside.json == {**reported.json, "logged": 2}


def test_an_outbox_without_a_row_verifies(environment: dict[str, str]) -> None:
    shown, reported = commands(environment, "audit --verify", "audit --verify --json")
    assert (shown.code, reported.code) == (0, 0)
    nothing: dict[str, Any] = {
        "rows": 0,
        "attempts": 0,
        "logged": None,
        "too_long": [],
        "problems": [],
        "remote": None,
    }
    assert reported.json == {"verified": True, **nothing}


OTHER = "5b1c2f63-0c43-4f0e-9c56-0d2b0e6a9f10"

Spoilt = tuple[Callable[[str], str], str]
BODIES: list[Spoilt] = [
    (
        lambda body: body.replace('"sites":', '"domains":"1-10","sites":'),
        "its body does not match schema 1: counts.domains (extra_forbidden)",
    ),
    (
        lambda body: body.replace('"sites":"10-100"', '"sites":987654321'),
        "its body does not match schema 1: counts.sites (literal_error)",
    ),
    (
        lambda body: body.replace('_schema":1', '_schema":2'),
        "its body has an unknown telemetry_schema",
    ),
    (lambda body: f"[{body}]", "its body is not a JSON object with a telemetry_schema"),
    (lambda body: f"{body} ", "its body is not in canonical form"),
    (lambda body: body.replace(":", ": ", 1), "its body is not in canonical form"),
    (
        lambda body: body.replace("{", '{"edition":"ee",', 1),
        "its body is not in canonical form",
    ),
    (
        lambda body: body.replace(str(ID), OTHER),
        "its body has a different instance_id than the row",
    ),
    (
        lambda body: body.replace("02:30:00", "02:30:01"),
        "its body's sent_at is not the time at which the row was written",
    ),
]
LEDGERS: list[tuple[dict[int, str | None], dict[str, Any], list[str]]] = [
    ({1: "sent"}, {"attempts": 2}, ["it counts 2 attempts, and the stored ones are 1"]),
    ({1: "sent"}, {"attempts": 0}, ["it counts 0 attempts, and the stored ones are 1"]),
    (
        {1: "retryable", 3: "sent"},
        {"attempts": 3},
        ["it counts 3 attempts, and the stored ones are 1, 3"],
    ),
    (
        {2: None},
        {"state": "expired", "attempts": 1},
        ["it counts 1 attempts, and the stored ones are 2"],
    ),
    (
        {},
        {"attempts": 1},
        [
            "it counts 1 attempts, and the stored ones are none",
            "it is sent, but no stored attempt was",
        ],
    ),
    ({1: "rejected"}, {}, ["it is sent, but no stored attempt was"]),
    ({1: None}, {}, ["it is sent, but no stored attempt was"]),
    ({1: "sent"}, {"state": "rejected"}, ["it is rejected, but no stored attempt was"]),
]


def test_each_row_that_is_not_as_it_was_written_is_named_and_its_body_is_not_repeated(
    environment: dict[str, str], db: Engine
) -> None:
    days = iter(str(date(2026, 5, 1) + timedelta(days=n)) for n in range(100))
    expected: set[str] = set()
    for spoil, sentence in BODIES:
        day = next(days)
        row_id = put(db, day, body=spoil(body_of(day)))
        expected.add(f"{day} {row_id}: {sentence}.")
    for tries, row, sentences in LEDGERS:
        day = next(days)
        row_id = put(db, day, tries, **row)
        expected |= {f"{day} {row_id}: {sentence}." for sentence in sentences}
    put(db, next(days))
    shown, reported = commands(environment, "audit --verify", "audit --verify --json")
    assert (shown.code, reported.code) == (1, 1)
    assert set(shown.out.splitlines()) == expected
    assert len(shown.out.splitlines()) == len(expected)
    assert f"{len(expected)} problems in 18 heartbeats" in shown.sentence
    assert reported.json["verified"] is False
    lines = {"{day} {id}: {sentence}.".format(**each) for each in reported.json["problems"]}
    assert lines == expected
    for ended in (shown, reported):
        assert not repeats_a_body(ended)


def repeats_a_body(ended: Ended) -> bool:
    """Whether a command has shown a value, or a bit of JSON, that only a body has."""
    said = ended.out + ended.err
    return any(
        value in said for value in (str(ID), OTHER, "10-100", "docker", "987654321", '{"tele')
    )


TRIGGER = "BEFORE UPDATE ON telemetry_outbox FOR EACH ROW"
ANEW = (
    "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox;"
    "CREATE TRIGGER telemetry_outbox_frozen {} EXECUTE FUNCTION telemetry_outbox_frozen()"
)
WEAKER = {
    "is dropped": "DROP TRIGGER telemetry_outbox_frozen ON telemetry_outbox",
    "is dropped with its function": "DROP FUNCTION telemetry_outbox_frozen CASCADE",
    "is disabled": "ALTER TABLE telemetry_outbox DISABLE TRIGGER telemetry_outbox_frozen",
    "fires for a replica alone": (
        "ALTER TABLE telemetry_outbox ENABLE REPLICA TRIGGER telemetry_outbox_frozen"
    ),
    "has another name": (
        "ALTER TRIGGER telemetry_outbox_frozen ON telemetry_outbox RENAME TO frozen"
    ),
    "does nothing": (
        "CREATE OR REPLACE FUNCTION telemetry_outbox_frozen() RETURNS trigger LANGUAGE plpgsql"
        " AS $$BEGIN RETURN NEW; END$$"
    ),
    "fires for some columns": ANEW.format(TRIGGER.replace("UPDATE", "UPDATE OF payload")),
    "fires for nothing": ANEW.format(f"{TRIGGER} WHEN (false)"),
    "fires afterwards": ANEW.format(TRIGGER.replace("BEFORE", "AFTER")),
    "fires for a statement": ANEW.format(TRIGGER.replace("ROW", "STATEMENT")),
    "is followed by another": (
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
        " NEW.payload = json '{}'; RETURN NEW; END$$;"
        f"CREATE TRIGGER zz {TRIGGER} EXECUTE FUNCTION spoil()"
    ),
    "fires for another event": ANEW.format(TRIGGER.replace("UPDATE", "INSERT")),
}


class TestTheTriggerThatFreezesARow:
    def test_is_missed_where_it_is_weaker_in_any_way(self, db: Engine) -> None:
        assert [how for how, statement in WEAKER.items() if stands_after(db, statement)] == []

    def test_is_recognised_in_every_form_that_works(self, db: Engine) -> None:
        always = "ALTER TABLE telemetry_outbox ENABLE ALWAYS TRIGGER telemetry_outbox_frozen"
        assert stands_after(db, always)
        assert stands_after(db, ANEW.format(TRIGGER))

    def test_is_reported_next_to_what_was_changed_without_it(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        row_id = put(db, "2026-05-02")
        run(db, "ALTER TABLE telemetry_outbox DISABLE TRIGGER telemetry_outbox_frozen")
        run(db, f"UPDATE telemetry_outbox SET instance_id = '{OTHER}'")
        ended = command(environment, "audit", "--verify")
        assert ended.code == 1
        assert ended.out.splitlines() == [
            f"telemetry_outbox: {NOT_FROZEN}.",
            f"2026-05-02 {row_id}: its body has a different instance_id than the row.",
        ]
        assert ended.sentence == "2 problems in 1 heartbeat with 1 attempt."


def stands_after(db: Engine, statement: str) -> bool:
    """Whether the trigger is found to stand after a change, which is then taken back."""
    with db.connect() as connection:
        connection.execute(text(statement))
        return outbox.frozen(connection)


def problems(
    pipeline: Pipeline, lines: list[str] | None = None, since: str | None = None
) -> list[Problem]:
    day = date.fromisoformat(since) if since else None
    log = None if lines is None else io.BytesIO("".join(lines).encode())
    return report.verify(pipeline, log, since=day).problems


FIRST, SECOND, THIRD = "2026-05-01", "2026-05-02", "2026-05-03"


def line_of(day: str) -> str:
    return f"telemetry.payload {body_of(day)}\n"


def test_a_log_is_read_whoever_has_written_its_lines_and_whatever_else_is_in_it(
    environment: dict[str, str], db: Engine, tmp_path: Path
) -> None:
    lines = [
        b"telemetry.enabled to=http://127.0.0.1/",
        b"GET /caf\xe9?\xff\xfe 200",
        b"02:30:01 worker.1    | telemetry.payload %b",
        b"\x1b[36mworker-1  | \x1b[0mtelemetry.payload %b\r",
        b"\xff\x00 telemetry.payload %b\r",
        b"2026-05-02T02:30:01.1+00:00 app[worker.1]: telemetry.payload %b",
        b"May 02 02:30:01 host consentos-telemetry[4711]: telemetry.payload %b",
        b"telemetry.attempt id=1 n=1 outcome=sent",
        b"[pod/telemetry-0/worker] telemetry.payload %b",
    ]
    days = iter(str(date(2026, 5, 1) + timedelta(days=n)) for n in range(100))
    log = tmp_path / "log"
    with log.open("wb") as file:
        for line in lines:
            if b"%b" in line:
                day = next(days)
                put(db, day)
                line = line.replace(b"%b", body_of(day).encode())  # noqa: PLW2901 - filled in
            file.write(line + b"\n")
        file.write(line_of(FIRST).encode())
    reported = command(environment, "audit", "--verify", "--json", "--log", str(log))
    assert (reported.code, reported.json["rows"], reported.json["logged"]) == (0, 6, 7)
    shown = command(environment, "audit", "--verify", "--log", "-", typed=log.read_text("latin-1"))
    assert shown.code == 0
    assert shown.out.startswith("No problem in 6 heartbeats with 6 attempts and 7 logged bodies.\n")


def test_a_logged_body_that_is_not_stored_is_named_by_its_line_and_not_repeated(
    environment: dict[str, str], db: Engine, tmp_path: Path
) -> None:
    put(db, FIRST)
    good = line_of(FIRST)
    changed, cut = good.replace("docker", "dockes"), f"{good[:-2]}\n"
    log = tmp_path / "log"
    log.write_text("".join([good, "hello\n", changed, good, cut, line_of(SECOND)]))
    ended = command(environment, "audit", "--verify", "--log", str(log))
    assert ended.code == 1
    not_stored = "the log has a body that is not stored"
    not_whole = "the log has a body in this line that cannot be read: it is not a whole JSON object"
    assert ended.out.splitlines() == [
        f"log, line 3: {not_stored}.",
        f"log, line 5: {not_whole}.",
        f"log, line 6: {not_stored}.",
    ]
    assert ended.sentence == "3 problems in 1 heartbeat with 1 attempt and 5 logged bodies."
    assert not repeats_a_body(ended)


def test_what_has_left_must_be_logged_even_where_its_row_was_not_sent_in_time(
    pipeline: Pipeline, db: Engine
) -> None:
    put(db, FIRST)
    expired = put(db, SECOND, {1: None, 2: "sent"}, state="expired")
    put(db, THIRD, {1: "retryable"}, state="expired")
    missing = Problem(
        "it was sent, but the log does not have its body", date.fromisoformat(SECOND), expired
    )
    assert problems(pipeline, [line_of(FIRST)]) == [missing]
    assert problems(pipeline, [line_of(SECOND), line_of(FIRST)]) == []


class TestSinceADay:
    def test_earlier_rows_and_earlier_bodies_are_left_out(
        self, environment: dict[str, str], pipeline: Pipeline, db: Engine, tmp_path: Path
    ) -> None:
        put(db, FIRST, {1: None}, body="{}")
        put(db, SECOND)
        lines = [line_of("2026-04-30"), line_of(SECOND)]
        assert len(problems(pipeline, lines)) == 4
        assert problems(pipeline, lines, SECOND) == []
        log = tmp_path / "log"
        log.write_text("".join(lines))
        line = f"audit --verify --json --log {log} --since"
        late, later = commands(environment, f"{line} {SECOND}", f"{line} {THIRD}")
        nothing: dict[str, Any] = {
            "verified": True,
            "too_long": [],
            "problems": [],
            "remote": None,
        }
        counted = {"attempts": 1, "rows": 1, "logged": 1}
        assert (late.code, late.json) == (0, {**nothing, **counted})
        counted = dict.fromkeys(counted, 0)
        assert (later.code, later.json) == (0, {**nothing, **counted})

    def test_a_body_that_cannot_be_read_is_not(self, pipeline: Pipeline) -> None:
        unreadable = line_of(FIRST)[:-2]
        (problem,) = problems(pipeline, [line_of(FIRST), unreadable], SECOND)
        assert problem.line == 2

    def test_a_row_of_the_day_is_not(self, pipeline: Pipeline, db: Engine) -> None:
        row_id = put(db, FIRST)
        (problem,) = problems(pipeline, [], FIRST)
        assert problem.id == row_id


def test_options_that_do_not_go_together_are_a_wrong_call(
    environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("")
    calls = [
        f"audit --log {log}",
        f"audit --log {log} last",
        "audit --since 2026-05-02 last",
        "audit --since yesterday --verify",
        "audit --limit 3 --all",
        "audit --limit 0",
        "audit --limit 3 --verify",
        "audit --all last",
        "audit --state missing",
        "audit --state sent --verify",
        f"audit --verify {uuid4()}",
        "audit --verify last",
        f"audit --verify --export {tmp_path / 'export'}",
        f"audit --verify --log {tmp_path / 'missing'}",
    ]
    ended = commands(environment, *calls)
    assert [each.code for each in ended] == [2] * len(calls)
    assert {each.out for each in ended} == {""}
    assert "No such file" in " ".join(ended[-1].err.replace("│", " ").split())


def test_the_log_of_a_worker_is_what_its_outbox_says_has_left(
    environment: dict[str, str],
    pipeline: Pipeline,
    processes: Processes,
    clock: Clock,
    db: Engine,
    receiver: Receiver,
) -> None:
    give_notice(db, NOTICED_ON)
    clock(at(SECOND))
    assert pipeline.write_heartbeat()
    worker = processes.start("worker")
    processes.wake("drain")
    worker.wait_for("telemetry.attempt ")
    log = worker.log
    sent, unsent = tmp_logs(log)
    verify = "audit --verify --json --log"
    good, changed, missing = commands(
        environment, f"{verify} {log}", f"{verify} {sent}", f"{verify} {unsent}"
    )
    assert len(receiver.requests) == 1
    assert (good.code, good.json["rows"], good.json["logged"]) == (0, 1, 1)
    assert (changed.code, len(changed.json["problems"])) == (1, 2)
    assert (missing.code, len(missing.json["problems"])) == (1, 1)


def tmp_logs(log: Path) -> tuple[Path, Path]:
    """Return a copy of a log with one digit changed in the body, and one without the body."""
    changed, without = log.with_suffix(".changed"), log.with_suffix(".without")
    said = log.read_bytes()
    changed.write_bytes(said.replace(b'"telemetry_schema":1', b'"telemetry_schema":3'))
    without.write_bytes(said.replace(b"telemetry.payload ", b"telemetry.nothing "))
    return changed, without
