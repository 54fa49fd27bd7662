"""What others show and link to, over a real database: the badge, the feed, and pages of errors."""

import asyncio
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.collector import answers, store, web
from app.collector.daily import begins
from app.collector.names import OTHER
from app.collector.phrases import long_date
from app.payload import all_fields, json_schema
from app.settings.collector import CollectorSettings
from tests.support.collector import NOWHERE, serving

TOKEN = "opensesame-opensesame"  # noqa: S105 - for these tests
BADGES = ("/badge.svg", "/v1/badge.json")
CITED = (*BADGES, "/feed.atom")
TYPES = {
    "/badge.svg": "image/svg+xml",
    "/v1/badge.json": "application/json",
    "/feed.atom": "application/atom+xml",
}
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
ATOM = "{http://www.w3.org/2005/Atom}"


def ask(
    app: Starlette, path: str, method: str = "GET", *, times: int = 1, **headers: str
) -> httpx.Response:
    """Return the last of several answers."""

    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            given = {"accept": "*/*", **given}
            found = [await client.request(method, path, headers=given) for _ in range(times)]
            return found[-1]

    return asyncio.run(answered())


def serve(engine: Engine, *, token: str | None = None) -> Starlette:
    """Return a collector that has answered nothing yet, and counts nothing by itself."""
    given = {} if token is None else {"COLLECTOR_TOKEN": token}
    return web.create_app(engine, CollectorSettings.model_validate(given))


@pytest.fixture
def nowhere() -> Iterator[Engine]:
    """A collector whose database is not there."""
    engine = store.connect(NOWHERE)
    yield engine
    engine.dispose()


def yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


RELEASED = text(
    "INSERT INTO release VALUES (:version, :day) ON CONFLICT (version) DO UPDATE"
    " SET released_on = least(release.released_on, excluded.released_on)"
)


def counted(
    engine: Engine, last: date, *days: dict[str, int], late: timedelta = timedelta(0)
) -> None:
    """Have days be counted, up to ``last``, each with its active installs by version."""
    with engine.begin() as connection:
        for ago, versions in enumerate(reversed(days)):
            day = last - timedelta(days=ago)
            at = begins(day + timedelta(days=1)) + late
            connection.execute(
                text("INSERT INTO measured (day, as_of, counted_at) VALUES (:day, now(), :at)"),
                {"day": day, "at": at},
            )
            for version, installs in versions.items():
                if version != OTHER:
                    connection.execute(RELEASED, {"version": version, "day": day})
                connection.execute(
                    text(
                        "INSERT INTO daily (day, metric, version, edition, value, installs)"
                        " VALUES (:day, 'active_2d', :version, 'ce', '', :installs)"
                    ),
                    {"day": day, "version": version, "installs": installs},
                )


def entries(feed: httpx.Response) -> list[dict[str, str]]:
    found = ET.fromstring(feed.content).findall(f"{ATOM}entry")  # noqa: S314 - our own words
    return [{child.tag.removeprefix(ATOM): child.text or "" for child in entry} for entry in found]


def message(engine: Engine) -> Any:
    return ask(serve(engine), "/v1/badge.json").json()["message"]


# The badge


def test_both_badges_show_the_active_installs_of_the_last_day(empty: Engine) -> None:
    counted(empty, yesterday(), {"1.0.0": 9}, {"1.0.0": 1_200, "other": 34})
    app = serve(empty)
    assert ask(app, "/v1/badge.json").json() == {
        "schemaVersion": 1,
        "label": "active installs",
        "message": "1,234",
        "color": "1f5fbf",
        "isError": False,
        "cacheSeconds": 300,
    }
    picture = ask(app, "/badge.svg").text
    assert ">1,234</text>" in picture
    title = f"Active installs at the end of {long_date(yesterday())}: 1,234."
    assert f"<title>{title}</title>" in picture


def test_a_badge_of_few_installs_has_no_number(empty: Engine) -> None:
    counted(empty, yesterday(), {"1.0.0": 3})
    assert message(empty) == "fewer than 5"
    assert "fewer than 5</text>" in ask(serve(empty), "/badge.svg").text


