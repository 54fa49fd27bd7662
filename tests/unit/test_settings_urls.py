"""Endpoint, database and Redis: every spelling in use is understood, and no secret is reported."""

import re
import ssl
import traceback
from urllib.parse import quote

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from app.settings import SettingsError
from app.settings.collector import CollectorSettings
from tests.unit.environment import MARKER, load, reason, reported

CONNECTIONS = ("DATABASE_URL", "MIGRATION_DATABASE_URL", "REDIS_URL")


@pytest.mark.parametrize(
    "url",
    [
        "https://telemetry.example.com/v1/heartbeat",
        "HTTPS://telemetry.example.com:8443",
        "https://under_score.example.com./a?token=b%20c#d",
        "https://192.0.2.7/",
        "https://[2001:db8::7]:8443/",
        "http://localhost:8000/v1/heartbeat",
    ],
)
def test_an_endpoint_is_any_http_url_with_a_host(url: str) -> None:
    settings = load(TELEMETRY_ENDPOINT=url)
    assert reason(settings) is None
    assert settings.telemetry_endpoint == url
    assert httpx.URL(url).host


@pytest.mark.parametrize(
    "url",
    [
        *("", MARKER, f"//{MARKER}/", f"/{MARKER}", f"https:{MARKER}", f"https:///{MARKER}"),
        *(
            f"ftp://{MARKER}/",
            f"file:///{MARKER}",
            f"javascript://{MARKER}/",
            f"https://:1/{MARKER}",
        ),
        *(f"https://{MARKER}@host/", f"https://u:{MARKER}@host/", f"https://@{MARKER}/"),
        *(
            f"https://host:{MARKER}{MARKER}/",
            f"https://host:0/{MARKER}",
            f"https://host:p{MARKER}/",
        ),
        *(f"https://[{MARKER}]/", f"https://[::1/{MARKER}", f"https://a..b/{MARKER}"),
        *(
            f"https://host {MARKER}/",
            f"https://host\n{MARKER}/",
            f"https://é{MARKER}/",
        ),
        *(f"https://host\\{MARKER}/", f"https://%68ost/{MARKER}", f"https://{'a' * 64}/{MARKER}"),
    ],
)
def test_anything_else_is_no_endpoint_and_means_off(url: str) -> None:
    settings = load(TELEMETRY_ENDPOINT=url)
    assert (reason(settings) or "").startswith("TELEMETRY_ENDPOINT ")
    assert MARKER not in reported(settings)


@pytest.mark.parametrize(
    "url", ["https://999.1.1.1/", "https://1.2.3.256./", f"https://host/{'a' * 70_000}"]
)
def test_an_endpoint_that_no_client_can_use_means_off(url: str) -> None:
    assert reason(load(TELEMETRY_ENDPOINT=url))


@given(
    st.from_regex(
        r"https?://[a-z0-9.-]{1,12}(:[0-9]{0,6})?(/[!-~]{0,9})?"
        r"|https?://([0-9]{1,3}\.){3}[0-9]{1,3}"
        r"|https?://\[[0-9a-f:.%]{2,20}\]",
        fullmatch=True,
    )
)
def test_whatever_is_accepted_as_an_endpoint_is_a_url_to_the_client(url: str) -> None:
    assert httpx.URL(load(TELEMETRY_ENDPOINT=url).telemetry_endpoint)


@pytest.mark.parametrize(
    "host", ["example.com", "10.0.0.7", "receiver:8000", "localhost.example.com", "[2001:db8::7]"]
)
def test_plain_http_beyond_loopback_earns_a_warning(host: str) -> None:
    settings = load(TELEMETRY_ENDPOINT=f"http://{host}/v1?token={MARKER}")
    assert reason(settings) is None
    (warning,) = settings.warnings
    assert warning.startswith("TELEMETRY_ENDPOINT uses plain http")
    assert host not in warning


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost/", "http://LOCALHOST:8000/", "http://127.0.0.1:8000/"),
        *("http://127.8.9.1/", "http://[::1]:8000/", "https://example.com/"),
    ],
)
def test_https_and_loopback_earn_none(url: str) -> None:
    assert load(TELEMETRY_ENDPOINT=url).warnings == ()


