"""The log: one line per event on stdout, the event name first, then ``key=value`` fields."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO

from app import streams
from app.line_writer import LineWriter, is_writable

_logger = logging.getLogger("telemetry")

_PAYLOAD = "telemetry.payload %s"


def event(name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log ``telemetry.<name>``; a value is one word, or quoted as JSON, or ``-`` for None."""
    _logger.log(level, _event(name, fields))


def payload(body: str) -> None:
    """Log the exact body that a receiver has accepted, and nothing after it."""
    _logger.info(_PAYLOAD, body)


def _event(name: str, fields: Mapping[str, object]) -> str:
    return " ".join([f"telemetry.{name}", *(f"{key}={_word(fields[key])}" for key in fields)])


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    word = str(value)
    plain = word.isascii() and word.isprintable() and not set(word) & set(' "=')
    return word if plain and word else json.dumps(word)


def _failed(what: str) -> str:
    """Return the line that reports a failure of the log itself, which has no log record."""
    return _event("failed", {"stage": "log", "error": what, "level": "WARNING"})


class _Line(logging.Formatter):
    """Formats a record as one line with the level at its end; nothing may follow a payload's body.

    An error in a library's message is replaced by its cause, which contains no value.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.name == _logger.name and record.msg == _PAYLOAD:
            return record.getMessage()
        return f"{self._message(record)} level={record.levelname}"

    def _message(self, record: logging.LogRecord) -> str:
        if record.name == _logger.name:
            return record.getMessage()
        copy = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            copy.args = tuple(cause(x) if isinstance(x, Exception) else x for x in record.args)
        error = record.exc_info[1] if record.exc_info else None
        copy.exc_info = copy.exc_text = None
        line = super().format(copy) + (f" ({cause(error)})" if error else "")
        return " ".join(line.split())


class _Handler(logging.Handler):
    """Passes each record to a LineWriter, without a lock: a signal handler may log at any time."""

    def __init__(self, writer: LineWriter) -> None:
        """Write to ``writer``."""
        super().__init__()
        self._writer = writer
        self._ended = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record; unlike ``logging.Handler``, without a lock that others would wait for."""
        if wanted := bool(self.filter(record)):
            self.emit(record)
        return wanted

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one line; one that cannot be formatted is reported as a failure."""
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - a library may log arguments that do not fit its message
            line = _failed(cause(error))
        self._writer.write(_encoded(line))

    def close(self) -> None:
        """Wait a moment for the last lines, and report on stderr how many could not be written."""
        super().close()
        if not self._ended and (unwritten := self._writer.end()):
            _write_to_stderr(_loss(unwritten))
        self._ended = True


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode(errors="backslashreplace")


def _loss(lines: int) -> bytes:
    what = "1 line" if lines == 1 else f"{lines} lines"
    return _encoded(_failed(f"{what} could not be written"))


def complain(sentence: str) -> None:
    """Write to the real stderr why a process ends."""
    _write_to_stderr(_encoded(sentence))


def _write_to_stderr(line: bytes) -> None:
    """Write a line to the real stderr, unless it is closed or would block."""
    if sys.__stderr__ is not None:
        with suppress(OSError):
            descriptor = sys.__stderr__.fileno()
            if is_writable(descriptor, seconds=0):
                os.write(descriptor, line)


def setup(level: str, stream: TextIO | None = None) -> None:
    """Send the log to ``stream``, by default the process's real stdout, each record in one write.

    Dramatiq replaces ``sys.stdout`` with a pipe to its master's stderr; ``sys.__stdout__`` is the
    real stdout. If stdout is closed, the log goes to stderr; if that is closed too, nothing is
    logged. ``level`` never hides an event. Libraries log from WARNING up, because their lower
    levels contain URLs, statements and rows; Dramatiq's own lines follow ``level``.
    """
    streams.ensure()
    closed = sys.__stdout__ is None and stream in {None, sys.stdout}
    handler = _handler(sys.__stderr__ if closed else stream or sys.__stdout__)
    handler.setFormatter(_Line("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    wanted = logging.getLevelNamesMapping()[level]
    _logger.setLevel(min(wanted, logging.INFO))
    logging.getLogger("dramatiq").setLevel(wanted)
    if closed:
        reason = "stdout is closed, so the log goes to stderr"
        event("warning", level=logging.WARNING, reason=reason)


def _handler(stream: TextIO | None) -> logging.Handler:
    if stream is None:
        return logging.NullHandler()
    try:
        return _Handler(LineWriter(stream.fileno(), _loss))
    except OSError:  # a stream in memory
        return logging.StreamHandler(stream)


_WRONG_PASSWORD = "the database refuses the password"  # noqa: S105 - a sentence about a password
_NO_DATABASE = "the database or its role does not exist"
_CROWDED = "the database has no connection left"


def _violated_null(diagnostics: Any) -> str | None:
    column, table = diagnostics.column_name, diagnostics.table_name
    return f"the column {column} of {table} is NOT NULL and has no default" if column else None


# By SQLSTATE: Postgres's own message where it names only tables, columns and limits, else our own
# words.
_ANSWERS: Mapping[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(
        ("25006", "3F000", "42501", "42703", "42P01", "42P07", "55P03", "57014", "57P01"),
        lambda diagnostics: str(diagnostics.message_primary),
    ),
    "23502": _violated_null,
    "28P01": lambda _: _WRONG_PASSWORD,
    "3D000": lambda _: _NO_DATABASE,
    "53300": lambda _: _CROWDED,
}

# libpq gives no SQLSTATE for a failed connection. These are its own words and psycopg's, which the
# server's language does not change.
_CONNECTION_TROUBLE = (
    (r"no password supplied", "the database asks for a password"),
    (r"timeout expired", "the database does not answer"),
    (r"invalid \S+ value", "the database's URL has an option with a wrong value"),
    (r"root certificate|certificate verify", "the database's certificate cannot be verified"),
)

# The server's words, if they are English: they say more than its SQLSTATE.
_SERVER_TROUBLE = (
    (r"password authentication failed", _WRONG_PASSWORD),
    (r'FATAL: +(database|role) ".*" does not exist', _NO_DATABASE),
    (r"FATAL: .*(too many|connection slots)", _CROWDED),
)
_REFUSAL = re.compile(r"failed: [^\s:]+:  ")
"""A server's refusal begins with its severity in the server's language, a colon, two spaces."""

_REFUSED = (
    "the database refuses the connection (wrong password, role or database name; no connection"
    " left; starting or stopping): see the database's log"
)


def cause(error: BaseException) -> str:
    """Return what went wrong in words that contain no value: no host, user, row or password.

    An error whose message may contain a value is named by its type alone.
    """
    # Checked by name: the scheduler logs too, and loads no database driver.
    origin: Any = getattr(error, "orig", None) or error
    if sentence := getattr(origin, "sentence", None):
        return str(sentence)
    kinds = type(origin).__mro__
    if "redis.exceptions" in (kind.__module__ for kind in kinds):
        from app import wakeups  # noqa: PLC0415 - only a process with such an error needs redis

        return wakeups.cause(origin)
    state = getattr(origin, "sqlstate", None)
    answer = _ANSWERS.get(str(state))
    if answer and (words := answer(origin.diag)):
        return words
    if state is None and "OperationalError" in (kind.__name__ for kind in kinds):
        return _why_not_connected(origin)
    if state is None and "invalid connection option" in str(origin):
        return "the database's URL has an unknown option"
    return f"{type(origin).__name__} {state}" if state else type(origin).__name__


def _why_not_connected(error: Any) -> str:
    """Return why a connection could not be made, or why it broke."""
    words = str(error)
    for pattern, sentence in (*_CONNECTION_TROUBLE, *_SERVER_TROUBLE):
        if re.search(pattern, words):
            return sentence
    if getattr(error.pgconn, "used_password", False) or _REFUSAL.search(words):
        return _REFUSED
    return "the database cannot be reached"