def test_a_badge_of_no_installs_says_0(empty: Engine) -> None:
    counted(empty, yesterday(), {})
    assert message(empty) == "0"


def test_before_the_first_day_a_badge_says_so(empty: Engine) -> None:
    shown = ask(serve(empty), "/v1/badge.json").json()
    assert (shown["message"], shown["color"]) == ("no day counted yet", "5a616b")
    assert "no day counted yet</text>" in ask(serve(empty), "/badge.svg").text


def test_an_old_number_has_its_day_and_is_grey(empty: Engine) -> None:
    old = yesterday() - timedelta(days=3)
    counted(empty, old, {"1.0.0": 1_234})
    shown = ask(serve(empty), "/v1/badge.json").json()
    assert shown["message"] == f"1,234 on {long_date(old)}"
    assert (shown["color"], shown["isError"]) == ("5a616b", True)
    picture = ask(serve(empty), "/badge.svg").text
    assert f">1,234 on {long_date(old)}</text>" in picture
    assert "Counting has stopped." in picture
    assert "1f5fbf" not in picture


def test_the_picture_needs_nothing_else_and_its_text_is_fitted(empty: Engine) -> None:
    counted(empty, yesterday(), {"1.0.0": 1_234})
    picture = ask(serve(empty), "/badge.svg").text
    root = ET.fromstring(picture)  # noqa: S314 - our own words
    assert root.attrib["role"] == "img"
    assert {*re.findall(r"https?://[^\"' ]*", picture)} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"href|<style|\sstyle=|<script|<image|@import|url\((?!#)", picture)
    texts = root.findall(".//{http://www.w3.org/2000/svg}text")
    assert len(texts) == 2
    for each in texts:
        middle, half = float(each.attrib["x"]), float(each.attrib["textLength"]) / 2
        assert each.attrib["lengthAdjust"] == "spacingAndGlyphs"
        assert middle - half > 0
        assert middle + half < float(root.attrib["width"])


@pytest.mark.parametrize("path", CITED)
def test_a_query_changes_nothing(empty: Engine, path: str) -> None:
    counted(empty, yesterday(), {"1.0.0": 30}, {"1.0.0": 1_200, "2.0.0": 34})
    app = serve(empty)
    plain = ask(app, path)
    for query in ("?days=30", "?days=31", "?version=2.0.0", "?edition=xx", "?live=1", "?a[]=%00"):
        other = ask(app, f"{path}{query}")
        assert (other.status_code, other.content) == (200, plain.content)
        assert other.headers["etag"] == plain.headers["etag"]


# What the badge and the feed have in common


@pytest.mark.parametrize("path", CITED)
def test_an_answer_may_be_cached_and_has_strict_headers(empty: Engine, path: str) -> None:
    counted(empty, yesterday(), {"1.0.0": 1_234})
    app = serve(empty)
    for method in ("GET", "HEAD"):
        answer = ask(app, path, method)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == TYPES[path]
        assert answer.headers["cache-control"] == "public, max-age=60"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none';")
    etag = answer.headers["etag"]
    again = ask(app, path, if_none_match=etag)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)


