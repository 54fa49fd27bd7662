"""``make demo``: real processes send one heartbeat and count it; all of them stop at the end."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from sqlalchemy import Connection, text

from app import database, instance, outbox, payload
from app.collector import daily, recount, store
from app.schedule import Day, running_day
from demo import consentos, servers
from demo.fleet import Fleet, by_minute, releases

DATA = Path(".data")
ROLE = "telemetry"
PATIENCE = 60.0
"""Seconds to wait for a process of the Procfile."""

INSTALLS, DAYS = 300, 31
"""The size of the collector's simulated history, which ends with yesterday."""

ESTABLISHED_DAYS = 1
"""With one day, the demo's own install counts at once."""

_RELEASED = text("INSERT INTO release (version, released_on) VALUES (:version, :day)")

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo failed to show what it should."""


class Demo:
    """A ConsentOS with its telemetry and a collector, in one directory."""

    def __init__(self, embedded: servers.Servers, directory: Path) -> None:
        """Choose databases, the port and the complete environment of the processes."""
        self._embedded = embedded
        self.log = directory / "processes.log"
        self.port = _free_port()
        self.page = f"http://127.0.0.1:{self.port}/"
        self._history: set[tuple[str, str]] = set()
        self._newest: tuple[str, date]
        self.consentos = self._database("consentos")
        self.collector = self._database("collector")
        self.administrator = {"MIGRATION_DATABASE_URL": self.consentos}
        # Complete, so that the caller's environment has no effect.
        self.env = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": os.environ.get("HOME", str(directory)),
            "DATABASE_URL": self.consentos.replace("postgres@", f"{ROLE}@"),
            "REDIS_URL": embedded.redis,
            "COLLECTOR_DATABASE_URL": self.collector,
            "ENVIRONMENT": "demo",
            "APP_VERSION": "v0.2.0",
            "CONSENTOS_DEPLOYMENT": "demo",
            "TELEMETRY_ENDPOINT": f"{self.page}v1/heartbeat",
            "TELEMETRY_SPREAD_SECONDS": "0",
            "COLLECTOR_ESTABLISHED_DAYS": str(ESTABLISHED_DAYS),
        }

    def _database(self, name: str) -> str:
        maintenance = database.engine(_driver(self._embedded.postgres))
        with maintenance.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text(f"CREATE DATABASE {name}"))
        return self._embedded.postgres.replace("/postgres?", f"/{name}?")

    def run(self, *command: str, **more: str) -> str:
        """Run a command to its end, with ``more`` variables, and return its output."""
        done = subprocess.run(  # noqa: S603 - the project's own commands
            command, env={**self.env, **more}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DemoError(f"`{shlex.join(command)}` failed: {done.stderr or done.stdout}")
        return done.stdout

    def command(self, *words: str, **more: str) -> str:
        """Run one of the operator's commands and return its output."""
        return self.run(sys.executable, "-m", "app", *words, **more)

    def shown(self, *words: str) -> str:
        """Run one of the operator's commands and return its stdout and stderr together."""
        return self.run(*("sh", "-c", 'exec "$@" 2>&1', "sh"), sys.executable, "-m", "app", *words)

    def release(self) -> None:
        """Run the release line of both Procfiles to its end."""
        for procfile in ("Procfile", "Procfile.collector"):
            self.run(*_honcho(procfile), "start", "release", **self.administrator)

    def grant(self) -> None:
        """Create the database role of the pipeline, which has only the rights it needs."""
        self.command("grants", "--role", ROLE, "--apply", **self.administrator)

    def start(self) -> None:
        """Start both Procfiles' processes; they end with the servers."""
        for procfile, port, processes in (
            ("Procfile.collector", self.port, ["web"]),
            ("Procfile", 0, ["worker", "scheduler"]),
        ):
            argv = [*_honcho(procfile), "start", "-p", str(port), *processes]
            self._embedded.start(argv, env=self.env, log=self.log)

    def fill(self) -> consentos.Truth:
        """Fill a small ConsentOS database."""
        with database.engine(_driver(self.consentos)).begin() as connection:
            consentos.create_tables(connection)
            return consentos.populate(connection)

    def age(self) -> None:
        """Make the tables look two days old: the notice given, yesterday's heartbeat sent."""
        heartbeat = payload.parse(self.command("preview"))
        engine = database.engine(_driver(self.consentos))
        with database.transaction(engine.connect()) as connection:
            day = Day(running_day(database.clock(connection)).date - timedelta(days=1))
            _record_sent(connection, day, heartbeat, self.env["TELEMETRY_ENDPOINT"])

    def delivered(self) -> dict[str, Any]:
        """Wait until a heartbeat has been written and sent after the scheduler's sweep."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            newest, *earlier = json.loads(self.command("audit", "--json"))
            if earlier and newest["state"] == "sent":
                return dict(newest)
        raise DemoError(f"no heartbeat was sent within {PATIENCE:.0f} s; see {self.log}")

    def logged(self) -> str:
        """Return the log line with the payload, as `grep` finds it."""
        for line in self.log.read_text().splitlines():
            if "telemetry.payload " in line:
                return line
        raise DemoError(f"the payload is not in the log {self.log}")

    def simulate(self) -> None:
        """Make the collector look a month old: store what a simulated fleet sent."""
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        first = yesterday - timedelta(days=DAYS - 1)
        engine = database.engine(_driver(self.collector))
        with engine.begin() as connection:
            *listed, self._newest = (
                (release.version, first + timedelta(days=release.day)) for release in releases(DAYS)
            )
            for version, day in listed:
                connection.execute(_RELEASED, {"version": version, "day": day})
            for _, arrivals in Fleet(20260502, installs=INSTALLS, days=DAYS, until=yesterday):
                for batch in by_minute(arrivals):
                    store.insert(
                        connection,
                        batch.heartbeats,
                        at=batch.at,
                        established_days=ESTABLISHED_DAYS,
                    )
                    self._history |= {(each.instance_id, each.sent_at) for each in batch.heartbeats}

    def name_newest(self) -> None:
        """Add the newest version to the list of releases, as the maintainers do."""
        version, released_on = self._newest
        unlisted = self.maintain("unlisted")
        if f"releases add {version} " not in unlisted:
            raise DemoError(f"`unlisted` does not show {version}: {unlisted}")
        self.maintain("releases", "add", version, "--on", f"{released_on}", "--later")

    def count(self) -> None:
        """Count the days of the history."""
        recount.catch_up(database.engine(_driver(self.collector)))

    @property
    def newest(self) -> str:
        """The newest version."""
        return self._newest[0]

    def maintain(self, *words: str) -> str:
        """Run one of the maintainers' commands and return its output."""
        return self.run(sys.executable, "-m", "app.collector", *words)

    def collected(self) -> list[Any]:
        """Return the bodies that the collector stores, without its simulated history."""
        with database.engine(_driver(self.collector)).begin() as connection:
            bodies = list(connection.scalars(text("SELECT body FROM heartbeat")))
        real = [b for b in bodies if (b["instance_id"], b["sent_at"]) not in self._history]
        if len(bodies) - len(real) != len(self._history):
            raise DemoError("the collector does not store its complete history")
        return real

    def counted(self) -> dict[str, Any]:
        """Return the numbers of the collector's page; the live number includes this heartbeat.

        The simulated heartbeats end with yesterday, which was counted before this one arrived.
        """
        with database.engine(_driver(self.collector)).begin() as connection:
            live = daily.live(connection)
        with urllib.request.urlopen(f"{self.page}v1/stats.json", timeout=PATIENCE) as answer:  # noqa: S310 - the demo's own http URL
            stats: dict[str, Any] = json.load(answer)
        if stats["live"]["active"] != live.active:
            raise DemoError("the collector's page does not show how many installs are active now")
        return stats


