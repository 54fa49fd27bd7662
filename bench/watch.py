"""A worker of the real actors that notes when each stage of a heartbeat begins and ends.

``python -m bench.watch FILE HEARTBEATS`` sends heartbeats of made-up days, runs the bare operations
between them, and writes the milliseconds of both into the file.
"""

import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import psycopg
from sqlalchemy import Connection, Engine, text

from app import database
from bench.rig import make_it_the_past

WARM_UP = 5
STAGES = ("wake-up", "write", "wake-up again", "claim", "begin", "POST", "settle")
TRANSACTIONS = ("write", "claim", "begin", "settle")


class Watch:
    """Notes when a worker of this process begins and ends the stages of a heartbeat."""

    def __init__(self) -> None:
        """Watch the pipeline's connections, transactions and drains, and the POST."""
        from app import sender  # noqa: PLC0415 - as a worker does, with its first actor
        from app.pipeline import Pipeline  # noqa: PLC0415 - the same

        self.links: list[float] = []
        self.transactions: list[tuple[float, float]] = []
        self.drains: list[float] = []
        self.posts: list[tuple[float, float]] = []
        self._idle: SimpleQueue[None] = SimpleQueue()
        connect, transaction = database.Link.__init__, database.Link.transaction
        drain, post = Pipeline.drain, sender.post

        def watched_connect(link: database.Link, engine: Engine) -> None:
            self.links.append(time.perf_counter())
            connect(link, engine)

        @contextmanager
        def watched_transaction(link: database.Link, **options: Any) -> Iterator[Connection]:
            started = time.perf_counter()
            with transaction(link, **options) as connection:
                yield connection
            self.transactions.append((started, time.perf_counter()))

        def watched_drain(pipeline: Pipeline) -> None:
            self.drains.append(time.perf_counter())
            drain(pipeline)
            self._idle.put(None)

        def watched_post(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            outcome = post(*args, **options)
            self.posts.append((started, time.perf_counter()))
            return outcome

        for owner, name, watched in (
            (database.Link, "__init__", watched_connect),
            (database.Link, "transaction", watched_transaction),
            (Pipeline, "drain", watched_drain),
        ):
            setattr(owner, name, watched)
        sender.post = watched_post

    def heartbeat(self, tick: Callable[[], object]) -> dict[str, float]:
        """Return the milliseconds of each stage of one heartbeat, and of the whole."""
        for noted in (self.links, self.transactions, self.drains, self.posts):
            noted.clear()
        started = time.perf_counter()
        tick()
        self._idle.get(timeout=10)
        took = dict(zip(TRANSACTIONS, self.transactions, strict=False))
        # Both connect first.
        took["write"] = (self.links[0], took["write"][1])
        took["claim"] = (self.drains[0], took["claim"][1])
        took["wake-up"] = (started, took["write"][0])
        took["wake-up again"] = (took["write"][1], self.drains[0])
        took["POST"] = self.posts[0]
        took["whole"] = (started, took["settle"][1])
        return {name: 1000 * (end - begin) for name, (begin, end) in took.items()}


def run(found: Path, heartbeats: int) -> None:
    """Run a worker, and watch it."""
    import dramatiq  # noqa: PLC0415 - once the broker is built, as a worker does

    from workers.broker import QUEUE, build, settings  # noqa: PLC0415 - the same

    broker = build()
    from workers import actors  # noqa: PLC0415 - it needs the broker

    woken: SimpleQueue[float] = SimpleQueue()

    @dramatiq.actor(queue_name=QUEUE)
    def nothing() -> None:
        woken.put(time.perf_counter())

    watch = Watch()
    worker = dramatiq.Worker(broker, worker_threads=2)
    worker.start()
    outside = database.engine(settings().require("database_url"))
    with outside.begin() as connection:
        connection.execute(text("CREATE TABLE bare (LIKE telemetry_outbox INCLUDING ALL)"))
    url = settings().require("database_url").replace("+psycopg", "")
    whole: list[float] = []
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    operations: dict[str, list[float]] = {"wake-up": [], "insert": [], "POST": []}
    for number in range(heartbeats + WARM_UP):
        with outside.begin() as connection:
            make_it_the_past(connection, number)
        took = watch.heartbeat(actors.heartbeat.send)
        bare = {
            "wake-up": _wake_up(nothing.send, woken),
            "insert": _took(lambda: _insert(url)),
            "POST": _took(lambda: _post(settings().telemetry_endpoint)),
        }
        if number >= WARM_UP:
            whole.append(took["whole"])
            for name in STAGES:
                stages[name].append(took[name])
            for name, ms in bare.items():
                operations[name].append(ms)
    found.write_text(json.dumps({"stages": stages, "bare": operations, "whole": {"ms": whole}}))


BODY = b"x" * 900
"""About as long as a heartbeat."""


def _took(what: Callable[[], object]) -> float:
    """Return the milliseconds that some work takes."""
    started = time.perf_counter()
    what()
    return 1000 * (time.perf_counter() - started)


def _insert(url: str) -> None:
    """Connect, insert one row, commit and close, with psycopg only."""
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO bare (id, day, instance_id, payload, created_at, next_attempt_at,"
            " expires_at) SELECT gen_random_uuid(), DATE '2000-01-01' + (random() * 1e6)::int,"
            " gen_random_uuid(), to_json(%s::text), now(), now(), now()",
            [BODY.decode()],
        )


def _post(endpoint: str) -> None:
    """POST once over a connection of its own, with the standard library only."""
    url = urlsplit(endpoint)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=10)
    connection.request("POST", url.path, BODY)
    connection.getresponse().read()
    connection.close()


def _wake_up(send: Callable[[], object], woken: SimpleQueue[float]) -> float:
    """Return the milliseconds from the sending of a message to the beginning of an empty actor."""
    started = time.perf_counter()
    send()
    return 1000 * (woken.get(timeout=10) - started)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
