"""``rotate`` and ``forget`` change what they report, even during a write or a POST."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, inspect

from app import control, database, outbox
from app.delivery import lease
from app.outbox import Claim
from app.pipeline import Pipeline
from app.schedule import running_day
from tests.conftest import Clock
from tests.support.command import command, commands
from tests.support.database import (
    attempts,
    count,
    give_notice,
    one,
    outbox_row,
    run,
    waiting_for_locks,
)
from tests.support.processes import Processes
from tests.support.receiver import Receiver, answer
from tests.support.steps import days, eventually, locked, standing_at, without_harm

TODAY, TOMORROW = "2026-05-02", "2026-05-03"
OFF = {"TELEMETRY_ENABLED": "false"}
OURS = ("instance", "telemetry_notice", "telemetry_outbox", "telemetry_attempt")


@pytest.fixture
def noticed(db: Engine, clock: Clock) -> None:
    """The operator got the notice long before this morning."""
    give_notice(db, "2026-01-01")
    clock(f"{TODAY}T02:30:00Z")


@pytest.fixture
def pending(noticed: None, pipeline: Pipeline, db: Engine) -> UUID:  # noqa: ARG001 - pytest runs it first
    """The day's heartbeat waits to be sent; the install's id."""
    assert pipeline.write_heartbeat()
    return only_id(db)


@pytest.fixture
def claim(pending: UUID, pipeline: Pipeline) -> Claim:  # noqa: ARG001 - pytest runs it first
    """A worker has just taken the day's heartbeat."""
    with pipeline.transaction() as connection:
        taken = outbox.claim(connection, lease(pipeline.settings))
    assert taken
    return taken


def only_id(db: Engine) -> UUID:
    found: UUID = one(db, "SELECT id FROM instance")
    return found


def everything(db: Engine) -> dict[str, str | None]:
    """Return a digest of each table, ConsentOS's included."""
    digest = "SELECT md5(string_agg(t::text, ' ' ORDER BY t::text)) FROM {} AS t"
    tables = inspect(db).get_table_names(schema="public")
    return {table: one(db, digest.format(table)) for table in tables}


def of_consentos(db: Engine) -> dict[str, str | None]:
    return {table: digest for table, digest in everything(db).items() if table not in OURS}


@pytest.mark.usefixtures("pending")
@pytest.mark.parametrize("line", ["rotate --yes", "forget --yes"])
def test_the_pipelines_own_role_is_refused_and_the_sentence_says_which_role_is_needed(
    environment: dict[str, str], db: Engine, line: str
) -> None:
    before = everything(db)
    refused = command(environment, *line.split())
    assert (refused.code, refused.out) == (1, "")
    assert "MIGRATION_DATABASE_URL must name a role with that right" in refused.sentence
    assert everything(db) == before


