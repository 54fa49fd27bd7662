"""The collector's page and its two other forms, over a real database."""

import asyncio
import csv
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, text
from starlette.applications import Starlette

from app.collector import answers, exports, page, recount, stats, store
from app.collector.answers import Answers
from app.collector.daily import FLOWS, STOCKS, VALUES
from app.collector.names import OTHER
from app.collector.phrases import long_date
from app.collector.reading import Readers
from app.collector.rendering import Templates
from app.collector.stats import UNUSED
from app.payload import parse
from tests.browser.collector import seed
from tests.conftest import Databases
from tests.support.collector import of
from tests.support.database import counted

FORMS = ("/", "/v1/stats.json", "/v1/stats.csv")
NOBODY = {"active": 0, "not_established": 0}


def ask(app: Starlette, path: str, **headers: str) -> httpx.Response:
    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.get(path, headers=given)

    return asyncio.run(answered())


def serve(engine: Engine, *, private: bool = False) -> Starlette:
    templates = Templates(private=private)
    return Starlette(routes=[*page.routes(Readers(engine), templates, private=private)])


def get(engine: Engine, path: str) -> httpx.Response:
    """Ask a process that has answered nothing yet."""
    return ask(serve(engine), path)


@pytest.fixture(scope="module")
def fleet(databases: Databases) -> Iterator[Engine]:
    """A collector with the heartbeats of a fleet on forty days."""
    with databases.copy_of("template1") as url:
        seed(url, installs=250, days=40, until=datetime.now(UTC))
        engine = store.connect(url)
        yield engine
        engine.dispose()


@pytest.fixture
def looking_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each request look at whether there is something new."""
    monkeypatch.setattr(answers, "CHECK_SECONDS", 0.0)


def yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


def shown(installs: int | None) -> str:
    return "fewer than 5" if installs is None else f"{installs:,}"


@contextmanager
def copied(engine: Engine, databases: Databases) -> Iterator[Engine]:
    """A copy of a database, to change."""
    name = engine.url.database
    assert name is not None
    engine.dispose()  # a database that is in use cannot be copied
    with databases.copy_of(name) as url:
        copy = store.connect(url)
        yield copy
        copy.dispose()


def words(html: str) -> str:
    """What a reader sees outside of the charts."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"<svg.*?</svg>", " ", html)))


def document(engine: Engine, query: str = "") -> Any:
    return get(engine, f"/v1/stats.json{query}").json()


def test_the_page_answers_with_the_numbers_of_the_document(fleet: Engine) -> None:
    numbers = document(fleet)
    last = numbers["days"][-1]["movements"]
    said = words(get(fleet, "/").text)
    assert last["active_2d"] > 100
    ended = long_date(date.fromisoformat(numbers["until"]))
    assert f"{last['active_2d']:,} installs were active at the end of {ended}" in said
    change = last["active_2d"] - numbers["a_month_before"]["active"]
    assert f"+{change:,} (" in said
    for number in (last["active_7d"], last["active_30d"]):
        assert f" {number:,} " in said
    live = numbers["live"]
    assert f"{live['active']:,} installs are active" in said
    assert f"and {shown(live['not_established'])} more are not established yet." in said


def test_the_last_day_is_the_last_that_is_over(fleet: Engine) -> None:
    numbers = document(fleet)
    assert numbers["until"] == numbers["days"][-1]["day"] == str(yesterday())
    assert datetime.fromisoformat(numbers["live"]["as_of"]) > datetime.now(UTC) - timedelta(
        minutes=1
    )


def test_a_page_whose_last_day_is_old_reports_that_counting_has_stopped(
    fleet: Engine, databases: Databases
) -> None:
    assert "Counting has stopped" not in get(fleet, "/").text
    with copied(fleet, databases) as engine:
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM measured WHERE day > current_date - 4"))
        last = long_date(yesterday() - timedelta(days=3))
        for path in ("/", "/?edition=ce"):
            said = words(get(engine, path).text)
            assert f"Counting has stopped: the last day that was counted is {last}." in said


