"""The test bed: embedded servers, ConsentOS databases, a receiver, processes."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from honcho.environ import parse_procfile
from redis import Redis
from sqlalchemy import Connection, Engine, text

from app import database
from app.settings import Settings
from demo import consentos, servers
from migrations import migrate

ROOT = Path(__file__).parents[1]
DATA = ROOT / ".data" / "bench"


def rounded(value: Any, digits: int) -> Any:
    """Return a result whose numbers are rounded to their significant digits."""
    match value:
        case dict():
            return {key: rounded(each, digits) for key, each in value.items()}
        case list():
            return [rounded(each, digits) for each in value]
        case float():
            return round(value, digits)
        case _:
            return value


class RigError(Exception):
    """A measurement failed; the message is one sentence."""


RUNNING = "day > DATE '2020-01-01'"
"""Separates the running day from the made-up ones."""

QUEUE = "telemetry"


def line(name: str) -> str:
    """Return a line of the Procfile."""
    found: str = parse_procfile((ROOT / "Procfile").read_text()).processes[name]
    return found


@dataclass(frozen=True)
class Install:
    """One ConsentOS with its telemetry, whose notice was given three days ago."""

    url: str
    """The database's, as an operator writes it."""
    env: Mapping[str, str]
    """The whole environment of its processes."""

    @property
    def engine(self) -> Engine:
        """Its database, to look at it and to fill it with millions of rows in one statement."""
        return database.engine(with_driver(self.url), patience=300)

    def wake(self, actor: str) -> None:
        """Send an actor its message, as the scheduler does at a tick."""
        from dramatiq import Message  # noqa: PLC0415 - the bench must stay small
        from dramatiq.brokers.redis import RedisBroker  # noqa: PLC0415 - the same

        with Redis.from_url(self.env["REDIS_URL"]) as client:
            namespace = Settings.model_validate({"DATABASE_URL": self.url}).namespace
            broker = RedisBroker(client=client, namespace=namespace, middleware=[])
            broker.enqueue(Message(QUEUE, actor, (), {}, {}))

    def make_it_the_past(self, days: int) -> None:
        """Move the day's heartbeat to a day long ago, so that the day has none yet."""
        with self.engine.begin() as connection:
            make_it_the_past(connection, days)

    def wait_until_sent(self, seconds: float = 30) -> None:
        """Wait until the instance has been stamped: each way to send ends with that.

        Raises:
            RigError: it is not.
        """
        deadline = time.monotonic() + seconds
        stamped = text("SELECT count(last_telemetry_at) FROM instance")
        while True:
            with self.engine.begin() as connection:
                if connection.scalar(stamped):
                    return
            if time.monotonic() > deadline:
                raise RigError("No heartbeat was sent; see .data/bench/processes.log.")
            time.sleep(0.05)


def make_it_the_past(connection: Connection, days: int) -> None:
    """Move the running day's row to a made-up day; the trigger that forbids it does not fire."""
    connection.execute(text("SET LOCAL session_replication_role = replica"))
    moved = f"UPDATE telemetry_outbox SET day = DATE '2000-01-01' + :days WHERE {RUNNING}"  # noqa: S608 - a constant
    connection.execute(text(moved), {"days": days})
    connection.execute(text("UPDATE instance SET last_telemetry_at = NULL"))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def vacuum(engine: Engine) -> None:
    """Do what autovacuum does on a real day, and write everything to disk."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))


def with_driver(url: str, driver: str = "psycopg") -> str:
    """Return a URL in SQLAlchemy's form."""
    return url.replace("postgresql://", f"postgresql+{driver}://", 1)


class Rig:
    """Two servers and a receiver, on which installs are created and processes run."""

    def __init__(self, embedded: servers.Servers) -> None:
        """Start the receiver."""
        self._embedded = embedded
        self.postgres_pid = embedded.postgres_pid
        self._installs = 0
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.receiver_port: int = probe.getsockname()[1]
        receiver = [sys.executable, "-m", "bench.receiver", str(self.receiver_port)]
        embedded.start(receiver, env=os.environ, log=DATA / "receiver.log")
        _wait_for_port(self.receiver_port)

    def install(self, *, migrated: bool = True) -> Install:
        """Create a small ConsentOS, with the telemetry's tables if ``migrated``."""
        name = f"install_{self._installs}"
        with database.engine(with_driver(self._embedded.postgres)).connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text(f"CREATE DATABASE {name}"))
        url = self._embedded.postgres.replace("/postgres?", f"/{name}?")
        env = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": os.environ.get("HOME", str(DATA)),
            "DATABASE_URL": url,
            "REDIS_URL": f"{self._embedded.redis.removesuffix('/0')}/{self._installs}",
            "ENVIRONMENT": "production",
            "TELEMETRY_ENDPOINT": f"http://127.0.0.1:{self.receiver_port}/v1/heartbeat",
            "TELEMETRY_SPREAD_SECONDS": "0",
        }
        self._installs += 1
        install = Install(url, env)
        with install.engine.begin() as connection:
            consentos.create_tables(connection)
            consentos.populate(connection)
        if migrated:
            with install.engine.connect() as connection:
                migrate(connection, "telemetry")
            with install.engine.begin() as connection:
                notice = "INSERT INTO telemetry_notice VALUES (1, now() - interval '3 days')"
                connection.execute(text(notice))
        return install

    def sessions(self, install: Install) -> tuple[int, float]:
        """Return how many sessions on an install's database have ended, and the ms they took."""
        ended = text("SELECT sessions, session_time FROM pg_stat_database WHERE datname = :name")
        name = {"name": urlsplit(install.url).path.removeprefix("/")}
        with database.engine(with_driver(self._embedded.postgres)).begin() as connection:
            count, ms = connection.execute(ended, name).one()
        return int(count), float(ms)

    def start(self, command: str, env: Mapping[str, str]) -> int:
        """Start a command as a Procfile runner does; return its process id."""
        return self._embedded.start(["sh", "-c", command], env=env, log=DATA / "processes.log")

    def wait(self, pid: int, seconds: float) -> None:
        """Wait until a process ends by itself.

        Raises:
            RigError: it does not.
        """
        deadline = time.monotonic() + seconds
        while psutil.pid_exists(pid):
            if time.monotonic() > deadline:
                raise RigError("A process of the bench did not end; see .data/bench/processes.log.")
            time.sleep(0.1)

    def stop(self, *pids: int) -> None:
        """Ask processes to stop, and wait until they are gone."""
        processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(processes, timeout=20)


@contextmanager
def rig() -> Iterator[Rig]:
    """Run the servers and the receiver until the block ends."""
    DATA.parent.mkdir(exist_ok=True)
    with servers.running(DATA, say=lambda _: None) as embedded:
        yield Rig(embedded)


def _wait_for_port(port: int, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def pss_mb(pid: int) -> float:
    """Return the proportional set size of one process, in MB of 10^6 bytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0]) * 1024 / 1e6
