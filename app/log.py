"""The lines an operator greps: one an event on stdout, its name first, ``key=value`` after it."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO

from app import streams
from app.line_writer import LineWriter, is_writable

_logger = logging.getLogger("telemetry")


def event(name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log ``telemetry.<name>``; a value is one word, or quoted as JSON, or ``-`` for none."""
    _logger.log(level, _event(name, fields))


def payload(body: str) -> None:
    """Log the exact body that a receiver has accepted, and nothing after it."""
    _logger.info("telemetry.payload %s", body)


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


class _Line(logging.Formatter):
    """One line a record; what a library says of an error is told without a value in it."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == _logger.name:
            return record.getMessage()
        told = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            told.args = tuple(cause(x) if isinstance(x, Exception) else x for x in record.args)
        error = record.exc_info[1] if record.exc_info else None
        told.exc_info = told.exc_text = None
        line = super().format(told) + (f" ({cause(error)})" if error else "")
        return " ".join(line.split())


class _Handler(logging.Handler):
    """Hands each record to a LineWriter, without a lock: a signal handler may log at any line."""

    def __init__(self, writer: LineWriter) -> None:
        """Write to ``writer``."""
        super().__init__()
        self._writer = writer
        self._ended = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record; the original holds a lock meanwhile, and others would wait for it."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as one line; one that cannot be formatted is reported as a failure."""
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - the words and arguments of any library
            line = _event("failed", {"stage": "log", "error": cause(error)})
        self._writer.write(_encoded(line))

    def close(self) -> None:
        """Give the last lines a moment, and report on stderr how many could not be written."""
        super().close()
        if not self._ended and (unwritten := self._writer.end()):
            _write_to_stderr(_loss(unwritten))
        self._ended = True


def _encoded(line: str) -> bytes:
    return f"{line}\n".encode(errors="backslashreplace")


def _loss(lines: int) -> bytes:
    what = "1 line" if lines == 1 else f"{lines} lines"
    return _encoded(_event("failed", {"stage": "log", "error": f"{what} could not be written"}))


def complain(sentence: str) -> None:
    """Say on the real stderr why a process ends."""
    _write_to_stderr(_encoded(sentence))


def _write_to_stderr(line: bytes) -> None:
    """Write a line to the real stderr, unless that is closed, or would block."""
    if sys.__stderr__ is not None:
        with suppress(OSError):
            descriptor = sys.__stderr__.fileno()
            if is_writable(descriptor, seconds=0):
                os.write(descriptor, line)


def setup(level: str, stream: TextIO | None = None) -> None:
    """Send the log to ``stream``, by default the process's real stdout, each record in one write.

    Dramatiq puts a pipe to its master's stderr in the place of ``sys.stdout``; ``sys.__stdout__``
    is the real one. If stdout is closed, the log goes to stderr; if that is closed too, it goes
    nowhere. ``level`` never hides an event. Libraries speak from WARNING on, for their lower
    levels hold URLs, statements and rows; Dramatiq's own lines follow ``level``.
    """
    streams.ensure()
    closed = sys.__stdout__ is None and stream in {None, sys.stdout}
    handler = _handler(sys.__stderr__ if closed else stream or sys.__stdout__)
    handler.setFormatter(_Line("%(levelname)s %(name)s: %(message)s"))
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


# Postgres's own messages that name nothing but tables, columns and limits, by SQLSTATE.
_NAMES_ONLY = frozenset(
    {"25006", "3F000", "42501", "42703", "42P01", "42P07", "55P03", "57014", "57P01"}
)

_NOT_THERE = frozenset({"42703", "42P01"})
_OWN_TABLE = re.compile(r'\btelemetry_\w+|relation "instance"')
_UNMIGRATED = (
    "the tables of telemetry are missing or of another release; run `python -m app migrate` first"
)

_CONNECTION_TROUBLE = (
    (r"password authentication failed|no password supplied", "the database refuses the password"),
    (r'FATAL: +(database|role) ".*" does not exist', "the database or its role does not exist"),
    (r"timeout expired", "the database does not answer"),
    (r"FATAL: .*(too many|connection slots)", "the database has no connection left"),
    (r"invalid \S+ value", "the database's URL has an option with a wrong value"),
    (r"root certificate|certificate verify", "the database's certificate cannot be verified"),
)


def cause(error: BaseException) -> str:
    """Say what went wrong without a value in it: no host, no user, no row, no password.

    What is not known to be harmless is told by the name of its type alone.
    """
    # Read by name: the scheduler, which logs too, loads no database driver.
    origin: Any = getattr(error, "orig", None) or error
    if sentence := getattr(origin, "sentence", None):
        return str(sentence)
    if "redis.exceptions" in (kind.__module__ for kind in type(origin).__mro__):
        from app import wakeups  # noqa: PLC0415 - whoever has such an error has loaded it

        return wakeups.cause(origin)
    state = getattr(origin, "sqlstate", None)
    if state in _NAMES_ONLY:
        told = str(origin.diag.message_primary)
        return _UNMIGRATED if state in _NOT_THERE and _OWN_TABLE.search(told) else told
    if state is None and "OperationalError" in (kind.__name__ for kind in type(origin).__mro__):
        known = (told for words, told in _CONNECTION_TROUBLE if re.search(words, str(origin)))
        return next(known, "the database cannot be reached")
    if state is None and "invalid connection option" in str(origin):
        return "the database's URL has an option that Postgres does not know"
    return f"{type(origin).__name__} {state}" if state else type(origin).__name__