@pytest.mark.usefixtures("looking_each_time")
def test_a_recount_is_shown_while_it_runs(fleet: Engine, databases: Databases) -> None:
    assert document(fleet)["recount"] is None
    with copied(fleet, databases) as engine:
        since = yesterday() - timedelta(days=2)
        with engine.begin() as connection:
            recount.request(connection, since)
        app = serve(engine)
        shares = []
        while recount.step(engine):
            under_way = ask(app, "/v1/stats.json").json()["recount"]
            if under_way["replayed"]:
                assert (under_way["since"], under_way["until"]) == (str(since), str(yesterday()))
                done = re.search(r"counted again: (\d+)% done", ask(app, "/").text)
                assert done
                shares.append(int(done[1]))
        assert shares == sorted({*shares})
        assert shares[-1] == 100
        assert ask(app, "/v1/stats.json").json()["recount"] is None


def over_time(numbers: Any) -> dict[tuple[str, str, str], int | None]:
    """What the CSV holds of periods, of months and of releases."""
    found = {}
    growth = numbers["growth"]
    for period in growth["periods"]:
        for name in ("new", "lost"):
            found[period["since"], f"{name}_in_{growth['by']}", ""] = period[name]
    for cohort in numbers["cohorts"]:
        found[cohort["month"], "established", ""] = cohort["established"]
        for after, installs in cohort["retained"].items():
            found[cohort["month"], "retained", after] = installs
    for release in numbers["adoption"]:
        for share in release["days"]:
            day = date.fromisoformat(release["released_on"]) + timedelta(days=share["after"])
            found[str(day), "or_newer", release["version"]] = share["installs"]
    return found


