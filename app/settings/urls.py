"""Parses the URLs of the endpoint, of Postgres and of Redis, in every spelling in use.

White space around a URL is removed.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from pydantic import AfterValidator, SecretStr

from app.settings.words import Stripped, wrong

LAST_PORT = 65_535

_PLACE = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[0-9]{0,5}))?")
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,2048}")
# If its last label is a number, it is an address or invalid (WHATWG URL, "ends in a number").
_HOST_NAME = re.compile(
    r"(?=.{1,253}$)(?!.*(?:^|\.)[0-9]+\.?$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
)


def split(url: str) -> SplitResult:
    """Split a URL; the library's own errors are replaced, because they contain the value."""
    try:
        parts = urlsplit(url)
        usable = parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise wrong("is not a valid URL")
    return parts


def is_address(host: str) -> bool:
    """Whether a host is an IPv4 or IPv6 address, without brackets."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_host(host: str) -> bool:
    """Whether a host is a name or an address that a client can use."""
    return bool(_HOST_NAME.fullmatch(host)) or is_address(host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def host_and_port(place: str) -> tuple[str, str] | None:
    """Return the host of HOST, HOST:PORT, an address or [ADDRESS]:PORT, and its port or ""."""
    if is_address(place):
        return place, ""
    parts = _PLACE.fullmatch(place)
    return (parts["v6"] or parts["host"] or "", parts["port"] or "") if parts else None


# The endpoint


def _endpoint(value: str) -> str:
    if not _URL_CHARACTERS.fullmatch(value):
        raise wrong("must be a URL of at most 2048 plain ASCII characters, without spaces")
    url = split(value)
    if url.scheme not in {"http", "https"}:
        raise wrong("must begin with https:// or http://")
    if "@" in url.netloc:
        raise wrong("must not contain a user name or a password")
    if not is_host(url.hostname or ""):
        raise wrong("must name a host")
    return value


# Postgres

# The password may contain anything but "@", as in SQLAlchemy and so in ConsentOS.
_POSTGRES_URL = re.compile(
    r"(?:postgres|postgresql|postgresql\+asyncpg|postgresql\+psycopg)://"
    r"(?P<login>(?P<user>[^:/?@]*)(?::[^@]*)?@)?"
    r"(?P<places>(?:\[[0-9a-fA-F:.]+\]|[^/\[\]?])*)"
    r"(?P<path>/[^?]*)?"
    r"(?:\?(?P<query>.*))?"
)
_PLAIN_HOST = re.compile(r"[A-Za-z0-9_.-]*|[0-9a-fA-F:.]+")
_SEARCH_PATH = re.compile(r"(?:-c\s*|--)search[_-]path\s*=\s*\"?([^\s,\"]+)")
_ASYNCPG_ONLY = frozenset(
    {
        "async_fallback",
        "command_timeout",
        "direct_tls",
        "max_cacheable_statement_size",
        "max_cached_statement_lifetime",
        "prepared_statement_cache_size",
        "prepared_statement_name_func",
        "statement_cache_size",
        "timeout",
    }
)


@dataclass(frozen=True)
class Postgres:
    """A parsed database URL: each host has a port, "" for the default port."""

    login: str
    user: str
    hosts: tuple[str, ...]
    ports: tuple[str, ...]
    path: str
    options: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, url: str) -> "Postgres":
        """Parse the spellings of libpq, asyncpg and SQLAlchemy."""
        parts = _POSTGRES_URL.fullmatch(url)
        if not parts:
            raise _not_postgres()
        options = tuple(_options(parts["query"] or ""))
        hosts, ports = _places(parts["places"], options)
        return cls(
            login=parts["login"] or "",
            user=unquote(parts["user"] or ""),
            hosts=hosts,
            ports=ports,
            path=parts["path"] or "",
            options=tuple(each for each in options if each[0] not in {"host", "port"}),
        )

    @property
    def for_sqlalchemy(self) -> str:
        """The URL for SQLAlchemy with psycopg, which accepts one plain host only."""
        (host, *others), options = self.hosts, [*self.options]
        place = ""
        if others or not _PLAIN_HOST.fullmatch(host):
            options.append(("host", ",".join(self.hosts)))
            if any(self.ports):
                options.append(("port", ",".join(self.ports)))
        else:
            port = f":{self.ports[0]}" if self.ports[0] else ""
            place = f"[{host}]{port}" if ":" in host else f"{host}{port}"
        query = f"?{urlencode(options)}" if options else ""
        return f"postgresql+psycopg://{self.login}{place}{self.path}{query}"

    @property
    def identity(self) -> str:
        """Names the database and schema: the same for every login."""
        options = dict(self.options)
        places = [
            f"{host.lower()}:{int(port or 5432)}"
            for host, port in zip(self.hosts, self.ports, strict=True)
        ]
        name = options.get("dbname") or unquote(self.path[1:]) or options.get("user") or self.user
        schemas: list[str] = _SEARCH_PATH.findall(options.get("options", ""))
        return "\n".join([",".join(places), name, schemas[-1] if schemas else "public"])


def _is_port(port: str) -> bool:
    return not port or bool(re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) <= LAST_PORT)


def _not_postgres() -> Exception:
    return wrong("must be a URL like postgresql://user:password@host:5432/database")


def _options(query: str) -> Iterator[tuple[str, str]]:
    """Yield a query's options for libpq; asyncpg spells `sslmode` `ssl`, and allows `true`."""
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "ssl":
            yield "sslmode", "require" if value == "true" else value
        elif name not in _ASYNCPG_ONLY:
            yield name, value


