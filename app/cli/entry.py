"""The command line: every failure is one sentence on stderr and an exit code.

With ``--json`` a failure is an object on stdout as well.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated

import typer
from sqlalchemy.exc import ArgumentError, DBAPIError
from typer.exceptions import TyperException

from app import __version__, log, streams
from app.control import NotErasedError
from app.grants import RoleError, RoleNameError
from app.pipeline import CollectError
from app.receiver import ReceiverError
from app.settings import SettingsError
from migrations import MigrationRefusedError

NAME = "consentos-telemetry"

FAILED = 1
WRONG_CALL = WRONG_ENVIRONMENT = 2
SWITCHED_OFF = 3
INTERRUPTED = 130
"""The exit code that a shell reports for a program ended by Ctrl-C."""

EXIT_CODES = (
    "Exit codes: 0 success; 1 failed, or a check found a problem; 2 wrong arguments or settings;"
    " 3 telemetry is off (send)."
)

app = typer.Typer(
    name=NAME,
    help="See, check and control the heartbeat that this ConsentOS sends once a day."
    " All settings are environment variables. To turn telemetry off, set"
    " TELEMETRY_ENABLED=false and restart.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its frames are unreadable on a terminal 60 columns wide
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = partial(app.command, epilog=EXIT_CODES)


def _show_version(value: bool) -> None:  # noqa: FBT001 - Typer passes it by position
    if value:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options that come before a command."""


class CommandError(Exception):
    """A command failed; the message is one sentence for the operator."""

    def __init__(self, sentence: str, code: int = FAILED, *, printed: bool = False) -> None:
        """Store the sentence and its exit code; ``printed``: its JSON is already on stdout."""
        super().__init__(sentence)
        self.code = code
        self.printed = printed


@contextmanager
def explained() -> Iterator[None]:
    """Turn an expected error into a CommandError: one sentence that contains no value."""
    try:
        yield
    except SettingsError as error:
        raise CommandError(str(error), WRONG_ENVIRONMENT) from error
    except ArgumentError as error:
        raise CommandError("The database's URL cannot be parsed.", WRONG_ENVIRONMENT) from error
    except RoleNameError as error:
        raise CommandError(str(error), WRONG_CALL) from error
    except (MigrationRefusedError, RoleError, NotErasedError, ReceiverError) as error:
        raise CommandError(str(error)) from error
    except CollectError as error:
        raise CommandError(f"{error}: {log.cause(error)}.") from error
    except DBAPIError as error:
        cause = log.cause(error)
        raise CommandError(f"{cause[0].upper()}{cause[1:]}.") from error


def main() -> None:
    """Run the command line."""
    streams.ensure()
    raise SystemExit(_run())


def _run() -> int:
    try:
        return _ended(app(prog_name=_program(), standalone_mode=False))
    except CommandError as error:
        return _fail(str(error), error.code, printed=error.printed)
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]  # only its subclasses, which Typer raises, define it
        return _fail(error.format_message(), error.exit_code, shown=True)
    except typer.Abort:
        return _fail("Aborted: nothing was changed.", FAILED)
    except Exception as error:  # noqa: BLE001 - an operator gets a sentence, not a traceback
        if isinstance(error, OSError) and error.errno in _FULL:
            return _fail_to_write(error)
        return _fail(f"An unexpected error occurred: {log.cause(error)}.", FAILED)


def _ended(code: int | None) -> int:
    return _fail("Interrupted.", code) if code == INTERRUPTED else code or 0


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Errors that only a write to stdout raises: code that opens a file handles its own errors."""


def _program() -> str | None:
    """Return the installed command's name for shell completion; None keeps the name as typed."""
    asked = {"--install-completion", "--show-completion"}
    return NAME if asked & set(sys.argv) else None


def _fail(sentence: str, code: int, *, shown: bool = False, printed: bool = False) -> int:
    """Print what is wrong on stderr, and with ``--json`` on stdout too; return the exit code.

    ``shown``: it is already on stderr. ``printed``: it is already on stdout.
    """
    if not shown:
        complain(sentence)
    if _wants_json() and not printed:
        try:
            typer.echo(failure(sentence, code))
        except OSError as error:
            return _fail_to_write(error)
    return code


def _wants_json() -> bool:
    words = sys.argv[1:]
    return "--json" in words[: words.index("--") if "--" in words else None]


def failure(sentence: str, code: int) -> str:
    """Return a failure as JSON."""
    return json.dumps({"error": sentence, "code": code}, indent=2)


def _fail_to_write(error: OSError) -> int:
    """Report why stdout cannot be written, and drop the rest: the exit would write it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    complain(f"The output cannot be written: {error.strerror}.")
    return FAILED


def complain(sentence: str) -> None:
    """Print what is wrong on stderr, if stderr can be written."""
    with suppress(OSError):
        typer.echo(f"{NAME}: {sentence}", err=True)