def test_the_csv_holds_the_numbers_of_the_document(fleet: Engine) -> None:
    numbers, response = document(fleet), get(fleet, "/v1/stats.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = {tuple(row[:3]): row[3] for row in csv.reader(io.StringIO(response.text))}
    rows = {name: n for name, n in rows.items() if name[1] != "live"}  # has a time of its own
    assert rows.pop(("day", "metric", "value")) == "installs"
    expected = {}
    for each in numbers["days"]:
        for name, installs in [*each["movements"].items(), ("dev_builds", each["dev_builds"])]:
            expected[each["day"], name, ""] = installs
        for version, installs in [*each["versions"].items(), (OTHER, each["other_versions"])]:
            expected[each["day"], "version", version] = installs
    expected |= over_time(numbers)
    for name, spread in numbers["values"].items():
        for group in spread["groups"]:
            expected[numbers["until"], name, group["value"]] = group["installs"]
        expected[numbers["until"], name, OTHER] = spread["folded_installs"]
    for name, feature in numbers["features"].items():
        expected[numbers["until"], name, "used"] = feature["installs"]
    assert rows == {
        name: "fewer than 5" if installs is None else str(installs)
        for name, installs in expected.items()
    }


def test_the_document_has_every_day_and_every_value(fleet: Engine) -> None:
    numbers = document(fleet, "?days=30")
    since = yesterday() - timedelta(days=29)
    assert (numbers["since"], numbers["until"]) == (str(since), str(yesterday()))
    assert [each["day"] for each in numbers["days"]] == sorted(
        {each["day"] for each in numbers["days"]}
    )
    assert len(numbers["days"]) == 30
    assert {*numbers["days"][0]["movements"]} == {*STOCKS}
    assert numbers["rounded_to"] == 5
    on_or_off = {name for name, unused in UNUSED.items() if unused == "false"}
    assert {*numbers["values"]} == {"edition", *VALUES} - on_or_off
    assert {*numbers["features"]} == {*UNUSED}


def test_days_before_the_first_count_are_not_shown_as_zero(fleet: Engine) -> None:
    assert len(document(fleet, "?days=365")["days"]) == 39


def test_a_filter_leaves_only_its_own_installs_and_is_said_in_a_sentence(fleet: Engine) -> None:
    everyone = document(fleet)
    edition = everyone["values"]["edition"]["groups"][-1]
    numbers = document(fleet, f"?edition={edition['value']}")
    assert numbers["days"][-1]["movements"]["active_2d"] == edition["installs"]
    assert numbers["live"] is None
    since = long_date(yesterday() - timedelta(days=29))
    html = get(fleet, f"/?days=30&edition={edition['value']}").text
    assert f"Only installs in the {edition['value']} edition, from {since} to" in words(html)
    assert f"<option selected>{edition['value']}</option>" in html
    assert '<option value="30" selected>Last 30 days</option>' in html
    assert f"/v1/stats.json?days=30&amp;edition={edition['value']}" in html


def test_an_empty_choice_of_the_form_is_no_filter(fleet: Engine) -> None:
    app = serve(fleet)
    asked, other = (ask(app, f"/v1/stats.json{q}") for q in ("?days=90&version=&edition=", ""))
    assert asked.json() == other.json()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("days=31", "The number of days must be 30, 90 or 365."),
        ("days=030", "The number of days must be 30, 90 or 365."),
        ("version=1.2", "A version must look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("version=%3Cb%3E", "A version must look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("version=1.2.3%0A", "A version must look like 1.2.3, 1.2.3-dev or 1.2.3-rc.1."),
        ("edition=CE", "The edition must be ce or ee."),
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
def test_a_version_that_is_not_shown_gets_the_answer_of_one_that_does_not_exist(
    fleet: Engine, form: str
) -> None:
    numbers = {*document(fleet)["all_versions"]}
    with fleet.connect() as connection:
        released = connection.scalars(text("SELECT version FROM release ORDER BY released_on"))
        hidden = next(version for version in released if version not in numbers)
    there, missing = (
        get(fleet, f"{form}?version={version}").text.replace(version, "VERSION")
        for version in (hidden, "99999.0.0")
    )
    assert _without_choices(there) == _without_choices(missing)
    assert "Too few installs" in there or form != "/"


def _without_choices(answer: str) -> str:
    # What was asked for stands at its own place among the versions.
    # The list of releases is the same, and says nothing of installs.
    return re.sub(r'<option.*?</option>\s*|"releases":\[.*?\]', "", answer)


@pytest.mark.parametrize("path", [*FORMS, "/?days=1", "/v1/stats.json?days=1", "/?version=9.9.9"])
def test_every_answer_has_strict_headers(fleet: Engine, path: str) -> None:
    headers = get(fleet, path).headers
    assert headers["content-security-policy"] == (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    )
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    refused = "no-store" if "days=1" in path else "public, max-age=60"
    assert headers["cache-control"] == refused
    assert ("etag" in headers) == (refused != "no-store")
    own = ask(serve(fleet, private=True), path).headers
    assert own["cache-control"] == refused.replace("public", "private")
    assert (own.get("vary") == "Authorization") == (refused != "no-store")


@pytest.mark.parametrize("form", FORMS)
def test_a_client_that_has_the_answer_gets_304_without_a_body(fleet: Engine, form: str) -> None:
    app = serve(fleet)
    first = ask(app, f"{form}?days=30")
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = ask(app, f"{form}?days=30", if_none_match=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
        assert again.headers["cache-control"] == "public, max-age=60"
        assert "content-security-policy" in again.headers
    for other in ('"other"', ""):
        assert ask(app, f"{form}?days=30", if_none_match=other).content == first.content
    assert ask(app, f"{form}?days=365").headers["etag"] != etag


@pytest.mark.usefixtures("looking_each_time")
def test_an_answer_is_rendered_once_until_a_day_is_counted(
    fleet: Engine, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    document = exports.document

    def counted_document(numbers: stats.Stats) -> dict[str, Any]:
        rendered.append(numbers)
        return document(numbers)

    monkeypatch.setattr(exports, "document", counted_document)
    with copied(fleet, databases) as engine:
        app = serve(engine)
        for query in ("", "?days=90", "?days=90&edition=", "?unknown=1"):
            assert ask(app, f"/v1/stats.json{query}").status_code == 200
        assert len(rendered) == 1
        for _ in range(2):
            ask(app, "/v1/stats.json?edition=ce")
        assert len(rendered) == 2
        with engine.begin() as connection:
            connection.execute(text("UPDATE daily SET installs = 1000 WHERE metric = 'active_7d'"))
            connection.execute(text("UPDATE measured SET as_of = now() WHERE day = current_date-1"))
        for query in ("", "?edition=ce"):
            last = ask(app, f"/v1/stats.json{query}").json()["days"][-1]
            assert last["movements"]["active_7d"] >= 1000
        assert len(rendered) == 4


def test_installs_are_looked_at_once_a_minute_however_many_ask(
    fleet: Engine, databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copied(fleet, databases) as engine:
        app = serve(engine)
        first = ask(app, "/v1/stats.json").json()
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE install RENAME TO elsewhere"))
            connection.execute(text("DROP TABLE heartbeat"))
        assert ask(app, "/v1/stats.json").json() == first
        for form in FORMS:
            assert ask(app, f"{form}?days=365&edition=ce").status_code == 200
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE elsewhere RENAME TO install"))
            connection.execute(text("TRUNCATE install"))
        assert ask(app, "/v1/stats.json").json()["live"] == first["live"]
        later = time.monotonic() + 1_000
        monkeypatch.setattr(time, "monotonic", lambda: later)
        live = ask(app, "/v1/stats.json").json()["live"]
        assert live.pop("as_of") > first["live"]["as_of"]
        assert live == NOBODY


def test_no_more_answers_are_kept_than_there_is_room_for(
    fleet: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CACHED", 2)
    cache = Answers(Readers(fleet))

    def render(*_: object) -> str:
        return "rendered"

    for days in ("30", "90", "365"):
        cache.get(render, answers.parse({"days": days}))
    assert [query.days for query in cache.queries] == ["90", "365"]
    cache.get(render, answers.parse({"days": "90"}))
    cache.get(render, answers.parse({"version": "99.9.9"}))
    assert [query.days for query in cache.queries] == ["365", "90"]


def test_the_style_may_be_cached_without_end_under_a_name_of_its_content(fleet: Engine) -> None:
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
def test_before_the_first_heartbeat_every_form_has_an_answer(empty: Engine, form: str) -> None:
    response = get(empty, form)
    assert response.status_code == 200
    if form == "/":
        assert "No install has reported yet" in words(response.text)


def test_when_nothing_was_found_to_count_the_page_is_as_kind(empty: Engine) -> None:
    with empty.begin() as connection:
        connection.execute(text("INSERT INTO measured VALUES (current_date - 1, now())"))
    assert "No install has reported yet" in words(get(empty, "/").text)


def test_on_the_first_day_the_page_says_that_it_is_counted_after_its_end(empty: Engine) -> None:
    with empty.begin() as connection:
        store.insert(connection, [parse(of(number)) for number in range(7)])
    said = words(get(empty, "/").text)
    assert "No day has been counted yet" in said
    assert "A day is counted after its end" in said
    assert "and 7 more are not established yet." in said
    assert document(empty)["live"]["not_established"] == 7


@pytest.mark.usefixtures("looking_each_time")
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_takes_one_transaction_that_cannot_write(fleet: Engine, form: str) -> None:
    modes = set()

    def look(_connection: Any, cursor: Any, *_: Any) -> None:
        modes.add((cursor.connection.read_only, cursor.connection.isolation_level.name))

    event.listen(fleet, "before_cursor_execute", look)
    app = serve(fleet)
    try:
        with counted() as cost:
            for _ in range(2):
                assert ask(app, f"{form}?days=365&edition=ce").status_code == 200
    finally:
        event.remove(fleet, "before_cursor_execute", look)
    assert modes == {(True, "REPEATABLE_READ")}
    # The second answer is the first one: only what it depends on is looked at.
    assert cost.each == [16, 3]


def test_a_crowd_that_asks_within_a_second_costs_the_database_one_look(
    fleet: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CHECK_SECONDS", 60.0)
    app = serve(fleet)
    with counted() as cost:
        etags = {ask(app, "/").headers["etag"] for _ in range(20)}
    assert len(etags) == 1
    assert len(cost.each) == 1


def test_a_crowd_that_asks_is_answered_at_a_rate_that_leaves_time_for_heartbeats(
    fleet: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_A_SECOND", 50)
    app = serve(fleet)
    ask(app, "/")

    async def crowd() -> set[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
            return {each.status_code for each in await asyncio.gather(*map(client.get, ["/"] * 25))}

    began = time.monotonic()
    assert asyncio.run(crowd()) == {200}
    assert 0.4 < time.monotonic() - began < 2


def test_a_new_day_is_shown_within_two_seconds(fleet: Engine, databases: Databases) -> None:
    with copied(fleet, databases) as engine:
        app = serve(engine)
        before = ask(app, "/").headers["etag"]
        with engine.begin() as connection:
            connection.execute(text("UPDATE daily SET installs = 1000 WHERE metric = 'active_7d'"))
            connection.execute(text("UPDATE measured SET as_of = now() WHERE day = current_date-1"))
        time.sleep(2)
        assert ask(app, "/").headers["etag"] != before


@pytest.mark.parametrize("form", FORMS)
def test_without_its_database_an_answer_is_503_with_a_sentence(
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
            connection.execute(text(statement), {"metrics": [*STOCKS, *FLOWS], "fields": [*VALUES]})
    html = get(empty, "/?days=365")
    style = re.search(r"/static/style-[0-9a-f]+\.css", html.text)
    assert style is not None
    assert html.text.count('<tr><th scope="row">202') == 365 + 52 + 11
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
