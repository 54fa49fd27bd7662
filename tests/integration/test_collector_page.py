"""The collector's page and its two other forms, over a real database."""

import asyncio
import csv
import io
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, text
from starlette.applications import Starlette

from app.collector import page, store
from app.collector.daily import MOVEMENTS, VALUES
from migrations import migrate
from tests.browser.collector import seed
from tests.conftest import Databases
from tests.database import counted

UNTIL = datetime(2026, 5, 2, 18, tzinfo=UTC)
FORMS = ("/", "/v1/stats.json", "/v1/stats.csv")


def get(engine: Engine, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=Starlette(routes=[*page.routes(engine)]))
        async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def fleet(databases: Databases) -> Iterator[Engine]:
    """A collector that has heard of a fleet for forty days."""
    with databases.copy_of("template1") as url:
        seed(url, installs=250, days=40, until=UNTIL)
        engine = store.connect(url)
        yield engine
        engine.dispose()


@pytest.fixture
def empty(empty_database: str) -> Iterator[Engine]:
    """A collector that has not counted yet."""
    engine = store.connect(empty_database)
    with engine.connect() as connection:
        migrate(connection, "collector")
    yield engine
    engine.dispose()


def words(html: str) -> str:
    """What a reader sees outside of the charts."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", " ", html)))


def document(engine: Engine, query: str = "") -> Any:
    return get(engine, f"/v1/stats.json{query}").json()


def test_the_page_answers_with_the_numbers_of_the_document(fleet: Engine) -> None:
    today = document(fleet)["days"][-1]["movements"]
    said = words(get(fleet, "/").text)
    assert today["active_2d"] > 100
    assert f"{today['active_2d']:,} installs were heard of in the last 48 hours" in said
    for number in (today["active_7d"], today["active_30d"]):
        assert f" {number:,} " in said


def test_the_csv_holds_the_numbers_of_the_document(fleet: Engine) -> None:
    told, response = document(fleet), get(fleet, "/v1/stats.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = {tuple(row[:3]): row[3] for row in csv.reader(io.StringIO(response.text))}
    assert rows.pop(("day", "metric", "value")) == "installs"
    expected = {}
    for each in told["days"]:
        for name, installs in each["movements"].items():
            expected[each["day"], name, ""] = installs
        for version, installs in [*each["versions"].items(), ("*", each["other_versions"])]:
            expected[each["day"], "version", version] = installs
    for name, spread in told["values"].items():
        for group in spread["groups"]:
            expected[told["until"], name, group["value"]] = group["installs"]
        expected[told["until"], name, "*"] = spread["folded_installs"]
    for name, used in told["features"].items():
        expected[told["until"], name, "used"] = used["installs"]
    assert rows.keys() == expected.keys()
    for name, installs in expected.items():
        exact = installs is not None
        assert rows[name] == str(installs) if exact else "fewer than 5" in rows[name]


def test_the_document_has_every_day_and_every_value(fleet: Engine) -> None:
    told = document(fleet, "?days=30")
    assert (told["since"], told["until"]) == ("2026-04-03", "2026-05-02")
    assert told["as_of"] == "2026-05-02T18:00:00+00:00"
    assert [each["day"] for each in told["days"]] == sorted({each["day"] for each in told["days"]})
    assert len(told["days"]) == 30
    assert {*told["days"][0]["movements"]} == {*MOVEMENTS}
    assert {*told["values"]} == {"edition", *VALUES}


def test_days_before_the_first_count_are_not_shown_as_zero(fleet: Engine) -> None:
    assert len(document(fleet, "?days=365")["days"]) == 40


def test_a_filter_leaves_only_its_own_installs_and_is_said_in_a_sentence(fleet: Engine) -> None:
    everyone = document(fleet)
    edition = everyone["values"]["edition"]["groups"][-1]
    told = document(fleet, f"?edition={edition['value']}")
    assert told["days"][-1]["movements"]["active_2d"] == edition["installs"]
    html = get(fleet, f"/?days=30&edition={edition['value']}").text
    assert f"Only installs in the {edition['value']} edition, from 3 April 2026" in words(html)
    assert f"<option selected>{edition['value']}</option>" in html
    assert '<option value="30" selected>Last 30 days</option>' in html
    assert f"/v1/stats.json?days=30&amp;edition={edition['value']}" in html


def test_an_empty_choice_of_the_form_is_no_filter(fleet: Engine) -> None:
    assert document(fleet, "?days=90&version=&edition=") == document(fleet)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("days=31", "The number of days has to be 30, 90 or 365."),
        ("days=030", "The number of days has to be 30, 90 or 365."),
        ("version=1.2", "A version has to look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("version=%3Cb%3E", "A version has to look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("version=1.2.3%0A", "A version has to look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("edition=CE", "The edition has to be ce or ee."),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(
    fleet: Engine, form: str, query: str, sentence: str
) -> None:
    response = get(fleet, f"{form}?{query}")
    assert response.status_code == 400
    assert sentence in response.text
    assert "<b>" not in response.text
    assert response.headers["cache-control"] == "no-store"
    kind = {"/": "text/html", "/v1/stats.json": "application/json"}.get(form, "text/plain")
    assert response.headers["content-type"].startswith(kind)


@pytest.mark.parametrize("form", FORMS)
def test_a_version_that_is_not_told_gets_the_answer_of_one_that_does_not_exist(
    fleet: Engine, form: str
) -> None:
    told = {*document(fleet)["all_versions"]}
    with fleet.connect() as connection:
        rows = connection.execute(text("SELECT DISTINCT version FROM daily WHERE version <> '*'"))
        untold = next(version for (version,) in rows if version not in told)
    there, missing = (
        get(fleet, f"{form}?version={version}").text.replace(version, "VERSION")
        for version in (untold, "99999.0.0")
    )
    assert _without_choices(there) == _without_choices(missing)
    assert "Too few installs" in there or form != "/"


def _without_choices(answer: str) -> str:
    # What was asked for stands at its own place among the versions.
    return re.sub(r"<option.*?</option>\s*", "", answer)


@pytest.mark.parametrize("path", [*FORMS, "/?days=1", "/v1/stats.json?days=1", "/?version=9.9.9"])
def test_every_answer_has_strict_headers(fleet: Engine, path: str) -> None:
    headers = get(fleet, path).headers
    assert headers["content-security-policy"] == (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    )
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] in {"private, max-age=60", "no-store"}


def test_the_style_is_kept_for_ever_under_a_name_of_its_content(fleet: Engine) -> None:
    (path,) = re.findall(r'<link rel="stylesheet" href="([^"]*)">', get(fleet, "/").text)
    style = get(fleet, path)
    assert style.status_code == 200
    assert style.headers["content-type"] == "text/css; charset=utf-8"
    assert style.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert get(fleet, path.replace(".css", "0.css")).status_code == 404


@pytest.mark.parametrize("path", ["/", "/?days=1", "/?version=9.9.9"])
def test_a_page_has_no_script_no_inline_style_and_nothing_from_elsewhere(
    fleet: Engine, path: str
) -> None:
    html = get(fleet, path).text
    assert not re.search(r"<script|<style|\sstyle=|\son[a-z]+=|javascript:", html)
    assert {*re.findall(r"""https?://[^"' ]*""", html)} == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("form", FORMS)
