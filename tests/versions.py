"""Runs the tests that depend on a server's version, on Debian's Postgres and Redis or on others.

``python -m tests.versions [DIRECTORY_OF_POSTGRES REDIS_SERVER [PYTEST_ARGUMENT ...]]``

If TEST_DATABASE_URL and TEST_REDIS_URL are set, it uses these servers and starts none; then all
arguments are pytest's. The tests of the collector's proxy use Debian's nginx.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from redis import Redis

from tests.support.ports import free_port
from tests.support.processes import ROOT

SUBSET = (
    "tests/integration/test_migrations.py",
    "tests/integration/test_grants.py",
    "tests/integration/test_facts.py",
    "tests/integration/test_writing.py",
    "tests/integration/test_sending.py",
    "tests/integration/test_wakeups.py",
    "tests/acceptance/test_procfile.py::TestUnderHoncho",
    "tests/acceptance/test_readme.py",
    "tests/integration/test_collector_proxy.py",
)
"""Each kind of statement and command that a server gets, and little else."""

DEBIANS = Path("/usr/lib/postgresql")
START_SECONDS = 30
ALONE = {"LC_ALL": "C", "PATH": "/usr/bin:/bin"}


def debians() -> tuple[Path, Path]:
    """Return where Debian has the programs of Postgres, and its Redis."""
    found = sorted(DEBIANS.glob("*/bin/postgres"))
    redis = shutil.which("redis-server")
    if not found or not redis or not shutil.which("nginx", path="/usr/sbin:/usr/bin"):
        sys.exit("Debian's servers are required. Run: apt install postgresql redis-server nginx")
    return found[-1].parent, Path(redis)


def owner() -> str | None:
    """Return the user that Postgres runs as, or None for this one: it refuses to run as root."""
    return "postgres" if os.geteuid() == 0 else None


@contextmanager
def running(command: Sequence[str | Path], log: Path, user: str | None) -> Iterator[None]:
    """Run a server until the block ends."""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env=ALONE, user=user, cwd=log.parent
        ) as server,
    ):
        try:
            yield
        finally:
            server.terminate()


def wait_for(words: str, log: Path) -> None:
    """Wait until a server's log has these words."""
    deadline = time.monotonic() + START_SECONDS
    while words not in log.read_text(errors="replace"):
        if time.monotonic() > deadline:
            sys.exit(f"A server did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.05)


@contextmanager
def postgres(programs: Path, directory: Path) -> Iterator[str]:
    """Run a fresh Postgres; yield the URL of its maintenance database."""
    data, log, user = directory / "postgres", directory / "postgres.log", owner()
    data.mkdir()
    if user:
        shutil.chown(data, user)
    options = ["-U", "postgres", "-A", "trust", "-E", "UTF8"]
    initdb: list[str | Path] = [programs / "initdb", "-D", data, *options]
    subprocess.run(initdb, check=True, capture_output=True, env=ALONE, user=user, cwd=data)
    settings = {"listen_addresses": "", "unix_socket_directories": data, "fsync": "off"}
    said = [f"--{name}={value}" for name, value in settings.items()]
    with running([programs / "postgres", "-D", data, *said], log, user):
        wait_for("ready to accept connections", log)
        yield f"postgresql://postgres@/postgres?host={quote(str(data), safe='')}"


@contextmanager
def redis(program: Path, directory: Path) -> Iterator[str]:
    """Run a fresh Redis; yield its URL."""
    log = directory / "redis.log"
    port = free_port()
    settings = {"port": port, "bind": "127.0.0.1", "save": "", "dir": directory}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with running([program, *options], log, None):
        wait_for("eady to accept connections", log)
        yield f"redis://127.0.0.1:{port}"


def tests(servers: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Print the versions and run the tests on these servers; return pytest's exit code."""
    with psycopg.connect(servers["TEST_DATABASE_URL"]) as database:
        postgres_version = database.info.parameter_status("server_version")
    with Redis.from_url(servers["TEST_REDIS_URL"]) as client:
        redis_version = client.info("server")["redis_version"]
    sys.stdout.write(
        f"Python {platform.python_version()}, Postgres {postgres_version}, Redis {redis_version}\n"
    )
    sys.stdout.flush()
    return subprocess.run(
        # One after the other: they share these servers, and some change the users of Redis.
        [sys.executable, "-m", "pytest", "--numprocesses=0", *(arguments or SUBSET)],
        cwd=ROOT,
        env={**os.environ, **servers},
        check=False,
    ).returncode


def main() -> int:
    """Start both servers unless they are named, and run the tests; return pytest's exit code."""
    names = ("TEST_DATABASE_URL", "TEST_REDIS_URL")
    if all(os.environ.get(name) for name in names):
        return tests({name: os.environ[name] for name in names}, sys.argv[1:])
    (*named,) = map(Path, sys.argv[1:3])
    programs, redis_server = named or debians()
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with postgres(programs, directory) as database, redis(redis_server, directory) as broker:
            servers = {"TEST_DATABASE_URL": database, "TEST_REDIS_URL": broker}
            return tests(servers, sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
