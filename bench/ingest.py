"""How many heartbeats a second one collector accepts, each committed before its answer.

``python -m bench.ingest`` measures this working tree and, in turns under the same load on the same
machine, the revision of ``--against``; it writes bench/results/ingest.json. Each has a database of
its own. Without that revision, it measures this tree alone.
"""

import argparse
import asyncio
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from uuid import uuid4

import psutil
from sqlalchemy import Engine, NullPool, create_engine, text

from bench.rig import DATA, ROOT, RigError, rounded, with_driver
from demo import servers

BASELINE = "c1ea5e7"
"""The last revision whose server parsed requests with h11."""
ROUNDS = 5
SECONDS = 10.0
WARM_UP_SECONDS = 1.0
CONNECTIONS = 64
GOAL = 2.0
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
"""Runs a command in its home directory, as its user."""


class Caller(asyncio.Protocol):
    """One connection that sends a request after each answer, each of another install."""

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
        """Close; return how many answers were not 202, lost connections included."""
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
    """Send for a while; return requests a second and milliseconds of an answer."""
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


@dataclass(frozen=True)
class Collector:
    """A source tree, and a database that its own migrations have created."""

    home: Path
    url: str

    @contextmanager
    def serving(self, port: int) -> Iterator[psutil.Popen]:
        """Serve on ``port`` until the block ends, without limits for one client."""
        env = {
            "COLLECTOR_DATABASE_URL": self.url,
            "COLLECTOR_CLIENT_RATE": "0",
            "COLLECTOR_CLIENT_INSTALLS": "0",
            "PORT": str(port),
        }
        argv = [sys.executable, "-m", "app.collector", "serve", "--host", "127.0.0.1"]
        with running(argv, home=self.home, env=env, log=DATA / f"{self.home.name}.log") as process:
            _wait_for(lambda: _listens(port) or process.poll() is not None)
            yield process

    def migrate(self) -> None:
        """Create the tables."""
        subprocess.run(
            [sys.executable, "-m", "app.collector", "migrate"],
            cwd=self.home,
            env={"COLLECTOR_DATABASE_URL": self.url},
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def measure(self) -> dict[str, float]:
        """Return the results of one round, from empty tables."""
        engine = create_engine(with_driver(self.url), poolclass=NullPool)
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE heartbeat, install"))
            connection.execute(text("CHECKPOINT"))
        port = _free_port()
        with self.serving(port) as process:
            used = _cpu_seconds(process)
            result = asyncio.run(_load(port))
            used = _cpu_seconds(process) - used
            peak = _peak_mb(process)
        with engine.begin() as connection:
            kept = connection.scalar(text("SELECT count(*) FROM heartbeat")) or 0
        if kept < result["per_second"] * SECONDS:
            raise RigError("Heartbeats were acknowledged that are not in the database.")
        return result | {"cpu_us": 1e6 * used / kept, "max_rss_mb": peak}


def measure(baseline: str) -> dict[str, object]:
    """Return the median of each round's numbers, and the ratio of this tree to ``baseline``."""
    with servers.running(DATA, say=lambda _: None) as embedded:
        _make_durable(embedded)
        homes = {"now": ROOT} | ({"before": home} if (home := export(baseline)) else {})
        collectors = {
            name: Collector(home, _database(embedded.postgres, name))
            for name, home in homes.items()
        }
        for each in collectors.values():
            each.migrate()
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(ROUNDS):
            rounds.append({name: each.measure() for name, each in collectors.items()})
            print(f"{number + 1} of {ROUNDS}: {_in_words(rounds[-1])}", flush=True)  # noqa: T201 - what was measured, on stdout
        settings = _settings(create_engine(with_driver(embedded.postgres), poolclass=NullPool))
    medians = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in values}
        for name, values in rounds[0].items()
    }
    rates = {name: each["per_second"] for name, each in medians.items()}
    result = {
        "seconds": SECONDS,
        "connections": CONNECTIONS,
        "cpus": os.cpu_count(),
        "postgres": settings,
        "baseline": baseline,
        "medians": medians,
        "ratio": rates["now"] / rates["before"] if "before" in rates else None,
        "goal": GOAL,
        "rounds": rounds,
    }
    found: dict[str, object] = rounded(result, 2)
    return found


def export(revision: str) -> Path | None:
    """Return a directory with the project as of a ``revision``; None if git does not have it."""
    home = DATA / "before"
    try:
        archive = subprocess.run(  # noqa: S603 - git, and a revision that the caller has chosen
            ["git", "archive", "--format=tar", "--end-of-options", revision],  # noqa: S607 - as on PATH
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        print(f"git has no revision {revision} here: only this tree is measured.", flush=True)  # noqa: T201 - what was measured, on stdout
        return None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(home, filter="data")
    return home


def _database(server: str, name: str) -> str:
    engine = create_engine(with_driver(server), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    return server.replace("/postgres?", f"/{name}?")


@contextmanager
def running(
    argv: Sequence[str], *, home: Path, env: Mapping[str, str], log: Path
) -> Iterator[psutil.Popen]:
    """Run a command until the block ends.

    Raises:
        RigError: it has ended by itself; the message says with what, and how its log ends.
    """
    # If this process is killed, the keeper of the servers ends every process with its marker.
    marked = {**env, servers.MARKER: str(DATA.resolve())}
    with log.open("ab") as output:
        process = psutil.Popen(argv, cwd=home, env=marked, stdout=output, stderr=output)
    try:
        yield process
        _check(process, log)
    except (OSError, RigError, psutil.Error):
        _check(process, log)
        raise
    finally:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        process.wait(20)


def _check(process: psutil.Popen, log: Path) -> None:
    """Raise RigError if a process has ended, or is about to."""
    with suppress(psutil.TimeoutExpired):
        code = process.wait(0.5)
        last = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        raise RigError(f"A process of the bench ended with {code}. Its log ends with:\n{last}")


def _cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return used.user + used.system


def _peak_mb(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) / 1024


def _make_durable(embedded: servers.Servers) -> None:
    """Restart the embedded Postgres as its keeper does, but with commits that wait for the disk."""
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
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(
        description="Measure how many heartbeats a second are accepted."
    )
    parser.add_argument(
        "--against", default=BASELINE, metavar="REVISION", help="default: %(default)s"
    )
    result = measure(parser.parse_args().against)
    RESULT.write_text(f"{json.dumps(result, indent=1)}\n")
    print(f"The ratio is {result['ratio']}; the goal is {GOAL}.")  # noqa: T201 - what was measured, on stdout


if __name__ == "__main__":
    main()
