"""``audit --verify --remote`` asks the receiver what it holds: the third witness."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest
import trustme
from sqlalchemy import Engine, NullPool, create_engine

from app import receiver as asking
from app import report
from app.collector import store
from app.holding import PAGE
from app.payload import parse
from app.pipeline import Pipeline
from app.settings import Settings
from tests.conftest import Clock
from tests.integration.test_cli_verify import ID, NOTICED_ON, at, body_of, put
from tests.support.collector import Collector, query
from tests.support.command import Ended, command, commands, commands_each_in
from tests.support.database import count, give_notice, run
from tests.support.processes import ROOT, minimal
from tests.support.proxy import proxying
from tests.support.receiver import Receiver, answer, stay_silent

FIRST, SECOND, THIRD = "2026-05-01", "2026-05-02", "2026-05-03"
NAMED = "http://collector.invalid/v1/heartbeat"
VERIFY = "audit --verify --remote"
OTHER_BYTES = "the receiver holds different bytes under its id and time"
NOT_STORED = "the log has a body that is not stored"
NOT_LOGGED = "it was sent, but the log does not have its body in the readable lines"


@pytest.fixture
def endpoint(own: Collector) -> str:
    """Where a real collector takes heartbeats."""
    return f"http://127.0.0.1:{own.port}/v1/heartbeat"


@pytest.fixture
def to_collector(
    environment: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The environment of an install that sends to a real collector."""
    monkeypatch.setenv("TELEMETRY_ENDPOINT", endpoint)
    return {**environment, "TELEMETRY_ENDPOINT": endpoint}


@pytest.fixture
def sent(to_collector: dict[str, str], clock: Clock, db: Engine) -> list[str]:
    """Three days' heartbeats, which the pipeline has sent to the collector: their bodies."""
    assert to_collector
    give_notice(db, NOTICED_ON)
    pipeline = Pipeline(Settings.load())
    for day in (FIRST, SECOND, THIRD):
        clock(at(day))
        assert pipeline.write_heartbeat()
        pipeline.drain()
    rows = report.audit(pipeline).rows
    assert [row["state"] for row in rows] == ["sent"] * 3
    return [row["payload"] for row in reversed(rows)]


def found(ended: Ended) -> dict[str, int]:
    """Return the counts of ``--json`` that are not 0."""
    remote = ended.json["remote"]
    return {name: n for name, n in remote.items() if isinstance(n, int) and n}


def test_what_was_sent_is_held_byte_for_byte(
    to_collector: dict[str, str], sent: list[str], endpoint: str
) -> None:
    off = {"TELEMETRY_ENABLED": "false"}
    shown, reported, while_off, without = commands_each_in(
        to_collector,
        [(VERIFY, {}), (f"{VERIFY} --json", {}), (VERIFY, off), ("audit --verify --json", {})],
    )
    instance_id = json.loads(sent[0])["instance_id"]
    assert [ended.code for ended in (shown, reported, while_off, without)] == [0] * 4
    held = f"The receiver at {endpoint} holds 3 of the 3 heartbeats that were sent, byte for byte."
    assert held in shown.out.splitlines()
    assert (while_off.out, while_off.err) == (shown.out, shown.err)
    assert shown.err == f"Asking {endpoint} what it holds under 1 id. Nothing else is sent.\n"
    none = dict.fromkeys(
        ["equal_unsent", "missing", "different", "only_there", "no_longer_here"], 0
    )
    here = {"endpoint": endpoint, "ids": [instance_id], "sent": 3, "equal": 3}
    assert reported.json["remote"] == {**here, **none}
    assert without.json["remote"] is None


