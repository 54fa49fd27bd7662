"""The lines that an operator greps: one an event, whatever is in it, and never hidden."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors
from psycopg.errors import FinishedPGconn
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from app import log
from tests.support.pipe import Pipe
from tests.support.published import EXAMPLE
from tests.unit.environment import MARKER

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LOGGERS = ["", "telemetry", "dramatiq"]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Put back what ``log.setup`` changes: pytest itself listens on the root logger."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def written(say: Callable[[], object], level: str = "INFO") -> str:
    """Return what stands on the stream after ``say``."""
    stream = io.StringIO()
    log.setup(level, stream)
    say()
    return stream.getvalue()


def test_an_event_is_its_name_and_then_its_fields() -> None:
    line = written(lambda: log.event("attempt", id="7f", n=1, outcome="sent", status=202))
    assert line == "telemetry.attempt id=7f n=1 outcome=sent status=202 level=INFO\n"


def test_an_event_may_have_no_field() -> None:
    assert written(lambda: log.event("enabled")) == "telemetry.enabled level=INFO\n"


@pytest.mark.parametrize("level", ["WARNING", "ERROR", "CRITICAL"])
@pytest.mark.parametrize("name", ["telemetry", "dramatiq.worker", "sqlalchemy.pool"])
def test_every_line_ends_with_its_level(name: str, level: str) -> None:
    number = logging.getLevelNamesMapping()[level]
    line = written(lambda: logging.getLogger(name).log(number, "a line"))
    assert line.endswith(f" level={level}\n")


def test_a_failure_of_a_library_has_its_level_after_its_cause() -> None:
    line = written(lambda: logging.getLogger("library").error("odd", exc_info=KeyError(MARKER)))
    assert line == "library: odd (KeyError) level=ERROR\n"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "-"),
        ("", '""'),
        ("-", "-"),
        (0, "0"),
        (True, "True"),
        ("https://example.com/v1", "https://example.com/v1"),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "no"', r'"say \"no\""'),
        ("one\ntwo\r\x1b[2J", r'"one\ntwo\r\u001b[2J"'),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}\N{LINE SEPARATOR}", r'"caf\u00e9\u2028"'),
        ("%s %d %(x)s", '"%s %d %(x)s"'),
        (datetime(2026, 5, 2, 2, 30, 0, 123, tzinfo=UTC), "2026-05-02T02:30:00+00:00"),
    ],
)
def test_a_value_is_one_word_or_quoted_or_a_dash_for_none(value: object, word: str) -> None:
    line = written(lambda: log.event("queued", day=value))
    assert line == f"telemetry.queued day={word} level=INFO\n"


@given(st.text())
def test_an_event_is_one_printable_line_whatever_its_value_is(value: str) -> None:
    line = written(lambda: log.event("failed", error=value, stage="write"))
    assert line.removesuffix("\n").isprintable()
    assert line.isascii()
    word = line.removeprefix("telemetry.failed error=").removesuffix(" stage=write level=INFO\n")
    assert (json.loads(word) if word.startswith('"') else word) == value


def test_a_payload_is_the_exact_body_and_nothing_after_it() -> None:
    body = json.dumps(json.loads(EXAMPLE), separators=(",", ":"))
    assert written(lambda: log.payload(body)) == f"telemetry.payload {body}\n"


def test_a_payload_with_a_percent_sign_is_not_a_format() -> None:
    assert written(lambda: log.payload('{"%s":"%d"}')) == 'telemetry.payload {"%s":"%d"}\n'


@pytest.mark.parametrize("level", LEVELS)
def test_no_log_level_hides_an_event_or_a_payload(level: str) -> None:
    def say() -> None:
        log.event("notice")
        log.event("failed", level=logging.WARNING)
        log.payload("{}")

    lines = [
        "telemetry.notice level=INFO",
        "telemetry.failed level=WARNING",
        "telemetry.payload {}",
        "",
    ]
    assert written(say, level) == "\n".join(lines)


def test_an_event_below_info_is_reported_at_debug_only() -> None:
    def say() -> None:
        log.event("detail", level=logging.DEBUG)

    reported = {level: bool(written(say, level)) for level in LEVELS}
    assert reported == {level: level == "DEBUG" for level in LEVELS}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "library", ["sqlalchemy.engine", "sqlalchemy.engine.Engine", "httpx", "httpcore", "asyncio"]
)
def test_what_libraries_log_below_a_warning_is_hidden_at_every_level(
    library: str, level: str
) -> None:
    def say() -> None:
        logging.getLogger(library).info("POST https://example.com/?token=%s", MARKER)
        logging.getLogger(library).debug("INSERT %s", MARKER)

    assert written(say, level) == ""


def test_a_librarys_warning_is_reported_with_its_level_and_its_name() -> None:
    line = written(lambda: logging.getLogger("sqlalchemy.pool").warning("odd"))
    assert line == "sqlalchemy.pool: odd level=WARNING\n"


@pytest.mark.parametrize(("level", "reported"), [("DEBUG", True), ("INFO", True), ("ERROR", False)])
def test_dramatiqs_own_lines_follow_the_log_level(level: str, reported: bool) -> None:  # noqa: FBT001 - pytest's parameter
    say = logging.getLogger("dramatiq.worker.WorkerThread").info
    assert bool(written(lambda: say("Worker is ready."), level)) is reported


def test_each_line_is_one_write() -> None:
    writes: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    log.setup("INFO", Stream())
    log.event("queued", id="7f")
    log.payload("{}")
    assert writes == ["telemetry.queued id=7f level=INFO\n", "telemetry.payload {}\n"]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    """A pipe with room in it."""
    opened = Pipe(tmp_path / "stdout")
    yield opened
    opened.close()


def piped(pipe: Pipe, *steps: Callable[[], object]) -> bytes:
    """Return what is in a pipe that is a process's stdout, after some steps."""
    with pipe.path.open("w") as stdout:
        log.setup("INFO", stdout)
        for step in steps:
            step()
        return pipe.read()


