"""The collector's commands: ``migrate``, ``serve`` and ``check``, and those of ``commands``."""

import gc
import logging
import signal
import socket
import sys
from typing import Annotated, NoReturn

import typer
import uvicorn
from alembic.util import CommandError
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp

import migrations
from app.collector import check, commands, metrics, store, web
from app.collector.connections import ACCEPTED_AT_ONCE, Connection, Server
from app.collector.lines import OnceAMinute
from app.settings import SettingsError
from app.settings.collector import CollectorSettings

cli = typer.Typer(
    help="Run a collector of heartbeats and maintain its numbers. Exit codes: 0 success; 1 failed,"
    " or `check` found a problem; 2 wrong arguments or settings.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would fold the options beyond recognition at 60 columns
)
cli.command("check")(check.command)
cli.add_typer(commands.cli)


@cli.command()
def migrate() -> None:
    """Migrate the collector's database to the tables of this version."""
    engine = store.connect(CollectorSettings.load().require("collector_database_url"))
    with engine.connect() as connection:
        done = migrations.migrate(connection, "collector")
    _log_to_stdout()
    web.log.info("collector.migrated from=%s to=%s", done.before, done.after)


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",  # noqa: S104 - senders are on other machines
    metrics_host: Annotated[
        str, typer.Option(help="The address for COLLECTOR_METRICS_PORT; never a public one.")
    ] = "127.0.0.1",
) -> None:
    """Receive heartbeats on PORT and show the numbers, until SIGTERM."""
    settings = CollectorSettings.load()
    # Instead of an invalid setting, a default could publish the page or delete too much.
    settings.refuse_what_is_wrong()
    registry = CollectorRegistry()
    engine = store.connect(settings.require("collector_database_url"))
    app = web.create_app(engine, settings, registry=registry)
    _log_to_stdout()
    # After its shutdown, uvicorn raises the signal that it caught again: exit with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with _listen(host, settings.port) as listener:
        if settings.collector_metrics_port:
            _show(registry, metrics_host, settings.collector_metrics_port)
        web.log.info("collector.ready port=%d", settings.port)
        gc.freeze()  # these objects live as long as the process: do not scan them again
        server(app).run(sockets=[listener])


def server(app: ASGIApp) -> uvicorn.Server:
    """Return a server that writes no access log, because that would contain addresses.

    The limit of file descriptors decides how many connections it serves.

    The client is the peer. If the peer's address is in FORWARDED_ALLOW_IPS, the client is the last
    address in X-Forwarded-For that is not in it. uvicorn reads that variable: addresses and
    networks, separated by commas; the default is loopback, for a proxy on the same machine. Name a
    proxy on another machine there: otherwise all clients behind it count as one client. ``*``
    trusts every peer, so every client can choose its address.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        backlog=ACCEPTED_AT_ONCE,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        proxy_headers=True,
        server_header=False,
        # honcho kills a process 5 s after SIGTERM; the inbox needs the rest to commit what waits.
        timeout_graceful_shutdown=3,
    )
    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        _fail(f"Cannot listen on port {port}: {error.strerror}.", 1)
    # The connections inherit this. asyncio does not set it on such a socket. Without it, a body
    # waits until the head is acknowledged, which takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _show(registry: CollectorRegistry, host: str, port: int) -> None:
    try:
        metrics.listen(registry, host, port)
    except OSError as error:
        _fail(f"Cannot listen on port {port} for metrics: {error.strerror}.", 1)


class _Line(logging.Formatter):
    """Writes the collector's lines unchanged; of a library's, only the type of the exception.

    A library's message or traceback may contain what a client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.name == web.log.name:
            return record.getMessage()
        kind = record.exc_info[0] if record.exc_info else None
        return f"collector.failed error={kind.__name__ if kind else record.name}"


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    formatter = _Line()
    handler.setFormatter(formatter)
    handler.addFilter(OnceAMinute(formatter.format))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    web.log.setLevel(logging.INFO)


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(sentence, err=True)
    sys.exit(code)


def main() -> None:
    """Run a command; exit with 2 if the environment is wrong, with 1 if the work was not done."""
    try:
        cli()
    except SettingsError as error:
        _fail(str(error), 2)
    except (migrations.MigrationRefusedError, CommandError, commands.NotDoneError) as error:
        _fail(str(error), 1)
    except SQLAlchemyError as error:
        _fail(f"The database of COLLECTOR_DATABASE_URL failed with {store.cause(error)}.", 1)


if __name__ == "__main__":
    main()
