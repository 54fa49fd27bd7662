"""Finds the logged bodies in a file: plain, compressed, or wrapped by a log collector. Pure.

Reads in pieces of limited size, so that memory does not grow with the file or its lines.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

MARK = "telemetry.payload "

LONGEST = 64 * 1024
"""The longest line that is read, in bytes: a body has about 600."""


@dataclass(frozen=True)
class Logged:
    """A body found in a line, and the line after it if the body may continue there."""

    body: str
    line: int
    following: str = ""


@dataclass(frozen=True)
class Unreadable:
    """A line that has or may have a body, and why it cannot be read."""

    line: int
    reason: str


@dataclass(frozen=True)
class TooLong:
    """A line that is too long to hold a body."""

    line: int


Entry = Logged | Unreadable | TooLong


class Stream(Protocol):
    """A binary file; only ``read`` is used."""

    def read(self, size: int, /) -> bytes: ...  # noqa: D102 - the same as io.RawIOBase.read


def read(stream: Stream) -> Iterator[Entry]:
    """Yield the bodies of a log, and the lines that cannot be read."""
    number, split = 0, None
    try:
        for number, line in enumerate(_lines(stream), start=1):
            if split:
                yield Logged(split.body, split.line, following=_text(line or b""))
                split = None
            if line is None:
                yield TooLong(number)
                continue
            for entry in _of_line(line, number):
                if isinstance(entry, Logged) and not entry.body.endswith("}"):
                    split = entry
                else:
                    yield entry
    except (EOFError, gzip.BadGzipFile, zlib.error):
        yield Unreadable(
            number + 1, "the compressed file is damaged or ends too early, from this line on"
        )
    if split:
        yield split


def _lines(stream: Stream) -> Iterator[bytes | None]:
    r"""Yield the file line by line, without ``\n``; None stands for one that is too long."""
    pending, skipping = b"", False
    for piece in _pieces(stream):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            line = pending + end
            yield None if skipping or len(line) > LONGEST else line
            pending, skipping = b"", False
        pending += rest
        if skipping or len(pending) > LONGEST:
            pending, skipping = b"", True
    if skipping:
        yield None
    elif pending:
        yield pending


def _pieces(stream: Stream) -> Iterator[bytes]:
    first = stream.read(LONGEST)
    source: Stream = _Again(first, stream)
    if first.startswith(b"\x1f\x8b"):
        source = gzip.GzipFile(fileobj=source)  # type: ignore[call-overload]  # typeshed asks for more methods than reading uses
    while piece := source.read(LONGEST):
        yield piece


class _Again:
    """A stream that returns once more what was already read from it."""

    def __init__(self, first: bytes, rest: Stream) -> None:
        self._first, self._rest = first, rest

    def read(self, size: int, /) -> bytes:
        first, self._first = self._first[:size], self._first[size:]
        return first or self._rest.read(size)


# Terminal colours and links. No body contains an ESC, because JSON escapes it.
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")

_MARK = MARK.encode()
_WIDE = MARK.encode("utf-16-le")
"""Matches both byte orders of UTF-16: for ASCII, they differ only in a NUL before the mark."""


def _of_line(line: bytes, number: int) -> Iterator[Logged | Unreadable]:
    if b"payload" not in line and b"\0" not in line:
        return  # most lines of a long log; colour codes may surround the word
    # An old tool, or one that shows progress, ends a line with \r alone.
    for part in line.split(b"\r"):
        found = _body(part)
        if found is not None:
            yield Logged(found, number)
        elif b"\0" in part and _MARK in part.replace(b"\0", b""):
            yield Unreadable(number, "its encoding is not UTF-8 or UTF-16")


def _body(part: bytes) -> str | None:
    """Return the text after the mark, to the end of the line; None if there is no mark."""
    _, mark, body = _plain(part).rpartition(_MARK)
    if mark:
        wrapped = _unwrapped(part)
        return _text(body) if wrapped is None else wrapped
    _, mark, body = part.rpartition(_WIDE)
    if not mark:
        return None
    whole = body + b"\0" * (len(body) % 2)
    return _text(whole.decode("utf-16-le", "backslashreplace").encode(errors="backslashreplace"))


def _unwrapped(part: bytes) -> str | None:
    """Return the body from a line that is a JSON object with the log's line in a field."""
    if not part.lstrip().startswith(b"{"):
        return None
    try:
        fields = json.loads(part)
    except (ValueError, RecursionError):
        return None
    for value in fields.values():
        if isinstance(value, str) and MARK in value:
            return value.rpartition(MARK)[2].rstrip("\r\n")
    return None


def _plain(line: bytes) -> bytes:
    return _ANSI.sub(b"", line) if b"\x1b" in line else line


def _text(line: bytes) -> str:
    return _plain(line).decode(errors="backslashreplace").rstrip("\r\0")
