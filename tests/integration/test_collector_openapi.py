"""The collector is what its description says, and holds out against whoever reads it closely."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from sqlalchemy import NullPool, create_engine
from starlette.routing import Route

from app.collector import openapi, store, web
from app.payload import SCHEMA_VERSION, SCHEMAS, parse
from app.settings.collector import CollectorSettings
from migrations import migrate
from tests.conftest import Databases
from tests.support.collector import BODY, NOWHERE, Collector, changed, of, query, serving


def no_server_error_but_for_what_is_meant(
    context: CheckContext, response: Response, case: Case[Any]
) -> bool | None:
    if case.path == "/readyz" and response.status_code == 503:
        return None
    newer = "does not support telemetry_schema" in response.text
    if newer and (response.status_code, response.headers["retry-after"]) == (503, ["21600"]):
        assert isinstance(case.body, dict)
        version = case.body["telemetry_schema"]
        assert isinstance(version, int)
        assert version > SCHEMA_VERSION
        return None
    return not_a_server_error(context, response, case)


CHECKS = [
    no_server_error_but_for_what_is_meant,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
DOCUMENT = openapi.document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
NOTHING_TO_GET_WRONG = {
    *("/healthz", "/readyz", "/v1/openapi.json"),
    *("/badge.svg", "/v1/badge.json", "/feed.atom", "/heartbeat", "/v1/heartbeat.schema.json"),
}
CASES = [
    (path, method, mode)
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
    for mode in GenerationMode
    if path not in NOTHING_TO_GET_WRONG or mode is GenerationMode.POSITIVE
]


@pytest.fixture(scope="module")
def collector(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collector]:
    """A collector that has something to show."""
    with databases.copy_of("template1") as url:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            migrate(connection, "collector")
        heartbeats = [parse(of(number)) for number in range(30)]
        with create_engine(url, poolclass=NullPool).begin() as connection:
            store.insert(connection, heartbeats)
        log = tmp_path_factory.mktemp("collector") / "log"
        with serving(url, log) as running:
            yield running
        assert running.failures("") == []


@pytest.fixture
def fresh(collector: Collector) -> Collector:
    """The collector, which takes what an earlier test has deleted."""
    collector.let_the_forgotten_come_again()
    return collector


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
@settings(
    max_examples=80,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_whatever_is_asked_the_answer_is_as_described(
    fresh: Collector, path: str, method: str, mode: GenerationMode, data: st.DataObject
) -> None:
    operation = SCHEMA[path][method]
    case = data.draw(operation.as_strategy(generation_mode=mode))
    case.call_and_validate(base_url=f"http://127.0.0.1:{fresh.port}", checks=CHECKS)


def test_it_is_served_as_it_is(collector: Collector) -> None:
    response = collector.client.get("/v1/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == json.loads(json.dumps(DOCUMENT))
    assert DOCUMENT["openapi"].startswith("3.1.")


def test_every_route_is_described_but_the_style() -> None:
    app = web.create_app(store.connect(NOWHERE), CollectorSettings())
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)
    paths = {route.path for route in routes if not route.path.startswith("/static/")}
    assert paths == set(DOCUMENT["paths"])


def test_a_heartbeat_may_be_of_each_schema_and_each_is_the_payloads_own() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    named = [f"#/components/schemas/{model.__name__}" for model in SCHEMAS.values()]
    assert schemas["Heartbeat"] == {"oneOf": [{"$ref": name} for name in named]}
    for model in SCHEMAS.values():
        own = model.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = own.pop("$defs")
        assert schemas[model.__name__] == own
        for name, definition in parts.items():
            assert schemas[name] == definition


def test_the_example_that_is_published_fits(collector: Collector) -> None:
    before = query(collector.url, "SELECT count(*) FROM heartbeat")[0][0]
    SCHEMA["/v1/heartbeat"]["post"].Case(
        body=json.loads(BODY), media_type="application/json"
    ).call_and_validate(base_url=f"http://127.0.0.1:{collector.port}", checks=CHECKS)
    assert query(collector.url, "SELECT count(*) FROM heartbeat")[0][0] == before + 1


def test_each_error_has_the_form_that_is_described(collector: Collector) -> None:
    url = f"http://127.0.0.1:{collector.port}"
    operation = SCHEMA["/v1/heartbeat"]["post"]
    for body, kind, status in (
        (b"{}", "application/json", 400),
        (b" " * 20_000, "application/json", 413),
        (BODY.encode(), "text/plain", 415),
        (changed(telemetry_schema=2).encode(), "application/json", 503),
    ):
        response = collector.client.post(
            f"{url}/v1/heartbeat", content=body, headers={"content-type": kind}
        )
        assert response.status_code == status
        assert str(status) in operation.definition.raw["responses"]
        assert set(response.json()) <= {"error", "details"}
