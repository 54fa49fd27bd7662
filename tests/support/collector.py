"""The collector's own processes, as its Procfile runs them, and what a caller says to one."""

import json
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import make_url

from tests.support import published, warm
from tests.support.ports import free_port
from tests.support.processes import ROOT

NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no certificate: to load those of the machine takes 20 ms for each client."""
NOWHERE = "postgresql://someone:opensesame@127.0.0.1:1/nowhere"

EXAMPLE: dict[str, Any] = json.loads(published.EXAMPLE)
INSTANCE: str = EXAMPLE["instance_id"]
BODY = json.dumps(EXAMPLE)
SECTIONS = (
    *("active", "growth", "retention", "versions", "adoption", "where", "runtimes", "sizes"),
    "features",
)
"""The questions of the page, in their order."""

JSON = {"content-type": "application/json"}


def changed(**fields: object) -> str:
    """Return the body with other values."""
    return json.dumps({**EXAMPLE, **fields})


def of(number: int) -> str:
    """Return the body of another install, one for each number."""
    return changed(instance_id=f"{number:08x}-7e62-4a4e-9b6f-1a4e2d2dfd99")


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement in a session of its own, commit it, and return its rows."""
    parsed = make_url(url)
    named = parsed.translate_connect_args(username="user", database="dbname")
    parameters = {name: str(value) for name, value in {**named, **parsed.query}.items()}
    with psycopg.connect(make_conninfo(**parameters)) as connection:
        result = connection.execute(statement.encode())
        return result.fetchall() if result.description else []


def command(process: str) -> list[str]:
    """Return the command line of a process type in Procfile.collector."""
    lines = (ROOT / "Procfile.collector").read_text().splitlines()
    commands = dict(line.split(": ", 1) for line in lines)
    words = shlex.split(commands[process])
    assert words[:2] == ["exec", "python"]
    return [sys.executable, *words[2:]]


def run(process: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a process type of the collector to its end."""
    return warm.run(command(process), environment, timeout=30)


@dataclass(frozen=True)
class Collector:
    """A collector that listens on loopback, its database and what it has logged."""

    url: str
    port: int
    process: warm.Program
    output: Path
    client: httpx.Client

    def post(self, body: str | bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post("/v1/heartbeat", content=body, headers={**JSON, **named})

    def held(self, instance_id: str, **parameters: str) -> httpx.Response:
        return self.client.get(f"/v1/installs/{instance_id}", params=parameters)

    def forget(self, instance_id: str) -> httpx.Response:
        return self.client.delete(f"/v1/installs/{instance_id}")

    def let_the_forgotten_come_again(self) -> None:
        """End the time in which nothing is stored under a deleted id."""
        query(self.url, "UPDATE forgotten SET at = at - interval '5 minutes'")

    def rows(self) -> list[tuple[Any, ...]]:
        return query(self.url, "SELECT instance_id, sent_at, received_at, body FROM heartbeat")

    def log(self) -> list[str]:
        return self.output.read_text().splitlines()

    def failures(self, of: str = "stage=commit") -> list[str]:
        """Return the failures logged so far, by default those to commit."""
        return [line for line in self.log() if line.startswith(f"collector.failed {of}")]


@contextmanager
def serving(
    url: str, output: Path, argv: Sequence[str] = (), *, ending: int = 0, **variables: str
) -> Iterator[Collector]:
    """Run a collector until SIGTERM, which it must answer with the exit code ``ending``.

    It runs the Procfile's line or ``argv``, without limits for one client unless they are given.
    """
    port = free_port()
    environment = {
        "COLLECTOR_DATABASE_URL": url,
        "PORT": str(port),
        "COLLECTOR_CLIENT_RATE": "0",
        "COLLECTOR_CLIENT_INSTALLS": "0",
        **variables,
    }
    with output.open("wb") as out:
        argv = [*(argv or command("web")), "--host", "127.0.0.1"]
        process = warm.start(argv, environment, (None, out, out))
    try:
        wait_until_ready(process, output)
        base = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=base, trust_env=False, timeout=20, verify=NOBODY) as client:
            yield Collector(url, port, process, output, client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == ending, output.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: warm.Program, output: Path) -> None:
    deadline = time.monotonic() + 20
    while "collector.ready" not in output.read_text():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


def head(*lines: str) -> bytes:
    """Return the head of a POST with more lines."""
    first = ("POST /v1/heartbeat HTTP/1.1", "Host: collector", "Content-Type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode()


def answer(connection: socket.socket) -> bytes:
    """Return all that the server says until it closes, which it must do within ten seconds."""
    connection.settimeout(10)
    received = bytearray()
    with suppress(ConnectionResetError):
        while data := connection.recv(65_536):
            received += data
    return bytes(received)