class TestRotate:
    def test_asks_first_and_leaves_all_as_it_is_unless_that_is_wanted(
        self, administered: dict[str, str], db: Engine, pending: UUID
    ) -> None:
        before = everything(db)
        refused = command(administered, "rotate", typed="n\n")
        unanswered = command(administered, "rotate", "--json")
        assert (refused.code, unanswered.code) == (1, 1)
        assert "deletes the instance id" in refused.out + refused.err
        assert everything(db) == before
        assert command(administered, "rotate", typed="y\n").code == 0
        assert only_id(db) != pending

    def test_puts_one_new_id_in_the_place_of_all_and_discards_what_is_pending(
        self, administered: dict[str, str], db: Engine, pending: UUID
    ) -> None:
        second = uuid4()
        run(db, f"INSERT INTO instance VALUES ('{second}', now(), now())")
        untouched = of_consentos(db)
        ended = command(administered, "rotate", "--yes")
        new = only_id(db)
        assert new not in {pending, second}
        assert (ended.code, ended.err) == (0, "")
        assert sorted(ended.out.splitlines()) == sorted(
            [
                f"The instance id {pending} was deleted.",
                f"The instance id {second} was deleted.",
                f"The new instance id is {new}.",
                f"The pending heartbeat of {TODAY} was discarded.",
            ]
        )
        assert days(db) == {TODAY: "discarded"}
        assert of_consentos(db) == untouched

    def test_lets_the_next_heartbeat_carry_the_new_id_and_the_day_have_one(
        self,
        administered: dict[str, str],
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        receiver: Receiver,
        pending: UUID,
    ) -> None:
        pipeline.drain()
        shown = command(administered, "rotate", "--yes", "--json").json
        new = only_id(db)
        assert shown == {
            "former": [str(pending)],
            "current": str(new),
            "discarded": [],
            "in_flight": [],
        }
        assert not pipeline.write_heartbeat()
        clock(f"{TOMORROW}T02:30:00Z")
        assert pipeline.write_heartbeat()
        pipeline.drain()
        carried = [json.loads(each.body)["instance_id"] for each in receiver.requests]
        assert carried == [str(pending), str(new)]

    @pytest.mark.usefixtures("noticed")
    def test_remembers_that_another_program_has_sent_this_days_heartbeat(
        self, pipeline: Pipeline, db: Engine
    ) -> None:
        sent_at = f"{TODAY}T02:30:00+00:00"
        run(db, f"INSERT INTO instance VALUES ('{uuid4()}', '2026-01-01', now(), '{sent_at}')")
        control.rotate(db, enabled=True)
        kept = one(db, "SELECT last_telemetry_at FROM instance")
        assert kept == datetime.fromisoformat(sent_at)
        assert not pipeline.write_heartbeat()
        assert count(db, "telemetry_outbox") == 0

    def test_makes_no_id_while_telemetry_is_off_and_says_so(
        self, administered: dict[str, str], db: Engine, pending: UUID
    ) -> None:
        ended = command({**administered, **OFF}, "rotate", "--yes")
        assert ended.code == 0
        assert ended.out.splitlines() == [
            f"The instance id {pending} was deleted.",
            "Telemetry is off: the first heartbeat after it is turned on creates a new id.",
            f"The pending heartbeat of {TODAY} was discarded.",
        ]
        assert count(db, "instance") == 0
        assert days(db) == {TODAY: "discarded"}

    def test_has_nothing_to_do_before_the_first_heartbeat(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        shown, as_json = commands(administered, "rotate --yes", "rotate --yes --json")
        assert (shown.code, as_json.code) == (0, 0)
        assert shown.out == "There was no instance id: the first heartbeat creates one.\n"
        assert as_json.json == {"former": [], "current": None, "discarded": [], "in_flight": []}
        assert count(db, "instance") == 0

    def test_reports_what_may_be_under_way_and_no_further_attempt_begins_under_the_old_id(
        self,
        administered: dict[str, str],
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        claim: Claim,
    ) -> None:
        ended = command(administered, "rotate", "--yes")
        assert ended.code == 0
        assert ended.out.splitlines()[-1].startswith(f"The heartbeat of {TODAY} may be in flight")
        assert days(db) == {TODAY: "sending"}
        with pipeline.transaction() as connection:
            late = outbox.begin(connection, claim, timedelta(minutes=1), endpoint="http://a/")
        assert late == "not held"
        assert attempts(db) == []
        clock(f"{TODAY}T02:32:00Z")
        pipeline.sweep()
        assert days(db) == {TODAY: "discarded"}


class TestForget:
    def test_asks_first_and_leaves_all_as_it_is_unless_that_is_wanted(
        self, administered: dict[str, str], db: Engine, pending: UUID
    ) -> None:
        before = everything(db)
        refused = command(administered, "forget", typed="n\n")
        unanswered = command(administered, "forget", "--json")
        assert [(each.code, each.out.count(str(pending))) for each in (refused, unanswered)] == [
            (1, 0),
            (1, 0),
        ]
        assert "every stored heartbeat" in refused.out + refused.err
        assert everything(db) == before
        assert command(administered, "forget", typed="y\n").code == 0
        assert count(db, "telemetry_outbox") == 0

    def test_deletes_all_that_is_ours_and_names_each_id_that_was_on_record(
        self,
        administered: dict[str, str],
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        pending: UUID,
    ) -> None:
        pipeline.drain()
        run(db, "DELETE FROM instance")
        clock(f"{TOMORROW}T02:30:00Z")
        assert pipeline.write_heartbeat()
        second, third = only_id(db), uuid4()
        run(db, f"INSERT INTO instance VALUES ('{third}', now(), now())")
        untouched = of_consentos(db)
        assert untouched
        ended, again = commands(administered, "forget --yes", "forget --yes --json")
        assert (ended.code, ended.err) == (0, "")
        *ids, deleted, receivers, on = ended.out.splitlines()
        former = sorted([pending, second, third])
        assert ids == [f"The instance id {each} was deleted." for each in former]
        assert deleted == "2 heartbeats, 1 attempt and the notice were deleted."
        assert "The receiver still stores what was sent" in receivers
        assert "Telemetry is on" in on
        assert [count(db, table) for table in OURS] == [0, 0, 0, 0]
        assert of_consentos(db) == untouched
        assert (again.code, again.json) == (
            0,
            {"former": [], "heartbeats": 0, "attempts": 0, "in_flight": [], "erased": []},
        )

    def test_lets_no_heartbeat_follow_before_a_new_notice_and_a_new_day(
        self,
        administered: dict[str, str],
        pipeline: Pipeline,
        clock: Clock,
        db: Engine,
        caplog: pytest.LogCaptureFixture,
        pending: UUID,
    ) -> None:
        shown = command(administered, "forget", "--yes", "--json").json
        assert shown == {
            "former": [str(pending)],
            "heartbeats": 1,
            "attempts": 0,
            "in_flight": [],
            "erased": [],
        }
        assert not pipeline.write_heartbeat()
        caplog.set_level("INFO", "telemetry")
        pipeline.sweep()
        assert "telemetry.notice " in caplog.text
        assert not pipeline.write_heartbeat()
        assert count(db, "instance") == count(db, "telemetry_outbox") == 0
        clock(f"{TOMORROW}T02:30:00Z")
        assert pipeline.write_heartbeat()
        new = only_id(db)
        assert new != pending
        assert json.loads(outbox_row(db)["payload"])["instance_id"] == str(new)

    def test_does_not_promise_a_heartbeat_while_telemetry_is_off(
        self, administered: dict[str, str], pending: UUID
    ) -> None:
        ended = command({**administered, **OFF}, "forget", "--yes")
        assert (ended.code, str(pending) in ended.out) == (0, True)
        assert "Telemetry is on" not in ended.out

    @pytest.mark.usefixtures("pending")
    def test_leaves_a_running_post_no_row_to_settle(
        self,
        pipeline: Pipeline,
        db: Engine,
        receiver: Receiver,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level("INFO", "telemetry")
        receiver.during = lambda: control.forget(db)
        pipeline.drain()
        assert len(receiver.requests) == receiver.connections == 1
        assert "telemetry.lease_lost" in caplog.text
        assert "telemetry.failed" not in caplog.text
        assert [count(db, table) for table in OURS] == [0, 0, 0, 0]


class TestForgetRemotely:
    @pytest.fixture(autouse=True)
    def sent(self, pending: UUID, pipeline: Pipeline, receiver: Receiver) -> None:
        assert pending
        pipeline.drain()
        receiver.answers[:] = [answer(204)]
        receiver.requests.clear()

    def test_has_the_receiver_delete_each_id_first(
        self, administered: dict[str, str], db: Engine, receiver: Receiver, pending: UUID
    ) -> None:
        other = uuid4()
        run(db, f"INSERT INTO instance VALUES ('{other}', now(), now())")
        ended = command({**administered, **OFF}, "forget", "--remote", "--yes")
        assert (ended.code, ended.err) == (0, "")
        lines = [request.head.split(b"\r\n", 1)[0] for request in receiver.requests]
        assert lines == [
            f"DELETE /v1/installs/{each} HTTP/1.1".encode() for each in sorted([pending, other])
        ]
        assert all(request.body == b"" for request in receiver.requests)
        assert {name for request in receiver.requests for name in request.headers if name} <= {
            *("host", "user-agent", "accept", "accept-encoding", "connection", "content-length")
        }
        assert f"The receiver has deleted everything under {pending}.\n" in ended.out
        assert "The receiver still stores" not in ended.out
        assert [count(db, table) for table in OURS] == [0, 0, 0, 0]

    @pytest.mark.parametrize("status", [302, 404, 429, 503])
    def test_deletes_nothing_here_where_that_is_not_confirmed(
        self, administered: dict[str, str], db: Engine, receiver: Receiver, status: int
    ) -> None:
        receiver.answers[:] = [answer(status, "Location: http://127.0.0.1:1/", "Retry-After: 9")]
        ended = command(administered, "forget", "--remote", "--yes")
        assert (ended.code, ended.out) == (1, "")
        assert f"(HTTP {status}). Nothing is deleted here" in ended.sentence
        assert len(receiver.requests) == 1
        assert count(db, "instance") == count(db, "telemetry_outbox") == 1

    def test_names_the_receiver_before_it_asks_it(
        self, administered: dict[str, str], receiver: Receiver
    ) -> None:
        refused = command(administered, "forget", "--remote", typed="n\n")
        assert refused.code == 1
        assert f"from this database, and from {receiver.url}. Continue?" in refused.err
        assert receiver.requests == []


Control = Callable[[Engine], object]
CONTROLS = {"forget": control.forget, "rotate": lambda db: control.rotate(db, enabled=True)}


@pytest.fixture(params=CONTROLS)
def change(request: pytest.FixtureRequest) -> Control:
    """The operator runs a command during a write."""
    done: Control = CONTROLS[request.param]
    return done


def nothing_waits_under(former: UUID, db: Engine) -> bool:
    waits = "SELECT count(*) FROM telemetry_outbox WHERE instance_id = '{}' AND state = 'pending'"
    return former not in ids(db) and one(db, waits.format(former)) == 0


def nothing_is_pending(db: Engine) -> bool:
    return bool(one(db, "SELECT count(*) = 0 FROM telemetry_outbox WHERE state = 'pending'"))


BOTH = 2


def ids(db: Engine) -> list[UUID]:
    found: list[UUID] = one(db, "SELECT coalesce(array_agg(id), '{}') FROM instance")
    return found


class TestAHeartbeatThatIsJustBeingWritten:
    @pytest.mark.usefixtures("noticed")
    @pytest.mark.parametrize("first", [True, False])
    def test_is_waited_for_while_it_is_counted(
        self, pipeline: Pipeline, db: Engine, change: Control, *, first: bool
    ) -> None:
        former = uuid4()
        if not first:
            run(db, f"INSERT INTO instance VALUES ('{former}', '2026-01-01', now())")
        with ThreadPoolExecutor(2) as beside:
            with locked(db, "users"):
                writing = beside.submit(pipeline.write_heartbeat)
                eventually(lambda: waiting_for_locks(db) == 1)
                changing = beside.submit(change, db)
                eventually(lambda: waiting_for_locks(db) == BOTH)
            assert writing.result() is True
            changing.result()
        assert nothing_is_pending(db)
        assert nothing_waits_under(former, db)

    @pytest.mark.usefixtures("noticed")
    def test_is_waited_for_once_it_is_in_the_outbox(self, db: Engine, change: Control) -> None:
        former, now = uuid4(), datetime(2026, 5, 2, 2, 30, tzinfo=UTC)
        run(db, f"INSERT INTO instance VALUES ('{former}', '2026-01-01', now())")
        with ThreadPoolExecutor(1) as beside:
            with database.transaction(db.connect()) as connection:
                written = outbox.write(
                    connection,
                    day=running_day(now),
                    instance_id=former,
                    body="{}",
                    next_attempt_at=now,
                    host_revision=None,
                )
                assert written
                changing = beside.submit(change, db)
                eventually(lambda: waiting_for_locks(db))
            changing.result()
        assert nothing_waits_under(former, db)


@pytest.mark.usefixtures("pending")
def test_an_outcome_that_is_just_being_recorded_is_waited_for(
    processes: Processes, db: Engine, receiver: Receiver, change: Control
) -> None:
    former = only_id(db)
    settling = standing_at("app.instance:stamp:return", processes)
    with ThreadPoolExecutor(1) as beside:
        changing = beside.submit(change, db)
        eventually(lambda: waiting_for_locks(db))
        settling.go_on()
        changing.result()
    settling.process.wait_for("telemetry.attempt ")
    assert settling.process.lines("telemetry.failed") == []
    assert settling.process.lines("telemetry.lease_lost") == []
    assert without_harm(settling.process)
    assert len(receiver.requests) == 1
    assert days(db) in ({}, {TODAY: "sent"})
    assert nothing_waits_under(former, db)