def _places(
    netloc: str, options: Iterable[tuple[str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the hosts and as many ports; those in the query win, as in libpq."""
    hosts, ports = _hosts_and_ports(netloc.split(","))
    hosts = tuple(map(unquote, hosts))
    query_hosts = [value for name, value in options if name == "host"]
    query_ports = [value for name, value in options if name == "port"]
    if len(query_hosts) > 1 and query_ports:
        raise _not_postgres()  # SQLAlchemy has host=h1:5432&host=h2:5432; libpq has lists
    if query_hosts:
        hosts, found = _hosts_and_ports(",".join(query_hosts).split(","))
        ports = found if any(found) else ports
    if query_ports:
        ports = tuple(query_ports[-1].split(","))
    if len(ports) == 1 or not any(ports):
        ports = ports[:1] * len(hosts)
    if len(ports) != len(hosts) or not all(map(_is_port, ports)):
        raise _not_postgres()
    return hosts, ports


def _hosts_and_ports(places: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    # The path of a socket may contain any character.
    found = [(each, "") if each.startswith(("/", "@")) else host_and_port(each) for each in places]
    known = [each for each in found if each]
    if len(known) < len(found):
        raise _not_postgres()
    return tuple(host for host, _ in known), tuple(port for _, port in known)


def _postgres_url(value: SecretStr) -> SecretStr:
    return SecretStr(Postgres.read(value.get_secret_value()).for_sqlalchemy)


# Redis

_CELERYS_WORD = re.compile(
    r"(?<=[?&]ssl_cert_reqs=)(?:CERT_)?(none|optional|required)(?=&|#|$)", re.IGNORECASE
)


def _redis_url(value: SecretStr) -> SecretStr:
    """Replace Celery's values of ssl_cert_reqs with redis-py's."""
    url = value.get_secret_value()
    if not url.startswith(("redis://", "rediss://")):
        raise wrong("must begin with redis:// or rediss://")
    split(url)
    return SecretStr(_CELERYS_WORD.sub(lambda word: word[1].lower(), url))


Endpoint = Annotated[str, Stripped, AfterValidator(_endpoint)]
PostgresUrl = Annotated[SecretStr, Stripped, AfterValidator(_postgres_url)]
RedisUrl = Annotated[SecretStr, Stripped, AfterValidator(_redis_url)]
