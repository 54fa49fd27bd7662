"""``send --by-hand`` prints the day's heartbeat for its operator to carry, and never sends it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from sqlalchemy import Engine

from app import outbox
from app.pipeline import Pipeline
from tests.conftest import Clock
from tests.support.collector import JSON, Collector
from tests.support.command import command, commands, commands_each_in
from tests.support.database import count, give_notice, one, outbox_row, run
from tests.support.processes import ROOT, Processes, minimal
from tests.support.receiver import Receiver
from tests.support.steps import until_worked_off

DAY = "2026-05-02"
STATE = "SELECT state FROM telemetry_outbox"
WAITS = "UPDATE telemetry_outbox SET {}"


@pytest.fixture
def morning(clock: Clock) -> None:
    clock(f"{DAY}T02:30:01Z")


@pytest.fixture
def waiting(pipeline: Pipeline, clock: Clock, db: Engine) -> None:
    """The day's heartbeat is written, and waits."""
    clock(f"{DAY}T02:30:01Z")
    give_notice(db, "2026-01-01")
    assert pipeline.write_heartbeat()


@pytest.mark.usefixtures("morning")
def test_the_day_is_written_and_ended_and_its_bytes_are_printed_as_often_as_asked(
    environment: dict[str, str], db: Engine, receiver: Receiver
) -> None:
    first = command(environment, "send", "--by-hand")
    row = outbox_row(db)
    assert (first.code, first.out) == (0, row["payload"])
    *logged, said = first.err.splitlines()
    assert [line.split()[0] for line in logged] == ["telemetry.queued", "telemetry.discarded"]
    assert "reason='carried by hand'" in logged[1] or 'reason="carried by hand"' in logged[1]
    assert said == (
        f"The heartbeat of {DAY} is yours to carry: POST these bytes to {receiver.url}. It is not"
        " sent from here."
    )
    assert (row["state"], row["last_error"], row["attempts"]) == (
        "discarded",
        "carried by hand",
        0,
    )
    assert row["finished_at"]
    again, reported = commands(environment, "send --by-hand", "send --by-hand --json")
    assert (again.code, again.out, again.err) == (0, first.out, f"{said}\n")
    assert (reported.code, reported.json["sent"], reported.json["said"]) == (0, False, said)
    assert (reported.json["day"], reported.json["row"]["payload"]) == (DAY, row["payload"])
    assert [*reported.json] == ["sent", "said", "day", "row"]
    assert outbox_row(db) == row
    assert receiver.connections == count(db, "telemetry_notice") == 0


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("not_before", ["NULL", "now() + interval '5 h'"])
def test_neither_a_backoff_nor_a_retry_after_is_waited_for(
    environment: dict[str, str], db: Engine, not_before: str
) -> None:
    later = f"next_attempt_at = now() + interval '5 h', not_before = {not_before}"
    run(db, WAITS.format(f"drains = 7, last_error = 'HTTP 429', {later}"))
    carried = command(environment, "send", "--by-hand")
    assert (carried.code, carried.out) == (0, outbox_row(db)["payload"])
    assert outbox_row(db)["last_error"] == "carried by hand"


@pytest.mark.usefixtures("waiting")
def test_no_worker_sends_it_after_that_and_the_day_is_used_up(
    environment: dict[str, str],
    pipeline: Pipeline,
    processes: Processes,
    clock: Clock,
    db: Engine,
    receiver: Receiver,
) -> None:
    assert command(environment, "send", "--by-hand").code == 0
    worker = processes.start("worker")
    processes.wake("heartbeat")
    processes.wake("sweep")
    processes.wake("drain")
    worker.wait_for("telemetry.enabled")
    until_worked_off(processes)
    pipeline.sweep()
    assert not pipeline.write_heartbeat()
    pipeline.drain()
    sent = command(environment, "send")
    assert sent.code == 1
    assert "it is discarded (carried by hand), so that day gets no other heartbeat" in sent.out
    assert receiver.connections == 0
    clock("2026-05-03T02:30:01Z")
    pipeline.sweep()
    assert pipeline.write_heartbeat()
    pipeline.drain()
    assert receiver.connections == 1
    assert one(db, "SELECT array_agg(state ORDER BY day) FROM telemetry_outbox") == [
        "discarded",
        "sent",
    ]