@pytest.mark.parametrize("path", CITED)
def test_an_answer_is_rendered_once_for_each_count(
    empty: Engine, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHECK_SECONDS", "LIVE_SECONDS"):
        monkeypatch.setattr(answers, name, 0.0)
    read: list[object] = []
    numbers = answers.read

    def counting(*arguments: Any) -> Any:
        read.append(arguments)
        return numbers(*arguments)

    monkeypatch.setattr(answers, "read", counting)
    counted(empty, yesterday() - timedelta(days=1), {"1.0.0": 1_234})
    app = serve(empty)
    assert ask(app, path, times=3).status_code == 200
    assert len(read) == 1
    counted(empty, yesterday(), {"1.0.0": 1_250})
    assert ask(app, path, times=3).status_code == 200
    assert len(read) == 2


@pytest.mark.parametrize("path", CITED)
def test_with_a_token_an_answer_is_for_those_who_know_it(empty: Engine, path: str) -> None:
    counted(empty, yesterday(), {"1.0.0": 1_234})
    app = serve(empty, token=TOKEN)
    assert ask(app, path).status_code == 401
    known = ask(app, path, authorization=f"Bearer {TOKEN}")
    assert known.status_code == 200
    assert known.headers["cache-control"] == "private, max-age=60"
    assert known.headers["vary"] == "Authorization"


@pytest.mark.parametrize("path", [*CITED, "/"])
def test_the_host_that_a_caller_names_is_in_no_answer(empty: Engine, path: str) -> None:
    counted(empty, yesterday(), *[{"1.0.0": 100}] * 8, {"1.0.0": 20, "2.0.0": 20})
    app = serve(empty)
    plain = ask(app, path)
    other = ask(app, path, host="evil.example", x_forwarded_host="evil.example")
    assert other.content == plain.content
    for answer in (plain, other):
        assert "evil.example" not in f"{answer.text}{answer.headers}"
        assert "collector/" not in answer.text


@pytest.mark.parametrize("path", CITED)
def test_without_its_database_an_answer_says_so_in_its_own_form(nowhere: Engine, path: str) -> None:
    answer = ask(serve(nowhere), path)
    assert answer.status_code == 503
    assert answer.headers["cache-control"] == "no-store"
    kind = "text/plain; charset=utf-8" if path == "/feed.atom" else TYPES[path]
    assert answer.headers["content-type"] == kind
    assert "The database is not available." in answer.text
    if path == "/badge.svg":
        assert ">not available</text>" in answer.text


# The feed


def test_the_feed_has_what_rfc_4287_requires(empty: Engine) -> None:
    fell = [*[{"1.0.0": 100}] * 8, {"1.0.0": 35, "2.0.0": 20}]
    counted(empty, yesterday() - timedelta(days=3), *fell)
    answer = ask(serve(empty), "/feed.atom")
    feed = ET.fromstring(answer.content)  # noqa: S314 - our own words
    assert feed.tag == f"{ATOM}feed"
    links = {link.attrib["rel"]: link.attrib["href"] for link in feed.findall(f"{ATOM}link")}
    assert links == {"self": "/feed.atom", "alternate": "/"}
    assert feed.findtext(f"{ATOM}author/{ATOM}name")
    found = feed.findall(f"{ATOM}entry")
    assert [each.attrib["term"] for each in feed.findall(f".//{ATOM}category")] == [
        "standstill",
        "fall",
        "release",
    ]
    ids = []
    for each in (feed, *found):
        for name in ("id", "title", "updated"):
            (child,) = each.findall(f"{ATOM}{name}")
            assert child.text
        ids.append(each.findtext(f"{ATOM}id") or "")
        assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", ids[-1])
        moment = datetime.fromisoformat(each.findtext(f"{ATOM}updated") or "")
        assert moment.utcoffset() == timedelta(0)
    assert len({*ids}) == len(ids)
    for each in found:
        (content,) = each.findall(f"{ATOM}content")
        assert content.attrib == {"type": "text"}
        (link,) = each.findall(f"{ATOM}link")
        assert link.attrib["rel"] == "alternate"
    moments = [each.findtext(f"{ATOM}updated") or "" for each in found]
    assert moments == sorted(moments, reverse=True)
    assert feed.findtext(f"{ATOM}updated") == moments[0]


def test_an_entry_keeps_its_id_while_days_are_added(empty: Engine) -> None:
    before = yesterday() - timedelta(days=2)
    counted(empty, before, *[{"1.0.0": 100}] * 8, {"1.0.0": 30, "2.0.0": 30})
    standing, *first = entries(ask(serve(empty), "/feed.atom"))
    counted(empty, yesterday(), *[{"1.0.0": 25, "2.0.0": 30}] * 2)
    later = entries(ask(serve(empty), "/feed.atom"))
    assert standing["title"] == "Counting has stopped"
    assert [each["title"] for each in first] == [
        "Active installs fell by more than 30% in 7 days",
        "2.0.0 reached 10% of the active installs",
    ]
    assert later == first


def test_a_feed_without_an_event_is_valid_too(empty: Engine) -> None:
    for days in ([], [{"1.0.0": 100}]):
        counted(empty, yesterday(), *days)
        answer = ask(serve(empty), "/feed.atom")
        feed = ET.fromstring(answer.content)  # noqa: S314 - our own words
        assert entries(answer) == []
        assert feed.findtext(f"{ATOM}updated")


def test_the_feed_reports_that_counting_has_stopped(empty: Engine) -> None:
    last = yesterday() - timedelta(days=2)
    counted(empty, last, {"1.0.0": 10}, {"1.0.0": 10})
    (entry,) = entries(ask(serve(empty), "/feed.atom"))
    assert entry["title"] == "Counting has stopped"
    assert f"The last day that was counted is {long_date(last)}." in entry["content"]


def test_days_that_were_counted_late_are_in_the_feed(empty: Engine) -> None:
    counted(empty, yesterday() - timedelta(days=2), {"1.0.0": 10}, {"1.0.0": 10})
    counted(empty, yesterday(), *[{"1.0.0": 10}] * 2, late=timedelta(hours=5))
    (entry,) = entries(ask(serve(empty), "/feed.atom"))
    assert entry["title"] == "Counting was late"
    first = long_date(yesterday() - timedelta(days=1))
    assert f"The days from {first} to {long_date(yesterday())} were counted" in entry["content"]
    with empty.begin() as connection:
        connection.execute(text("UPDATE measured SET counted_at = NULL"))
    assert entries(ask(serve(empty), "/feed.atom")) == []


# Errors


@pytest.mark.parametrize("accept", [CHROMIUM, FIREFOX, "text/html", "text/html, */*", "text/*"])
def test_a_browser_gets_a_page_for_a_path_that_is_not_there(nowhere: Engine, accept: str) -> None:
    for method in ("HEAD", "GET"):
        answer = ask(serve(nowhere), "/nothing", method, accept=accept)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers.get_list("cache-control") == ["no-store"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none';")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<title>Page not found · ConsentOS installs</title>" in answer.text
    assert '<p class="answer">There is no page at this address.</p>' in answer.text
    assert '<a href="/">' in answer.text
    assert '<meta name="robots" content="noindex">' in answer.text


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/json",
        "application/json, text/plain, */*",
        "text/html, application/json",
        "text/html;q=0.5, application/json",
        "text/html;q=0",
        "text/html;q=nonsense",
        "",
        ",;/q=",
    ],
)
def test_everybody_else_gets_json(nowhere: Engine, accept: str) -> None:
    answer = ask(serve(nowhere), "/nothing", accept=accept)
    assert answer.status_code == 404
    assert answer.json() == {"error": "Not Found"}
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/installs/nobody", "/v1/stats.json?days=1"])
def test_a_path_of_the_api_answers_a_browser_in_json(nowhere: Engine, path: str) -> None:
    answer = ask(serve(nowhere), path, accept=CHROMIUM)
    assert answer.status_code in {400, 404}
    assert answer.headers["content-type"] == "application/json"


