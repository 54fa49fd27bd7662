"""Who may see the numbers, what is held of whom, who is forgotten, and that no caller is logged."""

import base64
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from app.collector import daily, store
from app.payload import parse
from migrations import migrate
from tests.conftest import Databases
from tests.support.collector import (
    BODY,
    EXAMPLE,
    INSTANCE,
    NOWHERE,
    Collector,
    answer,
    changed,
    of,
    query,
    run,
    serving,
)
from tests.support.metrics import waiting

TOKEN = "op\u00e9n:sesame:please"  # noqa: S105 - for these tests
CLOSED = ("/", "/v1/stats.json", "/v1/stats.csv")


def everything(url: str) -> str:
    """Return all that a database holds, as text, the names of what it holds included."""
    tables = query(
        url,
        "SELECT quote_ident(table_name) FROM information_schema.tables"
        " WHERE table_schema = 'public' AND table_type = 'BASE TABLE'",
    )
    assert {("heartbeat",), ("install",), ("daily",), ("measured",)} <= set(tables)
    return "\n".join(f"{name} {row}" for (name,) in tables for row in query(url, f"TABLE {name}"))


# To know what is held


def held(collector: Collector, **parameters: str) -> dict[str, Any]:
    response = collector.held(INSTANCE, **parameters)
    assert response.status_code == 200
    answered: dict[str, Any] = response.json()
    return answered


def test_who_knows_an_id_reads_each_heartbeat_under_it_to_the_byte(own: Collector) -> None:
    later = changed(sent_at="2026-05-03T02:30:00+00:00")
    written = [parse(body).canonical() for body in (BODY, later)]
    for body in (later, BODY):
        assert own.post(json.dumps(json.loads(body), indent=3, sort_keys=True)).status_code == 202
    own.post(of(1))

    response = own.held(INSTANCE)

    answered = response.json()
    received = [datetime.fromisoformat(each.pop("received_at")) for each in answered["heartbeats"]]
    assert response.status_code == 200
    assert answered == {
        "instance_id": INSTANCE,
        "first_seen": min(received).isoformat(),
        "last_seen": max(received).isoformat(),
        "retention_days": 400,
        "heartbeats": [
            {"sent_at": f"2026-05-0{day}T02:30:00+00:00", "body": body}
            for day, body in zip((2, 3), written, strict=True)
        ],
        "more": False,
    }
    assert all(at.utcoffset() == timedelta() for at in received)
    assert written[0] == json.dumps(EXAMPLE, separators=(",", ":"))


def test_where_nothing_is_held_it_is_404_and_says_for_how_long_it_would_be(own: Collector) -> None:
    own.post(of(1))
    response = own.held(INSTANCE)
    assert (response.status_code, response.json()) == (
        404,
        {"error": "Nothing is held under this id.", "retention_days": 400},
    )


