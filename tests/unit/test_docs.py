"""The docs agree with the code: generated parts are current, and ConsentOS's page is correct."""

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app import grants, payload
from app.collector import outcomes
from app.payload import Heartbeat1, fields
from app.settings.collector import CollectorSettings
from bench import collector, pages, recount, report, weeks
from docs import generate
from tests.prove.mutations import MUTATIONS
from tests.support.published import DOCUMENTED, EXAMPLE

TESTS = Path(__file__).parents[1]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("version", sorted(payload.SCHEMAS))
def test_a_schema_is_as_it_was_published(version: int) -> None:
    file = generate.file_of(version)
    assert file.exists(), f"schema {version} is not published yet: run `make docs`"
    assert file.read_text() == generate.schema(version), str(generate.PublishedError(version))


def test_a_schema_that_was_published_is_still_known() -> None:
    published = {file.name for file in generate.DOCS.glob("heartbeat.v*.schema.json")}
    known = {generate.file_of(version).name for version in payload.SCHEMAS}
    assert published == known, "stored rows use it: leave its model in payload.SCHEMAS"


def test_the_docs_do_not_publish_a_schema_over_another(tmp_path: Path) -> None:
    generate.publish(tmp_path)
    file = generate.file_of(1, tmp_path)
    assert file.read_text() == generate.schema(1)
    former = generate.schema(1).replace('"ee"', '"enterprise"')
    file.write_text(former)
    new = payload.SCHEMA_VERSION + 1
    with pytest.raises(
        generate.PublishedError, match=rf"^Schema 1 is published: .* add schema {new} "
    ):
        generate.publish(tmp_path)
    assert file.read_text() == former


def test_a_field_has_the_same_form_in_every_schema_that_has_it() -> None:
    forms: dict[str, Any] = {}
    for version, model in payload.SCHEMAS.items():
        for name, field in payload.fields(model):
            form = forms.setdefault(name, field.annotation), field.annotation
            assert len({*form}) == 1, f"give {name} of schema {version} a new name"


def test_the_field_table_in_the_docs_is_the_payloads_own() -> None:
    page = generate.PAGE.read_text()
    assert page == generate.with_table(page), "run `make docs`"


def test_the_field_table_has_one_full_row_for_each_field() -> None:
    rows = [row.strip("| ").split(" | ") for row in generate.table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{name}`" for name, _ in fields()]
    assert all(len(row) == 3 and all(row) and row[2] != "None" for row in rows)


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


A_BODY = re.compile(r"^\{$.*?^\}$", re.DOTALL | re.MULTILINE)
EXAMPLES = {
    "telemetry.md": EXAMPLE,
    "README.md": A_BODY.findall((TESTS.parent / "README.md").read_text())[0],
}


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_body_that_a_page_shows_is_of_the_newest_schema(page: str) -> None:
    assert payload.parse(EXAMPLES[page]).telemetry_schema == payload.SCHEMA_VERSION


def test_the_page_links_the_newest_schema() -> None:
    assert f"]({generate.file_of(payload.SCHEMA_VERSION).name})" in generate.PAGE.read_text()


def test_the_page_shows_the_user_agent_of_the_newest_schema() -> None:
    assert (
        f"`User-Agent: consentos-telemetry/{payload.SCHEMA_VERSION}`" in generate.PAGE.read_text()
    )


PRIVACY = (generate.DOCS / "privacy.md").read_text()


def test_the_privacy_page_says_how_many_fields_there_are() -> None:
    assert f"one JSON body of {len([*fields()])} fields a day" in PRIVACY


@pytest.mark.parametrize("name", [name for name, _ in fields()])
def test_the_privacy_page_has_a_category_for_each_field(name: str) -> None:
    categories = PRIVACY.partition("## Categories of data")[2].partition("###")[0]
    assert any(fnmatch(name, each) for each in re.findall(r"`([a-z_.*]+)`", categories))


@pytest.mark.parametrize("page", ["privacy.md", "telemetry.md", "guarantees.md"])
def test_a_page_says_how_many_columns_of_consentos_are_read(page: str) -> None:
    columns = sum(
        len(rights["SELECT"])
        for table, rights in grants.RIGHTS.items()
        if not table.startswith("telemetry_")
    )
    assert f"{columns} columns" in (generate.DOCS / page).read_text()


# ConsentOS's own page is about schema 1.


def test_the_payload_that_consentos_documents_is_a_heartbeat() -> None:
    heartbeat = Heartbeat1.model_validate_json(DOCUMENTED)
    assert heartbeat.model_dump() == json.loads(DOCUMENTED)


def test_the_documented_payload_has_exactly_our_fields_in_our_order() -> None:
    assert list(leaves(json.loads(DOCUMENTED))) == [name for name, _ in fields(Heartbeat1)]


def test_the_body_is_the_documented_payload_without_its_spaces() -> None:
    compact = json.dumps(json.loads(DOCUMENTED), separators=(",", ":"))
    assert Heartbeat1.model_validate_json(DOCUMENTED).canonical() == compact


def test_the_tables_of_the_measurements_are_those_of_their_results() -> None:
    page = report.PAGE.read_text()
    assert page == report.with_tables(page), "run `python -m bench.report`"


def test_the_table_of_the_collectors_bench_is_that_of_its_results() -> None:
    page = (generate.PAGE.parent / "collector.md").read_text()
    assert collector.table(json.loads(collector.RESULT.read_text())) in page


@pytest.mark.parametrize("bench", [recount, weeks, pages], ids=["counting", "weeks", "pages"])
def test_the_table_of_what_that_costs_is_that_of_its_results(bench: ModuleType) -> None:
    page = (generate.PAGE.parent / "collector.md").read_text()
    assert bench.table(json.loads(bench.RESULT.read_text())) in page


NAMED = set(
    re.findall(
        r"`(\w+/test_\w+\.py::test_\w+)`", (generate.PAGE.parent / "guarantees.md").read_text()
    )
)


def test_a_test_that_the_guarantees_name_exists() -> None:
    assert NAMED
    for name in sorted(NAMED):
        file, _, test = name.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(), name


def test_every_proof_of_a_promise_is_named_in_the_guarantees() -> None:
    assert {mutation.noticed_by for mutation in MUTATIONS} <= NAMED


def test_every_promise_is_broken_by_some_mutation() -> None:
    guarantees = (generate.DOCS / "guarantees.md").read_text()
    promises = {int(number) for number in re.findall(r"(?m)^### (\d+)\. ", guarantees)}
    assert {mutation.promise for mutation in MUTATIONS} == promises
    assert promises == set(range(1, 10))
    assert guarantees.startswith("# Guarantees\n\nNine promises.")


COLLECTOR = (generate.DOCS / "collector.md").read_text()


def first_column(heading: str) -> list[str]:
    """Return the names in the first column of the table under a heading of the collector's page."""
    section = re.split(r"(?m)^#+ ", COLLECTOR.partition(f"# {heading}\n")[2])[0]
    return re.findall(r"(?m)^\| `([^`|]+)` \|", section)


def test_the_collectors_page_lists_every_outcome_and_no_other() -> None:
    assert sorted(first_column("Outcomes")) == sorted(outcomes.OUTCOMES)


def test_the_collectors_page_lists_every_setting_and_the_proxys() -> None:
    settings = {name.upper() for name in CollectorSettings.model_fields}
    assert set(first_column("Run it")) == settings | {"FORWARDED_ALLOW_IPS"}