def test_a_browser_gets_a_page_for_a_method_that_is_not_allowed(nowhere: Engine) -> None:
    answer = ask(serve(nowhere), "/", "POST", accept=CHROMIUM)
    assert answer.status_code == 405
    assert {*answer.headers["allow"].split(", ")} == {"GET", "HEAD"}
    assert "<h1>Method not allowed</h1>" in answer.text


def test_a_browser_without_the_token_is_asked_for_it_and_gets_a_page(nowhere: Engine) -> None:
    answer = ask(serve(nowhere, token=TOKEN), "/", accept=CHROMIUM)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert "<h1>This page needs a token</h1>" in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_a_browser_with_too_many_wrong_tokens_gets_a_page_that_says_to_wait(
    nowhere: Engine,
) -> None:
    app = serve(nowhere, token=TOKEN)
    answer = ask(app, "/", times=11, accept=CHROMIUM, authorization="Bearer wrong")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert "Wait a few seconds, then try again." in answer.text


def test_a_browser_gets_a_page_when_the_collector_fails(nowhere: Engine) -> None:
    def fail(_: Request) -> Response:
        raise RuntimeError("a word that nobody may read")

    app = serve(nowhere)
    app.router.routes.append(Route("/fails", fail))
    answer = ask(app, "/fails", accept=CHROMIUM)
    assert answer.status_code == 500
    assert "The collector failed. Try again later." in answer.text
    assert "nobody may read" not in answer.text
    assert ask(app, "/fails").json() == {"error": "The collector failed."}


