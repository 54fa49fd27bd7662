"""What two servers could read in two ways is refused, and never are two heartbeats made of one.

A proxy before the collector may read a request otherwise than the collector does. Who knows how
could hide a request in another one, so each shape here has one answer. The collector parsed
requests with h11 before: each shape has h11's answers too, and none is taken that h11 refused.
"""

import re
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import httptools
import pytest
from uvicorn.protocols.http import httptools_impl

from app.collector.connections import MAX_HEAD_BYTES
from tests.conftest import Databases
from tests.support.collector import Collector, of, query, run, serving

LINE = b"POST /v1/heartbeat HTTP/1.1"
HOST = b"Host: collector"
TYPE = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
BODY = of(0).encode()
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNK = b"%x\r\n" % len(BODY) + BODY + b"\r\n"
LAST = b"0\r\n\r\n"


def said(*lines: bytes, line: bytes = LINE, body: bytes = BODY) -> bytes:
    return b"\r\n".join((line, *lines, b"", b"")) + body


def post(*lines: bytes, line: bytes = LINE, host: bytes = HOST) -> bytes:
    """Return a request with more lines."""
    return said(host, TYPE, LENGTH, *lines, line=line)


def sized(*lines: bytes) -> bytes:
    """Return a request whose only lengths are in ``lines``."""
    return said(HOST, TYPE, *lines)


def chunked(body: bytes = CHUNK, last: bytes = LAST, coding: bytes = CHUNKED) -> bytes:
    return said(HOST, TYPE, coding, body=body + last)


def line(old: bytes, new: bytes) -> bytes:
    """Return a request whose first line differs."""
    assert old in LINE
    return post(line=LINE.replace(old, new))


OTHER = of(1).encode()
SMUGGLED = said(HOST, TYPE, b"Content-Length: %d" % len(OTHER), body=OTHER)
GET = said(b"Host: a", line=b"GET /v1/openapi.json HTTP/1.1", body=b"")
BOMB = b"f" * 16 + b"\r\n" + BODY + b"\r\n"


class Shape(NamedTuple):
    """A request, the statuses that answer it, and those of h11; None where they are the same."""

    words: bytes
    statuses: list[int]
    of_h11: list[int] | None = None


