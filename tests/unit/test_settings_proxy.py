"""Which proxy a POST takes: read as other tools read it, and never a reason to send nothing."""

import ssl

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.settings.proxy import choose, exempts, proxy_url
from tests.unit.environment import MARKER, load, reason, reported

ENDPOINT = "https://telemetry.example.com/v1/heartbeat"
PROXY = "http://proxy.corp:3128"
CONTEXT = ssl.create_default_context()


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        ({"HTTPS_PROXY": PROXY}, PROXY),
        ({"https_proxy": PROXY}, PROXY),
        ({"https_proxy": PROXY, "HTTPS_PROXY": "http://other"}, PROXY),
        ({"https_proxy": "", "HTTPS_PROXY": PROXY}, None),
        ({"ALL_PROXY": PROXY}, PROXY),
        ({"all_proxy": PROXY, "HTTPS_PROXY": "http://own"}, "http://own"),
        ({"all_proxy": PROXY, "HTTPS_PROXY": " "}, PROXY),
        ({"HTTP_PROXY": PROXY}, None),
        ({"HTTPS_PROXY": f" {PROXY}\n"}, PROXY),
    ],
)
def test_the_proxy_is_that_of_the_endpoints_scheme_or_that_of_all(
    environment: dict[str, str], url: str | None
) -> None:
    assert choose(environment, ENDPOINT).url == url


def test_plain_http_has_a_proxy_of_its_own() -> None:
    environment = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": "http://other"}
    assert choose(environment, "http://h/").url == PROXY


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("proxy.corp:3128", "http://proxy.corp:3128"),
        ("user:p%40ss@proxy.corp", "http://user:p%40ss@proxy.corp"),
        ("http://user:p@ss@proxy.corp/", "http://user:p%40ss@proxy.corp"),
        ("http://user@proxy.corp", "http://user:@proxy.corp"),
        ("HTTPS://Proxy.Corp:8443", "https://proxy.corp:8443"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("10.0.0.1:3128", "http://10.0.0.1:3128"),
        ("socks5://127.0.0.1:1080", "socks5://127.0.0.1:1080"),
        ("socks5h://u:p@localhost", "socks5h://u:p@localhost"),
    ],
)
def test_a_proxy_is_read_in_every_spelling_in_use(value: str, url: str) -> None:
    assert proxy_url(value) == url
    assert choose({"HTTPS_PROXY": value}, ENDPOINT).warnings == ()
    assert httpx.Proxy(url)


BROKEN = [
    *(f"http://[::{MARKER}", f"ftp://{MARKER}", f"socks9://{MARKER}", f"socks4://{MARKER}"),
    *(f"http://h:{MARKER}{MARKER}", f"http://u:{MARKER}/w@h:1", f"http://u#{MARKER}@h", "http://"),
    *(f"http://h/{MARKER}", f"http://h:0?{MARKER}", f"http://a b{MARKER}", f"u:{MARKER}@", ":3128"),
    *(f"http://\udcff{MARKER}", f"http://u:\udcff{MARKER}@h", f"http://{MARKER}\x1b[31m", "none!"),
]


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_parsed_is_named_and_ignored_and_not_repeated(
    variable: str, value: str
) -> None:
    settings = load(**{variable: value})
    assert settings.proxy is None
    assert reason(settings) is None
    (warning,) = settings.warnings
    assert warning.startswith(f"{variable} is not a valid proxy URL")
    assert MARKER not in reported(settings)


def test_a_proxy_for_all_replaces_one_that_cannot_be_parsed() -> None:
    found = choose({"HTTPS_PROXY": "ftp://h", "ALL_PROXY": PROXY}, ENDPOINT)
    assert found.url == PROXY
    assert len(found.warnings) == 1


@given(st.text(st.characters(exclude_characters="\0"), max_size=40))
@example("http://u:p%@h")
@example("http://h%00:1")
@example("http://1.2.3.999")
@example("http://[fe80::1%eth0]:1")
@example("//h")
def test_whatever_is_taken_for_a_proxy_is_one_to_the_client(value: str) -> None:
    for given_value in (value, f"http://{value}", f"socks5://u:{value}@h:1"):
        if url := proxy_url(given_value):
            httpx.AsyncClient(proxy=httpx.Proxy(url), trust_env=False, verify=CONTEXT)