def test_what_is_kept_for_good_is_kept_for_zero_days(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", COLLECTOR_RETENTION_DAYS="0") as own:
        assert own.held(INSTANCE).json()["retention_days"] == 0
        own.post(BODY)
        assert held(own)["retention_days"] == 0


def test_after_a_deletion_nothing_is_held(own: Collector) -> None:
    own.post(BODY)
    own.forget(INSTANCE)
    assert own.held(INSTANCE).status_code == 404


def test_an_install_without_its_heartbeats_and_heartbeats_without_their_install_are_held(
    own: Collector,
) -> None:
    own.post(BODY)
    [(received_at,)] = query(own.url, "SELECT received_at FROM heartbeat")
    query(own.url, "DELETE FROM install")
    assert datetime.fromisoformat(held(own)["first_seen"]) == received_at
    assert len(held(own)["heartbeats"]) == 1
    own.post(changed(sent_at="2026-05-03T02:30:00+00:00"))
    query(own.url, "DELETE FROM heartbeat")
    answered = held(own)
    assert (answered["heartbeats"], answered["more"]) == ([], False)


def test_more_than_a_thousand_heartbeats_are_read_in_several_answers(own: Collector) -> None:
    began = datetime(2026, 1, 1, 2, 30, tzinfo=UTC)
    times = [(began + timedelta(hours=hour)).isoformat() for hour in range(2_500)]
    heartbeats = [parse(changed(sent_at=at)) for at in times]
    with create_engine(own.url, poolclass=NullPool).begin() as connection:
        store.insert(connection, heartbeats[::-1])

    answers = [held(own)]
    while answers[-1]["more"]:
        answers.append(held(own, after=answers[-1]["heartbeats"][-1]["sent_at"]))

    assert [len(each["heartbeats"]) for each in answers] == [1_000, 1_000, 500]
    assert [found["sent_at"] for each in answers for found in each["heartbeats"]] == times
    assert held(own, after=times[-1])["heartbeats"] == []
    assert held(own, after=times[-1001])["more"] is False


def test_a_sent_at_at_either_end_of_the_calendar_is_read(own: Collector) -> None:
    times = ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"]
    name = make_url(own.url).database
    query(own.url, f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
    for at in times:
        assert own.post(changed(sent_at=at)).status_code == 202
    assert [each["sent_at"] for each in held(own)["heartbeats"]] == times
    assert [each["sent_at"] for each in held(own, after=times[0])["heartbeats"]] == times[1:]


def test_a_body_that_no_schema_allows_any_more_is_read_as_it_is_stored(own: Collector) -> None:
    own.post(BODY)
    query(own.url, "UPDATE heartbeat SET body = '{\"telemetry_schema\": 0}'")
    assert [each["body"] for each in held(own)["heartbeats"]] == ['{"telemetry_schema":0}']


@pytest.mark.parametrize(
    "after",
    [
        *("", "0", "2026-05-02", "2026-05-02T02:30:00Z", "2026-05-02T02:30:00 00:00"),
        *("2026-02-30T02:30:00+00:00", "2026-05-02T02:30:00+01:00", "\0", "infinity"),
        "opensesame",
    ],
)
def test_what_is_no_sent_at_is_400(own: Collector, after: str) -> None:
    response = own.held(INSTANCE, after=after)
    assert (response.status_code, set(response.json())) == (400, {"error"})
    assert "opensesame" not in response.text


def test_no_answer_about_an_install_may_be_stored(own: Collector) -> None:
    def answers() -> dict[int, str]:
        found = [
            own.client.request(method, f"/v1/installs/{name}")
            for method in ("GET", "HEAD", "PUT", "DELETE", "GET")
            for name in (INSTANCE, "x")
        ]
        return {each.status_code: each.headers.get("cache-control", "") for each in found}

    own.post(BODY)
    whole = answers()
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    assert {**whole, **answers()} == dict.fromkeys((200, 204, 400, 404, 405, 503), "no-store")


def test_a_head_says_what_a_get_would(own: Collector) -> None:
    own.post(BODY)
    path = f"/v1/installs/{INSTANCE}"
    asked, got = own.client.head(path), own.client.get(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == str(len(got.content))


def test_a_database_that_fails_is_503_for_reading_too(own: Collector) -> None:
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    response = own.held(INSTANCE)
    assert (response.status_code, response.headers["retry-after"]) == (503, "60")
    assert response.json() == {"error": "The database is not available."}
    assert own.failures("stage=access") == [
        "collector.failed stage=access error=UndefinedTable",
    ]


def test_reading_gives_up_in_time_and_delays_no_heartbeat(own: Collector) -> None:
    statuses: list[int] = []
    readers = [
        threading.Thread(target=lambda: statuses.append(own.held(INSTANCE).status_code))
        for _ in range(20)
    ]
    assert own.post(BODY).status_code == 202
    query(own.url, "ALTER TABLE install RENAME TO known")
    query(
        own.url,
        "CREATE VIEW install AS SELECT * FROM known WHERE"
        " current_setting('transaction_read_only') = 'off' OR pg_sleep(60) IS NOT NULL",
    )
    for reader in readers:
        reader.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert own.post(of(1)).status_code == 202
    assert time.monotonic() - began < 2
    for reader in readers:
        reader.join()
    assert set(statuses) == {503}


# To be forgotten


def test_an_install_is_forgotten_with_everything_under_its_id(own: Collector) -> None:
    other = of(1)
    for body in (BODY, changed(sent_at="2026-05-03T02:30:00+00:00"), other):
        assert own.post(body).status_code == 202

    response = own.forget(INSTANCE)

    assert (response.status_code, response.content) == (204, b"")
    assert INSTANCE not in everything(own.url)
    assert len(own.rows()) == 1
    assert query(own.url, "SELECT count(*) FROM install") == [(1,)]


def test_an_answer_does_not_show_whether_there_was_anything(own: Collector) -> None:
    own.post(BODY)
    answers = [own.forget(INSTANCE) for _ in range(2)]
    for response in answers:
        response.headers.pop("date")
    assert answers[0].status_code == answers[1].status_code == 204
    assert answers[0].headers == answers[1].headers


def test_a_deleted_install_is_in_no_number(own: Collector) -> None:
    engine = create_engine(own.url, poolclass=NullPool)

    def counted() -> int:
        with engine.begin() as connection:
            return daily.live(connection).not_established

    for number in range(3):
        own.post(of(number))
    assert counted() == 3
    own.forget(of(1).partition('"instance_id": "')[2][:36])
    assert counted() == 2


@pytest.mark.parametrize(
    "name",
    [
        "opensesame",
        INSTANCE.upper(),
        INSTANCE.replace("-", ""),
        f"{{{INSTANCE}}}",
        f"urn:uuid:{INSTANCE}",
        f"{INSTANCE} ",
        f"{INSTANCE}\n",
        INSTANCE[:-1],
        INSTANCE.replace("0", "\uff10"),
        "\0",
        "%",
    ],
)
def test_what_is_no_id_in_its_one_form_is_400(own: Collector, name: str) -> None:
    own.post(BODY)
    for method in ("GET", "DELETE"):
        response = own.client.request(method, f"/v1/installs/{quote(name)}")
        assert response.status_code == 400
        assert set(response.json()) == {"error"}
        assert "opensesame" not in response.text
    assert len(own.rows()) == 1


def test_no_id_and_more_than_one_are_404(own: Collector) -> None:
    for path in ("/v1/installs", "/v1/installs/", f"/v1/installs/{INSTANCE}/x"):
        for method in ("GET", "DELETE"):
            assert own.client.request(method, path).status_code == 404
    response = own.client.put(f"/v1/installs/{INSTANCE}")
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_waits_when_an_install_is_forgotten_does_not_come_back(
    own: Collector, metrics_port: int
) -> None:
    statuses: list[int] = []
    later = [changed(sent_at=f"2026-05-{day:02}T02:30:00+00:00") for day in range(1, 29)]
    threads = [
        threading.Thread(target=lambda body=body: statuses.append(own.post(body).status_code))
        for body in later
    ]
    forgetting = threading.Thread(target=lambda: statuses.append(own.forget(INSTANCE).status_code))
    with create_engine(own.url, poolclass=NullPool).begin() as connection:
        connection.execute(text("LOCK TABLE heartbeat IN EXCLUSIVE MODE"))
        for thread in threads:
            thread.start()
        until(lambda: waiting(metrics_port) == len(threads))
        forgetting.start()
        until(lambda: waiting(metrics_port) == len(threads) + 1)
    for thread in (*threads, forgetting):
        thread.join()
    assert sorted(statuses) == [202] * 28 + [204]
    assert own.rows() == []
    assert query(own.url, "SELECT count(*) FROM install") == [(0,)]


def test_what_comes_after_that_is_503_until_its_time_is_over_and_then_a_new_install(
    own: Collector,
) -> None:
    own.post(BODY)
    own.forget(INSTANCE)

    refused = own.post(BODY)
    assert refused.status_code == 503
    assert refused.json() == {"error": "This install was deleted a moment ago."}
    assert 290 < int(refused.headers["retry-after"]) <= 300
    assert own.post(of(1)).status_code == 202
    query(own.url, "UPDATE forgotten SET at = at - interval '4 minutes'")
    refused = own.post(BODY)
    assert refused.status_code == 503
    assert 50 < int(refused.headers["retry-after"]) <= 60
    assert len(own.rows()) == 1
    assert own.held(INSTANCE).status_code == 404

    query(own.url, "UPDATE forgotten SET at = at - interval '1 minute'")
    assert own.post(BODY).status_code == 202
    assert len(own.rows()) == 2
    assert own.failures("") == []


def test_a_deletion_that_is_repeated_begins_that_time_again(own: Collector) -> None:
    own.forget(INSTANCE)
    query(own.url, "UPDATE forgotten SET at = at - interval '4 minutes'")
    own.forget(INSTANCE)
    assert int(own.post(BODY).headers["retry-after"]) > 290


def test_a_deletion_leaves_a_keyed_mark_that_differs_between_databases(
    own: Collector, databases: Databases
) -> None:
    own.forget(INSTANCE)
    marks = query(own.url, "SELECT mark FROM forgotten")
    assert len(marks) == len(marks[0][0]) / 32 == 1
    assert INSTANCE.replace("-", "") not in everything(own.url).replace("-", "")
    with databases.copy_of("template1") as url:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            migrate(connection, "collector")
        with engine.begin() as connection:
            store.forget(connection, UUID(INSTANCE))
        assert query(url, "SELECT mark FROM forgotten") != marks


def test_the_body_of_a_deletion_is_not_read_to_its_end(own: Collector) -> None:
    with socket.create_connection(("127.0.0.1", own.port)) as connection:
        first = f"DELETE /v1/installs/{INSTANCE} HTTP/1.1\r\nHost: c\r\n"
        connection.sendall(f"{first}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert answer(connection).startswith(b"HTTP/1.1 204")


def test_a_database_that_fails_is_503_for_a_deletion_too(own: Collector) -> None:
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    response = own.forget(INSTANCE)
    assert (response.status_code, response.headers["retry-after"]) == (503, "60")
    assert own.failures() == ["collector.failed stage=commit error=UndefinedTable"]


# The token


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def test_with_a_token_the_numbers_are_for_those_who_know_it(migrated: str, tmp_path: Path) -> None:
    clients = count(1)

    def get(path: str, authorization: str) -> int:
        """Ask as somebody who has not guessed before."""
        headers = [
            (b"authorization", authorization.encode()),
            (b"x-forwarded-for", f"203.0.113.{next(clients)}".encode()),
        ]
        return own.client.get(path, headers=headers).status_code

    with serving(migrated, tmp_path / "log", COLLECTOR_TOKEN=TOKEN) as own:
        for path in CLOSED:
            refused = own.client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic realm=")
            assert set(refused.json()) == {"error"}
            for right in (basic("", TOKEN), basic("anyone", TOKEN), f"Bearer {TOKEN}"):
                assert get(path, right) == 200
                assert get(path, right.replace(" ", "  ").replace("B", "b", 1)) == 200
            for wrong in (
                basic(TOKEN, ""),
                basic("anyone", TOKEN[:-1]),
                basic("anyone", TOKEN + "x"),
                f"Bearer {TOKEN}x",
                f"Digest {TOKEN}",
                "Bearer",
                "Basic",
                "Basic !",
                "Basic \u00e9",
                TOKEN,
            ):
                assert get(path, wrong) == 401
        assert own.client.head("/").status_code == 401
        page = own.client.get("/", headers={"authorization": basic("", TOKEN)}).text
        style = page.partition('href="/static/')[2].partition('"')[0]
        assert own.client.get(f"/static/{style}").status_code == 200
        assert own.post(BODY).status_code == 202
        assert own.held(INSTANCE).status_code == 200
        assert own.forget(INSTANCE).status_code == 204
        assert own.client.get("/v1/openapi.json").status_code == 200
    assert own.log()[1:] == ["collector.wrong_token count=1"]


def test_who_has_tried_ten_wrong_tokens_is_429_even_with_the_right_one(
    migrated: str, tmp_path: Path
) -> None:
    def get(token: str, client: str = "203.0.113.77") -> httpx.Response:
        headers = {"x-forwarded-for": client, "authorization": basic("", token)}
        return own.client.get("/v1/stats.json", headers=headers)

    with serving(migrated, tmp_path / "log", COLLECTOR_TOKEN=TOKEN) as own:
        for _ in range(20):
            assert own.client.get("/").status_code == 401
            assert get(TOKEN).status_code == 200
        assert [get(f"{TOKEN}{n}").status_code for n in range(10)] == [401] * 10
        for token in ("wrong", TOKEN):
            refused = get(token)
            assert (refused.status_code, refused.json()) == (
                429,
                {"error": "Too many wrong tokens."},
            )
            assert 0 < int(refused.headers["retry-after"]) <= 6
        assert get(TOKEN, "203.0.113.78").status_code == 200
        assert own.client.get("/v1/openapi.json").status_code == 200
        time.sleep(int(get(TOKEN).headers["retry-after"]))
        assert get(TOKEN).status_code == 200
    assert own.log()[1:] == ["collector.wrong_token count=1"]


def test_without_a_token_the_numbers_are_everybodys(own: Collector) -> None:
    for path in CLOSED:
        assert own.client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("COLLECTOR_TOKEN", "", "is empty"),
        ("COLLECTOR_TOKEN", "opensesame12345", "must have at least 16 characters"),
        ("COLLECTOR_CLIENT_INSTALLS", "-1", "must be greater than or equal to 0"),
        ("COLLECTOR_RETENTION_DAYS", "opensesame", "must be a number"),
        ("COLLECTOR_RETENTION_DAYS", "-1", "must be greater than or equal to 0"),
        ("COLLECTOR_RETENTION_DAYS", "", "must be a number"),
        ("COLLECTOR_CLIENT_RATE", "opensesame", "must be a number"),
        ("COLLECTOR_CLIENT_RATE", "-1", "must be greater than or equal to 0"),
    ],
)
def test_a_wrong_setting_stops_it_with_one_sentence(
    variable: str, value: str, problem: str
) -> None:
    result = run("web", COLLECTOR_DATABASE_URL=NOWHERE, **{variable: value})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{variable} {problem}")
    assert result.stderr.count("\n") == 1
    assert "opensesame" not in result.stderr


# No trace of a caller


CARRIERS = (
    *("User-Agent", "Cookie", "Referer", "From", "Origin", "X-Request-Id", "X-Kanarie"),
    *("Authorization", "Accept", "Via", "Traceparent"),
)
CANARIES = ("kanarie", "203.0.113.77", "127.0.0.1")


def status_of(client: httpx.Client, method: str, path: str, **request: Any) -> int:
    """Return the answer's status; 0 where a refusal with its body unread cut the answer off."""
    try:
        return client.request(method, path, **request).status_code
    except httpx.ReadError:
        return 0


def test_whatever_is_sent_and_whatever_fails_no_word_of_a_caller_is_kept(
    own: Collector,
) -> None:
    headers = dict.fromkeys(CARRIERS, "kanarie")
    headers |= {
        "X-Forwarded-For": "203.0.113.77",
        "X-Real-Ip": "203.0.113.77",
        "Forwarded": "for=203.0.113.77",
    }

    def call_everything() -> list[int]:
        bodies = (BODY, changed(kanarie=1), changed(deployment="kanarie\0"), "kanarie", "\ud800")
        posts = [
            status_of(
                own.client,
                "POST",
                "/v1/heartbeat?kanarie=203.0.113.77",
                content=body.encode("utf-8", "surrogatepass"),
                headers={**headers, "Content-Type": kind},
            )
            for body in bodies
            for kind in ("application/json", "kanarie/203.0.113.77")
        ]
        others = [
            status_of(
                own.client,
                method,
                f"{path}?version=kanarie&kanarie=203.0.113.77",
                headers=headers,
            )
            for method in ("GET", "DELETE", "POST", "KANARIE")
            for path in (*CLOSED, "/v1/installs/kanarie", "/kanarie", "/static/kanarie")
        ]
        installs = f"/v1/installs/{INSTANCE}?kanarie&after=kanarie"
        rights = [
            status_of(own.client, method, path, headers=headers)
            for method in ("GET", "DELETE")
            for path in (installs, f"/v1/installs/{INSTANCE}?kanarie")
        ]
        return [*posts, *others, *rights]

    assert max(call_everything()) < 500
    own.post(BODY)
    kept = everything(own.url)
    query(own.url, "ALTER TABLE heartbeat RENAME TO hidden")
    query(own.url, "ALTER TABLE measured RENAME TO hidden_too")
    assert 503 in call_everything()
    query(own.url, "ALTER TABLE hidden RENAME TO heartbeat")
    query(own.url, "ALTER TABLE hidden_too RENAME TO measured")
    query(own.url, "ALTER TABLE heartbeat ADD CHECK (false) NOT VALID")
    own.let_the_forgotten_come_again()
    assert 500 in call_everything()

    log = "\n".join(own.log())
    assert "collector.failed" in log
    for canary in (*CANARIES, INSTANCE, "docker-compose"):
        assert canary not in log
    for canary in CANARIES:
        assert canary not in kept + everything(own.url)


BROKEN = """
from app.collector import intake
from app.collector.__main__ import main

def fail(body):
    raise RuntimeError(body)

intake.parse = fail
main()
"""


def test_a_handler_that_fails_logs_its_type_and_no_message(migrated: str, tmp_path: Path) -> None:
    with serving(migrated, tmp_path / "log", [sys.executable, "-c", BROKEN, "serve"]) as own:
        response = own.post(changed(deployment="kanarie"), user_agent="kanarie")
        assert (response.status_code, response.json()) == (500, {"error": "The collector failed."})
    assert own.log()[1:] == ["collector.failed error=RuntimeError"]