GROUPS = {
    "several requests": {
        "one": Shape(post(), [202]),
        "two": Shape(post() + SMUGGLED, [202, 202]),
        "one and nonsense": Shape(post() + b"nonsense\r\n\r\n", [202, 400]),
        "one more after the last": Shape(post(b"Connection: close") + SMUGGLED, [202]),
        "an empty line between two": Shape(post() + b"\r\n" + SMUGGLED, [202, 400]),
        "a GET with a body": Shape(
            said(b"Host: a", LENGTH, line=b"GET /v1/openapi.json HTTP/1.1") + SMUGGLED, [200, 202]
        ),
        "two of HTTP/1.0": Shape(line(b"1.1", b"1.0") + SMUGGLED, [202]),
    },
    "the host": {
        "no host": Shape(said(TYPE, LENGTH), [400]),
        "no host in HTTP/1.0": Shape(said(TYPE, LENGTH, line=LINE.replace(b"1.1", b"1.0")), [202]),
        "two hosts": Shape(post(b"Host: other"), [400]),
        "the same host twice": Shape(post(HOST), [400]),
    },
    "the length": {
        "the same length twice": Shape(post(LENGTH), [400], [202]),
        "two lengths": Shape(post(b"Content-Length: 5"), [400]),
        "a list of the same length": Shape(
            sized(LENGTH + b", %d" % len(BODY)),
            [400],
            [202],
        ),
        "a list of lengths": Shape(sized(LENGTH + b", 5"), [400]),
        "a length with a plus": Shape(sized(b"Content-Length: +5"), [400]),
        "a length with a minus": Shape(sized(b"Content-Length: -1"), [400]),
        "a length in base 16": Shape(sized(b"Content-Length: 0x5"), [400]),
        "a length with an underscore": Shape(sized(b"Content-Length: 1_0"), [400]),
        "a length with a space in it": Shape(sized(b"Content-Length: 1 2"), [400]),
        "a length with a vertical tab": Shape(sized(b"Content-Length: \x0b5"), [400]),
        "a length in other digits": Shape(sized("Content-Length: ٣".encode()), [400]),
        "an empty length": Shape(sized(b"Content-Length:"), [400]),
        "a length with zeros": Shape(sized(LENGTH.replace(b": ", b": 000")), [202]),
        "a length with tabs": Shape(sized(LENGTH.replace(b": ", b":\t") + b"\t"), [202]),
        "a length too large": Shape(sized(b"Content-Length: 16385"), [413]),
        "a length of 20 digits": Shape(sized(b"Content-Length: 99999999999999999999"), [413]),
        "a length that is right modulo 2**64": Shape(
            sized(b"Content-Length: %d" % (2**64 + len(BODY))), [413]
        ),
        "a length of 400 digits": Shape(sized(b"Content-Length: " + b"9" * 400), [400]),
        "no length": Shape(sized(), [400]),
        "a length of 0": Shape(said(HOST, TYPE, b"Content-Length: 0", body=SMUGGLED), [400]),
        "a space before the colon of a length": Shape(sized(LENGTH.replace(b":", b" :")), [400]),
        "a folded length": Shape(sized(LENGTH.replace(b": ", b":\r\n ")), [400], [202]),
    },
    "the coding": {
        "chunked": Shape(chunked(), [202]),
        "chunked in capitals": Shape(chunked(coding=CHUNKED.upper()), [202]),
        "chunked and one more": Shape(chunked() + SMUGGLED, [202], [202, 202]),
        "a chunked GET and one more": Shape(
            said(b"Host: a", CHUNKED, line=b"GET /v1/openapi.json HTTP/1.1", body=LAST) + SMUGGLED,
            [200],
            [200, 202],
        ),
        "chunked with a length": Shape(
            said(HOST, TYPE, CHUNKED, LENGTH, body=CHUNK + LAST), [400], [202]
        ),
        "a length with chunked": Shape(
            said(HOST, TYPE, b"Content-Length: 4", CHUNKED, body=CHUNK + LAST), [400], [202]
        ),
        "a length over an empty chunked body": Shape(
            said(HOST, TYPE, b"Content-Length: %d" % len(LAST + SMUGGLED), CHUNKED, body=LAST)
            + SMUGGLED,
            [400],
        ),
        "chunked in HTTP/1.0": Shape(
            said(HOST, TYPE, CHUNKED, line=LINE.replace(b"1.1", b"1.0"), body=CHUNK + LAST),
            [400],
            [202],
        ),
        "chunked twice": Shape(said(HOST, TYPE, CHUNKED, CHUNKED, body=CHUNK + LAST), [400]),
        "a folded coding": Shape(chunked(coding=CHUNKED.replace(b": ", b":\r\n ")), [400], [202]),
        **{
            f"the coding {coding.decode()!r}": Shape(
                chunked(coding=b"Transfer-Encoding: " + coding), [400]
            )
            for coding in (
                b"",
                b"gzip",
                b"identity",
                b"gzip, chunked",
                b"chunked, gzip",
                b"chunked, identity",
                b"chunked, chunked",
                b",chunked",
                b'"chunked"',
                b"xchunked",
                b"chunkedx",
                b"\x0bchunked",
            )
        },
        "a space before the colon of a coding": Shape(
            chunked(coding=CHUNKED.replace(b":", b" :")), [400]
        ),
    },
    "chunks": {
        "an extension": Shape(chunked(CHUNK.replace(b"\r\n", b";a=b\r\n", 1)), [202]),
        "extensions without end": Shape(
            chunked(b"".join(b"1;" + b"a" * 8_000 + b"\r\n \r\n" for _ in range(100)) + CHUNK),
            [413],
            [202],
        ),
        "an extension that ends with LF": Shape(chunked(CHUNK.replace(b"\r\n", b";a\n", 1)), [400]),
        "a size that ends with LF": Shape(chunked(CHUNK.replace(b"\r\n", b"\n", 1)), [400]),
        "a chunk that ends with LF": Shape(chunked(CHUNK[:-2] + b"\n"), [400]),
        "a space after a size": Shape(chunked(CHUNK.replace(b"\r\n", b" \r\n", 1)), [400], [202]),
        "a space before a size": Shape(chunked(b" " + CHUNK), [400]),
        "a size with 0x": Shape(chunked(b"0x" + CHUNK), [400]),
        "a size with a plus": Shape(chunked(b"+" + CHUNK), [400]),
        "a size with a minus": Shape(chunked(b"-1\r\n" + BODY + b"\r\n"), [400]),
        "an empty size": Shape(chunked(b"\r\n" + BODY + b"\r\n"), [400]),
        "a size with zeros": Shape(chunked(b"0000" + CHUNK), [202]),
        "a size with zeros without end": Shape(chunked(b"0" * 30 + CHUNK), [400]),
        "a size beyond 2**64": Shape(chunked(b"f" + BOMB), [400], []),
        "a size that is right modulo 2**64": Shape(chunked(b"1%013d" % 0 + CHUNK), [400], []),
        "a chunk that is shorter than its size": Shape(
            chunked(b"%x\r\n" % (len(BODY) + 2) + BODY + b"\r\n"), [400]
        ),
        "a chunk that is longer than its size": Shape(chunked(b"5\r\n" + BODY + b"\r\n"), [400]),
    },
    "trailers": {
        "a trailer": Shape(chunked(last=b"0\r\nX: a\r\n\r\n"), [202]),
        "a host in a trailer": Shape(chunked(last=b"0\r\nHost: other\r\n\r\n"), [202]),
        "a type in a trailer": Shape(
            said(HOST, CHUNKED, body=CHUNK + b"0\r\n" + TYPE + b"\r\n\r\n"), [415]
        ),
        "a length in a trailer": Shape(
            chunked(last=b"0\r\nContent-Length: 5\r\n\r\n") + SMUGGLED, [400], [202, 202]
        ),
        "a coding in a trailer": Shape(
            chunked(last=b"0\r\n" + CHUNKED + b"\r\n\r\n") + SMUGGLED, [400], [202, 202]
        ),
        "a trailer without a colon": Shape(chunked(last=b"0\r\nX\r\n\r\n"), [400]),
        "a trailer with NUL": Shape(chunked(last=b"0\r\nX: \0\r\n\r\n"), [400]),
        "trailers without end": Shape(chunked(last=b"0\r\n" + b"X: a\r\n" * 50_000), [413], [400]),
        "a trailer without end": Shape(chunked(last=b"0\r\nX: " + b"a" * 500_000), [413], [400]),
    },
    "lines of the head": {
        "a folded line": Shape(post(b"X: a\r\n b"), [400], [202]),
        "a first line that is folded": Shape(post(host=b" X: a\r\n" + HOST), [400]),
        "a space before a colon": Shape(post(b"X : a"), [400]),
        "no colon": Shape(post(b"X"), [400]),
        "no name": Shape(post(b": a"), [400]),
        "NUL in a name": Shape(post(b"X\0: a"), [400]),
        "NUL in a value": Shape(post(b"X: \0"), [400]),
        "a control character": Shape(post(b"X: \x01"), [400], [202]),
        "a parenthesis in a name": Shape(post(b"X(: a"), [400]),
        "another byte than ASCII in a name": Shape(post(b"X\xff: a"), [400]),
        "CR in a value": Shape(post(b"X: a\rX: b"), [400]),
        "CR before the end of a line": Shape(post(b"X: a\r"), [400]),
        "LF in the head": Shape(post(b"X: a\nX: b"), [400], [202]),
        "LF in the head before the end": Shape(post(b"X: a\n\r\n" + SMUGGLED), [400]),
    },
    "the first line": {
        "an empty line first": Shape(b"\r\n" + post(), [400]),
        "empty lines first": Shape(b"\r\n\r\n" + post(), [400]),
        "LF first": Shape(b"\n" + post(), [400]),
        "a space first": Shape(b" " + post(), [400]),
        "no version": Shape(line(b" HTTP/1.1", b""), [400]),
        **{
            f"the version {version.decode()}": Shape(line(b"HTTP/1.1", version), [400], before)
            for version, before in (
                (b"HTTP/0.9", [202]),
                (b"HTTP/1.2", [202]),
                (b"HTTP/2.0", [202]),
                (b"HTTP/1.10", None),
                (b"HTTP/1", None),
                (b"http/1.1", None),
                (b"ICE/1.0", None),
                (b"RTSP/1.0", None),
                (b"HTTP/1.1 ", None),
            )
        },
        "two spaces": Shape(line(b" /", b"  /"), [400]),
        "a tab": Shape(line(b" /", b"\t/"), [400]),
        "a space in the path": Shape(line(b"beat", b"be at"), [400]),
        "NUL in the path": Shape(line(b"beat", b"be\0at"), [400]),
        "another byte than ASCII in the path": Shape(line(b"beat", b"be\xffat"), [400]),
        "a URL": Shape(line(b"/v1", b"http://other/v1"), [400], [404]),
        "an authority": Shape(line(b"/v1/heartbeat", b"collector:80"), [400], [404]),
        "an asterisk": Shape(line(b"/v1/heartbeat", b"*"), [400], [404]),
        "a fragment": Shape(line(b"beat", b"beat#a"), [400], [404]),
        "a fragment after a query": Shape(line(b"beat", b"beat?a#b"), [400], [202]),
        "a query": Shape(line(b"beat", b"beat?a=b?c"), [202]),
        "two slashes": Shape(line(b"/v1", b"//v1"), [404]),
        "two slashes and a host": Shape(line(b"/v1", b"//collector/v1"), [404]),
        "dots": Shape(line(b"/v1", b"/v1/../v1"), [404]),
        "an escaped letter": Shape(line(b"heart", b"he%61rt"), [202]),
        "a method in lower case": Shape(line(b"POST", b"post"), [400], [405]),
        "a method that nobody knows": Shape(line(b"POST", b"BREW"), [400], [405]),
        "a tunnel": Shape(
            said(b"Host: a:80", line=b"CONNECT a:80 HTTP/1.1", body=SMUGGLED), [400], [404]
        ),
        "a tunnel to a path": Shape(line(b"POST", b"CONNECT") + SMUGGLED, [400], [405]),
        "HTTP/2": Shape(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400], [404]),
        "TLS": Shape(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", [400]),
    },
    "upgrades": {
        **{
            f"an upgrade to {protocol.decode()}, and one more": Shape(
                post(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + protocol) + SMUGGLED,
                [202, 202],
            )
            for protocol in (b"h2c", b"websocket")
        },
        "an upgrade without a body, and one more": Shape(
            GET.replace(b"Host: a", b"Host: a\r\nConnection: Upgrade\r\nUpgrade: h2c") + SMUGGLED,
            [200, 202],
        ),
    },
    "the size of the head": {
        "a head that is almost too large": Shape(
            post(b"X: " + b"a" * (MAX_HEAD_BYTES - len(post()) + len(BODY) - 5)), [202]
        ),
        "a head that is a byte too large": Shape(
            post(b"X: " + b"a" * (MAX_HEAD_BYTES - len(post()) + len(BODY) - 4)), [400], [202]
        ),
        "a head of many lines": Shape(post(*[b"X: a"] * 2_000), [400], [202]),
        "a head of 1 MB": Shape(post(b"X: " + b"a" * 1_000_000), [400]),
        "a head without end": Shape(said(HOST, b"X: " + b"a" * 9_000, body=b"")[:-4], [400]),
        "a path that is too long": Shape(line(b"beat", b"beat?" + b"a" * 9_000), [400], [202]),
    },
}
SHAPES = {name: shape for group in GROUPS.values() for name, shape in group.items()}