def test_the_endpoint_is_shown_without_its_query() -> None:
    settings = load(TELEMETRY_ENDPOINT=f"https://example.com:8443/v1?token={MARKER}#{MARKER}")
    assert settings.endpoint_without_query == "https://example.com:8443/v1"


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("postgres://u:p@h:5432/d", "postgresql+psycopg://u:p@h:5432/d"),
        ("postgresql://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql+psycopg://h", "postgresql+psycopg://h"),
        ("postgresql+asyncpg://u:p@[::1]:5432/d", "postgresql+psycopg://u:p@[::1]:5432/d"),
        ("postgresql+asyncpg://h/d?ssl=require", "postgresql+psycopg://h/d?sslmode=require"),
        (
            "postgresql+asyncpg://h/d?ssl=verify-full",
            "postgresql+psycopg://h/d?sslmode=verify-full",
        ),
        ("postgresql+asyncpg://h/d?ssl=true", "postgresql+psycopg://h/d?sslmode=require"),
        ("postgres://h/d?sslmode=disable", "postgresql+psycopg://h/d?sslmode=disable"),
        (
            "postgresql+asyncpg://h/d?prepared_statement_cache_size=0&ssl=prefer&application_name=a",
            "postgresql+psycopg://h/d?sslmode=prefer&application_name=a",
        ),
        ("postgresql+asyncpg://h/d?statement_cache_size=0", "postgresql+psycopg://h/d"),
        ("postgresql+asyncpg://h/d?prepared_statement_name_func=f", "postgresql+psycopg://h/d"),
        ("postgresql:///d?host=/var/run/pg", "postgresql+psycopg:///d?host=/var/run/pg"),
        ("postgresql+asyncpg://u:p@/d?host=/a%20b", "postgresql+psycopg://u:p@/d?host=/a%20b"),
        ("postgres://u:p%40:/?#%25@h/d", "postgresql+psycopg://u:p%40:/?#%25@h/d"),
    ],
)
@pytest.mark.parametrize("variable", ["DATABASE_URL", "MIGRATION_DATABASE_URL"])
def test_every_spelling_of_a_database_becomes_one_for_psycopg(
    variable: str, given_url: str, url: str
) -> None:
    read = load(**{variable: given_url}).require(variable.lower())
    assert make_url(read) == make_url(url)


letters = st.characters(codec="utf-8", exclude_characters="\0")


@given(st.text(letters, min_size=1), st.text(letters, min_size=1))
def test_a_password_of_any_characters_arrives_as_it_is_when_it_is_quoted(
    user: str, password: str
) -> None:
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    read = make_url(load(DATABASE_URL=f"postgres://{login}@h/d").require("database_url"))
    assert (read.username, read.password, read.host) == (user, password, "h")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0@"), min_size=1))
