"""How many heartbeats a second one collector takes, each committed before it is acknowledged.

``python -m bench.ingest`` measures that beside the same server with an application that does
nothing but answer 202: in turns, on one machine, under the same load, and writes
bench/results/ingest.json.
``python -m bench.ingest PORT`` is that other server.
"""

import asyncio
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT
from uuid import uuid4

import psutil
from sqlalchemy import Engine, NullPool, create_engine, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.collector.__main__ import server
from app.demo import servers
from bench.rig import DATA, RigError, with_driver
from migrations import migrate

ROUNDS = 5
SECONDS = 10.0
WARM_UP_SECONDS = 1.0
CONNECTIONS = 64
GOAL = 0.5
RESULT = Path(__file__).parent / "results" / "ingest.json"

HEARTBEAT = """{"telemetry_schema":1,"instance_id":"%s","sent_at":"2026-05-02T02:30:00+00:00",\
"version":"0.1.0","edition":"ce","python_version":"3.12.7","platform":"linux",\
"deployment":"docker-compose","counts":{"orgs":"1-10","sites":"10-100","users":"1-10",\
"scans_last_24h":"10-100","consents_last_24h":"100-1k"},"features":{"tcf_v22_sites":"1-10",\
"auto_blocking_sites":"10-100","scanner_scheduled_sites":"1-10","geoip_header_configured":true,\
"geoip_maxmind_configured":false,"rate_limit_enabled":true,"compliance_ee":false},\
"stack":{"postgres_version":"16.2","redis_present":true}}"""
HEAD = """POST /v1/heartbeat HTTP/1.1\r
Host: 127.0.0.1\r
Content-Type: application/json\r
Content-Length: %d\r
User-Agent: consentos-telemetry/1\r
Accept: */*\r
Accept-Encoding: identity\r
\r
"""

AT_HOME = (
    "import os, sys; home, user, *command = sys.argv[1:];"
    "os.chdir(home); os.setreuid(int(user), int(user)); os.execv(command[0], command)"
)
"""Becomes a command in its home directory, as its user."""


async def nothing(_: Request) -> Response:
    """Answer 202."""
    return Response(status_code=202)


class Caller(asyncio.Protocol):
    """One connection, on which a request follows each answer, every one of another install."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        """Send the next of ``requests`` each time."""
        self._requests = requests
        self._received = b""
        self.answered: list[float] = []
        self.lost = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Note an answer, and send the next."""
        self._received += data
        if not self._received.endswith(b"\r\n\r\n"):
            return
        if self._received.startswith(b"HTTP/1.1 202 "):
            self.answered.append(time.perf_counter() - self._sent)
        else:
            self.lost += 1
        self._received = b""
        self._send()

    def connection_lost(self, _error: Exception | None) -> None:
        """Note that nothing more will come."""
        self.lost += 1

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))

    def stop(self) -> int:
        """Hang up; return how many answers were not 202, a lost connection among them."""
        lost = self.lost
        self._transport.abort()
        return lost


def _requests() -> Iterator[bytes]:
    before, _, after = HEARTBEAT.partition("%s")
    start = (HEAD % (len(HEARTBEAT) - 2 + 36) + before).encode()
    end = after.encode()
    while True:
        yield start + str(uuid4()).encode() + end


async def _load(port: int) -> dict[str, float]:
    """Call for a while, and return requests a second and milliseconds of an answer."""
    loop, requests = asyncio.get_running_loop(), _requests()
    pairs = [
        await loop.create_connection(lambda: Caller(requests), "127.0.0.1", port)
        for _ in range(CONNECTIONS)
    ]
    callers = [caller for _, caller in pairs]
    await asyncio.sleep(WARM_UP_SECONDS)
    for caller in callers:
        caller.answered.clear()
    began = time.perf_counter()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - began
    if any(caller.stop() for caller in callers):
        raise RigError("Not every request was answered with 202.")
    answered = [each for caller in callers for each in caller.answered]
    cuts = statistics.quantiles(answered, n=100)
    return {
        "per_second": len(answered) / seconds,
        "p50_ms": 1000 * cuts[49],
        "p99_ms": 1000 * cuts[98],
    }