def _record_sent(
    connection: Connection, day: Day, heartbeat: payload.Heartbeat, endpoint: str
) -> None:
    noticed, sent = day.opens - timedelta(hours=12), day.opens + timedelta(seconds=1)
    connection.execute(
        text("INSERT INTO telemetry_notice VALUES (:schema, :at)"),
        {"schema": payload.SCHEMA_VERSION, "at": noticed},
    )
    instance_id = instance.ensure(connection)
    connection.execute(
        text("UPDATE instance SET created_at = :noticed, last_telemetry_at = :sent"),
        {"noticed": noticed, "sent": sent},
    )
    written = {"instance_id": str(instance_id), "sent_at": sent.isoformat(timespec="seconds")}
    row = outbox.write(
        connection,
        day=day,
        instance_id=instance_id,
        body=heartbeat.model_copy(update=written).canonical(),
        next_attempt_at=sent,
        host_revision=None,
    )
    connection.execute(
        text(
            "UPDATE telemetry_outbox SET state = 'sent', created_at = :at, finished_at = :at,"
            " drains = 1, attempts = 1 WHERE id = :id"
        ),
        {"at": sent, "id": row},
    )
    connection.execute(
        text(
            "INSERT INTO telemetry_attempt (outbox_id, n, started_at, finished_at, outcome,"
            " http_status, endpoint, duration_ms)"
            " VALUES (:id, 1, :at, :at, 'sent', 202, :endpoint, 40)"
        ),
        {"at": sent, "id": row, "endpoint": endpoint},
    )


