"""The command line itself: every failure is one sentence on stderr and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from sqlalchemy.exc import ArgumentError, DBAPIError

from app import log, streams
from app.control import NotErasedError
from app.grants import RoleError, RoleNameError
from app.pipeline import CollectError
from app.settings import SettingsError
from migrations import MigrationRefusedError

FAILED = 1
WRONG_CALL = WRONG_ENVIRONMENT = 2
SWITCHED_OFF = 3

app = typer.Typer(
    name="consentos-telemetry",
    help="See, check and control the one heartbeat a day that this ConsentOS sends."
    " Everything is read from the environment; TELEMETRY_ENABLED=false and a restart turn it off.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class CommandError(Exception):
    """A command cannot do what it was asked; the message is one sentence for the operator."""

    def __init__(self, sentence: str, code: int = FAILED) -> None:
        """Keep the sentence, and the exit code that goes with it."""
        super().__init__(sentence)
        self.code = code


@contextmanager
def explained() -> Iterator[None]:
    """Turn what can go wrong outside this program into one sentence, without any value in it."""
    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), WRONG_ENVIRONMENT) from error
    except ArgumentError as error:
        raise CommandError("The database's URL cannot be understood.", WRONG_ENVIRONMENT) from error
    except RoleNameError as error:
        raise CommandError(str(error), WRONG_CALL) from error
    except (MigrationRefusedError, RoleError, NotErasedError) as error:
        raise CommandError(str(error)) from error
    except CollectError as error:
        raise CommandError(f"{error}: {log.cause(error)}.") from error
    except DBAPIError as error:
        cause = log.cause(error)
        raise CommandError(f"{cause[0].upper()}{cause[1:]}.") from error


def main() -> None:
    """Run the command line."""
    streams.ensure()
    try:
        app()
    except CommandError as error:
        complain(str(error))
        raise SystemExit(error.code) from None
    except Exception as error:  # noqa: BLE001 - an operator gets a sentence, whatever happens
        complain(f"Something unforeseen happened: {log.cause(error)}.")
        raise SystemExit(FAILED) from None


def complain(sentence: str) -> None:
    """Say on stderr what is wrong."""
    typer.echo(f"consentos-telemetry: {sentence}", err=True)