@pytest.fixture(scope="module")
def collector(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collector]:
    log = tmp_path_factory.mktemp("collector") / "log"
    with databases.copy_of("template1") as url:
        assert run("release", COLLECTOR_DATABASE_URL=url).returncode == 0
        with serving(url, log) as running:
            yield running
            assert running.log() == [f"collector.ready port={running.port}"]


def answers(connection: socket.socket, expected: int) -> tuple[list[int], bool]:
    """Return the statuses of all answers, and whether the server has closed."""
    received = bytearray()
    deadline = time.monotonic() + 10
    while True:
        statuses = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
        # Whatever comes too much comes soon after what was expected.
        connection.settimeout(0.2 if len(statuses) >= expected else 10)
        try:
            data = connection.recv(65_536)
        except TimeoutError:
            return statuses, False
        except ConnectionResetError:
            return statuses, True
        if not data:
            return statuses, True
        received += data
        assert time.monotonic() < deadline


@pytest.mark.parametrize("group", GROUPS)
def test_each_shape_has_one_answer_and_stores_what_was_accepted(
    collector: Collector, group: str
) -> None:
    for name, shape in GROUPS[group].items():
        query(collector.url, "TRUNCATE heartbeat, install")
        with socket.create_connection(("127.0.0.1", collector.port)) as connection:
            try:
                connection.sendall(shape.words)
            except OSError:  # it was refused before all of it was sent
                assert shape.statuses[-1] >= 400, name
            statuses, closed = answers(connection, len(shape.statuses))
        assert statuses == shape.statuses, name
        assert closed or (statuses[-1] < 400 and CHUNKED not in shape.words), name
        assert len(collector.rows()) == statuses.count(202), name


