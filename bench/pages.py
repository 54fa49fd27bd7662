"""How many pages a second one collector serves, and how many readers affect heartbeats.

``python -m bench.pages`` fills a database with ninety days of a fleet, asks one process for its
page over connections that are kept, then sends it heartbeats at a steady rate with and without such
a flood, prints what was measured and writes bench/results/pages.json.
``python -m bench.pages PORT`` is the sender of those heartbeats, a process of its own.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import cycle
from typing import Any

from rich.console import Console
from sqlalchemy import Engine, NullPool, create_engine, text

from bench.collector import _count, _has_counted, _hear_of, begin
from bench.ingest import _free_port, _listens, _make_durable, _requests, _wait_for, running
from bench.rig import ROOT, RigError, rounded, with_driver
from demo import servers
from demo.fleet import Fleet

DATA = ROOT / ".data" / "bench-pages"
RESULT = ROOT / "bench" / "results" / "pages.json"

INSTALLS = 2_000
DAYS = 90
CONNECTIONS = 16
SECONDS = 4.0
WARM_UP_SECONDS = 1.0
ROUNDS = 3
HEARTBEATS = 200
"""Heartbeats a second, with and without requests for pages."""
SENDERS = 32

FORMER = 33
"""Pages a second before answers were stored."""
GOAL = 20 * FORMER
PATIENCE = 60.0

FILTERED = ["/?days=30", "/?days=365", "/?edition=ce", "/?edition=ee", "/?version=0.4.1"]
UNKNOWN = [f"/?version=9.{number}.0" for number in range(5_000)]
"""Filters that no install passes: each answer is read and rendered again."""

console = Console(highlight=False, soft_wrap=True)


class Reader(asyncio.Protocol):
    """One connection that requests the next page after each answer."""

    def __init__(self, ask: Callable[[], bytes], status: int, every: float = 0.0) -> None:
        """Send what ``ask`` returns; leave ``every`` seconds at least between two of them."""
        self._ask = ask
        self._status = b"HTTP/1.1 %d " % status
        self._every = every
        self._received = bytearray()
        self._due = 0.0
        self.answered: list[float] = []
        self.failed = 0
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._ask())

    def data_received(self, data: bytes) -> None:
        """Note a complete answer, and request the next."""
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        _, named, rest = head.partition(b"content-length: ")
        body = int(rest.partition(b"\r\n")[0]) if named and b" 304 " not in head[:15] else 0
        if len(self._received) < end + 4 + body:
            return
        self.failed += not self._received.startswith(self._status)
        self.answered.append(time.perf_counter() - self._sent)
        self._received.clear()
        self._due = max(self._due + self._every, self._loop.time())
        if self._every:
            self._loop.call_at(self._due, self._send)
        else:
            self._send()

    def connection_lost(self, _error: Exception | None) -> None:
        """Note that nothing more will come."""
        self.failed += not self.ended

    def stop(self) -> int:
        """Close; return how many answers were not as expected."""
        self.ended = True
        self._transport.abort()
        return self.failed


def _request(path: str, *lines: str) -> bytes:
    head = (f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "User-Agent: bench", "Accept: */*", *lines)
    return "\r\n".join((*head, "", "")).encode()


async def _flood(
    port: int,
    requests: Sequence[bytes],
    status: int = 200,
    *,
    a_second: float = 0.0,
    seconds: float = SECONDS,
) -> dict[str, float]:
    """Request pages for a while, without a pause or at a rate; return how many were answered."""
    loop, turn = asyncio.get_running_loop(), cycle(requests)
    every = CONNECTIONS / a_second if a_second else 0.0
    readers = [
        (
            await loop.create_connection(
                lambda: Reader(lambda: next(turn), status, every), "127.0.0.1", port
            )
        )[1]
        for _ in range(CONNECTIONS)
    ]
    await asyncio.sleep(WARM_UP_SECONDS)
    for reader in readers:
        reader.answered.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - began
    if any(reader.stop() for reader in readers):
        raise RigError(f"Not every page was answered with {status}.")
    answered = [each for reader in readers for each in reader.answered]
    return {"per_second": len(answered) / took, **_quantiles(answered)}


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{each}_ms": 1000 * cuts[each - 1] for each in (50, 95, 99)}


class Sender(asyncio.Protocol):
    """One connection for heartbeats: after each answer it sends the next that is due."""

    def __init__(self, due: "asyncio.Queue[float]", took: list[float]) -> None:
        """Send for each moment in ``due``; note in ``took`` how long after it the answer came."""
        self._due = due
        self._took = took
        self._answered = asyncio.Event()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the connection."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for mypy
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Note an answer; it has no body."""
        self._received += data
        if self._received.endswith(b"\r\n\r\n"):
            self._answered.set()

    async def run(self, requests: Callable[[], bytes]) -> None:
        """Send until cancelled."""
        while True:
            moment = await self._due.get()
            self._answered.clear()
            self._received = b""
            self._transport.write(requests())
            await self._answered.wait()
            if not self._received.startswith(b"HTTP/1.1 202 "):
                raise RigError("A heartbeat was not answered with 202.")
            self._took.append(time.perf_counter() - moment)


