"""What the commands print: bounded, readable, JSON on request, and whatever stdout is."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app import __version__
from app.models import STATES
from tests.conftest import Clock
from tests.support.command import Ended, command, commands
from tests.support.database import give_notice, one, run
from tests.support.processes import ROOT, minimal
from tests.support.receiver import Receiver

DAYS = 45


@pytest.fixture
def long_outbox(db: Engine) -> None:
    """An outbox of more days than a list has, in every final state, up to 2026-05-02."""
    run(
        db,
        "INSERT INTO telemetry_outbox (id, day, instance_id, payload, state, attempts, created_at,"
        " next_attempt_at, expires_at, finished_at)"
        " SELECT gen_random_uuid(), DATE '2026-05-02' - n, gen_random_uuid(), '{}',"
        " (ARRAY['sent', 'rejected', 'expired', 'discarded'])[1 + n % 4], 1, now(), now(), now(),"
        " now() FROM generate_series(0, :days - 1) AS n",
        days=DAYS,
    )
    run(
        db,
        "INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome, error,"
        " endpoint) SELECT id, 1, now(), now(), 'retryable', 'the receiver does not answer within"
        " the deadline', 'https://telemetry.consentos.dev/v1/heartbeat' FROM telemetry_outbox",
    )


def days(ended: Ended) -> list[str]:
    assert ended.code == 0, ended.err
    return [row["day"] for row in ended.json]


@pytest.mark.usefixtures("long_outbox")
class TestTheListOfTheOutbox:
    def test_has_the_latest_rows_and_says_how_many_more_there_are(
        self, environment: dict[str, str]
    ) -> None:
        shown, listed, few, every = commands(
            environment, "audit", "audit --json", "audit --json --limit 3", "audit --json --all"
        )
        assert shown.sentence == "15 older rows not shown: --all shows all."
        assert len(re.findall("2026-0[345]-.. │", shown.out)) == len(days(listed)) == 30
        assert days(few) == ["2026-05-02", "2026-05-01", "2026-04-30"]
        assert few.sentence == "42 older rows not shown: --all shows all."
        assert (len(days(every)), every.err) == (DAYS, "")

    def test_can_be_of_one_state_and_of_a_day_and_later(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        since = "--since 2026-04-27"
        export = f"audit --export {tmp_path / 'export'} {since}"
        sent, late, both, exported = commands(
            environment,
            *("audit --json --all --state sent", f"audit --json {since}"),
            *(f"audit --json --limit 1 {since} --state expired", f"{export} --state sent"),
        )
        assert len(days(sent)) == 12
        assert {row["state"] for row in sent.json} == {"sent"}
        assert (len(days(late)), late.json[-1]["day"]) == (6, "2026-04-27")
        assert (days(both), both.err) == (["2026-04-30"], "")
        lines = (tmp_path / "export").read_text().splitlines()
        assert [json.loads(line)["day"] for line in lines] == ["2026-04-28", "2026-05-02"]
        assert exported.err.startswith("2 heartbeats with 2 attempts")

    @pytest.mark.parametrize("columns", [60, 80, 132])
    def test_cuts_no_day_and_no_state_in_a_terminal_of(
        self, environment: dict[str, str], columns: int
    ) -> None:
        ended = command({**environment, "COLUMNS": str(columns)}, "audit", "--limit", "4")
        assert max(map(len, ended.out.splitlines())) <= columns
        assert "…" not in ended.out
        for words in ("2026-05-02 │ sent", "2026-04-29 │ discarded"):
            assert words in ended.out
        row = command({**environment, "COLUMNS": str(columns)}, "audit", "2026-05-02")
        assert max(map(len, row.err.splitlines())) <= columns
        assert "…" not in row.err


class TestHelp:
    @pytest.mark.parametrize("columns", [60, 80])
    def test_wraps_within(self, columns: int) -> None:
        names = ("", "send", "migrate", "grants", "rotate", "forget", "status", "preview", "audit")
        for ended in commands({"COLUMNS": str(columns)}, *(f"{name} -h" for name in names)):
            assert ended.code == 0
            assert max(map(len, ended.out.splitlines())) <= columns
            words = " ".join(ended.out.split())
            for code in ("0 success", "1 failed", "2 wrong arguments or settings", "3 telemetry"):
                assert code in words

    def test_names_every_state(self) -> None:
        assert set(STATES) <= set(re.split(r"\W+", command({}, "audit", "-h").out))

    def test_is_there_for_the_version_and_for_completion_too(self) -> None:
        version, completion = commands({}, "--version", "--show-completion bash")
        assert version.out == f"consentos-telemetry {__version__}\n"
        assert "complete -o default -F" in completion.out
        assert "_CONSENTOS_TELEMETRY_COMPLETE" in completion.out


class TestAFailureWithJson:
    def test_is_an_object_with_its_exit_code(
        self, environment: dict[str, str], empty_database: str
    ) -> None:
        gone = {**environment, "DATABASE_URL": empty_database}
        lines = (
            *("audit", "audit last", "audit --verify", "preview --diff", "send"),
            *("rotate --yes", "forget --yes"),
        )
        for ended in commands(gone, *(f"{line} --json" for line in lines)):
            assert ended.code == 1
            assert ended.json == {"error": ended.sentence, "code": 1}

    def test_is_an_object_for_wrong_arguments_and_settings_and_a_switch_that_is_off(
        self, environment: dict[str, str]
    ) -> None:
        wrong, missing = commands(environment, "audit --limit 0 --json", "audit last --json")
        off = command({**environment, "TELEMETRY_ENABLED": "false"}, "send", "--json")
        unset = command({"ENVIRONMENT": "production"}, "audit", "--json")
        for ended, code in ((wrong, 2), (missing, 1), (off, 3), (unset, 2)):
            assert (ended.code, ended.json["code"]) == (code, code)
            assert [*ended.json] == ["error", "code"]

    def test_of_status_has_the_settings_too(self, environment: dict[str, str]) -> None:
        away = {**environment, "DATABASE_URL": "postgresql://operator@127.0.0.1:1/consentos"}
        failed, checked = commands(away, "status --json", "status --json --check")
        assert (failed.code, failed.json["code"]) == (1, 1)
        assert (checked.code, checked.json["code"]) == (0, 0)
        for reported in (failed.json, checked.json):
            assert reported["error"] == "The database cannot be reached."
            assert reported["enabled"]


def documented(command_line: str) -> set[str]:
    """Return the keys that the page names for a command's object."""
    page = (ROOT / "docs" / "operate.md").read_text()
    (row,) = re.findall(rf"^\| `{re.escape(command_line)}` \|(.*)\|$", page, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


@pytest.mark.usefixtures("receiver")
def test_the_keys_of_every_json_object_are_those_that_are_documented(
    administered: dict[str, str], clock: Clock, db: Engine
) -> None:
    give_notice(db, "2026-01-01")
    clock("2026-05-02T02:30:00Z")
    lines = {
        "send --json": "send --json",
        "status --json": "status --json",
        "preview --diff --json": "preview --diff --json",
        "audit --verify --json": "audit --verify --json",
        "audit last --json": "audit last --json",
        "rotate --json": "rotate --json --yes",
        "forget --json": "forget --json --yes",
    }
    for name, ended in zip(lines, commands(administered, *lines.values()), strict=True):
        assert ended.code == 0, ended.err
        assert set(ended.json) == documented(name), name
        if name == "audit last --json":
            assert set(ended.json["tries"][0]) == documented("tries")
    failed = command(administered, "audit", "last", "--json")
    assert set(failed.json) == documented("a failure")


def run_with(
    environment: Mapping[str, str], *arguments: str, redirection: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, with its output redirected."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=minimal(environment),
        capture_output=True,
        text=True,
        check=False,
    )


class TestAStdout:
    @pytest.mark.parametrize(
        "line", ["audit", "audit last", "status --json", "-h", "audit --json --limit 0"]
    )
    def test_on_a_full_disk_is_one_sentence(self, environment: dict[str, str], line: str) -> None:
        ended = run_with(environment, *line.split(), redirection="> /dev/full")
        assert ended.returncode == 1
        *_, last = ended.stderr.splitlines()
        if line == "audit last":
            assert last == "consentos-telemetry: No heartbeat has been attempted yet."
        else:
            full = "The output cannot be written: No space left on device."
            assert last == f"consentos-telemetry: {full}"
        assert "Traceback" not in ended.stderr

    def test_that_is_closed_changes_nothing_about_the_exit_code(
        self, environment: dict[str, str]
    ) -> None:
        assert run_with(environment, "audit", redirection=">&-").returncode == 0
        assert run_with(environment, "audit", "last", redirection=">&-").returncode == 1
        assert run_with(environment, "audit", "x", "--json", redirection=">&-").returncode == 2

    @pytest.mark.usefixtures("long_outbox")
    @pytest.mark.parametrize("line", ["audit --all", "audit --export -", "-h"])
    def test_whose_reader_has_gone_ends_the_command_quietly(
        self, environment: dict[str, str], line: str
    ) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(
            [sys.executable, "-m", "app", *line.split()],
            cwd=ROOT,
            env=minimal(environment),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (1, "")

    def test_that_is_a_pipe_has_the_body_of_a_row_alone(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        sent, row = commands(administered, "send", "audit last")
        assert (sent.code, row.code) == (0, 0)
        assert row.out == one(db, "SELECT payload::text FROM telemetry_outbox") + "\n"
        assert "sent (HTTP 20" in row.err


@contextmanager
def in_a_terminal(
    environment: Mapping[str, str], *arguments: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command in a terminal of its own; give it and the other end of the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=minimal(environment),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def shown(terminal: int, until: str = "") -> str:
    """Return what a terminal shows, up to some words or to its end."""
    said = b""
    while not until or until.encode() not in said:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # nobody writes there any more
            break
    return said.decode()


class TestCtrlC:
    def test_at_a_prompt_changes_nothing_and_says_so(
        self, administered: dict[str, str], db: Engine
    ) -> None:
        run(db, "INSERT INTO instance VALUES (gen_random_uuid(), now(), now())")
        before = one(db, "SELECT id FROM instance")
        with in_a_terminal(administered, "rotate") as (process, terminal):
            assert "Continue?" in shown(terminal, "Continue?")
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            said = shown(terminal)
            assert process.wait(20) == 1
        assert said.strip().endswith("consentos-telemetry: Aborted: nothing was changed.")
        assert "Traceback" not in said
        assert one(db, "SELECT id FROM instance") == before

    def test_during_a_wait_is_one_line(
        self, environment: dict[str, str], db: Engine, receiver: Receiver
    ) -> None:
        receiver.during = lambda: time.sleep(3)
        with in_a_terminal(environment, "send") as (process, terminal):
            deadline = time.monotonic() + 30
            while not one(db, "SELECT count(*) FROM telemetry_attempt"):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            said = shown(terminal)
            assert process.wait(20) == 130
        assert said.strip().endswith("consentos-telemetry: Interrupted.")
        assert "Traceback" not in said
