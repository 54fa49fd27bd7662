"""Wrong values, misspelt names and unusable databases: a sentence, an exit code, and no secret."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine

from app import database
from migrations import migrate
from tests.support.command import commands, commands_each_in
from tests.support.database import CONSENTOS_0005, HEAD, count, one, run
from tests.support.processes import Processes
from tests.support.receiver import Receiver
from tests.support.steps import ready

CANARY = "s3cret-CANARY"
"""A word in every value that may not be repeated. It looks like a secret and is unique."""

KINDS: dict[str, str] = {
    "empty": "",
    "blank": " \t ",
    "garbage": f"{CANARY}?!",
    "another type": f'["{CANARY}"]',
    "out of range": "-99999999999999999999",
    "huge": CANARY * 5000,
    "a huge number": "9" * 60_000,
    "control characters": f"{CANARY}\x1b[31m\r\n\x07telemetry.enabled endpoint=forged",
    "not ASCII": f"{CANARY} \u0661\u00e9\u202e\U0001f511",
    "not even text": f"{CANARY}\udcff",
    "a URL with a password": f"https://operator:{CANARY}@127.0.0.1/{CANARY}",
}
"""Each value is wrong for every variable, except for those that accept any text."""

PLAIN = {"huge", "a huge number"}
"""The kinds that are one plain word, and so valid for ENVIRONMENT."""

OFF = (
    "TELEMETRY_ENABLED",
    "TELEMETRY_ENDPOINT",
    "TELEMETRY_TIMEOUT_SECONDS",
    "TELEMETRY_SPREAD_SECONDS",
    "TELEMETRY_RETENTION_DAYS",
    "RATE_LIMIT_ENABLED",
)
"""A wrong value of these means off."""

DEFAULT = ("CONSENTOS_DEPLOYMENT", "CONSENTOS_EDITION", "APP_VERSION", "LOG_LEVEL")
"""A wrong value of these falls back to the default, with a warning."""

ANY = ("GEOIP_COUNTRY_HEADER", "GEOIP_MAXMIND_DB_PATH")
"""It matters only whether these are set."""

MISSPELT = {
    "TELEMETRY_ENABELD": "TELEMETRY_ENABLED",
    "TELEMETRY_ENDPIONT": "TELEMETRY_ENDPOINT",
    "TELEMTRY_ENABLED": "TELEMETRY_ENABLED",
    "telemetry_enabled": "TELEMETRY_ENABLED",
    "TELEMETRY_TIMEOUT": "TELEMETRY_TIMEOUT_SECONDS",
    "TELEMETRY_SPREAD_SECOND": "TELEMETRY_SPREAD_SECONDS",
    "TELEMETRY_RETENTION": "TELEMETRY_RETENTION_DAYS",
    "DO_NOT_TRAK": "DO_NOT_TRACK",
}


def is_clean(said: str) -> bool:
    """Whether an output contains no value, no traceback and no control character."""
    printable = all(line.isprintable() for line in said.split("\n"))
    return printable and not any(word in said for word in (CANARY, "forged", "Traceback"))


# The commands


@dataclass(frozen=True)
class Case:
    """Some wrong variables, and what they must lead to."""

    wrong: dict[str, str]
    off: str | None = None
    warned: str | None = None
    refused: str | None = None


def cases() -> Iterator[Case]:
    """Every variable with every kind of wrong value, and every misspelt name."""
    for kind, value in KINDS.items():
        for name in OFF:
            yield Case({name: value}, off=f"{name} ")
        for name in DEFAULT:
            yield Case({name: value}, warned=f"{name} ")
        for name in ANY:
            yield Case({name: value})
        yield Case({"MIGRATION_DATABASE_URL": value})
        yield Case({"REDIS_URL": value})
        yield Case({"DATABASE_URL": value}, refused="DATABASE_URL must be a URL like ")
        yield Case({"DO_NOT_TRACK": value}, off="DO_NOT_TRACK is set" if value else None)
        yield Case({"ENVIRONMENT": value}, off=None if kind in PLAIN else "ENVIRONMENT ")
    for name, meant in MISSPELT.items():
        off = f"{name} is not a telemetry variable (did you mean {meant}?)"
        yield Case({name: CANARY}, off=off)
    # This value is valid, but no output may show it.
    yield Case({"TELEMETRY_ENDPOINT": f"http://127.0.0.1:1/?token={CANARY}"})


def test_status_shows_what_every_wrong_value_and_every_misspelt_name_means(
    environment: dict[str, str], redis_url: str, receiver: Receiver
) -> None:
    everything = list(cases())
    here = {**environment, "REDIS_URL": redis_url}
    ended = commands_each_in(here, [("status --json", each.wrong) for each in everything])
    for case, status in zip(everything, ended, strict=True):
        assert is_clean(status.out + status.err), case
        shown = status.json
        assert ("error" in shown) is bool(case.refused), case
        if case.refused:
            assert status.code == 2
            assert status.sentence.startswith(case.refused)
            assert shown["error"] == status.sentence
            continue
        assert (status.code, status.err) == (0, ""), case
        assert shown["enabled"] is (case.off is None), case
        assert (shown["reason"] or "").startswith(case.off or ""), case
        assert [w.startswith(case.warned or "-") for w in shown["warnings"]] == (
            [True] if case.warned else []
        ), case
    assert receiver.connections == 0


@pytest.mark.parametrize("kind", ["garbage", "control characters", "not even text"])
def test_every_command_works_or_gives_the_reason_with_everything_wrong_at_once(
    administered: dict[str, str], receiver: Receiver, db: Engine, kind: str
) -> None:
    value = KINDS[kind]
    wrong = dict.fromkeys((*OFF, *DEFAULT, *ANY, "DO_NOT_TRACK", "REDIS_URL", *MISSPELT), value)
    lines = ("status", "preview", "audit", "schema", "send", "migrate")
    ended = dict(
        zip(lines, commands_each_in(administered, [(line, wrong) for line in lines]), strict=True)
    )
    assert {line: each.code for line, each in ended.items()} == {
        **dict.fromkeys(lines, 0),
        "send": 3,
    }
    for each in ended.values():
        assert is_clean(each.out + each.err)
    assert ended["send"].sentence.startswith("Telemetry is off: ")
    reason = ended["send"].sentence
    assert [name for name in (*OFF, "DO_NOT_TRACK", *MISSPELT) if name not in reason] == []
    body = json.loads(ended["preview"].out)
    assert (body["deployment"], body["version"]) == ("unknown", "0.0.0-dev")
    assert receiver.connections == count(db, "telemetry_outbox") == 0


def test_an_invalid_database_url_stops_every_command_with_one_sentence(
    environment: dict[str, str],
) -> None:
    lines = ("preview", "audit", "send", "migrate")
    wrong = [
        (line, {name: value})
        for line in lines
        for name in ("DATABASE_URL", "MIGRATION_DATABASE_URL")
        for value in KINDS.values()
        if (name == "MIGRATION_DATABASE_URL") == (line == "migrate")
    ]
    for (_, variables), ended in zip(wrong, commands_each_in(environment, wrong), strict=True):
        (name,) = variables
        assert (ended.code, ended.out) == (2, "")
        assert ended.sentence.startswith(f"{name} must be a URL like ")
        assert is_clean(ended.err)


WRONG_OPTIONS = (
    f"{CANARY}=1",
    f"sslmode={CANARY}",
    f"options=-c%20{CANARY}%3D1",
    f"service={CANARY}",
    f"target_session_attrs={CANARY}",
    f"hostaddr={CANARY}",
    f"port={CANARY}",
    f"host={CANARY}",
)


REFUSALS = ("The database ", "The database's URL ", "DATABASE_URL must be ")


def test_a_wrong_option_of_the_database_url_is_reported_without_its_value(
    environment: dict[str, str], receiver: Receiver
) -> None:
    urls = [f"{environment['DATABASE_URL']}&{option}" for option in WRONG_OPTIONS]
    lines = [(line, {"DATABASE_URL": url}) for line in ("audit", "send", "migrate") for url in urls]
    for wrong, ended in zip(lines, commands_each_in(environment, lines), strict=True):
        assert ended.code in {1, 2}, wrong
        assert ended.sentence.startswith(REFUSALS), wrong
        assert is_clean(ended.out + ended.err), wrong
    assert receiver.connections == 0


# The processes


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_logs_every_wrong_value_in_its_first_lines_and_is_off(
    processes: Processes, receiver: Receiver, kind: str
) -> None:
    value = KINDS[kind]
    wrong = dict.fromkeys((*OFF, *DEFAULT, *ANY, "MIGRATION_DATABASE_URL"), value)
    worker = ready(processes, **wrong)
    (off,) = worker.lines("telemetry.disabled reason=")
    decode = json.JSONDecoder().raw_decode  # other fields follow
    reason, _ = decode(off.removeprefix("telemetry.disabled reason="))
    assert [sentence.split()[0] for sentence in reason.split("; ")] == list(OFF)
    warnings = worker.lines("telemetry.warning reason=")
    warned = [decode(line.removeprefix("telemetry.warning reason="))[0] for line in warnings]
    assert [sentence.split()[0] for sentence in warned] == list(DEFAULT)
    assert is_clean(worker.output())
    assert receiver.connections == 0


def test_a_worker_logs_every_misspelt_name_and_is_off(
    processes: Processes, receiver: Receiver
) -> None:
    worker = processes.start("worker", **dict.fromkeys(MISSPELT, CANARY))
    worker.wait_for("ready for action")
    (off,) = worker.lines("telemetry.disabled reason=")
    for name, meant in MISSPELT.items():
        assert f"{name} is not a telemetry variable (did you mean {meant}?)" in off
    assert is_clean(worker.output())
    assert receiver.connections == 0


def test_a_worker_logs_a_wrong_option_of_the_database_url_without_its_value(
    processes: Processes, receiver: Receiver
) -> None:
    url = f"{processes.environment['DATABASE_URL']}&sslmode={CANARY}"
    worker = processes.start("worker", DATABASE_URL=url)
    processes.wake("sweep")
    worker.wait_for("telemetry.failed stage=connect error=")
    assert is_clean(worker.output())
    assert receiver.connections == 0


@pytest.mark.parametrize(
    ("name", "variable"), [("worker", "DATABASE_URL"), ("scheduler", "REDIS_URL")]
)
def test_a_process_without_a_usable_url_ends_with_one_sentence(
    processes: Processes, name: str, variable: str
) -> None:
    started = [processes.start(name, **{variable: value}) for value in KINDS.values()]
    for process in started:
        assert process.wait(60) != 0
        printed = process.lines("consentos-telemetry: ")
        assert len(printed) == 1, process.output()
        assert printed[0].startswith(f"consentos-telemetry: {variable} must ")
        assert is_clean(process.output())


# The database

READING = ("status", "status --json", "preview", "audit", "audit --json")
ASKING = (*READING, "send", "migrate")
"""The commands that need a database."""

UNMIGRATED = (
    "The tables of telemetry are missing or of another release; run `python -m app migrate` first."
)

Outputs = dict[str, tuple[int, str]]
"""Each command's exit code, and its sentence if it fails, or its output if it succeeds."""


