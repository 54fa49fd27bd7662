"""The log of each process during an outage: the cause in words, and few lines."""

import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from urllib.parse import urlsplit

import pytest
import redis
import trustme

from tests.support.breakable import Server
from tests.support.command import PASSWORD
from tests.support.processes import Process, Processes
from tests.support.proxy import proxying
from tests.support.steps import eventually, without_harm

A_MINUTE = 60
LONGER_THAN_A_MINUTE = 70

PROCESSES = ("worker", "scheduler", "solo")

LIMITED = "limited"


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    """The real Valkey, whose users and passwords a test may change."""
    with redis.Redis.from_url(redis_url, single_connection_client=True) as client:
        yield client
        client.acl_setuser("default", enabled=True, nopass=True)
        client.acl_deluser(LIMITED)


Break = Callable[[], AbstractContextManager[str]]
"""Makes Redis unusable in one way until the block ends; gives the REDIS_URL to use."""


@pytest.fixture
def ways(server: redis.Redis, redis_url: str, authority: trustme.CA) -> dict[str, Break]:
    host = redis_url.removeprefix("redis://")

    def locked(url: str) -> Break:
        @contextmanager
        def way() -> Iterator[str]:
            lock = [f"+{PASSWORD}"]
            server.acl_setuser("default", enabled=True, reset_passwords=True, passwords=lock)
            yield url
            server.acl_setuser("default", enabled=True, nopass=True)

        return way

    def without(*rules: str) -> Break:
        def way() -> AbstractContextManager[str]:
            given = f"on >{PASSWORD} ~consentos-telemetry* +@all".split()
            server.execute_command("ACL", "SETUSER", LIMITED, *given, *rules)
            return nullcontext(f"redis://{LIMITED}:{PASSWORD}@{host}")

        return way

    @contextmanager
    def badly_certified() -> Iterator[str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        with proxying("tunnel", urlsplit(redis_url).port or 0, context) as tunnel:
            yield f"rediss://127.0.0.1:{tunnel.port}/0"

    return {
        "refused": lambda: nullcontext("redis://127.0.0.1:1/0"),
        "no password": locked(redis_url),
        "wrong password": locked(f"redis://:wrong@{host}"),
        "bad certificate": badly_certified,
        "command": without("-evalsha", "-brpoplpush", "-llen"),
        "in a script": without("-hset", "-lpush", "-rpush", "-zadd", "-hdel", "-rpop"),
        "key": without("resetkeys", "~elsewhere*"),
    }


NO_RIGHT = "Redis does not allow its user a command or a key (ACL SETUSER in docs/operate.md)"


@pytest.mark.parametrize(
    ("way", "cause"),
    [
        ("refused", "nothing listens where REDIS_URL points to"),
        ("no password", "Redis asks for a password"),
        ("wrong password", "Redis refuses the user or the password"),
        ("bad certificate", "the certificate of Redis cannot be verified"),
        ("command", NO_RIGHT),
        ("in a script", NO_RIGHT),
        ("key", NO_RIGHT),
    ],
)
def test_each_process_names_in_words_why_redis_cannot_be_used(
    processes: Processes, ways: dict[str, Break], way: str, cause: str
) -> None:
    with ways[way]() as url:
        started = [processes.start(name, REDIS_URL=url) for name in PROCESSES]
        if way == "in a script":
            started = started[1:]  # the worker only fetches, which this user may
        for process in started:
            process.wait_for("telemetry.failed")
        time.sleep(4)  # Dramatiq tries again after three
        for process in started:
            assert process.lines("telemetry.failed") == [
                f'telemetry.failed stage=redis error="{cause}" level=WARNING'
            ]
            assert logged_only_as_events(process)


def logged_only_as_events(process: Process) -> bool:
    """Whether a process has logged failures only as events, and every line with its level."""
    lines = process.output().splitlines()
    others = [line for line in lines if not line.startswith("telemetry.")]
    assert not [line for line in others if re.search("WARNING|ERROR|CRITICAL|[Rr]estart", line)]
    assert all(re.search(r" level=[A-Z]+$", line) for line in lines), lines
    return without_harm(process)


@pytest.mark.timeout(180)
def test_more_than_a_minute_without_redis_is_a_line_a_minute_and_one_at_the_end(
    processes: Processes, valkey: Server
) -> None:
    started = [processes.start(name) for name in PROCESSES]
    for process in (started[0], started[2]):
        process.wait_for("telemetry.enabled")
    started[1].wait_for("telemetry.scheduled", count=2)
    with valkey.down():
        began = time.monotonic()
        for process in started:
            process.wait_for("telemetry.failed", seconds=A_MINUTE + 5)
        before = [process.output() for process in started]
        time.sleep(max(0, LONGER_THAN_A_MINUTE - (time.monotonic() - began)))
        for process, output in zip(started, before, strict=True):
            assert len(process.output().removeprefix(output).splitlines()) <= 1
            assert len(process.lines("telemetry.failed")) in {1, 2}
    for process in started:
        process.wait_for("telemetry.recovered stage=redis after_seconds=", seconds=A_MINUTE)
    time.sleep(1)
    for process in started:
        assert len(process.lines("telemetry.recovered")) == 1
        assert logged_only_as_events(process)


@pytest.mark.timeout(120)
def test_a_connection_that_breaks_and_is_replaced_is_no_outage(
    processes: Processes, server: redis.Redis
) -> None:
    solo = processes.start("solo")
    solo.wait_for("telemetry.scheduled", count=2)
    eventually(lambda: len(server.client_list()) > 1)
    server.execute_command("CLIENT", "KILL", "TYPE", "normal")
    time.sleep(4)
    assert solo.lines("telemetry.failed") == []
    assert logged_only_as_events(solo)