@pytest.mark.parametrize(
    ("entry", "endpoint"),
    [
        *(("*", "https://any.example/"), ("host", "https://host/"), ("HOST", "https://host/")),
        *(("example.com", "https://example.com/"), ("example.com", "https://a.b.example.com/")),
        *((".example.com", "https://example.com/"), (".example.com", "https://a.example.com/")),
        *(("*.example.com", "https://a.example.com/"), ("host", "https://HOST./")),
        *(("example.com.", "https://a.example.com/"), ("host:443", "https://host/")),
        *(("host:8443", "https://host:8443/"), (".svc:80", "http://a.svc/")),
        *(("10.0.0.7", "https://10.0.0.7/"), ("10.0.0.7:8443", "https://10.0.0.7:8443/")),
        *(("10.0.0.0/8", "https://10.1.2.3/"), ("10.1.2.3/8", "https://10.9.9.9/")),
        *(("::1", "https://[::1]/"), ("[::1]", "https://[0:0::1]/"), ("0::1", "https://[::1]/")),
        *(("[::1]:8443", "https://[::1]:8443/"), ("fd00::/8", "https://[fd12::7]/")),
        *(("[fd00::]/8", "https://[fd12::7]/"), ("https://host", "https://host/")),
        *(("a.com, ,host,", "https://host/"), ("a.com host", "https://host/")),
        *(("a.com,\thost\n", "https://host/"), ("!,host", "https://host/")),
    ],
)
@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_exempts_in_every_spelling_in_use(
    entry: str, endpoint: str, variable: str
) -> None:
    environment = {variable: entry, "ALL_PROXY": PROXY}
    assert choose(environment, endpoint).url is None


@pytest.mark.parametrize(
    ("entry", "endpoint"),
    [
        *(("", "https://host/"), ("other", "https://host/"), ("ost", "https://host/")),
        *(("ample.com", "https://example.com/"), ("a.example.com", "https://example.com/")),
        *(("host:8443", "https://host/"), ("host:80", "https://host/"), ("::1", "https://[::2]/")),
        *(("10.0.0.0/8", "https://11.0.0.1/"), ("10.0.0.0/8", "https://[fd00::1]/")),
        *(("10.0.0.0/8", "https://host/"), ("fd00::/8", "https://10.0.0.1/")),
        *(("[::1]:1", "https://[::1]/"), ("0.0.7", "https://10.0.0.7/")),
    ],
)
def test_no_proxy_exempts_nothing_else(entry: str, endpoint: str) -> None:
    assert choose({"NO_PROXY": entry, "ALL_PROXY": PROXY}, endpoint).url == PROXY


@pytest.mark.parametrize(
    "entry",
    [
        *(f"10.0.0.0/{MARKER}", f"[{MARKER}", f"h:{MARKER}{MARKER}", f"*{MARKER}*", f"h;{MARKER}"),
        *(
            f"<{MARKER}>",
            f"{MARKER}/path",
            f"é{MARKER}",
            f"\udcff{MARKER}",
            "192.168.*",
            "*.",
            "[]",
        ),
    ],
)
def test_an_entry_that_cannot_be_parsed_is_ignored_with_a_warning_and_not_repeated(
    entry: str,
) -> None:
    settings = load(HTTPS_PROXY=PROXY, NO_PROXY=f"a.com,{entry}")
    assert settings.proxy == PROXY
    (warning,) = settings.warnings
    assert warning.startswith("NO_PROXY has an invalid entry")
    assert MARKER not in reported(settings)
    assert load(NO_PROXY=entry).warnings == ()


@given(st.text(max_size=40))
def test_no_entry_is_an_error(entry: str) -> None:
    assert exempts(entry, "host", 443) in {True, False, None}
    assert exempts(entry, "::1", 443) in {True, False, None}


def test_a_password_of_a_proxy_is_in_nothing_that_settings_show() -> None:
    settings = load(HTTPS_PROXY=f"http://user:{MARKER}@proxy.corp:3128")
    assert settings.proxy == f"http://user:{MARKER}@proxy.corp:3128"
    assert MARKER not in reported(settings)
