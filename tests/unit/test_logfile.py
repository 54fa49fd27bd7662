"""The bodies of a log are found, whatever has written, compressed or wrapped its lines."""

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.logfile import LONGEST, Entry, Logged, TooLong, Unreadable, read
from app.payload import parse
from tests.support.published import EXAMPLE

BODY = parse(EXAMPLE).canonical()
LINE = f"telemetry.payload {BODY}"

PREFIXES = {
    "the worker": "",
    "honcho": "02:30:01 worker.1    | ",
    "docker compose, in colours": "\x1b[36mworker-1  | \x1b[0m",
    "docker compose, with timestamps": "worker-1  | 2026-05-02T02:30:01.123456789Z ",
    "kubectl": "[pod/telemetry-worker-5c9f/worker] ",
    "containerd": "2026-05-02T02:30:01.123456789Z stdout F ",
    "heroku": "2026-05-02T02:30:01.123456+00:00 app[worker.1]: ",
    "journald": "May 02 02:30:01 host consentos-telemetry[4711]: ",
    "bytes of no encoding": "GET /caf\udce9\udcff ",
}
ENDS = ("", "\n", "\r\n", "\r", "\x1b[0m\n", "\x1b[0m\x1b[K\r\n", "\n\n")


def entries(log: bytes) -> list[Entry]:
    return list(read(io.BytesIO(log)))


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


class TestABodyIsFound:
    @pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
    @pytest.mark.parametrize("end", ENDS)
    def test_that_is_written_by(self, prefix: str, end: str) -> None:
        assert entries(encoded(prefix + LINE + end)) == [Logged(BODY, 1)]

    def test_among_other_lines_under_the_number_of_its_own(self) -> None:
        others = ["telemetry.attempt id=1 n=1\n", "\n", "telemetry.payloads {}\n", f"{BODY}\n"]
        log = encoded("".join([*others, f"{LINE}\n", *others, LINE]))
        assert entries(log) == [Logged(BODY, 5), Logged(BODY, 10)]

    @given(
        st.lists(
            st.tuples(st.sampled_from([*PREFIXES.values()]), st.sampled_from([BODY, "{}", "{1}"]))
        )
    )
    def test_byte_for_byte_whatever_it_is(self, lines: list[tuple[str, str]]) -> None:
        log = "".join(f"{prefix}telemetry.payload {body}\n" for prefix, body in lines)
        found = [each.body for each in entries(encoded(log)) if isinstance(each, Logged)]
        assert found == [body for _, body in lines]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_in_the_encoding_of(self, encoding: str, end: str) -> None:
        log = f"r\u00e9sum\u00e9\n{LINE}{end or chr(10)}{LINE}{end}".encode(encoding)
        assert entries(log) == [Logged(BODY, 2), Logged(BODY, 3)]

    def test_in_colours_that_a_search_has_put_around_the_mark(self) -> None:
        line = f"\x1b[01;31m\x1b[Ktelemetry.payload\x1b[m\x1b[K {BODY}\n"
        assert entries(line.encode()) == [Logged(BODY, 1)]

    @pytest.mark.parametrize("field", ["log", "message"])
    def test_in_a_line_that_is_wrapped_in_json(self, field: str) -> None:
        line = json.dumps({"time": "2026-05-02", field: f"{LINE}\n", "stream": "stdout"})
        assert entries(f"{line}\n".encode()) == [Logged(BODY, 1)]

    @pytest.mark.parametrize("members", [1, 2])
    def test_in_a_compressed_file_of_one_or_more_members(self, members: int) -> None:
        log = gzip.compress(f"{LINE}\n".encode()) * members
        assert entries(log) == [Logged(BODY, number + 1) for number in range(members)]

    def test_through_a_pipe_that_gives_a_few_bytes_at_a_time(self) -> None:
        class Dripping(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                return super().read(min(size or 1, 1))

        for log in (LINE.encode(), f"{LINE}\n".encode("utf-16")):
            assert list(read(Dripping(log))) == [Logged(BODY, 1)]

    def test_with_the_line_after_it_if_it_does_not_end_as_a_body_does(self) -> None:
        log = f"{LINE[:300]}\n02:30:01 worker | {LINE[300:]}\n{LINE}\n".encode()
        first, second = entries(log)
        assert isinstance(first, Logged)
        assert first == Logged(LINE[:300].removeprefix("telemetry.payload "), 1, first.following)
        assert first.following.endswith(LINE[300:])
        assert second == Logged(BODY, 3)


class TestWhatCannotBeRead:
    def test_is_named_by_its_line(self) -> None:
        log = b"\n\n" + LINE.encode("utf-32-le")
        assert entries(log) == [Unreadable(3, "its encoding is not UTF-8 or UTF-16")]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda packed: packed[:-9],
            lambda packed: packed + b"more",
            lambda packed: packed[:60] + b"\0\0\0\0" + packed[64:],
        ],
    )
    def test_is_the_rest_of_a_compressed_file_that_is_damaged(
        self, damage: Callable[[bytes], bytes]
    ) -> None:
        *_, last = entries(damage(gzip.compress(f"{LINE}\n".encode() * 3)))
        assert isinstance(last, Unreadable)
        assert "damaged or ends too early" in last.reason

    def test_is_never_a_reason_to_fail(self) -> None:
        for log in (b"", b"\x1f\x8b", b"\xff\xfe", b"{" * 70_000, b'{"a":' * 9000 + LINE.encode()):
            list(read(io.BytesIO(log)))

    @given(st.binary(max_size=2000))
    def test_is_never_a_reason_to_fail_whatever_it_is(self, log: bytes) -> None:
        list(read(io.BytesIO(log)))
        list(read(io.BytesIO(b"\x1f\x8b" + log)))


class TestALineThatIsTooLong:
    @pytest.mark.parametrize("end", ["", "\n", f"\n{LINE}\n"])
    def test_is_skipped_and_counted_as_one_line(self, end: str) -> None:
        after = [Logged(BODY, 3)] if LINE in end else []
        for size in (LONGEST + 1, 2 * LONGEST, 5 * LONGEST + 7):
            log = f"first\n{'x' * (size - len(LINE))}{LINE}{end}".encode()
            assert entries(log) == [TooLong(2), *after]

    def test_is_one_byte_longer_than_the_longest_that_is_looked_at(self) -> None:
        line = f"{'x' * (LONGEST - len(LINE))}{LINE}\n"
        assert entries(line.encode()) == [Logged(BODY, 1)]
        assert entries(f"x{line}".encode()) == [TooLong(1)]

    @pytest.mark.parametrize("compressed", [False, True])
    def test_takes_no_memory_however_long_it_is(self, *, compressed: bool) -> None:
        zeros = Zeros(compressed=compressed)
        tracemalloc.start()
        try:
            found = list(read(zeros))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert found == [TooLong(1)]
        assert peak < 3_000_000


class Zeros:
    """A line of 300 MB, which is never in memory as a whole."""

    def __init__(self, *, compressed: bool) -> None:
        packed = gzip.compress(bytes(30_000_000)) if compressed else bytes(1_000_000)
        self._file, self._left = io.BytesIO(packed), 10 if compressed else 300

    def read(self, size: int, /) -> bytes:
        given = self._file.read(size)
        if not given and self._left > 1:
            self._left -= 1
            self._file.seek(0)
            given = self._file.read(size)
        return given
