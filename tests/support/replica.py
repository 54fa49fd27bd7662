"""A hot standby of the embedded Postgres: a real one, by streaming replication over its socket."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from demo import servers
from tests.support.freezing import frozen

PORT = 5433
SECONDS = 30.0


@dataclass
class Replica:
    """A standby that a test may pause, freeze, kill and start again."""

    directory: Path
    programs: Path
    user: int
    process: subprocess.Popen[bytes]

    def url(self, of: str) -> str:
        """Return the standby's URL of the database whose URL on the primary is ``of``."""
        there = make_url(of).set(query={"host": str(self.directory), "port": str(PORT)})
        return there.render_as_string(hide_password=False)

    def run(self, statement: str, database: str = "postgres") -> object:
        """Run a statement, and return the only value that it has."""
        url = f"postgresql+psycopg://postgres@/{database}"
        url += f"?host={quote(str(self.directory))}&port={PORT}"
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            return connection.scalar(text(statement))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause its replay until the block ends."""
        self.run("SELECT pg_wal_replay_pause()")
        _wait_for(lambda: self.run("SELECT pg_get_wal_replay_pause_state()") == "paused")
        try:
            yield
        finally:
            self.run("SELECT pg_wal_replay_resume()")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it and its children, with open sockets, until the block ends."""
        with frozen(self.process.pid):
            yield

    @contextmanager
    def down(self) -> Iterator[None]:
        """Kill it with ``kill -9``, and start it again when the block ends."""
        parent = psutil.Process(self.process.pid)
        family = [parent, *parent.children(recursive=True)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()
        psutil.wait_procs(family, SECONDS)
        try:
            yield
        finally:
            self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = _started(self.directory, self.programs, self.user)
        _wait_for(self._answers)

    def stop(self) -> None:
        """Stop it for good."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(SECONDS)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
        with suppress(OperationalError):
            return self.run("SELECT pg_is_in_recovery()") is True
        return False


@contextmanager
def running(primary: servers.Servers, directory: Path) -> Iterator[Replica]:
    """Make a standby of ``primary`` in ``directory``, which is wiped, until the block ends."""
    user, programs = psutil.Process(pid_of(primary)).uids().real, primary.psql.parent
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    os.chown(directory, user, -1)
    socket = make_url(primary.postgres).query["host"]
    subprocess.run(
        [
            programs / "pg_basebackup",
            *("--pgdata", directory, "--host", str(socket), "--username", "postgres"),
            *("--wal-method", "stream", "--checkpoint", "fast", "--write-recovery-conf"),
        ],
        user=user,
        cwd=directory,
        env=_environment(),
        check=True,
        timeout=60,
    )
    replica = Replica(directory, programs, user, _started(directory, programs, user))
    try:
        _wait_for(replica._answers)  # noqa: SLF001 - same module
        yield replica
    finally:
        replica.stop()
        shutil.rmtree(directory)


def pid_of(primary: servers.Servers) -> int:
    """Return the process of the embedded Postgres, which another test may have started again."""
    url = make_url(primary.postgres).set(drivername="postgresql+psycopg")
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return int(connection.scalar(text("SELECT pg_read_file('postmaster.pid')")).split()[0])


def _started(directory: Path, programs: Path, user: int) -> subprocess.Popen[bytes]:
    (directory / "postmaster.pid").unlink(missing_ok=True)
    settings = {
        **servers.POSTGRES_SETTINGS,
        "port": str(PORT),
        "unix_socket_directories": str(directory),
        "wal_retrieve_retry_interval": "200ms",
        "max_standby_streaming_delay": "0",
    }
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            [programs / "postgres", "-D", directory, *(f"--{k}={v}" for k, v in settings.items())],
            user=user,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C"}


def _wait_for(what: object) -> None:
    assert callable(what)
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