class TestOneChangedByte:
    @pytest.fixture
    def log(self, sent: list[str], tmp_path: Path) -> Path:
        log = tmp_path / "worker.log"
        log.write_text("".join(f"telemetry.payload {body}\n" for body in sent))
        return log

    def changed(self, body: str) -> str:
        assert body.count('"python_version":"3.') == 1
        return body.replace('"python_version":"3.', '"python_version":"4.')

    def verified(self, environment: dict[str, str], log: Path) -> tuple[list[str], Ended]:
        """Return what is printed of each problem, without its place."""
        shown, alone = commands(environment, f"{VERIFY} --log {log}", VERIFY)
        lines = [line for line in shown.out.splitlines() if not line.startswith("The receiver at")]
        return [line.partition(": ")[2] for line in lines], alone

    def test_at_the_receiver_is_distinguished_from_the_other_two(
        self, to_collector: dict[str, str], own: Collector, log: Path
    ) -> None:
        text = 'replace(body::text, \'"python_version": "3.\', \'"python_version": "4.\')::jsonb'
        query(own.url, f"UPDATE heartbeat SET body = {text} WHERE sent_at = '{at(SECOND)}'")
        sentences, alone = self.verified(to_collector, log)
        assert sentences == [
            f"{OTHER_BYTES}; the row and the log have the same bytes: the receiver's was changed."
        ]
        assert alone.code == 1
        assert f"{OTHER_BYTES}: the row or the receiver's copy was changed.\n" in alone.out
        assert "holds 2 of the 3 heartbeats" in alone.out

    def test_in_the_row_is_distinguished_from_the_other_two(
        self, to_collector: dict[str, str], sent: list[str], db: Engine, log: Path
    ) -> None:
        run(db, "ALTER TABLE telemetry_outbox DISABLE TRIGGER telemetry_outbox_frozen")
        run(
            db,
            "UPDATE telemetry_outbox SET payload = CAST(:body AS json) WHERE day = :day",
            body=self.changed(sent[1]),
            day=SECOND,
        )
        run(db, "ALTER TABLE telemetry_outbox ENABLE TRIGGER telemetry_outbox_frozen")
        sentences, alone = self.verified(to_collector, log)
        assert sentences == [
            f"{NOT_STORED}; the receiver holds it.",
            f"{NOT_LOGGED}.",
            f"{OTHER_BYTES}; the receiver and the log have the same bytes: the row was changed.",
        ]
        assert alone.code == 1

    def test_in_the_log_is_distinguished_from_the_other_two(
        self, to_collector: dict[str, str], sent: list[str], log: Path
    ) -> None:
        log.write_text(log.read_text().replace(sent[1], self.changed(sent[1])))
        sentences, alone = self.verified(to_collector, log)
        assert sentences == [
            f"{NOT_STORED}; the receiver does not hold it either.",
            f"{NOT_LOGGED}; the receiver holds the row's bytes.",
        ]
        assert alone.code == 0


class TestWhatOneSideLacks:
    def test_is_missed_at_the_receiver_with_the_reasons_that_are_possible(
        self, to_collector: dict[str, str], sent: list[str], own: Collector, db: Engine
    ) -> None:
        assert own.forget(json.loads(sent[0])["instance_id"]).status_code == 204
        run(
            db,
            "UPDATE telemetry_attempt SET endpoint = 'http://elsewhere.example/v1/heartbeat'"
            f" WHERE outbox_id = (SELECT id FROM telemetry_outbox WHERE day = '{SECOND}')",
        )
        shown, reported = commands(to_collector, VERIFY, f"{VERIFY} --json")
        assert (shown.code, reported.code) == (1, 1)
        assert "holds 0 of the 3 heartbeats" in shown.out
        assert found(reported) == {"sent": 3, "missing": 3}
        missing = "it was sent, and the receiver does not hold it: "
        sentences = {each["day"]: each["sentence"] for each in reported.json["problems"]}
        assert sentences == {
            FIRST: f"{missing}it was deleted there",
            SECOND: f"{missing}it was sent to another endpoint, shown in its attempt,"
            " or it was deleted there",
            THIRD: f"{missing}it was deleted there",
        }

    def test_is_missed_here_unless_it_is_older_than_rows_are_kept(
        self, to_collector: dict[str, str], sent: list[str], db: Engine
    ) -> None:
        run(db, f"DELETE FROM telemetry_outbox WHERE day = '{FIRST}'")
        week = {"TELEMETRY_RETENTION_DAYS": "1"}
        shown, reported, kept = commands_each_in(
            to_collector, [(VERIFY, {}), (f"{VERIFY} --json", {}), (f"{VERIFY} --json", week)]
        )
        instance_id = json.loads(sent[0])["instance_id"]
        assert (shown.code, reported.code, kept.code) == (1, 1, 0)
        assert shown.out.startswith(
            f"receiver, {instance_id}: the receiver holds a heartbeat of {at(FIRST)} that is not"
            " stored here: this database was restored from a backup, "
        )
        (problem,) = reported.json["problems"]
        assert problem["instance_id"] == instance_id
        assert found(reported) == {"sent": 2, "equal": 2, "only_there": 1}
        assert found(kept) == {"sent": 2, "equal": 2, "no_longer_here": 1}

    def test_is_not_missed_before_the_day(
        self, to_collector: dict[str, str], sent: list[str], db: Engine
    ) -> None:
        assert sent
        run(db, f"DELETE FROM telemetry_outbox WHERE day = '{FIRST}'")
        since, all_of_it = commands(
            to_collector, f"{VERIFY} --json --since {SECOND}", f"{VERIFY} --json"
        )
        assert (since.code, all_of_it.code) == (0, 1)
        assert found(since) == {"sent": 2, "equal": 2}