def test_nothing_is_taken_that_h11_refused() -> None:
    for name, shape in SHAPES.items():
        before = shape.statuses if shape.of_h11 is None else shape.of_h11
        assert shape.statuses.count(202) <= before.count(202), name


@pytest.mark.parametrize(
    "shape", ["two", "chunked", "a size with zeros without end", "a trailer", "TLS"]
)
def test_it_makes_no_difference_in_which_parts_a_request_comes(
    collector: Collector, shape: str
) -> None:
    query(collector.url, "TRUNCATE heartbeat, install")
    words, expected, _ = SHAPES[shape]
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(words)):
            try:
                connection.sendall(words[at : at + 1])
            except OSError:
                break
            time.sleep(0.0005)
        assert answers(connection, len(expected))[0] == expected
    assert len(collector.rows()) == expected.count(202)


def test_many_requests_at_once_are_answered_one_by_one(collector: Collector) -> None:
    query(collector.url, "TRUNCATE heartbeat, install")
    health = GET.replace(b"/v1/openapi.json", b"/healthz")
    with socket.create_connection(("127.0.0.1", collector.port)) as connection:
        connection.sendall(health * 300 + SMUGGLED)
        assert answers(connection, 301)[0] == [200] * 300 + [202]


@pytest.mark.parametrize(
    ("part", "owner"),
    [
        *((name, httptools_impl.HttpToolsProtocol) for name in ("on_url", "on_body")),
        *((name, httptools_impl.RequestResponseCycle) for name in ("run_asgi", "send", "receive")),
        *(
            (name, httptools.HttpRequestParser)
            for name in ("feed_data", "get_http_version", "should_keep_alive")
        ),
    ],
)
def test_what_the_connection_uses_of_its_libraries_is_still_there(part: str, owner: type) -> None:
    assert callable(getattr(owner, part))