def test_a_page_of_an_error_has_nothing_that_the_caller_wrote(nowhere: Engine) -> None:
    app = serve(nowhere)
    for host in ("evil.example", "[", "evil.example/<b>"):
        answer = ask(app, "/evil<b>?evil", accept=CHROMIUM, host=host)
        assert answer.status_code == 404
        assert "evil" not in f"{answer.text}{answer.headers}"


def test_an_answer_to_head_has_no_body_on_the_wire(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log") as collector:
        for path, status in (("/nothing", 404), ("/badge.svg", 200), ("/feed.atom", 200)):
            whole = collector.client.get(path, headers={"accept": FIREFOX})
            head = collector.client.head(path, headers={"accept": FIREFOX})
            assert (head.status_code, head.content) == (status, b"")
            assert head.headers["content-length"] == str(len(whole.content))
            assert head.headers["content-type"] == whole.headers["content-type"]


# What search engines and those who link to the page read


def test_the_page_may_be_indexed_unless_it_needs_a_token(empty: Engine) -> None:
    counted(empty, yesterday(), {"1.0.0": 1_234})
    assert 'name="robots"' not in ask(serve(empty), "/").text
    closed = ask(serve(empty, token=TOKEN), "/", authorization=f"Bearer {TOKEN}")
    assert '<meta name="robots" content="noindex">' in closed.text
    wrong = ask(serve(empty), "/?days=1")
    assert wrong.status_code == 400
    assert '<meta name="robots" content="noindex">' in wrong.text


def test_the_page_names_its_other_forms_and_describes_itself(empty: Engine) -> None:
    counted(empty, yesterday(), {"1.0.0": 1_234})
    html = ask(serve(empty), "/").text
    alternates = re.findall(
        r'<link rel="alternate" type="([^"]*)" title="[^"]*" href="([^"]*)">', html
    )
    assert alternates == [
        ("application/atom+xml", "/feed.atom"),
        ("application/json", "/v1/stats.json"),
        ("text/csv", "/v1/stats.csv"),
    ]
    (title,) = re.findall(r"<title>([^<]*)</title>\n<meta", html)
    (description,) = re.findall(r'<meta name="description" content="([^"]+)">', html)
    assert f'<meta property="og:title" content="{title}">' in html
    assert f'<meta property="og:description" content="{description}">' in html
    assert '<meta property="og:type" content="website">' in html


def test_who_sends_a_heartbeat_can_read_what_is_in_it_without_a_token(nowhere: Engine) -> None:
    app = serve(nowhere, token=TOKEN)
    shown = ask(app, "/heartbeat")
    assert shown.status_code == 200
    for name in all_fields():
        assert f"<code>{name}</code>" in shown.text
    assert "the time of receipt, for 400 days." in shown.text
    assert "TELEMETRY_ENABLED=false" in shown.text
    assert '<meta name="robots" content="noindex">' in shown.text
    schema = ask(app, "/v1/heartbeat.schema.json")
    assert schema.json() == json_schema()
    assert schema.headers["content-type"] == "application/schema+json"
    for answer in (shown, schema):
        assert answer.headers["cache-control"] == "public, max-age=3600"
        again = ask(app, answer.url.path, if_none_match=answer.headers["etag"])
        assert (again.status_code, again.content) == (304, b"")
