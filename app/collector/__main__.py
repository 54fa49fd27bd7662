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
    help="Run a collector of heartbeats, and keep its numbers true. Exit codes: 0 done, 1 not done,"
    " 2 wrong arguments or settings.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # frames and columns of options cannot be read at 60 columns
)
cli.command("check")(check.command)
cli.add_typer(commands.cli)


@cli.command()
def migrate() -> None:
    """Bring the collector's database to this version's tables."""
    engine = store.connect(CollectorSettings.load().require("collector_database_url"))
    with engine.connect() as connection:
        done = migrations.migrate(connection, "collector")
    _log_to_stdout()
    web.log.info("collector.migrated from=%s to=%s", done.before, done.after)


@cli.command()
def serve(
    # It is there to be reached from elsewhere.
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",  # noqa: S104 - see above
    metrics_host: Annotated[
        str, typer.Option(help="The address for COLLECTOR_METRICS_PORT; never a public one.")
    ] = "127.0.0.1",
) -> None:
    """Take heartbeats on PORT, and show the numbers, until SIGTERM."""
    settings = CollectorSettings.load()
    # A default would open what was to be closed, or delete too much.
    settings.refuse_what_is_wrong()
    registry = CollectorRegistry()
    engine = store.connect(settings.require("collector_database_url"))
    app = web.create_app(engine, settings, registry=registry)
    _log_to_stdout()
    # When uvicorn has shut down it raises the signal that it caught once more: a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with _listen(host, settings.port) as listener:
        if settings.collector_metrics_port:
            _show(registry, metrics_host, settings.collector_metrics_port)
        web.log.info("collector.ready port=%d", settings.port)
        gc.freeze()  # what was made until now stays, and need not be looked at again
        server(app).run(sockets=[listener])


def server(app: ASGIApp) -> uvicorn.Server:
    """Return a server that does not tell who calls: it writes no access log.

    It serves as many connections as the limit of file descriptors leaves room for.

    Who calls is the peer; or, where the peer's address is among FORWARDED_ALLOW_IPS, the last one
    in X-Forwarded-For that is not. uvicorn reads that variable: addresses and networks, with commas
    in between; by default those of loopback, for a proxy on the same machine. A proxy elsewhere has
    to be named, or all whom it forwards count as one client: itself. ``*`` believes everybody, and
    so lets everybody choose an address.
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
        # honcho kills 5 s after it has asked; what waits is settled in the last of them.
        timeout_graceful_shutdown=3,
    )
    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        _fail(f"Cannot listen on port {port}: {error.strerror}.", 1)
    # Its connections inherit this, and asyncio does not set it: it sees no TCP in such a socket.
    # Otherwise a body waits until the head before it is acknowledged, which takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _show(registry: CollectorRegistry, host: str, port: int) -> None:
    try:
        metrics.listen(registry, host, port)
    except OSError as error:
        _fail(f"Cannot listen on port {port} for metrics: {error.strerror}.", 1)


class _Line(logging.Formatter):
    """The collector's own lines as they are; of a library's, what was raised and no more.

    A library's words and tracebacks may hold what somebody sent.
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
    """Run a command: exit 2 means that the environment is wrong, 1 that the work was not done."""
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
