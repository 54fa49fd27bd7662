"""What `status` shows of Redis: what is wrong with it, and when a worker last swept."""

import re
from collections.abc import Iterator
from datetime import timedelta

import pytest
import redis
from redis.exceptions import NoPermissionError
from sqlalchemy import Engine

from app import wakeups
from app.settings import Settings
from tests.conftest import Clock
from tests.support.command import PASSWORD, command
from tests.support.database import give_notice, one, run
from tests.support.processes import ROOT, Processes
from tests.support.receiver import Receiver
from tests.support.steps import eventually

NOTICED_AT = "2026-05-01T12:00:00Z"
USER = "limited"
OPERATE = ROOT / "docs" / "operate.md"


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """The real Valkey, whose users and passwords a test may change."""
    with redis.Redis.from_url(redis_url) as client:
        yield client
        client.acl_setuser("default", enabled=True, nopass=True)
        client.acl_deluser(USER)


@pytest.fixture
def due(environment: dict[str, str], db: Engine, clock: Clock) -> dict[str, str]:
    """An install whose heartbeat is overdue."""
    give_notice(db, NOTICED_AT)
    clock("2026-05-02T09:00:00Z")
    return environment


def trouble(url: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setenv("REDIS_URL", url)
    return wakeups.look(Settings.load()).trouble


@pytest.mark.usefixtures("environment")
class TestTrouble:
    def test_is_absent_if_redis_answers(
        self, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert trouble(redis_url, monkeypatch) is None

    @pytest.mark.parametrize(
        ("url", "cause"),
        [
            ("redis://127.0.0.1:1/0", "nothing listens at the address in REDIS_URL"),
            ("redis://nowhere.invalid/0", "the host in REDIS_URL is unknown"),
            ("", "REDIS_URL must begin with redis:// or rediss://"),
        ],
    )
    def test_is_said_in_words(self, url: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert trouble(url, monkeypatch) == cause

    def test_names_a_password_that_is_missing_or_wrong(
        self, server: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.acl_setuser(
            "default", enabled=True, reset_passwords=True, passwords=[f"+{PASSWORD}"]
        )
        assert trouble(redis_url, monkeypatch) == "Redis asks for a password"
        wrong = redis_url.replace("redis://", "redis://:wrong@")
        assert trouble(wrong, monkeypatch) == "Redis refuses the user or the password"
        right = redis_url.replace("redis://", f"redis://:{PASSWORD}@")
        assert trouble(right, monkeypatch) is None

    def test_names_a_right_that_the_user_lacks(
        self, server: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.acl_setuser(USER, enabled=True, passwords=[f"+{PASSWORD}"], commands=["+ping"])
        as_user = redis_url.replace("redis://", f"redis://{USER}:{PASSWORD}@")
        found = trouble(as_user, monkeypatch)
        assert found
        assert found.startswith("Redis does not allow its user a command or a key")

    def test_is_silence_where_tls_meets_none(
        self, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A server without TLS takes the greeting for an unfinished command.
        encrypted = redis_url.replace("redis://", "rediss://")
        assert trouble(encrypted, monkeypatch) == "Redis does not answer"


class TestTheUserOfTheOperatorsPage:
    def test_is_enough_to_work_and_to_look(
        self,
        server: redis.Redis,
        redis_url: str,
        processes: Processes,
        receiver: Receiver,
        db: Engine,
        clock: Clock,
    ) -> None:
        (line,) = re.findall(r"(?s)ACL SETUSER telemetry (.*?)\n```", OPERATE.read_text())
        server.execute_command("ACL", "SETUSER", USER, *line.replace("PASSWORD", PASSWORD).split())
        as_user = redis_url.replace("redis://", f"redis://{USER}:{PASSWORD}@")
        processes.environment["REDIS_URL"] = as_user
        give_notice(db, NOTICED_AT)
        clock("2026-05-02T02:30:05Z")
        worker, scheduler = processes.start_all("worker scheduler")
        worker.wait_for("telemetry.payload", seconds=60)
        assert len(receiver.requests) == 1
        eventually(lambda: swept(processes) is not None)
        for process in (worker, scheduler):
            assert not process.lines("telemetry.failed")
            assert "CRITICAL" not in process.output()
            assert "ERROR" not in process.output()
        assert command(processes.environment, "status", "--json").json["redis_trouble"] is None

    def test_may_touch_no_other_key(self, server: redis.Redis, redis_url: str) -> None:
        (line,) = re.findall(r"(?s)ACL SETUSER telemetry (.*?)\n```", OPERATE.read_text())
        server.execute_command("ACL", "SETUSER", USER, *line.replace("PASSWORD", PASSWORD).split())
        as_user = redis_url.replace("redis://", f"redis://{USER}:{PASSWORD}@")
        with redis.Redis.from_url(as_user) as client, pytest.raises(NoPermissionError):
            client.set("celery", "")


def swept(processes: Processes) -> int | None:
    shown = command(processes.environment, "status", "--json").json["last_sweep_seconds_ago"]
    return None if shown is None else int(shown)


class TestStatus:
    def test_shows_when_a_worker_last_swept(self, processes: Processes, db: Engine) -> None:
        assert one(db, "SELECT 1")
        here = processes.environment
        assert command(here, "status", "--json").json["last_sweep_seconds_ago"] is None
        worker = processes.start("worker")
        worker.wait_for("is ready for action")
        processes.wake("sweep")
        worker.wait_for("telemetry.notice")
        eventually(lambda: swept(processes) is not None)
        ago = swept(processes)
        assert ago is not None
        assert 0 <= ago < 120
        assert "second" in command(here, "status").out

    def test_says_that_no_worker_has_swept_for_long(
        self, environment: dict[str, str], redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REDIS_URL", redis_url)
        with redis.Redis.from_url(redis_url) as client:
            left = timedelta(days=30) - timedelta(hours=2)
            client.set(f"{Settings.load().namespace}:swept", "", px=left)
        ended = command({**environment, "REDIS_URL": redis_url}, "status")
        assert "2:00:0" in ended.out
        assert "is a worker running?" in ended.out


class TestTheCheck:
    """It fails only if a restart of the process may help."""

    def test_fails_while_redis_answers(self, due: dict[str, str], redis_url: str) -> None:
        assert command({**due, "REDIS_URL": redis_url}, "status", "--check").code == 1

    def test_passes_while_redis_is_away_and_says_so(self, due: dict[str, str]) -> None:
        ended = command({**due, "REDIS_URL": "redis://127.0.0.1:1/0"}, "status", "--check")
        assert ended.code == 0
        assert ended.sentence == (
            "Redis cannot be used, so no worker is woken: nothing listens at the address"
            " in REDIS_URL."
        )

    @pytest.mark.parametrize(
        ("harm", "reason"),
        [
            (
                'ALTER DATABASE "%s" SET default_transaction_read_only = on',
                "the database is read-only",
            ),
            (
                (
                    "REVOKE INSERT ON telemetry_outbox FROM %r;"
                    "REVOKE INSERT (id, day) ON telemetry_outbox FROM %r"
                ),
                "the role lacks rights on telemetry_outbox",
            ),
        ],
        ids=["read-only", "rights"],
    )
    def test_passes_while_the_database_takes_no_row_and_says_so(
        self, due: dict[str, str], db: Engine, redis_url: str, harm: str, reason: str
    ) -> None:
        name = one(db, "SELECT current_database()")
        role = due["DATABASE_URL"].split("://")[1].split("@")[0].split(":")[0]
        for statement in harm.replace("%s", name).replace("%r", role).split(";"):
            run(db, statement)
        ended = command({**due, "REDIS_URL": redis_url}, "status", "--check")
        assert ended.code == 0
        assert ended.sentence == f"The day's heartbeat cannot be written: {reason}."