async def _steadily(port: int) -> dict[str, float]:
    """Send heartbeats at a steady rate; an answer's time is from the moment at which it was due."""
    loop, requests = asyncio.get_running_loop(), _requests()
    due: asyncio.Queue[float] = asyncio.Queue()
    took: list[float] = []
    senders = [
        (await loop.create_connection(lambda: Sender(due, took), "127.0.0.1", port))[1]
        for _ in range(SENDERS)
    ]
    tasks = [asyncio.create_task(each.run(lambda: next(requests))) for each in senders]
    began = time.perf_counter()
    for number in range(int((WARM_UP_SECONDS + SECONDS) * HEARTBEATS)):
        moment = began + number / HEARTBEATS
        await asyncio.sleep(max(moment - time.perf_counter(), 0.0))
        if any(task.done() for task in tasks):
            raise RigError("A heartbeat was not answered with 202.")
        due.put_nowait(moment)
    await asyncio.sleep(1.0)
    for task in tasks:
        task.cancel()
    measured = took[int(WARM_UP_SECONDS * HEARTBEATS) :]
    return {"per_second": len(measured) / SECONDS, **_quantiles(measured)}


async def _heartbeats_while(
    port: int, flood: Callable[[], Any] | None
) -> dict[str, dict[str, float]]:
    sender = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.pages", str(port)), stdout=subprocess.PIPE, cwd=ROOT
    )
    flooding = asyncio.ensure_future(flood()) if flood else None
    out, _ = await sender.communicate()
    if sender.returncode:
        raise RigError("The sender of heartbeats failed.")
    found = {"heartbeats": json.loads(out)}
    if flooding:
        found["pages"] = await flooding
    return found


def _fill(engine: Engine, until: date) -> None:
    """Store the heartbeats of a fleet over ninety days, and count each day."""
    begin(engine, until, DAYS)
    for day, arrivals in Fleet(20260502, installs=INSTALLS, days=DAYS, until=until):
        with engine.begin() as connection:
            _hear_of(connection, arrivals)
        _count(engine, day)


def _etag_of(port: int) -> tuple[str, int]:
    """Return the ETag of the page and its bytes."""
    from urllib.request import urlopen  # noqa: PLC0415 - for this alone

    with urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as answer:
        return answer.headers["ETag"], len(answer.read())