def test_the_command_for_an_officer_prints_what_is_held(own: Collector, sent: list[str]) -> None:
    if not shutil.which("curl"):
        pytest.skip("this machine has no curl")
    page = (ROOT / "docs" / "privacy.md").read_text()
    line = next(line.strip() for line in page.splitlines() if line.strip().startswith("curl "))
    *words, url = shlex.split(line)
    instance_id = json.loads(sent[0])["instance_id"]
    path = urlsplit(url).path.replace("INSTANCE_ID", instance_id)
    printed = subprocess.check_output(
        [*words, "--silent", f"http://127.0.0.1:{own.port}{path}"], env=minimal({})
    )
    assert [each["body"] for each in json.loads(printed)["heartbeats"]] == sent


def test_every_id_on_record_is_asked_for(
    to_collector: dict[str, str], own: Collector, db: Engine
) -> None:
    run(db, f"INSERT INTO instance VALUES ('{uuid4()}', now(), now())")
    put(db, FIRST, endpoint=to_collector["TELEMETRY_ENDPOINT"])
    own.post(body_of(FIRST))
    ended = command(to_collector, *f"{VERIFY} --json".split())
    assert ended.code == 0, ended.out
    assert (len(ended.json["remote"]["ids"]), found(ended)) == (2, {"sent": 1, "equal": 1})


def test_an_install_without_an_id_asks_nobody(
    environment: dict[str, str], receiver: Receiver
) -> None:
    ended = command(environment, *VERIFY.split())
    assert ended.code == 0
    assert ended.err == f"No id is stored, so {receiver.url} is not asked.\n"
    assert "holds 0 of the 0 heartbeats" in ended.out
    assert receiver.connections == 0


def test_more_than_a_page_is_compared(
    to_collector: dict[str, str], own: Collector, db: Engine
) -> None:
    days = [date(2023, 1, 1) + timedelta(days=n) for n in range(PAGE + 1)]
    bodies = [body_of(str(day)) for day in days]
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, attempts, created_at,"
        " next_attempt_at, expires_at, finished_at)"
        " SELECT gen_random_uuid(), CAST(body ->> 'sent_at' AS date), :id, body, 'sent', 1, at, at,"
        " at, at FROM unnest(CAST(:bodies AS json[])) AS body,"
        " CAST(body ->> 'sent_at' AS timestamptz) AS at",
        id=ID,
        bodies=bodies,
    )
    run(
        db,
        "INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome, endpoint)"
        " SELECT id, 1, created_at, created_at, 'sent', 'http://a/' FROM telemetry_outbox",
    )
    with create_engine(own.url, poolclass=NullPool).begin() as connection:
        store.insert(connection, [parse(body) for body in bodies])
    began = time.monotonic()
    ended = command(to_collector, *f"{VERIFY} --json".split())
    assert time.monotonic() - began < 20
    assert found(ended) == {"sent": PAGE + 1, "equal": PAGE + 1}
    assert ended.code == 0
    query(own.url, f"DELETE FROM heartbeat WHERE sent_at = '{at(str(days[-1]))}'")
    ended = command(to_collector, *VERIFY.split())
    assert ended.code == 1
    assert f"holds {PAGE} of the {PAGE + 1} heartbeats" in ended.out