def _honcho(procfile: str) -> list[str]:
    """Return the honcho command for a Procfile, with no .env file."""
    return [sys.executable, "-m", "honcho", "-e", os.devnull, "-f", procfile]


def _driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def step(doing: str) -> Iterator[None]:
    """Show a step while it runs, and how long it took."""
    started = time.monotonic()
    spinner = console.status(doing) if console.is_terminal else nullcontext()
    with spinner:
        yield
    console.print(f"[green]✓[/] {doing} [dim]({time.monotonic() - started:.1f} s)[/]")


def show(demo: Demo, row: Mapping[str, Any]) -> None:
    """Print the body, the log line and the row, and check that they agree."""
    line = demo.logged()
    console.print(Rule("the body, as it was sent", align="left"))
    console.print(escape(json.dumps(json.loads(row["payload"]), indent=2)))
    console.print(Rule("the log: grep telemetry.payload", align="left"))
    console.print(escape(line))
    verify = ("audit", "--verify", "--log", str(demo.log), "--since", row["day"])
    for words in (("audit", "last"), ("audit",), verify, ("status",)):
        console.print(Rule(f"consentos-telemetry {' '.join(words)}", align="left"))
        console.print(escape(demo.shown(*words)))
    if demo.collected() != [json.loads(row["payload"])]:
        raise DemoError("the collector does not store exactly the body that was sent")
    console.print("[green]✓[/] the row, the log and the collector have the same heartbeat, once")


def show_page(demo: Demo) -> None:
    """Print the numbers of the collector's page: a simulated month, and this heartbeat today."""
    stats = demo.counted()
    yesterday = stats["days"][-1]
    versions = sorted(yesterday["versions"].items(), key=lambda each: -each[1])
    few = ", ".join(f"{version} on {installs}" for version, installs in versions[:3])
    console.print(Rule(f"is anyone running this? {demo.page}", align="left"))
    console.print(
        f"  active in 48 hours:    {stats['live']['active']} installs now,"
        f" {yesterday['movements'][daily.ACTIVE_2D]} at the end of yesterday"
    )
    console.print(f"  versions:              {few}, and {max(len(versions) - 3, 0)} more")
    console.print(f"  simulated:             {INSTALLS} installs over {DAYS} days, up to yesterday")
    if demo.newest not in yesterday["versions"]:
        raise DemoError(f"the collector's page does not show {demo.newest}")
    console.print("[green]✓[/] the number of installs active now includes this heartbeat")


def main(
    *,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep everything running until Ctrl-C.")
    ] = False,
) -> None:
    """Send one heartbeat from a small ConsentOS database to a local collector."""
    started = time.monotonic()
    DATA.mkdir(exist_ok=True)
    try:
        with ExitStack() as running:
            with step("start Postgres and Valkey"):
                embedded = running.enter_context(servers.running(DATA / "demo", say=console.print))
            play(Demo(embedded, DATA / "demo"), embedded, stay=stay)
            with step("stop every process and both servers"):
                running.close()
    except KeyboardInterrupt:
        console.print("\nEverything was stopped.")
    except (servers.ServersError, DemoError) as error:
        console.print(f"[red]✗[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    console.print(f"Done in {time.monotonic() - started:.1f} s. Nothing left this machine.")


def play(demo: Demo, embedded: servers.Servers, *, stay: bool) -> None:
    """Run each step of one heartbeat; with ``stay``, keep everything running afterwards."""
    with step("create a small ConsentOS database"):
        demo.fill()
    with step("run both release lines (honcho start release)"):
        demo.release()
    with step(f"create a role with only the rights it needs (grants --role {ROLE} --apply)"):
        demo.grant()
    with step("make telemetry look two days old"):
        demo.age()
    with step(f"give the collector a history: {INSTALLS} simulated installs over {DAYS} days"):
        demo.simulate()
    with step("add the newest version to the list of releases (unlisted, releases add)"):
        demo.name_newest()
    with step(f"count the {DAYS} days"):
        demo.count()
    with step("start web, worker and scheduler (honcho), and wait for the heartbeat"):
        demo.start()
        row = demo.delivered()
    show(demo, row)
    show_page(demo)
    if stay:
        environment = DATA / "demo" / "environment"
        variables = {**demo.env, **demo.administrator}
        lines = (f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        environment.write_text("".join(lines))
        console.print(Rule("everything keeps running until Ctrl-C", align="left"))
        console.print(f"  the collector's page:  {demo.page}")
        console.print(f"  the processes' log:    tail -f {demo.log}")
        console.print(f"  the commands:          . {environment}; consentos-telemetry status")
        console.print(f"  psql:                  {embedded.psql} {shlex.quote(demo.consentos)}")
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    typer.run(main)