@pytest.mark.usefixtures("waiting")
def test_while_a_worker_is_sending_it_there_is_nothing_to_carry(
    environment: dict[str, str], db: Engine
) -> None:
    held = (
        "state = 'sending', drains = 1, lease_token = gen_random_uuid(),"
        " lease_until = now() + interval '40 s'"
    )
    run(db, WAITS.format(held))
    before = outbox_row(db)
    refused = command(environment, "send", "--by-hand")
    assert (refused.code, refused.out) == (1, "")
    assert refused.sentence == (
        f"The heartbeat of {DAY} cannot be carried by hand: a worker is sending it right now;"
        " try again."
    )
    assert outbox_row(db) == before


ENDED = "state = '{}', finished_at = now(), last_error = {}"
ATTEMPT = (
    "INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome, endpoint)"
    " SELECT id, 1, now(), now(), '{}', 'http://a/' FROM telemetry_outbox"
)
ELSEWHERE = "another program has sent it: see instance.last_telemetry_at"


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            [ATTEMPT.format("sent"), WAITS.format(ENDED.format("sent", "NULL"))],
            "it has been sent",
        ),
        ([ATTEMPT.format("sent")], "it has been sent"),
        (["UPDATE instance SET last_telemetry_at = now()"], ELSEWHERE),
        ([WAITS.format(ENDED.format("discarded", "'sent elsewhere'"))], ELSEWHERE),
        (
            [WAITS.format(ENDED.format("rejected", "'HTTP 400'"))],
            "it is rejected (HTTP 400), so that day gets no other heartbeat",
        ),
        (
            [WAITS.format(ENDED.format("expired", "'refused'"))],
            "it is expired (refused), so that day gets no other heartbeat",
        ),
        (
            [WAITS.format(ENDED.format("discarded", "NULL"))],
            "it is discarded (no attempt was made), so that day gets no other heartbeat",
        ),
        (
            ["DELETE FROM telemetry_outbox", "UPDATE instance SET last_telemetry_at = now()"],
            ELSEWHERE,
        ),
    ],
    ids=["sent", "sent before", "elsewhere", "found", "rejected", "expired", "off", "no row"],
)
def test_a_heartbeat_that_may_not_be_carried_is_not_printed(
    environment: dict[str, str], db: Engine, changes: list[str], why: str
) -> None:
    for change in changes:
        run(db, change)
    sentence = f"The heartbeat of {DAY} cannot be carried by hand: {why}."
    refused, reported = commands(environment, "send --by-hand", "send --by-hand --json")
    assert (refused.code, refused.out) == (1, "")
    assert refused.sentence == sentence
    assert (reported.code, reported.json["sent"], reported.json["said"]) == (1, False, sentence)
    assert [*reported.json] == ["sent", "said", "day", "row"]
    assert (
        one(db, "SELECT count(*) FROM telemetry_outbox WHERE last_error = 'carried by hand'") == 0
    )


@pytest.mark.usefixtures("waiting")
def test_what_was_carried_under_a_former_id_is_not_printed_again(
    administered: dict[str, str], db: Engine
) -> None:
    assert command(administered, "send", "--by-hand").code == 0
    assert command(administered, "rotate", "--yes").code == 0
    refused = command(administered, "send", "--by-hand")
    assert (refused.code, refused.out) == (1, "")
    assert one(db, STATE) == "discarded"


@pytest.mark.usefixtures("morning")
def test_nothing_happens_while_telemetry_is_off(environment: dict[str, str], db: Engine) -> None:
    off = command(environment, "send", "--by-hand", TELEMETRY_ENABLED="false")
    assert (off.code, off.out) == (3, "")
    assert off.sentence == "Telemetry is off: TELEMETRY_ENABLED is false."
    for table in ("telemetry_outbox", "telemetry_notice", "telemetry_attempt", "instance"):
        assert count(db, table) == 0