def test_a_password_that_is_not_quoted_is_read_as_consentos_reads_it(password: str) -> None:
    url = f"postgresql+asyncpg://u:{password}@h:5432/d"
    read = load(DATABASE_URL=url).require("database_url")
    assert make_url(read) == make_url(url).set(drivername="postgresql+psycopg")


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("postgresql://u@h1:5432,h2:5433/d", "//u@/d?host=h1,h2&port=5432,5433"),
        ("postgresql://u:p@h1,h2/d", "//u:p@/d?host=h1,h2"),
        ("postgresql://h1,h2:5433/d", "///d?host=h1,h2&port=,5433"),
        ("postgres://[::1]:5432,[fd00::2]/d", "///d?host=::1,fd00::2&port=5432,"),
        (
            "postgresql+asyncpg://u@h1:1,h2:2/d?target_session_attrs=read-write",
            "//u@/d?host=h1,h2&port=1,2&target_session_attrs=read-write",
        ),
        ("postgresql+asyncpg://u@/d?host=h1:1&host=h2:2", "//u@/d?host=h1,h2&port=1,2"),
        ("postgresql+asyncpg://u@/d?host=h1&host=h2", "//u@/d?host=h1,h2"),
        ("postgresql:///d?host=h1,h2&port=5433", "///d?host=h1,h2&port=5433,5433"),
        ("postgresql:///d?host=h&port=5433", "//h:5433/d"),
        ("postgresql://u@%2Fvar%2Frun%2Fpg:5433/d", "//u@/d?host=/var/run/pg&port=5433"),
        ("postgresql://u@%2Fvar%2Frun%2Fpg/d", "//u@/d?host=/var/run/pg"),
        ("postgresql:///d?host=/var/run/pg&port=5433", "///d?host=/var/run/pg&port=5433"),
        ("postgresql://:5433/d?host=/var/run/pg", "///d?host=/var/run/pg&port=5433"),
        ("postgresql://u@:5433/d", "//u@:5433/d"),
        ("postgresql://h/d?host=/var/run/a:b", "///d?host=/var/run/a:b"),
        ("postgresql:///d?host=@pg", "///d?host=@pg"),
    ],
)
def test_several_hosts_and_sockets_become_the_form_that_sqlalchemy_takes(
    given_url: str, url: str
) -> None:
    read = load(DATABASE_URL=given_url).require("database_url")
    assert make_url(read) == make_url(f"postgresql+psycopg:{url}")
    assert load(DATABASE_URL=read).require("database_url") == read


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://h:0/d", "postgresql://h1:1,h2:65536/d", "postgresql://h1,h2:port/d"),
        *("postgresql:///d?host=h1,h2,h3&port=1,2", "postgresql:///d?host=h1:1&host=h2&port=3"),
        *("postgresql://h/d?port=one", "postgresql://h/d?port=1,2"),
    ],
)
def test_ports_that_do_not_fit_their_hosts_are_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL must be "):
        load(DATABASE_URL=url).require("database_url")


@pytest.mark.parametrize("around", [" {} ", "\n{}", "{}\n", "\t{}\r\n"])
def test_white_space_around_any_url_is_dropped(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = around.format("postgres://u@h/d")
    settings = load(
        DATABASE_URL=database,
        MIGRATION_DATABASE_URL=database,
        REDIS_URL=around.format("redis://h/0"),
        TELEMETRY_ENDPOINT=around.format("https://example.com/v1"),
    )
    assert reason(settings) is None
    assert settings.require("database_url") == "postgresql+psycopg://u@h/d"
    assert settings.require_admin() == "postgresql+psycopg://u@h/d"
    assert settings.require("redis_url") == "redis://h/0"
    assert settings.telemetry_endpoint == "https://example.com/v1"
    monkeypatch.setenv("COLLECTOR_DATABASE_URL", database)
    collector = CollectorSettings.load()
    assert collector.require("collector_database_url") == "postgresql+psycopg://u@h/d"


CHECKS = {
    **dict.fromkeys(["CERT_NONE", "cert_none", "none", "None", "NONE"], ssl.CERT_NONE),
    **dict.fromkeys(["CERT_OPTIONAL", "cert_optional", "optional"], ssl.CERT_OPTIONAL),
    **dict.fromkeys(["CERT_REQUIRED", "cert_required", "required"], ssl.CERT_REQUIRED),
}


@pytest.mark.parametrize(("word", "check"), CHECKS.items())
@pytest.mark.parametrize("query", ["?ssl_cert_reqs={}", "?db=1&ssl_cert_reqs={}&timeout=3"])
def test_celerys_words_for_checking_a_certificate_are_understood(
    word: str, check: ssl.VerifyMode, query: str
) -> None:
    url = load(REDIS_URL=f"rediss://:p@h:6380/0{query.format(word)}").require("redis_url")
    options = redis.connection.parse_url(url)
    made = redis.SSLConnection(ssl_cert_reqs=options["ssl_cert_reqs"])
    assert made.cert_reqs == check


def namespace(url: str) -> str:
    return load(DATABASE_URL=url).namespace


def test_a_namespace_is_ours_with_eight_hex_digits() -> None:
    assert re.fullmatch("consentos-telemetry-[0-9a-f]{8}", namespace("postgresql://u@h/d"))


@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://h/d", "postgres://another:p@h:5432/d", "postgresql+asyncpg://u@H/d?ssl=1"),
        *("postgresql://u@h/d?sslmode=require", "postgresql:///d?host=h&port=5432"),
        *("postgresql://h/d?options=-csearch_path%3Dpublic", " postgresql://h/%64\n"),
    ],
)
def test_whoever_works_on_the_same_tables_has_the_same_namespace(url: str) -> None:
    assert namespace(url) == namespace("postgresql://u@h/d")