def test_a_line_is_in_the_pipe_when_the_call_returns(pipe: Pipe) -> None:
    line = piped(pipe, lambda: log.event("queued", id="7f"))
    assert line == b"telemetry.queued id=7f level=INFO\n"


def test_what_cannot_be_encoded_is_escaped(pipe: Pipe) -> None:
    line = piped(pipe, lambda: logging.getLogger("library").warning("a name: \udcff"))
    assert line == rb"library: a name: \udcff level=WARNING" + b"\n"


def test_a_record_that_cannot_be_formatted_is_a_failure_in_one_line(pipe: Pipe) -> None:
    line = piped(pipe, lambda: logging.getLogger("library").warning("%d", MARKER))
    assert line == b"telemetry.failed stage=log error=TypeError level=WARNING\n"


def test_lost_lines_are_reported_as_a_failure_when_there_is_a_reader_again(pipe: Pipe) -> None:
    def say() -> None:
        log.event("queued", id="7f")

    report = b'telemetry.failed stage=log error="2 lines could not be written" level=WARNING\n'
    lines = piped(pipe, pipe.hang_up, say, say, pipe.open, say)
    assert lines == b"telemetry.queued id=7f level=INFO\n" + report


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"invalid literal: '{MARKER}'"),
        OSError(2, "No such file", f"/home/{MARKER}"),
        KeyError(MARKER),
        TimeoutError(),
    ],
)
def test_a_cause_that_is_not_known_to_be_harmless_is_reported_by_its_type(error: Exception) -> None:
    assert log.cause(error) == type(error).__name__


def test_a_database_that_cannot_be_reached_is_reported_without_where_it_is_and_who_asked() -> None:
    url = f"postgresql+psycopg://user{MARKER}:word{MARKER}@/{MARKER}?host=/nowhere/{MARKER}"
    with pytest.raises(OperationalError, match=MARKER) as error:
        create_engine(url, poolclass=NullPool).connect()
    assert log.cause(error.value) == "the database cannot be reached"


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ('password authentication failed for user "{}"', "the database refuses the password"),
        ('FATAL:  database "{}" does not exist', "the database or its role does not exist"),
        ('FATAL:  sorry, too many clients already for "{}"', "the database has no connection left"),
        ('invalid sslmode value: "{}"', "the database's URL has an option with a wrong value"),
        ('could not translate host name "{}"', "the database cannot be reached"),
        (
            'root certificate file "{}" does not exist',
            "the database's certificate cannot be verified",
        ),
    ],
)
def test_a_refused_connection_is_reported_in_words_of_our_own(words: str, reported: str) -> None:
    assert log.cause(psycopg.OperationalError(words.format(MARKER))) == reported


@pytest.mark.parametrize(
    "words",
    [
        "FATAL:  Passwort-Authentifizierung für Benutzer »{}« fehlgeschlagen",
        'ВАЖНО:  база данных "{}" не существует',
        "FATAL:  {}",
    ],
)
def test_a_refusal_in_any_language_is_a_refusal_and_not_an_unreachable_database(
    words: str,
) -> None:
    where = f'connection failed: connection to server at "{MARKER}", port 5432 failed: '
    reported = log.cause(psycopg.OperationalError(where + words.format(MARKER)))
    assert reported.startswith("the database refuses the connection (wrong password,")


def test_a_refusal_after_a_password_is_known_by_the_connection() -> None:
    used = FinishedPGconn(used_password=True)
    reported = log.cause(psycopg.OperationalError("no words", pgconn=cast("PGconn", used)))
    assert reported.startswith("the database refuses the connection")


@pytest.mark.parametrize("kind", [errors.UniqueViolation, errors.InvalidTextRepresentation])
def test_an_error_about_a_row_is_reported_by_its_type_and_state(kind: type[psycopg.Error]) -> None:
    reported = log.cause(kind(f"Key (id)=({MARKER}) already exists."))
    assert reported == f"{kind.__name__} {kind.sqlstate}"


def test_a_time_is_reported_to_the_second_with_its_offset() -> None:
    at = datetime(2026, 5, 2, 2, 30, tzinfo=UTC) + timedelta(milliseconds=999)
    line = written(lambda: log.event("attempt", next_attempt_at=at))
    assert line == "telemetry.attempt next_attempt_at=2026-05-02T02:30:00+00:00 level=INFO\n"