@pytest.mark.usefixtures("waiting")
def test_a_claim_that_comes_first_keeps_the_row_and_one_that_comes_later_finds_none(
    pipeline: Pipeline, db: Engine
) -> None:
    day = outbox_row(db)["day"]
    lease = "state = 'sending', lease_token = gen_random_uuid(), lease_until = now() + '1 h'"
    run(db, WAITS.format(lease))
    with pipeline.transaction() as connection:
        assert outbox.carry(connection, day) is None
    run(db, WAITS.format("state = 'pending', lease_token = NULL, lease_until = NULL"))
    with pipeline.transaction() as connection:
        assert outbox.carry(connection, day)
        assert outbox.carry(connection, day) == (outbox_row(db)["payload"], None)
    assert pipeline.carry().body == outbox_row(db)["payload"]


@pytest.mark.usefixtures("waiting")
class TestACarriedHeartbeat:
    def test_is_found_by_its_day_and_as_the_last(
        self, environment: dict[str, str], db: Engine
    ) -> None:
        body = command(environment, "send", "--by-hand").out
        by_day, last, listed, status = commands(
            environment, f"audit {DAY}", "audit last", "audit --json", "status --json"
        )
        assert (by_day.out.splitlines()[0], last.out.splitlines()[0]) == (body, body)
        assert [(row["state"], row["last_error"]) for row in listed.json] == [
            ("discarded", "carried by hand")
        ]
        assert (status.json["pending"], status.json["overdue"]) == ([], False)
        assert one(db, STATE) == "discarded"

    def test_is_missed_neither_in_the_log_nor_at_the_receiver_and_is_equal_where_it_arrived(
        self, environment: dict[str, str], own: Collector, tmp_path: Path
    ) -> None:
        body = command(environment, "send", "--by-hand").out
        (tmp_path / "log").write_text("")
        line = f"audit --verify --remote --json --log {tmp_path / 'log'}"
        to_collector = {"TELEMETRY_ENDPOINT": f"http://127.0.0.1:{own.port}/v1/heartbeat"}
        (before,) = commands_each_in(environment, [(line, to_collector)])
        assert own.post(body).status_code == 202
        assert own.post(body).status_code == 202
        (after,) = commands_each_in(environment, [(line, to_collector)])
        assert (before.code, after.code) == (0, 0)
        counts = [before.json["remote"], after.json["remote"]]
        assert [each["equal_unsent"] for each in counts] == [0, 1]
        assert [each["equal"] for each in counts] == [0, 1]


def steps() -> dict[str, list[str]]:
    """Return the commands of the page's paragraph: those on the install, and those elsewhere."""
    page = (ROOT / "docs" / "operate.md").read_text()
    section = page.partition("## Send without a network\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    here, elsewhere = (block.replace("\\\n", " ").strip().splitlines() for block in blocks)
    return {"here": here, "elsewhere": elsewhere}


@pytest.mark.usefixtures("morning")
def test_the_pages_commands_bring_a_heartbeat_to_the_collector(
    environment: dict[str, str], own: Collector, db: Engine, tmp_path: Path, receiver: Receiver
) -> None:
    (here,), (elsewhere,) = steps().values()
    assert here.startswith("python -m app send --by-hand > ")
    program = shlex.quote(sys.executable)
    shell = here.replace("python ", f"PYTHONPATH={shlex.quote(str(ROOT))} {program} ", 1)
    bash(shell, environment, tmp_path)
    body = (tmp_path / "heartbeat.json").read_bytes()
    assert body == outbox_row(db)["payload"].encode()
    url = next(word for word in shlex.split(elsewhere) if word.startswith("https://"))
    assert urlsplit(url).path == "/v1/heartbeat"
    if shutil.which("curl"):
        to = f"http://127.0.0.1:{own.port}"
        bash(elsewhere.replace(f"https://{urlsplit(url).netloc}", to), {}, tmp_path)
    else:
        assert own.client.post("/v1/heartbeat", content=body, headers=JSON).status_code == 202
    ((instance_id, *_),) = own.rows()
    assert instance_id == UUID(str(outbox_row(db)["instance_id"]))
    assert receiver.connections == 0


def bash(line: str, environment: dict[str, str], directory: Path) -> None:
    ended = subprocess.run(
        ["bash", "-c", line],
        env=minimal(environment),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