def test_another_host_port_database_or_schema_has_another_namespace() -> None:
    urls = [
        *("postgresql://u@h/d", "postgresql://u@h2/d", "postgresql://u@h:5433/d"),
        *("postgresql://u@h/d2", "postgresql://u@h,h2/d", "postgresql://u@h2,h/d"),
        *("postgresql://u@h", "postgresql://d2@h:5434", "postgresql://u@h/D"),
        *("postgresql://u@h/d?options=-csearch_path%3Da,public", "postgresql:///d?host=/h"),
        "postgresql://u@h/d?options=-c%20statement_timeout%3D1s%20-c%20search_path%3Db",
    ]
    assert len({namespace(url) for url in urls}) == len(urls)


def test_a_namespace_needs_a_database() -> None:
    with pytest.raises(SettingsError, match=r"^DATABASE_URL is not set\.$"):
        assert load().namespace


@pytest.mark.parametrize("url", ["redis://h", "rediss://u:p%40@h:6380/1", "redis://[::1]/0?a=b"])
def test_a_redis_is_named_with_or_without_tls(url: str) -> None:
    assert load(REDIS_URL=url).require("redis_url") == url


@pytest.mark.parametrize("variable", CONNECTIONS)
@pytest.mark.parametrize(
    "value",
    [
        *("", " ", MARKER, f"mysql://u:{MARKER}@h/d", f"{MARKER}://h/d", f"http://{MARKER}/"),
        *(f"postgres:/{MARKER}", f"postgres://h:port{MARKER}/d", f"postgres://[{MARKER}/d"),
        *(
            f"redis+{MARKER}://h",
            f"unix://{MARKER}",
            f"redis://h:{MARKER}{MARKER}",
            f"\udcff{MARKER}",
        ),
    ],
)
def test_an_invalid_connection_url_is_refused_by_name_and_is_not_repeated(
    variable: str, value: str
) -> None:
    settings = load(**{variable: value})
    with pytest.raises(SettingsError, match=rf"^{variable} ") as refusal:
        settings.require(variable.lower())
    everything = [reported(settings), *traceback.format_exception(refusal.value)]
    assert MARKER not in "".join(everything)


@pytest.mark.parametrize("variable", CONNECTIONS)
def test_a_connection_that_is_not_set_is_asked_for_by_name(variable: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{variable} is not set\.$"):
        load().require(variable.lower())


def test_no_secret_is_in_what_settings_show_of_themselves() -> None:
    settings = load(
        DATABASE_URL=f"postgres://u:{MARKER}@h/d",
        MIGRATION_DATABASE_URL=f"postgres://u:{MARKER}@h/d",
        REDIS_URL=f"redis://:{MARKER}@h",
    )
    assert reason(settings) is None
    assert MARKER not in reported(settings)


def test_no_token_of_the_endpoint_is_in_what_settings_show_of_themselves() -> None:
    settings = load(TELEMETRY_ENDPOINT=f"https://example.com/v1?token={MARKER}")
    assert MARKER not in reported(settings)


@pytest.mark.parametrize("value", ["", "0", "65536", "-1", "http", f"{MARKER}x"])
def test_the_collector_refuses_an_invalid_port(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", value)
    with pytest.raises(SettingsError, match=r"^PORT must be ") as refusal:
        CollectorSettings.load().refuse_what_is_wrong()
    assert MARKER not in str(refusal.value)


def test_the_collector_listens_on_the_port_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORT", "65535")
    assert CollectorSettings.load().port == 65_535