def measure() -> dict[str, Any]:
    """Return pages a second, and how long heartbeats take at the same time."""
    with servers.running(DATA, say=lambda _: None) as embedded:
        _make_durable(embedded)
        engine = create_engine(with_driver(embedded.postgres), poolclass=NullPool)
        _fill(engine, datetime.now(UTC).date() - timedelta(days=1))
        port = _free_port()
        env = {
            "COLLECTOR_DATABASE_URL": embedded.postgres,
            "COLLECTOR_CLIENT_RATE": "0",
            "COLLECTOR_CLIENT_INSTALLS": "0",
            "PORT": str(port),
            "PATH": os.environ["PATH"],
        }
        argv = [sys.executable, "-m", "app.collector", "serve", "--host", "127.0.0.1"]
        with running(argv, home=ROOT, env=env, log=DATA / "pages.log"):
            _wait_for(lambda: _listens(port))
            deadline = time.monotonic() + PATIENCE
            while not _has_counted(engine):
                if time.monotonic() > deadline:
                    raise RigError("The collector did not count.")
                time.sleep(0.1)
            _, size = _etag_of(port)
            rounds = [_round(port) for _ in range(ROUNDS)]
        with engine.connect() as connection:
            version = str(connection.scalar(text("SHOW server_version")))
    medians = {
        name: {
            key: {
                figure: statistics.median(each[name][key][figure] for each in rounds)
                for figure in figures
            }
            for key, figures in found.items()
        }
        for name, found in rounds[0].items()
    }
    return {
        "connections": CONNECTIONS,
        "seconds": SECONDS,
        "rounds": ROUNDS,
        "cpus": os.cpu_count(),
        "postgres": version,
        "page_bytes": size,
        "goal": GOAL,
        **medians,
    }


def _round(port: int) -> dict[str, dict[str, dict[str, float]]]:
    plain, unknown = [_request("/")], [_request(path) for path in UNKNOWN]

    def ask(requests: Sequence[bytes], **how: Any) -> dict[str, float]:
        return asyncio.run(_flood(port, requests, **how))

    def ask_for_changes() -> dict[str, float]:
        known = [_request("/", f"If-None-Match: {_etag_of(port)[0]}")]
        return ask(known, seconds=2.0, status=304)

    async def flood(requests: Sequence[bytes], **how: Any) -> dict[str, float]:
        return await _flood(port, requests, **how)

    pages = {
        "the page": ask(plain),
        "the page, If-None-Match": _once_more(ask_for_changes),
        "five filters in turn": ask([_request(path) for path in FILTERED]),
        "filters that no install passes": ask(unknown),
    }
    under = {
        "no page": asyncio.run(_heartbeats_while(port, None)),
        f"{GOAL} pages a second": asyncio.run(
            _heartbeats_while(port, lambda: flood(plain, a_second=GOAL))
        ),
        f"{CONNECTIONS} readers without a pause": asyncio.run(
            _heartbeats_while(port, lambda: flood(plain))
        ),
        f"{CONNECTIONS} readers of such filters": asyncio.run(
            _heartbeats_while(port, lambda: flood(unknown))
        ),
    }
    heartbeats = {name: found["heartbeats"] for name, found in under.items()}
    return {"pages": pages, "heartbeats_with": heartbeats}


def _once_more(measured: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure again if the page changed meanwhile, which it does once a minute."""
    try:
        return measured()
    except RigError:
        return measured()


def table(result: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [
        ["one process, 16 connections", "a second", "p50", "p95"],
        ["---", "---:", "---:", "---:"],
    ]
    for name, found in result["pages"].items():
        lines.append([name, f"{found['per_second']:,.0f}", *_ms(found)])
    for name, found in result["heartbeats_with"].items():
        lines.append([f"heartbeats with {name}", f"{found['per_second']:,.0f}", *_ms(found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(found: dict[str, float]) -> list[str]:
    return [f"{found['p50_ms']:,.1f} ms", f"{found['p95_ms']:,.1f} ms"]


def verdict(result: dict[str, Any]) -> str:
    """Return whether both goals are met."""
    pages = result["pages"]["the page"]["per_second"]
    before, *after = (each["p95_ms"] for each in result["heartbeats_with"].values())
    moved = ", ".join(f"{each:,.1f}" for each in after)
    met = "is met" if pages >= GOAL else "is not met"
    return (
        f"{pages:,.0f} pages a second: the goal of {GOAL} {met}."
        f" The p95 of heartbeats was {before:,.1f} ms without pages, and {moved} ms with them:"
        " the goal was that it does not move."
    )


def main() -> None:
    """Measure, or run the sender of heartbeats."""
    if len(sys.argv) > 1:
        print(json.dumps(asyncio.run(_steadily(int(sys.argv[1])))))  # noqa: T201 - for its parent
        return
    result = rounded(measure(), 2)
    RESULT.write_text(f"{json.dumps(result, indent=1)}\n")
    console.print(table(result))
    console.print(verdict(result))


if __name__ == "__main__":
    main()