def outputs(environment: dict[str, str], *lines: str) -> Outputs:
    """Run commands, none of which may print a value, a traceback or a control character."""
    ended = commands(environment, *lines)
    for each in ended:
        assert is_clean(each.out + each.err)
    return {
        line: (each.code, each.sentence if each.code else each.out)
        for line, each in zip(lines, ended, strict=True)
    }


def all_of(lines: tuple[str, ...], code: int, sentence: str) -> Outputs:
    return dict.fromkeys(lines, (code, sentence))


class TestADatabase:
    def test_that_does_not_exist(self, environment: dict[str, str]) -> None:
        gone = environment["DATABASE_URL"].replace("telemetry_test_", f"{CANARY}_")
        lines = ("preview", "audit", "send", "migrate")
        said = outputs({**environment, "DATABASE_URL": gone}, *lines)
        assert said == all_of(lines, 1, "The database or its role does not exist.")

    def test_that_refuses_the_password(self, environment: dict[str, str], locked_url: str) -> None:
        lines = ("preview", "audit", "migrate")
        said = outputs({**environment, "DATABASE_URL": locked_url}, *lines)
        assert said == all_of(lines, 1, "The database refuses the password.")

    def test_that_has_the_collectors_tables_alone(
        self, environment: dict[str, str], empty_database: str, receiver: Receiver
    ) -> None:
        engine = database.engine(empty_database)
        run(engine, CONSENTOS_0005)
        with engine.connect() as connection:
            migrate(connection, "collector")
        here = {**environment, "DATABASE_URL": empty_database}
        first = (*READING, "send")
        no_revision = 'relation "alembic_version" does not exist'
        not_there = f"ConsentOS's tables cannot be counted: {no_revision}."
        assert outputs(here, *first) == {**all_of(first, 1, UNMIGRATED), "preview": (1, not_there)}
        said = outputs(here, "migrate", "audit --json", "send", "preview")
        assert said["migrate"] == (0, f"telemetry: base -> {HEAD}\n")
        assert said["audit --json"] == (0, "[]\n")
        assert said["send"] == said["preview"] == (1, not_there)
        assert count(engine, "collector_alembic_version") == 1
        assert receiver.connections == 0

    def test_that_may_only_be_read(
        self, administered: dict[str, str], db: Engine, receiver: Receiver
    ) -> None:
        name = one(db, "SELECT current_database()")
        run(db, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        said = outputs(administered, *ASKING, "migrate --down --yes")
        assert {said[line][0] for line in READING} == {0}
        assert said["migrate"] == (0, f"telemetry: at {HEAD}\n")
        for line in ("send", "migrate --down --yes"):
            assert said[line][0] == 1
            assert said[line][1].startswith("Cannot execute ")
            assert said[line][1].endswith(" in a read-only transaction.")
        assert receiver.connections == 0

    def test_that_may_only_be_read_and_is_not_migrated(
        self, environment: dict[str, str], empty_database: str
    ) -> None:
        engine = database.engine(empty_database)
        run(engine, CONSENTOS_0005)
        run(engine, "CREATE TABLE alembic_version AS SELECT '0005' AS version_num")
        name = one(engine, "SELECT current_database()")
        run(engine, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        said = outputs({**environment, "DATABASE_URL": empty_database}, *ASKING)
        cannot = "Cannot execute CREATE TABLE in a read-only transaction."
        first = (*READING, "send")
        not_there = 'ConsentOS\'s tables cannot be counted: relation "sites" does not exist.'
        expected = {**all_of(first, 1, UNMIGRATED), "migrate": (1, cannot)}
        assert said == {**expected, "preview": (1, not_there)}

    @pytest.mark.parametrize(
        ("missing", "do_without"),
        [
            ("telemetry_notice", {"preview", "audit", "audit --json"}),
            ("telemetry_outbox", {"preview"}),
            ("telemetry_attempt", {"preview"}),
            ("instance", {"audit", "audit --json"}),
        ],
    )
    def test_that_has_only_some_of_the_tables(
        self,
        environment: dict[str, str],
        db: Engine,
        receiver: Receiver,
        missing: str,
        do_without: set[str],
    ) -> None:
        run(db, f"ALTER TABLE {missing} RENAME TO away")
        said = outputs(environment, *READING, "send")
        assert {line for line, (code, _) in said.items() if code == 0} == do_without
        failed = [said[line] for line in said.keys() - do_without]
        assert failed == [(1, UNMIGRATED)] * len(failed)
        assert receiver.connections == 0

    def test_that_has_the_tables_but_lost_their_revision_is_repaired(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        run(db, "DROP TABLE telemetry_alembic_version")
        said = outputs(administered, "migrate", "audit --json")
        code, words = said["migrate"]
        assert code == 0
        assert words.startswith(f"telemetry: base -> {HEAD}\nRepaired. These were missing:\n")
        assert "its revision in telemetry_alembic_version" in words
        assert said["audit --json"] == (0, "[]\n")