def test_before_anything_was_counted_the_answer_is_kind(empty: Engine, form: str) -> None:
    response = get(empty, form)
    assert response.status_code == 200
    if form == "/":
        assert "No install has been heard of yet" in words(response.text)


def test_when_nothing_was_found_to_count_the_page_is_as_kind(empty: Engine) -> None:
    with empty.begin() as connection:
        connection.execute(text("INSERT INTO measured VALUES ('2026-05-02', '2026-05-02T12:00Z')"))
    assert "No install has been heard of yet" in words(get(empty, "/").text)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_takes_one_transaction_that_cannot_write(fleet: Engine, form: str) -> None:
    modes = set()

    def look(_connection: Any, cursor: Any, *_: Any) -> None:
        modes.add((cursor.connection.read_only, cursor.connection.isolation_level.name))

    event.listen(fleet, "before_cursor_execute", look)
    try:
        with counted() as cost:
            assert get(fleet, f"{form}?days=365&edition=ce").status_code == 200
    finally:
        event.remove(fleet, "before_cursor_execute", look)
    assert modes == {(True, "REPEATABLE_READ")}
    assert cost.each == [6]


def test_no_install_is_read(fleet: Engine, databases: Databases) -> None:
    name = fleet.url.database
    assert name is not None
    before = document(fleet)
    fleet.dispose()  # a database that is in use cannot be copied
    with databases.copy_of(name) as url:
        engine = store.connect(url)
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE install, heartbeat"))
        assert document(engine) == before
        engine.dispose()


@pytest.mark.parametrize("form", FORMS)
def test_without_its_database_an_answer_says_so(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = store.connect("postgresql+psycopg://someone:opensesame@127.0.0.1:1/nowhere")
    response = get(engine, form)
    assert response.status_code == 503
    assert "The database is not available." in response.text
    assert caplog.messages == ["collector.failed stage=page error=OperationalError"]


def test_what_takes_too_long_is_given_up(empty: Engine) -> None:
    with empty.begin() as other:
        other.execute(text("LOCK TABLE measured IN ACCESS EXCLUSIVE MODE"))
        assert get(empty, "/v1/stats.json").status_code == 503
    assert get(empty, "/v1/stats.json").status_code == 200


def test_a_year_of_many_versions_is_less_than_200_kb(empty: Engine) -> None:
    with empty.begin() as connection:
        for statement in YEAR:
            connection.execute(text(statement), {"metrics": [*MOVEMENTS], "fields": [*VALUES]})
    html = get(empty, "/?days=365")
    style = re.search(r"/static/style-[0-9a-f]+\.css", html.text)
    assert style is not None
    assert html.text.count('<tr><th scope="row">202') == 3 * 365
    assert len(html.content) + len(get(empty, style[0]).content) < 200_000


YEAR = (
    """
    INSERT INTO measured SELECT day, day + interval '1 day'
    FROM generate_series(date '2025-06-01', '2026-06-01', interval '1 day') AS day
    """,
    """
    INSERT INTO daily
    SELECT day, metric, '1.' || minor || '.0', edition, '',
        50000 + minor * 997 + extract(day FROM day)::integer * 211
    FROM generate_series(date '2025-06-01', '2026-06-01', interval '1 day') AS day,
        unnest(CAST(:metrics AS text[])) AS metric,
        generate_series(1, 40) AS minor, unnest(ARRAY['ce', 'ee']) AS edition
    """,
    """
    INSERT INTO daily
    SELECT '2026-06-01', field, '1.40.0', edition, value, 40000
    FROM unnest(CAST(:fields AS text[])) AS field, unnest(ARRAY['ce', 'ee']) AS edition,
        unnest(CASE
            WHEN field IN ('python_version', 'stack.postgres_version') THEN ARRAY['13', '14']
            ELSE ARRAY['0', '1-10', '10-100', '100-1k', '1k-10k', '10k+']
        END) AS value
    """,
)