def measure() -> dict[str, object]:
    """Return requests a second of both, the median of each round's, and their ratio."""
    with servers.running(DATA, say=lambda _: None) as embedded:
        _make_durable(embedded)
        engine = create_engine(with_driver(embedded.postgres), poolclass=NullPool)
        with engine.connect() as connection:
            migrate(connection, "collector")
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(ROUNDS):
            rounds.append({"nothing": _nothing(embedded), "collector": _collector(embedded)})
            print(f"{number + 1} of {ROUNDS}: {_in_words(rounds[-1])}", flush=True)  # noqa: T201 - what was measured, on stdout
        settings = _settings(engine)
    medians = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in values}
        for name, values in rounds[0].items()
    }
    ratio = medians["collector"]["per_second"] / medians["nothing"]["per_second"]
    return {
        "seconds": SECONDS,
        "connections": CONNECTIONS,
        "cpus": os.cpu_count(),
        "postgres": settings,
        "medians": medians,
        "ratio": round(ratio, 3),
        "goal": GOAL,
        "rounds": rounds,
    }


def _nothing(embedded: servers.Servers) -> dict[str, float]:
    port = _free_port()
    with _running(embedded, [sys.executable, "-m", "bench.ingest", str(port)], {}, port):
        return asyncio.run(_load(port))


def _collector(embedded: servers.Servers) -> dict[str, float]:
    port = _free_port()
    engine = create_engine(with_driver(embedded.postgres), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE heartbeat, install"))
        connection.execute(text("CHECKPOINT"))
    env = {
        "COLLECTOR_DATABASE_URL": embedded.postgres,
        "COLLECTOR_CLIENT_RATE": "0",
        "COLLECTOR_CLIENT_INSTALLS": "0",
        "PORT": str(port),
    }
    argv = [sys.executable, "-m", "app.collector", "serve", "--host", "127.0.0.1"]
    with _running(embedded, argv, env, port):
        result = asyncio.run(_load(port))
    with engine.begin() as connection:
        kept = connection.scalar(text("SELECT count(*) FROM heartbeat")) or 0
    if kept < result["per_second"] * SECONDS:
        raise RigError("Heartbeats were acknowledged that are not in the database.")
    return result


@contextmanager
def _running(
    embedded: servers.Servers, argv: Sequence[str], env: Mapping[str, str], port: int
) -> Iterator[None]:
    pid = embedded.start(argv, env=env, log=DATA / "ingest.log")
    try:
        _wait_for(lambda: _listens(port))
        yield
    finally:
        # Where it has died, what it was measured by says more.
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.terminate()
            psutil.wait_procs([process], timeout=20)


def _make_durable(embedded: servers.Servers) -> None:
    """Start the embedded Postgres again, as its keeper has, but with its disk waited for."""
    running = psutil.Process(embedded.postgres_pid)
    home, user, env = running.cwd(), str(running.uids().real), running.environ()
    command = [*running.cmdline(), "--fsync=on", "--full_page_writes=on"]
    running.send_signal(SIGINT)
    psutil.wait_procs([running], timeout=20)
    embedded.start(
        [sys.executable, "-c", AT_HOME, home, user, *command],
        env=env,
        log=DATA / "postgres.durable.log",
    )
    status = Path(home) / "postmaster.pid"
    _wait_for(lambda: status.exists() and status.read_text().rstrip().endswith("ready"))


def _settings(engine: Engine) -> dict[str, str]:
    names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")
    with engine.connect() as connection:
        return {name: str(connection.scalar(text(f"SHOW {name}"))) for name in names}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        if time.monotonic() > deadline:
            raise RigError("A process of the bench did not start; see .data/bench.")
        time.sleep(0.05)


def _in_words(result: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {each['per_second']:,.0f}/s" for name, each in result.items())


def main() -> None:
    """Measure, or be the server that does nothing."""
    if len(sys.argv) > 1:
        with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
            app = Starlette(routes=[Route("/v1/heartbeat", nothing, methods=["POST"])])
            server(app).run(sockets=[listener])
        return
    result = measure()
    RESULT.write_text(f"{json.dumps(result, indent=1)}\n")
    print(f"The ratio is {result['ratio']}; the goal is {GOAL}.")  # noqa: T201 - what was measured, on stdout


if __name__ == "__main__":
    main()