def holding(*bodies: str, more: bool = False, **headers: str) -> bytes:
    """Return a collector's answer."""
    heartbeats = [
        {"sent_at": json.loads(body)["sent_at"], "received_at": at(FIRST), "body": body}
        for body in bodies
    ]
    tree = {
        "instance_id": str(ID),
        "first_seen": at(FIRST),
        "last_seen": at(FIRST),
        "retention_days": 400,
        "heartbeats": heartbeats,
        "more": more,
    }
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return answer(200, *lines, body=json.dumps(tree).encode())


@pytest.fixture
def one_row(db: Engine) -> UUID:
    """A row that was sent."""
    return put(db, FIRST)


@pytest.mark.usefixtures("one_row")
class TestWhatLeaves:
    def test_is_the_id_alone_and_the_operator_reads_so_before(
        self, environment: dict[str, str], receiver: Receiver, tmp_path: Path
    ) -> None:
        receiver.answers = [holding(body_of(FIRST))]
        err, said = tmp_path / "err", list[str]()
        receiver.during = lambda: said.append(err.read_text())
        token = {**environment, "TELEMETRY_ENDPOINT": f"{receiver.url}?token=s3cret"}
        with err.open("wb") as file:
            ended = subprocess.run(
                [sys.executable, "-m", "app", *VERIFY.split()],
                stdout=subprocess.PIPE,
                stderr=file,
                cwd=ROOT,
                env=minimal(token),
                timeout=60,
                check=False,
            )
        assert ended.returncode == 0, ended.stdout
        assert said == [f"Asking {receiver.url} what it holds under 1 id. Nothing else is sent.\n"]
        (request,) = receiver.requests
        line = request.head.split(b"\r\n", 1)[0]
        assert line == f"GET /v1/installs/{ID}?token=s3cret HTTP/1.1".encode()
        assert request.body == b""
        assert {*request.headers} == {
            *("host", "user-agent", "accept", "accept-encoding", "connection")
        }
        assert "s3cret" not in ended.stdout.decode() + err.read_text()

    def test_names_the_day_if_there_is_one(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        receiver.answers = [holding(body_of(FIRST))]
        ended = command(environment, *f"{VERIFY} --since {FIRST}".split())
        assert ended.code == 0
        what = f"what it holds under 1 id, from {FIRST} on"
        assert ended.err == f"Asking {receiver.url} {what}. Nothing else is sent.\n"
        line = receiver.requests[0].head.split(b"\r\n", 1)[0].decode()
        assert line.endswith(f"/{ID}?after=2026-05-01T02%3A29%3A59%2B00%3A00 HTTP/1.1")

    def test_goes_through_the_proxy(self, environment: dict[str, str], receiver: Receiver) -> None:
        receiver.answers = [holding(body_of(FIRST))]
        with proxying("http", receiver.port) as proxy:
            through = {
                "HTTP_PROXY": f"http://127.0.0.1:{proxy.port}",
                "TELEMETRY_ENDPOINT": NAMED,
            }
            ended = command({**environment, **through}, *VERIFY.split())
        assert ended.code == 0, ended.err
        assert proxy.asked[0].startswith(f"GET http://collector.invalid/v1/installs/{ID} HTTP/1.1")

    def test_goes_to_a_receiver_whose_certificate_is_trusted_and_to_no_other(
        self,
        environment: dict[str, str],
        receiver: Receiver,
        over_tls: str,
        authority: trustme.CA,
        tmp_path: Path,
    ) -> None:
        receiver.answers = [holding(body_of(FIRST))]
        bundle = tmp_path / "authority.pem"
        authority.cert_pem.write_to_path(str(bundle))
        secure = {**environment, "TELEMETRY_ENDPOINT": over_tls}
        refused = command(secure, *VERIFY.split())
        assert refused.code == 1
        assert "(tls: unable to get local issuer certificate)" in refused.err
        assert receiver.requests == []
        assert command({**secure, "SSL_CERT_FILE": str(bundle)}, *VERIFY.split()).code == 0


def refusal(ended: Ended) -> str:
    """Return the sentence of a command that failed, which comes after what it asks."""
    asks, sentence = ended.err.splitlines()
    assert asks.startswith("Asking ")
    assert (ended.code, ended.out) == (1, "")
    return sentence


def drip(connection: socket.socket) -> None:
    """Answer a byte at a time, for ever."""
    connection.sendall(b"HTTP/1.1 200 -\r\nContent-Length: 1000000\r\n\r\n{")
    with suppress(OSError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)


def pour(connection: socket.socket) -> None:
    """Answer with a body of 64 MiB."""
    connection.sendall(b"HTTP/1.1 200 -\r\n\r\n")
    with suppress(OSError):
        for _ in range(1_024):
            connection.sendall(b" " * 65_536)


def cut_off(connection: socket.socket) -> None:
    """Hang up in the middle of an answer."""
    connection.sendall(b"HTTP/1.1 200 -\r\nContent-Length: 1000000\r\n\r\n{")


NO_COLLECTOR = "does not say what it holds: it is no collector of this project, or an older one."
STRANGE = [
    answer(200, body=b"<html>\x1b[31mhello</html>"),
    answer(200, body=b'{"instance_id": "\x1b[31m"}'),
    answer(200, body=b"[" * 100_000),
    answer(200, body=b"\xff\x00"),
    answer(200, "Content-Encoding: gzip", body=b"\x1f\x8b" + bytes(100)),
    answer(202),
    answer(204),
    answer(301, "Location: http://127.0.0.1:1/"),
    answer(400, body=b'{"error": "\x1b[31m"}'),
    answer(404, body=b'{"error": "Not Found"}'),
    answer(404, body=b"Not Found"),
    answer(405, body=b"Method Not Allowed"),
    holding(body_of(FIRST), body_of(FIRST)),
    holding(more=True),
]


@pytest.mark.usefixtures("one_row")
class TestAReceiver:
    def test_that_is_not_of_this_project_is_reported_as_such(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        receiver.answers = [*STRANGE]
        name = f"consentos-telemetry: The receiver at {receiver.url}"
        for ended in commands(environment, *[VERIFY] * len(STRANGE)):
            assert refusal(ended) == f"{name} {NO_COLLECTOR}"
        assert receiver.connections == len(STRANGE)

    @pytest.mark.parametrize(
        ("behaviour", "why"),
        [
            (drip, "deadline"),
            (stay_silent, "deadline"),
            (pour, "its answer is too long"),
            (cut_off, "protocol"),
            (answer(500), "HTTP 500"),
            (answer(429), "HTTP 429"),
            (answer(503, "Retry-After: 61"), "HTTP 503"),
        ],
        ids=[
            "drips",
            "is silent",
            "pours",
            "cuts off",
            "fails",
            "refuses",
            "asks to wait for long",
        ],
    )
    def test_that_cannot_answer_costs_the_deadline_at_most(
        self, environment: dict[str, str], receiver: Receiver, behaviour: Any, why: str
    ) -> None:
        receiver.answers = [behaviour]
        began = time.monotonic()
        hasty = {**environment, "TELEMETRY_TIMEOUT_SECONDS": "1"}
        if behaviour is pour:
            hasty = environment
        sentence = refusal(command(hasty, *VERIFY.split()))
        assert time.monotonic() - began < 15
        assert sentence.endswith(
            f"The receiver at {receiver.url} cannot be asked what it holds ({why})."
        )

    def test_that_is_not_there_is_named(self, environment: dict[str, str]) -> None:
        gone = {**environment, "TELEMETRY_ENDPOINT": "http://127.0.0.1:1/v1/heartbeat"}
        assert "cannot be asked what it holds (refused)." in refusal(command(gone, *VERIFY.split()))

    def test_that_asks_to_wait_is_asked_again(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        receiver.answers = [answer(429, "Retry-After: 1"), holding(body_of(FIRST))]
        began = time.monotonic()
        ended = command(environment, *VERIFY.split())
        assert ended.code == 0, ended.err
        assert time.monotonic() - began >= 1
        assert len(receiver.requests) == 2

    def test_that_asks_to_wait_without_end_is_not_waited_for_without_end(
        self, environment: dict[str, str], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert environment
        receiver.answers = [answer(503, "Retry-After: 60")]
        slept, reported = list[float](), list[str]()
        monkeypatch.setattr("app.receiver.time.sleep", slept.append)
        with pytest.raises(asking.ReceiverError, match="HTTP 503"):
            asking.ask(Settings.load(), [ID, uuid4()], None, reported.append)
        assert slept == [60.0] * asking.MOST_WAITS
        assert reported == ["The receiver asks to wait 60 seconds …"] * asking.MOST_WAITS

    def test_that_never_comes_to_an_end_is_left(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        assert environment
        first = datetime(2026, 5, 1, 2, 30, tzinfo=UTC)
        receiver.answers = [
            holding(body_of(str((first + timedelta(days=n)).date())), more=True)
            for n in range(asking.MOST_PAGES + 1)
        ]
        with pytest.raises(asking.ReceiverError, match="more heartbeats under one id"):
            asking.ask(Settings.load(), [ID], None, print)
        assert len(receiver.requests) == asking.MOST_PAGES

    def test_has_nothing_that_it_holds_printed(
        self, environment: dict[str, str], receiver: Receiver
    ) -> None:
        tree = json.loads(holding(body_of(FIRST)).partition(b"\r\n\r\n")[2])
        strange = ["\x1b[31m", "\ud800", "[bold]", "\u202e", "\0"]
        receiver.answers = []
        for inside in strange:
            tree["heartbeats"][0]["body"] = f"{inside}hello"
            receiver.answers.append(answer(200, body=json.dumps(tree).encode()))
        for ended in commands(environment, *[VERIFY] * len(strange)):
            assert ended.code == 1
            said = ended.out + ended.err
            assert not any(word in said for word in ("hello", *strange))


class TestWhatHappensMeanwhile:
    def test_a_heartbeat_that_is_sent_while_the_receiver_is_asked_is_not_missed(
        self, pipeline: Pipeline, db: Engine, receiver: Receiver
    ) -> None:
        run(db, f"INSERT INTO instance VALUES ('{ID}', now(), now())")
        receiver.answers = [holding()]
        receiver.during = lambda: put(db, FIRST)
        assert self.problems(pipeline) == []
        assert count(db, "telemetry_outbox") == 1

    def test_one_that_is_written_and_sent_meanwhile_is_found_here(
        self, pipeline: Pipeline, db: Engine, receiver: Receiver
    ) -> None:
        run(db, f"INSERT INTO instance VALUES ('{ID}', now(), now())")
        receiver.answers = [holding(body_of(FIRST))]
        receiver.during = lambda: put(db, FIRST)
        assert self.problems(pipeline) == []

    def problems(self, pipeline: Pipeline) -> list[Any]:
        there = report.ask(pipeline, report.ids(pipeline), since=None, show=print)
        return report.verify(pipeline, None, since=None, there=there).problems


def test_nobody_is_asked_where_the_endpoint_cannot_be_made_out(
    administered: dict[str, str], receiver: Receiver, db: Engine, one_row: UUID
) -> None:
    assert one_row
    wrong = [{"TELEMETRY_ENDPOINT": "ftp://nowhere"}, {"TELEMETRY_ENDPIONT": receiver.url}]
    for variables in wrong:
        for line in (VERIFY, "forget --remote --yes"):
            ended = command({**administered, **variables}, *line.split())
            assert (ended.code, ended.out) == (2, "")
            assert "TELEMETRY_ENDPOINT" in ended.sentence
    assert receiver.connections == 0
    assert count(db, "telemetry_outbox") == 1


def test_remote_goes_with_verify(environment: dict[str, str], receiver: Receiver) -> None:
    for ended in commands(environment, "audit --remote", "audit --remote last"):
        assert (ended.code, ended.out) == (2, "")
        assert "--remote goes with --verify" in " ".join(ended.err.replace("│", " ").split())
    assert receiver.connections == 0
