"""The docs say what the code does: what is generated is fresh, and ConsentOS's page comes true."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.payload import Heartbeat1, fields
from bench import collector, report
from docs import generate
from tests.prove.mutations import MUTATIONS
from tests.unit.published import EXAMPLE


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_json_schema_in_the_docs_is_the_payloads_own() -> None:
    assert generate.SCHEMA.read_text() == generate.schema(), "run `make docs`"


def test_the_field_table_in_the_docs_is_the_payloads_own() -> None:
    page = generate.PAGE.read_text()
    assert page == generate.with_table(page), "run `make docs`"


def test_the_field_table_has_one_full_row_for_each_field() -> None:
    rows = [row.strip("| ").split(" | ") for row in generate.table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{name}`" for name, _ in fields()]
    assert all(len(row) == 3 and all(row) for row in rows)


def test_the_rest_of_the_page_is_left_as_its_author_wrote_it() -> None:
    page = "# Before\n\n<!-- fields -->\nstale\n<!-- /fields -->\n\nAfter |\n"
    written = generate.with_table(page)
    assert written.startswith("# Before\n\n<!-- fields -->\n| Field |")
    assert written.endswith("|\n<!-- /fields -->\n\nAfter |\n")
    assert "stale" not in written
    assert generate.with_table(written) == written


@pytest.mark.parametrize(
    "page",
    [
        "no marker",
        "<!-- fields --> only",
        "<!-- /fields --> first <!-- fields -->",
        "<!-- fields --><!-- /fields --> and again <!-- fields --><!-- /fields -->",
    ],
)
def test_a_page_without_its_two_markers_is_refused_and_not_written_over(page: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        generate.with_table(page)


def test_the_payload_that_consentos_documents_is_a_heartbeat() -> None:
    heartbeat = Heartbeat1.model_validate_json(EXAMPLE)
    assert heartbeat.model_dump() == json.loads(EXAMPLE)


def test_the_documented_payload_has_exactly_our_fields_in_our_order() -> None:
    assert list(leaves(json.loads(EXAMPLE))) == [name for name, _ in fields()]


def test_the_body_is_the_documented_payload_without_its_spaces() -> None:
    compact = json.dumps(json.loads(EXAMPLE), separators=(",", ":"))
    assert Heartbeat1.model_validate_json(EXAMPLE).canonical() == compact


def test_the_tables_of_the_measurements_are_those_of_their_results() -> None:
    page = report.PAGE.read_text()
    assert page == report.with_tables(page), "run `python -m bench.report`"


def test_the_table_of_the_collectors_bench_is_that_of_its_results() -> None:
    page = (generate.PAGE.parent / "collector.md").read_text()
    assert collector.table(json.loads(collector.RESULT.read_text())) in page


TESTS = Path(__file__).parents[1]
NAMED = set(
    re.findall(
        r"`(\w+/test_\w+\.py::test_\w+)`", (generate.PAGE.parent / "guarantees.md").read_text()
    )
)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_test_that_the_guarantees_name_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert f"def {test}(" in (TESTS / file).read_text()


def test_every_proof_of_a_promise_is_named_in_the_guarantees() -> None:
    assert {mutation.noticed_by for mutation in MUTATIONS} <= NAMED


def test_every_promise_is_broken_by_some_mutation() -> None:
    assert {mutation.promise for mutation in MUTATIONS} == set(range(1, 10))
